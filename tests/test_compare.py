"""Comparing runs: `python -m tools.compare RUN…` on score files whose truth is known."""

import json
import math
import re
from dataclasses import asdict, dataclass

import numpy as np
import pytest
from conftest import exit_code
from PIL import Image
from scipy import stats
from test_files import flipped

import metrics
from support.errors import UserError
from support.files import to_checked_json, write_text
from support.runs import save_results
from tools import compare

CONFIG = {
    "dataset": "polypgen",
    "method": "fedgs",
    "model": "utnet",
    "fold": 1,
    "seed": 0,
    "tau": 150.0,
    "image_size": 64,
    "rounds": 2,
    "server_lr": 1.0,
    "device": "cpu",
    "workers": "auto",
    "batch_norm": "averaged",
    "out": "",
    "data_root": "",
}


@dataclass
class Case:
    """One test image of a made-up run."""

    name: str
    dice: float
    inverse_area: float = 20.0
    small: bool = False
    split: str = "in_test"
    centre: str = "C1"


def cases(*dice):
    """Four test images: a small lesion, a larger one, an empty image, and one held out."""
    a, b, c, d = dice
    return [
        Case("a", a, 200.0, True),
        Case("b", b),
        Case("c", c, math.inf),
        Case("d", d, split="out_test", centre="C6"),
    ]


def make_run(folder, cases, data="PolypGen", **config):
    """Write the files of a finished run with these test images.

    best_small missed all of them, and with local statistics every Dice is half of it.
    """
    rows = []
    checkpoints = {}
    for checkpoint, right in (("best", 1), ("best_small", 0)):
        checkpoints[checkpoint] = {"round": 2}
        for batch_norm, share in (("averaged", 1), ("local", 0.5)):
            factor = right * share
            for case in cases:
                row = {"checkpoint": checkpoint, "batch_norm": batch_norm, **asdict(case)}
                row["small"] = int(case.small)
                row["dice"] = case.dice * factor
                row["lesion_dice"] = case.dice * factor / 2
                rows.append({**row, "data": data})
            checkpoints[checkpoint][batch_norm] = {
                "in_test": means_of(cases, "in_test", factor),
                "out_test": means_of(cases, "out_test", factor),
            }
    results = {"data": data, "config": {**CONFIG, **config}, "checkpoints": checkpoints}
    tables = {"config.json": "{}\n", "rounds.csv": "round,eta\n1,1.2\n2,1.1\n"}
    checksums = {name: write_text(folder / name, text) for name, text in tables.items()}
    save_results(folder, results, rows, {}, checksums)
    return str(folder)


def save_again(folder, results, scores):
    """Have a run have written these results, and this text of scores.csv."""
    del results["checksum"]
    checksums = results.pop("checksums")
    checksums["scores.csv"] = write_text(folder / "scores.csv", scores)
    write_text(folder / "results.json", to_checked_json(results, checksums))


def means_of(cases, split, factor):
    """The means of a split, by the definitions of the measures."""
    cases = [case for case in cases if case.split == split]
    lesion = [case for case in cases if math.isfinite(case.inverse_area)]
    kinds = {
        "dice_s": [case.dice for case in lesion if case.small],
        "dice_l": [case.dice for case in lesion if not case.small],
        "dice_n": [case.dice for case in lesion],
        "dice": [case.dice for case in cases],
        "lesion_dice": [case.dice / 2 for case in cases],
    }
    found = {measure: {"mean": None, "n": 0} for measure in metrics.MEASURES}
    for measure, values in kinds.items():
        if values:
            found[measure] = {"mean": float(np.mean(values)) * factor, "n": len(values)}
    if split == "in_test":
        found["recall_0_50"] = {"mean": 0.5, "n": 2}
    else:
        found["recall_0_50"] = {"mean": 0.9, "n": 6}
    return found


@pytest.fixture
def two_methods(tmp_path):
    """Two runs each of FedAvg and FedGS."""
    return [
        make_run(tmp_path / "a0", cases(0.1, 0.5, 1.0, 0.6), method="fedavg"),
        make_run(tmp_path / "a1", cases(0.3, 0.7, 0.0, 0.6), method="fedavg", seed=1),
        make_run(tmp_path / "g0", cases(0.2, 0.6, 1.0, 0.5)),
        make_run(tmp_path / "g1", cases(0.5, 0.6, 1.0, 0.5), seed=1),
    ]


# ------------------------------------------------------------------------------------- comparison


def test_means_over_runs(two_methods):
    (section,) = compare.compare(two_methods)
    sizes = {label: len(group) for label, group in section.groups.items()}
    assert sizes == {"fedavg": 2, "fedgs": 2}

    # Means 0.3 and 0.5 of the two images with a lesion.
    found = section.summaries["in_test", "dice_n", "fedavg"]
    assert found.runs == 2
    assert found.mean == pytest.approx(0.4)
    assert found.std == pytest.approx(math.sqrt(2 * 0.1**2))
    assert (found.fewest, found.most) == (2, 2)

    # Means 1.8 / 3 and 2.1 / 3 of all images.
    found = section.summaries["in_test", "dice", "fedgs"]
    assert found.mean == pytest.approx(0.65)
    assert (found.fewest, found.most) == (3, 3)

    # Nothing is small in the held-out centre.
    found = section.summaries["out_test", "dice_s", "fedgs"]
    assert found.runs == 0
    assert math.isnan(found.mean)


def test_another_checkpoint(two_methods):
    (section,) = compare.compare(two_methods, "best_small")
    assert section.summaries["in_test", "dice", "fedgs"].mean == 0
    assert section.title == (
        "PolypGen, utnet, checkpoint best_small, averaged batch-norm statistics"
    )


def test_statistics_of_batch_norm(tmp_path, capsys, two_methods):
    """Those that runs were validated with, or those that are asked for."""
    (section,) = compare.compare(two_methods, batch_norm="local")
    assert section.title == "PolypGen, utnet, checkpoint best, local batch-norm statistics"
    assert section.summaries["in_test", "dice_s", "fedgs"].mean == pytest.approx(0.35 / 2)
    found = section.differences["fedavg", "fedgs", "in_test", "dice_s"]
    assert found.mean == pytest.approx(0.15 / 2)

    own = [make_run(tmp_path / "own", cases(0.2, 0.6, 1.0, 0.5), batch_norm="local")]
    assert compare.compare(own)[0].summaries["in_test", "dice_s", "fedgs"].mean == 0.1
    (section,) = compare.compare(own, batch_norm="averaged")
    assert section.summaries["in_test", "dice_s", "fedgs"].mean == 0.2

    (section,) = compare.compare([*own, *two_methods])
    assert section.title.endswith("local and averaged batch-norm statistics")
    assert "fedgs, batch_norm local" in section.groups

    assert exit_code(compare.main, [*two_methods, "--batch-norm", "local"]) == 0
    assert "0.175" in capsys.readouterr().out
    refuses(capsys, [*two_methods, "--batch-norm", "global"], "--batch-norm", "global")


def test_a_run_without_an_image_of_a_kind_counts_for_the_others_only(tmp_path, two_methods):
    images = cases(0.4, 0.6, 1.0, 0.5)
    images[0].small = False
    other = make_run(tmp_path / "f2", images, fold=2)
    (section,) = compare.compare([*two_methods[2:], other])
    found = section.summaries["in_test", "dice_s", "fedgs"]
    assert found.runs == 2
    assert found.mean == pytest.approx((0.2 + 0.5) / 2)


def test_the_control_is_a_group_of_its_own(tmp_path, two_methods):
    control = make_run(
        tmp_path / "control", cases(0.1, 0.5, 1.0, 0.6), method="fedavg", server_lr=1.12
    )
    (section,) = compare.compare([*two_methods, control])
    assert list(section.groups) == [
        "fedavg, server_lr 1.0",
        "fedavg, server_lr 1.12",
        "fedgs, server_lr 1.0",
    ]
    assert len({(first, second) for first, second, _, _ in section.differences}) == 3


def test_options_that_make_groups_and_those_that_do_not(tmp_path, two_methods):
    images = cases(0.1, 0.5, 1.0, 0.6)
    free = {"device": "cuda", "workers": "2", "out": "elsewhere", "data_root": "here"}
    other = make_run(tmp_path / "more", images, rounds=9, later_option=3, **free)
    for runs in ([*two_methods, other], [other, *two_methods]):
        (section,) = compare.compare(runs)
        assert set(section.groups) == {
            "fedavg, rounds 2, later_option None",
            "fedgs, rounds 2, later_option None",
            "fedgs, rounds 9, later_option 3",
        }


def test_checkpoints_of_unknown_training(tmp_path):
    """What an evaluation of published checkpoints writes: one checkpoint, method unknown."""
    runs = []
    for name in ("theirs", "ours"):
        folder = tmp_path / name
        runs.append(make_run(folder, cases(0.1, 0.5, 1.0, 0.6), method="unknown"))
        results = json.loads((folder / "results.json").read_text())
        results["checkpoints"] = {f"{name}_model": results["checkpoints"]["best"]}
        scores = (folder / "scores.csv").read_text().replace("best,", f"{name}_model,")
        save_again(folder, results, scores)
    (section,) = compare.compare(runs)
    assert set(section.groups) == {"theirs", "ours"}
    assert "checkpoint theirs_model and ours_model, averaged" in section.title


def test_networks_are_sections_of_their_own(tmp_path, two_methods):
    other = make_run(tmp_path / "sd", cases(0.1, 0.5, 1.0, 0.6), model="sd-utnet")
    assert [section.title for section in compare.compare([*two_methods, other])] == [
        "PolypGen, utnet, checkpoint best, averaged batch-norm statistics",
        "PolypGen, sd-utnet, checkpoint best, averaged batch-norm statistics",
    ]


def test_differences_are_those_of_fedgs_from_the_others(tmp_path, two_methods):
    images = cases(0.1, 0.5, 1.0, 0.6)
    others = [
        make_run(tmp_path / "unscaled", images, scaling="off", label="unscaled"),
        make_run(tmp_path / "prox", images, method="fedprox"),
    ]
    (section,) = compare.compare([*two_methods, *others])
    assert list(section.groups) == ["fedavg", "fedprox", "unscaled", "fedgs"]
    assert ("unscaled", "fedgs", "in_test", "dice") in section.differences

    # Without a label, too.
    off = make_run(tmp_path / "off", images, scaling="off")
    on = make_run(tmp_path / "on", images, scaling="auto")
    (section,) = compare.compare([on, off])
    assert list(section.groups) == ["fedgs, scaling off", "fedgs, scaling auto"]


# ----------------------------------------------------------------------------- paired statistics


def test_differences_are_paired_by_image_and_run(two_methods):
    (section,) = compare.compare(two_methods)

    # Image a: 0.2 - 0.1 and 0.5 - 0.3.
    found = section.differences["fedavg", "fedgs", "in_test", "dice_s"]
    assert found.of_pairs == pytest.approx((0.1, 0.2))
    assert (found.images, found.clusters) == (1, 1)
    assert found.mean == pytest.approx(0.15)
    assert found.std == pytest.approx(0.1 / math.sqrt(2))
    assert all(map(math.isnan, found.over_images))  # one image decides nothing
    assert all(map(math.isnan, found.with_seeds))

    # Image b: 0.6 - 0.5 and 0.6 - 0.7; c: 1 - 1 and 1 - 0: the images' means are 0.15, 0 and 0.5.
    found = section.differences["fedavg", "fedgs", "in_test", "dice"]
    assert found.mean == pytest.approx((0.15 + 0 + 0.5) / 3)
    assert found.images == 3
    found = section.differences["fedavg", "fedgs", "in_test", "dice_l"]
    assert found.mean == pytest.approx(0, abs=1e-12)
    assert found.images == 1
    found = section.differences["fedavg", "fedgs", "in_test", "dice_n"]
    assert found.mean == pytest.approx(0.15 / 2)
    assert found.images == 2
    found = section.differences["fedavg", "fedgs", "in_test", "lesion_dice"]
    assert found.mean == pytest.approx((0.15 + 0 + 0.5) / 6)
    found = section.differences["fedavg", "fedgs", "out_test", "dice"]
    assert found.mean == pytest.approx(0.5 - 0.6)
    assert found.images == 1


def test_only_runs_of_the_same_fold_and_seed_are_paired(tmp_path, two_methods):
    other_seed = make_run(tmp_path / "g7", cases(0, 0, 0, 0), seed=7)
    (section,) = compare.compare([*two_methods[:3], other_seed])
    found = section.differences["fedavg", "fedgs", "in_test", "dice_s"]
    assert found.of_pairs == pytest.approx((0.1,))

    (section,) = compare.compare([two_methods[0], other_seed])
    found = section.differences["fedavg", "fedgs", "in_test", "dice"]
    assert (found.of_pairs, found.images) == ((), 0)
    assert math.isnan(found.mean)
    text = compare.report([section])
    assert "fedgs - fedavg: 0 pairs of runs of the same fold and seed. No conclusion" in text
    assert "over images and seeds   " not in text


def test_folds_count_alike_in_both_tables(tmp_path):
    """The difference is that of the means over runs, whatever the numbers of images in folds."""
    runs = []
    for fold, seed, count, gain in ((1, 0, 2, 0.4), (2, 0, 12, -0.08), (2, 1, 12, 0.02)):
        for method in ("fedavg", "fedgs"):
            dice = 0.5 + (gain if method == "fedgs" else 0)
            images = [Case(f"{fold}-{i}", dice, 200.0, True) for i in range(count)]
            images.append(Case("out", 0.5, split="out_test", centre="C6"))
            folder = tmp_path / f"{method}{fold}{seed}"
            runs.append(make_run(folder, images, method=method, fold=fold, seed=seed))
    (section,) = compare.compare(runs)

    found = section.differences["fedavg", "fedgs", "in_test", "dice_s"]
    fedavg = section.summaries["in_test", "dice_s", "fedavg"]
    fedgs = section.summaries["in_test", "dice_s", "fedgs"]
    assert found.mean == pytest.approx((0.4 - 0.08 + 0.02) / 3)
    assert found.mean == pytest.approx(fedgs.mean - fedavg.mean)
    assert found.std == pytest.approx(np.std([0.4, -0.08, 0.02], ddof=1))
    assert found.of_pairs == pytest.approx((0.4, -0.08, 0.02))
    assert found.images == 14
    assert (fedgs.fewest, fedgs.most) == (2, 12)
    assert "2 to 12" in compare.report([section])


@pytest.mark.slow
def test_a_pair_without_an_image_of_a_kind_has_nothing_to_say(tmp_path):
    runs = []
    for fold, small in ((1, True), (2, False), (3, True)):
        for method, gain in (("fedavg", 0), ("fedgs", 0.1 * fold)):
            images = [Case(f"{fold}-{i}", 0.5 + gain, 200.0, small) for i in range(12)]
            folder = tmp_path / f"{method}{fold}"
            runs.append(make_run(folder, images, method=method, fold=fold))
    (section,) = compare.compare(runs)
    found = section.differences["fedavg", "fedgs", "in_test", "dice_s"]
    assert found.of_pairs == pytest.approx((0.1, 0.3))
    assert found.images == 24
    assert found.over_images.low == pytest.approx(0.2, abs=0.06)
    assert math.isnan(found.with_seeds.low)  # two pairs are too few
    lines = compare.report([section]).splitlines()
    (row,) = [line.split() for line in lines if line.startswith("Dice_S, in-test")]
    assert row[-3:] == ["–", "24", "2"]


def test_slices_of_a_volume_are_one_cluster(tmp_path):
    rng = np.random.default_rng(7)
    gains = {}
    for volume in range(12):
        gain = 0.1 * rng.normal()
        for k in range(5):
            gains[f"volume-{volume}_slice-{k}"] = gain
    fedavg = [Case(name, 0.5) for name in gains]
    fedgs = [Case(name, 0.5 + gain) for name, gain in gains.items()]
    runs = [
        make_run(tmp_path / "fedavg", fedavg, "LiTS", dataset="lits", method="fedavg"),
        make_run(tmp_path / "fedgs", fedgs, "LiTS", dataset="lits", method="fedgs"),
    ]
    (section,) = compare.compare(runs)
    found = section.differences["fedavg", "fedgs", "in_test", "dice"]
    assert (found.images, found.clusters) == (60, 12)
    assert "60 of 12 volumes" in compare.report([section])

    # Equal slices of a volume tell no more than one of them.
    slices = list(gains.values())
    expected = interval_of([[gain] for gain in slices[::5]])
    assert found.over_images == pytest.approx(expected)
    too_sure = interval_of([[gain] for gain in slices])
    assert width(expected) > 1.5 * width(too_sure)


def test_seeds_that_nobody_tried_make_us_no_surer(tmp_path):
    """Three folds that happen to have the same mean difference: their spread is 0 by chance."""
    gains = np.linspace(-0.2, 0.4, 13)
    runs = []
    for fold in (1, 2, 3):
        for method, share in (("fedavg", 0), ("fedgs", 1)):
            images = [Case(f"{fold}-{gain}", 0.5 + share * gain) for gain in gains]
            images += [Case("out", 0.5, split="out_test", centre="C6")]
            folder = tmp_path / f"{method}{fold}"
            runs.append(make_run(folder, images, method=method, fold=fold))
    (section,) = compare.compare(runs)
    found = section.differences["fedavg", "fedgs", "in_test", "dice"]
    assert found.std == pytest.approx(0)
    assert found.over_images.low < 0.1 - 0.04 < 0.1 + 0.04 < found.over_images.high
    assert found.with_seeds == found.over_images


def interval_of(differences, function=compare.interval):
    """An interval of images, each with a list of its differences, one for each run."""
    sums = np.array(differences, dtype=float)
    return function(sums, np.ones_like(sums))


def width(interval):
    return interval.high - interval.low


def test_the_interval_over_images_is_scipys():
    """One run: the plain paired bootstrap of the mean."""
    differences = np.random.default_rng(3).normal(0.05, 0.1, 40).round(2)
    found = interval_of([[d] for d in differences])
    bootstrap = stats.bootstrap(
        (differences,), np.mean, method="percentile", rng=np.random.default_rng(0)
    )
    assert found == pytest.approx(tuple(bootstrap.confidence_interval), abs=1e-3)


def test_more_seeds_of_the_same_images_are_no_more_images():
    """Four equal runs of each image: the interval stays as it is for one."""
    differences = np.random.default_rng(4).normal(0.05, 0.1, 30)
    one = interval_of([[d] for d in differences])
    four = interval_of([[d] * 4 for d in differences])
    assert one == pytest.approx(four)


@pytest.mark.parametrize("function", [compare.interval, compare.interval_with_seeds])
def test_a_cluster_of_many_images_weighs_more_in_an_interval(function):
    """The mean of a pair is that over its images, not over its clusters."""
    sums = np.array([[1.0] * 3] * 10 + [[0.0] * 3] * 10)
    counts = np.array([[1.0] * 3] * 10 + [[9.0] * 3] * 10)
    found = function(sums, counts)
    assert found.low < 0.1 < found.high < 0.3  # 10 / 100, where clusters alone would give 0.5
    assert found.low > -0.1


def test_a_sample_may_hold_none_of_a_pairs_images():
    """A fold with ten images and one with two, all of which differ by 1: so do all samples."""
    counts = np.zeros((12, 2))
    counts[:10, 0] = counts[10:, 1] = 1
    found = compare.interval(counts, counts)
    assert (found.low, found.high) == (1, 1)


# ------------------------------------------------------------------------------- images and seeds


def test_the_interval_with_seeds_by_its_parts():
    """Student's t of the pairs' means, and of the covariance that two pairs have on average."""
    differences = simulated(np.random.default_rng(10), images=20, pairs=4, seeds=0.05)
    found = interval_of(differences, compare.interval_with_seeds)

    mean = differences.mean()
    own = stats.sem(differences.mean(axis=0))
    covariance = np.cov(differences, rowvar=False)[~np.eye(4, dtype=bool)].mean() / 20
    half = math.hypot(stats.t.ppf(0.975, 3) * own, stats.t.ppf(0.975, 19) * math.sqrt(covariance))
    assert found == pytest.approx((mean - half, mean + half))


def test_folds_without_a_common_image_are_plain_students_t():
    """Each fold counts once, however many images it has."""
    rng = np.random.default_rng(11)
    sizes = (3, 12, 30)
    sums = np.zeros((sum(sizes), 3))
    counts = np.zeros_like(sums)
    means = []
    start = 0
    for fold, size in enumerate(sizes):
        differences = rng.normal(0.1 * fold, 0.3, size)
        sums[start : start + size, fold] = differences
        counts[start : start + size, fold] = 1
        means.append(differences.mean())
        start += size

    found = compare.interval_with_seeds(sums, counts)
    assert found == pytest.approx(stats.t.interval(0.95, 2, np.mean(means), stats.sem(means)))


def test_slices_of_a_volume_do_not_narrow_the_interval_with_seeds():
    differences = simulated(np.random.default_rng(12), images=20, pairs=3)
    one = compare.interval_with_seeds(differences, np.ones_like(differences))
    many = compare.interval_with_seeds(7 * differences, np.full_like(differences, 7))
    assert one == pytest.approx(many)


def test_images_that_differ_by_chance_are_not_counted_as_alike():
    """A negative covariance of two pairs would narrow the interval."""
    image = np.linspace(-0.3, 0.3, 12)
    differences = np.column_stack([0.1 + image, 0.2 - image, 0.3 + 0 * image])
    found = interval_of(differences, compare.interval_with_seeds)
    assert found == pytest.approx(stats.t.interval(0.95, 2, 0.2, stats.sem([0.1, 0.2, 0.3])))


def simulated(rng, images, pairs, effect=0.0, seeds=0.1, common=0.21, chance=0.21):
    """Differences (images, pairs) whose true mean is `effect`.

    Standard deviations: of what a pair's seed adds to all of its images, of how much easier an
    image is for one method in all pairs, and of what happens to an image in one pair by chance.
    """
    of_pairs = rng.normal(effect, seeds, (1, pairs))
    of_images = rng.normal(0, common, (images, 1))
    return of_pairs + of_images + rng.normal(0, chance, (images, pairs))


def coverage(cases, function=compare.interval_with_seeds):
    """The share of cases whose interval covers 0."""
    covering = 0
    for case in cases:
        low, high = interval_of(case, function)
        covering += low <= 0 <= high
    return covering / len(cases)


@pytest.mark.parametrize("pairs", [3, 4, 5, 10])
def test_intervals_with_seeds_cover_the_truth(pairs):
    """Seeds matter as they do in our own runs: 2,000 comparisons of equal methods."""
    rng = np.random.default_rng(pairs)
    cases = [simulated(rng, rng.integers(50, 151), pairs) for _ in range(2000)]
    assert 0.93 <= coverage(cases) <= 0.97


def test_they_cover_it_where_only_images_matter():
    """What all pairs have in common does not show in their spread."""
    rng = np.random.default_rng(13)
    cases = [simulated(rng, 50, 3, seeds=0.01, common=0.3, chance=0.05) for _ in range(500)]
    assert 0.92 <= coverage(cases) <= 0.99


def test_intervals_over_images_cover_the_truth_only_where_seeds_do_not_matter(monkeypatch):
    monkeypatch.setattr(compare, "SAMPLES", 999)
    rng = np.random.default_rng(5)
    without = [simulated(rng, 40, 3, seeds=0) for _ in range(200)]
    assert 0.91 <= coverage(without, compare.interval) <= 0.985  # 2.5 standard deviations of 0.95
    as_ours = [simulated(rng, 80, 3) for _ in range(100)]
    assert coverage(as_ours, compare.interval) < 0.75


def test_a_difference_is_found():
    differences = simulated(np.random.default_rng(6), 60, 5, effect=0.1, seeds=0.01, common=0.1)
    for function in (compare.interval, compare.interval_with_seeds):
        found = interval_of(differences, function)
        assert 0.03 < found.low < 0.1 < found.high < 0.17


def test_equal_runs():
    assert interval_of([[0.0]] * 10) == (0, 0)
    assert interval_of([[0.0] * 3] * 10, compare.interval_with_seeds) == (0, 0)


@pytest.mark.parametrize("images, pairs", [(9, 3), (10, 2), (0, 3), (10, 0)])
def test_too_few_images_or_pairs_for_an_interval_with_seeds(images, pairs):
    nothing = np.zeros((images, pairs))
    assert all(map(math.isnan, compare.interval_with_seeds(nothing, nothing + 1)))


def test_too_few_images_for_an_interval():
    assert all(map(math.isnan, interval_of([[0.1]] * 9)))
    assert all(map(math.isnan, compare.interval(np.zeros((0, 1)), np.zeros((0, 1)))))


# ------------------------------------------------------------------------------------ reading runs


def refuses(capsys, arguments, *words):
    """Exit code 2, one line on stderr, and these words in it; nothing on stdout."""
    code = exit_code(compare.main, arguments)
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith("compare: error: ")
    assert output.err.count("\n") == 1
    for word in words:
        assert word in output.err, output.err


def changed(name, value):
    """The usual images, with another value of one fact of the second."""
    images = cases(0.1, 0.5, 1.0, 0.6)
    setattr(images[1], name, value)
    return images


@pytest.mark.parametrize(
    "other, config, words",
    [
        (cases(0, 0, 0, 0), {"data": "PolypGen stand-in"}, ["PolypGen stand-in", "them apart"]),
        (cases(0, 0, 0, 0), {"image_size": 128}, ["128", "64"]),
        (cases(0, 0, 0, 0)[1:], {}, ["in-test images"]),
        (changed("name", "z"), {}, ["in-test images"]),
        (changed("centre", "C2"), {}, ["in-test images"]),
        (changed("inverse_area", 21.0), {}, ["in-test images"]),
        (changed("small", True), {}, ["size flags"]),
        (changed("split", "out_test"), {"fold": 2}, ["out-test images"]),
        (cases(0, 0, 0, 0), {"method": "fedavg"}, ["the same run", "fedavg, fold 1, seed 0"]),
    ],
)
def test_runs_that_do_not_belong_together(tmp_path, capsys, two_methods, other, config, words):
    refuses(capsys, [*two_methods, make_run(tmp_path / "other", other, **config)], *words)


def test_other_folds_have_other_images(tmp_path):
    one = make_run(tmp_path / "f1", cases(0.1, 0.5, 1.0, 0.6))
    other = make_run(tmp_path / "f2", changed("name", "z"), fold=2)
    third = make_run(tmp_path / "f2s1", changed("name", "z"), fold=2, seed=1)
    (section,) = compare.compare([one, other, third])
    assert len(section.groups["fedgs"]) == 3


def test_folders_without_a_finished_run(tmp_path, capsys, two_methods):
    refuses(capsys, [tmp_path], "results.json is missing", "--resume")
    refuses(capsys, [tmp_path / "nowhere"], "nowhere holds no finished run")
    (tmp_path / "g0" / "scores.csv").unlink()
    refuses(capsys, two_methods, "g0", "scores.csv is missing")


def test_a_checkpoint_that_is_not_there(capsys, two_methods):
    words = ("no results of checkpoint last", "best, best_small")
    refuses(capsys, [*two_methods, "--checkpoint", "last"], *words)


@pytest.mark.parametrize("name", ["results.json", "scores.csv", "rounds.csv", "config.json"])
def test_every_flipped_bit_is_noticed(tmp_path, capsys, name):
    folder = tmp_path / "run"
    make_run(folder, cases(0.1, 0.5, 1.0, 0.6))
    content = (folder / name).read_bytes()
    for damaged in flipped(content, places=(0, 1, -69, -68, -5, -4, -3, -2, -1)):
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name} is not what was written there"):
            compare.read_run(folder)
    refuses(capsys, [folder], f"{folder / name} is not what", "damaged or edited", "--resume")


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("results.json", lambda content: b""),
        ("results.json", lambda content: b"[]"),
        ("results.json", lambda content: content[:1000]),
        ("results.json", lambda content: content.replace(b'"seed": 0', b'"seed": 1')),
        ("results.json", lambda content: json.dumps(json.loads(content)).encode()),
        ("scores.csv", lambda content: b""),
        ("scores.csv", lambda content: content[:100]),
        ("scores.csv", lambda content: content + content.splitlines(keepends=True)[-1]),
        ("scores.csv", lambda content: content.replace(b"0.2", b"0.9")),
        ("scores.csv", lambda content: "\ufeff".encode() + content),  # a spreadsheet's
    ],
)
def test_files_that_someone_has_changed(tmp_path, capsys, two_methods, name, edit):
    path = tmp_path / "g0" / name
    content = path.read_bytes()
    assert edit(content) != content
    path.write_bytes(edit(content))
    refuses(capsys, two_methods, f"{path} is not what was written there")


def test_an_edit_can_be_kept(tmp_path, two_methods):
    """Without checksums, as results of earlier versions are."""
    results = json.loads((tmp_path / "g0" / "results.json").read_text())
    del results["checksum"], results["checksums"]
    results["config"]["label"] = "mine"
    (tmp_path / "g0" / "results.json").write_text(json.dumps(results))
    (section,) = compare.compare(two_methods)
    assert "mine" in section.groups


def test_a_run_whose_other_tables_are_not_here_can_be_compared(tmp_path, two_methods):
    expected = compare.report(compare.compare(two_methods))
    for name in ("rounds.csv", "config.json"):
        (tmp_path / "g0" / name).unlink()
    assert compare.report(compare.compare(two_methods)) == expected


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("results.json", '"fold": 1', '"fold": [1]'),
        ("results.json", '"image_size"', '"size"'),
        ("results.json", '"mean": 0.4', '"mean": null'),
        ("results.json", '"recall_0_50"', '"recall_of_all"'),
        ("results.json", '"best_small"', '"last"'),
        ("results.json", '"checkpoints"', '"networks"'),
        ("results.json", '"config"', '"options"'),
        ("scores.csv", None, ""),
        ("scores.csv", None, "checkpoint,split\nbest,in_test\n"),
        ("scores.csv", None, "\x00\x01"),
        ("scores.csv", "0.2", "good"),
        ("scores.csv", "lesion_dice", "another"),
    ],
)
def test_files_of_another_version(tmp_path, capsys, two_methods, name, old, new):
    """Whole and unchanged, but not of this content."""
    folder = tmp_path / "g0"
    texts = {file: (folder / file).read_text() for file in ("results.json", "scores.csv")}
    other = new if old is None else texts[name].replace(old, new)
    assert other != texts[name]
    texts[name] = other
    save_again(folder, json.loads(texts["results.json"]), texts["scores.csv"])
    refuses(capsys, two_methods, str(folder))


# ----------------------------------------------------------------------------------------- tables


def test_tables(capsys, tmp_path):
    runs = [
        make_run(tmp_path / "a", cases(0.1, 0.5, 1.0, 0.6), "PolypGen stand-in", method="fedavg"),
        make_run(tmp_path / "g", cases(0.2, 0.6, 1.0, 0.5), "PolypGen stand-in"),
    ]
    assert exit_code(compare.main, runs) == 0
    text = capsys.readouterr().out
    heading = "PolypGen stand-in, utnet, checkpoint best, averaged batch-norm statistics: "
    assert text.startswith(heading)
    alone = "fedgs - fedavg: 1 pair of runs of the same fold and seed. No conclusion"
    assert alone in text
    assert "+0.067 " in text
    assert "[" not in text  # three images are too few for an interval
    assert "One interval in twenty misses the truth" in text
    assert "FP rate" not in text  # nothing was counted for it
    assert "recall, 1/a < 50   2" in text

    assert exit_code(compare.main, [*runs, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| in-test | n | fedavg (1 run) | fedgs (1 run) |" in lines
    assert "| Dice_N | 2 | 0.300 | 0.400 |" in lines
    assert (
        "| 95 % intervals | difference | over images | over images and seeds | images "
        "| pairs of runs |"
    ) in lines
    assert "| Dice_S, in-test | +0.100 | – | – | 1 | 1 |" in lines
    assert not any(line.startswith("| Dice_S, out-test") for line in lines)  # none is small


def random_runs(folder, seeds):
    """Two methods on twelve images."""
    rng = np.random.default_rng(8)
    runs = []
    for seed in seeds:
        for method in ("fedavg", "fedgs"):
            images = [Case(str(i), rng.uniform()) for i in range(12)]
            runs.append(make_run(folder / f"{method}{seed}", images, method=method, seed=seed))
    return runs


def test_spread_and_intervals_in_tables(tmp_path):
    (section,) = compare.compare(random_runs(tmp_path, (0, 1, 2)))
    found = section.differences["fedavg", "fedgs", "in_test", "dice"]
    text = compare.report([section])
    row = ["Dice, in-test", f"{found.mean:+.3f} ± {found.std:.3f}"]
    for low, high in (found.over_images, found.with_seeds):
        assert low < found.mean < high
        row.append(f"[{low:+.3f}, {high:+.3f}]")
    assert found.with_seeds != found.over_images
    cells = [re.split("  +", line) for line in text.splitlines()]
    assert [*row, "12", "3"] in cells
    assert "fedgs - fedavg: 3 pairs of runs of the same fold and seed\n" in text
    assert "No conclusion" not in text

    fedgs = section.summaries["in_test", "dice", "fedgs"]
    assert f"{fedgs.mean:.3f} ± {fedgs.std:.3f}" in text


def test_two_pairs_of_runs_are_no_comparison_of_methods(tmp_path):
    (section,) = compare.compare(random_runs(tmp_path, (0, 1)))
    found = section.differences["fedavg", "fedgs", "in_test", "dice"]
    assert not math.isnan(found.over_images.low)
    assert all(map(math.isnan, found.with_seeds))
    text = compare.report([section])
    assert "2 pairs of runs of the same fold and seed. No conclusion about methods is" in text


def test_a_row_for_what_only_one_method_was_tested_on(tmp_path):
    other_fold = cases(0.5, 0.6, 1.0, 0.5)
    other_fold[0].small = False
    runs = [
        make_run(tmp_path / "a", cases(0.1, 0.5, 1.0, 0.6), method="fedavg"),
        make_run(tmp_path / "g", other_fold, fold=2),
    ]
    text = compare.report(compare.compare(runs))
    (row,) = [line.split() for line in text.splitlines() if line.startswith("Dice_S   ")][:1]
    assert row == ["Dice_S", "0", "to", "1", "0.100", "–"]


# ---------------------------------------------------------------------------------------- picture


def test_the_picture_shows_the_differences_of_the_runs(tmp_path):
    def images(dice, *others):
        return [*cases(*others), Case("e", dice, 5.0, centre="C2")]

    runs = [
        make_run(tmp_path / "a0", images(0.2, 0.1, 0.5, 1.0, 0.6), method="fedavg"),
        make_run(tmp_path / "a1", images(0.4, 0.3, 0.7, 0.0, 0.6), method="fedavg", seed=1),
        make_run(tmp_path / "g0", images(0.9, 0.2, 0.6, 1.0, 0.5)),
        make_run(tmp_path / "g1", images(0.5, 0.3, 0.6, 1.0, 0.4), seed=1),
        make_run(tmp_path / "p1", images(0.5, 0.3, 0.6, 1.0, 0.4), method="fedprox", seed=1),
        make_run(tmp_path / "c2", images(0.5, 0.3, 0.6, 1.0, 0.4), label="control", seed=2),
    ]
    (section,) = compare.compare(runs)
    figure = compare.draw(section)
    assert figure.get_suptitle() == section.title

    # The control has no run of the same seed, FedProx has one.
    assert len(figure.axes) == 4
    first, _, second, _ = [axes.get_title(loc="left") for axes in figure.axes]
    few = "too few for a conclusion"
    assert first.startswith(f"fedgs − fedavg, 2 pairs of runs: {few}\nby size")
    assert second.startswith(f"fedgs − fedprox, 1 pair of runs: {few}\nby size")

    # Images of 1/a = 5, 20 (in-test and held out, 0.1 and -0.1; -0.1 and -0.2), 200, and none.
    sizes, centres, *_ = figure.axes
    ticks = [label.get_text() for label in sizes.get_xticklabels()]
    assert ticks == ["1/a < 10", "10–50", "50–150", "150–1000", "≥ 1000", "no lesion"]
    assert [text.get_text() for text in sizes.texts] == ["1", "2", "0", "1", "0", "1"]
    expected = [[0.7, 0.1], [0, -0.15], [], [0.1, 0], [], [0, 1]]
    for points, values in zip(drawn_pairs(sizes), expected, strict=True):
        assert points == pytest.approx(values, abs=1e-12)

    # Dice_S and Dice_L in each centre.
    ticks = [label.get_text() for label in centres.get_xticklabels()]
    assert ticks == ["C1", "C2", "C6\n(held out)"]
    assert [text.get_text() for text in centres.texts] == ["1", "1", "0", "1", "0", "1"]
    expected = [[0.1, 0], [0.1, -0.1], [], [0.7, 0.1], [], [-0.1, -0.2]]
    for points, values in zip(drawn_pairs(centres), expected, strict=True):
        assert points == pytest.approx(values, abs=1e-12)


def drawn_pairs(axes):
    """The mean differences of pairs of runs, in each place of a panel."""
    return [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "o"]


def test_every_image_is_in_one_range_of_sizes(tmp_path):
    """The ends of the ranges, too."""
    areas = (1, 9.9, 10, 49, 50, 150, 999, 1000, 1e6, math.inf)
    images = [Case(str(area), 0.5, area) for area in areas]
    group = compare.compare([make_run(tmp_path / "a", images)])[0].groups["fedgs"]
    sizes = {image: score.inverse_area for image, score in group[0].scores.items()}
    found = compare.by_size(group, group, sizes)
    counts = {name: measures["Dice"].images for name, measures in found.items()}
    assert counts == {
        "1/a < 10": 2,
        "10–50": 2,
        "50–150": 1,
        "150–1000": 2,
        "≥ 1000": 2,
        "no lesion": 1,
    }


@pytest.mark.slow
def test_a_picture_of_a_comparison(tmp_path, capsys, two_methods):
    path = tmp_path / "comparison.png"
    assert exit_code(compare.main, [*two_methods, "--plot", path]) == 0
    assert "Dice_S" in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.size > (1200, 500)


def test_what_cannot_be_drawn(tmp_path, capsys, two_methods):
    path = tmp_path / "x.png"
    for runs in (two_methods[:2], [two_methods[0], two_methods[3]]):
        assert exit_code(compare.main, [*runs, "--plot", path]) == 2
        assert "a picture shows differences, and there are no" in capsys.readouterr().err

    other = make_run(tmp_path / "sd", cases(0.1, 0.5, 1.0, 0.6), model="sd-utnet")
    refuses(capsys, [*two_methods, other, "--plot", path], "one data set and network")
    refuses(capsys, [*two_methods, "--plot", tmp_path / "x.bmp"], "x.bmp", ".png, .pdf or .svg")
    assert not path.exists()


# --------------------------------------------------------------------------------------- labels


def test_a_label_makes_one_group_of_runs_that_differ(two_methods, tmp_path):
    """The control's server learning rate is another one for every seed."""
    for seed, rate in ((0, 1.121), (1, 1.118)):
        made = {"method": "fedavg", "seed": seed, "server_lr": rate, "label": "control"}
        two_methods.append(make_run(tmp_path / f"c{seed}", cases(0.1, 0.2, 0.3, 0.4), **made))
    [section] = compare.compare(two_methods)
    assert {label: len(group) for label, group in section.groups.items()} == {
        "control": 2,
        "fedavg": 2,
        "fedgs": 2,
    }


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *[("dice", x) for x in ("nan", "-0.1", "1.1", "inf")],
        ("lesion_dice", "2"),
        *[("inverse_area", x) for x in ("nan", "0.9", "-1")],
        *[("small", x) for x in ("", "2", "True")],
    ],
)
def test_scores_that_cannot_be(column, value):
    row = {"name": "a", "inverse_area": "1", "small": "0", "dice": "1", "lesion_dice": "0"}
    assert compare.as_score(row) == compare.Score(1, False, 1, 0)
    with pytest.raises(ValueError, match="a has a score that cannot be"):
        compare.as_score({**row, column: value})


@pytest.mark.parametrize(
    "found", [{"mean": None, "n": 3}, {"mean": math.nan, "n": 3}, {"mean": 1, "n": -1}]
)
def test_means_that_cannot_be(found):
    with pytest.raises((ValueError, TypeError)):
        compare.as_mean(found)
    assert math.isnan(compare.as_mean({"mean": None, "n": 0})["mean"])


def test_an_image_that_is_there_twice(tmp_path):
    folder = tmp_path / "run"
    make_run(folder, [*cases(0.1, 0.2, 0.3, 0.4), Case("a", 0.9)])
    with pytest.raises(UserError, match=r"run: .*in_test C1 a is there twice"):
        compare.read_run(folder)


@pytest.mark.parametrize("changed", [{"data": "a\nb"}, {"data": 3}, {"model": "a\x1b[31m"}])
def test_texts_that_are_none(tmp_path, changed):
    folder = tmp_path / "run"
    make_run(folder, cases(0.1, 0.2, 0.3, 0.4), **changed)
    with pytest.raises(UserError, match=r"run: results\.json or scores\.csv is of another version"):
        compare.read_run(folder)
