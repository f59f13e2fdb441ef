"""The pictures: curves over rounds, outlined predictions, anatomy, methods side by side.

Each is a matplotlib Figure of its own, without pyplot's global state. matplotlib is imported inside
the functions: it is slow, and training does not need it.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metrics import Evaluation
from support.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct to colour-blind readers.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
RED = "#D55E00"
SKY = "#56B4E9"
GREY = "0.4"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)
MOST_NAMED = 12  # clients whose names a legend has room for


def save_figure(path: Path, figure: "Figure") -> None:
    """Write a figure, in the format that its suffix names, whole or not at all. Raises OSError."""
    with replacing(path) as new:
        figure.savefig(new, dpi=130)


def new_figure(title: str, width: float, height: float) -> "Figure":
    """An empty figure, its size in inches, whose layout keeps texts and plots apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure


# ----------------------------------------------------------------------------------- a run's rounds


def draw_curves(history: Sequence[Mapping], title: str) -> "Figure":
    """A run over its rounds: each client's loss, validation Dice by lesion size, the step scale.

    history: the rows of rounds.csv.
    """
    figure = new_figure(title, 13, 4.2)
    losses, dice, scale = figure.subplots(1, 3)

    columns = [column for column in history[0] if column.startswith("loss_")]
    for column, colour in zip(columns, itertools.cycle(COLOURS)):
        label = column.removeprefix("loss_")
        if len(columns) > MOST_NAMED:
            # Their number stands for the names, once: labels that begin with _ are not listed.
            label = f"{len(columns)} clients" if column == columns[0] else "_"
        draw_rounds(losses, history, column, label, colour)
    losses.set(title="training loss of each client", ylabel="mean over the round's steps")

    draw_rounds(dice, history, "dice_l", "Dice_L (not small)", BLUE)
    draw_rounds(dice, history, "dice", "Dice (all)", GREY)
    draw_rounds(dice, history, "dice_s", "Dice_S (small)", RED)
    dice.set(title="validation, all clients", ylabel="mean Dice", ylim=(0, 1))

    # Drawn as eta - 1, so that 0 stands for steps that were not scaled, as all of FedAvg's.
    excess = [{"round": row["round"], "excess": row["eta"] - 1} for row in history]
    draw_rounds(scale, excess, "excess", "mean of η − 1", GREEN)
    draw_rounds(scale, history, "scaled_steps", "share of steps with η > 1", GREY, "dotted")
    scale.set(title="step scale η, all clients", ylabel="0: nothing was scaled", ylim=(0, None))

    for axes in (losses, dice, scale):
        axes.set(xlabel="round", xlim=(history[0]["round"] - 0.5, history[-1]["round"] + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        # Below the plot, where it covers no curve.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8)
    return figure


def draw_rounds(
    axes: "Axes",
    history: Sequence[Mapping],
    column: str,
    label: str,
    colour: str,
    line: str = "solid",
) -> None:
    """One column of the rounds as a line with a point for each round."""
    rounds = [row["round"] for row in history]
    values = [row[column] for row in history]
    axes.plot(rounds, values, marker=".", color=colour, linestyle=line, label=label)


# -------------------------------------------------------------------------------------- predictions


def draw_predictions(
    tests: Sequence[tuple[Any, Evaluation]], title: str, count: int = 5
) -> "Figure":
    """Test images with the outlines of truth and prediction: small lesions above, others below.

    tests: each centre's data.Images and their Evaluation. Of either kind up to `count` images,
    evenly spaced by size of lesion, whatever their scores.
    """
    from matplotlib.lines import Line2D

    kinds = {
        "small lesion": spaced_by_size(tests, True, count),
        "no small lesion": spaced_by_size(tests, False, count),
    }
    kinds = {kind: chosen for kind, chosen in kinds.items() if chosen}
    rows = max(len(kinds), 1)
    columns = max(map(len, kinds.values()), default=1)

    figure = new_figure(title, 2.6 * columns + 0.3, 3 * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    for line, (kind, chosen) in zip(grid, kinds.items(), strict=False):
        line[0].set_ylabel(kind, fontsize=10)
        for axes, (images, evaluation, i) in zip(line, chosen, strict=False):
            draw_prediction(axes, images, evaluation, i)

    truth = Line2D([], [], color="white", label="truth")
    prediction = Line2D([], [], color=SKY, linestyle="dashed", label="prediction")
    key = figure.legend(handles=[truth, prediction], loc="outside lower center", ncols=2)
    key.get_frame().set_facecolor(GREY)
    for text in key.get_texts():
        text.set_color("white")
    return figure


def draw_prediction(axes: "Axes", images: Any, evaluation: Evaluation, i: int) -> None:
    """Image i of data.Images with two outlines, and its name, size and Dice above."""
    image = images.images[i].permute(1, 2, 0).numpy()
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)  # the map is for CT
    outline(axes, images.masks[i, 0].numpy(), "white", "solid")
    outline(axes, evaluation.predicted[i, 0].numpy(), SKY, "dashed")

    where = f"{images.centre}, {images.names[i]}"
    facts = f"1/a = {images.inverse_area[i]:.0f}, Dice {evaluation.dice[i]:.2f}"
    axes.set_title(f"{where}\n{facts}", fontsize=8)


def spaced_by_size(
    tests: Sequence[tuple[Any, Evaluation]], small: bool, count: int
) -> list[tuple[Any, Evaluation, int]]:
    """Up to `count` (images, evaluation, index) of one kind, evenly spaced in their order by size.

    Of images with a lesion, ordered by inverse area.
    """
    found = []
    for number, (images, _) in enumerate(tests):
        has_lesion = images.masks.flatten(1).any(dim=1)
        for i, inverse_area in enumerate(images.inverse_area.tolist()):
            if has_lesion[i] and bool(images.small[i]) == small:
                found.append((inverse_area, number, i))
    found.sort()

    # Evenly spaced, since a choice by score, or by eye, would flatter the network.
    chosen = []
    positions = torch.linspace(0, len(found) - 1, min(count, len(found))).round().int()
    for position in positions.tolist():
        _, number, i = found[position]
        images, evaluation = tests[number]
        chosen.append((images, evaluation, i))
    return chosen


def outline(axes: "Axes", mask: np.ndarray, colour: str, style: str) -> None:
    """Draw the outline of a mask (H, W) over its image, on a dark rim that keeps it visible."""
    if not mask.any():
        return
    # With a rim of background, the outline of a lesion that is cut by the image's edge closes.
    padded = np.pad(np.asarray(mask, dtype=float), 1)
    height, width = mask.shape
    x = np.arange(-1, width + 1)
    y = np.arange(-1, height + 1)

    axes.autoscale(False)  # the image fills the axes, the rim stays outside
    axes.contour(x, y, padded, [0.5], colors="black", linewidths=2.6, alpha=0.6)
    axes.contour(x, y, padded, [0.5], colors=colour, linewidths=1.4, linestyles=style)


# ------------------------------------------------------------------------------------------ anatomy


def draw_anatomy(image: Tensor, anatomy: Tensor, reconstruction: Tensor, title: str) -> "Figure":
    """An image, what SD-UTNet makes of it, and the eight channels of anatomy in between.

    image, reconstruction (C, H, W), C = 3 or 1, image as the network saw it; anatomy (8, H, W) in
    [-1, 1].
    """
    figure = new_figure(title, 13, 5.6)
    grid = figure.subplots(2, 5)
    for axes in grid.flat:
        axes.set_axis_off()

    # One map to [0, 1] for both, so that they compare.
    pair = torch.stack([image, reconstruction]).detach().cpu()
    pair = (pair - pair.min()) / (pair.max() - pair.min())
    for axes, name, x in zip(grid[:, 0], ("image", "reconstruction"), pair, strict=True):
        axes.imshow(x.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=10)

    channels = grid[:, 1:]
    for i, channel in enumerate(anatomy.detach().cpu().numpy()):
        axes = channels.flat[i]
        # Purple and orange differ for colour-blind readers, and 0 is white.
        shown = axes.imshow(channel, cmap="PuOr", vmin=-1, vmax=1)
        axes.set_title(f"anatomy {i + 1}", fontsize=10)
    figure.colorbar(shown, ax=channels, label="value of the anatomy channel", shrink=0.8, pad=0.02)
    return figure


# ----------------------------------------------------------------------------- methods side by side

Points = tuple[np.ndarray, np.ndarray]  # inverse areas (n,) and Dice (n,) of the same images
Runs = Sequence[tuple[float, int]]  # mean of a measure, and its count, in each run of a method


def draw_comparison(
    title: str,
    tau: float,
    sizes: np.ndarray,
    points: Mapping[str, Points],
    bars: Mapping[str, Mapping[str, Mapping[str, Runs]]],
) -> "Figure":
    """Methods side by side: Dice of every test image against its size, and means in groups.

    sizes: inverse areas of all test images with a lesion; points: {method: those that its runs were
    tested on}; bars: three {measure: {group: {method: its runs}}}.
    """
    from matplotlib.patches import Patch

    figure = new_figure(title, 13, 10)
    layout = [["sizes", "sizes", "sizes"], ["counts", "counts", "counts"], ["1", "2", "3"]]
    places = figure.subplot_mosaic(layout, height_ratios=(4, 1, 3.4))
    colours = dict(zip(points, itertools.cycle(COLOURS)))

    draw_sizes(places["sizes"], tau, points, colours)
    draw_counts(places["counts"], sizes)
    places["sizes"].sharex(places["counts"])
    places["sizes"].tick_params(labelbottom=False)

    for place, (measure, groups) in zip("123", bars.items(), strict=True):
        draw_bars(places[place], measure, groups, colours)

    methods = [Patch(color=colour, label=method) for method, colour in colours.items()]
    figure.legend(handles=methods, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_sizes(
    axes: "Axes", tau: float, points: Mapping[str, Points], colours: Mapping[str, str]
) -> None:
    """Dice against inverse area: images as points, and their running mean with its interval."""
    for method, (inverse_area, dice) in points.items():
        colour = colours[method]
        axes.scatter(inverse_area, dice, s=12, color=colour, alpha=0.45, linewidths=0)
        if len(dice) < 2:
            continue

        half = max(5, len(dice) // 12)
        area, mean, error = running_mean(inverse_area, dice, half, fewest=4)
        most = min(len(dice), 2 * half + 1)
        label = f"{method}: running mean of up to {most} images, 95 % interval"
        axes.plot(area, mean, color=colour, label=label)
        axes.fill_between(area, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)

    axes.axvline(tau, color="0.3", linestyle="dotted", label=f"τ = {tau:g}")
    axes.set_title("every test image with a lesion, mean of its runs", fontsize=11)
    axes.set(ylabel="Dice", xscale="log", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def running_mean(
    x: np.ndarray, y: np.ndarray, half: int, fewest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x in order, at each the mean of y over its neighbours, and half its 95 % interval's width.

    There are `half` neighbours on either side. Towards the ends there are as many on either side as
    there are on the outer one, but not less than `fewest`.
    """
    order = np.argsort(x, kind="stable")
    y = y[order]
    last = len(y) - 1

    means = np.zeros(len(y))
    errors = np.zeros(len(y))
    for i in range(len(y)):
        # The same reach on either side, so that the mean belongs to the middle of its window.
        reach = max(fewest, min(half, i, last - i))
        window = y[max(0, i - reach) : i + reach + 1]
        means[i] = window.mean()
        errors[i] = 1.96 * window.std(ddof=1) / np.sqrt(len(window))
    return x[order], means, errors


def draw_counts(axes: "Axes", inverse_area: np.ndarray) -> None:
    """How many images there are in each range of sizes."""
    from matplotlib.ticker import LogLocator, NullLocator

    # A little beyond both ends, so that rounding leaves no image out.
    edges = np.geomspace(0.999 * inverse_area.min(), 1.001 * inverse_area.max(), 13)
    counts, _, patches = axes.hist(inverse_area, edges, color="0.75", edgecolor="white")
    axes.bar_label(patches, [f"{count:.0f}" for count in counts], fontsize=8)
    axes.set(xscale="log", ylabel="images", ylim=(0, 1.35 * counts.max()))
    axes.set_xlabel("inverse area 1/a of an image's lesions: image pixels / lesion pixels\n")

    # 10, 20, 50, 100 … as they are, since few readers think in powers of ten.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def draw_bars(
    axes: "Axes",
    measure: str,
    groups: Mapping[str, Mapping[str, Runs]],
    colours: Mapping[str, str],
) -> None:
    """A bar for each method in each group: the mean of its runs, and a point for each of them."""
    width = 0.8 / len(colours)
    labels = []
    for i, (group, methods) in enumerate(groups.items()):
        counts = set()
        for k, (method, colour) in enumerate(colours.items()):
            means = [mean for mean, count in methods[method] if count]
            counts.update(count for _, count in methods[method])

            # Side by side around the group's place.
            x = i + (k - (len(colours) - 1) / 2) * width
            axes.bar(x, np.mean(means) if means else 0, width, color=colour)
            axes.plot(
                [x] * len(means),
                means,
                ".",
                color="black",
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.6,
            )
        labels.append(f"{span(counts)}\n{group}")

    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set_title(f"{measure}: mean of runs, a point each; n below", fontsize=10)
    axes.set(ylabel=measure, ylim=(0, 1.03))
    axes.grid(alpha=0.3, axis="y")


def span(counts: set[int]) -> str:
    """{3} -> "3"; {3, 5, 4} -> "3–5"."""
    if len(counts) == 1:
        return str(min(counts))
    return f"{min(counts)}–{max(counts)}"
