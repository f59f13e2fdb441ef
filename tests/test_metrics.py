"""Losses and measures against values worked out by hand, and against other people's code."""

import math
import runpy

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import ndimage

import metrics
from models import Decomposition


def mask(*pixels):
    """A (1, 1, 2, 2) bool mask with these pixels set."""
    out = torch.zeros(4, dtype=torch.bool)
    out[list(pixels)] = True
    return out.view(1, 1, 2, 2)


def grid(text):
    """A mask from rows of . and #."""
    return np.array([[character == "#" for character in row] for row in text.split()])


# ----------------------------------------------------------------------------------------- losses


def test_soft_dice_is_over_the_whole_batch():
    # p = 0.5 everywhere in 2 images of 4 pixels; y has 1 pixel.
    masks = torch.cat([mask(0), mask()]).to(torch.uint8)
    loss = metrics.soft_dice_loss(torch.zeros(2, 2, 2, 2), masks)
    assert loss.item() == pytest.approx(1 - (2 * 0.5 + 0.1) / (4 + 1 + 0.1), abs=1e-6)


def test_soft_dice_uses_the_lesion_channel():
    background, lesion = torch.full((1, 2, 2), -50.0), torch.full((1, 2, 2), 50.0)
    loss = metrics.soft_dice_loss(torch.stack([background, lesion], dim=1), mask(0, 1, 2, 3))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_soft_dice_of_logits_is_that_of_their_softmax(generator):
    logits = torch.randn(3, 2, 2, 2, generator=generator)
    masks = torch.cat([mask(0), mask(), mask(1, 2, 3)])
    p = logits[:, 1:].exp() / (logits[:, :1].exp() + logits[:, 1:].exp())
    expected = 1 - (2 * p[masks].sum() + 0.1) / (p.sum() + 4 + 0.1)
    torch.testing.assert_close(metrics.soft_dice_loss(logits, masks), expected)


def test_soft_dice_of_probabilities():
    lesion = torch.tensor([0.9, 0.2, 0.0, 0.4]).view(1, 1, 2, 2)
    loss = metrics.soft_dice(torch.cat([1 - lesion, lesion], dim=1), mask(0, 3))
    assert loss.item() == pytest.approx(1 - (2 * 1.3 + 0.1) / (1.5 + 2 + 0.1), abs=1e-6)


@pytest.fixture
def parts(generator):
    """A batch of three images of 4 x 4 as SD-UTNet would return it, in float64."""
    anatomy = torch.rand(3, 8, 4, 4, generator=generator).double() * 2 - 1
    reconstruction = torch.rand(3, 3, 4, 4, generator=generator).double() * 2 - 1
    mu, log_variance, z, z_again = torch.randn(4, 3, 8, generator=generator).double()
    probabilities = torch.randn(3, 2, 4, 4, generator=generator).double().softmax(1)
    return Decomposition(
        anatomy=anatomy,
        probabilities=probabilities,
        reconstruction=reconstruction,
        mu=mu,
        log_variance=log_variance,
        z=z,
        z_again=z_again,
    )


def flat(x):
    """All numbers of a tensor."""
    return x.flatten().tolist()


def test_disentangled_loss_is_its_formula(parts, generator):
    images = torch.randn(3, 3, 4, 4, generator=generator).double()
    masks = (torch.rand(3, 1, 4, 4, generator=generator) < 0.4).to(torch.uint8)
    total, terms = metrics.disentangled_loss(parts, images, masks)

    p, y = flat(parts.probabilities[:, 1]), flat(masks)
    overlap = sum(a * b for a, b in zip(p, y, strict=True))
    dice = 1 - (2 * overlap + 0.1) / (sum(p) + sum(y) + 0.1)
    kl = 0.0
    for m, v in zip(flat(parts.mu), flat(parts.log_variance), strict=True):
        kl -= (1 + v - m**2 - math.exp(v)) / 2 / 3  # the mean of three images
    codes = zip(flat(parts.z_again), flat(parts.z), strict=True)
    latent = sum(abs(a - b) for a, b in codes) / (3 * 8)
    pixels = zip(flat(parts.reconstruction), flat(images), strict=True)
    reconstruction = sum(abs(a - b) for a, b in pixels) / (3 * 3 * 4 * 4)

    expected = {"dice": dice, "kl": kl, "latent": latent, "reconstruction": reconstruction}
    found = {name: term.item() for name, term in terms.items()}
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(term.ndim == 0 for term in terms.values())
    weighted = 10 * dice + 0.01 * kl + latent + reconstruction
    assert total.item() == pytest.approx(weighted, rel=1e-12)


def test_every_term_has_its_gradient(parts, generator):
    """By all that the network computed: nothing is taken for a constant."""
    images = torch.randn(3, 3, 4, 4, generator=generator).double()
    masks = torch.rand(3, 1, 4, 4, generator=generator) < 0.4

    def losses(*computed):
        _, terms = metrics.disentangled_loss(type(parts)(*computed), images, masks)
        return tuple(terms.values())

    assert torch.autograd.gradcheck(losses, [x.double().requires_grad_() for x in parts])


def test_divergence_is_that_of_two_normal_distributions(parts):
    def kl(mu, log_variance):
        changed = parts._replace(
            mu=torch.full((3, 8), mu), log_variance=torch.full((3, 8), log_variance)
        )
        masks = torch.zeros(3, 1, 4, 4)
        _, terms = metrics.disentangled_loss(changed, parts.reconstruction, masks)
        return terms["kl"]

    assert kl(0.0, 0.0) == 0
    one = torch.distributions.Normal(0.7, math.exp(-1.3 / 2))
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = 8 * torch.distributions.kl_divergence(one, standard)
    torch.testing.assert_close(kl(0.7, -1.3), expected)


# ---------------------------------------------------------------------------------- Dice of images


@pytest.mark.parametrize(
    "predicted, truth, expected",
    [
        (mask(0, 1), mask(1, 2, 3), 2 / 5),  # TP 1, FP 1, FN 2: 2 / (2 + 1 + 2)
        (mask(0, 1), mask(0, 1), 1.0),
        (mask(), mask(), 1.0),
        (mask(0), mask(), 0.0),
        (mask(), mask(0), 0.0),
    ],
)
def test_dice_of_an_image(predicted, truth, expected):
    assert metrics.dice_per_image(predicted, truth).tolist() == [expected]


# --------------------------------------------------------------------------------- lesion by lesion


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
    # Lesion 1 (4 pixels) shares 2 with a component of 4: Dice 2 * 2 / (4 + 4). Lesion 2 (2 pixels,
    # touching by a corner) and lesion 3 (6) are missed. The component at the bottom touches
    # nothing. Image: 48 pixels.
    found = metrics.match_lesions(predicted, truth)
    assert found.inverse_area.tolist() == [48 / 4, 48 / 2, 48 / 6]
    assert found.dice.tolist() == [0.5, 0, 0]
    assert found.false_components == 1
    assert metrics.lesion_dice(found) == 0.5 / 4  # three lesions and a false component


def test_one_component_may_find_two_lesions():
    # A component of 8 covers lesions of 2 and 3 pixels: 2 * 2 / (2 + 8) and 2 * 3 / (3 + 8).
    found = metrics.match_lesions(grid("########"), grid("##..###."))
    assert found.dice.tolist() == [0.4, 6 / 11]
    assert found.false_components == 0


def test_two_components_may_find_one_lesion():
    # Components of 1 and 2 pixels touch one lesion of 5: 2 * 3 / (5 + 3).
    found = metrics.match_lesions(grid("#..##..."), grid("#####..."))
    assert found.dice.tolist() == [0.75]
    assert found.false_components == 0


@pytest.mark.parametrize(
    "predicted, truth, dice, false_components, expected",
    [
        ("....", "....", [], 0, 1.0),
        ("#.#.", "....", [], 2, 0.0),
        ("....", ".##.", [0.0], 0, 0.0),
        (".##.", ".##.", [1.0], 0, 1.0),
    ],
)
def test_lesions_where_something_is_empty(predicted, truth, dice, false_components, expected):
    found = metrics.match_lesions(grid(predicted), grid(truth))
    assert found.dice.tolist() == dice
    assert found.false_components == false_components
    assert metrics.lesion_dice(found) == expected


def test_masks_are_cut_to_what_is_in_either():
    predicted = grid("...... ..#... ...... ...... ......")
    truth = grid("...... ...... ...##. ...... ......")
    cut_prediction, cut_truth = metrics.cropped(predicted, truth)
    assert cut_prediction.tolist() == grid("#.. ...").tolist()
    assert cut_truth.tolist() == grid("... .##").tolist()


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
            expected = f1_score(lesion.ravel(), touching.ravel(), zero_division=0)
            assert found.dice[i - 1] == pytest.approx(expected)
            assert found.inverse_area[i - 1] == truth.size / lesion.sum()
        alone = [j for j in range(1, m + 1) if not (truth & (components == j)).any()]
        assert found.false_components == len(alone)


# ---------------------------------------------------------------------------------------- surfaces


def test_surfaces_by_hand():
    truth, predicted = np.zeros((2, 9, 9), bool)
    truth[2:5, 2:5] = True
    predicted[2:5, 4:7] = True
    # Both boundaries are the 8 outer pixels of a square, two columns apart. From the truth's
    # columns 2, 3, 4 the nearest boundary pixel is 2, 1, 0 columns away, 3, 2, 3 of them (the
    # middle of column 3 is inside), and so the other way.
    nsd, hd95 = metrics.surface_measures(predicted, truth, (1, 1), 1)
    assert nsd == 10 / 16
    assert hd95 == 2

    # Columns are 0.4 mm apart.
    nsd, hd95 = metrics.surface_measures(predicted, truth, (0.7, 0.4), 0.4)
    assert nsd == 10 / 16
    assert hd95 == pytest.approx(0.8)

    nsd, _ = metrics.surface_measures(predicted, truth, (1, 1), 2)
    assert nsd == 1


def test_surfaces_where_something_is_empty():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    nsd, hd95 = metrics.surface_measures(empty, empty, (1, 1), 1)
    assert math.isnan(nsd)
    assert math.isnan(hd95)
    for predicted, truth in ((empty, full), (full, empty)):
        nsd, hd95 = metrics.surface_measures(predicted, truth, (1, 1), 1)
        assert nsd == 0
        assert math.isnan(hd95)
    assert metrics.surface_measures(full, full, (1, 1), 1) == (1, 0)


def random_shapes(rng):
    """Blobs that may touch the border, as a mask of 24 x 31."""
    return ndimage.gaussian_filter(rng.standard_normal((24, 31)), 2.5) > 0.05


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.3)])
def test_surfaces_against_all_pairs_of_boundary_pixels(spacing):
    rng = np.random.default_rng(1)
    for _ in range(5):
        masks = [random_shapes(rng), random_shapes(rng)]
        edges = []
        for shape in masks:
            padded = np.pad(shape, 1)
            rows = padded[:-2, 1:-1] & padded[2:, 1:-1]
            columns = padded[1:-1, :-2] & padded[1:-1, 2:]
            edges.append(np.argwhere(shape & ~(rows & columns)) * spacing)
        distances = np.linalg.norm(edges[0][:, None] - edges[1][None], axis=2)
        both = [distances.min(1), distances.min(0)]

        nsd, hd95 = metrics.surface_measures(masks[0], masks[1], spacing, 1.5)
        assert nsd == pytest.approx((np.concatenate(both) <= 1.5).mean())
        assert hd95 == pytest.approx(max(np.percentile(d, 95) for d in both))


def test_surfaces_agree_with_monai():
    monai = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(2)
    for spacing in ((1.0, 1.0), (0.7, 1.3)):
        for _ in range(10):
            predicted, truth = random_shapes(rng), random_shapes(rng)
            p, y = (torch.from_numpy(shape)[None, None].float() for shape in (predicted, truth))
            nsd = monai.compute_surface_dice(p, y, [1.5], include_background=True, spacing=spacing)
            hd95 = monai.compute_hausdorff_distance(
                p, y, include_background=True, percentile=95, spacing=spacing
            )
            found = metrics.surface_measures(predicted, truth, spacing, 1.5)
            assert found == pytest.approx((nsd.item(), hd95.item()), rel=1e-5)


# --------------------------------------------------------------------------------- a set of images


def test_score_of_three_images():
    truth = torch.zeros(3, 1, 4, 8, dtype=torch.bool)
    predicted = torch.zeros_like(truth)
    truth[0, 0, 0, 0] = True  # small, and missed: Dice 0
    truth[1, 0, 1:3, 1:3] = True  # not small, half found: Dice 2 * 2 / (4 + 2)
    predicted[1, 0, 1:3, 1] = True
    predicted[2, 0, 3, 7] = True  # nothing is there: Dice 0, and a false component
    small = torch.tensor([True, False, False])

    found = metrics.score(predicted, truth, small)
    assert found.predicted is predicted
    assert found.dice.dtype == torch.float64
    assert found.dice.tolist() == pytest.approx([0, 2 / 3, 0])
    assert [image.inverse_area.tolist() for image in found.lesions] == [[32], [8], []]
    assert found.tally.dtype == torch.float64
    assert found.tally.shape == (len(metrics.MEASURES), 2)

    means = metrics.means(found.tally)
    assert means["dice_s"] == {"mean": 0, "n": 1}
    assert means["dice_l"] == {"mean": pytest.approx(2 / 3), "n": 1}
    assert means["dice_n"] == {"mean": pytest.approx(1 / 3), "n": 2}
    assert means["dice"] == {"mean": pytest.approx(2 / 9), "n": 3}
    assert means["false_positive"] == {"mean": 1, "n": 1}
    assert means["lesion_dice"] == {"mean": pytest.approx(2 / 9), "n": 3}
    assert means["false_components"] == {"mean": pytest.approx(1 / 3), "n": 3}
    assert means["recall"] == {"mean": 0.5, "n": 2}
    assert means["recall_0_50"] == {"mean": 0.5, "n": 2}


def test_false_positives_are_images_and_not_pixels():
    nothing = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    predicted = nothing.clone()
    predicted[1, 0, 1:3, 1:3] = True
    found = metrics.score(predicted, nothing, torch.zeros(3, dtype=torch.bool))
    means = metrics.means(found.tally)
    assert means["false_positive"] == {"mean": 1 / 3, "n": 3}
    assert isinstance(means["dice"]["n"], int)  # results.json says 3 images, not 3.0


def test_score_of_no_image():
    nothing = torch.zeros(0, 1, 4, 4, dtype=torch.bool)
    found = metrics.score(nothing, nothing, torch.zeros(0, dtype=torch.bool))
    assert found.tally.tolist() == [[0, 0]] * len(metrics.MEASURES)


def lesions(inverse_area=(), dice=(), false_components=0):
    """The lesions of an image."""
    return metrics.Lesions(np.array(inverse_area, float), np.array(dice, float), false_components)


DICE = torch.tensor([0.2, 0.4, 0.9, 1.0, 0.0], dtype=torch.float64)
HAS_LESION = torch.tensor([True, True, True, False, False])
SMALL = torch.tensor([True, False, False, False, True])  # the last is flagged, but has no lesion
HAS_PREDICTION = torch.tensor([True, True, True, False, True])
LESIONS = [
    lesions([150.0, 2000.0], [0.4, 0.0], 1),
    lesions([20.0], [0.4]),
    lesions([49.9, 50.0], [0.9, 0.5]),
    lesions(),
    lesions(false_components=3),
]


def test_means_by_size():
    means = metrics.means(metrics.tally(DICE, HAS_LESION, SMALL, HAS_PREDICTION, LESIONS))
    assert list(means) == list(metrics.MEASURES)
    assert means["dice_s"] == {"mean": 0.2, "n": 1}
    assert means["dice_l"] == {"mean": pytest.approx(0.65), "n": 2}
    assert means["dice_n"] == {"mean": pytest.approx(0.5), "n": 3}
    assert means["dice"] == {"mean": pytest.approx(0.5), "n": 5}
    assert means["false_positive"] == {"mean": 0.5, "n": 2}

    # 0.4 / (2 lesions + 1 component), 0.4, (0.9 + 0.5) / 2, 1 for nothing at all, 0 for three
    # components.
    expected = (0.4 / 3 + 0.4 + 0.7 + 1 + 0) / 5
    assert means["lesion_dice"] == {"mean": pytest.approx(expected), "n": 5}
    assert means["false_components"] == {"mean": 4 / 5, "n": 5}

    assert means["recall"] == {"mean": 4 / 5, "n": 5}  # all but the second are found
    assert means["recall_0_50"] == {"mean": 1, "n": 2}
    assert means["recall_50_150"] == {"mean": 1, "n": 1}
    assert means["recall_150_1000"] == {"mean": 1, "n": 1}
    assert means["recall_1000_up"] == {"mean": 0, "n": 1}


def test_ranges_of_lesions_begin_at_their_lower_bounds():
    sizes = [1.0, 49.9, 50.0, 149.9, 150.0, 999.9, 1000.0]
    of_one = [lesions(sizes, [0.5] * 7)]
    yes = torch.tensor([True])
    means = metrics.means(metrics.tally(torch.ones(1), yes, yes, yes, of_one))
    assert [means[name]["n"] for name in metrics.RECALL_BINS] == [2, 2, 2, 1]


def test_reduction_over_clients_is_exact(generator):
    # 24 bits each, so that float64 sums of them are exact.
    dice = torch.rand(101, generator=generator).double()
    flags = torch.rand(3, 101, generator=generator) < 0.6
    has_lesion, small, has_prediction = flags.unbind()
    found = [LESIONS[1]] * 101

    def tally(part):
        return metrics.tally(
            dice[part], has_lesion[part], small[part], has_prediction[part], found[part]
        )

    together = tally(slice(0, 101))
    clients = [slice(0, 7), slice(7, 7), slice(7, 60), slice(60, 101)]
    apart = sum(tally(client) for client in clients)
    # 101 times 0.4 rounds.
    exact = [i for i, name in enumerate(metrics.MEASURES) if name != "lesion_dice"]
    assert torch.equal(apart[exact], together[exact])
    torch.testing.assert_close(apart, together, rtol=1e-14, atol=0)


def test_nothing_to_average_is_nan():
    none = torch.zeros(3, dtype=torch.bool)
    dice = torch.ones(3, dtype=torch.float64)
    means = metrics.means(metrics.tally(dice, none, none, none, [lesions()] * 3))
    for measure in ("dice_s", "recall", "recall_0_50"):
        assert math.isnan(means[measure]["mean"])
        assert means[measure]["n"] == 0
    assert means["dice"] == {"mean": 1.0, "n": 3}
    assert means["lesion_dice"] == {"mean": 1.0, "n": 3}


# ------------------------------------------------------------------------------- the old command


def test_the_old_command_says_what_to_type_now(capsys):
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(ROOT / "metrics.py", run_name="__main__")
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert output.out == ""
    assert output.err == "metrics.py: compare runs with `python -m tools.compare RUN…`\n"
