"""Loss and measures against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

import metrics
import plots
from models import Decomposition


def mask(*pixels):
    """A (1, 1, 2, 2) bool mask with these pixels set."""
    out = torch.zeros(4, dtype=torch.bool)
    out[list(pixels)] = True
    return out.view(1, 1, 2, 2)


def test_soft_dice_is_over_the_whole_batch():
    # p = 0.5 everywhere in 2 images of 4 pixels; y has 1 pixel: 1 - (2 * 0.5 + 0.1) / (4 + 1 + 0.1)
    loss = metrics.soft_dice_loss(torch.zeros(2, 2, 2, 2), torch.cat([mask(0), mask()]).to(torch.uint8))
    assert loss.item() == pytest.approx(1 - 1.1 / 5.1, abs=1e-6)


def test_soft_dice_uses_the_lesion_channel():
    logits = torch.stack([torch.full((1, 2, 2), -50.0), torch.full((1, 2, 2), 50.0)], dim=1)  # lesion for certain
    assert metrics.soft_dice_loss(logits, mask(0, 1, 2, 3)).item() == pytest.approx(0, abs=1e-6)


def test_soft_dice_of_probabilities():
    lesion = torch.tensor([0.9, 0.2, 0.0, 0.4]).view(1, 1, 2, 2)
    loss = metrics.soft_dice(torch.cat([1 - lesion, lesion], dim=1), mask(0, 3))
    assert loss.item() == pytest.approx(1 - (2 * 1.3 + 0.1) / (1.5 + 2 + 0.1), abs=1e-6)


@pytest.fixture
def parts(generator):
    """A batch of three images of 4 x 4 as SD-UTNet would return it, in float64."""
    anatomy, reconstruction = (torch.rand(3, c, 4, 4, generator=generator).double() * 2 - 1 for c in (8, 3))
    mu, log_variance, z, z_again = torch.randn(4, 3, 8, generator=generator).double()
    probabilities = torch.randn(3, 2, 4, 4, generator=generator).double().softmax(1)
    return Decomposition(anatomy, probabilities, reconstruction, mu, log_variance, z, z_again)


def test_disentangled_loss_is_its_formula(parts, generator):
    images = torch.randn(3, 3, 4, 4, generator=generator).double()
    masks = (torch.rand(3, 1, 4, 4, generator=generator) < 0.4).to(torch.uint8)
    total, terms = metrics.disentangled_loss(parts, images, masks)

    p, y = parts.probabilities[:, 1].flatten().tolist(), masks.flatten().tolist()
    dice = 1 - (2 * sum(a * b for a, b in zip(p, y)) + 0.1) / (sum(p) + sum(y) + 0.1)
    kl = 0.0
    for m, v in zip(parts.mu.flatten().tolist(), parts.log_variance.flatten().tolist()):
        kl -= (1 + v - m**2 - math.exp(v)) / 2 / 3  # of three images
    latent = sum(abs(a - b) for a, b in zip(parts.z_again.flatten().tolist(), parts.z.flatten().tolist())) / (3 * 8)
    pairs = zip(parts.reconstruction.flatten().tolist(), images.flatten().tolist())
    reconstruction = sum(abs(a - b) for a, b in pairs) / (3 * 3 * 4 * 4)

    expected = {"dice": dice, "kl": kl, "latent": latent, "reconstruction": reconstruction}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-12)
    assert all(term.ndim == 0 for term in terms.values())
    assert total.item() == pytest.approx(10 * dice + 0.01 * kl + latent + reconstruction, rel=1e-12)


def test_divergence_is_that_of_two_normal_distributions(parts):
    def kl(mu, log_variance):
        parts_at = parts._replace(mu=torch.full((3, 8), mu), log_variance=torch.full((3, 8), log_variance))
        return metrics.disentangled_loss(parts_at, parts.reconstruction, torch.zeros(3, 1, 4, 4))[1]["kl"]

    assert kl(0.0, 0.0) == 0
    one = torch.distributions.Normal(0.7, math.exp(-1.3 / 2))
    expected = 8 * torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl(0.7, -1.3), expected)


@pytest.mark.parametrize("predicted, truth, expected", [
    (mask(0, 1), mask(1, 2, 3), 2 / 5),  # TP 1, FP 1, FN 2: 2 / (2 + 1 + 2)
    (mask(0, 1), mask(0, 1), 1.0),
    (mask(), mask(), 1.0),
    (mask(0), mask(), 0.0),
    (mask(), mask(0), 0.0),
])
def test_dice_of_an_image(predicted, truth, expected):
    assert metrics.dice_per_image(predicted, truth).tolist() == [expected]


# ------------------------------------------------------------------------------------------- lesion by lesion


def grid(text):
    """A mask from rows of . and #."""
    return np.array([[character == "#" for character in row] for row in text.split()])


def test_lesions_by_hand():
    truth = grid("""##......
                    ##....#.
                    .......#
                    ........
                    ###.....
                    ###.....""")
    predicted = grid(""".##.....
                        .##.....
                        ........
                        ....##..
                        .....#..
                        ........""")
    # Lesion 1 (4 pixels) shares 2 with a component of 4: Dice 2 * 2 / (4 + 4). Lesion 2 (2 pixels, touching by a corner)
    # and lesion 3 (6) are missed. The component at the bottom touches nothing. Image: 48 pixels.
    found = metrics.match_lesions(predicted, truth)
    assert found.inverse_area.tolist() == [48 / 4, 48 / 2, 48 / 6]
    assert found.dice.tolist() == [0.5, 0, 0] and found.false_components == 1
    assert metrics.lesion_dice(found) == 0.5 / 4  # three lesions and a false component


def test_one_component_may_find_two_lesions_and_two_one():
    # One component of 8 covers lesions of 2 and 3 pixels: 2 * 2 / (2 + 8) and 2 * 3 / (3 + 8).
    found = metrics.match_lesions(grid("########"), grid("##..###."))
    assert found.dice.tolist() == [0.4, 6 / 11] and found.false_components == 0
    # Components of 1 and 2 pixels touch one lesion of 5: 2 * 3 / (5 + 3).
    found = metrics.match_lesions(grid("#..##..."), grid("#####..."))
    assert found.dice.tolist() == [0.75] and found.false_components == 0


@pytest.mark.parametrize("predicted, truth, dice, false_components, expected", [
    ("....", "....", [], 0, 1.0),
    ("#.#.", "....", [], 2, 0.0),
    ("....", ".##.", [0.0], 0, 0.0),
    (".##.", ".##.", [1.0], 0, 1.0),
])
def test_lesions_where_something_is_empty(predicted, truth, dice, false_components, expected):
    found = metrics.match_lesions(grid(predicted), grid(truth))
    assert found.dice.tolist() == dice and found.false_components == false_components and metrics.lesion_dice(found) == expected


def test_lesions_of_random_masks():
    """The same by scikit-learn's F1, which is Dice, one lesion at a time."""
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    rng = np.random.default_rng(0)
    for share in (0.05, 0.2, 0.4):
        truth, predicted = rng.random((2, 14, 17)) < share
        found = metrics.match_lesions(predicted, truth)
        labels, n = ndimage.label(truth, np.ones((3, 3)))
        components, m = ndimage.label(predicted, np.ones((3, 3)))
        assert len(found.dice) == n
        for i in range(1, n + 1):
            lesion = labels == i
            touching = np.isin(components, np.setdiff1d(components[lesion], [0]))
            assert found.dice[i - 1] == pytest.approx(f1_score(lesion.ravel(), touching.ravel(), zero_division=0))
            assert found.inverse_area[i - 1] == truth.size / lesion.sum()
        assert found.false_components == sum(not (truth & (components == j)).any() for j in range(1, m + 1))


def test_surfaces_by_hand():
    truth, predicted = np.zeros((2, 9, 9), bool)
    truth[2:5, 2:5], predicted[2:5, 4:7] = True, True
    # Both boundaries are the 8 outer pixels of a square, two columns apart. From the truth's columns 2, 3, 4 the nearest
    # boundary pixel is 2, 1, 0 columns away, 3, 2, 3 of them (the middle of column 3 is inside), and so the other way.
    nsd, hd95 = metrics.surface_measures(predicted, truth, (1, 1), 1)
    assert nsd == 10 / 16 and hd95 == 2
    nsd, hd95 = metrics.surface_measures(predicted, truth, (0.7, 0.4), 0.4)  # columns are 0.4 mm apart
    assert nsd == 10 / 16 and hd95 == pytest.approx(0.8)
    assert metrics.surface_measures(predicted, truth, (1, 1), 2)[0] == 1


def test_surfaces_where_something_is_empty():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert all(map(math.isnan, metrics.surface_measures(empty, empty, (1, 1), 1)))
    for pair in ((empty, full), (full, empty)):
        nsd, hd95 = metrics.surface_measures(*pair, (1, 1), 1)
        assert nsd == 0 and math.isnan(hd95)
    assert metrics.surface_measures(full, full, (1, 1), 1) == (1, 0)


def random_shapes(rng):
    """Blobs that may touch the border, as a mask of 24 x 31."""
    return ndimage.gaussian_filter(rng.standard_normal((24, 31)), 2.5) > 0.05


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.3)])
def test_surfaces_against_all_pairs_of_boundary_pixels(spacing):
    rng = np.random.default_rng(1)
    for _ in range(5):
        masks = [random_shapes(rng) for _ in range(2)]
        edges = []
        for mask in masks:
            padded = np.pad(mask, 1)
            inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
            edges.append(np.argwhere(mask & ~inside) * spacing)
        distances = np.linalg.norm(edges[0][:, None] - edges[1][None], axis=2)
        both = [distances.min(1), distances.min(0)]
        nsd, hd95 = metrics.surface_measures(*masks, spacing, 1.5)
        assert nsd == pytest.approx((np.concatenate(both) <= 1.5).mean())
        assert hd95 == pytest.approx(max(np.percentile(d, 95) for d in both))


def test_surfaces_agree_with_monai():
    monai = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(2)
    for spacing in ((1.0, 1.0), (0.7, 1.3)):
        for _ in range(10):
            predicted, truth = random_shapes(rng), random_shapes(rng)
            pair = [torch.from_numpy(mask)[None, None].float() for mask in (predicted, truth)]
            theirs = (monai.compute_surface_dice(*pair, [1.5], include_background=True, spacing=spacing).item(),
                      monai.compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing).item())
            assert metrics.surface_measures(predicted, truth, spacing, 1.5) == pytest.approx(theirs, rel=1e-5)


# ---------------------------------------------------------------------------------------------- sums and tables

DICE = torch.tensor([0.2, 0.4, 0.9, 1.0, 0.0], dtype=torch.float64)
LESION = torch.tensor([True, True, True, False, False])
SMALL = torch.tensor([True, False, False, False, True])  # the last is flagged, but its mask is empty
PREDICTED = torch.tensor([True, True, True, False, True])
LESIONS = [metrics.Lesions(np.array([150.0, 2000.0]), np.array([0.4, 0.0]), 1), metrics.Lesions(np.array([20.0]), np.array([0.4]), 0),
           metrics.Lesions(np.array([49.9, 50.0]), np.array([0.9, 0.5]), 0), metrics.Lesions(np.zeros(0), np.zeros(0), 0),
           metrics.Lesions(np.zeros(0), np.zeros(0), 3)]
SURFACES = torch.tensor([[0.5, 4.0], [0.7, 2.0], [0.6, 3.0], [math.nan, math.nan], [0.0, math.nan]], dtype=torch.float64)
NOT_ASKED = torch.full((5, 2), math.nan, dtype=torch.float64)


def test_means_by_size():
    means = metrics.means(metrics.tally(DICE, LESION, SMALL, PREDICTED, LESIONS, SURFACES))
    assert list(means) == list(metrics.MEASURES)
    assert means["dice_s"] == {"mean": 0.2, "n": 1}
    assert means["dice_l"] == {"mean": pytest.approx(0.65), "n": 2}
    assert means["dice_n"] == {"mean": pytest.approx(0.5), "n": 3}
    assert means["dice"] == {"mean": pytest.approx(0.5), "n": 5}
    assert means["false_positive"] == {"mean": 0.5, "n": 2}
    # 0.4 / (2 lesions + 1 component), 0.4, (0.9 + 0.5) / 2, 1 for nothing at all, 0 for three components
    assert means["lesion_dice"] == {"mean": pytest.approx((0.4 / 3 + 0.4 + 0.7 + 1 + 0) / 5), "n": 5}
    assert means["false_components"] == {"mean": 4 / 5, "n": 5}
    assert means["recall"] == {"mean": 4 / 5, "n": 5}  # all but the second are found
    assert means["recall_0_50"] == {"mean": 1, "n": 2} and means["recall_50_150"] == {"mean": 1, "n": 1}
    assert means["recall_150_1000"] == {"mean": 1, "n": 1} and means["recall_1000_up"] == {"mean": 0, "n": 1}
    assert means["nsd"] == {"mean": pytest.approx(1.8 / 4), "n": 4} and means["hd95"] == {"mean": 3, "n": 3}


def test_reduction_over_clients_is_exact(generator):
    dice = torch.rand(101, generator=generator).double()  # 24 bits each, so that float64 sums of them are exact
    lesion, small, predicted = (torch.rand(3, 101, generator=generator) < 0.6).unbind()
    lesions, surfaces = [LESIONS[1]] * 101, torch.rand(101, 2, generator=generator).double()
    parts = [slice(0, 7), slice(7, 7), slice(7, 60), slice(60, 101)]
    together = metrics.tally(dice, lesion, small, predicted, lesions, surfaces)
    apart = sum(metrics.tally(dice[p], lesion[p], small[p], predicted[p], lesions[p], surfaces[p]) for p in parts)
    exact = [i for i, name in enumerate(metrics.MEASURES) if name != "lesion_dice"]  # 101 times 0.4 rounds
    assert torch.equal(apart[exact], together[exact])
    torch.testing.assert_close(apart, together, rtol=1e-14, atol=0)


def test_nothing_to_average_is_nan():
    none = torch.zeros(3, dtype=torch.bool)
    means = metrics.means(metrics.tally(torch.ones(3, dtype=torch.float64), none, none, none, LESIONS[3:4] * 3, NOT_ASKED[:3]))
    for measure in ("dice_s", "recall", "recall_0_50", "nsd", "hd95"):
        assert math.isnan(means[measure]["mean"]) and means[measure]["n"] == 0
    assert means["dice"] == {"mean": 1.0, "n": 3} and means["lesion_dice"] == {"mean": 1.0, "n": 3}


def test_table_shows_counts_and_dashes():
    means = metrics.means(metrics.tally(DICE, LESION, LESION & False, PREDICTED, LESIONS, NOT_ASKED))
    text = metrics.table({"best": {"round": 3, "in_test": means, "out_test": means}})
    assert "Dice_S" in text and "– (n=0)" in text and "0.500 (n=3)" in text and "best (round 3)" in text
    assert "lesion recall" in text and "HD95" not in text
    means = metrics.means(metrics.tally(DICE, LESION, LESION & False, PREDICTED, LESIONS, SURFACES))
    assert "3.000 (n=3)" in metrics.table({"published": {"round": None, "in_test": means, "out_test": means}})


@pytest.mark.parametrize("channels", [3, 1])
def test_picture_of_anatomy(generator, channels, tmp_path):
    image = 4 * torch.rand(channels, 16, 16, generator=generator) - 2
    reconstruction = torch.tanh(image).requires_grad_()  # as it comes from a network
    anatomy = torch.rand(8, 16, 16, generator=generator) * 2 - 1
    figure = plots.draw_anatomy(image, anatomy, reconstruction, "a title")

    panels = {axes.get_title(): axes.images[0] for axes in figure.axes if axes.get_title()}
    assert list(panels) == ["image", *(f"anatomy {i}" for i in (1, 2, 3, 4)),
                            "reconstruction", *(f"anatomy {i}" for i in (5, 6, 7, 8))]
    low, high = image.min(), image.max()  # tanh stays within them, so they are the ends of the common scale
    for name, x in (("image", image), ("reconstruction", reconstruction.detach())):
        shown = torch.as_tensor(panels[name].get_array().data.copy()).reshape(16, 16, channels).permute(2, 0, 1)
        torch.testing.assert_close(shown, (x - low) / (high - low), rtol=1e-5, atol=1e-6)
    for i in range(8):
        assert panels[f"anatomy {i + 1}"].get_clim() == (-1, 1)
        assert (panels[f"anatomy {i + 1}"].get_array().data == anatomy[i].numpy()).all()
    assert figure.get_suptitle() == "a title"
    assert any("anatomy" in axes.get_ylabel() for axes in figure.axes)  # the colour bar
    figure.savefig(tmp_path / "anatomy.png")
