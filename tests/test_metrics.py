"""Loss and measures against values worked out by hand."""

import math

import pytest
import torch

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


DICE = torch.tensor([0.2, 0.4, 0.9, 1.0, 0.0], dtype=torch.float64)
LESION = torch.tensor([True, True, True, False, False])
SMALL = torch.tensor([True, False, False, False, True])  # the last is flagged, but its mask is empty
PREDICTED = torch.tensor([True, True, True, False, True])


def test_means_by_size():
    means = metrics.means(metrics.tally(DICE, LESION, SMALL, PREDICTED))
    assert means["dice_s"] == {"mean": 0.2, "n": 1}
    assert means["dice_l"] == {"mean": pytest.approx(0.65), "n": 2}
    assert means["dice_n"] == {"mean": pytest.approx(0.5), "n": 3}
    assert means["dice"] == {"mean": pytest.approx(0.5), "n": 5}
    assert means["false_positive"] == {"mean": 0.5, "n": 2}


def test_reduction_over_clients_is_exact(generator):
    dice = torch.rand(101, generator=generator).double()  # 24 bits each, so that float64 sums of them are exact
    lesion, small, predicted = (torch.rand(3, 101, generator=generator) < 0.6).unbind()
    parts = [slice(0, 7), slice(7, 7), slice(7, 60), slice(60, 101)]
    together = metrics.tally(dice, lesion, small, predicted)
    assert torch.equal(sum(metrics.tally(dice[p], lesion[p], small[p], predicted[p]) for p in parts), together)


def test_nothing_to_average_is_nan():
    none = torch.zeros(3, dtype=torch.bool)
    means = metrics.means(metrics.tally(torch.ones(3, dtype=torch.float64), none, none, none))
    assert math.isnan(means["dice_s"]["mean"]) and means["dice_s"]["n"] == 0
    assert means["dice"] == {"mean": 1.0, "n": 3}


def test_table_shows_counts_and_dashes():
    means = metrics.means(metrics.tally(DICE, LESION, LESION & False, PREDICTED))
    text = metrics.table({"best": {"round": 3, "in_test": means, "out_test": means}})
    assert "Dice_S" in text and "– (n=0)" in text and "0.500 (n=3)" in text and "best (round 3)" in text


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
