"""Comparing runs: `python metrics.py RUN…` on score files whose truth is known."""

import csv
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import metrics
import plots

CONFIG = {"dataset": "polypgen", "method": "fedgs", "model": "utnet", "fold": 1, "seed": 0, "tau": 150.0, "image_size": 64,
          "rounds": 2, "server_lr": 1.0, "nsd_tolerance": 0.0, "device": "cpu", "out": "", "data_root": ""}


class Case:
    """One test image of a made-up run."""

    def __init__(self, name, dice, inverse_area=20.0, small=False, split="in_test", centre=1):
        self.name, self.dice, self.inverse_area, self.small, self.split, self.centre = name, dice, inverse_area, small, split, centre


def make_run(folder, cases, data="PolypGen", **config):
    """Write the files of a finished run with these Cases as its test images, all missed by best_small. -> folder as text"""
    folder.mkdir()
    checkpoints, rows = {}, []
    for checkpoint, factor in (("best", 1), ("best_small", 0)):
        rows += [{"checkpoint": checkpoint, "split": c.split, "centre": c.centre, "name": c.name, "inverse_area": c.inverse_area,
                  "small": int(c.small), "dice": c.dice * factor, "lesion_dice": c.dice * factor / 2, "data": data} for c in cases]
        checkpoints[checkpoint] = {split: {} for split in metrics.SPLITS}
        for split, means in checkpoints[checkpoint].items():
            scores = [metrics.Score(c.inverse_area, c.small, c.dice * factor, c.dice * factor / 2) for c in cases if c.split == split]
            for measure in metrics.MEASURES:
                values = [x for x in (s.of(measure) for s in scores) if x is not None] if measure in metrics.PAIRED else []
                means[measure] = {"mean": float(np.mean(values)) if values else None, "n": len(values)}
            means["recall_0_50"] = {"mean": 0.5, "n": 2} if split == "in_test" else {"mean": 0.9, "n": 6}
    results = {"data": data, "config": {**CONFIG, **config}, "checkpoints": checkpoints}
    (folder / "results.json").write_text(json.dumps(results))
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(folder)


def cases(*dice):
    """Four test images: a small and a larger lesion, an empty image, and one of the held-out centre."""
    a, b, c, d = dice
    return [Case("a", a, 200.0, True), Case("b", b), Case("c", c, math.inf), Case("d", d, split="out_test", centre=6)]


@pytest.fixture
def pair_of_methods(tmp_path):
    """Two runs each of FedAvg and FedGS."""
    return [make_run(tmp_path / "a0", cases(0.1, 0.5, 1.0, 0.6), method="fedavg"),
            make_run(tmp_path / "a1", cases(0.3, 0.7, 0.0, 0.6), method="fedavg", seed=1),
            make_run(tmp_path / "g0", cases(0.2, 0.6, 1.0, 0.5)),
            make_run(tmp_path / "g1", cases(0.5, 0.6, 1.0, 0.5), seed=1)]


# ------------------------------------------------------------------------------------------------- numbers


def test_means_over_runs(pair_of_methods):
    [section] = metrics.compare(pair_of_methods)
    assert {label: len(group) for label, group in section.groups.items()} == {"fedavg": 2, "fedgs": 2}
    score = section.summary["in_test", "dice_n", "fedavg"]  # means 0.3 and 0.5 of two images with a lesion
    assert score == {"runs": 2, "mean": pytest.approx(0.4), "std": pytest.approx(math.sqrt(2 * 0.1**2)), "n": (2, 2)}
    score = section.summary["in_test", "dice", "fedgs"]  # means 1.8 / 3 and 2.1 / 3
    assert (score["mean"], score["n"]) == (pytest.approx(0.65), (3, 3))
    assert section.summary["out_test", "dice_s", "fedgs"]["runs"] == 0  # nothing there is small
    assert math.isnan(section.summary["out_test", "dice_s", "fedgs"]["mean"])
    [section] = metrics.compare(pair_of_methods, "best_small")
    assert section.summary["in_test", "dice", "fedgs"]["mean"] == 0 and "best_small" in section.title


def test_differences_are_paired_by_image_and_run(pair_of_methods):
    [section] = metrics.compare(pair_of_methods)
    difference = section.differences["fedavg", "fedgs", "in_test", "dice_s"]  # image a: 0.2 - 0.1 and 0.5 - 0.3
    assert difference["mean"] == pytest.approx(0.15) and (difference["images"], difference["runs"]) == (1, 2)
    assert difference["std"] == pytest.approx(0.1 / math.sqrt(2))  # of 0.1 and 0.2
    assert math.isnan(difference["low"]) and math.isnan(difference["p"])  # one image decides nothing
    difference = section.differences["fedavg", "fedgs", "in_test", "dice"]
    # image b: 0.6 - 0.5 and 0.6 - 0.7; c: 1 - 1 and 1 - 0: the images' means are 0.15, 0 and 0.5
    assert difference["mean"] == pytest.approx((0.15 + 0 + 0.5) / 3) and difference["images"] == 3
    difference = section.differences["fedavg", "fedgs", "in_test", "lesion_dice"]
    assert difference["mean"] == pytest.approx((0.15 + 0 + 0.5) / 6)


def test_only_runs_of_the_same_fold_and_seed_are_paired(tmp_path, pair_of_methods):
    runs = [*pair_of_methods[:3], make_run(tmp_path / "g7", cases(0, 0, 0, 0), seed=7)]
    [section] = metrics.compare(runs)
    assert section.differences["fedavg", "fedgs", "in_test", "dice_s"]["runs"] == 1
    assert section.differences["fedavg", "fedgs", "in_test", "dice_s"]["mean"] == pytest.approx(0.1)
    [section] = metrics.compare([runs[0], runs[3]])
    assert section.differences["fedavg", "fedgs", "in_test", "dice"]["images"] == 0
    assert "0 pairs of runs" in metrics.report([section])


def test_folds_count_alike_in_both_tables(tmp_path):
    """A fold with 2 images and one with 12, and seeds of one fold only: the difference is that of the means over runs."""
    runs = []
    for fold, seed, count, gain in ((1, 0, 2, 0.4), (2, 0, 12, -0.08), (2, 1, 12, 0.02)):
        for method in ("fedavg", "fedgs"):
            those = [Case(f"{fold}-{i}", 0.5 + (gain if method == "fedgs" else 0), 200.0, True) for i in range(count)]
            outside = Case("out", 0.5, split="out_test", centre=6)
            runs.append(make_run(tmp_path / f"{method}{fold}{seed}", [*those, outside], method=method, fold=fold, seed=seed))
    [section] = metrics.compare(runs)
    means = [section.summary["in_test", "dice_s", label]["mean"] for label in ("fedavg", "fedgs")]
    difference = section.differences["fedavg", "fedgs", "in_test", "dice_s"]
    assert difference["mean"] == pytest.approx((0.4 - 0.08 + 0.02) / 3) == pytest.approx(means[1] - means[0])
    assert difference["images"] == 14 and section.summary["in_test", "dice_s", "fedgs"]["n"] == (2, 12)
    assert "2 to 12" in metrics.report([section])


def test_slices_of_a_volume_are_one_cluster(tmp_path):
    rng = np.random.default_rng(7)
    gains = {f"volume-{v}_slice-{k}": gain for v in range(12) for gain in [rng.normal()] for k in range(5)}
    slices, volumes = ([0.1 * gains[f"volume-{v}_slice-{k}"] for v in range(12) for k in range(count)] for count in (5, 1))
    runs = [make_run(tmp_path / method, [Case(name, 0.5 + sign * 0.1 * gain) for name, gain in gains.items()], "LiTS", dataset="lits", method=method)
            for method, sign in (("fedavg", 0), ("fedgs", 1))]
    [section] = metrics.compare(runs)
    difference = section.differences["fedavg", "fedgs", "in_test", "dice"]
    assert (difference["images"], difference["clusters"]) == (60, 12) and "60 of 12 volumes" in metrics.report([section])
    expected = clustered([[d] for d in volumes])  # equal slices tell no more than one
    assert {name: difference[name] for name in ("low", "high", "p")} == pytest.approx(expected)
    assert expected["high"] - expected["low"] > 1.5 * np.ptp([clustered([[d] for d in slices])[name] for name in ("low", "high")])


def clustered(differences):
    """metrics.interval of images, each with a list of its differences, one for each run."""
    sums = np.array(differences, dtype=float)
    return metrics.interval(sums, np.ones_like(sums))


def test_interval_and_p_are_scipys():
    """One run: the plain paired bootstrap of the mean and Wilcoxon's test, zeros among the differences."""
    differences = np.random.default_rng(3).normal(0.05, 0.1, 40).round(2)
    found = clustered([[d] for d in differences])
    interval = stats.bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert (found["low"], found["high"]) == pytest.approx(tuple(interval), abs=1e-3)
    assert found["p"] == stats.wilcoxon(differences).pvalue


def test_more_seeds_of_the_same_images_are_no_more_images():
    """Four equal runs of each image: interval and p stay as they are for one."""
    differences = np.random.default_rng(4).normal(0.05, 0.1, 30)
    one, four = (clustered([[d] * runs for d in differences]) for runs in (1, 4))
    assert one == pytest.approx(four)


def simulated(rng, effect, images=60, runs=3):
    """Differences of images that are easy for one method or the other, which their runs share, and noise of each run."""
    of_images = rng.normal(effect, 0.1, (images, 1))
    return (of_images + rng.normal(0, 0.05, (images, runs))).tolist()


def test_intervals_cover_the_truth_in_about_95_of_100_cases():
    rng = np.random.default_rng(5)
    found = [clustered(simulated(rng, 0.0)) for _ in range(200)]
    covering = np.mean([d["low"] <= 0 <= d["high"] for d in found])
    assert 0.91 <= covering <= 0.985  # two and a half standard deviations of 200 cases around 0.95
    assert 0.015 <= np.mean([d["p"] < 0.05 for d in found]) <= 0.09


def test_a_difference_is_found():
    found = clustered(simulated(np.random.default_rng(6), 0.1))
    assert 0.05 < found["low"] < 0.1 < found["high"] < 0.15 and found["p"] < 1e-6


def test_equal_runs():
    assert clustered([[0.0]] * 10) == {"low": 0, "high": 0, "p": 1}
    assert math.isnan(clustered([[0.1]] * 9)["low"])  # too few images for an interval
    assert all(map(math.isnan, metrics.interval(np.zeros((0, 1)), np.zeros((0, 1))).values()))


# -------------------------------------------------------------------------------------------- what is compared


def test_the_control_is_a_group_of_its_own(tmp_path, pair_of_methods):
    control = make_run(tmp_path / "control", cases(0.1, 0.5, 1.0, 0.6), method="fedavg", server_lr=1.12)
    [section] = metrics.compare([*pair_of_methods, control])
    assert list(section.groups) == ["fedavg, server_lr 1.0", "fedavg, server_lr 1.12", "fedgs, server_lr 1.0"]
    assert len({key[:2] for key in section.differences}) == 3


def test_options_that_make_groups_and_those_that_do_not(tmp_path, pair_of_methods):
    other = make_run(tmp_path / "more", cases(0.1, 0.5, 1.0, 0.6), rounds=9, nsd_tolerance=2.0, device="cuda", later_option=3)
    for runs in ([*pair_of_methods, other], [other, *pair_of_methods]):
        [section] = metrics.compare(runs)
        assert set(section.groups) == {"fedavg, rounds 2, later_option None", "fedgs, rounds 2, later_option None",
                                       "fedgs, rounds 9, later_option 3"}
        assert "NSD" not in metrics.report([section]).partition("NSD:")[0]  # at different tolerances it is not comparable


def test_checkpoints_of_unknown_training(tmp_path):
    """What --evaluate writes for published checkpoints: one checkpoint of its own name, method unknown."""
    runs = []
    for name in ("theirs", "ours"):
        runs.append(make_run(tmp_path / name, cases(0.1, 0.5, 1.0, 0.6), method="unknown"))
        for file in ("results.json", "scores.csv"):
            text = (tmp_path / name / file).read_text().replace("best_small", "other")
            (tmp_path / name / file).write_text(text.replace("best", f"{name}_model"))
    [section] = metrics.compare(runs)
    assert set(section.groups) == {"theirs", "ours"} and "theirs_model and ours_model" in section.title


def test_networks_are_sections_of_their_own(tmp_path, pair_of_methods):
    other = make_run(tmp_path / "sd", cases(0.1, 0.5, 1.0, 0.6), model="sd-utnet", device="cuda")
    assert [section.title for section in metrics.compare([*pair_of_methods, other])] == [
        "PolypGen, utnet, checkpoint best", "PolypGen, sd-utnet, checkpoint best"]


def refused(capsys, arguments, *words):
    """Exit code 2, one line on stderr, and these words in it."""
    code = metrics.main(list(map(str, arguments)))
    output = capsys.readouterr()
    assert code == 2 and output.out == "" and output.err.startswith("metrics.py: error: ") and output.err.count("\n") == 1
    for word in words:
        assert word in output.err, output.err


def changed(name, value):
    """The usual images, with another value of one fact of the second."""
    those = cases(0.1, 0.5, 1.0, 0.6)
    setattr(those[1], name, value)
    return those


@pytest.mark.parametrize("other, config, words", [
    (cases(0, 0, 0, 0), {"data": "PolypGen stand-in"}, ["PolypGen stand-in", "compare them apart"]),
    (cases(0, 0, 0, 0), {"image_size": 128}, ["128", "64"]),
    (cases(0, 0, 0, 0)[1:], {}, ["in-test images"]),
    (changed("name", "z"), {}, ["in-test images"]),
    (changed("small", True), {}, ["size flags"]),
    (changed("split", "out_test"), {"fold": 2}, ["out-test images"]),
    (cases(0, 0, 0, 0), {"method": "fedavg"}, ["the same run", "fedavg, fold 1, seed 0"]),
])
def test_runs_that_do_not_belong_together(tmp_path, capsys, pair_of_methods, other, config, words):
    refused(capsys, [*pair_of_methods, make_run(tmp_path / "other", other, **config)], *words)


def test_other_folds_have_other_images(tmp_path):
    runs = [make_run(tmp_path / "f1", cases(0.1, 0.5, 1.0, 0.6)), make_run(tmp_path / "f2", changed("name", "z"), fold=2)]
    [section] = metrics.compare(runs)
    assert len(section.groups["fedgs"]) == 2


def test_folders_without_a_finished_run(tmp_path, capsys, pair_of_methods):
    refused(capsys, [tmp_path], "results.json is missing", "--resume")
    refused(capsys, [*pair_of_methods, "--checkpoint", "last"], "no results of checkpoint last", "best, best_small")
    folder = tmp_path / "g0"
    scores, results = ((folder / name).read_text() for name in ("scores.csv", "results.json"))
    for name, damage in (("scores.csv", "checkpoint,split\nbest,in_test\n"), ("scores.csv", ""), ("results.json", "{"), ("results.json", "[]"),
                         ("scores.csv", scores + scores.splitlines()[1].replace(",a,", ",aa,")), ("scores.csv", scores.replace("0.2", "0.3")),
                         ("scores.csv", scores.replace("0.2", "good")), ("results.json", results.replace('"fold": 1', '"fold": [1]')),
                         ("results.json", results.replace('"image_size"', '"size"')), ("results.json", results.replace('"mean": 0.4', '"mean": null'))):
        assert damage not in (scores, results)
        (folder / name).write_text(damage)
        refused(capsys, pair_of_methods, str(folder), "damaged")
        (folder / name).write_text(scores if name == "scores.csv" else results)
    (folder / "scores.csv").unlink()
    refused(capsys, pair_of_methods, "scores.csv is missing")


def test_what_cannot_be_drawn(tmp_path, capsys, pair_of_methods):
    empty = make_run(tmp_path / "empty", [Case("c", 1.0, math.inf), Case("d", 1.0, math.inf, split="out_test", centre=6)])
    assert metrics.main([empty, "--plot", str(tmp_path / "x.png")]) == 2 and "nothing to draw" in capsys.readouterr().err
    other = make_run(tmp_path / "sd", cases(0.1, 0.5, 1.0, 0.6), model="sd-utnet")
    refused(capsys, [*pair_of_methods, other, "--plot", tmp_path / "x.png"], "one data set and network")
    refused(capsys, [*pair_of_methods, "--plot", tmp_path / "x.bmp"], "x.bmp", ".png, .pdf or .svg")


# ---------------------------------------------------------------------------------------------------- output


def test_tables_and_picture(tmp_path, capsys):
    stand_in = {"data": "PolypGen stand-in"}
    runs = [make_run(tmp_path / "a", cases(0.1, 0.5, 1.0, 0.6), method="fedavg", **stand_in),
            make_run(tmp_path / "g", cases(0.2, 0.6, 1.0, 0.5), **stand_in)]
    assert metrics.main([*runs, "--plot", str(tmp_path / "comparison.png")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PolypGen stand-in, utnet, checkpoint best") and "fedgs - fedavg (1 pair of runs)" in text
    assert "+0.067 " in text and "[" not in text and "NSD" not in text  # three images are too few for an interval
    assert "not other seeds" in text and "not corrected" in text
    with Image.open(tmp_path / "comparison.png") as image:
        assert min(image.size) > 800
    assert metrics.main([*runs, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| in-test | n | fedavg (1 run) | fedgs (1 run) |" in lines and "| Dice_N | 2 | 0.300 | 0.400 |" in lines
    assert metrics.main([*runs, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert all("PolypGen stand-in" in row["section"] for row in rows)
    [row] = [row for row in rows if (row["split"], row["measure"], row["method"], row["against"]) == ("in_test", "dice", "fedgs", "fedavg")]
    assert float(row["mean"]) == pytest.approx(0.2 / 3) and row["n"] == "3"


def test_picture_shows_its_numbers(pair_of_methods):
    [section] = metrics.compare(pair_of_methods)
    figure = metrics.draw(section)
    panels = {axes.get_title().partition(":")[0]: axes for axes in figure.axes}
    assert figure.get_suptitle() == section.title
    ticks = [label.get_text() for label in panels["Dice_L"].get_xticklabels()]
    assert ticks == ["C1\nn = 1", "C6\n(held out)\nn = 1"]
    heights = [bar.get_height() for bar in panels["Dice_L"].patches]
    assert heights == pytest.approx([0.6, 0.6, 0.6, 0.5])  # FedAvg: C1 (0.5 + 0.7) / 2, C6; FedGS: C1, C6
    assert len({round(bar.get_x(), 6) for bar in panels["Dice_L"].patches}) == 4
    assert [bar.get_height() for bar in panels["lesion recall"].patches][0] == pytest.approx((2 * 0.5 + 6 * 0.9) / 8)
    lines = panels["every test image with a lesion, mean of its runs"].lines
    assert any(line.get_label() == "τ = 150" and set(line.get_xdata()) == {150} for line in lines)
    points = panels["every test image with a lesion, mean of its runs"].collections[0].get_offsets()
    assert sorted(map(tuple, points.tolist())) == [(20, pytest.approx(0.6)), (20, pytest.approx(0.6)), (200, pytest.approx(0.2))]
    counts = next(axes for axes in figure.axes if axes.get_ylabel() == "images")
    assert sum(bar.get_height() for bar in counts.patches) == 3


def test_running_mean_by_hand():
    x, y, error = plots.running_mean(np.array([3.0, 1.0, 2.0, 4.0, 5.0]), np.array([0.3, 0.1, 0.2, 0.9, 0.5]), 2, fewest=1)
    # in order 0.1, 0.2, 0.3, 0.9, 0.5: two at the ends, three beside them, all five in the middle
    assert x.tolist() == [1, 2, 3, 4, 5] and y.tolist() == pytest.approx([0.15, 0.2, 0.4, 1.7 / 3, 0.7])
    assert error[1] == pytest.approx(1.96 * 0.1 / math.sqrt(3))  # the standard deviation of 0.1, 0.2, 0.3 is 0.1
