"""A run's table, the rows of scores.csv, and cells as text."""

import math
from types import SimpleNamespace

import torch

import metrics
from support import tables


def means(**found):
    """The means of a split: those given as (mean, n), nothing for the other measures."""
    out = {}
    for measure in metrics.MEASURES:
        mean, n = found.get(measure, (math.nan, 0))
        out[measure] = {"mean": mean, "n": n}
    return out


IN_TEST = means(dice_s=(0.25, 9), dice=(0.5, 20))
OUT_TEST = means(dice_s=(math.nan, 0), dice=(0.75, 30))


# ------------------------------------------------------------------------------- a run's results


def test_a_row_for_each_measure_and_a_pair_of_columns_for_each_checkpoint():
    worse = means(dice_s=(0.125, 9), dice=(0.375, 20))
    results = {
        "best": {"round": 3, "in_test": IN_TEST, "out_test": OUT_TEST},
        "best_small": {"round": 2, "in_test": worse, "out_test": OUT_TEST},
    }
    lines = [line.split("   ") for line in tables.results_table(results).splitlines()]
    lines = [[text.strip() for text in line if text.strip()] for line in lines]
    assert lines == [
        ["best (round 3)", "best_small (round 2)"],
        ["in-test", "out-test", "in-test", "out-test"],
        ["Dice_S", "0.250 (n=9)", "– (n=0)", "0.125 (n=9)", "– (n=0)"],
        ["Dice", "0.500 (n=20)", "0.750 (n=30)", "0.375 (n=20)", "0.750 (n=30)"],
    ]


def test_checkpoints_of_the_same_round_share_their_columns():
    result = {"round": 3, "in_test": IN_TEST, "out_test": OUT_TEST}
    text = tables.results_table({"best": result, "best_small": dict(result)})
    assert "best, best_small (round 3)" in text
    assert text.count("in-test") == 1
    assert text.count("0.250 (n=9)") == 1


def test_the_same_round_of_two_runs_is_not_the_same_network():
    first = {"round": 3, "in_test": IN_TEST, "out_test": OUT_TEST}
    second = {"round": 3, "in_test": OUT_TEST, "out_test": OUT_TEST}
    text = tables.results_table({"FedAvg": first, "FedGS": second})
    assert "FedAvg (round 3)" in text
    assert "FedGS (round 3)" in text
    assert text.count("in-test") == 2


def test_a_checkpoint_of_unknown_round():
    result = {"round": None, "in_test": IN_TEST, "out_test": OUT_TEST}
    text = tables.results_table({"published": result})
    assert text.splitlines()[0].strip() == "published"


def test_a_measure_has_a_row_if_anything_was_counted_for_it():
    only_outside = means(false_positive=(0.5, 2))
    text = tables.results_table(
        {"best": {"round": 1, "in_test": means(), "out_test": only_outside}}
    )
    assert [line.split("  ")[0] for line in text.splitlines()[2:]] == ["FP rate"]


# ------------------------------------------------------------------------------- scores of images


def test_rows_of_scores():
    truth = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    truth[0, 0, 0, 0] = truth[0, 0, 2:, 2:] = True
    predicted = torch.zeros_like(truth)
    predicted[0, 0, 3, 2:] = predicted[0, 0, 3, 0] = True
    small = torch.tensor([True, False])
    images = SimpleNamespace(
        centre="C4",
        names=["a", "b"],
        inverse_area=torch.tensor([16 / 5, math.inf], dtype=torch.float64),
        small=small,
    )
    evaluation = metrics.score(predicted, truth, small)
    rows = tables.score_rows("in_test", "local", images, evaluation, "PolypGen stand-in")
    assert rows == [
        {
            "split": "in_test",
            "batch_norm": "local",
            "centre": "C4",
            "name": "a",
            "inverse_area": 16 / 5,
            "small": 1,
            "dice": 2 * 2 / (5 + 3),
            # Lesions of 1 and 4 pixels, of which the second is touched by 2: 2 * 2 / (4 + 2); a
            # component of 1 touches nothing.
            "lesion_dice": (0 + 2 / 3) / 3,
            "lesions": 2,
            "found": 1,
            "false_components": 1,
            "data": "PolypGen stand-in",
        },
        {
            "split": "in_test",
            "batch_norm": "local",
            "centre": "C4",
            "name": "b",
            "inverse_area": math.inf,
            "small": 0,
            "dice": 1.0,
            "lesion_dice": 1.0,
            "lesions": 0,
            "found": 0,
            "false_components": 0,
            "data": "PolypGen stand-in",
        },
    ]
    # What a file will hold: plain numbers, which csv and json write as they are.
    assert {type(value) for row in rows for value in row.values()} == {str, int, float}


# ----------------------------------------------------------------------------------- cells as text

ROWS = [["", "n", "fedgs"], ["Dice", "12", "0.5"], ["Dice_S", "3", "0.25"]]


def test_aligned():
    assert tables.aligned(ROWS) == ("          n   fedgs\nDice     12     0.5\nDice_S    3    0.25")


def test_markdown():
    assert tables.markdown(ROWS) == (
        "|  | n | fedgs |\n|---|---|---|\n| Dice | 12 | 0.5 |\n| Dice_S | 3 | 0.25 |"
    )
