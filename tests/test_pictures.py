"""The pictures show the numbers that they are given."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import fedgs
import metrics
from support import pictures
from tools import look


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


# ---------------------------------------------------------------------------- a first look at data


def seen_of(varied, **centres):
    """What a look has seen of these images of each centre, {centre: indices}."""
    seen = []
    for centre, indices in centres.items():
        for i in indices:
            one = look.see(varied, i, "train", "colour")
            seen.append(one._replace(centre=centre))
    return seen


def draw_seen(seen, count=12):
    """The panels of a look's picture: histograms, difficulty, and images that are shown."""
    figure = pictures.draw_look(seen, 40, 20, "a look", count)
    figure.draw_without_rendering()
    above, below = figure.subfigs
    *histograms, difficulty = above.axes
    images = [axes for axes in below.axes if axes.images]
    return histograms, difficulty, images


def bars(axes):
    """Heights of a histogram's bars together: those of the others, and of the small ones."""
    others, small = axes.containers
    for below, above in zip(others, small, strict=True):
        assert above.get_y() == below.get_height()  # upon each other
        assert above.get_width() == below.get_width()
    return sum(bar.get_height() for bar in others), sum(bar.get_height() for bar in small)


def test_a_look_has_a_histogram_for_each_centre(varied):
    seen = seen_of(varied, A=range(7), B=[1, 2, 3, 6])
    histograms, difficulty, _ = draw_seen(seen)
    assert [axes.get_ylabel() for axes in histograms] == ["A", "B"]
    assert [bars(axes) for axes in histograms] == [(4, 2), (2, 1)]
    assert [axes.texts[0].get_text() for axes in histograms] == [
        "6 with a lesion,\n2 small",
        "3 with a lesion,\n1 small",
    ]
    for axes in (*histograms, difficulty):
        assert axes.get_xscale() == "log"
        [line] = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert list(line.get_xdata()) == [40, 40]


def test_a_look_at_many_centres_has_one_histogram(varied):
    centres = {f"A{i}": [0, 2, 3] for i in range(9)}
    [histogram], _, _ = draw_seen(seen_of(varied, **centres))
    assert histogram.get_ylabel() == "9 centres"
    assert bars(histogram) == (18, 9)
    del centres["A8"]
    assert len(draw_seen(seen_of(varied, **centres))[0]) == 8


def test_a_look_shows_the_difficulty_of_every_image(varied):
    _, axes, _ = draw_seen(seen_of(varied, A=range(7)))
    points = {line.get_label(): line.get_xydata() for line in axes.lines}
    small = points["small"]
    inverse_area = varied.inverse_area[:2].numpy()
    assert small[:, 0] == pytest.approx(inverse_area)

    # As the method has it.
    _, difficulty, _ = fedgs.mask_difficulty(varied.masks[:2], varied.small[:2], 20)
    assert small[:, 1] == pytest.approx(difficulty.numpy())
    assert points["not small: δ = 0"][:, 1].tolist() == [0] * 4


def test_a_look_shows_the_smallest_lesions_first(varied):
    varied.masks[5, 0, 10, 10] = 1
    varied.names = list("abcdefg")
    _, _, images = draw_seen(seen_of(varied, A=range(7)), count=4)
    titles = [axes.get_title().splitlines() for axes in images]
    assert [title for title, _ in titles] == ["A, f", "A, a", "A, b", "A, c"]
    assert titles[0][1] == "lesions: 1/21, smallest: 1/256"
    assert titles[1][1] == "lesion: 1/128 of the image"

    # The ring is around the one pixel, whose column comes first.
    [ring] = images[0].lines
    assert ring.get_xydata().tolist() == [[10, 10]]
    [ring] = images[3].lines
    assert ring.get_xydata().tolist() == [[0.5, 1]]


def test_a_look_shows_one_slice_of_a_volume(varied):
    varied.names = ["v1_slice-3", "v1_slice-4", "v2_slice-4", "v2_slice-1", "e", "f", "g"]
    _, _, images = draw_seen(seen_of(varied, A=[0, 1, 2, 3], B=[0]))
    titles = [axes.get_title().splitlines()[0] for axes in images]
    assert titles == ["A, v1_slice-3", "B, v1_slice-3", "A, v2_slice-4"]


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
    assert line(scale, "mean of η")[1] == pytest.approx([2.25, 3.25, 4.25])
    low, high = scale.get_ylim()
    assert low == 1
    assert 4.25 < high < 6
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


def test_predictions_of_small_lesions_above_others_and_none_below(tmp_path):
    tests = [
        made_up_test("C1", [1, 100, 0, 2], [True, False, False, True]),
        made_up_test("C2", [4, 3, 50], [True, True, False]),
    ]
    tests[0][1].predicted[2, 0, 5] = True  # a false alarm
    figure = pictures.draw_predictions(tests, "a title", count=3)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        # 1/a of 64, 85, 128, 256, evenly spaced
        "C2, C2-4\n1/a = 64, Dice 1.00",
        "C1, C1-2\n1/a = 128, Dice 0.00",
        "C1, C1-1\n1/a = 256, Dice 1.00",
        "C1, C1-100\n1/a = 3, Dice 0.00",
        "C2, C2-50\n1/a = 5, Dice 1.00",
        "",
        "C1, C1-0\nno lesion, Dice 1.00",
        "",
        "",
    ]
    rows = [axes.get_ylabel() for axes in figure.axes]
    assert rows == ["small lesion", "", "", "no small lesion", "", "", "no lesion", "", ""]
    # An outline of truth on its rim, and one of the prediction where there is one.
    outlines = [len(axes.collections) for axes in figure.axes]
    assert outlines == [4, 2, 4, 2, 4, 0, 2, 0, 0]
    shown = figure.axes[0].images[0].get_array()
    assert (shown.data == tests[1][0].images[0].permute(1, 2, 0).numpy()).all()
    drawn(figure, tmp_path)


def test_predictions_where_no_image_has_a_lesion(tmp_path):
    """Those that are shown are from all centres, not the first ones."""
    tests = [made_up_test("C1", [0, 0, 0], [False] * 3), made_up_test("C2", [0], [False])]
    tests[0][0].names[:] = ["a", "b", "c"]
    figure = pictures.draw_predictions(tests, "nothing", count=2)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["C1, a\nno lesion, Dice 1.00", "C2, C2-0\nno lesion, Dice 1.00"]
    drawn(figure, tmp_path)


def test_predictions_of_nothing(tmp_path):
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


def difference(*of_pairs, images=20, over_images=(-0.05, 0.05), with_seeds=(-0.2, 0.3)):
    """As tools.compare has them."""
    mean = float(np.mean(of_pairs)) if of_pairs else math.nan
    return SimpleNamespace(
        of_pairs=of_pairs,
        images=images,
        mean=mean,
        over_images=over_images,
        with_seeds=with_seeds,
    )


def by_marker(axes):
    """Points of pairs, means, and the two intervals, in the order in which they were drawn."""
    found = {"o": [], "D": [], 5: [], 1.3: []}
    for drawn_line in axes.lines[1:]:  # the first one is that of 0
        points = drawn_line.get_marker()
        kind = drawn_line.get_linewidth() if points == "None" else points
        found[kind].append(list(drawn_line.get_ydata()))
    return found.values()


def test_comparison(tmp_path):
    nothing = difference(images=0, over_images=(math.nan,) * 2, with_seeds=(math.nan,) * 2)
    by_size = {
        "1/a < 10": {"Dice": difference(0.1, -0.3, 0.2)},
        "no lesion": {"Dice": nothing},
    }
    by_centre = {
        "C1": {
            "Dice_S": difference(0.1, images=8, with_seeds=(math.nan,) * 2),
            "Dice_L": difference(0.3, 0.5, images=114),
        },
        "C6\n(held out)": {"Dice_S": nothing, "Dice_L": difference(-0.1)},
    }
    rows = {"b − a": (by_size, by_centre), "c − a": (by_size, by_centre)}
    figure = pictures.draw_comparison("a title", rows)
    assert min(drawn(figure, tmp_path)) > 800
    assert figure.get_suptitle() == "a title"
    sizes, centres, *others = figure.axes
    assert len(others) == 2
    assert sizes.get_title(loc="left").startswith("b − a\nby size of lesions: a point is a pair of")
    assert centres.get_title(loc="left").startswith("by centre: a point is a pair of runs")
    assert others[0].get_title(loc="left").startswith("c − a\n")
    assert "difference" in sizes.get_ylabel()
    assert list(sizes.lines[0].get_ydata()) == [0, 0]
    assert sizes.get_ylim() == others[1].get_ylim()

    pairs, means, over_images, with_seeds = by_marker(sizes)
    assert pairs == [[0.1, -0.3, 0.2], []]
    assert means == [[pytest.approx(0)]]  # none where there is no image
    assert over_images[0] == [-0.05, 0.05]
    assert with_seeds[0] == [-0.2, 0.3]
    assert [text.get_text() for text in sizes.texts] == ["20", "0"]

    # Small lesions and others beside each other, in the colours that the key names.
    pairs, means, *_ = by_marker(centres)
    assert pairs == [[0.1], [0.3, 0.5], [], [-0.1]]
    assert means == [[0.1], [0.4], [-0.1]]
    places = [line.get_xdata()[0] for line in centres.lines if line.get_marker() == "D"]
    assert places == sorted(places)
    assert places[1] < 0.5 < places[2]
    assert [text.get_text() for text in centres.texts] == ["8", "114", "0", "20"]
    key = {line.get_label(): line.get_color() for line in figure.legends[0].legend_handles}
    colours = [text.get_color() for text in centres.texts]
    assert colours == [key["Dice_S: small lesions"], key["Dice_L: other lesions"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fedgs − fedavg, 3 pairs of runs", "a method, and its options, " * 5]
)
def test_texts_of_a_comparison_do_not_overlap(name):
    sizes = ("1/a < 10", "10–50", "50–150", "150–1000", "≥ 1000", "no lesion")
    centres = ("C1", "C2", "C3", "C4", "C5", "C6\n(held out)")
    by_size = {size: {"Dice": difference(0.1, images=1234)} for size in sizes}
    of_kinds = {"Dice_S": difference(0.1, images=123), "Dice_L": difference(0.2, images=123)}
    by_centre = dict.fromkeys(centres, of_kinds)
    rows = {f"{name}{i}": (by_size, by_centre) for i in range(3)}
    figure = pictures.draw_comparison("a title of some length " * 6, rows)
    figure.draw_without_rendering()

    boxes = [figure._suptitle.get_window_extent()]
    boxes += [text.get_window_extent() for text in figure.legends[0].get_texts()]
    for axes in figure.axes:
        texts = [*axes.texts, *axes.get_xticklabels(), axes._left_title, axes.yaxis.label]
        boxes += [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 100
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
        assert box.y0 >= 0 and box.y1 <= figure.bbox.height
