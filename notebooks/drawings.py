"""The pictures of the notebooks, so that a cell shows an idea and not how it is drawn.

First what all notebooks share, then a section for each, in their order. A function makes a
matplotlib Figure of its own; a cell shows it with `show`, and says what is seen:

    drawings.show(drawings.sizes(federation), "What a reader sees who cannot see the picture.")

Notebook 5 also shows source texts, cut out of the files that they stand in.
"""

import base64
import io
import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import torch
from IPython.display import Markdown, display
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyBboxPatch, Rectangle
from matplotlib.ticker import FuncFormatter
from torch import Tensor

import data
from support import pictures
from support.pictures import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, RED, SKY, outline

WIDTH = 9  # inches: as wide as GitHub and JupyterLab show a picture without shrinking it
DPI = 100

INK = "#222222"
PALE = "#bbbbbb"
TISSUE = "#f0eee8"

PLAIN = FuncFormatter("{:g}".format)  # 100, where a logarithmic axis would say 10²

STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "legend.fontsize": 10,
    "figure.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


# ---------------------------------------------------------------------------- what all of them use


def style() -> None:
    """The look of all pictures that are made from here on."""
    rcParams.update(STYLE)


def new_figure(title: str, height: float, width: float = WIDTH) -> Figure:
    """An empty figure, its size in inches, whose layout keeps texts and plots apart."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def show(figure: Figure, alt: str) -> None:
    """Show a figure in the notebook.

    alt: what is seen, in a sentence or two, for readers who cannot see it.
    """
    show_forms({"image/png": encoded(png(figure))}, alt)


def show_forms(forms: dict[str, Any], alt: str) -> None:
    """Show something that exists in several forms; whoever shows it takes the richest it can."""
    metadata = {"image/png": {"alt": alt}}
    display({**forms, "text/plain": alt}, raw=True, metadata=metadata)


def png(figure: Figure) -> bytes:
    """A figure as a file of PNG, no wider than a page. (The project's own are made for screens.)"""
    file = io.BytesIO()
    dpi = min(DPI, DPI * WIDTH / figure.get_figwidth())
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def encoded(content: bytes) -> str:
    """Bytes as a notebook stores them."""
    return base64.b64encode(content).decode()


def show_with_sliders(draw: Callable[..., Figure], alt: str, **choices: Sequence[Any]) -> None:
    """Show draw(name=value, …) with a slider for each name; where no kernel runs, as a picture.

    choices: the values of each name, in the slider's order. The picture that is stored is that of
    the values in the middle.
    """
    chosen = {name: values[len(values) // 2] for name, values in choices.items()}
    picture = png(draw(**chosen))
    forms = {"image/png": encoded(picture)}

    # A notebook that is stored has the picture alone: sliders without a kernel move nothing.
    if not os.environ.get("FEDGS_STATIC"):
        forms.update(make_sliders(draw, picture, choices, chosen)._repr_mimebundle_())
    show_forms(forms, alt)


def make_sliders(
    draw: Callable[..., Figure], picture: bytes, choices: dict[str, Sequence[Any]], chosen: dict
) -> ipywidgets.VBox:
    """A slider for each name, above the picture that they change. chosen: where they stand."""
    image = ipywidgets.Image(value=picture, format="png")

    # Values need not be equally far apart. A picture is drawn when a slider is let go.
    sliders = {}
    for name, values in choices.items():
        sliders[name] = ipywidgets.SelectionSlider(
            options=values, value=chosen[name], description=name, continuous_update=False
        )

    def redraw(_: Any) -> None:
        values = {name: slider.value for name, slider in sliders.items()}
        image.value = png(draw(**values))

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    return ipywidgets.VBox([*sliders.values(), image])


# --------------------------------------------------------------------------------- 00: one round


ROUND = (  # what an arrow or a box of the drawing says, and where
    (0.50, 0.83, "4  aggregate", r"$\theta \leftarrow \theta - (w_1 \Delta_1 + w_2 \Delta_2)$"),
    (0.16, 0.155, "2  train on its own images", r"$\theta_1 \leftarrow \theta_1 - s$,  many times"),
    (0.84, 0.155, "2  train on its own images", r"$\theta_2 \leftarrow \theta_2 - s$,  many times"),
)


def federation_round() -> Figure:
    """One round with two hospitals: what crosses a hospital's door, and what does not."""
    figure = new_figure("", 4.6)
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_axis_off()

    # A hospital's box, its lesions and its update have the same colour.
    draw_box(axes, (0.33, 0.70), (0.34, 0.27), "server", GREEN)
    draw_box(axes, (0.01, 0.04), (0.30, 0.42), "hospital 1", RED)
    draw_box(axes, (0.69, 0.04), (0.30, 0.42), "hospital 2", BLUE)

    for x, y, step, formula in ROUND:
        axes.text(x, y + 0.035, step, ha="center", weight="bold")
        axes.text(x, y - 0.045, formula, ha="center", size=12)
    axes.text(0.5, 0.715, "never sees an image", ha="center", va="bottom", color=GREY, size=10)

    # The frames stay inside. Those of hospital 2 hold smaller lesions.
    draw_frames(axes, 0.05, radii=(0.024, 0.028, 0.021, 0.026), colour=RED)
    draw_frames(axes, 0.73, radii=(0.026, 0.007, 0.006, 0.008), colour=BLUE)

    # Out and back, for each hospital.
    send(axes, (0.36, 0.68), (0.17, 0.48), INK, r"1  send $\theta$", (0.20, 0.61), "right")
    send(axes, (0.24, 0.48), (0.43, 0.68), RED, r"3  report $\Delta_1$", (0.37, 0.56), "left")
    send(axes, (0.64, 0.68), (0.83, 0.48), INK, r"1  send $\theta$", (0.80, 0.61), "left")
    send(axes, (0.76, 0.48), (0.57, 0.68), BLUE, r"3  report $\Delta_2$", (0.63, 0.56), "right")
    return figure


def draw_box(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], name: str, colour: str
) -> None:
    """A rounded box with a name in its upper left corner."""
    x, y = corner
    width, height = size
    box = FancyBboxPatch(
        corner,
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.02",
        fc="white",
        ec=colour,
        lw=2,
    )
    axes.add_patch(box)
    axes.text(x + 0.015, y + height - 0.02, name, color=colour, weight="bold", va="top", size=12)


def draw_frames(axes: Axes, left: float, radii: Sequence[float], colour: str) -> None:
    """Four frames in a row, each with a round lesion."""
    width = 0.05
    height = 0.105
    bottom = 0.265
    for i, radius in enumerate(radii):
        x = left + 0.057 * i
        frame = Rectangle((x, bottom), width, height, fc=TISSUE, ec=PALE)
        axes.add_patch(frame)

        # The drawing is twice as wide as it is high: what is round is an ellipse in its units.
        middle = (x + width / 2, bottom + 0.053)
        lesion = Ellipse(middle, 1.4 * radius, 2.8 * radius, fc=colour, alpha=0.75)
        axes.add_patch(lesion)


def send(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    text: str,
    where: tuple[float, float],
    side: str,
) -> None:
    """An arrow, and beside it what is sent. side: where its text is aligned"""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 2, "mutation_scale": 18}
    axes.annotate("", end, start, arrowprops=style)
    axes.text(*where, text, color=colour, ha=side, va="center", size=12)


def two_of_each(federation: data.Federation) -> Figure:
    """For each client the training images of median size, and the smallest, with their outlines."""
    figure = new_figure(f"{federation.source}: two training images of each hospital", 2.75)
    panels = iter(figure.subplots(1, 2 * len(federation.train)))

    for name, images in federation.train.items():
        order = by_size(images)
        median = order[len(order) // 2]
        smallest = order[-1]

        for which, i in (("median", median), ("smallest", smallest)):
            axes = next(panels)
            draw_image(axes, images, i)
            size = f"1/{images.inverse_area[i]:.0f} of the image"
            axes.set_title(f"{name}, {which} lesion\n{size}")
    return figure


def by_size(images: data.Images) -> list[int]:
    """The images with a lesion, from the largest lesion to the smallest."""
    order = images.inverse_area.argsort(stable=True).tolist()
    return [i for i in order if images.inverse_area[i].isfinite()]


def draw_image(axes: Axes, images: data.Images, i: int) -> None:
    """An image with the outline of its mask in white."""
    # Pixels as they are, unsmoothed: a small lesion has few of them, and this is to be seen.
    axes.imshow(images.images[i].permute(1, 2, 0), interpolation="nearest")
    axes.contour(images.masks[i, 0], [0.5], colors="white", linewidths=1.5)
    axes.set_axis_off()


def learning(federation: data.Federation, predictions: dict[int, dict[str, Tensor]]) -> Figure:
    """How the prediction for one validation image of each client changes from round to round.

    predictions: {round: {client: (S, S) bool, of its validation image with the largest lesion}}
    """
    figure = new_figure(f"{federation.source}: white the mask, dashed the prediction", 3.9)
    clients = federation.validation
    grid = figure.subplots(len(clients), len(predictions), squeeze=False)

    for row, (name, images) in zip(grid, clients.items(), strict=True):
        shown = by_size(images)[0]
        for axes, (round_, predicted) in zip(row, predictions.items(), strict=True):
            draw_image(axes, images, shown)
            axes.set_title(f"{name}, round {round_}")

            # A prediction without an edge, nothing or everything, has no outline.
            inside = predicted[name]
            if inside.any() and not inside.all():
                axes.contour(inside, [0.5], colors=SKY, linewidths=2, linestyles="--")
    return figure


# ------------------------------------------------------------------ 01: why small lesions vanish


def first_sight(images: data.Images, i: int, source: str) -> Figure:
    """An image, its mask, and the mask's outline on the image."""
    figure = new_figure(f"{source}: a frame of {images.centre}, its mask, and both", 3.3)
    frame, mask, both = figure.subplots(1, 3)

    # Colours come first in a tensor, last in a picture.
    frame.imshow(images.images[i].permute(1, 2, 0), interpolation="nearest")
    mask.imshow(images.masks[i, 0], cmap="Greys_r", interpolation="nearest")
    draw_image(both, images, i)

    for axes in (frame, mask):
        axes.set_axis_off()
    return figure


def sizes(
    inverse_area: dict[str, np.ndarray], small: dict[str, np.ndarray], tau: float, source: str
) -> Figure:
    """How large the lesions of each centre are, and how many of its images count as small."""
    figure = new_figure(source, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_sizes(left, inverse_area, tau)

    # The bars are shares; a share of few images means little, so they carry numbers.
    percent = []
    numbers = []
    for flags in small.values():
        percent.append(100 * flags.mean())
        numbers.append(str(flags.sum()))

    bars = right.bar(list(small), percent, color=COLOURS[: len(small)])
    right.bar_label(bars, numbers)
    right.margins(y=0.12)
    right.set(ylabel="% of all images", title="small images (on the bars: how many)")
    return figure


def draw_sizes(axes: Axes, inverse_area: dict[str, np.ndarray], tau: float) -> None:
    """For each centre, how many of its images with a lesion have at most this inverse area."""
    for (centre, areas), colour in zip(inverse_area.items(), COLOURS, strict=False):
        # Sorted, the n-th of N areas has n/N of the images at or below it.
        areas = np.sort(areas[np.isfinite(areas)])
        share = np.arange(1, len(areas) + 1) / len(areas)
        label = f"{centre}, {len(areas)} images"
        axes.step(areas, share, where="post", color=colour, label=label)

    axes.axvline(tau, color="0.3", ls="--", lw=1)
    axes.text(1.1 * tau, 0.03, f"1/a = τ = {tau}", color="0.3")

    axes.set(
        xscale="log",
        xlabel="inverse area 1/a (smaller lesions to the right)",
        ylabel="share of images with at most 1/a",
        title="lesion sizes of each centre",
    )
    axes.xaxis.set_major_formatter(PLAIN)
    axes.legend()


def median_images(parts: dict[str, list[data.Images]], source: str) -> Figure:
    """Of each centre the median image among its small ones, and among the others."""
    figure = new_figure(f"{source}: medians by size, white the mask", 4.5)
    above, below = figure.subplots(2, len(parts), squeeze=False)

    for column, pieces in enumerate(parts.values()):
        for panels, want_small in ((above, True), (below, False)):
            images, i = median_image(pieces, want_small)
            axes = panels[column]
            draw_image(axes, images, i)
            kind = "small" if want_small else "not small"
            axes.set_title(f"{images.centre}, {kind}\n1/a = {images.inverse_area[i]:.0f}")
    return figure


def median_image(pieces: Sequence[data.Images], want_small: bool) -> tuple[data.Images, int]:
    """The image in the middle of a centre's order by size, among small images or the others."""
    found = []
    for piece in pieces:
        chosen = [i for i in by_size(piece) if bool(piece.small[i]) == want_small]
        found += [(piece.inverse_area[i].item(), piece, i) for i in chosen]

    # By size alone: images cannot be compared.
    found.sort(key=operator.itemgetter(0))
    _, piece, i = found[len(found) // 2]
    return piece, i


def pulls(batch: data.Images, gradient: Tensor, area: Tensor, pull: Tensor, title: str) -> Figure:
    """A batch above, and below what the loss asks of each pixel.

    gradient (N, S, S); area, pull (N,): each lesion's share of the batch's
    """
    figure = new_figure(title, 5.4)
    above, below = figure.subplots(2, len(batch))

    # The same limits for all, so that a colour means the same everywhere, and white is 0.
    limit = gradient.abs().max()
    colours = {"cmap": "PuOr", "vmin": -limit, "vmax": limit}

    for n in range(len(batch)):
        draw_image(above[n], batch, n)
        size = f"1/a = {batch.inverse_area[n]:.0f}"
        above[n].set_title(f"{size}\n{area[n]:.1%} of the lesion pixels")

        drawn = below[n].imshow(gradient[n], interpolation="nearest", **colours)
        below[n].contour(batch.masks[n, 0], [0.5], colors="black", linewidths=1)
        below[n].set_title(f"{pull[n]:.1%} of the pull")
        below[n].set_axis_off()

    label = "∂L/∂z¹ of a pixel"
    figure.colorbar(drawn, ax=below, location="bottom", aspect=50, shrink=0.6, label=label)
    return figure


def shares_by_size(rows: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Shares of each lesion against its inverse area, with a line of best fit.

    rows (N, 2 + C): inverse area, whether the image is small, and C shares, called by names
    """
    figure = new_figure(title, 4.1)
    panels = figure.subplots(1, len(names), sharex=True, sharey=True)
    for column, (axes, name) in enumerate(zip(panels, names, strict=True), start=2):
        slope = draw_shares(axes, rows, column)
        axes.set(title=f"{name}\nslope {slope:.2f}", xlabel="inverse area 1/a")
    panels[0].set_ylabel("share of the batch of four")

    # One legend for all, outside: in a panel it would hide points.
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_shares(axes: Axes, rows: np.ndarray, column: int) -> float:
    """A column of shares against the inverse area, both logarithmic. -> slope of the best fit"""
    for flag, colour, label in ((0, BLUE, "not small"), (1, ORANGE, "small")):
        some = rows[rows[:, 1] == flag]
        axes.loglog(some[:, 0], some[:, column], ".", color=colour, label=label)

    # A line through logarithms is a power of 1/a.
    slope, start = best_fit(rows, column)
    ends = np.array([rows[:, 0].min(), rows[:, 0].max()])
    axes.plot(ends, np.exp(start) * ends**slope, color=RED, label="best fit")
    axes.axhline(0.25, color="0.3", ls="--", lw=1, label="an equal say")

    axes.set_ylim(1e-4, 1.3)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_major_formatter(PLAIN)
    return slope


def best_fit(rows: np.ndarray, column: int) -> np.ndarray:
    """The line through log(share) against log(inverse area). -> slope, value at inverse area 1"""
    # A share of 0 has no logarithm.
    rows = rows[rows[:, column] > 0]
    inverse_area = np.log(rows[:, 0])
    share = np.log(rows[:, column])
    return np.polyfit(inverse_area, share, 1)


def batches_with_small(chance: dict[str, float], counts: dict[str, str], title: str) -> Figure:
    """How many batches of each client hold a small lesion. chance: in percent"""
    figure = new_figure(title, 3.2, width=6.5)
    axes = figure.subplots()
    clients = list(chance)
    percent = list(chance.values())

    # A client has the same colour as in the other pictures.
    bars = axes.bar(clients, percent, color=COLOURS[: len(clients)])
    axes.bar_label(bars, list(counts.values()))
    axes.set(ylabel="batches with a small lesion, %", ylim=(0, 100))
    return figure


# ------------------------------------------------------------------------------- 02: the method


SIDE = 128  # pixels along the side of a drawn mask


def blob(pixels: int) -> Tensor:
    """A mask with one lesion of so many pixels. -> (1, SIDE, SIDE) bool"""
    row, column = np.mgrid[:SIDE, :SIDE] - 0.5 * SIDE

    # An ellipse, a little beside the middle: no two pixels are equally far away.
    distance = np.hypot(row - 0.3, 0.8 * column - 0.4)
    order = torch.from_numpy(distance).flatten().argsort(stable=True)

    mask = torch.zeros(SIDE * SIDE, dtype=torch.bool)
    mask[order[:pixels]] = True
    return mask.view(1, SIDE, SIDE)


def lesion_colour(small: bool | Tensor) -> str:
    """In colour what is small, and so has a difficulty."""
    return RED if small else INK


def draw_mask(axes: Axes, mask: Tensor, colour: str = INK) -> None:
    """A mask, its lesion in a colour."""
    # The mask's 0 and 1 choose a row of this table.
    shades = torch.tensor([to_rgb(TISSUE), to_rgb(colour)])
    axes.imshow(shades[mask.int()], interpolation="nearest")

    # A frame in place of axes: how much of the image a lesion covers is what counts.
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, edgecolor=PALE)


def difficulty_in_steps(
    lesions: Sequence[Tensor], stages: dict[str, Callable], tau: float
) -> Figure:
    """Lesions above, and below them what each stage of the difficulty makes of their size.

    stages: name -> a function of 1/a, the whole way from 1/a to there
    """
    figure = new_figure("", 5.2)
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 2))
    above.suptitle(f"six lesions; in colour: small, at most 1/{tau} of the image")

    inverse = torch.tensor([SIDE * SIDE / lesion.sum().item() for lesion in lesions])
    colours = [lesion_colour(area >= tau) for area in inverse]
    panels = above.subplots(1, len(lesions))
    for axes, mask, area, colour in zip(panels, lesions, inverse, colours, strict=True):
        draw_mask(axes, mask[0], colour)
        axes.set_title(f"1/a = {area:.0f}")

    panels = below.subplots(1, len(stages))
    for axes, (name, stage) in zip(panels, stages.items(), strict=True):
        draw_stage(axes, stage, tau)
        axes.scatter(inverse, stage(inverse), color=colours)
        axes.set(xscale="log", xlabel="1/a", title=name)
        axes.xaxis.set_major_formatter(PLAIN)
    return figure


def draw_stage(axes: Axes, stage: Callable[[Tensor], Tensor], tau: float) -> None:
    """A function of 1/a as two lines, one on either side of tau, so that a jump is seen as one."""
    x = torch.logspace(math.log10(2), 3.3, 400)
    low = x[x < tau]
    high = x[x >= tau]
    for part in (low, high):
        axes.plot(part, stage(part), color=BLUE, lw=2)

    # Their ends at tau are far apart where there is a jump.
    ends = torch.stack([stage(low[-1]), stage(high[0])])
    axes.plot([tau, tau], ends, ":", color=BLUE)


def difficulties_of(
    inverse_area: np.ndarray, small: np.ndarray, difficulty: np.ndarray, tau: float, source: str
) -> Figure:
    """The difficulties of a data set's images by size, and how many there are of each size."""
    figure = new_figure(source, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))

    for flag, colour, name in ((False, SKY, "not small"), (True, RED, "small")):
        some = small == flag
        label = f"{name}, {some.sum()} images"
        above.plot(inverse_area[some], difficulty[some], ".", color=colour, ms=9, label=label)
    above.set(ylabel="difficulty δ", ylim=(-0.05, 1.05))
    above.legend(loc="upper left")

    # Bars that are equally wide on a logarithmic axis. The outer edges are just outside the data,
    # so that rounding loses no image.
    smallest = 0.99 * inverse_area.min()
    largest = 1.01 * inverse_area.max()
    edges = np.geomspace(smallest, largest, 31)
    groups = [inverse_area[~small], inverse_area[small]]
    below.hist(groups, edges, stacked=True, color=[SKY, RED])
    below.set(xscale="log", xlabel="1/a of all polyps of an image together", ylabel="images")
    below.xaxis.set_major_formatter(PLAIN)

    for axes in (above, below):
        axes.axvline(tau, color="0.3", ls="--", lw=1)
    _, top = below.get_ylim()
    below.text(1.05 * tau, 0.9 * top, f"τ = {tau}", color="0.3", va="top")
    return figure


def batch_of(
    lesions: Sequence[Tensor], difficulty: Tensor, small: Tensor, eta: float, setting: str
) -> Figure:
    """The lesions of a batch with their difficulties; its step scale is in the title."""
    figure = new_figure(f"{setting}:  η = {eta:.2f}", 2.6)

    # Room for four at least: one mask as wide as the page would be a page high.
    panels = figure.subplots(1, max(4, len(lesions)))
    for axes in panels[len(lesions) :]:
        axes.set_axis_off()

    for n, mask in enumerate(lesions):
        colour = lesion_colour(small[n])
        draw_mask(panels[n], mask[0], colour)
        area = SIDE * SIDE / mask.sum().item()
        panels[n].set_title(f"1/a = {area:.0f}\nδ = {difficulty[n]:.2f}", color=colour)
    return figure


def four_masks(
    batch: Tensor, area: Tensor, small: Tensor, difficulty: Tensor, eta: float
) -> Figure:
    """The batch that is computed by hand."""
    figure = new_figure(f"four masks: η = {eta:.4f}", 3.3)
    panels = figure.subplots(1, 4)
    for i, name in enumerate("ABCD"):
        draw_mask(panels[i], batch[i, 0], lesion_colour(small[i]))
        kind = "small" if small[i] else "not small"
        panels[i].set_title(f"{name}: {area[i]} pixels\n{kind}, δ = {difficulty[i]:.3f}")
    return figure


def two_clients(
    paths: Sequence[Tensor], updates: Sequence[Tensor], weights: Sequence[float], title: str
) -> Figure:
    """One round in the plane of two weights: where clients walk, what they report, and the server.

    paths (T + 1, 2) each, from theta on
    """
    figure = new_figure(title, 4.2)
    axes = figure.subplots()

    # On the line between two reports lies every weighted mean of them.
    theta = paths[0][0]
    reports = [theta - update for update in updates]
    axes.plot(*torch.stack(reports).T, color="0.7", lw=1)

    names = ("client 1", "client 2")
    for name, path, report, colour in zip(names, paths, reports, (RED, BLUE), strict=True):
        axes.plot(*path.T, ".-", color=colour, label=f"{name}: its own weights")
        axes.plot(*torch.stack([theta, report]).T, "--", color=colour, lw=1)
        axes.plot(*report, "s", color=colour, ms=9, label=f"{name}: what it reports, θ − Δ")

    # Where the server ends up, without scaling and with it.
    own = torch.zeros(2)
    new = torch.zeros(2)
    for weight, path, report in zip(weights, paths, reports, strict=True):
        own += weight * path[-1]
        new += weight * report
    axes.plot(*own, "D", color="0.4", ms=9, label="mean of their own weights")
    axes.plot(*new, "*", color=GREEN, ms=16, label="new θ of FedGS")

    # Fixed limits: while a slider moves, only what it changes moves.
    axes.set(xlabel="first weight", ylabel="second weight", aspect="equal")
    axes.set(xlim=(-0.3, 1.9), ylim=(-0.1, 0.95))
    axes.legend(loc="lower right", fontsize=9.5)
    return figure


def server_paths(paths: dict[str, list[float]]) -> Figure:
    """The one weight of a toy server over the rounds."""
    figure = new_figure("every round the only client reports Δ = −1", 3.4, width=6.5)
    axes = figure.subplots()
    for (label, path), colour in zip(paths.items(), (GREY, BLUE, ORANGE, RED), strict=True):
        axes.plot(path, ".-", color=colour, label=label)
    axes.set(xlabel="round", ylabel="weight")
    axes.legend()
    return figure


def apart(distances: dict[str, float], title: str) -> Figure:
    """How far other methods' new weights are from FedGS's, in percent of its step."""
    figure = new_figure(title, 2.2)
    axes = figure.subplots()
    names = list(distances)
    lengths = list(distances.values())

    bars = axes.barh(names, lengths, color=[ORANGE, BLUE])
    axes.bar_label(bars, [f"{length:.1f} %" for length in lengths], padding=3)

    # Room for the labels on the right, and the first bar on top.
    axes.set_xlim(0, 1.2 * max(lengths))
    axes.set_xlabel("distance to FedGS's new weights, % of its step")
    axes.invert_yaxis()
    return figure


def index_table(table: Tensor, changed: Tensor) -> Figure:
    """UTNet's table of constants, and which of them an average in floating point has changed."""
    figure = new_figure("", 3.9)
    left, right = figure.subplots(1, 2)

    shown = left.imshow(table, cmap="viridis", interpolation="nearest")
    figure.colorbar(shown, ax=left, label="which number of the learned table")
    left.set_title("UTNet's index table")

    right.imshow(changed, cmap="Greys", interpolation="nearest")
    right.set_title(f"black: the {changed.sum()} entries that changed")

    for axes in (left, right):
        axes.set(xlabel="cell that is looked at", ylabel="cell that looks")
        axes.grid(False)
    return figure


# ------------------------------------------------------------------------------ 03: a federation


def cosines(values: Tensor, names: Sequence[str], title: str) -> Figure:
    """A table of cosines between updates, in colours. values (K, K)"""
    figure = new_figure(title, 3.6, width=5)
    axes = figure.subplots()

    # From a right angle, white, to the same direction.
    shown = axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(shown)

    places = range(len(names))
    for i in places:
        for j in places:
            value = values[i, j].item()

            # Readable on dark cells, too.
            colour = "white" if value > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)

    axes.set_xticks(places, names)
    axes.set_yticks(places, names)
    axes.grid(False)
    return figure


def curves(history: Sequence[dict], title: str) -> Figure:
    """A run over its rounds: each client's loss, validation Dice by size, the step scale."""
    figure = new_figure(title, 3.6)
    losses, dice, scale = figure.subplots(1, 3)
    rounds = [row["round"] for row in history]

    def line(axes: Axes, column: str, colour: str, label: str = "") -> None:
        values = [row[column] for row in history]
        axes.plot(rounds, values, "o-", color=colour, label=label)
        axes.set(xlabel="round", xticks=rounds)

    names = [column for column in history[0] if column.startswith("loss_")]
    for column, colour in zip(names, COLOURS, strict=False):
        line(losses, column, colour, column.removeprefix("loss_"))
    line(dice, "dice_l", BLUE, "Dice_L")
    line(dice, "dice_s", RED, "Dice_S")
    line(scale, "eta", GREEN)

    # The step scale's axis begins at 1, which stands for steps that were not scaled.
    top = 1.3 * max(row["eta"] - 1 for row in history)
    scale.set(title="mean step scale η", ylim=(1, 1 + top))
    losses.set(title="training loss of each client", ylim=(0, 1))
    dice.set(title="validation Dice", ylim=(0, 1))
    losses.legend()
    dice.legend()
    return figure


METHOD_COLOURS = {"FedAvg": BLUE, "control": GREEN, "FedGS": RED, "FedProx": PURPLE, "FedBN": GREY}


def methods_over_rounds(histories: dict[str, Sequence[dict]], title: str) -> Figure:
    """Validation Dice of several runs over their rounds."""
    figure = new_figure(title, 3.4)
    panels = figure.subplots(1, 3, sharey=True)

    # Marks and dashes, too: lines that lie on each other are told apart by more than colours.
    lines = dict(zip(histories, ("o-", "s--", "^:"), strict=True))
    for axes, measure in zip(panels, ("Dice_S", "Dice_L", "Dice"), strict=True):
        for name, history in histories.items():
            rounds = [row["round"] for row in history]
            dice = [row[measure.lower()] for row in history]
            axes.plot(rounds, dice, lines[name], color=METHOD_COLOURS[name], label=name)
        axes.set(title=f"validation {measure}", xlabel="round", xticks=rounds, ylim=(0, 0.5))
    panels[2].legend()
    return figure


def two_statistics(dice: dict[tuple[str, str], tuple[float, float]], title: str) -> Figure:
    """The same weights with averaged statistics, and with each centre's own.

    dice: {(method, centre): (averaged, own)}
    """
    figure = new_figure(title, 3.6)
    centres = list(dict.fromkeys(centre for _, centre in dice))
    panels = dict(zip(centres, figure.subplots(1, len(centres), sharey=True), strict=True))

    for (method, centre), pair in dice.items():
        panels[centre].plot([0, 1], pair, "o-", color=METHOD_COLOURS[method], label=method)

    top = 1.15 * max(max(pair) for pair in dice.values())
    for centre, axes in panels.items():
        axes.set_xticks([0, 1], ["averaged", "own"])
        axes.set(title=centre, xlim=(-0.4, 1.4), ylim=(0, top))
    axes.legend(fontsize=9)
    figure.supylabel("mean Dice")
    return figure


def seed_table(values: dict[str, np.ndarray], title: str) -> Figure:
    """A point for each seed and method. values: {method: (seeds,)}"""
    figure = new_figure(title, 3.8)
    axes = figure.subplots()
    for row, (name, dice) in enumerate(values.items()):
        axes.plot(dice, [row] * len(dice), "o", color=METHOD_COLOURS[name], alpha=0.6)
        axes.plot(dice.mean(), row, "|", color=INK, ms=13, mew=2)

        # Which seed is which: the same one may be best here and worst there. Neighbours get their
        # numbers above and below in turn, so that two close ones can be read.
        for place, seed in enumerate(dice.argsort()):
            above = place % 2 == 0
            axes.annotate(
                str(seed),
                (dice[seed], row),
                (0, 8 if above else -8),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                size=9,
            )

    # The first method is on top.
    axes.set_yticks(range(len(values)), list(values))
    axes.set(xlabel="mean Dice (numbers: seeds, bars: means)", ylim=(len(values) - 0.4, -0.6))
    return figure


def intervals(found: dict[str, tuple[float, float, float]], title: str) -> Figure:
    """Differences with their intervals; in red those that do not cover 0.

    found: {what: (mean, low, high)}
    """
    figure = new_figure(title, 0.42 * len(found) + 1.3)
    axes = figure.subplots()
    for row, (mean, low, high) in enumerate(found.values()):
        # In red what would be reported as a difference.
        colour = INK if low <= 0 <= high else RED
        axes.plot([low, high], [row, row], color=colour, lw=2)
        axes.plot(mean, row, "o", color=colour)

    # The first is on top.
    axes.axvline(0, color="0.3", lw=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set(xlabel="difference in Dice", ylim=(len(found) - 0.5, -0.5))
    return figure


# ----------------------------------------------------------------------------- 04: disentangled

MARKERS = "os^Dv*"


def frames(frames: Mapping[str, tuple[Any, int]], title: str) -> Figure:
    """A frame of each centre with its lesion outlined. frames: {centre: (data.Images, index)}"""
    figure = new_figure(title, 2.9)
    [row] = figure.subplots(1, len(frames), squeeze=False)
    for axes, (centre, (images, i)) in zip(row, frames.items(), strict=True):
        picture = images.images[i].permute(1, 2, 0)
        lesion = images.masks[i, 0].numpy()
        draw_picture(axes, picture)
        outline(axes, lesion, "white", "solid")
        axes.set_title(f"{centre}, 1/a = {images.inverse_area[i]:.0f}")
    return figure


def draw_picture(axes: Axes, picture: Any) -> None:
    """An image (H, W, 3), or (H, W) in grey, as sharp as it is."""
    axes.imshow(picture, cmap="gray", interpolation="nearest")
    axes.set_axis_off()


def content_and_style(everyone: Mapping[str, Any], source: str) -> Figure:
    """Inverse areas, and mean red and blue, of each centre's images. everyone: {centre: Images}"""
    figure = new_figure(f"Two ways to differ ({source})", 3.8)
    left, right = figure.subplots(1, 2)
    for row, (centre, images) in enumerate(everyone.items()):
        # Content. An image without a lesion has no area to draw.
        colour, _ = centre_style(centre)
        with_lesion = images.inverse_area.isfinite()
        areas = images.inverse_area[with_lesion]
        box = left.boxplot(
            [areas.numpy()],
            positions=[row],
            widths=0.6,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            medianprops={"color": "black"},
        )
        box["boxes"][0].set_facecolor(colour)

        # Style.
        colours = images.images.float() / 255
        mean_colours = colours.flatten(2).mean(2)
        draw_cloud(right, centre, mean_colours[:, 0], mean_colours[:, 2])

    # Sizes of lesions range over factors of a hundred.
    left.set(yscale="log", ylabel="inverse area 1/a", title="content: sizes of lesions")
    left.yaxis.set_major_formatter("{x:g}")
    left.set_xticks(range(len(everyone)), list(everyone))
    right.set(xlabel="mean red (0 to 1)", ylabel="mean blue (0 to 1)", title="style: colours")
    right.legend(title="mean of")
    return figure


def centre_style(centre: str) -> tuple[str, str]:
    """The colour of a centre, the same as in notebook 1, which shows all of them; its marker."""
    n = int(centre.removeprefix("C")) - 1
    return COLOURS[n], MARKERS[n]


def draw_cloud(axes: Axes, centre: str, x: Any, y: Any) -> None:
    """A point for each image of a centre, and a large one for their mean."""
    colour, marker = centre_style(centre)
    axes.plot(x, y, marker, color=colour, ms=3, alpha=0.35)
    axes.plot(x.mean(), y.mean(), marker, color=colour, ms=11, mec="black", label=centre)


def loss_terms(
    training: Sequence[Mapping[str, float]],
    validation: Sequence[Mapping[str, float]],
    weights: Mapping[str, float],
    floor: float,
    source: str,
) -> Figure:
    """SD-UTNet's terms over the rounds: of training in each, of validation after each (0: before).

    floor: below which the reconstruction cannot fall
    """
    figure = new_figure(f"The terms of the loss ({source})", 5.0)
    grid = figure.subplots(2, 2, sharex=True)

    # What is measured during a round stands halfway between its two ends.
    after = np.arange(len(validation))
    during = np.arange(len(training)) + 0.5

    for axes, (name, weight) in zip(grid.flat, weights.items(), strict=True):
        validated = [terms[name] for terms in validation]
        trained = [terms[name] for terms in training]
        axes.plot(after, validated, "s-", color=BLUE, label="validation, after the round")
        axes.plot(during, trained, "o--", color=ORANGE, label="training, mean of the round")
        axes.set(title=f"{name} (weight {weight:g})", xticks=after, ylim=(0, None))
        if name == "reconstruction":
            axes.axhline(floor, color=RED, ls=":", label="limit of tanh")
            axes.set_ylim(0, 1.5 * trained[0])  # room for the legend
            axes.legend(loc="upper right", fontsize=9)

    for axes in grid[1]:
        axes.set_xlabel("round")
    for axes in grid[:, 0]:
        axes.set_ylabel("before its weight")
    return figure


def anatomy(image: Any, reconstruction: Any, channels: Any, lesion: Any, title: str) -> Figure:
    """An image and its reconstruction, and the eight channels of anatomy in between.

    image, reconstruction (3, H, W), as the network sees them; channels (8, H, W) in [-1, 1];
    lesion (H, W), which is outlined in all of them
    """
    figure = new_figure(title, 4.0)
    grid = figure.subplots(2, 5)

    # One map to [0, 1] for both, so that they compare.
    both = torch.stack([image, reconstruction])
    low, high = both.min(), both.max()
    scaled = (both - low) / (high - low)
    above, below = grid[:, 0]
    draw_picture(above, scaled[0].permute(1, 2, 0))
    draw_picture(below, scaled[1].permute(1, 2, 0))
    above.set_title("image")
    below.set_title("reconstruction")

    # Purple and orange differ for colour-blind readers, too, and 0 is white.
    for i, axes in enumerate(grid[:, 1:].flat):
        shown = axes.imshow(channels[i], cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"anatomy {i + 1}")
        axes.set_axis_off()
    figure.colorbar(shown, ax=grid, ticks=[-1, 0, 1], shrink=0.8)

    for axes in grid.flat:
        outline(axes, lesion, "white", "solid")
    return figure


def erased(
    growth: Any, error: Any, one: Any, channel: Any, probability: Any, number: int, source: str
) -> Figure:
    """What erasing each channel does, and one image with the channel that matters most.

    growth, error (8,): of the dice term; one: data.Images with one image; channel, probability
    (H, W)
    """
    figure = new_figure(f"What the segmentor relies on ({source})", 3.2)
    bars, image, map_, lesion = figure.subplots(1, 4, width_ratios=(2.2, 1, 1, 1))

    # The axis is much longer than the bars: what is tiny has to look tiny.
    numbers = range(1, len(growth) + 1)
    bars.bar(numbers, growth, yerr=error, color=BLUE, ecolor=INK, capsize=3)
    bars.axhline(0, color=INK, lw=1)
    bars.set(xlabel="channel erased", ylabel="the dice term grows by", xticks=numbers)
    bars.set_ylim(-0.1, 0.2)

    picture = one.images[0].permute(1, 2, 0)
    draw_picture(image, picture)
    image.set_title("image, lesion")

    map_.imshow(channel, cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    map_.set_title(f"channel {number}")

    lesion.imshow(probability, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    lesion.set_title("lesion, predicted")

    truth = one.masks[0, 0].numpy()
    for axes in (image, map_, lesion):
        outline(axes, truth, "white", "solid")
        axes.set_axis_off()
    return figure


def codes(codes: Mapping[str, Any], source: str) -> Figure:
    """The mean code of each centre, and each image's code in the plane in which they vary most.

    codes: {centre: (N, 8)}
    """
    table = torch.stack([mu.mean(0) for mu in codes.values()])

    # Principal components: the directions in which all codes together vary most come first.
    stacked = torch.cat(list(codes.values()))
    middle = stacked.mean(0)
    _, spread, directions = torch.linalg.svd(stacked - middle, full_matrices=False)
    variances = spread.square()
    share = variances[:2].sum() / variances.sum()

    figure = new_figure(f"The codes of the images ({source})", 3.8)
    left, right = figure.subplots(1, 2)

    limit = table.abs().max()  # so that 0 is white
    shown = left.imshow(table, cmap="PuOr", vmin=-limit, vmax=limit)
    left.set_yticks(range(len(codes)), list(codes))
    numbers = table.shape[1]
    left.set_xticks(range(numbers), range(1, numbers + 1))
    left.set(xlabel="number of the code", title="mean of μ")
    left.grid(False)
    figure.colorbar(shown, ax=left, shrink=0.7)

    for centre, mu in codes.items():
        along = (mu - middle) @ directions[:2].T
        draw_cloud(right, centre, along[:, 0], along[:, 1])
    right.set(xlabel="PC 1", ylabel="PC 2", title=f"μ: {share:.0%} of its variance")
    right.legend(title="mean of", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def named_right(right: Mapping[str, float], largest: float, count: int, source: str) -> Figure:
    """The share of images whose centre was named right, by what was known of them."""
    figure = new_figure(f"Which centre is it from? ({source}, {count} images)", 2.8)
    axes = figure.subplots()
    error = (0.25 / count) ** 0.5  # of a share near one half; elsewhere it is a little less
    names = list(right)
    colours = [BLUE, PALE, ORANGE, GREEN]
    axes.barh(names, list(right.values()), xerr=error, capsize=3, color=colours)
    axes.axvline(largest, color=RED, ls="--", label="always the largest centre")
    axes.set(xlim=(0, 1), xlabel="share named right (± standard error)")
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def swaps(grid: Mapping[tuple[str, str], Any], title: str) -> Figure:
    """A table of pictures. grid: {(row, column): (H, W, 3)}"""
    rows = list(dict.fromkeys(row for row, _ in grid))
    columns = list(dict.fromkeys(column for _, column in grid))
    figure = new_figure(title, 1.8 * len(rows) + 0.6)
    cells = figure.subplots(len(rows), len(columns), squeeze=False)
    for (row, column), picture in grid.items():
        axes = cells[rows.index(row), columns.index(column)]
        draw_picture(axes, picture)

        # The first picture of a row says whose row it is.
        name = f"{row}, {column}" if column == "image" else column
        axes.set_title(name)
    return figure


def swapped_colours(real: Any, swap: Any, slopes: Mapping[str, float], source: str) -> Figure:
    """What swapping codes does to each mean colour, over how the real images differ.

    real, swap (pairs, 3), in normalised values; slopes: {colour: slope of the best line}
    """
    figure = new_figure(f"Swapping codes, all pairs of clients ({source})", 3.6)
    row = figure.subplots(1, 3, sharex=True, sharey=True)
    inks = (RED, GREEN, BLUE)

    # All panels have the same axes: how far colours differ is to be compared, too.
    limit = 1.1 * real.abs().max().item()
    ends = np.array([-limit, limit])
    for n, (name, slope) in enumerate(slopes.items()):
        axes = row[n]
        axes.plot(ends, ends, "--", color=GREY, label="a full swap")
        axes.plot(ends, slope * ends, color=inks[n])
        axes.plot(real[:, n], swap[:, n], "o", color=inks[n])
        axes.set(title=f"{name}: slope {slope:.2f}", ylim=(-limit, limit))
        axes.locator_params(nbins=5)
    row[0].set_ylabel("change by swapping codes")
    row[1].set_xlabel("how the real images differ (mean colour, normalised)")
    row[0].legend(loc="upper left")
    return figure


# ------------------------------------------------------------------------------ 05: the kernels

PATH_COLOURS = {
    "PyTorch lines, fresh memory": RED,
    "PyTorch lines": ORANGE,
    "compiled": BLUE,
}


def show_source(text: str, language: str) -> None:
    """Show source text in the colours of its language."""
    display(Markdown(f"```{language}\n{text}\n```"))


def excerpt(file: str, name: str) -> None:
    """Show a function of a source file of csrc/, with the comment above it."""
    lines = Path("csrc", file).read_text(encoding="utf-8").splitlines()

    # It begins in the first column, and so does the line with its last brace.
    begins = re.compile(rf"[^\s/#].*\b{name}[( ]|{name}\(")
    first = 0
    while not begins.match(lines[first]):
        first += 1

    ends = re.compile(r"\};?|\S.*\}")
    last = first
    while not ends.fullmatch(lines[last]):
        last += 1

    while re.match("//|template|__global__", lines[first - 1]):
        first -= 1
    text = "\n".join(lines[first : last + 1])
    show_source(f"// csrc/{file}\n{text}", "cpp")


def bytes_of_passes(passes: Sequence[Any], one_pass: int) -> Figure:
    """The bytes that each pass reads and writes, all of them together, and those of one pass.

    passes: (operation, read, written), in bytes per parameter
    """
    # Passes may have the same operation; their numbers keep the bars apart.
    names = []
    for number, one in enumerate(passes, start=1):
        names.append(f"{number}  {one.operation}")
    read = np.array([one.read for one in passes])
    written = np.array([one.written for one in passes])

    figure = new_figure("adamw_accumulate_: bytes moved for each parameter", 4.3)
    axes = figure.subplots()
    axes.barh(names, read, color=BLUE, label="read")
    axes.barh(names, written, left=read, color=ORANGE, label="written")

    total = (read + written).sum()
    axes.barh(["all passes"], [total], color=INK)
    axes.barh(["one pass"], [one_pass], color=GREEN)

    # A number behind each bar.
    for row, count in enumerate([*(read + written), total, one_pass]):
        axes.text(count + 1, row, f"{count:.0f}", va="center")

    axes.set(xlabel="bytes", xlim=(0, 1.08 * total))
    axes.invert_yaxis()
    axes.legend(loc="upper right")
    return figure


def step_times(
    sizes: Sequence[int],
    step_ms: Mapping[str, Sequence[float]],
    bytes_each: Mapping[str, float],
    bandwidth: float,
) -> Figure:
    """The step's time per parameter, by size, beside what its bytes take.

    step_ms: {path: milliseconds of each size}; bytes_each: {path: bytes per parameter};
    bandwidth in GB/s
    """
    figure = new_figure("adamw_accumulate_ on this machine's CPU", 4.0)
    axes = figure.subplots()
    millions = np.array(sizes) / 1e6
    for name, times in step_ms.items():
        nanoseconds = np.array(times) / millions  # milliseconds by millions
        axes.plot(millions, nanoseconds, "o-", color=PATH_COLOURS[name], label=name)

    # What memory alone would take.
    for name, count in bytes_each.items():
        if name in step_ms:
            label = f"{count:.0f} bytes at {bandwidth:.0f} GB/s"
            axes.axhline(count / bandwidth, ls=":", color=PATH_COLOURS[name], label=label)

    axes.set(xlabel="parameters (millions)", ylabel="time per parameter (ns)", xscale="log")
    axes.set_xticks(millions, [f"{million:.3g}" for million in millions])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def roofline(
    bandwidth: float, peak: float, points: Mapping[tuple[str, str], tuple[float, float]]
) -> Figure:
    """What limits a program, and where the operations are, an arrow from path to path.

    bandwidth in GB/s, peak in billions of operations per second; points: {(operation, path):
    (operations per byte, billions of operations per second)}
    """
    figure = new_figure("Roofline of this machine's CPU", 4.6)
    axes = figure.subplots()

    # The roof: as fast as memory delivers, up to what the processor can compute.
    corner = peak / bandwidth
    x = np.array([0.05, corner, 10 * corner])
    axes.loglog(x, np.minimum(x * bandwidth, peak), color=INK, lw=2)
    axes.text(2 * corner, 1.1 * peak, "limit: arithmetic", ha="left")
    axes.text(0.3 * corner, 0.24 * peak, "limit: memory", ha="left", va="top")

    markers = {"adamw_accumulate_": "o", "aggregate": "s"}
    for (operation, path), (intensity, speed) in points.items():
        label = f"{operation}, {path}"
        axes.plot(
            intensity, speed, markers[operation], ms=9, color=PATH_COLOURS[path], label=label, ls=""
        )

    arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 6, "shrinkB": 6}
    for operation in markers:
        ends = [point for (name, _), point in points.items() if name == operation]
        axes.annotate("", xy=ends[-1], xytext=ends[0], arrowprops=arrow)

    axes.set(xlabel="operations per byte", ylabel="billions of operations per second")
    axes.legend(loc="lower right")
    return figure


def threads(parameters: int, threads: int, width: int) -> Figure:
    """Which thread takes which parameter: one each above, `width` neighbours each below.

    threads: of a block. (A GPU's blocks have many more; so few can be drawn.)
    """
    figure = new_figure(f"{parameters} parameters, {threads} threads per block", 3.2)
    naive, in_use = figure.subplots(2, 1)
    draw_threads(naive, parameters, threads, 1)
    naive.set_title("the naive kernel: a thread for each parameter")
    draw_threads(in_use, parameters, threads, width)
    in_use.set_title(
        f"in use: a thread takes {width} neighbours; what is left over goes singly (orange)"
    )
    return figure


def draw_threads(axes: Axes, parameters: int, threads: int, width: int) -> None:
    """A row of parameters in the colours of their threads, and the blocks below them."""
    for i in range(parameters):
        # Neighbouring threads have different colours.
        number = i // width
        colour = SKY if number % 2 == 0 else BLUE
        if (number + 1) * width > parameters:  # not enough are left for a whole access
            colour = ORANGE
        axes.add_patch(Rectangle((i, 0), 1, 1, facecolor=colour, edgecolor="white"))

        # The thread's number within its block, once for all of its parameters.
        if i % width == 0:
            end = min(i + width, parameters)
            middle = (i + end) / 2
            ink = "white" if colour == BLUE else INK
            axes.text(middle, 0.45, f"{number % threads}", color=ink, ha="center", va="center")

    of_block = threads * width
    for start in range(0, parameters, of_block):
        end = min(start + of_block, parameters)
        axes.annotate("", (start, -0.3), (end, -0.3), arrowprops={"arrowstyle": "<->"})
        axes.text((start + end) / 2, -1.0, f"block {start // of_block}", ha="center", fontsize=9)
    axes.set(xlim=(-0.2, parameters + 0.2), ylim=(-1.2, 1.1))
    axes.set_axis_off()


# -------------------------------------------------------------------------------------- 06: LiTS


def window(hu: Any, grey: Any, tumour: Any, title: str) -> Figure:
    """A slice over the whole range of Hounsfield units, and through a window. All (H, W)"""
    figure = new_figure(title, 4.3)
    whole, windowed = figure.subplots(1, 2)
    whole.imshow(hu, cmap="gray", vmin=-1000, vmax=1500, interpolation="nearest")
    whole.set_title("-1000 to 1500 HU")
    whole.set_axis_off()
    draw_picture(windowed, grey)
    outline(windowed, tumour, "white", "solid")
    windowed.set_title("window: -200 to 200 HU, tumour outlined")
    return figure


def hounsfield(values: Mapping[str, Any], threshold: float) -> Figure:
    """Histograms of the Hounsfield units of several tissues, in voxels. values: {name: HU}"""
    figure = new_figure("How many voxels have which Hounsfield units", 3.2)
    axes = figure.subplots()
    # The stand-in's noise comes in steps of 14 HU. Bars of two steps do not look like combs.
    bins = np.arange(-208, 270, 28)
    for (name, hu), colour in zip(values.items(), (PALE, BLUE, ORANGE), strict=True):
        axes.hist(hu, bins, color=colour, alpha=0.75, label=name)
    axes.axvline(threshold, color=INK, ls="--", label="halfway")
    axes.set(xlabel="Hounsfield units", ylabel="voxels")
    axes.legend()
    return figure


def slices(
    pixels: Sequence[int], small: Mapping[int, bool], fewest: int, limit: float, title: str
) -> Figure:
    """The tumour's pixels in each slice of a volume.

    small: {number of a kept slice: whether it is small}; fewest: pixels that a slice needs more
    than to be kept; limit: pixels that a small slice has at most
    """
    figure = new_figure(title, 3.4)
    axes = figure.subplots()
    colours = {None: PALE, False: BLUE, True: RED}
    names = {None: "dropped", False: "kept", True: "kept, and small"}
    with_tumour = [k for k in range(len(pixels)) if pixels[k] > 0]
    for kind, colour in colours.items():
        chosen = [k for k in with_tumour if small.get(k) == kind]
        if chosen:
            heights = [pixels[k] for k in chosen]
            axes.bar(chosen, heights, color=colour, label=names[kind])

    # A bar of no pixels would be invisible on a logarithmic axis.
    empty = [k for k in range(len(pixels)) if pixels[k] == 0]
    axes.plot(empty, [1.0] * len(empty), "x", color=GREY, label="no tumour, dropped")
    axes.set_ylim(bottom=0.7)

    axes.axhline(fewest, color=INK, ls=":", label=f"{fewest} pixels")
    axes.axhline(limit, color=INK, ls="--", label="1/1000 of the slice")

    axes.set(yscale="log", xlabel="slice", ylabel="pixels of tumour")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def inverse_areas(areas: Mapping[str, Any], tau: float, title: str) -> Figure:
    """Every slice by its inverse area, a row for each centre. areas: {centre: (N,)}"""
    figure = new_figure(title, 3.2)
    axes = figure.subplots()

    # Points are moved up and down at random, or they would cover each other.
    rng = np.random.default_rng(0)
    for row, values in enumerate(areas.values()):
        height = row + rng.uniform(-0.3, 0.3, len(values))
        colours = np.where(values >= tau, RED, BLUE)
        axes.scatter(values, height, s=10, color=colours, alpha=0.6, linewidths=0)

    axes.axvline(tau, color=INK, ls="--")
    axes.text(tau, len(areas) - 0.45, f" τ = {tau}: small", va="center", color=RED)
    axes.set(xscale="log", xlabel="inverse area: pixels of the slice / pixels of its tumour")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(areas)), list(areas))
    axes.set_ylim(-0.5, len(areas) - 0.25)
    return figure


def dice_by_round(history: Sequence[Mapping[str, float]], source: str) -> Figure:
    """Validation Dice: the same weights with two kinds of statistics, and by size of lesion."""
    figure = new_figure(f"Validation, all clients ({source})", 3.8)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    rounds = [row["round"] for row in history]
    lines = {
        "averaged": (left, ORANGE, "statistics averaged by the server"),
        "own": (left, BLUE, "each client's own statistics"),
        "Dice_L, own": (right, BLUE, "Dice_L (not small)"),
        "Dice_S, own": (right, RED, "Dice_S (small)"),
    }
    for column, (axes, colour, label) in lines.items():
        dice = [row[column] for row in history]
        axes.plot(rounds, dice, "o-", color=colour, label=label)

    left.set(title="the same weights, twice", ylabel="mean Dice", ylim=(-0.03, 1))
    right.set_title("own statistics, by size")
    for axes in (left, right):
        axes.set(xlabel="round", xticks=rounds)
        axes.legend(fontsize=9)
    return figure


def dice_by_size(sizes: Mapping[str, Any], tau: float, source: str) -> Figure:
    """Dice of every slice over its inverse area, a panel for each network, with running means.

    sizes: {name: (N, at least 2): inverse area, Dice}
    """
    figure = new_figure(f"Slices that nobody trained on ({source})", 3.8)
    [row] = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)
    for axes, (name, found) in zip(row, sizes.items(), strict=True):
        area = found[:, 0].numpy()
        dice = found[:, 1].numpy()
        colours = np.where(area >= tau, RED, BLUE)
        axes.scatter(area, dice, s=14, color=colours, alpha=0.5, linewidths=0)

        # Means of a tenth of the slices each, by size; of fewer parts where there are few slices.
        # The axis is logarithmic, so the middle of a part is the mean of logarithms.
        parts = max(min(10, len(area) // 4), 1)
        x = []
        means = []
        for part in np.array_split(np.argsort(area), parts):
            x.append(np.exp(np.log(area[part]).mean()))
            means.append(dice[part].mean())
        axes.plot(x, means, "-", color=INK, label="mean")
        axes.axvline(tau, color=INK, ls="--", label=f"τ = {tau}")
        axes.set(title=name, xscale="log", ylim=(-0.03, 1.03))
        axes.set_xlabel("inverse area 1/a (small to the right)")
        axes.xaxis.set_major_formatter("{x:g}")
    row[0].set_ylabel("Dice")
    row[0].legend(loc="lower left", fontsize=9)
    return figure


def volume(grey: Any, truth: Any, predicted: Any, numbers: Sequence[int], title: str) -> Figure:
    """Slices of a volume with two outlines. grey (N, H, W, 1); truth, predicted (H, W, N)"""
    figure = new_figure(title, 6.2)
    grid = figure.subplots(2, 3)
    for i, axes in enumerate(grid.flat):
        draw_picture(axes, grey[i])
        outline(axes, truth[..., i], "white", "solid")
        outline(axes, predicted[..., i], SKY, "dashed")
        axes.set_title(f"slice {numbers[i]}")
    return figure


# ----------------------------------------------------------------------- 07: your own hospitals


def files_as_read(rows: Mapping[str, Sequence[Any]], title: str) -> Figure:
    """A row for each hospital: an image and its mask as they are stored, and as they are read.

    rows: {hospital: (image, mask, image, mask)}
    """
    figure = new_figure(title, 1.95 * len(rows) + 0.6)
    grid = figure.subplots(len(rows), 4, squeeze=False)
    headings = ("image, as stored", "mask, as stored", "image, as read", "lesion, as read")
    for line, (name, pictures_of) in zip(grid, rows.items(), strict=True):
        for axes, heading, picture in zip(line, headings, pictures_of, strict=True):
            picture = np.asarray(picture)

            # Black is 0 and white the largest number of the type, as in a simple viewer.
            most = 1
            if picture.dtype != bool:
                most = np.iinfo(picture.dtype).max
            axes.imshow(picture, cmap="gray", vmin=0, vmax=most, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.set_title(heading)
        line[0].set_ylabel(name)
    return figure


def first_look(seen: Sequence[Any], tau: float, log_base: float, title: str) -> Figure:
    """What tools.look draws, for a page: sizes by hospital, difficulties, the smallest lesions.

    seen: a tools.look.Seen of each image
    """
    with_lesion = [one for one in seen if one.lesions]
    groups = pictures.by_centre(with_lesion)
    edges = pictures.bar_edges(with_lesion)

    figure = new_figure(title, 8.4)
    above, below = figure.subfigures(2, 1, height_ratios=(5.4, 2.8))

    # A panel for each hospital, and one for the difficulties, with the same horizontal axis.
    ratios = [1] * len(groups) + [2]
    *panels, last = above.subplots(len(groups) + 1, 1, sharex=True, height_ratios=ratios)
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        pictures.draw_sizes(axes, name, group, edges)
        axes.axvline(tau, color=INK, ls=":")
    pictures.draw_difficulties(last, with_lesion, edges, tau, log_base)

    row = below.subplots(1, 4)
    smallest = pictures.smallest_of(with_lesion, len(row))
    for axes, one in zip(row, smallest, strict=False):
        pictures.draw_seen(axes, one)
    for axes in row:
        axes.set_axis_off()  # also where there were fewer images
    return figure


def effects_of_tau(
    taus: Sequence[float],
    curves: Sequence[tuple[float, float, float]],
    suggested: float,
    published: float,
    source: str,
) -> Figure:
    """Small images, scaled steps and mean η for many τ, each a tools.effects.Effect.

    published: the share of small images in the paper's data set
    """
    small, scaled, eta = np.transpose(curves)
    figure = new_figure(f"What τ would do, training images of {source}", 3.6)
    shares, scale = figure.subplots(1, 2)

    shares.plot(taus, small, color=RED, label="small images")
    shares.plot(taus, scaled, color=BLUE, label="scaled steps")
    shares.axhline(published, color=GREY, ls="--", lw=1, label="small in PolypGen")
    shares.set(ylabel="share", ylim=(0, 1))

    scale.plot(taus, eta, color=GREEN, label="mean η")
    scale.set(ylabel="mean η of all steps", ylim=(1, None))  # no step counts less than once

    for axes in (shares, scale):
        axes.axvline(suggested, color=INK, ls=":", label=f"suggestion: {suggested:g}")
        axes.set(xscale="log", xlabel="τ")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend()
    return figure


def training(history: Sequence[Mapping[str, Any]], clients: Sequence[str], title: str) -> Figure:
    """Each client's training loss, and validation Dice with two kinds of batch-norm statistics.

    history: rows of rounds.csv, with "own" for the Dice with each client's own statistics
    """
    figure = new_figure(title, 3.6)
    left, right = figure.subplots(1, 2)
    rounds = [row["round"] for row in history]
    for client, colour in zip(clients, COLOURS, strict=False):
        losses = [row[f"loss_{client}"] for row in history]
        left.plot(rounds, losses, color=colour, label=client)
    left.set(title="training loss", ylabel="mean over the round's steps")
    left.legend()

    # In both colours the weights are the same.
    averaged = [row["dice"] for row in history]
    own = [row["own"] for row in history]
    right.plot(rounds, averaged, "o-", color=ORANGE, label="averaged")
    right.plot(rounds, own, "o-", color=BLUE, label="own")
    right.set(title="validation, all hospitals", ylabel="mean Dice", ylim=(0, 1))
    right.legend(title="statistics")

    for axes in (left, right):
        axes.set(xlabel="round", xticks=rounds)
    return figure


def new_image(stored: Any, overlay: Any, marked: Any, truth: Any, title: str) -> Figure:
    """A photograph as it is stored, the prediction on it, and the mask with the truth's outline."""
    figure = new_figure(title, 3.2)
    row = figure.subplots(1, 3)
    for axes, picture in zip(row, (stored, overlay, marked), strict=True):
        draw_picture(axes, picture)
    outline(row[2], truth, ORANGE, "solid")
    names = ("new.jpg, as it is stored", "new_overlay.png", "new_mask.png, truth in orange")
    for axes, name in zip(row, names, strict=True):
        axes.set_title(name)
    return figure
