"""What tau and l would do to a training, before there is one, and a suggestion for both.

eta follows from masks and size flags alone. So its mean over a client's steps, and how many steps
it scales, are known in closed form. Augmentation, which may turn a lesion partly out of view, is
left out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import fedgs


class Effect(NamedTuple):
    """What a choice of tau and l would do."""

    small: float  # share of the training images with a lesion
    scaled: float  # share of the steps
    eta: float  # mean over the steps


def expected_eta(difficulty: Tensor) -> float:
    """Mean eta of a client's steps, from the difficulties (N,) of its N training images."""
    # eta of a batch is 1 + 2 x the mean of its difficulties, and every image is as likely to be in
    # it as any other: the size of batches does not matter.
    return 1 + 2 * float(difficulty.double().mean())


def expected_scaled(count: int, difficult: int, batch_size: int) -> float:
    """Share of a client's steps with eta > 1, where so many of its images are difficult."""
    # A batch is drawn without replacement: the chance that it holds none of them is hypergeometric.
    batches = math.comb(count, batch_size)
    without = math.comb(count - difficult, batch_size)
    return 1 - without / batches


def effect_on(images: data.Images, small: Tensor, log_base: float, batch_size: int) -> Effect:
    """The effect on a client. images: those it trains on; small: which of them count so (N,)"""
    # Images without a lesion say nothing of tau.
    with_lesion = int(images.inverse_area.isfinite().sum())
    share = int(small.sum()) / max(with_lesion, 1)

    # The method's own function tells the difficulties, of a few images at a time: it needs eight
    # bytes for each pixel.
    parts = []
    for masks, flags in zip(images.masks.split(64), small.split(64), strict=True):
        _, difficulties, _ = fedgs.mask_difficulty(masks, flags, log_base)
        parts.append(difficulties)
    difficulty = torch.cat(parts)

    difficult = int((difficulty > 0).sum())
    scaled = expected_scaled(len(images), difficult, batch_size)

    eta = expected_eta(difficulty)
    return Effect(share, scaled, eta)


def mean_effect(effects: Mapping[str, Effect], weights: Mapping[str, int]) -> Effect:
    """The mean over clients, {client: weight}."""
    shares = [weights[client] for client in effects]
    of_clients = np.array(list(effects.values()))
    small, scaled, eta = np.average(of_clients, axis=0, weights=shares).tolist()
    return Effect(small, scaled, eta)


def predict(
    config: fedgs.Config, federation: data.Federation, small: Mapping[str, Tensor]
) -> dict[str, Effect]:
    """What l does where these images count as small, {client: (N,) bool} of training images.

    -> {client: effect}, and the effect on "all" steps of a round. Empty where no client has enough
    images for a batch.
    """
    # Clients without a step are left out: nothing there is scaled, or not.
    steps = fedgs.client_steps(config, federation.facts)
    effects = {}
    for client, images in federation.train.items():
        if steps[client]:
            flags = small[client]
            effects[client] = effect_on(images, flags, config.log_base, config.batch_size)

    # The server weights updates by their steps, so each step counts once.
    if effects:
        effects["all"] = mean_effect(effects, steps)
    return effects


# ---------------------------------------------------------------------------------- the suggestion


class Paper(NamedTuple):
    """The paper's choice for a data set."""

    name: str
    small: float  # share of the images with a lesion that it marks
    tau: float
    log_base: float

    @property
    def difficulty(self) -> float:
        """Of an image whose 1/a is tau."""
        logarithm = math.log(self.tau, self.log_base)
        return math.tanh(logarithm**2)


# The shares are those of the real data: PolypGen's published flags, LiTS's kept slices.
POLYPGEN = Paper("PolypGen", 0.11, tau=150, log_base=100)
LITS = Paper("LiTS", 0.20, tau=1000, log_base=1000)


def suggest(smallest: Sequence[float], paper: Paper) -> tuple[float, float]:
    """tau that marks as many images as the paper's, and l for which tau is as difficult.

    smallest: what tau is compared with, of every training image with a lesion (n,).
    """
    # tau is the size of the k-th smallest lesion. Rounded down, it still marks all k.
    k = max(1, round(paper.small * len(smallest)))
    ordered = np.sort(smallest)
    tau = rounded_down(ordered[-k])

    # Where all lesions are large this would be no threshold.
    tau = max(2.0, tau)

    # log_l(tau) has to be what it is in the paper.
    exponent = math.log(paper.log_base) / math.log(paper.tau)
    log_base = float(f"{tau**exponent:.2g}")
    return tau, max(1.5, log_base)


def rounded_down(x: float) -> float:
    """To two digits, as more would claim too much: 156.2 -> 150."""
    digits = math.floor(math.log10(x)) + 1
    unit = 10.0 ** (digits - 2)
    rounded = math.floor(x / unit) * unit
    return float(f"{rounded:.2g}")
