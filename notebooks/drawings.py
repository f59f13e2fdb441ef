"""The pictures of the notebooks, so that a cell shows an idea and not how it is drawn.

First what all notebooks share, then a section for each, in their order. A function makes a
matplotlib Figure of its own; a cell shows it with `show`, and says what is seen:

    drawings.show(drawings.sizes(federation), "What a reader sees who cannot see the picture.")
"""

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
from IPython.display import display
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from support.pictures import BLUE, GREEN, GREY, ORANGE, RED, SKY

WIDTH = 9  # inches: as wide as GitHub and JupyterLab show a picture without shrinking it
DPI = 100

INK = "#222222"
PALE = "#bbbbbb"

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


# ------------------------------------------------------------------ 01: why small lesions vanish


# ------------------------------------------------------------------------------- 02: the method


# ------------------------------------------------------------------------------ 03: a federation


# ----------------------------------------------------------------------------- 04: disentangled


# ------------------------------------------------------------------------------ 05: the kernels

PATH_COLOURS = {
    "PyTorch lines, fresh memory": RED,
    "PyTorch lines": ORANGE,
    "compiled": BLUE,
}


def bytes_of_passes(passes: Sequence[Any], one_pass: int) -> Figure:
    """The bytes that each pass reads and writes, all of them together, and those of one pass.

    passes: (operation, read, written), in bytes a parameter
    """
    names = [f"{number}  {one.operation}" for number, one in enumerate(passes, start=1)]
    read = [one.read for one in passes]
    written = [one.written for one in passes]

    figure = new_figure("adamw_accumulate_: bytes moved for each parameter", 4.3)
    axes = figure.subplots()
    axes.barh(names, read, color=BLUE, label="read")
    axes.barh(names, written, left=read, color=ORANGE, label="written")
    total = sum(read) + sum(written)
    axes.barh(["all passes"], [total], color=INK)
    axes.barh(["one pass"], [one_pass], color=GREEN)

    for row, count in enumerate([r + w for r, w in zip(read, written, strict=True)]):
        axes.text(count + 1, row, f"{count:.0f}", va="center")
    axes.text(total + 1, len(passes), f"{total:.0f}", va="center")
    axes.text(one_pass + 1, len(passes) + 1, f"{one_pass}", va="center")

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
    """The step's time a parameter, by size, beside what its bytes take.

    step_ms: {path: milliseconds of each size}; bytes_each: {path: bytes a parameter}; bandwidth in
    GB/s
    """
    figure = new_figure("adamw_accumulate_ on this machine's CPU", 4.0)
    axes = figure.subplots()
    millions = [size / 1e6 for size in sizes]
    for name, times in step_ms.items():
        nanoseconds = [ms / million for ms, million in zip(times, millions, strict=True)]
        axes.plot(millions, nanoseconds, "o-", color=PATH_COLOURS[name], label=name)

    for name, count in bytes_each.items():
        if name in step_ms:
            label = f"{count:.0f} bytes at {bandwidth:.0f} GB/s"
            axes.axhline(count / bandwidth, ls=":", color=PATH_COLOURS[name], label=label)

    axes.set(xlabel="parameters (millions)", ylabel="time a parameter (ns)", xscale="log")
    axes.set_xticks(millions, [f"{million:.3g}" for million in millions])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def roofline(
    bandwidth: float, peak: float, points: Mapping[tuple[str, str], tuple[float, float]]
) -> Figure:
    """What limits a program, and where the operations are, an arrow from path to path.

    bandwidth in GB/s, peak in billions of operations a second; points: {(operation, path):
    (operations a byte, billions of operations a second)}
    """
    figure = new_figure("Roofline of this machine's CPU", 4.6)
    axes = figure.subplots()
    corner = peak / bandwidth
    x = [0.05, corner, 10 * corner]
    axes.loglog(x, [0.05 * bandwidth, peak, peak], color=INK, lw=2)
    axes.text(2 * corner, 1.1 * peak, "limit: arithmetic", ha="left")
    axes.text(0.3 * corner, 0.24 * peak, "limit: memory", ha="left", va="top")

    markers = {"adamw_accumulate_": "o", "aggregate": "s"}
    for (operation, path), (intensity, speed) in points.items():
        label = f"{operation}, {path}"
        axes.plot(
            intensity, speed, markers[operation], ms=9, color=PATH_COLOURS[path], label=label, ls=""
        )
    for operation in markers:
        ends = [point for (name, _), point in points.items() if name == operation]
        arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 6, "shrinkB": 6}
        axes.annotate("", ends[-1], ends[0], arrowprops=arrow)

    axes.set(xlabel="operations a byte", ylabel="billions of operations a second")
    axes.legend(loc="lower right")
    return figure


def threads(parameters: int, threads: int, width: int) -> Figure:
    """Which thread takes which parameter: one each above, `width` neighbours each below.

    threads: of a block. (A GPU's blocks have many more; so few can be drawn.)
    """
    figure = new_figure(f"{parameters} parameters, {threads} threads a block", 3.2)
    naive, in_use = figure.subplots(2, 1)
    draw_threads(naive, parameters, threads, 1)
    naive.set_title("the naive kernel: a thread for each parameter")
    draw_threads(in_use, parameters, threads, width)
    in_use.set_title(f"in use: {width} neighbours a thread; what is left over goes singly (orange)")
    return figure


def draw_threads(axes: Axes, parameters: int, threads: int, width: int) -> None:
    """A row of parameters in the colours of their threads, and the blocks below them."""
    for i in range(parameters):
        number = i // width
        colour = (SKY, BLUE)[number % 2]
        if (number + 1) * width > parameters:  # not enough are left for a whole access
            colour = ORANGE
        axes.add_patch(Rectangle((i, 0), 1, 1, facecolor=colour, edgecolor="white"))
        if i % width == 0:
            end = min(i + width, parameters)
            axes.text((i + end) / 2, 0.45, f"{number % threads}", ha="center", va="center")

    of_block = threads * width
    for start in range(0, parameters, of_block):
        end = min(start + of_block, parameters)
        axes.annotate("", (start, -0.3), (end, -0.3), arrowprops={"arrowstyle": "<->"})
        axes.text((start + end) / 2, -1.0, f"block {start // of_block}", ha="center", fontsize=9)
    axes.set(xlim=(-0.2, parameters + 0.2), ylim=(-1.2, 1.1))
    axes.set_axis_off()


# -------------------------------------------------------------------------------------- 06: LiTS


# ----------------------------------------------------------------------- 07: your own hospitals
