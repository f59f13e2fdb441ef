"""Properties that hold for any argument, on examples that hypothesis draws.

The examples are the same in every run of the tests, so that a failure can be repeated.
"""

import itertools
import math
from dataclasses import fields

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import data
import fedgs
import metrics
from fedgs import Config
from support import options

try:
    import csrc
except ImportError:
    csrc = None

few = hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
compiled = pytest.mark.skipif(csrc is None, reason="the kernels are not compiled")
on_both = pytest.mark.parametrize(
    "kernels",
    [pytest.param(fedgs, id="definition"), pytest.param(csrc, id="compiled", marks=compiled)],
)

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 40)
log_bases = st.floats(1.001, 1e6)
DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float32)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------- difficulty


@st.composite
def batches(draw):
    """Masks (B, H, W) uint8 with lesions of any size, none included, and flags (B,)."""
    shape = draw(st.tuples(st.integers(1, 6), sides, sides))
    generator = generator_of(draw(seeds))
    share = torch.rand(shape[0], 1, 1, generator=generator) ** 3
    masks = (torch.rand(shape, generator=generator) < share).to(torch.uint8)
    small = torch.rand(shape[0], generator=generator) < 0.7
    return masks, small


@on_both
@few
@given(batch=batches(), log_base=log_bases)
def test_eta_is_in_its_range(kernels, batch, log_base):
    masks, small = batch
    area, difficulty, eta = kernels.mask_difficulty(masks, small, log_base)
    assert area.tolist() == masks.flatten(1).sum(1).tolist()
    assert ((difficulty >= 0) & (difficulty <= 1)).all()
    assert (difficulty[~small | (area == 0)] == 0).all()
    assert 1 <= eta <= 3
    assert eta.item() == pytest.approx(1 + 2 * difficulty.double().mean().item(), rel=1e-6)


@on_both
@few
@given(batch=batches(), log_base=log_bases, seed=seeds)
def test_the_order_of_images_does_not_matter(kernels, batch, log_base, seed):
    masks, small = batch
    order = torch.randperm(len(masks), generator=generator_of(seed))
    area, difficulty, eta = kernels.mask_difficulty(masks, small, log_base)
    moved = kernels.mask_difficulty(masks[order], small[order], log_base)
    assert torch.equal(moved[0], area[order])
    assert torch.equal(moved[1], difficulty[order])
    torch.testing.assert_close(moved[2], eta, rtol=1e-6, atol=0)  # another order of a sum


@on_both
@few
@given(batch=batches(), log_base=log_bases)
def test_the_type_of_masks_does_not_matter(kernels, batch, log_base):
    masks, small = batch
    expected = kernels.mask_difficulty(masks, small, log_base)
    for dtype, value in itertools.product(DTYPES, (1, 255)):
        same = (masks.to(dtype) * value).to(dtype)
        found = kernels.mask_difficulty(same[:, None], small, log_base)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b), (dtype, value)


@on_both
@few
@given(side=sides, log_base=log_bases)
def test_a_smaller_lesion_is_no_less_difficult(kernels, side, log_base):
    pixels = side * side
    masks = torch.arange(pixels) < torch.arange(1, pixels + 1)[:, None]
    masks = masks.view(pixels, side, side)
    _, difficulty, _ = kernels.mask_difficulty(masks, torch.ones(pixels), log_base)
    assert (difficulty.diff() <= 0).all()
    assert difficulty[-1].item() == pytest.approx(0, abs=1e-12)  # all of the image


@on_both
@few
@given(batch=batches(), log_base=log_bases)
def test_difficulty_is_the_papers_in_float64(kernels, batch, log_base):
    masks, small = batch
    _, difficulty, _ = kernels.mask_difficulty(masks, small, log_base)
    for i, mask in enumerate(masks):
        expected = 0.0
        if small[i] and mask.any():
            logarithm = math.log(mask.numel() / mask.sum().item(), log_base)
            expected = math.tanh(logarithm**2)
        assert difficulty[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


# --------------------------------------------------------------------------------------------- step


@st.composite
def optimisers(draw):
    """Hyperparameters of AdamW, as keywords."""
    return {
        "lr": draw(st.floats(1e-6, 0.1)),
        "betas": (draw(st.floats(0, 0.99)), draw(st.floats(0.5, 0.9999))),
        "eps": draw(st.floats(1e-10, 1e-2)),
        "weight_decay": draw(st.floats(0, 0.5)),
    }


def random_steps(seed, count, size):
    """theta (P,), gradients (steps, P) of many sizes, etas (steps,)."""
    generator = generator_of(seed)
    theta = torch.randn(size, generator=generator)
    sizes = torch.logspace(-4, 2, count)[:, None]
    grads = torch.randn(count, size, generator=generator) * sizes
    etas = 1 + 2 * torch.rand(count, generator=generator)
    return theta, grads, etas


@on_both
@few
@given(seed=seeds, count=st.integers(1, 8), size=st.integers(1, 300), how=optimisers())
def test_a_step_is_pytorchs_adamw(kernels, seed, count, size, how):
    theta, grads, etas = random_steps(seed, count, size)
    reference = torch.nn.Parameter(theta.clone())
    optimiser = torch.optim.AdamW([reference], **how, foreach=False)
    m, v, update = torch.zeros(3, size)
    for step, (grad, eta) in enumerate(zip(grads, etas, strict=True), start=1):
        reference.grad = grad.clone()
        optimiser.step()
        kernels.adamw_accumulate_(
            theta, grad, m, v, torch.tensor(step), update=update, eta=eta, **how
        )
    close = 1e-6 * count * max(1.0, how["lr"] / 1e-3)
    torch.testing.assert_close(theta, reference.detach(), rtol=1e-5, atol=close)


@on_both
@few
@given(seed=seeds, count=st.integers(1, 8), size=st.integers(1, 5000), how=optimisers())
def test_steps_and_updates_are_the_papers_in_float64(kernels, seed, count, size, how):
    theta, grads, etas = random_steps(seed, count, size)
    m, v, update = torch.zeros(3, size)
    expected = theta.double()
    expected_update = torch.zeros(size, dtype=torch.float64)
    mean, square = torch.zeros(2, size, dtype=torch.float64)
    lr, (beta1, beta2), eps = how["lr"], how["betas"], how["eps"]

    for step, (grad, eta) in enumerate(zip(grads, etas, strict=True), start=1):
        kernels.adamw_accumulate_(
            theta, grad, m, v, torch.tensor(step), update=update, eta=eta, **how
        )
        mean = beta1 * mean + (1 - beta1) * grad.double()
        square = beta2 * square + (1 - beta2) * grad.double() ** 2
        root = (square / (1 - beta2**step)).sqrt() + eps
        s = lr * mean / (1 - beta1**step) / root
        expected = expected * (1 - lr * how["weight_decay"]) - s
        expected_update += eta.double() * s

    close = 1e-6 * count * max(1.0, lr / 1e-3)
    torch.testing.assert_close(theta.double(), expected, rtol=1e-5, atol=close)
    torch.testing.assert_close(update.double(), expected_update, rtol=1e-5, atol=close)


@compiled
@few
@given(seed=seeds, count=st.integers(1, 8), size=st.integers(1, 5000), how=optimisers())
def test_compiled_steps_are_their_definition(seed, count, size, how):
    theta, grads, etas = random_steps(seed, count, size)
    vectors = [theta, *torch.zeros(3, size)]
    same = [x.clone() for x in vectors]
    for step, (grad, eta) in enumerate(zip(grads, etas, strict=True), start=1):
        for kernels, (theta, m, v, update) in ((fedgs, vectors), (csrc, same)):
            kernels.adamw_accumulate_(
                theta, grad, m, v, torch.tensor(step), update=update, eta=eta, **how
            )
    for found, expected in zip(same, vectors, strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * largest)


# -------------------------------------------------------------------------------------- aggregation


@st.composite
def rounds(draw):
    """total (P,), K updates (P,) and K weights."""
    clients = draw(st.integers(1, 9))
    size = draw(st.integers(1, 5000))
    generator = generator_of(draw(seeds))
    total = torch.randn(size, generator=generator)
    updates = list(torch.randn(clients, size, generator=generator))
    weights = draw(st.lists(st.floats(-2, 2), min_size=clients, max_size=clients))
    return total, updates, weights


@on_both
@few
@given(round_=rounds())
def test_aggregate_is_a_weighted_sum(kernels, round_):
    total, updates, weights = round_
    result, squared_norms, finite = kernels.aggregate(total, updates, weights)
    expected = total.double()
    for update, weight in zip(updates, weights, strict=True):
        expected = expected + weight * update.double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)

    squares = torch.stack([update.double().square().sum() for update in updates])
    torch.testing.assert_close(squared_norms, squares, rtol=1e-10, atol=0)
    assert finite.all()


@on_both
@few
@given(round_=rounds(), factor=st.floats(-3, 3))
def test_aggregate_is_linear(kernels, round_, factor):
    total, updates, weights = round_
    nothing = torch.zeros_like(total)
    once, _, _ = kernels.aggregate(nothing, updates, weights)
    scaled, _, _ = kernels.aggregate(nothing, [factor * update for update in updates], weights)
    torch.testing.assert_close(scaled, factor * once, rtol=1e-4, atol=1e-4)

    weighted, _, _ = kernels.aggregate(nothing, updates, [factor * weight for weight in weights])
    torch.testing.assert_close(weighted, scaled, rtol=1e-4, atol=1e-4)

    moved, _, _ = kernels.aggregate(total, updates, weights)
    torch.testing.assert_close(moved, total + once, rtol=1e-4, atol=1e-4)


@on_both
@few
@given(round_=rounds(), first=st.integers(1, 8))
def test_groups_of_updates_do_not_change_a_bit(kernels, round_, first):
    """The server has eight updates in memory at a time, however many clients there are."""
    total, updates, weights = round_
    whole, norms, _ = kernels.aggregate(total, updates, weights)
    found = []
    for start in range(0, len(updates), first):
        group = slice(start, start + first)
        total, some, _ = kernels.aggregate(total, updates[group], weights[group])
        found.append(some)
    assert torch.equal(total, whole)
    assert torch.equal(torch.cat(found), norms)


# ------------------------------------------------------------------------------------------- splits


@st.composite
def groups_of_images(draw):
    """Indices 0 … N - 1 in groups that stay together, and N."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=60))
    order = draw(st.permutations(range(sum(sizes))))
    ends = list(itertools.accumulate(sizes))
    units = [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return units, sum(sizes)


@few
@given(drawn=groups_of_images(), split=st.sampled_from(["fold", "centre", "grouped"]))
def test_a_split_is_a_partition_that_keeps_groups_whole(drawn, split):
    units, count = drawn
    folds = (1,) if split == "centre" else (1, 2, 3, 4, 5)
    for fold in folds:
        parts = data.split_units(units, split, fold)
        assert sorted(itertools.chain(*parts)) == list(range(count))
        for unit in units:
            inside = [set(unit) <= set(part) for part in parts]
            assert sum(inside) == 1, unit
        assert parts == data.split_units(units, split, fold)  # the same for everyone


@few
@given(drawn=groups_of_images(), split=st.sampled_from(["fold", "grouped"]))
def test_five_folds_test_and_validate_every_image_once(drawn, split):
    units, count = drawn
    held = []
    for fold in range(1, 6):
        _, validation, test = data.split_units(units, split, fold)
        held += validation + test
    assert sorted(held) == list(range(count))


# ----------------------------------------------------------------------------------------- measures


@st.composite
def predictions(draw):
    """Predictions and truths (N, 1, H, W) bool, and flags (N,)."""
    shape = draw(st.tuples(st.integers(0, 6), st.just(1), st.integers(1, 16), st.integers(1, 16)))
    generator = generator_of(draw(seeds))
    share = torch.rand(2, shape[0], 1, 1, 1, generator=generator) ** 2
    predicted, truth = torch.rand(2, *shape, generator=generator) < share
    small = torch.rand(shape[0], generator=generator) < 0.5
    return predicted, truth, small


@few
@given(drawn=predictions(), more=st.data())
def test_tallies_of_parts_add_up(drawn, more):
    predicted, truth, small = drawn
    cut = more.draw(st.integers(0, len(truth)))
    whole = metrics.score(predicted, truth, small).tally
    first = metrics.score(predicted[:cut], truth[:cut], small[:cut]).tally
    second = metrics.score(predicted[cut:], truth[cut:], small[cut:]).tally
    both = first + second
    assert torch.equal(both[:, 1], whole[:, 1])
    torch.testing.assert_close(both, whole, rtol=1e-12, atol=1e-12)
    for found in metrics.means(whole).values():
        assert math.isnan(found["mean"]) == (found["n"] == 0)


@few
@given(drawn=predictions())
def test_measures_of_the_truth_itself(drawn):
    _, truth, small = drawn
    found = metrics.means(metrics.score(truth, truth, small).tally)
    for name in ("dice", "dice_s", "dice_l", "dice_n", "lesion_dice", "recall"):
        assert found[name]["n"] == 0 or found[name]["mean"] == 1
    for name in ("false_positive", "false_components"):
        assert found[name]["n"] == 0 or found[name]["mean"] == 0


@few
@given(drawn=predictions())
def test_dice_is_symmetric_and_in_its_range(drawn):
    predicted, truth, _ = drawn
    dice = metrics.dice_per_image(predicted, truth)
    assert torch.equal(dice, metrics.dice_per_image(truth, predicted))
    assert ((dice >= 0) & (dice <= 1)).all()


# ------------------------------------------------------------------------------------------ options

# Letters as people name folders with; a value that begins with a dash would be an option.
texts = st.text("abc XYZ019_./=η-", max_size=12).filter(lambda text: not text.startswith("-"))


def values_of(f):
    """What a field of Config may hold."""
    if f.name == "dataset":
        return st.sampled_from(list(data.CENTRES))
    if isinstance(f.default, tuple):
        some = {"centres": data.CENTRES["polypgen"], "lesion": (1, 2, 255), "window": (-9.5, 1.0)}
        return st.lists(st.sampled_from(some[f.name]), min_size=1, unique=True).map(tuple)
    if f.metadata.get("choices"):
        return st.sampled_from(f.metadata["choices"])
    if isinstance(f.default, bool):
        return st.booleans()
    if isinstance(f.default, int):
        return st.integers(0, 2**62)
    if isinstance(f.default, float):
        return st.floats(0, 1e300)
    return texts


def command_line(config):
    """What a person types to get exactly this configuration."""
    arguments = []
    for f in fields(Config):
        value = getattr(config, f.name)
        option = options.spelling(f.name)
        if isinstance(f.default, tuple):
            arguments += [option, *map(str, value)]
        elif isinstance(f.default, bool):
            arguments += [option] if value else []
        else:
            arguments.append(f"{option}={value}")
    return arguments


configs = st.builds(Config, **{f.name: values_of(f) for f in fields(Config)})


@few
@given(config=configs)
def test_a_command_line_gives_its_configuration_back(config):
    found = options.parse(Config, "", command_line(config), {})
    assert Config(**options.with_tuples(Config, found)) == config


@few
@given(config=configs)
def test_what_is_given_is_stronger_than_data_set_and_preset(config):
    """fedgs.configure fills in what a command line leaves out, and nothing else."""
    given_options = options.parse(Config, "", command_line(config), {})
    given_options["data_root"] = "stand-in"
    found, _ = fedgs.configure(given_options)
    for name, value in options.with_tuples(Config, given_options).items():
        if (name, value) != ("preset", "auto"):
            assert getattr(found, name) == value, name

    filled = {**fedgs.DATASETS[config.dataset], **fedgs.PRESETS[found.preset]}
    for f in fields(Config):
        if f.name not in given_options and f.name != "preset":
            assert getattr(found, f.name) == filled.get(f.name, f.default), f.name
