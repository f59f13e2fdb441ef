"""Finished runs compared: methods side by side, and their paired differences.

    python -m tools.compare runs/*                           # tables
    python -m tools.compare runs/* --plot comparison.png     # tables and a picture
    python -m tools.compare runs/* --batch-norm local        # with each centre's own statistics

Runs on the same data with the same network are one section. In it, runs that differ in fold and
seed alone are one group, and every two groups are compared. The statistics are in
`paired_difference`, `interval` and `interval_with_seeds`.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import special

from fedgs import STATISTICS, Config
from metrics import MEASURES
from support.errors import UserError, readable_errors
from support.files import read_csv
from support.options import flagged, new_parser
from support.pictures import draw_comparison, save_figure
from support.runs import read_results
from support.tables import SPLITS, aligned, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRED = ("dice_s", "dice_l", "dice_n", "dice", "lesion_dice")  # that every image has for itself
FEWEST_CLUSTERS = 10  # with fewer images, or volumes, bootstrap intervals are much too narrow
FEWEST_PAIRS = 3  # of runs: fewer do not tell how much a seed matters
SAMPLES = 9999  # bootstrap samples
SIZES = (0, 10, 50, 150, 1000, math.inf)  # 1/a of an image's lesions, for the picture

Image = tuple[str, str, str]  # split, centre, name


class Score(NamedTuple):
    """A test image: its size, and how well a run segmented it."""

    inverse_area: float  # inf without a lesion
    small: bool
    dice: float
    lesion_dice: float

    def of(self, measure: str) -> float | None:
        """What the image adds to the mean of a PAIRED measure; None where it is not one of its."""
        has_lesion = math.isfinite(self.inverse_area)
        if measure == "lesion_dice":
            return self.lesion_dice
        if measure == "dice_n" and not has_lesion:
            return None
        if measure == "dice_s" and not (has_lesion and self.small):
            return None
        if measure == "dice_l" and not (has_lesion and not self.small):
            return None
        return self.dice


class Run(NamedTuple):
    """What one checkpoint of a finished run left."""

    folder: Path
    source: str  # where its test images come from
    config: dict
    checkpoint: str
    batch_norm: str  # whose statistics: averaged or local
    means: dict[str, dict]  # {split: {measure: {"mean": float, "n": int}}}
    scores: dict[Image, Score]

    @property
    def part(self) -> tuple[int, int]:
        """Fold and seed: what runs of two methods must have in common to be a pair."""
        return self.config["fold"], self.config["seed"]


Group = list[Run]  # runs that differ in fold and seed alone


class Summary(NamedTuple):
    """A measure over the runs of a group."""

    runs: int  # those that have something to average
    mean: float
    std: float  # of a sample (n - 1); NaN for a single run
    fewest: int  # images, or lesions, of a run
    most: int


class Interval(NamedTuple):
    """Where a mean difference may lie; NaN where too little is known for an answer."""

    low: float
    high: float


UNKNOWN = Interval(math.nan, math.nan)


class Difference(NamedTuple):
    """The second group minus the first, image by image."""

    of_pairs: tuple[float, ...]  # the mean difference of each pair of runs that has such images
    images: int
    clusters: int  # the images that are independent, see cluster_of
    mean: float
    std: float  # of the pairs' mean differences, as of a sample (n - 1)
    over_images: Interval  # as these runs might do on other images
    with_seeds: Interval  # as other runs might do on other images


class Section(NamedTuple):
    """Runs that can be compared: on the same data, with the same network."""

    title: str
    groups: dict[str, Group]  # by label: the method, and the options in which the runs differ
    summaries: dict[tuple[str, str, str], Summary]  # by split, measure, label
    differences: dict[tuple[str, str, str, str], Difference]  # by first, second, split, measure


# ------------------------------------------------------------------------------------ comparison


def compare(
    folders: Iterable[str | Path], checkpoint: str = "", batch_norm: str = ""
) -> list[Section]:
    """Read finished runs and compare them: a Section for each data set and network.

    checkpoint: whose results; "": `best`, or the only one that an evaluation wrote. batch_norm:
    whose statistics, averaged or local; "": those that each run was validated with. Raises
    UserError for folders without a finished run, damaged files, and runs that do not belong
    together.
    """
    runs = [read_run(Path(folder), checkpoint, batch_norm) for folder in folders]
    check_together(runs)

    sections: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        sections.setdefault((run.source, run.config["model"]), []).append(run)
    return [compare_section(found) for found in sections.values()]


def compare_section(runs: list[Run]) -> Section:
    """Group runs by what they differ in, and compare the groups."""
    groups = group_runs(runs)

    summaries = {}
    for split, measure, label in itertools.product(SPLITS, MEASURES, groups):
        summaries[split, measure, label] = summarise(groups[label], split, measure)

    differences = {}
    for split in SPLITS:
        images = {image for run in runs for image in run.scores if image[0] == split}
        for first, second in itertools.combinations(groups, 2):
            for measure in PAIRED:
                found = paired_difference(groups[first], groups[second], measure, images)
                differences[first, second, split, measure] = found

    checkpoints = " and ".join(dict.fromkeys(run.checkpoint for run in runs))
    statistics = " and ".join(dict.fromkeys(run.batch_norm for run in runs))
    title = (
        f"{runs[0].source}, {runs[0].config['model']}, checkpoint {checkpoints}, "
        f"{statistics} batch-norm statistics"
    )
    return Section(title, groups, summaries, differences)


def group_runs(runs: list[Run]) -> dict[str, Group]:
    """{label: runs}, in the labels' order, FedGS last. Raises UserError for the same run twice."""
    # A label that was given says all. The others are told apart by what they differ in.
    unlabelled = [run for run in runs if not run.config.get("label")]
    differing = options_that_differ(unlabelled)

    groups: dict[str, Group] = {}
    for run in runs:
        label = run.config.get("label") or describe_method(run, differing)
        group = groups.setdefault(label, [])
        for other in group:
            if other.part == run.part:
                fold, seed = run.part
                raise UserError(
                    f"{run.folder} and {other.folder} are the same run: {label}, fold {fold}, "
                    f"seed {seed}"
                )
        group.append(run)
    return dict(sorted(groups.items(), key=fedgs_last))


def fedgs_last(labelled: tuple[str, Group]) -> tuple[bool, str]:
    """What groups are sorted by: differences are later minus earlier, so FedGS minus another."""
    label, group = labelled
    config = group[0].config
    return config["method"] == "fedgs" and config.get("scaling") != "off", label


def options_that_differ(runs: list[Run]) -> list[str]:
    """Names of the options that make other methods of these runs."""
    # More rounds make another method of it, although a run may go on for more of them.
    ignored = flagged(Config, "free") - {"rounds"} | {"method", "fold", "seed"}
    options = dict.fromkeys(name for run in runs for name in run.config if name not in ignored)
    return [name for name in options if values_differ(runs, name)]


def describe_method(run: Run, differing: list[str]) -> str:
    """A run's method and the options in which it differs, as "fedavg, server_lr 1.12"."""
    method = run.config["method"]
    if method == "unknown":  # a published checkpoint: nobody wrote down how it was trained
        method = run.folder.name
    return ", ".join([method, *(f"{name} {run.config.get(name)}" for name in differing)])


def values_differ(runs: list[Run], option: str) -> bool:
    """Whether two of the runs have different values of an option, or only one of them has it."""
    values = {str(run.config.get(option)) for run in runs}
    return len(values) > 1


def summarise(group: Group, split: str, measure: str) -> Summary:
    """A measure over a group's runs, each of which counts once."""
    found = [run.means[split][measure] for run in group if run.means[split][measure]["n"]]
    counts = [score["n"] for score in found] or [0]
    mean, std = mean_and_std([score["mean"] for score in found])
    return Summary(len(found), mean, std, min(counts), max(counts))


def mean_and_std(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean, and standard deviation of a sample (n - 1); NaN where there are too few values."""
    # n - 1, since the runs are a few of all that there could have been.
    mean = float(np.mean(values)) if len(values) > 0 else math.nan
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return mean, std


# ----------------------------------------------------------------------------- paired statistics


def paired_difference(
    first: Group, second: Group, measure: str, images: Collection[Image]
) -> Difference:
    """second - first over some images, in pairs of their runs with the same fold and seed.

    Both runs of a pair saw the same images, so that most of what makes one image easier than
    another cancels. Each pair has a mean difference, and the result is the mean of these: a fold
    with many images counts no more than one with few, as in a group's mean over runs.
    """
    pairs = pairs_of(first, second)
    sums, counts, seen = differences_by_cluster(pairs, measure, images)

    # A fold's test images may hold none of this kind: such a pair has nothing to say.
    known = counts.sum(axis=0) > 0
    sums = sums[:, known]
    counts = counts[:, known]
    of_pairs = sums.sum(axis=0) / counts.sum(axis=0)
    mean, std = mean_and_std(of_pairs)

    # Of few pairs the spread may be small by chance, but other seeds never make us surer.
    over_images = interval(sums, counts)
    with_seeds = interval_with_seeds(sums, counts)
    low = float(np.minimum(with_seeds.low, over_images.low))
    high = float(np.maximum(with_seeds.high, over_images.high))
    return Difference(
        of_pairs=tuple(of_pairs.tolist()),
        images=seen,
        clusters=len(sums),
        mean=mean,
        std=std,
        over_images=over_images,
        with_seeds=Interval(low, high),
    )


def pairs_of(first: Group, second: Group) -> list[tuple[Run, Run]]:
    """The runs of two groups that have fold and seed in common."""
    return [(a, b) for a in first for b in second if a.part == b.part]


def differences_by_cluster(
    pairs: Sequence[tuple[Run, Run]], measure: str, images: Collection[Image]
) -> tuple[np.ndarray, np.ndarray, int]:
    """The differences of R pairs of runs, added up within each of C clusters of images.

    -> their sum (C, R) and number (C, R), and how many images there are in all
    """
    seen = set()
    sums: dict[Image, np.ndarray] = {}
    counts: dict[Image, np.ndarray] = {}
    for r, (a, b) in enumerate(pairs):
        for image, score in a.scores.items():
            value = score.of(measure)
            if image not in images or value is None:
                continue
            seen.add(image)

            cluster = cluster_of(image)
            if cluster not in sums:
                sums[cluster] = np.zeros(len(pairs))
                counts[cluster] = np.zeros(len(pairs))
            sums[cluster][r] += b.scores[image].of(measure) - value
            counts[cluster][r] += 1

    shape = (len(sums), len(pairs))  # there may be none of either
    all_sums = np.array(list(sums.values())).reshape(shape)
    all_counts = np.array(list(counts.values())).reshape(shape)
    return all_sums, all_counts, len(seen)


def cluster_of(image: Image) -> Image:
    """The volume of a slice. An image that is no slice is a cluster by itself.

    Slices of one volume show the same tumours and succeed or fail together, so that a hundred of
    them tell hardly more of another patient than one does.
    """
    split, centre, name = image
    volume, _, _ = name.partition("_slice-")
    return split, centre, volume


def interval(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """95 % interval of the mean of paired differences, as other images might show it of these runs.

    sums, counts (C, R): the sum and the number of differences of C clusters in R pairs of runs. The
    mean is that of the pairs' mean differences. NaN below FEWEST_CLUSTERS.
    """
    # The bootstrap takes the clusters at hand for all there are. Of few, too many samples are
    # nearly the same, and the interval comes out much narrower than 95 % of the cases need.
    clusters = len(sums)
    if clusters < FEWEST_CLUSTERS:
        return UNKNOWN

    # Imitate other test sets: draw as many clusters again, with replacement. A cluster is drawn
    # whole, with its images in all pairs of runs, since these are not independent of each other.
    # The seed is fixed: the same runs have the same interval.
    random = np.random.default_rng(0)
    drawn = random.integers(clusters, size=(SAMPLES, clusters))
    places = drawn + clusters * np.arange(SAMPLES)[:, None]
    times = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape)

    # The mean difference of each sample (row) in each pair (column), then over pairs. Where folds
    # have different images, a sample may hold none of a pair's: the other pairs' mean counts.
    sample_sums = times @ sums
    sample_counts = times @ counts
    means = np.full(sample_sums.shape, np.nan)
    np.divide(sample_sums, sample_counts, out=means, where=sample_counts > 0)
    low, high = np.percentile(np.nanmean(means, axis=1), (2.5, 97.5))
    return Interval(float(low), float(high))


def interval_with_seeds(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """95 % interval of the mean of paired differences, as other images and seeds might show it.

    sums, counts (C, R): as of `interval`; every pair has a difference. Drawing pairs of runs anew,
    too, would be the obvious way, but a bootstrap of three says that they are three of a kind and
    covers far too little. NaN below FEWEST_PAIRS or FEWEST_CLUSTERS.
    """
    clusters, pairs = sums.shape
    if pairs < FEWEST_PAIRS or clusters < FEWEST_CLUSTERS:
        return UNKNOWN

    # If pairs of runs were independent, the variance of their mean would be s^2 / R.
    numbers = counts.sum(axis=0)
    of_pairs = sums.sum(axis=0) / numbers
    own = of_pairs.var(ddof=1) / pairs

    # They are not as far as they share images: one that is easier for a method is so in all pairs.
    # This adds the covariance of two pairs, in the mean over all two of them. It comes from how far
    # each cluster moves the means of its pairs, and is 0 for folds without a common image.
    moves = (sums - counts * of_pairs) / numbers
    products = (moves.sum(axis=1) ** 2 - (moves**2).sum(axis=1)).sum() / (pairs * (pairs - 1))
    shared = max(0.0, products * clusters / (clusters - 1))

    # Either part is as uncertain as it has few members: Student's t on two degrees of freedom is
    # 4.3. The squares of half widths add up as variances do, which errs on the wide side whatever
    # the parts' shares are (Banerjee, Sankhya 22, 1960).
    squared = student(pairs - 1) ** 2 * own + student(clusters - 1) ** 2 * shared
    mean = of_pairs.mean()
    half = math.sqrt(squared)
    return Interval(float(mean - half), float(mean + half))


def student(freedom: int) -> float:
    """How many standard errors a 95 % interval reaches to either side, by Student's t."""
    return float(special.stdtrit(freedom, 0.975))


# ----------------------------------------------------------------------------------- reading runs

CONFIG_TYPES = {  # options that a comparison relies on
    "method": str,
    "model": str,
    "dataset": str,
    "fold": int,
    "seed": int,
    "image_size": int,
    "tau": (int, float),
}
SCORE_COLUMNS = ("checkpoint", "split", "batch_norm", "centre", "name", *Score._fields)


def read_run(folder: Path, checkpoint: str = "", batch_norm: str = "") -> Run:
    """A run's results.json and scores.csv. Raises UserError; the others as in compare."""
    for name in ("results.json", "scores.csv"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} holds no finished run, {name} is missing: finish it with --resume, or "
                "leave it out"
            )

    results = read_results(folder)
    rows = read_csv(folder / "scores.csv", SCORE_COLUMNS)
    try:
        batch_norm = batch_norm or results["config"]["batch_norm"]
        runs = {}
        for name in results["checkpoints"]:
            runs[name] = as_run(folder, results, rows, name, batch_norm)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{folder}: results.json or scores.csv is of another version ({error!r})"
        ) from error

    if not checkpoint:
        checkpoint = "best" if "best" in runs else next(iter(runs), "")
    if checkpoint not in runs:
        raise UserError(
            f"{folder} has no results of checkpoint {checkpoint}, but of {', '.join(runs)}"
        )
    return runs[checkpoint]


def as_run(
    folder: Path, results: dict, rows: Iterable[dict[str, str]], checkpoint: str, batch_norm: str
) -> Run:
    """One checkpoint in a run's files. Raises what incomplete or wrong content makes it raise."""
    config = results["config"]
    for name, kind in CONFIG_TYPES.items():
        if not isinstance(config[name], kind) or not str(config[name]).isprintable():
            raise TypeError(name)

    means = {}
    for split in SPLITS:
        found = results["checkpoints"][checkpoint][batch_norm][split]
        means[split] = {measure: as_mean(found[measure]) for measure in MEASURES}

    scores = {}
    for row in rows:
        if (row["checkpoint"], row["batch_norm"]) == (checkpoint, batch_norm):
            image = row["split"], row["centre"], row["name"]
            if image in scores:
                raise ValueError(f"{' '.join(image)} is there twice")
            scores[image] = as_score(row)
    if not scores:
        raise LookupError(f"scores of {checkpoint}")
    source = results["data"]
    if not (isinstance(source, str) and source.isprintable()):
        raise TypeError("data")
    return Run(folder, source, config, checkpoint, batch_norm, means, scores)


def as_score(row: dict[str, str]) -> Score:
    """A row of scores.csv. Raises ValueError for what can be no score."""
    score = Score(
        inverse_area=float(row["inverse_area"]),
        small=row["small"] == "1",
        dice=float(row["dice"]),
        lesion_dice=float(row["lesion_dice"]),
    )
    # Comparisons with NaN are false.
    fine = score.inverse_area >= 1 and 0 <= score.dice <= 1 and 0 <= score.lesion_dice <= 1
    if not (fine and row["small"] in ("0", "1")):
        raise ValueError(f"{row['name']} has a score that cannot be")
    return score


def as_mean(found: dict) -> dict:
    """{"mean", "n"} as metrics.means gives it: JSON has null for NaN."""
    count = int(found["n"])
    mean = float(found["mean"]) if count else math.nan
    if count < 0 or (count and not math.isfinite(mean)):
        raise ValueError(f"a mean of {mean} over {count}")
    return {"mean": mean, "n": count}


def check_together(runs: Sequence[Run]) -> None:
    """Raise UserError for runs of a data set that were tested on different images."""
    first_of: dict[tuple, Run] = {}
    for run in runs:
        dataset = run.config["dataset"]
        first = first_of.setdefault((dataset,), run)
        if run.source != first.source:
            raise UserError(
                f"{run.folder} was tested on {run.source}, {first.folder} on {first.source}: "
                "compare them apart"
            )
        size, first_size = run.config["image_size"], first.config["image_size"]
        if size != first_size:
            raise UserError(
                f"{run.folder} was tested on images of {size}, {first.folder} on images of "
                f"{first_size} pixels a side: compare them apart"
            )

        # In-test images depend on the fold; the held-out centre is the same in all folds.
        same_fold = first_of.setdefault((dataset, run.config["fold"]), run)
        check_images(run, same_fold, "in_test")
        check_images(run, first, "out_test")


def check_images(run: Run, other: Run, split: str) -> None:
    """Raise UserError where two runs have different test images, or different size flags."""
    if images_of(run, split) != images_of(other, split):
        raise UserError(
            f"{run.folder} and {other.folder} have other {SPLITS[split]} images or size flags: "
            "compare them apart"
        )


def images_of(run: Run, split: str) -> dict[Image, tuple[float, bool]]:
    """{image: (inverse area, small)} of a split."""
    found = {}
    for image, score in run.scores.items():
        if image[0] == split:
            found[image] = score.inverse_area, score.small
    return found


# ----------------------------------------------------------------------------------------- tables

NOTE = f"""\
Differences are paired over images and runs of the same fold and seed: their mean ± standard
deviation over pairs of runs. The interval over images tells what these very runs might have shown
on other images: it takes {FEWEST_CLUSTERS} of them (LiTS: volumes). The interval over images and
seeds tells what other runs might have shown, too: it takes {FEWEST_PAIRS} pairs of runs. Only that
one is about methods. One interval in twenty misses the truth, and there are many of them here."""


def report(sections: Sequence[Section], layout: Callable[[list], str] = aligned) -> str:
    """All tables of a comparison as text. layout: aligned or markdown, of support.tables"""
    blocks = []
    for section in sections:
        blocks.append(
            f"{section.title}: mean ± standard deviation over runs; n: images, or lesions for "
            "recall, of a run"
        )
        tables = [summary_rows(section, split) for split in splits_of(section)]
        blocks += [layout(rows) for rows in tables]
        for first, second in itertools.combinations(section.groups, 2):
            blocks.append(describe_pairs(section, first, second))
            rows = difference_rows(section, first, second)
            if len(rows) > 1:
                blocks.append(layout(rows))

    if any(section.differences for section in sections):
        blocks.append(NOTE)
    return "\n\n".join(blocks)


def splits_of(section: Section) -> list[str]:
    """The splits in which anything was tested: without a held-out centre there is no out-test."""
    tested = {split for (split, _, _), summary in section.summaries.items() if summary.runs}
    return [split for split in SPLITS if split in tested]


def summary_rows(section: Section, split: str) -> list[list[str]]:
    """A row for each measure that something was counted for, a column for each group."""
    header = [SPLITS[split], "n"]
    for label, group in section.groups.items():
        header.append(f"{label} ({plural(len(group), 'run')})")

    rows = [header]
    for measure, heading in MEASURES.items():
        summaries = [section.summaries[split, measure, label] for label in section.groups]
        fewest = min(summary.fewest for summary in summaries)
        most = max(summary.most for summary in summaries)
        # Without any image of its kind, a measure would be a row of dashes.
        if most > 0:
            count = str(most) if fewest == most else f"{fewest} to {most}"
            rows.append([heading, count, *map(mean_cell, summaries)])
    return rows


def mean_cell(summary: Summary) -> str:
    """A mean as "0.512 ± 0.031", without ± for a single run; a dash where there is none."""
    if summary.runs == 0:
        return "–"
    spread = "" if math.isnan(summary.std) else f" ± {summary.std:.3f}"
    return f"{summary.mean:.3f}{spread}"


def describe_pairs(section: Section, first: str, second: str) -> str:
    """What stands above a table of differences: who is compared, and whether it can be."""
    pairs = len(pairs_of(section.groups[first], section.groups[second]))
    text = f"{second} - {first}: {plural(pairs, 'pair')} of runs of the same fold and seed"
    if pairs < FEWEST_PAIRS:
        text += f". No conclusion about methods is possible from fewer than {FEWEST_PAIRS}."
    return text


def difference_rows(section: Section, first: str, second: str) -> list[list[str]]:
    """A row for each split and measure, with the difference, its intervals, and what is in it."""
    intervals = ["over images", "over images and seeds"]
    rows = [["95 % intervals", "difference", *intervals, "images", "pairs of runs"]]
    for split, measure in itertools.product(splits_of(section), PAIRED):
        found = section.differences[first, second, split, measure]
        if found.images:
            rows.append([f"{MEASURES[measure]}, {SPLITS[split]}", *difference_cells(found)])
    return rows


def difference_cells(found: Difference) -> list[str]:
    """A difference as "+0.012 ± 0.004", its intervals, and the numbers of images and of pairs."""
    text = f"{found.mean:+.3f}"
    if not math.isnan(found.std):
        text += f" ± {found.std:.3f}"

    images = str(found.images)
    if found.clusters < found.images:
        images += f" of {plural(found.clusters, 'volume')}"

    intervals = [interval_cell(found.over_images), interval_cell(found.with_seeds)]
    return [text, *intervals, images, str(len(found.of_pairs))]


def interval_cell(found: Interval) -> str:
    """An interval as "[+0.003, +0.021]", or a dash."""
    return "–" if math.isnan(found.low) else f"[{found.low:+.3f}, {found.high:+.3f}]"


def plural(count: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# ---------------------------------------------------------------------------------------- picture


def draw(section: Section) -> "Figure":
    """The last method, which is FedGS if it is there, minus each other: by lesion size and centre.

    Raises UserError where no two methods have a pair of runs.
    """
    *others, last = section.groups
    sizes: dict[Image, float] = {}
    for group in section.groups.values():
        for run in group:
            for image, score in run.scores.items():
                sizes[image] = score.inverse_area

    rows = {}
    for other in others:
        groups = section.groups[other], section.groups[last]
        pairs = len(pairs_of(*groups))
        if not pairs:
            continue
        title = f"{last} − {other}, {plural(pairs, 'pair')} of runs"
        if pairs < FEWEST_PAIRS:
            title += ": too few for a conclusion"
        rows[title] = by_size(*groups, sizes), by_centre(*groups, sizes)

    if not rows:
        raise UserError(
            f"{section.title}: a picture shows differences, and there are no runs of {last} and "
            "another method with the same fold and seed"
        )
    return draw_comparison(section.title, rows)


def by_size(first: Group, second: Group, sizes: dict[Image, float]) -> dict[str, dict]:
    """{range of inverse area: {"Dice": Difference}} over all test images; sizes: their areas"""
    ranges = {}
    for low, high in itertools.pairwise(SIZES):
        images = {image for image, size in sizes.items() if low <= size < high}
        if low == 0:
            ranges[f"1/a < {high}"] = images
        elif math.isinf(high):
            ranges[f"≥ {low}"] = images
        else:
            ranges[f"{low}–{high}"] = images
    ranges["no lesion"] = {image for image, size in sizes.items() if math.isinf(size)}

    found = {}
    for name, images in ranges.items():
        found[name] = {"Dice": paired_difference(first, second, "dice", images)}
    return found


def by_centre(first: Group, second: Group, sizes: dict[Image, float]) -> dict[str, dict]:
    """{centre: {"Dice_S": Difference, "Dice_L": Difference}}"""
    found = {}
    for split, centre in sorted({image[:2] for image in sizes}):
        # Centres count one by one, since the difference between them is what a federation is about.
        images = {image for image in sizes if image[:2] == (split, centre)}
        heading = f"{centre}\n(held out)" if split == "out_test" else centre
        found[heading] = {}
        for measure in ("dice_s", "dice_l"):
            difference = paired_difference(first, second, measure, images)
            found[heading][MEASURES[measure]] = difference
    return found


# ----------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with readable_errors("compare"):
        parser = new_parser(__doc__, "python -m tools.compare")
        parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
        parser.add_argument("--checkpoint", help="whose results: best (default) or best_small")
        parser.add_argument(
            "--batch-norm", choices=STATISTICS, help="whose statistics (those of validation)"
        )
        parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
        parser.add_argument("--plot", metavar="FILE", type=Path, help="draw it: .png, .pdf, .svg")
        parser.set_defaults(checkpoint="", batch_norm="", markdown=False, plot=None)
        given = parser.parse_args(arguments)

        plot = given.plot
        if plot and plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UserError(f"--plot {plot}: must end in .png, .pdf or .svg")

        sections = compare(given.runs, given.checkpoint, given.batch_norm)
        if plot and len(sections) > 1:
            titles = "; ".join(section.title for section in sections)
            raise UserError(f"--plot draws one data set and network at a time: {titles}")

        layout = markdown if given.markdown else aligned
        print(report(sections, layout))
        if plot:
            save_figure(plot, draw(sections[0]))


if __name__ == "__main__":
    main()
