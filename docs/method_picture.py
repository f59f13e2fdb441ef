"""Draws docs/method.png: one round of FedGS with two clients, in the plane of two weights.

    python docs/method_picture.py

A toy example, computed with the project's own definitions: the masks of a batch give its step scale
eta (mask_difficulty), AdamW walks from the server's theta (adamw_accumulate_), and the server adds
up what the clients report (aggregate). Only the masks and the pull of each batch are made up.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image
from torch import Tensor

import fedgs
from support.pictures import BLUE, GREEN, RED

PICTURE = Path(__file__).parent / "method.png"

LR = 0.1  # much larger than in practice, so that the steps can be seen
LOG_BASE = 100.0  # PolypGen's l
TAU = 150  # a lesion is small if it covers at most 1/tau of its image
SIDE = 64  # pixels along the side of a mask

INK = "#222222"
GREY = "#6f6f6f"
LESION = "#8f8f8f"
TISSUE = "#f0eee8"


class Client(NamedTuple):
    """A client of the example."""

    name: str
    colour: str
    small: tuple[int, ...]  # how many of the four lesions of each batch are small
    pull: tuple[float, float]  # where a batch of large lesions pulls the two weights
    pull_small: tuple[float, float]  # where a batch with small ones does


CLIENTS = (
    Client("Client 1", RED, (0, 0, 0, 0, 0), (-1.6, 1.8), (0.0, 0.0)),
    Client("Client 2", BLUE, (0, 0, 1, 2, 2, 1), (2.0, -0.5), (0.5, 2.0)),
)


class Work(NamedTuple):
    """What a client does in the round, step by step."""

    masks: list[Tensor]  # (4, SIDE, SIDE) each
    etas: list[float]
    own: Tensor  # (T + 1, 2), its own weights, from theta on
    reported: Tensor  # (T + 1, 2), theta - Delta_k as Delta_k grows
    update: Tensor  # (2,), Delta_k


# ------------------------------------------------------------------------------------ the round


def draw_masks(small: int, random: np.random.Generator) -> Tensor:
    """Four masks of an elliptic lesion each, so many of them small. -> (4, SIDE, SIDE) bool"""
    row, column = np.mgrid[:SIDE, :SIDE]
    masks = []
    for i in range(4):
        low, high = (2.3, 2.9) if i < small else (9, 15)
        height, width = random.uniform(low, high, size=2)
        top, left = random.uniform(18, SIDE - 18, size=2)
        distance = np.hypot((row - top) / height, (column - left) / width)
        masks.append(distance <= 1)

    shuffled = random.permutation(np.stack(masks))
    return torch.from_numpy(shuffled)


def are_small(masks: Tensor) -> Tensor:
    """(N, SIDE, SIDE) -> (N,) bool"""
    return masks.sum(dim=(1, 2)) * TAU <= SIDE * SIDE


def train(client: Client, theta: Tensor, random: np.random.Generator) -> Work:
    """A client's part of the round, as fedgs.train_client does it."""
    mine = theta.clone()
    update = torch.zeros(2)
    m = torch.zeros(2)
    v = torch.zeros(2)
    masks_of_steps = []
    etas = []
    own = [theta]
    reported = [theta]

    for step, small in enumerate(client.small, start=1):
        masks = draw_masks(small, random)
        _, _, eta = fedgs.mask_difficulty(masks, are_small(masks), LOG_BASE)

        # A batch's loss is a bowl here: its gradient points away from where the batch pulls.
        pull = client.pull_small if small else client.pull
        gradient = mine - torch.tensor(pull)
        fedgs.adamw_accumulate_(mine, gradient, m, v, step, LR, update, eta)

        masks_of_steps.append(masks)
        etas.append(eta.item())
        own.append(mine.clone())
        reported.append(theta - update)
    return Work(masks_of_steps, etas, torch.stack(own), torch.stack(reported), update)


def aggregate(theta: Tensor, updates: list[Tensor], shares: list[float]) -> Tensor:
    """The server's step: theta - sum_k w_k Delta_k"""
    new, _, _ = fedgs.aggregate(theta, updates, [-share for share in shares])
    return new


# ------------------------------------------------------------------------------------- batches


def draw_batches(figure: Figure, client: Client, work: Work, left: float, top: float) -> None:
    """A client's batches in a row, each with its step scale. left, top: a corner, in inches."""
    width, height = figure.get_size_inches()
    tile = 0.57
    count = len(work.etas)
    text = f"{client.name}: {count} batches of 4 images"
    figure.text(left / width, top / height, text, color=client.colour, weight="bold", va="top")

    for step, (masks, eta) in enumerate(zip(work.masks, work.etas, strict=True)):
        x = left + step * (tile + 0.1)
        y = top - 0.24 - tile
        axes = figure.add_axes((x / width, y / height, tile / width, tile / height))
        draw_batch(axes, masks, client.colour)
        if eta > 1:
            axes.set_xlabel(f"η = {eta:.2f}", color=client.colour, weight="bold", size=9)
        else:
            axes.set_xlabel("η = 1", color=INK, size=9)


def draw_batch(axes: Axes, masks: Tensor, colour: str) -> None:
    """Four masks, two by two. Small lesions are coloured and ringed, and so is their batch."""
    gap = 6
    edge = 2 * SIDE + 2 * gap
    small = are_small(masks)

    for i, mask in enumerate(masks):
        left = (i % 2) * (SIDE + gap)
        top = (i // 2) * (SIDE + gap)
        shades = torch.tensor([to_rgb(TISSUE), to_rgb(colour if small[i] else LESION)])
        axes.imshow(shades[mask.int()], extent=(left, left + SIDE, top + SIDE, top))
        if small[i]:
            row, column = mask.nonzero().float().mean(dim=0) + 0.5
            ring = Circle((left + column, top + row), 13, fill=False, color=colour, lw=1)
            axes.add_patch(ring)

    axes.set(xlim=(-gap, edge), ylim=(edge, -gap), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_edgecolor(colour if small.any() else "#bbbbbb")
        spine.set_linewidth(2 if small.any() else 0.8)


# --------------------------------------------------------------------------------------- paths


def draw_own(axes: Axes, work: Work) -> None:
    """Where AdamW takes the client: dots joined by a dotted line."""
    x, y = work.own.T
    axes.plot(x, y, "o:", color=GREY, markersize=4, linewidth=1.3, zorder=2)


def draw_reported(axes: Axes, client: Client, work: Work) -> None:
    """What the client reports: each step pale as AdamW took it, then in colour what eta adds."""
    for t, eta in enumerate(work.etas):
        before = work.reported[t]
        after = work.reported[t + 1]
        taken = before + (after - before) / eta
        draw_line(axes, before, taken, color=client.colour, linewidth=5, alpha=0.35)
        draw_line(axes, taken, after, color=client.colour, linewidth=5)
        axes.plot(after[0], after[1], "o", color=client.colour, markersize=5, zorder=4)

    x, y = work.reported[-1]
    axes.plot(x, y, "s", color=client.colour, markersize=11, zorder=5)


def draw_line(axes: Axes, start: Tensor, end: Tensor, **style: object) -> None:
    x, y = torch.stack([start, end]).T
    axes.plot(x, y, solid_capstyle="butt", zorder=3, **style)


def draw_step(axes: Axes, start: Tensor, end: Tensor, colour: str, width: float) -> None:
    """An arrow for the step of a server."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 5, "shrinkB": 9}
    axes.annotate("", end.tolist(), start.tolist(), arrowprops=style, zorder=4)


# --------------------------------------------------------------------------------------- words


def label_client_1(axes: Axes) -> None:
    own_steps = (
        "Client 1 trains with AdamW.\n"
        "It reports its steps as they are:\n"
        "none of its lesions is small."
    )
    axes.text(-0.7, 0.17, own_steps, color=RED, va="center")
    axes.text(-0.545, 0.5, r"$\theta - \Delta_1$", color=RED, size=13, ha="right", va="center")


def label_client_2(axes: Axes, work: Work) -> None:
    for t, eta in enumerate(work.etas):
        if eta > 1:
            x, y = (work.reported[t] + work.reported[t + 1]) / 2
            axes.text(x + 0.02, y - 0.01, f"× {eta:.2f}", color=BLUE, weight="bold", va="top")

    longer_steps = (
        "Client 2 trains with AdamW,\n"
        "too (dotted). Its steps with\n"
        "small lesions are reported\n"
        "longer than they were:\n"
        r"$\Delta_2 = \eta_1 s_1 + \dots + \eta_6 s_6$"
    )
    axes.text(0.54, -0.15, longer_steps, color=BLUE, va="center")
    axes.text(0.69, 0.235, r"$\theta - \Delta_2$", color=BLUE, size=13, va="center")


def label_server(axes: Axes, fed_gs: Tensor, steps: list[int]) -> None:
    axes.text(0.025, 0.0, r"$\theta$", size=15, va="center")
    axes.text(-0.04, -0.02, "both clients start from\nthe server's weights", ha="right", va="top")

    x, y = fed_gs + torch.tensor([0.05, 0.05])
    step = r"FedGS:  $\theta \leftarrow \theta - (w_1 \Delta_1 + w_2 \Delta_2)$"
    axes.text(x, y + 0.053, step, color=GREEN, size=13, weight="bold", va="center")
    shares = f"{steps[0]}/{sum(steps)} and {steps[1]}/{sum(steps)}"
    axes.text(x, y, f"$w_k$: their shares of all steps, {shares}", color=GREEN, va="center")

    mean = "FedAvg: the mean of\ntheir own weights"
    style = {"rotation": -22.4, "rotation_mode": "anchor", "size": 9}
    axes.text(0.105, 0.21, mean, color=GREY, va="top", **style)


def main() -> None:
    random = np.random.default_rng(3)
    theta = torch.zeros(2)
    works = [train(client, theta, random) for client in CLIENTS]

    # Batches are equally large everywhere: shares of the steps are shares of the images, too.
    steps = [len(work.etas) for work in works]
    shares = [count / sum(steps) for count in steps]
    fed_gs = aggregate(theta, [work.update for work in works], shares)
    fed_avg = aggregate(theta, [theta - work.own[-1] for work in works], shares)

    # Above: what the clients train on.
    rcParams["font.size"] = 9.5
    figure = Figure(figsize=(8, 5.55), facecolor="white")
    draw_batches(figure, CLIENTS[0], works[0], left=0.2, top=5.4)
    draw_batches(figure, CLIENTS[1], works[1], left=3.85, top=5.4)
    formulas = (
        "A lesion that covers the share $a$ of an image:  "
        r"$\delta = \tanh((\log_\ell\, 1/a)^2)$  if it is small, else 0."
        r"  A batch:  $\eta = 1 + (2/B)\,\Sigma\,\delta$"
    )
    figure.text(0.5, 0.735, formulas, ha="center", color=INK)

    # Below: where that takes them, and the server.
    axes = figure.add_axes((0, 0, 1, 0.72))
    axes.axis("off")
    axes.set(aspect="equal", xlim=(-0.72, 0.95), ylim=(-0.255, 0.58))
    draw_line(axes, works[0].reported[-1], works[1].reported[-1], color=INK, linewidth=1)
    draw_line(axes, works[0].own[-1], works[1].own[-1], color=GREY, linewidth=1, linestyle=":")
    for client, work in zip(CLIENTS, works, strict=True):
        draw_reported(axes, client, work)
        draw_own(axes, work)

    draw_step(axes, theta, fed_avg, GREY, 1.5)
    draw_step(axes, theta, fed_gs, GREEN, 3)
    axes.plot(fed_avg[0], fed_avg[1], "D", color=GREY, markersize=8, zorder=6)
    axes.plot(fed_gs[0], fed_gs[1], "*", color=GREEN, markersize=20, zorder=6)
    axes.plot(theta[0], theta[1], "o", color=INK, markersize=10, zorder=6)

    label_client_1(axes)
    label_client_2(axes, works[1])
    label_server(axes, fed_gs, steps)
    save(figure)


def save(figure: Figure) -> None:
    """As a PNG file of 128 colours, which is a third of the size."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(200)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
