"""Loss and measures against values worked out by hand."""

import math

import pytest
import torch

import metrics


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
