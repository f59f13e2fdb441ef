"""What is minimised and what is measured: the losses, Dice by lesion size, lesions one by one.

Every measure of a test is a sum and a count. Adding the tallies of several clients therefore gives
exactly the mean over all their images, and no image, nor the score of one, has to leave its client.

Loss and scores of an image come first, then `score`, which measures a set of images with them.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

DISENTANGLED_WEIGHTS = {"dice": 10, "kl": 0.01, "latent": 1, "reconstruction": 1}

LESION_BINS = (0, 50, 150, 1000, math.inf)  # by 1/a of a lesion; 150 and 1000 are the tau in use
RECALL_BINS = {  # the ranges between them: name in files -> heading in tables
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
}

EIGHT_NEIGHBOURS = np.ones((3, 3))  # pixels that touch by a corner belong together


# ----------------------------------------------------------------------------------------- losses


def soft_dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """soft_dice of logits (B, 2, H, W)."""
    return soft_dice(logits.softmax(dim=1), masks)


def soft_dice(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice loss of a whole batch: 1 - (2 sum(p y) + 0.1) / (sum(p) + sum(y) + 0.1).

    probabilities (B, 2, H, W), of which p is the second channel, lesion; masks (B, 1, H, W), y = 1
    where there is lesion. -> 0-dim tensor
    """
    p = probabilities[:, 1:]
    y = masks.to(p.dtype)

    # One sum over the batch: the gradient follows the large lesions in it.
    overlap = (p * y).sum()
    total = p.sum() + y.sum()
    return 1 - (2 * overlap + 0.1) / (total + 0.1)


def disentangled_loss(
    parts: NamedTuple, images: Tensor, masks: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """SD-UTNet's training loss: find the lesion, give the image back, keep the code readable.

    parts: models.Decomposition of images (B, C, H, W), as the network saw them; masks (B, 1, H, W).
    -> the weighted sum (0-dim), and its terms, {name: 0-dim tensor}, which are not weighted.
    """
    # How far each image's N(mu, exp(log_variance)) is from N(0, 1).
    mu, log_variance = parts.mu, parts.log_variance
    divergence = -0.5 * (1 + log_variance - mu**2 - log_variance.exp()).sum(dim=1)

    terms = {
        "dice": soft_dice(parts.probabilities, masks),
        "kl": divergence.mean(),
        "latent": (parts.z_again - parts.z).abs().mean(),
        "reconstruction": (parts.reconstruction - images).abs().mean(),
    }
    weighted = [weight * terms[name] for name, weight in DISENTANGLED_WEIGHTS.items()]
    return sum(weighted), terms


# ---------------------------------------------------------------------------------- Dice of images


def dice_per_image(predicted: Tensor, truth: Tensor) -> Tensor:
    """2 TP / (2 TP + FP + FN) of each image; 1 where both masks are empty, 0 where only one is.

    predicted, truth (B, 1, H, W) bool -> (B,) float64
    """
    overlap = (predicted & truth).flatten(1).sum(dim=1)
    predicted_pixels = predicted.flatten(1).sum(dim=1)
    truth_pixels = truth.flatten(1).sum(dim=1)
    total = (predicted_pixels + truth_pixels).double()  # = 2 TP + FP + FN

    # 0 / 0, of two empty masks, is NaN.
    dice = 2 * overlap / total
    return torch.where(total > 0, dice, 1.0)


# --------------------------------------------------------------------------------- lesion by lesion


class Lesions(NamedTuple):
    """The lesions of one image, each against the prediction."""

    inverse_area: np.ndarray  # (n,) image pixels / pixels of the lesion
    dice: np.ndarray  # (n,) 0 for a lesion that was missed
    false_components: int  # predicted components that touch no lesion


def match_lesions(predicted: np.ndarray, truth: np.ndarray) -> Lesions:
    """Match the connected components of a prediction to those of the truth, the lesions.

    predicted, truth: (H, W) bool. A lesion is found if a predicted component overlaps it in any
    pixel; its Dice is taken against all the components that do, whole. As in the BraTS 2023
    challenge (Moawad et al., arXiv:2306.00838), but in 2D, without its dilation of lesions, and
    without its smallest volume: every lesion counts.
    """
    # Most lesions cover a small part of the image, and labelling takes time for every pixel.
    image_pixels = truth.size
    predicted, truth = cropped(predicted, truth)
    lesion_at, lesion_count = ndimage.label(truth, EIGHT_NEIGHBOURS)
    component_at, component_count = ndimage.label(predicted, EIGHT_NEIGHBOURS)

    # pixels[i, j] lie in lesion i and in component j; 0 is the background of either.
    pair_at = lesion_at * (component_count + 1) + component_at
    pixels = np.bincount(pair_at.ravel(), minlength=(lesion_count + 1) * (component_count + 1))
    pixels = pixels.reshape(lesion_count + 1, component_count + 1)

    lesion_pixels = pixels.sum(axis=1)[1:]
    component_pixels = pixels.sum(axis=0)[1:]
    overlap = pixels[1:, 1:]
    touching = overlap > 0

    # A component that touches a lesion counts whole, so that a prediction that spills over costs.
    touching_pixels = touching @ component_pixels
    dice = 2 * overlap.sum(axis=1) / (lesion_pixels + touching_pixels)

    false_components = component_count - touching.any(axis=0).sum()
    return Lesions(image_pixels / lesion_pixels, dice, int(false_components))


def cropped(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks, cut to the box around all that is in either."""
    either = predicted | truth
    rows = np.flatnonzero(either.any(axis=1))
    columns = np.flatnonzero(either.any(axis=0))
    if len(rows) == 0:
        return predicted[:0, :0], truth[:0, :0]

    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return predicted[box], truth[box]


def lesion_dice(lesions: Lesions) -> float:
    """Lesion-wise Dice of an image (BraTS 2023).

    The sum of its lesions' Dice / (lesions + false components), so that missed lesions and false
    components count 0. 1 where there is neither a lesion nor a prediction.
    """
    count = len(lesions.dice) + lesions.false_components
    if count == 0:
        return 1.0
    return float(lesions.dice.sum() / count)


# ---------------------------------------------------------------------------------------- surfaces


def surface_measures(
    predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """How far apart the boundaries of prediction and truth are. -> NSD, HD95

    predicted, truth: (H, W) bool; spacing: the distance between rows, and between columns, say in
    mm; tolerance in the same unit. Boundary pixels have one of their four neighbours outside the
    mask, or outside the image.

    NSD, normalised surface Dice (Nikolov et al., J Med Internet Res 23:e26151, 2021): the share of
    both boundaries that lies within the tolerance of the other. HD95: the larger of the two
    directed 95th percentiles of distances. Where only one mask is empty, NSD is 0 and HD95 NaN;
    where both are, both are NaN.
    """
    if not predicted.any() and not truth.any():
        return math.nan, math.nan
    if not predicted.any() or not truth.any():
        return 0.0, math.nan

    predicted, truth = cropped(predicted, truth)
    predicted_edge = boundary(predicted)
    truth_edge = boundary(truth)

    # A distance transform knows how far every pixel is from a boundary: read it along the other.
    from_truth = ndimage.distance_transform_edt(~truth_edge, sampling=spacing)
    from_predicted = ndimage.distance_transform_edt(~predicted_edge, sampling=spacing)
    to_truth = from_truth[predicted_edge]
    to_predicted = from_predicted[truth_edge]

    # A distance that equals the tolerance may have been rounded up by its square root.
    distances = np.concatenate([to_truth, to_predicted])
    nsd = (distances <= tolerance * (1 + 1e-6)).mean()

    hd95 = max(np.percentile(to_truth, 95), np.percentile(to_predicted, 95))
    return float(nsd), float(hd95)


def boundary(mask: np.ndarray) -> np.ndarray:
    """A mask's pixels with one of their four neighbours outside it."""
    # Erosion takes what lies beyond the image for background.
    return mask & ~ndimage.binary_erosion(mask)


# --------------------------------------------------------------------------------- a set of images


class Evaluation(NamedTuple):
    """What was predicted for a set of images, and how good it is."""

    predicted: Tensor  # (N, 1, H, W) bool
    dice: Tensor  # (N,) float64
    lesions: list[Lesions]  # of each image
    tally: Tensor  # (12, 2) float64, see tally


def score(predicted: Tensor, truth: Tensor, small: Tensor) -> Evaluation:
    """Measure predictions against the truth.

    predicted, truth (N, 1, H, W) bool; small (N,) bool: the image's lesion is small. On the CPU.
    """
    dice = dice_per_image(predicted, truth)
    lesions = []
    for one_predicted, one_truth in zip(predicted[:, 0].numpy(), truth[:, 0].numpy(), strict=True):
        lesions.append(match_lesions(one_predicted, one_truth))

    has_lesion = truth.flatten(1).any(dim=1)
    has_prediction = predicted.flatten(1).any(dim=1)
    sums = tally(dice, has_lesion, small, has_prediction, lesions)
    return Evaluation(predicted, dice, lesions, sums)


def tally(
    dice: Tensor,
    has_lesion: Tensor,
    small: Tensor,
    has_prediction: Tensor,
    lesions: Sequence[Lesions],
) -> Tensor:
    """Sum and count of every measure: (12, 2) float64, in the order of MEASURES. Tallies add up.

    dice (N,) float64; has_lesion, small, has_prediction (N,) bool; N Lesions. An image without a
    lesion is never small.
    """
    small = small & has_lesion

    # float64 throughout: adding up ten thousand scores must not cost the last digits of a table.
    by_lesion = torch.tensor([lesion_dice(image) for image in lesions], dtype=torch.float64)
    false_components = torch.tensor([image.false_components for image in lesions])

    # Recall counts lesions, wherever they are: those of all images in a row.
    inverse_area = joined([image.inverse_area for image in lesions])
    found = joined([image.dice for image in lesions]) > 0

    sums = {
        "dice_s": sum_and_count(dice[small]),
        "dice_l": sum_and_count(dice[has_lesion & ~small]),
        "dice_n": sum_and_count(dice[has_lesion]),
        "dice": sum_and_count(dice),
        "false_positive": sum_and_count(has_prediction[~has_lesion]),
        "lesion_dice": sum_and_count(by_lesion),
        "false_components": sum_and_count(false_components),
        "recall": sum_and_count(found),
    }
    for name, (low, high) in zip(RECALL_BINS, itertools.pairwise(LESION_BINS), strict=True):
        in_range = (inverse_area >= low) & (inverse_area < high)
        sums[name] = sum_and_count(found[in_range])
    return torch.stack([sums[name] for name in MEASURES])


def joined(arrays: Sequence[np.ndarray]) -> Tensor:
    """Arrays one after another, as one float64 tensor; there may be none."""
    return torch.from_numpy(np.concatenate([np.zeros(0), *arrays]))


def sum_and_count(values: Tensor) -> Tensor:
    """Values (n,) -> their sum and n, as a float64 pair."""
    return torch.tensor([values.sum().item(), len(values)], dtype=torch.float64)


def means(sums: Tensor) -> dict[str, dict]:
    """A tally (12, 2) -> {measure: {"mean": float, "n": int}}; NaN where n is 0."""
    found = {}
    for name, (total, n) in zip(MEASURES, sums.tolist(), strict=True):
        mean = total / n if n else math.nan
        found[name] = {"mean": mean, "n": int(n)}
    return found


if __name__ == "__main__":
    print("metrics.py: compare runs with `python -m tools.compare RUN…`", file=sys.stderr)
    sys.exit(2)
