"""The pictures show the numbers that they are given."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import metrics
from support import pictures


def drawn(figure, folder):
    """Save a figure, which finds faults that only drawing shows. -> its width and height"""
    path = folder / "picture.png"
    pictures.save_figure(path, figure)
    assert list(folder.iterdir()) == [path]
    with Image.open(path) as image:
        return image.size


def line(axes, label):
    """The points of the curve with this label."""
    (found,) = [curve for curve in axes.lines if curve.get_label() == label]
    return found.get_xdata(), found.get_ydata()


# ---------------------------------------------------------------------------------------- a file


@pytest.mark.parametrize(
    "suffix, begins", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_a_file_in_the_format_of_its_suffix(tmp_path, suffix, begins):
    path = tmp_path / "new folder" / f"picture.{suffix}"
    pictures.save_figure(path, Figure())
    assert path.read_bytes().startswith(begins)


# ----------------------------------------------------------------------------------- a run's rounds


def test_curves(tmp_path):
    history = [
        {
            "round": i,
            "loss_C1": 0.9 - 0.1 * i,
            "loss_C4": 0.8 - 0.1 * i,
            "term_dice_C1": 5.0,
            "eta": 1.25 + i,
            "scaled_steps": 0.5,
            "update_norm_C1": 3.0,
            "dice": 0.1 * i,
            "dice_s": math.nan if i == 1 else 0.05 * i,
            "dice_l": 0.2 * i,
            "seconds": 1.0,
            "data": "PolypGen stand-in",
        }
        for i in (1, 2, 3)
    ]
    figure = pictures.draw_curves(history, "a title")
    losses, dice, scale = figure.axes
    assert figure.get_suptitle() == "a title"
    assert [curve.get_label() for curve in losses.lines] == ["C1", "C4"]
    x, y = line(losses, "C4")
    assert list(x) == [1, 2, 3]
    assert list(y) == pytest.approx([0.7, 0.6, 0.5])

    assert line(dice, "Dice_L (not small)")[1] == pytest.approx([0.2, 0.4, 0.6])
    assert line(dice, "Dice (all)")[1] == pytest.approx([0.1, 0.2, 0.3])
    assert line(dice, "Dice_S (small)")[1] == pytest.approx([math.nan, 0.1, 0.15], nan_ok=True)
    assert line(scale, "mean of η − 1")[1] == pytest.approx([1.25, 2.25, 3.25])
    assert line(scale, "share of steps with η > 1")[1] == pytest.approx([0.5, 0.5, 0.5])
    assert min(drawn(figure, tmp_path)) > 400


def test_rounds_are_whole_numbers(tmp_path):
    row = {"round": 1, "loss_C1": 1.0, "eta": 1.0, "scaled_steps": 0.0}
    figure = pictures.draw_curves([{**row, "dice": 0.1, "dice_s": 0.1, "dice_l": 0.1}], "one")
    drawn(figure, tmp_path)
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low < tick < high] == [1]


def test_curves_of_more_clients_than_a_legend_can_name():
    row = {"round": 1, "eta": 1.0, "scaled_steps": 0.0, "dice": 0.1, "dice_s": 0.1, "dice_l": 0.1}
    names = {}
    for clients in (12, 13):
        losses = {f"loss_St. {k}": 0.5 for k in range(clients)}
        axes = pictures.draw_curves([{**row, **losses}], "many").axes[0]
        assert len(axes.lines) == clients
        names[clients] = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == {12: [f"St. {k}" for k in range(12)], 13: ["13 clients"]}


# -------------------------------------------------------------------------------------- predictions


def made_up_test(centre, areas, small):
    """Images of 16 x 16 with a lesion of so many pixels, every other of which was found."""
    count = len(areas)
    masks = torch.zeros(count, 1, 16, 16, dtype=torch.uint8)
    for i, area in enumerate(areas):
        masks.view(count, -1)[i, :area] = 1
    predicted = masks.bool()
    predicted[1::2] = False
    images = SimpleNamespace(
        centre=centre,
        names=[f"{centre}-{area}" for area in areas],
        images=torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8),
        masks=masks,
        inverse_area=256 / torch.tensor(areas, dtype=torch.float64),
        small=torch.tensor(small),
    )
    return images, metrics.score(predicted, masks.bool(), images.small)


def test_predictions_of_small_lesions_above_others(tmp_path):
    tests = [
        made_up_test("C1", [1, 100, 0, 2], [True, False, False, True]),
        made_up_test("C2", [4, 3, 50], [True, True, False]),
    ]
    figure = pictures.draw_predictions(tests, "a title", count=3)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        # 1/a of 64, 85, 128, 256, evenly spaced; the one without a lesion is not shown
        "C2, C2-4\n1/a = 64, Dice 1.00",
        "C1, C1-2\n1/a = 128, Dice 0.00",
        "C1, C1-1\n1/a = 256, Dice 1.00",
        "C1, C1-100\n1/a = 3, Dice 0.00",
        "C2, C2-50\n1/a = 5, Dice 1.00",
        "",
    ]
    rows = [axes.get_ylabel() for axes in figure.axes]
    assert rows == ["small lesion", "", "", "no small lesion", "", ""]
    # An outline of truth on its rim, and one of the prediction where there is one.
    outlines = [len(axes.collections) for axes in figure.axes]
    assert outlines == [4, 2, 4, 2, 4, 0]
    shown = figure.axes[0].images[0].get_array()
    assert (shown.data == tests[1][0].images[0].permute(1, 2, 0).numpy()).all()
    drawn(figure, tmp_path)


def test_predictions_of_nothing(tmp_path):
    no_lesion = made_up_test("C1", [0, 0], [False, False])
    drawn(pictures.draw_predictions([no_lesion], "nothing"), tmp_path)
    drawn(pictures.draw_predictions([], "nothing"), tmp_path)


def test_one_row_where_no_lesion_is_small():
    figure = pictures.draw_predictions([made_up_test("C1", [9, 8], [False, False])], "a title")
    assert [axes.get_title() for axes in figure.axes] == [
        "C1, C1-9\n1/a = 28, Dice 1.00",
        "C1, C1-8\n1/a = 32, Dice 0.00",
    ]


def test_an_outline_closes_at_the_border_of_the_image(tmp_path):
    axes = Figure().subplots()
    axes.imshow(np.zeros((8, 10)))
    mask = np.zeros((8, 10), bool)
    mask[:3, 7:] = True  # in a corner
    pictures.outline(axes, mask, "white", "solid")
    rim, outline = axes.collections
    for path in (rim.get_paths()[0], outline.get_paths()[0]):
        assert (path.vertices[0] == path.vertices[-1]).all()
        assert path.vertices.min(0).tolist() == [6.5, -0.5]
        assert path.vertices.max(0).tolist() == [9.5, 2.5]
    # The image still fills the axes.
    assert axes.get_xlim() == (-0.5, 9.5)
    assert axes.get_ylim() == (7.5, -0.5)


# ------------------------------------------------------------------------------------------ anatomy


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.slow
def test_anatomy(generator, channels, tmp_path):
    image = 4 * torch.rand(channels, 16, 16, generator=generator) - 2
    reconstruction = torch.tanh(image).requires_grad_()  # as it comes from a network
    anatomy = torch.rand(8, 16, 16, generator=generator) * 2 - 1
    figure = pictures.draw_anatomy(image, anatomy, reconstruction, "a title")

    panels = {axes.get_title(): axes.images[0] for axes in figure.axes if axes.get_title()}
    first = ["image", "anatomy 1", "anatomy 2", "anatomy 3", "anatomy 4"]
    second = ["reconstruction", "anatomy 5", "anatomy 6", "anatomy 7", "anatomy 8"]
    assert list(panels) == first + second

    # tanh stays within the image's values, so they are the ends of the common scale.
    low, high = image.min(), image.max()
    for name, x in (("image", image), ("reconstruction", reconstruction.detach())):
        shown = torch.as_tensor(panels[name].get_array().data.copy())
        shown = shown.reshape(16, 16, channels).permute(2, 0, 1)
        torch.testing.assert_close(shown, (x - low) / (high - low), rtol=1e-5, atol=1e-6)
    for i in range(8):
        panel = panels[f"anatomy {i + 1}"]
        assert panel.get_clim() == (-1, 1)
        assert (panel.get_array().data == anatomy[i].numpy()).all()
    assert any("anatomy" in axes.get_ylabel() for axes in figure.axes)  # the colour bar
    assert figure.get_suptitle() == "a title"
    drawn(figure, tmp_path)


# ----------------------------------------------------------------------------- methods side by side


def test_comparison(tmp_path):
    sizes = np.array([20.0, 200.0, 40.0])
    points = {
        "fedavg": (np.array([20.0, 200.0]), np.array([0.6, 0.2])),
        "fedgs": (sizes, np.array([0.5, 0.3, 0.4])),
    }
    missing = (math.nan, 0)
    bars = {
        "Dice_S": {"C1": {"fedavg": [(0.2, 1)], "fedgs": [(0.3, 1)]}},
        "Dice_L": {
            "C1": {"fedavg": [(0.5, 4), (0.7, 6)], "fedgs": [(0.6, 5)]},
            "C6\n(held out)": {"fedavg": [missing, missing], "fedgs": [missing]},
        },
        "recall": {"1/a < 50": {"fedavg": [(1.0, 2), (0.5, 2)], "fedgs": [(0.9, 2)]}},
    }
    figure = pictures.draw_comparison("a title", 150.0, sizes, points, bars)
    assert min(drawn(figure, tmp_path)) > 800
    assert figure.get_suptitle() == "a title"
    panels = {axes.get_title().partition(":")[0]: axes for axes in figure.axes}

    # Every image is a point of its method, and tau a line.
    scatter = panels["every test image with a lesion, mean of its runs"]
    dots = [found for found in scatter.collections if len(found.get_offsets()) > 1]
    assert dots[0].get_offsets().tolist() == [[20, 0.6], [200, 0.2]]
    assert dots[1].get_offsets().tolist() == [[20, 0.5], [200, 0.3], [40, 0.4]]
    assert set(line(scatter, "τ = 150")[0]) == {150}
    counts = next(axes for axes in figure.axes if axes.get_ylabel() == "images")
    assert sum(bar.get_height() for bar in counts.patches) == 3
    assert counts.get_xlim() == scatter.get_xlim()

    # A bar for each method in each group; a point for each run, and n below.
    panel = panels["Dice_L"]
    assert [bar.get_height() for bar in panel.patches] == pytest.approx([0.6, 0.6, 0, 0])
    assert len({round(bar.get_x(), 6) for bar in panel.patches}) == 4
    assert [list(points.get_ydata()) for points in panel.lines] == [[0.5, 0.7], [0.6], [], []]
    ticks = [label.get_text() for label in panel.get_xticklabels()]
    assert ticks == ["4–6\nC1", "0\nC6\n(held out)"]
    assert panels["recall"].patches[0].get_height() == 0.75

    # A method has one colour everywhere, which the legend names.
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["fedavg", "fedgs"]
    colours = [patch.get_facecolor() for patch in legend.get_patches()]
    assert [bar.get_facecolor() for bar in panels["Dice_S"].patches] == colours
    assert [tuple(found.get_facecolor()[0][:3]) for found in dots] == [c[:3] for c in colours]


def test_running_mean_by_hand():
    x = np.array([3.0, 1.0, 2.0, 4.0, 5.0])
    y = np.array([0.3, 0.1, 0.2, 0.9, 0.5])
    area, mean, error = pictures.running_mean(x, y, 2, fewest=1)
    assert area.tolist() == [1, 2, 3, 4, 5]
    # In order 0.1, 0.2, 0.3, 0.9, 0.5: two at the ends, three beside them, all five in the middle.
    assert mean.tolist() == pytest.approx([0.15, 0.2, 0.4, 1.7 / 3, 0.7])
    # The standard deviation of 0.1, 0.2, 0.3 is 0.1.
    assert error[1] == pytest.approx(1.96 * 0.1 / math.sqrt(3))
