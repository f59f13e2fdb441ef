"""What tau and l would do to a training, in closed form, and what is suggested for them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import data
import fedgs
from tools import effects


def simulated(images, config, epochs):
    """Mean eta, and share of steps above 1, over the batches of many epochs."""
    generator = torch.Generator().manual_seed(1)
    etas = []
    for _ in range(epochs):
        for batch in fedgs.epoch_batches(images, config, generator):
            _, _, eta = fedgs.mask_difficulty(batch.masks, batch.small, config.log_base)
            etas.append(eta)
    etas = torch.stack(etas)
    return float(etas.mean()), float((etas > 1).double().mean())


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("batch_size", [2, 3])
def test_the_effect_is_that_of_many_epochs(varied, batch_size):
    config = fedgs.Config(batch_size=batch_size, log_base=20)
    eta, scaled = simulated(varied, config, epochs=800)
    effect = effects.effect_on(varied, varied.small, 20, batch_size)

    # Seven standard errors of either.
    assert effect.eta == pytest.approx(eta, abs=0.06)
    assert effect.scaled == pytest.approx(scaled, abs=0.06)
    assert effect.eta > 1.4
    assert effect.small == 2 / 6


def test_the_share_of_scaled_steps_in_cases_that_one_can_count():
    assert effects.expected_scaled(10, 0, 4) == 0
    assert effects.expected_scaled(10, 10, 4) == 1
    assert effects.expected_scaled(5, 2, 4) == 1  # a batch has no room for the others alone
    assert effects.expected_scaled(4, 1, 2) == pytest.approx(1 / 2)
    assert effects.expected_scaled(4, 2, 2) == pytest.approx(5 / 6)


def test_mean_eta_is_one_and_twice_the_mean_difficulty():
    assert effects.expected_eta(torch.tensor([0.0, 0.0, 0.25, 0.75])) == 1.5


def test_clients_count_by_their_steps():
    of_clients = {"A": effects.Effect(0.1, 0.2, 1.1), "B": effects.Effect(0.5, 0.6, 1.5)}
    total = effects.mean_effect(of_clients, {"B": 1, "A": 3, "too small": 0})
    assert total == pytest.approx((0.2, 0.3, 1.2))


def test_many_images_are_the_same_as_few(varied):
    many = varied.subset([0, 1, 2, 3, 4, 5, 6] * 20)
    few = effects.effect_on(varied, varied.small, 20, 1)
    assert effects.effect_on(many, many.small, 20, 1) == pytest.approx(few)


def test_images_without_a_lesion_are_no_share_of_anything(varied):
    empty = varied.subset([6])
    assert effects.effect_on(empty, empty.small, 20, 1) == (0, 0, 1)


# ---------------------------------------------------------------------------------- the suggestion


@pytest.mark.parametrize(("paper", "marked"), [(effects.POLYPGEN, 11), (effects.LITS, 20)])
def test_where_images_are_like_the_papers_so_is_the_suggestion(paper, marked):
    sizes = np.full(100, 5.0)
    sizes[:marked] = np.linspace(paper.tau + 1, 1e4, marked)
    np.random.default_rng(0).shuffle(sizes)
    assert effects.suggest(sizes, paper) == (paper.tau, paper.log_base)


def test_a_suggested_l_makes_a_lesion_at_tau_as_difficult_as_in_the_paper():
    tau, log_base = effects.suggest(np.geomspace(2, 3000, 500), effects.POLYPGEN)
    difficulty = math.tanh(math.log(tau, log_base) ** 2)
    assert difficulty == pytest.approx(0.829, abs=0.01)
    assert effects.POLYPGEN.difficulty == pytest.approx(0.829, abs=0.001)
    assert effects.LITS.difficulty == pytest.approx(math.tanh(1))


def test_large_lesions_have_a_suggestion_that_a_run_accepts():
    tau, log_base = effects.suggest(np.array([1.0]), effects.POLYPGEN)
    assert tau > 1 < log_base


@pytest.mark.parametrize(("x", "rounded"), [(156.2, 150), (9.99, 9.9), (1000, 1000), (2345, 2300)])
def test_two_digits_are_enough(x, rounded):
    assert effects.rounded_down(x) == rounded


# ------------------------------------------------------------------------------------ all clients


def test_clients_without_a_step_are_left_out(varied):
    federation = data.Federation("x", "", "", "", 16, "")
    federation.train = {"A": varied, "B": varied.subset([1, 2, 3])}
    for client, images in federation.train.items():
        federation.facts[client] = data.Facts(len(images), 0, 0, 0, 0, "")
    small = {client: images.small for client, images in federation.train.items()}

    # A takes one step of four images, B one of three.
    config = fedgs.Config(centres=("A", "B"), out_centre="", batch_size=4, local_epochs=1)
    found = effects.predict(config, federation, small)
    assert list(found) == ["A", "all"]
    assert found["all"] == found["A"]

    both = effects.predict(dataclasses.replace(config, batch_size=3), federation, small)
    assert list(both) == ["A", "B", "all"]
    assert both["all"].eta == pytest.approx((2 * both["A"].eta + both["B"].eta) / 3)
    assert effects.predict(dataclasses.replace(config, batch_size=8), federation, small) == {}
