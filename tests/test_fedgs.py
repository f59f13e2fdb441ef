"""The method and the federation, in the order of fedgs.py: operations, client, server, a run."""

import copy
import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import (
    ROOT,
    TINY,
    assert_same_weights,
    exit_code,
    refused,
    rows,
    square_images,
    without_time,
)
from PIL import Image

import data
import fedgs
import metrics
from fedgs import (
    PYTORCH,
    Batch,
    ClientLog,
    Config,
    FlatNetwork,
    LocalClients,
    Server,
    Update,
    adamw_accumulate_,
    aggregate,
    batch_gradient,
    mask_difficulty,
    state_of,
    train_client,
)
from models import SDUTNet, UTNet
from support import checkpoints, pictures, runs
from support.errors import UserError
from support.files import to_json
from tools import evaluate

pytestmark = pytest.mark.usefixtures("plain_pictures")

CONFIG = Config(
    local_epochs=2,
    batch_size=2,
    lr=1e-3,
    image_size=32,
    width=2,
    centres=("C1", "C2", "C3", "C6"),
    precision="fp32",
)


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "batch_norm"),
    [
        ({"method": "fedgs"}, "averaged"),
        ({"method": "fedbn"}, "local"),
        ({"method": "fedbn", "batch_norm": "averaged"}, "averaged"),
    ],
)
def test_what_batch_norm_a_method_is_validated_with(options, batch_norm):
    config, _ = fedgs.configure({"data_root": "stand-in", **options})
    assert config.batch_norm == batch_norm


def test_a_config_is_a_plain_value(monkeypatch):
    """Making one asks nothing of the machine, and nothing can be changed in it."""
    monkeypatch.setattr(torch.cuda, "is_available", None)
    config = Config()
    assert (config.rounds, config.local_epochs, config.batch_size) == (100, 5, 4)
    assert (config.lr, config.image_size, config.width) == (1e-4, 512, 32)
    assert (config.log_base, config.tau, config.precision) == (100, 150, "auto")
    with pytest.raises(AttributeError):
        config.rounds = 1


def test_given_options_come_before_the_preset_and_the_data_set():
    config, why = fedgs.configure({"preset": "quick", "rounds": 2, "data_root": "stand-in"})
    assert (config.rounds, config.width, why) == (2, fedgs.PRESETS["quick"]["width"], "as asked")

    config, _ = fedgs.configure({"preset": "paper", "dataset": "lits", "tau": 500.0})
    assert (config.rounds, config.log_base, config.tau) == (60, 1000, 500)
    assert (config.centres, config.out_centre) == (data.CENTRES["lits"], "C5")
    assert config.split == "centre"

    config, _ = fedgs.configure({"preset": "quick", "dataset": "lits"})
    assert (config.rounds, config.tau) == (fedgs.PRESETS["quick"]["rounds"], 1000)


def test_the_preset_follows_data_and_hardware(square_root, monkeypatch):
    real = {"data_root": str(square_root)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fedgs.configure(real)[0].preset == "paper"
    assert fedgs.configure({**real, "device": "cpu"})[0].preset == "quick"
    assert fedgs.configure({"data_root": "stand-in"})[0].preset == "quick"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fedgs.configure(real)[0].preset == "quick"


# --------------------------------------------------------------------------------------- difficulty


def masks_of(areas, height, width, dtype=torch.uint8):
    """Masks (B, 1, height, width) with these numbers of lesion pixels."""
    masks = torch.zeros(len(areas), height * width, dtype=dtype)
    for mask, area in zip(masks, areas, strict=True):
        mask[:area] = 1
    return masks.view(-1, 1, height, width)


@pytest.mark.parametrize(
    ("log_base", "expected"),
    [(100, [0.9326720054, 0.1003519069]), (1000, [0.6327675588, 0.0447216258])],
)
def test_difficulties_of_worked_examples(log_base, expected):
    masks = masks_of([21, 1900], 64, 128)
    area, difficulty, eta = mask_difficulty(masks, torch.tensor([True, True]), log_base)
    assert area.tolist() == [21, 1900]
    assert area.dtype == torch.int64
    assert difficulty.tolist() == pytest.approx(expected, rel=1e-6)
    assert eta.item() == pytest.approx(1 + sum(expected), rel=1e-6)


def test_difficulties_have_all_digits_of_float32():
    masks = torch.zeros(250, 256, dtype=torch.uint8)
    for i, mask in enumerate(masks):
        mask[: i + 1] = 1  # areas of 1 to 250 pixels
    _, difficulty, _ = mask_difficulty(masks.view(-1, 16, 16), torch.ones(250), 150)
    logs = [math.log(256 / area) / math.log(150) for area in range(1, 251)]
    expected = [math.tanh(x**2) for x in logs]
    assert difficulty.tolist() == pytest.approx(expected, rel=7e-8, abs=0)


def test_step_scale_of_a_worked_example():
    _, difficulty, eta = mask_difficulty(masks_of([50], 512, 512), torch.tensor([True]), 100)
    assert difficulty.item() == pytest.approx(0.9980215523, rel=1e-6)
    assert eta.item() == pytest.approx(2.9960431045, rel=1e-6)


def test_only_small_lesions_in_view_are_difficult():
    masks = masks_of([3, 3, 0, 64 * 64], 64, 64)
    area, difficulty, eta = mask_difficulty(masks, torch.tensor([True, False, True, True]), 100)
    assert area.tolist() == [3, 3, 0, 4096]
    assert difficulty[0] > 0
    assert difficulty[1:].tolist() == [0, 0, 0]
    assert eta.item() == pytest.approx(1 + 2 / 4 * difficulty[0].item())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("value", [1, 255])
def test_any_mask_type(dtype, value):
    masks = (masks_of([5, 77], 16, 32, torch.int64) * value).to(dtype)
    small = torch.tensor([True, True])
    expected = mask_difficulty(masks_of([5, 77], 16, 32), small, 100)
    for given in (masks, masks[:, 0]):  # with and without a channel
        for a, b in zip(mask_difficulty(given, small, 100), expected, strict=True):
            assert torch.equal(a, b)


def test_no_image_has_scale_one():
    no_flags = torch.zeros(0, dtype=torch.bool)
    area, difficulty, eta = mask_difficulty(torch.zeros(0, 1, 8, 8), no_flags, 100)
    assert area.shape == difficulty.shape == (0,)
    assert eta.item() == 1


# --------------------------------------------------------------------------------------------- step


def gradients(steps, size, generator):
    """Gradients (steps, size) from tiny to large."""
    return torch.randn(steps, size, generator=generator) * torch.logspace(-6, 2, size)


def test_step_is_adamw(generator):
    start = torch.randn(1000, generator=generator)
    reference = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.AdamW([reference], lr=1e-3)  # PyTorch's defaults are the paper's
    theta = start.clone()
    m, v, update = torch.zeros(3, 1000)
    for step, grad in enumerate(gradients(20, 1000, generator), start=1):
        reference.grad = grad.clone()
        optimiser.step()
        adamw_accumulate_(theta, grad, m, v, torch.tensor(step), 1e-3, update, torch.tensor(1.7))
        torch.testing.assert_close(theta, reference.detach(), rtol=1e-7, atol=1e-7)


def test_accumulated_update_is_its_closed_form(generator):
    """Delta = sum_t eta_t lr m_hat_t / (sqrt(v_hat_t) + eps), without the decay."""
    lr = 1e-3
    grads = gradients(12, 500, generator)
    etas = 1 + 2 * torch.rand(12, generator=generator)
    theta, m, v, update = torch.zeros(4, 500)
    theta += 100  # decay would show
    for step, (grad, eta) in enumerate(zip(grads, etas, strict=True), start=1):
        adamw_accumulate_(theta, grad, m, v, torch.tensor(step), lr, update, eta)

    expected = torch.zeros(500, dtype=torch.float64)
    grads = grads.double()
    for t in range(1, 13):
        powers = torch.arange(t - 1, -1, -1, dtype=torch.float64)[:, None]
        m_hat = (0.1 * 0.9**powers * grads[:t]).sum(0) / (1 - 0.9**t)
        v_hat = (0.001 * 0.999**powers * grads[:t] ** 2).sum(0) / (1 - 0.999**t)
        expected += etas[t - 1].double() * lr * m_hat / (v_hat.sqrt() + 1e-8)
    largest = expected.abs().max().item()
    torch.testing.assert_close(update.double(), expected, rtol=1e-6, atol=1e-6 * largest)


def test_scaling_leaves_local_training_untouched(generator):
    plain, scaled = torch.ones(2, 100)
    plain_m, plain_v, m, v, update = torch.zeros(5, 100)
    for number, grad in enumerate(gradients(5, 100, generator), start=1):
        step = torch.tensor(number)
        adamw_accumulate_(plain, grad, plain_m, plain_v, step, 1e-2)
        adamw_accumulate_(scaled, grad, m, v, step, 1e-2, update, torch.tensor(3.0))
    assert torch.equal(plain, scaled)


# -------------------------------------------------------------------------------------- aggregation


def test_aggregate(generator):
    total, *updates = torch.randn(4, 1000, generator=generator)
    weights = [0.5, 0.2, 0.3]
    before = total.clone()
    result, norms, finite = aggregate(total, updates, weights)

    expected = total.double()
    squares = []
    for weight, update in zip(weights, updates, strict=True):
        expected = expected + weight * update.double()
        squares.append(update.double().square().sum())
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norms, torch.stack(squares), rtol=1e-12, atol=0)
    assert finite.tolist() == [True, True, True]
    assert torch.equal(total, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_aggregate_names_what_is_not_finite(value):
    updates = torch.full((3, 10), 3e38)  # finite, though the square overflows float32
    updates[1, 7] = value
    _, _, finite = aggregate(torch.zeros(10), list(updates), [1 / 3] * 3)
    assert finite.tolist() == [True, False, True]


# ----------------------------------------------------------------------------- a network as vectors


@pytest.fixture
def flat():
    return FlatNetwork(fedgs.build_network(CONFIG))


def test_vectors_are_the_network(flat, generator):
    reference = UTNet(width=2)
    reference.load_state_dict(flat.network.state_dict())
    images = torch.rand(2, 3, 32, 32, generator=generator)
    for network in (flat.network, reference):
        network(images).square().mean().backward()

    parameters = list(reference.parameters())
    assert torch.equal(flat.grad, torch.cat([p.grad.flatten() for p in parameters]))
    assert torch.equal(flat.parameters, torch.cat([p.detach().flatten() for p in parameters]))
    theirs = reference.state_dict()
    for name, mine in flat.network.state_dict().items():
        assert torch.equal(mine, theirs[name]), name

    assert flat.counters.unique().tolist() == [1]
    flat.parameters.zero_()
    assert all((p == 0).all() for p in flat.network.parameters())


def test_a_state_is_a_copy(flat):
    state = flat.state()
    kept = [x.clone() for x in state[:3]]
    flat.parameters.add_(1)
    flat.buffers.add_(1)
    flat.counters.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(state[:3], kept, strict=True))
    flat.load(state)
    assert all(torch.equal(a, b) for a, b in zip(flat.state()[:3], kept, strict=True))


@pytest.mark.parametrize(
    ("options", "kind", "channels"),
    [
        ({}, UTNet, 3),
        ({"images": "slices"}, UTNet, 1),
        ({"images": "grey"}, UTNet, 1),
        ({"model": "sd-utnet", "image_size": 48}, SDUTNet, 3),
    ],
)
def test_the_network_of_a_configuration(options, kind, channels):
    config = replace(CONFIG, **options)
    network = fedgs.build_network(config)
    assert type(network) is kind
    size = config.image_size
    network.eval()
    assert network(torch.zeros(1, channels, size, size)).shape == (1, 2, size, size)

    again = fedgs.build_network(config).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in network.state_dict().items())
    other = fedgs.build_network(replace(config, seed=1)).state_dict()
    assert not all(torch.equal(x, other[name]) for name, x in network.state_dict().items())


# ------------------------------------------------------------------------------------------- client


def test_small_lesions_scale_the_report_alone(flat, generator):
    start = flat.state()
    images = square_images("C1", 4, generator)
    scaled = train_client(flat, start, images, CONFIG, 1)
    local = flat.parameters.clone()

    images.small[:] = False
    plain = train_client(flat, start, images, CONFIG, 1)
    assert torch.equal(flat.parameters, local)
    assert (plain.log.eta, plain.log.scaled) == (1, 0)
    assert scaled.log.eta > 1
    assert scaled.log.scaled == 1
    assert scaled.vector.norm() > plain.vector.norm()


def test_what_a_client_sends(flat, generator):
    flat.network.eval()  # as validation leaves it
    start = flat.state()
    update = train_client(flat, start, square_images("C3", 5, generator), CONFIG, 1)
    assert update.client == update.log.client == "C3"
    assert (update.log.images, update.log.steps) == (5, 4)  # the incomplete batch is dropped
    assert torch.equal(update.buffers, flat.buffers)
    assert torch.equal(update.counters, flat.counters)
    assert not torch.equal(update.buffers, start.buffers)
    assert update.counters.unique().tolist() == [4]


def test_fedavg_reports_the_difference_of_parameters(flat, generator):
    start = flat.state()
    config = replace(CONFIG, method="fedavg")
    images = square_images("C1", 4, generator)
    update = train_client(flat, start, images, config, 1)
    assert torch.equal(update.vector, start.parameters - flat.parameters)
    assert (update.log.eta, update.log.scaled) == (1, 0)

    # FedGS takes the same steps, and reports something else.
    trained = flat.parameters.clone()
    other = train_client(flat, start, images, CONFIG, 1)
    assert torch.equal(flat.parameters, trained)
    assert not torch.equal(other.vector, update.vector)


def test_a_client_depends_on_seed_round_and_centre_alone(flat, generator):
    start = flat.state()
    images = square_images("C1", 4, generator)
    other = square_images("C2", 4, generator)

    def trained(images, config=CONFIG, round_=1):
        return train_client(flat, start, images, config, round_).vector

    first = trained(images)
    trained(other)
    torch.rand(5)  # the global generator must not matter
    assert torch.equal(trained(images), first)
    assert not torch.equal(trained(images, round_=2), first)
    assert not torch.equal(trained(images, replace(CONFIG, seed=1)), first)
    assert not torch.equal(trained(replace(images, centre="C2")), first)
    assert not torch.equal(trained(replace(images, centre="Oslo")), first)


def test_an_epoch_is_every_image_once_in_a_new_order(generator):
    images = square_images("C1", 7, generator)
    images.images[:] = torch.arange(7, dtype=torch.uint8)[:, None, None, None]
    images.small[:] = torch.arange(7) % 2 == 0
    config = replace(CONFIG, model="sd-utnet")
    orders = []
    for _ in range(2):
        batches = list(fedgs.epoch_batches(images, config, generator))
        assert len(batches) == 3
        orders.append(torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist())
        for batch in batches:
            assert torch.equal(batch.small, batch.images[:, 0, 0, 0] % 2 == 0)
            assert batch.draws.shape == (2, 9)
            assert batch.noise.shape == (2, 2, 8)
    for order in orders:
        assert len(set(order)) == 6
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])

    # Whichever image an epoch leaves out, others take it.
    trained = set()
    for _ in range(20):
        for batch in fedgs.epoch_batches(images, config, generator):
            trained.update(batch.images[:, 0, 0, 0].tolist())
    assert trained == set(range(7))


def test_codes_are_drawn_by_the_clients_generator(generator):
    """SD-UTNet's noise: two codes of eight numbers an image."""
    images = square_images("C1", 7, generator)
    config = replace(CONFIG, model="sd-utnet", batch_size=3)

    def all_noise():
        batches = fedgs.epoch_batches(images, config, torch.Generator().manual_seed(3))
        return torch.stack([batch.noise for batch in batches])

    first = all_noise()
    assert first.shape == (2, 2, 3, 8)
    assert torch.equal(first, all_noise())
    assert len(first.unique()) == first.numel()


def test_difficulty_is_of_what_the_network_sees(flat, generator, monkeypatch):
    """The masks after augmentation, with the flags of the same images, and the log base."""
    images = square_images("C1", 4, generator)
    for i, mask in enumerate(images.masks):
        mask.zero_()[:, 10 : 12 + 3 * i, 10:16] = 1  # areas tell the images apart
    images.small[:] = torch.tensor([True, False, True, False])

    masks_of_loss = []
    calls = []
    loss = metrics.soft_dice_loss

    def watched_loss(logits, masks):
        masks_of_loss.append(masks)
        return loss(logits, masks)

    def watched_difficulty(*given):
        calls.append(given)
        return mask_difficulty(*given)

    def mirrored(images, masks, draws):  # areas stay, places do not
        return images.float() / 255, masks.flip(3)

    monkeypatch.setattr(metrics, "soft_dice_loss", watched_loss)
    monkeypatch.setattr(data, "augment", mirrored)
    kernels = PYTORCH._replace(mask_difficulty=watched_difficulty)
    train_client(flat, flat.state(), images, replace(CONFIG, log_base=321.0), 1, kernels)

    assert len(calls) == 4
    for of_loss, (masks, small, log_base) in zip(masks_of_loss, calls, strict=True):
        number = (masks.flatten(1).sum(1) // 6 - 2) // 3  # which images these are
        assert torch.equal(masks, of_loss)
        assert torch.equal(masks, images.masks[number].flip(3))
        assert torch.equal(small, images.small[number])
        assert log_base == 321.0


def test_a_step_of_ones_own(flat, generator):
    """A client takes its steps, and what it reports of them, from the function it is given."""
    batches = []
    steps = []

    def take_step(flat, batch, config, kernels):
        batches.append(batch)
        flat.progress.update.add_(3.0)
        return {"loss": torch.tensor(0.25), "eta": torch.tensor(2.0), "scaled": torch.tensor(1.0)}

    images = square_images("C1", 5, generator)
    count = functools.partial(steps.append, 1)
    update = train_client(flat, flat.state(), images, CONFIG, 1, take_step=take_step, on_step=count)
    assert len(batches) == len(steps) == update.log.steps == 4
    assert (update.log.loss, update.log.eta, update.log.scaled) == (0.25, 2, 1)
    assert update.vector.unique().tolist() == [12]

    # The next client begins anew, and what the first has sent stays as it is.
    train_client(flat, flat.state(), images, CONFIG, 1, take_step=take_step)
    assert flat.progress.update.unique().tolist() == [12]
    flat.progress.update.zero_()
    assert update.vector.unique().tolist() == [12]


@pytest.mark.parametrize("model", ["utnet", "sd-utnet"])
@pytest.mark.slow
def test_bf16_gradient_is_the_fp32_one_rounded(model, generator):
    """Weights, gradient, loss and eta stay float32; in bfloat16 the gradient points the same way.

    How nearly the same is what the network makes of a rounding: fresh weights that are moved by as
    much turn it as far.
    """
    images = square_images("C1", 4, generator, size=64)
    draws = torch.rand(4, 9, generator=generator)
    noise = torch.randn(2, 4, 8, generator=generator)
    batch = Batch(images.images, images.masks, images.small, draws, noise)

    found = []
    for precision, jitter in (("fp32", 0), ("bf16", 0), ("fp32", 2**-8)):
        config = replace(CONFIG, image_size=64, width=4, model=model, precision=precision)
        flat = FlatNetwork(fedgs.build_network(config))
        moved = torch.randn(flat.parameters.shape, generator=generator)
        flat.parameters.mul_(1 + jitter * moved)
        measured = batch_gradient(flat, batch, config)
        assert flat.grad.dtype == flat.parameters.dtype == torch.float32
        assert all(x.dtype == torch.float32 for x in measured.values())
        found.append((flat.grad, measured))

    (plain, losses), (half, half_losses), (jittered, _) = found
    assert not torch.equal(half, plain)
    turned = torch.cosine_similarity(jittered, plain, dim=0)
    assert torch.cosine_similarity(half, plain, dim=0) > turned - 0.1
    for name, value in losses.items():
        assert half_losses[name].item() == pytest.approx(value.item(), rel=0.05)
    assert half_losses["eta"] == losses["eta"] > 1


@pytest.mark.parametrize(
    ("precision", "memory", "dtype"),
    [
        ("fp32", torch.contiguous_format, torch.float32),
        ("bf16", torch.channels_last, torch.bfloat16),
    ],
)
def test_memory_format_throughout(precision, memory, dtype, generator):
    """Every convolution of UTNet sees maps in the format of its precision."""
    seen = []

    def note(name, module, given, out):
        seen.append((name, given[0], out))

    config = replace(CONFIG, image_size=64, width=4)
    network = fedgs.build_network(config).train()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(functools.partial(note, name))
    images = torch.rand(4, 3, 64, 64, generator=generator)
    masks = torch.zeros(4, 1, 64, 64)
    fedgs.training_loss(network, images, masks, None, precision)

    assert len(seen) == 89
    for name, given, out in seen:
        assert given.is_contiguous(memory_format=memory), name
        assert out.is_contiguous(memory_format=memory), name
        assert out.dtype == dtype, name


def test_losses_are_float32(generator, monkeypatch):
    """In bfloat16 the sum over a batch's pixels would lose most of its digits."""
    seen = []
    loss = metrics.soft_dice_loss

    def watched(logits, masks):
        seen.append(logits.dtype)
        return loss(logits, masks)

    monkeypatch.setattr(metrics, "soft_dice_loss", watched)
    network = fedgs.build_network(CONFIG)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    fedgs.training_loss(network, images, torch.zeros(2, 1, 32, 32), None, "bf16")
    assert seen == [torch.float32]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_disentangled_loss_is_of_all_parts_in_float32(generator, monkeypatch, precision):
    seen = []
    loss = metrics.disentangled_loss

    def watched(parts, images, masks):
        seen.append(parts)
        return loss(parts, images, masks)

    monkeypatch.setattr(metrics, "disentangled_loss", watched)
    network = fedgs.build_network(replace(CONFIG, model="sd-utnet"))
    images = torch.rand(2, 3, 32, 32, generator=generator)
    masks = torch.zeros(2, 1, 32, 32)
    noise = torch.zeros(2, 2, 8)
    found, terms = fedgs.training_loss(network, images, masks, noise, precision)
    [parts] = seen
    assert {part.dtype for part in parts} == {torch.float32}
    assert (found, terms) == loss(parts, images, masks)


def test_prediction_is_the_lesion_channel_in_evaluation_mode(generator):
    """Channel 1 is lesion; batch norm uses its running statistics; images are normalised."""
    config = replace(CONFIG, width=4)
    network = fedgs.build_network(config).train()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    mask = fedgs.predict(network, images)

    network.eval()
    with torch.no_grad():
        logits = network(data.normalise(images.float() / 255))
    assert mask.dtype == torch.bool
    assert torch.equal(mask, logits[:, 1:] > logits[:, :1])
    assert 0 < mask.float().mean() < 1

    with torch.no_grad():
        larger = torch.nn.functional.interpolate(logits, (48, 40), mode="bilinear")
    expected = larger[:, 1:] > larger[:, :1]
    assert torch.equal(fedgs.predict(network, images, (48, 40)), expected)


def test_adapted_statistics_are_means_over_batches(flat, generator):
    """Of images from all over the centre; weights, momentum and the given images stay."""
    images = square_images("C1", 46, generator).images
    images[23:] //= 3  # the second half of the folder is darker
    before = flat.state()
    fedgs.adapt(flat.network, images)

    reference = fedgs.build_network(CONFIG)
    first = reference.inc[0].bn1
    means = []
    variances = []
    for i in range(3):  # 16, 15 and 15 images
        batch = data.normalise(images[i::3])
        means.append(batch.mean(dim=(0, 2, 3)))
        variances.append(batch.var(dim=(0, 2, 3)))
    found = flat.network.inc[0].bn1
    assert found.running_mean.tolist() == pytest.approx(
        torch.stack(means).mean(0).tolist(), abs=1e-5
    )
    assert found.running_var.tolist() == pytest.approx(
        torch.stack(variances).mean(0).tolist(), rel=1e-4
    )

    assert torch.equal(flat.parameters, before.parameters)
    assert found.momentum == first.momentum == 0.1
    again = flat.state()
    fedgs.adapt(flat.network, images)
    assert torch.equal(flat.buffers, again.buffers)


def test_at_most_256_images_are_looked_at(flat, generator, monkeypatch):
    seen = []

    def note(module, given, out):
        seen.append(len(given[0]))

    flat.network.register_forward_hook(note)
    for count, looked_at in ((257, 129), (768, 256)):  # every second, every third
        seen.clear()
        fedgs.adapt(flat.network, torch.zeros(count, 3, 16, 16, dtype=torch.uint8))
        assert sum(seen) == looked_at
        assert max(seen) <= 16


def test_one_image_has_statistics(generator):
    """Though at the network's bottom it is a single value a channel."""
    network = fedgs.build_network(replace(CONFIG, image_size=16))
    image = torch.randint(0, 255, (1, 3, 16, 16), dtype=torch.uint8, generator=generator)
    fedgs.adapt(network, image)
    expected = data.normalise(image).mean(dim=(0, 2, 3))
    assert network.inc[0].bn1.running_mean.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert all(x.isfinite().all() for x in network.state_dict().values())


def test_each_centre_is_tested_with_both_statistics(flat, square_root):
    """Its own are those of its training images; the held-out centre has its test images alone."""
    config = replace(CONFIG, data_root=str(square_root), batch_size=4, centres=("C1", "C2", "C6"))
    federation = fedgs.load_data(config, config.centres)
    clients = LocalClients(flat, federation, config)
    state = flat.state()
    tests = list(clients.test(state))
    both = ("averaged", "local")
    kinds = [("C1", "in_test"), ("C2", "in_test"), ("C6", "out_test")]
    expected = [(*kind, batch_norm) for kind in kinds for batch_norm in both]
    assert [(test.centre, test.split, test.batch_norm) for test in tests] == expected
    assert [test.scores[0]["batch_norm"] for test in tests] == [*both, *both, *both]

    own = {**federation.train, "C6": federation.out_test}
    for averaged, local in zip(tests[::2], tests[1::2], strict=True):
        flat.load(state)
        plain = fedgs.evaluate(flat.network, averaged.images)
        fedgs.adapt(flat.network, own[local.centre].images)
        adapted = fedgs.evaluate(flat.network, local.images)
        assert torch.equal(averaged.evaluation.predicted, plain.predicted)
        assert torch.equal(local.evaluation.predicted, adapted.predicted)
        assert not torch.equal(plain.predicted, adapted.predicted)


def test_evaluation_of_many_images_and_of_none(generator):
    network = fedgs.build_network(CONFIG)
    images = square_images("C1", 35, generator)
    evaluation = fedgs.evaluate(network, images)
    expected = torch.cat([fedgs.predict(network, images.images[i : i + 1]) for i in range(35)])
    assert torch.equal(evaluation.predicted, expected)
    assert evaluation.predicted.dtype == torch.bool
    truth = images.masks.bool()
    assert torch.equal(evaluation.dice, metrics.dice_per_image(expected, truth))
    assert fedgs.evaluate(network, images.subset([])).tally.abs().sum() == 0


def test_the_steps_of_a_round_are_one_optimisers(flat, generator, monkeypatch):
    """Over all epochs; and each step is scaled by its own batch's eta."""
    for x in flat.progress:
        x.fill_(7)  # as another client might leave it
    start = flat.state()
    grads = torch.randn(4, len(flat.parameters), generator=generator)
    etas = torch.tensor([1.0, 2.5, 1.5, 3.0])
    left = list(zip(grads, etas, strict=True))

    def gradient(flat, batch, config, kernels):
        grad, eta = left.pop(0)
        flat.grad.copy_(grad)
        return {"loss": eta / 4, "eta": eta, "scaled": (eta > 1).float()}

    monkeypatch.setattr(fedgs, "batch_gradient", gradient)
    images = square_images("C1", 4, generator)
    update = train_client(flat, start, images, CONFIG, 1)

    theta = start.parameters.clone()
    m, v, expected = torch.zeros(3, len(theta))
    for step, (grad, eta) in enumerate(zip(grads, etas, strict=True), start=1):
        adamw_accumulate_(theta, grad, m, v, torch.tensor(step), CONFIG.lr, expected, eta)
    assert torch.equal(update.vector, expected)
    assert torch.equal(flat.parameters, theta)
    assert (update.log.loss, update.log.eta, update.log.scaled) == (0.5, 2, 0.75)


def test_a_round_draws_everything_anew(flat, generator, monkeypatch):
    """Every epoch its order, every image its augmentation, every code its noise."""
    images = square_images("C1", 8, generator)
    images.images[:] = torch.arange(8, dtype=torch.uint8)[:, None, None, None]
    batches = []

    def gradient(flat, batch, config, kernels):
        batches.append(batch)
        flat.grad.zero_()
        return dict.fromkeys(("loss", "eta", "scaled"), torch.tensor(1.0))

    monkeypatch.setattr(fedgs, "batch_gradient", gradient)
    config = replace(CONFIG, model="sd-utnet")
    train_client(flat, flat.state(), images, config, 1)
    orders = torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).view(2, 8)
    draws = torch.cat([batch.draws for batch in batches])
    noise = torch.cat([batch.noise.flatten(0, 1) for batch in batches])
    assert not torch.equal(orders[0], orders[1])
    assert len(draws.unique(dim=0)) == len(draws) == 16
    assert len(noise.unique(dim=0)) == len(noise) == 32


def test_no_two_seeds_rounds_or_clients_draw_the_same():
    drawn = set()
    clients = ("C1", "C2", "Oslo", "C01", "C²")
    for seed, round_, client in itertools.product((0, 1, 2), (1, 2, 3), clients):
        drawn.add(fedgs.client_generator(seed, round_, client).initial_seed())
    assert len(drawn) == 45


def test_a_client_draws_the_same_in_every_process():
    """In that of a worker, or of a run that goes on tomorrow: Python's hash() would not do."""
    assert fedgs.client_generator(0, 1, "C1").initial_seed() == 1554199118406742183
    assert fedgs.client_generator(0, 1, "Oslo").initial_seed() == 2722974803844890670


def test_a_batch_is_augmented_and_normalised(flat, generator, monkeypatch):
    images = square_images("C1", 2, generator)
    draws = torch.rand(2, 9, generator=generator)
    batch = Batch(images.images, images.masks, images.small, draws, torch.zeros(0, 2, 8))
    seen = []
    loss = fedgs.training_loss

    def watched(network, images, masks, *rest):
        seen.extend((images, masks))
        return loss(network, images, masks, *rest)

    monkeypatch.setattr(fedgs, "training_loss", watched)
    batch_gradient(flat, batch, CONFIG)
    images, masks = data.augment(batch.images, batch.masks, draws)
    assert torch.equal(seen[0], data.normalise(images))
    assert torch.equal(seen[1], masks)


# ------------------------------------------------------------------------------------------- server


def constant_update(flat, client, value, steps=1, images=1, buffers=0.0, counters=0):
    """An update all of whose parameters are `value`."""
    log = ClientLog(client, images, steps, 0.5, {}, 1.0, 0.0)
    vector = torch.full_like(flat.parameters, value)
    buffers = torch.full_like(flat.buffers, buffers)
    return Update(client, vector, buffers, torch.full_like(flat.counters, counters), log)


def server_of(flat, weights, **options):
    return Server(flat.state(), weights, replace(CONFIG, **options))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # T_k = floor(n_k / 2) * 2 epochs; the held-out centre has no weight
        ("fedgs", {"C1": 4 / 14, "C2": 8 / 14, "C3": 2 / 14}),
        ("fedavg", {"C1": 5 / 16, "C2": 8 / 16, "C3": 3 / 16}),
    ],
)
def test_weights_of_the_clients(method, expected):
    facts = {}
    for centre, images in {"C1": 5, "C2": 8, "C3": 3, "C6": 0}.items():
        facts[centre] = data.Facts(images, 1, 1, 0, 0, "")
    weights = fedgs.client_weights(replace(CONFIG, method=method), facts)
    assert weights == pytest.approx(expected)


def test_parameters_buffers_and_counters_have_the_same_weights(flat):
    server = server_of(flat, {"C1": 0.75, "C2": 0.25})
    before = server.state.parameters
    server.apply(
        [
            constant_update(flat, "C1", 1.0, buffers=4.0, counters=8),
            constant_update(flat, "C2", 0.0),
        ]
    )
    moved = before - server.state.parameters
    torch.testing.assert_close(moved, torch.full_like(before, 0.75), rtol=0, atol=1e-6)
    assert server.state.buffers.unique().tolist() == [3]
    assert server.state.counters.unique().tolist() == [6]
    assert server.state.counters.dtype == torch.int64
    assert server.round == 1


def test_scale_one_is_parameter_averaging(flat, generator):
    """FedGS with eta = 1, no weight decay and equal weights is FedAvg of parameters."""
    no_decay = functools.partial(adamw_accumulate_, weight_decay=0.0)
    kernels = PYTORCH._replace(adamw_accumulate_=no_decay)
    server = server_of(flat, {"C1": 1 / 3, "C2": 1 / 3, "C3": 1 / 3})
    start = server.state
    updates = []
    trained = []
    for client in ("C1", "C2", "C3"):
        images = square_images(client, 4, generator, small=False)
        updates.append(train_client(flat, start, images, CONFIG, 1, kernels))
        trained.append(flat.parameters.clone())

    server.apply(updates)
    mean = torch.stack(trained).double().mean(0)
    torch.testing.assert_close(server.state.parameters.double(), mean, rtol=1e-6, atol=1e-7)
    assert (server.state.parameters - start.parameters).abs().max() > 1e-4  # they did move


def test_index_tables_come_back_as_they_were(flat, generator):
    before = copy.deepcopy(flat.network.state_dict())
    server = server_of(flat, {"C1": 1 / 6, "C2": 2 / 6, "C3": 3 / 6})
    updates = []
    for k in (1, 2, 3):
        images = square_images(f"C{k}", 2 * k, generator)
        updates.append(train_client(flat, server.state, images, CONFIG, 1))
    server.apply(updates)
    flat.load(server.state)

    after = flat.network.state_dict()
    indices = [name for name in before if name.endswith("relative_position_index")]
    assert len(indices) == 9
    for name in indices:
        assert torch.equal(before[name], after[name])
    for name in before:
        assert before[name].dtype == after[name].dtype
    # 2, 4 and 6 batches, weighted by 1/6, 2/6 and 3/6: 28 / 6
    assert after["inc.0.bn1.num_batches_tracked"] == 5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_server_momentum(flat, momentum):
    """velocity <- mu velocity + sum_k w_k Delta_k; theta <- theta - server_lr velocity."""
    weights = {"C1": 0.5, "C2": 0.5}
    server = server_of(flat, weights, server_momentum=momentum, server_lr=0.8)
    theta = server.state.parameters.double()
    velocity = 0.0
    for value in (0.3, -0.1, 0.2):
        first = constant_update(flat, "C1", value)
        second = constant_update(flat, "C2", 2 * value)
        server.apply([first, second])
        velocity = momentum * velocity + 1.5 * value
        theta = theta - 0.8 * velocity
        found = server.state.parameters.double()
        torch.testing.assert_close(found, theta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", ["vector", "buffers", "loss"])
def test_a_round_with_a_value_that_is_not_finite_is_refused(flat, field):
    server = server_of(flat, {"C1": 0.5, "C4": 0.5})
    server.round = 6
    before = server.state
    bad = constant_update(flat, "C4", 0.1)
    if field == "loss":
        bad.log.loss = math.nan
    else:
        getattr(bad, field)[0] = math.nan
    with pytest.raises(UserError, match=r"round 7 .* client C4 is not finite"):
        server.apply([constant_update(flat, "C1", 0.1), bad])
    assert server.state is before
    assert server.round == 6


def test_a_server_step_that_overflows_is_refused(flat):
    server = server_of(flat, {"C1": 1.0}, server_lr=1e6)
    before = server.state
    with pytest.raises(UserError, match="the server's step is not finite"):
        server.apply([constant_update(flat, "C1", 3e38)])
    assert server.state is before
    assert not server.velocity.any()


def test_the_log_knows_the_size_of_every_update(flat):
    server = server_of(flat, {"C1": 0.5, "C2": 0.5})
    first, second = server.apply(
        [constant_update(flat, "C1", 0.1, steps=3), constant_update(flat, "C2", -0.2)]
    )
    root = math.sqrt(flat.parameters.numel())
    assert (first.client, first.steps) == ("C1", 3)
    assert first.update_norm == pytest.approx(0.1 * root, rel=1e-5)
    assert second.update_norm == pytest.approx(0.2 * root, rel=1e-5)


def test_updates_are_summed_in_groups(flat):
    """Never more than a group of updates in memory, and the sum that all together give."""
    weights = {f"C{k}": k / 465 for k in range(1, 31)}
    alive = weakref.WeakSet()
    most = 0

    def numbered(k):
        return constant_update(flat, f"C{k}", 0.1 * k, buffers=1.0 / k, counters=k)

    def arriving():
        nonlocal most
        for k in range(1, 31):
            update = numbered(k)
            alive.add(update.vector)
            most = max(most, len(alive))
            yield update
            del update

    server = server_of(flat, weights)
    logs = server.apply(arriving())
    assert most <= Server.GROUP
    assert [log.client for log in logs] == list(weights)

    at_once = server_of(flat, weights)
    at_once.apply([numbered(k) for k in range(1, 31)])
    assert all(map(torch.equal, server.state[:3], at_once.state[:3]))
    mean = sum(0.1 * k * k for k in range(1, 31)) / 465
    moved = flat.parameters - server.state.parameters
    torch.testing.assert_close(moved, torch.full_like(moved, mean), rtol=1e-5, atol=1e-5)


def test_a_round_is_refused_for_any_of_its_groups(flat):
    server = server_of(flat, {f"C{k}": 1 / 20 for k in range(1, 21)})
    before = server.state
    updates = [constant_update(flat, f"C{k}", 0.1) for k in range(1, 21)]
    for k in (9, 20):
        updates[k - 1].vector[3] = math.inf
    with pytest.raises(UserError, match="client C9, C20 is not finite"):
        server.apply(iter(updates))
    assert server.state is before


# --------------------------------------------------------------------------------------- round loop


class RecordedClients:
    """Clients that note what the round loop asks of them."""

    def __init__(self, flat):
        self.flat = flat
        self.asked = []

    def train(self, state, round_):
        self.asked.append(("train", round_, state))
        yield constant_update(self.flat, "C1", 1.0)

    def evaluate(self, state):
        self.asked.append(("evaluate", state))
        tally = torch.ones(len(metrics.MEASURES), 2, dtype=torch.float64)
        return {"C1": tally, "C2": 3 * tally}


def test_the_round_loop_asks_in_order(flat):
    server = server_of(flat, {"C1": 1.0}, rounds=4)
    server.round = 2  # as after a resumed run
    clients = RecordedClients(flat)
    start = server.state
    rounds = []
    for round_, logs, validation in fedgs.federate(server, clients, server.config):
        rounds.append(round_)
        assert [log.client for log in logs] == ["C1"]
        assert validation["dice"] == {"mean": 1, "n": 4}
    assert rounds == [3, 4]

    names = [asked[0] for asked in clients.asked]
    assert names == ["train", "evaluate", "train", "evaluate"]
    assert clients.asked[0][2] is start
    assert (
        clients.asked[1][1] is clients.asked[2][2]
    )  # validation of what the next round starts from
    assert clients.asked[3][1] is server.state


def test_local_clients_train_in_order_from_the_same_state(flat, square_root):
    config = replace(CONFIG, data_root=str(square_root), batch_size=4)
    federation = fedgs.load_data(config, config.centres)
    clients = LocalClients(flat, federation, config)
    state = flat.state()
    updates = list(clients.train(state, 1))
    assert [update.client for update in updates] == ["C1", "C2", "C3"]
    for update, images in zip(updates, federation.train.values(), strict=True):
        alone = train_client(flat, state, images, config, 1)
        assert torch.equal(update.vector, alone.vector)
        assert torch.equal(update.buffers, alone.buffers)

    tallies = clients.evaluate(state)
    assert list(tallies) == ["C1", "C2", "C3"]


def test_the_data_are_those_of_the_configuration(monkeypatch):
    given = {}

    def load(*place, **how):
        given.update(how, place=place)

    monkeypatch.setattr(data, "find", "{} in {}".format)
    monkeypatch.setattr(data, "load", load)
    where = {"centres": ("C2", "C1"), "out_centre": "C1", "cache": "here", "data_root": "there"}
    which = {"tau": 321.0, "split": "grouped", "fold": 4, "lesion": (2,), "window": (1.0, 2.0)}
    config = Config(dataset="lits", images="grey", image_size=48, **where, **which)
    fedgs.load_data(config, ["C2"], skip={"bad.png"})
    del where["data_root"]
    called = {"size": 48, "kind": "grey", "only": ["C2"], "place": ("lits", "lits in there")}
    called["skip"] = {"bad.png"}
    assert given == {**where, **which, **called}


def test_the_chosen_kernels_do_the_work(flat, square_root):
    calls = set()

    def watched(name, operation):
        def operate(*given):
            calls.add(name)
            return operation(*given)

        return operate

    kernels = PYTORCH
    for name in fedgs.Kernels._fields[1:]:
        kernels = kernels._replace(**{name: watched(name, getattr(PYTORCH, name))})
    where = {"data_root": str(square_root), "centres": ("C1", "C6")}
    config = replace(CONFIG, batch_size=4, local_epochs=1, **where)
    clients = LocalClients(flat, fedgs.load_data(config, config.centres), config, kernels)
    server = Server(flat.state(), {"C1": 1.0}, config, kernels)
    server.apply(clients.train(server.state, 1))
    assert calls == {"mask_difficulty", "adamw_accumulate_", "aggregate"}


def test_which_kernels_are_compiled_for_a_device(monkeypatch):
    module = PYTORCH._asdict()
    del module["name"]
    module = SimpleNamespace(**module)
    monkeypatch.setattr(fedgs.hardware, "compiled_kernels", lambda *_: (module, "why"))
    for device, name in (("cpu", "cpp"), ("cuda", "cuda")):
        kernels, reason = fedgs.choose_kernels("auto", torch.device(device))
        assert (kernels, reason) == (PYTORCH._replace(name=name), "why")


# ------------------------------------------------------------------------------------- a whole run


def test_folder_is_complete(finished):
    assert {path.name for path in finished.iterdir()} == {
        *(".lock", "config.json", "rounds.csv", "scores.csv", "results.json", "resume.pt"),
        *("last.pt", "best.pt", "best_small.pt", "curves.png", "predictions.png"),
    }


def test_rounds_table(finished):
    history = rows(finished / "rounds.csv")
    assert [row["round"] for row in history] == ["1", "2"]
    columns = {"loss_C4", "loss_C5", "update_norm_C4", "eta", "scaled_steps", "dice", "dice_s"}
    for row in history:
        assert columns < set(row)
        assert 0 < float(row["loss_C4"]) < 1
        assert 1 < float(row["eta"]) < 3
        assert 0 < float(row["scaled_steps"]) <= 1
        assert float(row["update_norm_C4"]) > 0


def test_results_are_the_means_of_the_scores(finished):
    """The means of results.json, once more from the rows of scores.csv."""
    scores = rows(finished / "scores.csv")
    results = json.loads((finished / "results.json").read_text())
    for name, batch_norm in itertools.product(("best", "best_small"), fedgs.STATISTICS):
        for split in ("in_test", "out_test"):
            wanted = {"checkpoint": name, "batch_norm": batch_norm, "split": split}
            chosen = [row for row in scores if wanted.items() <= row.items()]
            lesion = [row for row in chosen if row["inverse_area"] != "inf"]
            kinds = {
                "dice": chosen,
                "dice_n": lesion,
                "dice_s": [row for row in chosen if row["small"] == "1"],
                "dice_l": [row for row in lesion if row["small"] == "0"],
            }
            for measure, kind in kinds.items():
                expected = results["checkpoints"][name][batch_norm][split][measure]
                assert expected["n"] == len(kind)
                if kind:
                    mean = math.fsum(float(row["dice"]) for row in kind) / len(kind)
                    assert mean == pytest.approx(expected["mean"], rel=1e-12)
    held_out = {row["centre"] for row in scores if row["split"] == "out_test"}
    assert held_out == {"C6"}
    assert {row["centre"] for row in scores if row["split"] == "in_test"} == {"C4", "C5"}


def test_stand_in_is_named_everywhere(finished):
    for name in ("config.json", "results.json"):
        assert "stand-in" in (finished / name).read_text()
    for name in ("rounds.csv", "scores.csv"):
        assert all(row["data"] == "PolypGen stand-in" for row in rows(finished / name))


@pytest.mark.parametrize("name", ["last", "best", "best_small"])
def test_checkpoints_are_plain_state_dicts(finished, name):
    state = torch.load(finished / f"{name}.pt", weights_only=True)
    UTNet(width=2).load_state_dict(state, strict=True)
    config = state._metadata["fedgs"]["config"]
    assert config["width"] == 2
    assert config["out"] == config["data_root"] == config["cache"] == ""  # no paths of this machine


def test_pictures_are_pictures(finished):
    for name in ("curves.png", "predictions.png"):
        with Image.open(finished / name) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.slow
def test_last_is_the_aggregate_and_best_is_the_best(run, finished, tmp_path):
    saved = torch.load(finished / "resume.pt", weights_only=True)
    last = torch.load(finished / "last.pt", weights_only=True)
    for name, x in saved["weights"].items():
        assert torch.equal(x, last[name])

    history = rows(finished / "rounds.csv")
    for name, measure in (("best", "dice"), ("best_small", "dice_s")):
        values = [float(row[measure]) for row in history]
        best = {"round": 1 + values.index(max(values)), "score": max(values)}
        assert saved["best"][name] == best

    assert run(tmp_path, "--rounds", 1) == 0
    of_round = {1: tmp_path / "last.pt", 2: finished / "last.pt"}
    for name in ("best", "best_small"):
        assert_same_weights(finished / f"{name}.pt", of_round[saved["best"][name]["round"]])


@pytest.mark.slow
def test_same_seed_same_rounds(run, finished, tmp_path):
    assert run(tmp_path / "again") == 0
    same_end(tmp_path / "again", finished)
    assert run(tmp_path / "other", "--seed", 1, "--rounds", 1) == 0
    first = without_time(finished / "rounds.csv")[:1]
    assert without_time(tmp_path / "other" / "rounds.csv") != first


@pytest.mark.slow
def test_fedavg_takes_unscaled_steps(run, tmp_path, capsys):
    assert run(tmp_path, "--method", "fedavg", "--rounds", 1) == 0
    [row] = rows(tmp_path / "rounds.csv")
    assert (row["eta"], row["scaled_steps"]) == ("1.0", "0.0")
    assert "Dice_S" in capsys.readouterr().out


@pytest.mark.slow
def test_disentangled_run(run, tmp_path):
    """SD-UTNet: the loss's terms, the picture, and a resumed run like an uninterrupted one."""
    options = ["--model", "sd-utnet"]
    assert run(tmp_path / "whole", *options) == 0
    assert run(tmp_path / "parts", *options, "--rounds", 1) == 0
    assert run(tmp_path / "parts", *options, "--rounds", 2, "--resume") == 0
    same_end(tmp_path / "parts", tmp_path / "whole")

    for row in rows(tmp_path / "whole" / "rounds.csv"):
        terms = 0.0
        for name, weight in metrics.DISENTANGLED_WEIGHTS.items():
            terms += weight * float(row[f"term_{name}"])
        loss = (3 * float(row["loss_C4"]) + 2 * float(row["loss_C5"])) / 5  # of 72 and 66 images
        assert terms == pytest.approx(loss, rel=1e-4)
    with Image.open(tmp_path / "whole" / "anatomy.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.slow
def test_fedbn_keeps_what_its_clients_have(run, cache, tmp_path):
    """From round to round, in a run that goes on, and in a test of its checkpoint."""
    assert run(tmp_path / "whole", "--method", "fedbn") == 0
    assert run(tmp_path / "parts", "--method", "fedbn", "--rounds", 1) == 0
    assert run(tmp_path / "parts", "--method", "fedbn", "--rounds", 2, "--resume") == 0
    same_end(tmp_path / "parts", tmp_path / "whole")

    record = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert record["config"]["batch_norm"] == "local"
    _, about = checkpoints.read_weights(tmp_path / "whole" / "last.pt")
    assert list(about["own"]) == ["C4", "C5"]
    assert not torch.equal(about["own"]["C4"], about["own"]["C5"])

    arguments = [tmp_path / "whole" / "best.pt", "--out", tmp_path / "again"]
    where = ["--data-root", "stand-in", "--cache", cache]
    assert exit_code(evaluate.main, [*arguments, *where]) == 0
    of_run = json.loads((tmp_path / "whole" / "results.json").read_text())
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["checkpoints"]["best"] == of_run["checkpoints"]["best"]


def test_batch_norms_places_among_the_parameters():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm1d(1)))
    assert fedgs.affine_places(network).tolist() == [8, 9, 10, 11, 12, 13]  # after 2 x 3 + 2


def test_a_centre_without_batch_norm_of_its_own_takes_the_servers(flat):
    scales = torch.full((len(flat.affine),), 5.0)
    state = flat.state({"C1": scales})
    assert state_of(state, "C6", flat.affine) is state

    own = state_of(state, "C1", flat.affine)
    flat.load(own)
    for name, parameter in flat.network.named_parameters():
        is_norm = bool((parameter == 5).all())
        owner = flat.network.get_submodule(name.rpartition(".")[0])
        assert is_norm == isinstance(owner, nn.BatchNorm2d), name
    assert not torch.equal(own.parameters, state.parameters)  # which stays as it was


def test_own_batch_norm_comes_back(flat, generator, tmp_path):
    own = {name: torch.rand(len(flat.affine), generator=generator) for name in ("C1", "C2")}
    about = {"config": {}, "data": "here"}
    checkpoints.save(tmp_path / "best.pt", checkpoints.with_about(flat.network, about, own))
    weights, _ = checkpoints.read_weights(tmp_path / "best.pt")
    found = checkpoints.load_state(flat, weights, tmp_path / "best.pt").own
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in own.items()
    }


@pytest.mark.parametrize(
    "damaged",
    [
        {"C1": torch.zeros(3)},
        {"C1": torch.tensor(math.nan)},
        {"C1": 1.0},
        [1.0],
    ],
)
def test_own_batch_norm_that_is_damaged(flat, tmp_path, damaged):
    weights = checkpoints.with_about(flat.network, {"config": {}, "data": "here"})
    weights._metadata["fedgs"]["own"] = damaged
    path = tmp_path / "best.pt"
    with pytest.raises(UserError, match=r"best\.pt: a client's own batch norm is damaged"):
        checkpoints.load_state(flat, weights, path)


def test_each_checkpoint_is_tested_itself(flat, square_root, tmp_path, monkeypatch):
    """best and best_small of different rounds: each has the measures of its own weights.

    The pictures are of the best one.
    """
    drawn = []

    def noted(clients, tests, heading):
        drawn.append(heading)
        return {"predictions.png": None}

    monkeypatch.setattr(fedgs, "draw_tests", noted)
    where = {"data_root": str(square_root), "out": str(tmp_path), "centres": ("C4", "C5", "C6")}
    config = replace(CONFIG, batch_size=4, **where)
    clients = LocalClients(flat, fedgs.load_data(config, config.centres), config)
    expected = {}
    for round_, name in enumerate(runs.BEST, start=1):
        network = fedgs.build_network(replace(config, seed=round_))
        about = runs.describe_weights(config, "here", round_, "0")
        checkpoints.save(tmp_path / f"{name}.pt", checkpoints.with_about(network, about))
        tests = list(clients.test(FlatNetwork(network).state()))
        expected[name] = runs.summarise_tests(tests, round_)

    results, _, _ = fedgs.test(clients, config, runs.Folder(config))
    assert to_json(results["checkpoints"]) == to_json(expected)  # NaN is not equal to itself
    assert expected["best"]["averaged"] != expected["best_small"]["averaged"]
    [heading] = drawn
    assert heading.endswith("\nbest (round 1)")


def test_what_was_chosen_is_written_down(finished):
    """Not auto: on another machine that would be something else."""
    record = json.loads((finished / "config.json").read_text())
    assert record["config"]["precision"] == "fp32"
    assert "; fp32; kernels: " in record["hardware"]
    state = torch.load(finished / "best.pt", weights_only=True)
    assert state._metadata["fedgs"]["config"]["precision"] == "fp32"


def test_the_picture_says_whose_images_it_shows(flat, generator, monkeypatch):
    """Those of other processes have stayed there."""
    headings = []

    def note(tests, heading):
        headings.append((len(tests), heading))

    monkeypatch.setattr(pictures, "draw_predictions", note)
    tests = []
    for centre in ("C1", "C6"):
        images = square_images(centre, 2, generator)
        evaluation = fedgs.evaluate(flat.network, images)
        test = fedgs.CentreTest(
            centre, "in_test", "averaged", evaluation.tally, [], images, evaluation
        )
        tests.append(test)
    clients = SimpleNamespace(flat=flat)
    fedgs.draw_tests(clients, tests, "best")
    tests.append(replace(test, centre="C2", images=None, evaluation=None))
    fedgs.draw_tests(clients, tests, "best")
    assert headings == [
        (2, "best: test images, evenly spaced by size of lesion"),
        (2, "best: test images of C1, C6, evenly spaced by size of lesion"),
    ]


def test_anatomy_is_drawn_of_the_first_image_that_is_here(generator, monkeypatch):
    drawn = []

    def noted(network, images, i, heading):
        drawn.append((images, i))
        return "a picture"

    monkeypatch.setattr(fedgs, "draw_anatomy", noted)
    images = square_images("C1", 2, generator)
    tests = [SimpleNamespace(images=x, evaluation=None) for x in (images.subset([]), images)]
    network = fedgs.build_network(replace(CONFIG, model="sd-utnet"))
    clients = SimpleNamespace(flat=SimpleNamespace(network=network))
    assert fedgs.draw_tests(clients, tests, "a run")["anatomy.png"] == "a picture"
    assert drawn == [(images, 0)]
    assert list(fedgs.draw_tests(clients, tests[:1], "a run")) == ["predictions.png"]


def test_the_picture_of_anatomy_is_the_networks(generator, monkeypatch):
    """Of the chosen image: what the segmentor sees, and the image given back in its mean look."""
    config = replace(CONFIG, model="sd-utnet")
    network = fedgs.build_network(config).train()
    images = square_images("C1", 3, generator)
    drawn = []

    def note(*what):
        drawn.extend(what)

    monkeypatch.setattr(pictures, "draw_anatomy", note)
    fedgs.draw_anatomy(network, images, 1, "best")

    network.eval()
    with torch.no_grad():
        x = data.normalise(images.images[1:2])
        anatomy = network.a_encoder(x)
        mu, _ = network.m_encoder(x)
        reconstruction = network.reconstruct(anatomy, mu)
    for found, expected in zip(drawn[:3], (x, anatomy, reconstruction), strict=True):
        assert torch.equal(found, expected[0])
    assert drawn[3] == "best\nC1, 1"


# ------------------------------------------------------------------------------------------ resume


def same_end(folder, finished):
    """The weights and tables of a run are those of another."""
    assert_same_weights(folder / "last.pt", finished / "last.pt")
    assert without_time(folder / "rounds.csv") == without_time(finished / "rounds.csv")
    assert (folder / "scores.csv").read_text() == (finished / "scores.csv").read_text()


@pytest.mark.slow
def test_killed_and_resumed(run, finished, cache, tmp_path):
    """kill -9 at three random moments, from start-up on, then to the end."""
    options = [*TINY, "--cache", str(cache), "--out", str(tmp_path), "--resume"]
    command = [sys.executable, str(ROOT / "fedgs.py"), *options]
    threads = str(torch.get_num_threads())  # they decide the last bits
    for _ in range(3):
        process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        process.stdout.read(1)  # the header: the run has begun
        time.sleep(random.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert run(tmp_path, "--resume") == 0
    same_end(tmp_path, finished)


@pytest.mark.slow
def test_a_client_that_diverges(run, tmp_path, capsys, monkeypatch):
    assert run(tmp_path, "--rounds", 1) == 0
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    capsys.readouterr()
    whole = metrics.soft_dice_loss

    def infinite(logits, masks):
        return whole(logits, masks) * math.inf

    monkeypatch.setattr(metrics, "soft_dice_loss", infinite)
    code = run(tmp_path, "--resume", "--rounds", 2)
    refused(capsys, code, "round 2", "C4, C5", "not finite")
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == kept


@pytest.mark.slow
def test_sigterm_is_a_line(cache, tmp_path):
    options = [*TINY, "--rounds", "1000", "--cache", str(cache), "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "fedgs.py"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.read(1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error.startswith("fedgs.py: stopped by SIGTERM; ")
    assert "--resume" in error
    assert error.count("\n") == 1


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-size", "80"], ["centre C4", "--batch-size 80"]),
        (["--data-root", "no/such/folder"], ["--data-root no/such/folder", "no such folder"]),
        (["--data-root", "."], ["--data-root", "data_C1"]),
        (["--workers", "3"], ["--workers 3", "there are 2 clients"]),
        (["--dataset", "lits"], ["--centres C4 C5 C6", "among C1 C2 C3 C4 C5"]),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    run, tmp_path, capsys, options, words
):
    refused(capsys, run(tmp_path / "run", *options), *words)
    assert not (tmp_path / "run").exists()


def test_bad_data_folder(run, tmp_path, capsys):
    folder = tmp_path / "data_C4" / "images_C4"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"")
    refused(capsys, run(tmp_path / "run", "--data-root", tmp_path), "a.jpg has no mask")


@pytest.mark.slow
def test_checkpoint_of_another_model(run, tmp_path, capsys):
    small = tmp_path / "small"
    wide = tmp_path / "wide"
    assert run(small, "--rounds", 1) == 0
    assert run(wide, "--rounds", 1, "--width", 4) == 0
    capsys.readouterr()
    shutil.copy(wide / "resume.pt", small / "resume.pt")
    refused(capsys, run(small, "--resume"), "resume.pt is of another run (width 4, now 2)")


@pytest.mark.slow
def test_other_data_with_the_same_counts(run, square_root, tmp_path, capsys):
    root = tmp_path / "frames"
    shutil.copytree(square_root, root)
    options = ["--data-root", root, "--batch-size", "4", "--rounds", 1]
    assert run(tmp_path / "run", *options) == 0
    capsys.readouterr()
    picture = root / "data_C4" / "images_C4" / "03.jpg"
    Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
    refused(capsys, run(tmp_path / "run", *options, "--resume"), "another run", "fingerprint")


@pytest.mark.slow
def test_unwritable_folder(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, run(tmp_path / "file" / "run"), "file")


def test_moved_options_say_where_to(capsys):
    for arguments, words in {
        ("--predict", "scan.jpg"): "python -m tools.predict",
        ("--evaluate",): "python -m tools.evaluate",
        ("--seeds", "0", "1"): "python -m tools.experiment --seeds",
        ("--method", "fedavg", "fedgs"): "python -m tools.experiment --methods",
    }.items():
        refused(capsys, exit_code(fedgs.main, list(arguments)), words)


def test_one_name_for_folds():
    assert runs.run_name(CONFIG) == "polypgen-fedgs-utnet-f1-s0"
    by_centre = replace(CONFIG, dataset="lits", split="centre", seed=3, label="control")
    assert runs.run_name(by_centre) == "lits-control-utnet-centre-s3"
