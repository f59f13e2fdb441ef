"""What is minimised and what is measured: the losses, Dice by lesion size, lesions one by one, and what runs differ in.

    python metrics.py runs/*                                 # methods side by side, and their paired differences
    python metrics.py runs/* --plot comparison.png           # the same, drawn; --markdown and --csv print it for others

Every measure of a test is a sum and a count, so that adding the tallies of clients gives exactly the mean over all
their images, without an image (or a score of one) leaving its client.
"""

import argparse
import csv
import itertools
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

import plots
import runs
from runs import RunError

LESION_BINS = (0, 50, 150, 1000, math.inf)  # by a lesion's inverse area; 150 and 1000 are the data sets' tau
RECALL_BINS = {  # name in files -> heading
    "recall_0_50": "recall, 1/a < 50",
    "recall_50_150": "recall, 50 to 150",
    "recall_150_1000": "recall, 150 to 1000",
    "recall_1000_up": "recall, 1/a ≥ 1000",
}
MEASURES = {  # name in files -> heading in tables; the paper's Dice_S and Dice_L first
    "dice_s": "Dice_S",  # images with a small lesion
    "dice_l": "Dice_L",  # images with a lesion that is not small
    "dice_n": "Dice_N",  # all images with a lesion
    "dice": "Dice",  # all images
    "false_positive": "FP rate",  # images without a lesion in which one was predicted
    "lesion_dice": "lesion-wise Dice",  # all images, see lesion_dice
    "false_components": "FP components",  # predicted components that touch no lesion, an image
    "recall": "lesion recall",  # lesions that the prediction touches, of all lesions
    **RECALL_BINS,
    "nsd": "NSD",  # images with a lesion or a prediction, where asked for, see surface_measures
    "hd95": "HD95",  # images with both
}
SURFACES = ("nsd", "hd95")


# ---------------------------------------------------------------------------------------------- loss


def soft_dice_loss(logits, masks):
    """soft_dice of logits (B, 2, H, W)."""
    return soft_dice(logits.softmax(dim=1), masks)


def soft_dice(probabilities, masks):
    """Soft Dice loss of a whole batch at once: 1 - (2 sum(p y) + 0.1) / (sum(p) + sum(y) + 0.1).

    probabilities (B, 2, H, W), of which p is the second channel, lesion; masks (B, 1, H, W), 1 where there is lesion.
    -> 0-dim tensor. One sum over the batch means that large lesions dominate the gradient.
    """
    p = probabilities[:, 1:]
    y = masks.to(p.dtype)
    return 1 - (2 * (p * y).sum() + 0.1) / (p.sum() + y.sum() + 0.1)


DISENTANGLED_WEIGHTS = {"dice": 10, "kl": 0.01, "latent": 1, "reconstruction": 1}


def disentangled_loss(parts, images, masks):
    """SD-UTNet's training loss: find the lesion, give the image back, keep the modality code normal and readable.

    parts: models.Decomposition of images (B, C, H, W), as the network saw them; masks (B, 1, H, W).
    -> (total, terms): total is the weighted sum of terms, {name: 0-dim tensor}, which are not weighted.
    """
    divergence = -0.5 * (1 + parts.log_variance - parts.mu**2 - parts.log_variance.exp()).sum(dim=1)  # (B,)
    terms = {
        "dice": soft_dice(parts.probabilities, masks),
        "kl": divergence.mean(),  # from N(mu, exp(log_variance)) to N(0, 1)
        "latent": (parts.z_again - parts.z).abs().mean(),
        "reconstruction": (parts.reconstruction - images).abs().mean(),
    }
    return sum(weight * terms[name] for name, weight in DISENTANGLED_WEIGHTS.items()), terms


# ------------------------------------------------------------------------------------------ measures


def dice_per_image(predicted, truth):
    """2 TP / (2 TP + FP + FN) of each image; 1 where both are empty, 0 where only one is.

    predicted, truth: (B, 1, H, W) bool -> (B,) float64
    """
    overlap = (predicted & truth).flatten(1).sum(1).double()
    total = (predicted.flatten(1).sum(1) + truth.flatten(1).sum(1)).double()  # = 2 TP + FP + FN
    return torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0)


class Lesions(NamedTuple):
    """The lesions of one image, each against the prediction."""

    inverse_area: np.ndarray  # (n,) image pixels / pixels of the lesion
    dice: np.ndarray  # (n,) 0 for a lesion that was missed
    false_components: int  # predicted components that touch no lesion


def match_lesions(predicted, truth):
    """Match the connected components (8 neighbours) of a prediction to those of the truth, the lesions. -> Lesions

    predicted, truth: (H, W) bool arrays. A lesion is found if a predicted component overlaps it in any pixel; its Dice is
    taken against all predicted components that do, whole. As in the BraTS 2023 challenge (Moawad et al., arXiv:2306.00838),
    here in 2D and without its dilation of lesions and its smallest volume: every lesion counts.
    """
    neighbours, size = np.ones((3, 3)), truth.size
    predicted, truth = cropped(predicted, truth)
    (lesions, n), (components, m) = ndimage.label(truth, neighbours), ndimage.label(predicted, neighbours)
    pairs = np.bincount((lesions * (m + 1) + components).ravel(), minlength=(n + 1) * (m + 1)).reshape(n + 1, m + 1)
    lesion_pixels, component_pixels = pairs.sum(1)[1:], pairs.sum(0)[1:]
    overlap = pairs[1:, 1:]  # (n, m) pixels
    touching = overlap > 0
    dice = 2 * overlap.sum(1) / (lesion_pixels + touching @ component_pixels)
    return Lesions(size / lesion_pixels, dice, int(m - touching.any(0).sum()))


def cropped(predicted, truth):
    """Both masks, cut to the box around all that is in either: what lies outside decides nothing."""
    either = predicted | truth
    rows, columns = (np.flatnonzero(either.any(axis)) for axis in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else np.s_[:0, :0]
    return predicted[box], truth[box]


def lesion_dice(lesions):
    """Lesion-wise Dice of an image (BraTS 2023): the sum of its lesions' Dice / (lesions + false-positive components).

    Missed lesions and false-positive components so count 0. 1 where there is neither a lesion nor a prediction.
    """
    count = len(lesions.dice) + lesions.false_components
    return lesions.dice.sum() / count if count else 1.0


def surface_measures(predicted, truth, spacing, tolerance):
    """How far apart the boundaries of prediction and truth are. -> (NSD, HD95)

    predicted, truth: (H, W) bool arrays; spacing (2,): the distance of pixels, say in mm; tolerance in the same unit.
    Boundary pixels have one of their four neighbours outside the mask, or outside the image. Normalised surface dice
    (Nikolov et al., J Med Internet Res 23:e26151, 2021): the share of both boundaries within the tolerance of the other.
    HD95: the larger of the two directed 95th percentiles of distances. Where only one mask is empty, NSD is 0 and HD95
    NaN; where both are, both are NaN. A millionth of the tolerance is allowed for rounding.
    """
    if not (predicted.any() and truth.any()):
        return (0.0 if predicted.any() or truth.any() else math.nan), math.nan
    first, second = (mask & ~ndimage.binary_erosion(mask) for mask in cropped(predicted, truth))
    distances = [ndimage.distance_transform_edt(~other, sampling=spacing)[edge] for edge, other in ((first, second), (second, first))]
    return (np.concatenate(distances) <= tolerance * (1 + 1e-6)).mean(), max(np.percentile(d, 95) for d in distances)


def tally(dice, lesion, small, predicted, lesions, surfaces):
    """Sums and counts of the measures: (14, 2) float64, in the order of MEASURES. Tallies add up.

    dice (N,) float64; lesion, small, predicted (N,) bool: the truth has a lesion, the lesion is small,
    the prediction is not empty; lesions: N Lesions; surfaces (N, 2) float64: NSD and HD95, NaN where there is none.
    An image without a lesion is never small.
    """
    small, everything = small & lesion, torch.ones_like(lesion)
    of_images = torch.tensor([(lesion_dice(x), x.false_components) for x in lesions], dtype=torch.float64).view(-1, 2)
    areas, found = (torch.from_numpy(np.concatenate([np.zeros(0), *parts]))
                    for parts in ([x.inverse_area for x in lesions], [x.dice > 0 for x in lesions]))
    rows = [(dice, small), (dice, lesion & ~small), (dice, lesion), (dice, everything), (predicted.double(), ~lesion),
            (of_images[:, 0], everything), (of_images[:, 1], everything), (found, torch.ones_like(found, dtype=torch.bool)),
            *((found, (areas >= low) & (areas < high)) for low, high in itertools.pairwise(LESION_BINS)),
            *((values, ~values.isnan()) for values in surfaces.unbind(1))]
    return torch.stack([torch.stack([value[kind].sum(), kind.sum().double()]) for value, kind in rows])


def means(sums):
    """A (14, 2) tally -> {measure: {"mean": float, "n": int}}; NaN with n = 0 where there is nothing to average."""
    return {
        name: {"mean": total / n if n else math.nan, "n": int(n)}
        for name, (total, n) in zip(MEASURES, sums.tolist(), strict=True)
    }


# --------------------------------------------------------------------------------------------- tables


def table(results):
    """The final table of a run as text: a row for each measure, a column for each checkpoint and test split.

    results: {checkpoint: {"round": int or None, "in_test": means, "out_test": means}}. A cell is a mean and its count.
    """
    columns = [(name, result, split) for name, result in results.items() for split in ("in_test", "out_test")]
    rounds = {name: f" (round {result['round']})" if result["round"] else "" for name, result in results.items()}
    header = ["", *(name + rounds[name] if split == "in_test" else "" for name, _, split in columns)]
    rows = [["", *(split.replace("_", "-") for _, _, split in columns)]]
    for measure, heading in MEASURES.items():
        scores = [result[split][measure] for _, result, split in columns]
        if measure not in SURFACES or any(score["n"] for score in scores):
            rows.append([heading, *(cell(score) for score in scores)])
    return aligned([header, *rows])


def surface_note(config):
    """The units of NSD and HD95, for tables; empty where they were not asked for."""
    unit = "mm" if config["dataset"] == "lits" else "pixels of the network's image"
    tolerance = config.get("nsd_tolerance")
    return f"NSD: within {tolerance:g} {unit}; HD95 in {unit}" if tolerance else ""


def cell(score):
    """{"mean", "n"} -> "0.812 (n=9)", or a dash where there was nothing to average."""
    return f"{score['mean']:.3f} (n={score['n']})" if score["n"] else "– (n=0)"


def aligned(rows):
    """Rows of cells as text in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("   ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows):
    """Rows of cells as a table in Markdown, the first row its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


# ------------------------------------------------------------------------------------- comparing runs

PAIRED = ("dice_s", "dice_l", "dice_n", "dice", "lesion_dice")  # measures that every image has for itself
SPLITS = ("in_test", "out_test")
FEWEST = 10  # images (volumes of LiTS) that an interval needs: with fewer, bootstrap intervals are much too narrow


class Score(NamedTuple):
    """A test image: its size class, and how well a run segmented it."""

    inverse_area: float  # inf without a lesion
    small: bool
    dice: float
    lesion_dice: float

    def of(self, measure):
        """What the image adds to the mean of a measure of PAIRED; None where it does not belong to it."""
        lesion = math.isfinite(self.inverse_area)
        belongs = {"dice_s": lesion and self.small, "dice_l": lesion and not self.small, "dice_n": lesion}.get(measure, True)
        return (self.lesion_dice if measure == "lesion_dice" else self.dice) if belongs else None


class Run(NamedTuple):
    """What one checkpoint of a finished run left."""

    folder: Path
    data: str  # where its test images come from
    config: dict
    means: dict  # {split: {measure: {"mean": float, "n": int}}}
    checkpoint: str
    scores: dict  # {(split, centre, name): Score}

    @property
    def part(self):
        return self.config["fold"], self.config["seed"]


class Section(NamedTuple):
    """Runs that can be compared: on the same data, with the same network."""

    title: str
    groups: dict  # {label: [Run]}, what differs in more than fold and seed apart
    summary: dict  # {(split, measure, label): {"runs", "mean", "std", "n": (fewest, most)}}
    differences: dict  # {(first, second, split, measure): see paired_difference}


def compare(folders, checkpoint=""):
    """Read finished runs and compare them. -> a Section for each data set and network

    checkpoint: whose results; else `best`, or the only one of a folder that --evaluate wrote.
    Raises RunError for folders without a finished run, damaged files, and runs that do not belong together.
    """
    everything = [read_run(Path(folder), checkpoint) for folder in folders]
    check_together(everything)
    sections = defaultdict(list)
    for run in everything:
        sections[run.data, run.config["model"]].append(run)
    return [section(found) for found in sections.values()]


def read_run(folder, checkpoint=""):
    """results.json and scores.csv of a run. -> Run"""
    try:
        results = json.loads((folder / "results.json").read_text())
        with (folder / "scores.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found = list(results["checkpoints"])
        chosen = checkpoint or ("best" if "best" in found else found[0])
        run = as_run(folder, results, rows, chosen) if chosen in found else None
    except FileNotFoundError as error:
        raise RunError(f"{folder} holds no finished run, {Path(error.filename).name} is missing: finish it with --resume, or "
                       "leave it out") from error
    except (LookupError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise RunError(f"{folder}: results.json or scores.csv is damaged, or of another version ({error!r})") from error
    if run is None:
        raise RunError(f"{folder} has no results of checkpoint {checkpoint}, but of {', '.join(found)}")
    return run


def as_run(folder, results, rows, checkpoint):
    """The content of a run's files. -> Run; raises what content that is incomplete, or contradicts itself, makes it raise"""
    kinds = {"method": str, "model": str, "dataset": str, "fold": int, "seed": int, "image_size": int, "tau": (int, float)}
    for name, kind in kinds.items():
        if not isinstance(results["config"][name], kind):
            raise TypeError(name)
    means = {split: {measure: {"mean": float("nan" if score["mean"] is None else score["mean"]), "n": int(score["n"])}
                     for measure in MEASURES for score in [results["checkpoints"][checkpoint][split][measure]]} for split in SPLITS}
    scores = {(row["split"], row["centre"], row["name"]): Score(float(row["inverse_area"]), row["small"] == "1", float(row["dice"]),
                                                                float(row["lesion_dice"]))
              for row in rows if row["checkpoint"] == checkpoint}
    for split, measure in itertools.product(SPLITS, PAIRED):
        values = [value for key, score in scores.items() if key[0] == split and (value := score.of(measure)) is not None]
        score = means[split][measure]
        if len(values) != score["n"] or values and not math.isclose(np.mean(values), score["mean"], rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(f"they disagree on {measure} of {split}")
    return Run(folder, results["data"], results["config"], means, checkpoint, scores)


def check_together(everything):
    """Raise RunError for runs of a data set that were tested on different images."""
    first_of = {}
    for run in everything:
        dataset = run.config["dataset"]
        first = first_of.setdefault(dataset, run)
        if run.data != first.data:
            raise RunError(f"{run.folder} was tested on {run.data}, {first.folder} on {first.data}: compare them apart")
        if run.config["image_size"] != first.config["image_size"]:
            raise RunError(f"{run.folder} was tested on images of {run.config['image_size']}, {first.folder} on images of "
                           f"{first.config['image_size']} pixels a side: compare them apart")
        for split, part in (("in_test", run.config["fold"]), ("out_test", None)):
            other = first_of.setdefault((dataset, split, part), run)
            if test_images(run, split) != test_images(other, split):
                raise RunError(f"{run.folder} and {other.folder} have other {split.replace('_', '-')} images or size flags: "
                               "compare them apart")


def test_images(run, split):
    """{(split, centre, name): (inverse area, small)}"""
    return {key: (score.inverse_area, score.small) for key, score in run.scores.items() if key[0] == split}


def section(everything):
    """Group runs by what they differ in, and compare the groups. -> Section"""
    ignored = runs.FREE_ON_RESUME - {"rounds"} | {"method", "fold", "seed"}
    options = dict.fromkeys(name for run in everything for name in run.config if name not in ignored)
    differing = [name for name in options if len({str(run.config.get(name)) for run in everything}) > 1]
    groups = {}
    for run in everything:
        method = run.config["method"] if run.config["method"] != "unknown" else run.folder.name
        label = ", ".join([method, *(f"{name} {run.config.get(name)}" for name in differing)])
        same = [other for other in groups.setdefault(label, []) if other.part == run.part]
        if same:
            raise RunError(f"{run.folder} and {same[0].folder} are the same run: {label}, fold {run.part[0]}, seed {run.part[1]}")
        groups[label].append(run)
    groups = dict(sorted(groups.items()))
    one_tolerance = len({run.config.get("nsd_tolerance") for run in everything}) == 1
    summary = {(split, measure, label): over_runs(group, split, measure)
               for split, measure in itertools.product(SPLITS, MEASURES) if one_tolerance or measure not in SURFACES
               for label, group in groups.items()}
    differences = {(first, second, split, measure): paired_difference(groups[first], groups[second], split, measure)
                   for first, second in itertools.combinations(groups, 2) for split in SPLITS for measure in PAIRED}
    first, names = everything[0], dict.fromkeys(run.checkpoint for run in everything)
    return Section(f"{first.data}, {first.config['model']}, checkpoint {' and '.join(names)}", groups, summary, differences)


def over_runs(group, split, measure):
    """Mean and standard deviation (n - 1) of a measure over runs; NaN where there are too few."""
    scores = [run.means[split][measure] for run in group if run.means[split][measure]["n"]]
    counts = [score["n"] for score in scores] or [0]
    return {**mean_and_std([score["mean"] for score in scores]), "runs": len(scores), "n": (min(counts), max(counts))}


def mean_and_std(values):
    """The standard deviation is that of a sample (n - 1)."""
    mean, std = (np.mean(values) if len(values) else math.nan), (np.std(values, ddof=1) if len(values) > 1 else math.nan)
    return {"mean": float(mean), "std": float(std)}


def paired_difference(first, second, split, measure):
    """second - first, image by image, over pairs of their runs with the same fold and seed.

    -> {"runs": pairs, "images", "clusters", "mean", "std": of the pairs' mean differences, "low", "high", "p": see interval}
    The slices of a volume are one cluster, and so is an image of a data set without volumes.
    """
    pairs = [(a, b) for a in first for b in second if a.part == b.part]
    images, clusters = set(), defaultdict(lambda: np.zeros((2, len(pairs))))  # sums and counts, by pair
    for r, (a, b) in enumerate(pairs):
        for key, score in a.scores.items():
            if key[0] == split and score.of(measure) is not None:
                images.add(key)
                clusters[(*key[:2], key[2].partition("_slice-")[0])][:, r] += b.scores[key].of(measure) - score.of(measure), 1
    both = np.array(list(clusters.values())).reshape(len(clusters), 2, len(pairs))
    sums, counts = both.transpose(1, 0, 2)  # (clusters, pairs) each
    known = counts.sum(0) > 0
    return {"runs": len(pairs), "images": len(images), "clusters": len(sums),
            **mean_and_std(sums.sum(0)[known] / counts.sum(0)[known]), **interval(sums[:, known], counts[:, known])}


def interval(sums, counts):
    """How sure the mean of paired differences is. -> {"low", "high"}: its 95 % interval, {"p"}

    sums, counts (C, R): the differences of C clusters (images, or volumes) in R pairs of runs. The mean is that of the pairs'
    mean differences. Runs of one image are not independent, so that the bootstrap draws whole clusters (percentile
    interval, 9,999 samples), and the Wilcoxon signed-rank test (two-sided, zeros dropped) takes one number a cluster, its
    mean. NaN where there are too few clusters. Neither knows of other seeds, and p is not corrected for the number of tests.
    """
    from scipy import stats  # imported here: it is slow, and training does not need it

    if len(sums) < FEWEST:
        return {"low": math.nan, "high": math.nan, "p": math.nan}
    drawn = np.random.default_rng(0).integers(len(sums), size=(9999, len(sums)))
    drawn += len(sums) * np.arange(len(drawn))[:, None]  # so that one bincount counts for all samples
    times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)  # that a sample holds a cluster
    totals = times @ counts
    means = np.divide(times @ sums, totals, out=np.full(totals.shape, np.nan), where=totals > 0)  # of each pair of runs
    low, high = np.percentile(np.nanmean(means, axis=1), (2.5, 97.5))
    of_clusters = sums.sum(1) / counts.sum(1)
    p = stats.wilcoxon(of_clusters).pvalue if of_clusters.any() else 1.0
    return {"low": float(low), "high": float(high), "p": float(p)}


def report(sections, layout=aligned):
    """All tables of a comparison as text. layout: aligned or markdown"""
    blocks = []
    for title, groups, summary, differences in sections:
        blocks.append(f"{title}: mean ± standard deviation over runs; n: images, or lesions for recall, of a run")
        for split in SPLITS:
            labels = [f"{label} ({plural(len(group), 'run')})" for label, group in groups.items()]
            rows = [[split.replace("_", "-"), "n", *labels]]
            for measure, heading in MEASURES.items():
                cells = [summary[split, measure, label] for label in groups if (split, measure, label) in summary]
                counts = [n for score in cells for n in score["n"]]
                if measure not in SURFACES or any(counts):
                    span = str(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
                    rows.append([heading, span, *(plus_minus(score) for score in cells)])
            blocks.append(layout(rows))
        blocks += sorted({note for group in groups.values() for run in group if (note := surface_note(run.config))})
        for first, second in dict.fromkeys(key[:2] for key in differences):
            blocks.append(layout(difference_rows(first, second, differences)))
    if any(block.differences for block in sections):
        blocks.append(f"""Differences are paired over images and runs of the same fold and seed: their mean ± standard deviation over pairs of
runs, a 95 % bootstrap interval and the p of a Wilcoxon signed-rank test, both over images (LiTS: volumes) and from
{FEWEST} of them on. These tell what other images might have shown, not other seeds: for that see the spread over runs.
p is not corrected for the number of tests.""")
    return "\n\n".join(blocks)


def difference_rows(first, second, differences):
    """The table of one pair of methods."""
    pairs = differences[first, second, "in_test", "dice"]["runs"]
    rows = [[f"{second} - {first} ({plural(pairs, 'pair')} of runs)", "in-test", "p", "images", "out-test", "p", "images"]]
    for measure in PAIRED:
        cells = []
        for split in SPLITS:
            d = differences[first, second, split, measure]
            spread = "" if math.isnan(d["std"]) else f" ± {d['std']:.3f}"
            between = "" if math.isnan(d["low"]) else f" [{d['low']:+.3f}, {d['high']:+.3f}]"
            images = str(d["images"]) + (f" of {plural(d['clusters'], 'volume')}" if d["clusters"] < d["images"] else "")
            p = "–" if math.isnan(d["p"]) else f"{d['p']:.2g}"
            cells += [f"{d['mean']:+.3f}{spread}{between}", p, images] if d["images"] else ["–", "–", "0"]
        rows.append([MEASURES[measure], *cells])
    return rows


def plus_minus(score):
    """"0.512 ± 0.031", without ± for a single run, and a dash where there was nothing to average."""
    if not score["runs"]:
        return "–"
    return f"{score['mean']:.3f}" + ("" if math.isnan(score["std"]) else f" ± {score['std']:.3f}")


def plural(count, noun):
    return f"{count} {noun}" + ("s" if count != 1 else "")


def csv_rows(sections):
    """A comparison as rows for a file: means of a method, and differences of a method against another."""
    for title, _, summary, differences in sections:
        for (split, measure, label), score in summary.items():
            yield {"section": title, "split": split, "measure": measure, "method": label, "against": "", "runs": score["runs"],
                   "n": score["n"][1], "mean": score["mean"], "std": score["std"], "low": "", "high": "", "p": ""}
        for (first, second, split, measure), d in differences.items():
            yield {"section": title, "split": split, "measure": measure, "method": second, "against": first, "runs": d["runs"],
                   "n": d["images"], "mean": d["mean"], "std": d["std"], "low": d["low"], "high": d["high"], "p": d["p"]}


def draw(found):
    """A Section drawn: Dice against inverse area, and bars by size class and centre, and by size of lesion. -> Figure

    Raises RunError where no test image has a lesion.
    """
    everything = [run for group in found.groups.values() for run in group]
    sizes = {key: score.inverse_area for run in everything for key, score in run.scores.items()
             if math.isfinite(score.inverse_area)}
    if not sizes:
        raise RunError(f"{found.title}: no test image has a lesion, so there is nothing to draw")
    centres = sorted({key[:2] for run in everything for key in run.scores})
    points = {label: mean_scores(group, sizes) for label, group in found.groups.items()}

    def of_runs(value, *which):
        return {label: [value(run, *which) for run in group] for label, group in found.groups.items()}

    bars = {MEASURES[measure]: {f"C{centre}" + ("\n(held out)" if split == "out_test" else ""):
                                of_runs(of_centre, split, centre, measure) for split, centre in centres}
            for measure in ("dice_s", "dice_l")}
    bars["lesion recall"] = {heading.removeprefix("recall, "): of_runs(both_splits, measure)
                             for measure, heading in RECALL_BINS.items()}
    return plots.draw_comparison(found.title, everything[0].config["tau"], np.array(list(sizes.values())), points, bars)


def mean_scores(group, sizes):
    """The images of sizes, {image: inverse area}, that a group was tested on: inverse areas (n,), Dice (n,), the mean of runs."""
    dice = defaultdict(list)
    for run in group:
        for key in (key for key in sizes if key in run.scores):
            dice[key].append(run.scores[key].dice)
    return np.array([sizes[key] for key in dice]), np.array([np.mean(values) for values in dice.values()])


def of_centre(run, split, centre, measure):
    """(mean, number of images) of a measure in one centre."""
    values = [score.of(measure) for key, score in run.scores.items() if key[:2] == (split, centre)]
    values = [value for value in values if value is not None]
    return (np.mean(values), len(values)) if values else (math.nan, 0)


def both_splits(run, measure):
    """(mean, count) of a measure over in-test and out-test together."""
    scores = [run.means[split][measure] for split in SPLITS if run.means[split][measure]["n"]]
    count = sum(score["n"] for score in scores)
    return (sum(score["mean"] * score["n"] for score in scores) / count, count) if count else (math.nan, 0)


def main(arguments=None):
    """The command line. -> exit code: 0, or 2 for an error (one line on stderr)"""
    parser = argparse.ArgumentParser(prog="metrics.py", description="Methods side by side, and their paired differences.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--checkpoint", default="", help="which checkpoint's results: best (default), best_small")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true", help="print Markdown tables")
    how.add_argument("--csv", action="store_true", help="print all numbers as CSV")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the comparison, as .png, .pdf or .svg")
    options = parser.parse_args(arguments)
    try:
        if options.plot and options.plot.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise RunError(f"--plot {options.plot}: must end in .png, .pdf or .svg")
        sections = compare(options.runs, options.checkpoint)
        if options.plot and len(sections) > 1:
            raise RunError("--plot draws one data set and network at a time: " + "; ".join(found.title for found in sections))
        layout = markdown if options.markdown else aligned
        print(runs.to_csv(list(csv_rows(sections))).rstrip() if options.csv else report(sections, layout))
        if options.plot:
            runs.write(options.plot, draw(sections[0]))
    except (RunError, OSError) as error:
        print(f"metrics.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
