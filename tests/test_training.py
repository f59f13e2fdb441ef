"""A training step's fast paths against the plain one: bfloat16, memory formats, the CUDA graph."""

import dataclasses

import pytest
import torch

import data
import fedgs
from fedgs import Batch, CapturedGradient, FlatNetwork, Server, batch_gradient, train_client

CONFIG = fedgs.Config(local_epochs=2, batch_size=4, lr=1e-3, image_size=64, width=4, precision="fp32")
MODELS = pytest.mark.parametrize("model", ["utnet", "sd-utnet"])
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def flat_network(config, device="cpu"):
    return FlatNetwork(fedgs.build_network(config).to(device))


def some_images(count, generator):
    masks = torch.zeros(count, 1, 64, 64, dtype=torch.uint8)
    masks[:, :, 8:14, 10:18] = 1
    images = torch.randint(0, 200, (count, 3, 64, 64), dtype=torch.uint8, generator=generator) + 55 * masks
    names, small = [str(i) for i in range(count)], torch.arange(count) % 3 == 0
    return data.Images(1, names, images, masks, torch.full((count,), 4096 / 48), small, torch.ones(count, 2))


def some_batch(generator, device="cpu"):
    images = some_images(4, generator)
    batch = Batch(images.images, images.masks, images.small, torch.rand(4, 9, generator=generator), torch.randn(2, 4, 8, generator=generator))
    return Batch(*(x.to(device) for x in batch))


@MODELS
def test_bf16_gradient_is_the_fp32_one_rounded(model, generator):
    """Weights, gradient, loss and eta stay float32; the gradient in bfloat16 is another, and points the same way.

    How nearly the same is what the network makes of a rounding: fresh weights that are moved by as much turn it as far.
    """
    batch, gradients, losses = some_batch(generator), [], []
    for precision, jitter in (("fp32", 0), ("bf16", 0), ("fp32", 2**-8)):
        config = dataclasses.replace(CONFIG, model=model, precision=precision)
        flat = flat_network(config)
        flat.parameters.mul_(1 + jitter * torch.randn(flat.parameters.shape, generator=generator))
        measured = batch_gradient(flat, batch, config)
        assert flat.grad.dtype == flat.parameters.dtype == torch.float32 and all(x.dtype == torch.float32 for x in measured.values())
        gradients.append(flat.grad)
        losses.append(measured)
    plain, half, jittered = gradients
    assert not torch.equal(half, plain)
    assert torch.cosine_similarity(half, plain, dim=0) > torch.cosine_similarity(jittered, plain, dim=0) - 0.1
    for name, value in losses[0].items():
        assert losses[1][name].item() == pytest.approx(value.item(), rel=0.05)
    assert losses[1]["eta"] == losses[0]["eta"] > 1


@pytest.mark.parametrize("precision, formats", [("fp32", torch.contiguous_format), ("bf16", torch.channels_last)])
def test_memory_format_throughout(precision, formats, generator):
    """Every convolution of UTNet sees maps in the format of its precision."""
    config = dataclasses.replace(CONFIG, precision=precision)
    flat, seen = flat_network(config), []
    for name, module in flat.network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, given, out, name=name: seen.append((name, given[0], out)))
    batch_gradient(flat, some_batch(generator), config)
    assert len(seen) == 89
    for name, given, out in seen:
        assert given.is_contiguous(memory_format=formats) and out.is_contiguous(memory_format=formats), name
        assert out.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], name


def test_precision_of_the_hardware(monkeypatch):
    for here, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(fedgs, "has_bf16", lambda device, here=here: here)
        assert fedgs.Config().precision == chosen
        assert fedgs.Config(precision="fp32").precision == "fp32" and fedgs.Config(precision="bf16").precision == "bf16"
        assert chosen in fedgs.describe_precision(fedgs.Config(), torch.device("cpu"))


def test_a_gradient_of_ones_own(generator):
    """train_client takes its gradients, and what it reports of them, from the function it is given."""
    flat, images = flat_network(CONFIG), some_images(9, generator)
    batches = []

    def gradient(flat, batch, config, kernels):
        batches.append(batch)
        flat.grad.fill_(1.0)
        return {"loss": torch.tensor(0.25), "eta": torch.tensor(2.0), "scaled": torch.tensor(1.0)}

    update = train_client(flat, Server(flat), images, CONFIG, 1, gradient=gradient)
    assert len(batches) == update.steps == 4 and all(batch.images.shape == (4, 3, 64, 64) for batch in batches)
    assert (update.loss, update.eta, update.scaled, update.terms) == (0.25, 8.0, 4.0, {})
    torch.testing.assert_close(update.delta, torch.full_like(update.delta, 4 * 2 * CONFIG.lr))  # a constant gradient's step is lr


# ---------------------------------------------------------------------------------------------------- on a GPU


@on_gpu
@MODELS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_gradient_is_the_definition(model, precision, generator):
    """From the same state the same gradient, up to the order of sums, and the same report; for a first and a second batch."""
    config = dataclasses.replace(CONFIG, model=model, precision=precision)
    kernels, _ = fedgs.choose_kernels("auto", torch.device("cuda"))
    paths = [(flat_network(config, "cuda"), gradient) for gradient in (batch_gradient, CapturedGradient())]
    start = paths[0][0].state()
    for batch in (some_batch(generator, "cuda"), some_batch(generator, "cuda")):
        results = []
        for flat, gradient in paths:
            flat.load(start)
            measured = gradient(flat, batch, config, kernels)
            results.append((flat.grad, flat.counters, {name: x.item() for name, x in measured.items()}))
        (plain, counters, numbers), (replayed, same_counters, same_numbers) = results
        assert torch.cosine_similarity(replayed, plain, dim=0) > (0.9999 if precision == "fp32" else 0.9)
        assert torch.equal(counters, same_counters) and counters.unique().tolist() == [1]  # warming up leaves no trace
        assert same_numbers == pytest.approx(numbers, rel=1e-3 if precision == "fp32" else 0.05)


@on_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_a_step_does_not_wait_for_the_gpu(captured, generator):
    kernels, _ = fedgs.choose_kernels("auto", torch.device("cuda"))
    flat, batch = flat_network(CONFIG, "cuda"), some_batch(generator, "cuda")
    m, v, delta = (torch.zeros_like(flat.parameters) for _ in range(3))
    gradient = CapturedGradient() if captured else batch_gradient
    gradient(flat, batch, CONFIG, kernels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        measured = gradient(flat, batch, CONFIG, kernels)
        kernels.adamw_accumulate_(flat.parameters, flat.grad, m, v, 1, 1e-3, delta, measured["eta"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_attention_is_fused():
    """Nothing but the fused kernel is allowed, and it is there for this head size and this bias."""
    network = fedgs.build_network(dataclasses.replace(CONFIG, width=32)).cuda()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        network(torch.rand(2, 3, 64, 64, device="cuda")).square().mean().backward()
