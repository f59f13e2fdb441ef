"""The pictures: a first look, curves over rounds, outlined predictions, anatomy, comparisons.

Each is a matplotlib Figure of its own, without pyplot's global state. matplotlib is imported inside
the functions: it is slow, and training does not need it.
"""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import ndimage
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


# ---------------------------------------------------------------------------- a first look at data


MOST_PANELS = 8  # centres with a histogram each; of more there is one of them all
COLUMNS = 6  # images beside each other


def draw_look(seen: Sequence[Any], tau: float, log_base: float, title: str, count: int) -> "Figure":
    """Sizes of lesions by centre, the difficulty of each image, and the smallest lesions.

    seen: a tools.look.Seen of each image, one at least with a lesion; count: images to show.
    """
    with_lesion = [one for one in seen if one.lesions]
    groups = by_centre(with_lesion)
    chosen = smallest_of(with_lesion, count)
    lines = math.ceil(len(chosen) / COLUMNS)

    # Heights in inches: what there is to show decides about them.
    height_of_plots = 0.8 * len(groups) + 2.8
    height_of_images = 2.5 * lines + 0.4
    heights = (height_of_plots, height_of_images)
    figure = new_figure(title, 12, sum(heights) + 0.3)
    above, below = figure.subfigures(2, 1, height_ratios=heights)

    # A panel for each centre, and one for the difficulty, all with the same horizontal axis.
    ratios = [0.8] * len(groups) + [2.2]
    *panels, last = above.subplots(len(groups) + 1, 1, sharex=True, height_ratios=ratios)
    edges = bar_edges(with_lesion)
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        draw_sizes(axes, name, group, edges)
        axes.axvline(tau, color="0.3", linestyle="dotted")
    panels[0].set_title("images by the size of their lesions: small ones in red", fontsize=11)
    draw_difficulties(last, with_lesion, edges, tau, log_base)

    below.suptitle("the smallest lesions, as the network sees them", fontsize=11)
    grid = below.subplots(lines, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, one in zip(grid.flat, chosen, strict=False):
        draw_seen(axes, one)
    return figure


def by_centre(seen: Sequence[Any]) -> dict[str, list[Any]]:
    """{centre: its images}; all of them together where there are too many centres."""
    groups = {}
    for one in seen:
        groups.setdefault(one.centre, []).append(one)
    if len(groups) > MOST_PANELS:
        return {f"{len(groups)} centres": list(seen)}
    return groups


def smallest_of(seen: Sequence[Any], count: int) -> list[Any]:
    """The images with the smallest lesions, one of each volume."""

    def smallest_first(one: Any) -> tuple:
        return -one.smallest, one.centre, one.name

    # Neighbouring slices of a volume show the same.
    chosen = {}
    for one in sorted(seen, key=smallest_first):
        volume, _, _ = one.name.partition("_slice-")
        chosen.setdefault((one.centre, volume), one)
    return list(chosen.values())[:count]


def areas_of(seen: Sequence[Any], small: bool) -> np.ndarray:
    """1/a of the images that count as small, or of the others."""
    return np.array([one.inverse_area for one in seen if one.small == small])


def bar_edges(seen: Sequence[Any]) -> np.ndarray:
    """Where the bars of all histograms end, equally wide on a logarithmic axis."""
    areas = [one.inverse_area for one in seen]
    return np.geomspace(0.99 * min(areas), 1.01 * max(areas), 31)


def draw_sizes(axes: "Axes", name: str, seen: Sequence[Any], edges: np.ndarray) -> None:
    """A histogram of 1/a: images that count as small upon those that do not."""
    small = areas_of(seen, small=True)
    others = areas_of(seen, small=False)
    axes.hist([others, small], edges, stacked=True, color=[SKY, RED])

    axes.set_ylabel(name, rotation="horizontal", ha="right", va="center")
    text = f"{len(seen)} with a lesion,\n{len(small)} small"
    axes.text(1.01, 0.5, text, transform=axes.transAxes, va="center", fontsize=8)
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=2)
    axes.grid(alpha=0.3)


def draw_difficulties(
    axes: "Axes", seen: Sequence[Any], edges: np.ndarray, tau: float, log_base: float
) -> None:
    """δ over 1/a: the curve, and a point for each image, at 0 for those that are not small."""
    x = np.geomspace(edges[0], edges[-1], 200)
    axes.plot(x, difficulty_of(x, log_base), color=GREEN, label=f"δ where small, l = {log_base:g}")
    axes.axvline(tau, color="0.3", linestyle="dotted", label=f"τ = {tau:g}")

    # Points to the left of τ are of images in which one of several lesions is small.
    small = areas_of(seen, small=True)
    others = areas_of(seen, small=False)
    axes.plot(small, difficulty_of(small, log_base), ".", color=RED, label="small")
    axes.plot(others, np.zeros(len(others)), ".", color=SKY, label="not small: δ = 0")

    axes.set(xscale="log", ylabel="difficulty δ", ylim=(-0.05, 1.05))
    axes.set_xlabel("1/a: pixels of an image / pixels of all its lesions")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)


def difficulty_of(inverse_area: np.ndarray, log_base: float) -> np.ndarray:
    """δ of images that are small."""
    return np.tanh((np.log(inverse_area) / np.log(log_base)) ** 2)


def draw_seen(axes: "Axes", one: Any) -> None:
    """An image with the outlines of its lesions, and how large they are."""
    pixels = one.images.images[one.i].permute(1, 2, 0).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    mask = one.images.masks[one.i, 0].numpy()
    outline(axes, mask, SKY, "solid")
    ring_smallest(axes, mask)

    facts = f"lesion: 1/{one.inverse_area:.0f} of the image"
    if one.lesions > 1:
        facts = f"lesions: 1/{one.inverse_area:.0f}, smallest: 1/{one.smallest:.0f}"
    axes.set_title(f"{one.centre}, {one.name[-24:]}\n{facts}", fontsize=8)


def ring_smallest(axes: "Axes", mask: np.ndarray) -> None:
    """A ring around the smallest lesion of a mask (H, W)."""
    # A lesion of a few pixels is smaller than its outline is wide.
    components, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    smallest = np.bincount(components.ravel())[1:].argmin() + 1
    row, column = ndimage.center_of_mass(components == smallest)
    axes.plot(column, row, "o", markersize=14, fillstyle="none", color="white")


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

    # The axis begins at 1, which stands for steps that were not scaled, as all of FedAvg's.
    draw_rounds(scale, history, "eta", "mean of η", GREEN)
    top = max(row["eta"] for row in history)
    scale.set(title="step scale η, all clients", ylabel="1: nothing was scaled")
    scale.set_ylim(1, max(1.1, 1 + 1.2 * (top - 1)))

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
    """Test images with the outlines of truth and prediction: small lesions, others, none.

    tests: each centre's data.Images and their Evaluation. A row of each kind: up to `count` images,
    evenly spaced by size of lesion, whatever their scores. Those without a lesion are evenly spaced
    over the centres: what is outlined in them is a false alarm.
    """
    from matplotlib.lines import Line2D

    kinds = {
        "small lesion": evenly_spaced(by_size(tests, True), count),
        "no small lesion": evenly_spaced(by_size(tests, False), count),
        "no lesion": evenly_spaced(without_lesion(tests), count),
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
    size = "no lesion"
    if images.masks[i].any():
        size = f"1/a = {images.inverse_area[i]:.0f}"
    facts = f"{size}, Dice {evaluation.dice[i]:.2f}"
    axes.set_title(f"{where}\n{facts}", fontsize=8)


Shown = tuple[Any, Evaluation, int]  # data.Images, their evaluation, and which of them


def by_size(tests: Sequence[tuple[Any, Evaluation]], small: bool) -> list[Shown]:
    """The images with a lesion that are small, or the others, by inverse area."""
    found = []
    for number, (images, _) in enumerate(tests):
        has_lesion = images.masks.flatten(1).any(dim=1)
        for i, inverse_area in enumerate(images.inverse_area.tolist()):
            if has_lesion[i] and bool(images.small[i]) == small:
                found.append((inverse_area, number, i))
    found.sort()
    return [(*tests[number], i) for _, number, i in found]


def without_lesion(tests: Sequence[tuple[Any, Evaluation]]) -> list[Shown]:
    """The images without a lesion, in the order of the tests."""
    found = []
    for images, evaluation in tests:
        pixels = images.masks.flatten(1).sum(dim=1)
        without = (pixels == 0).nonzero().flatten().tolist()
        found.extend((images, evaluation, i) for i in without)
    return found


def evenly_spaced(found: Sequence[Shown], count: int) -> list[Shown]:
    """Up to `count` of them: a choice by score, or by eye, would flatter the network."""
    positions = torch.linspace(0, len(found) - 1, min(count, len(found))).round().int()
    return [found[position] for position in positions.tolist()]


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

Places = Mapping[str, Mapping[str, Any]]  # {place: {measure: its tools.compare.Difference}}

MEASURE_COLOURS = {"Dice": "black", "Dice_S": RED, "Dice_L": BLUE}
PAIR = {"marker": "o", "markersize": 4, "linestyle": "none", "alpha": 0.5, "markeredgewidth": 0}
MEAN = {"marker": "D", "markersize": 4, "linestyle": "none"}
OVER_IMAGES = {"linewidth": 5, "alpha": 0.35, "solid_capstyle": "butt"}
WITH_SEEDS = {"linewidth": 1.3}


def draw_comparison(title: str, rows: Mapping[str, tuple[Places, Places]]) -> "Figure":
    """Differences between methods: a row for every two of them, by size of lesion and by centre.

    rows: {"one − another, 3 pairs of runs": (by size, by centre)}
    """
    figure = new_figure(textwrap.fill(title, 96), 10, 3.1 * len(rows) + 1.3)
    grid = figure.subplots(len(rows), 2, sharey=True, squeeze=False)
    point = "a point is a pair of runs' mean difference"
    for (left, right), (name, (by_size, by_centre)) in zip(grid, rows.items(), strict=True):
        draw_differences(left, by_size)
        draw_differences(right, by_centre)

        # The row's name stands above its left panel. The right one's title begins as low.
        name = textwrap.fill(name, 64)
        left.set_title(f"{name}\nby size of lesions: {point}", loc="left", fontsize=10)
        right.set_title(f"by centre: {point}", loc="left", fontsize=10)
        left.set_ylabel("difference in Dice")

    explain_marks(figure)
    return figure


def draw_differences(axes: "Axes", places: Places) -> None:
    """The differences in each place side by side, those of its measures in their colours."""
    axes.axhline(0, color="0.3", linewidth=1)
    axes.grid(alpha=0.3, axis="y")
    for i, measures in enumerate(places.values()):
        width = 0.8 / len(measures)
        for k, (measure, found) in enumerate(measures.items()):
            x = i + (k - (len(measures) - 1) / 2) * width
            draw_difference(axes, x, found, MEASURE_COLOURS[measure])

    axes.set_xticks(range(len(places)), places, fontsize=9)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.margins(y=0.12)


def draw_difference(axes: "Axes", x: float, found: Any, colour: str) -> None:
    """One difference: its pairs of runs, and beside them their mean with two intervals."""
    where = axes.get_xaxis_transform()  # x as in the data, y from 0 to 1
    text = f"{found.images}"
    axes.text(x, 0.02, text, transform=where, ha="center", color=colour, fontsize=8)

    # Beside each other, since a point on a line is hard to see.
    pairs = [x - 0.08] * len(found.of_pairs)
    axes.plot(pairs, found.of_pairs, **PAIR, color=colour)
    middle = [x + 0.08] * 2
    axes.plot(middle, found.over_images, **OVER_IMAGES, color=colour)
    axes.plot(middle, found.with_seeds, **WITH_SEEDS, color=colour)
    if found.images:
        axes.plot(middle[:1], [found.mean], **MEAN, color=colour)


def explain_marks(figure: "Figure") -> None:
    """The key below all panels."""
    from matplotlib.lines import Line2D

    key = [
        Line2D([], [], color=GREY, label="a pair of runs: same fold, same seed", **PAIR),
        Line2D([], [], color=GREY, label="mean of the pairs", **MEAN),
        Line2D([], [], color=GREY, label="95 % interval over images: these runs", **OVER_IMAGES),
        Line2D([], [], color=GREY, label="95 % interval over images and seeds", **WITH_SEEDS),
        Line2D([], [], color=RED, label="Dice_S: small lesions", linewidth=2),
        Line2D([], [], color=BLUE, label="Dice_L: other lesions", linewidth=2),
    ]
    figure.legend(
        handles=key,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        title="1/a: pixels of an image / of its lesions; below, the number of images",
    )
