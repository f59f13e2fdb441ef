"""The pictures of the notebooks, so that a cell shows an idea and not how it is drawn.

First what all notebooks share, then a section for each, in their order. A function makes a
matplotlib Figure of its own; a cell shows it with `show`, and says what is seen:

    drawings.show(drawings.sizes(federation), "What a reader sees who cannot see the picture.")
"""

import base64
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
from IPython.display import display
from matplotlib import rcParams
from matplotlib.figure import Figure

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


# -------------------------------------------------------------------------------------- 06: LiTS


# ----------------------------------------------------------------------- 07: your own hospitals
