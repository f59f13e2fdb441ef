"""What is minimised and what is measured: the loss, Dice by lesion size, tables of a run.

Every measure is a sum and a count, so that adding the tallies of clients gives exactly the mean over all
their images, without an image (or a score of one) leaving its client.
"""

import math

import torch

MEASURES = {  # name in files -> heading in tables; the paper's Dice_S and Dice_L first
    "dice_s": "Dice_S",  # images with a small lesion
    "dice_l": "Dice_L",  # images with a lesion that is not small
    "dice_n": "Dice_N",  # all images with a lesion
    "dice": "Dice",  # all images
    "false_positive": "FP rate",  # images without a lesion in which one was predicted
}


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


def tally(dice, lesion, small, predicted):
    """Sums and counts of the five measures: (5, 2) float64, in the order of MEASURES. Tallies add up.

    dice (N,) float64; lesion, small, predicted (N,) bool: the truth has a lesion, the lesion is small,
    the prediction is not empty. An image without a lesion is never small.
    """
    small = small & lesion
    everything = torch.ones_like(lesion)
    rows = [(dice, small), (dice, lesion & ~small), (dice, lesion), (dice, everything), (predicted.double(), ~lesion)]
    return torch.stack([torch.stack([value[kind].sum(), kind.sum().double()]) for value, kind in rows]).cpu()


def means(sums):
    """A (5, 2) tally -> {measure: {"mean": float, "n": int}}; NaN with n = 0 where there is nothing to average."""
    return {
        name: {"mean": total / n if n else math.nan, "n": int(n)}
        for name, (total, n) in zip(MEASURES, sums.tolist(), strict=True)
    }


# ---------------------------------------------------------------------------------------------- table


def table(results):
    """The final table as text: one row for each checkpoint and test split, each cell a mean and its count.

    results: {checkpoint: {"round": int, "in_test": means, "out_test": means}}
    """
    lines = [f"{'checkpoint':<23}{'test':<9}" + "".join(f"{heading:>15}" for heading in MEASURES.values())]
    for checkpoint, result in results.items():
        for split in ("in_test", "out_test"):
            label = f"{checkpoint} (round {result['round']})" if split == "in_test" else ""
            cells = "".join(f"{cell(result[split][name]):>15}" for name in MEASURES)
            lines.append(f"{label:<23}{split.replace('_', '-'):<9}{cells}")
    return "\n".join(lines)


def cell(score):
    """{"mean", "n"} -> "0.812 (n=9)", or a dash where there was nothing to average."""
    return f"{score['mean']:.3f} (n={score['n']})" if score["n"] else "– (n=0)"
