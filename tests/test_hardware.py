"""What the machine offers: device, precision, memory, kernels; steps captured as CUDA graphs."""

import contextlib
import ctypes
import functools
import os
import platform
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import square_images

import fedgs
from fedgs import PYTORCH, Batch, FlatNetwork, batch_gradient, build_network, training_step
from support import hardware
from support.errors import UserError
from support.hardware import CapturedStep

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
CONFIG = fedgs.Config(batch_size=4, lr=1e-3, image_size=64, width=4, precision="fp32")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ----------------------------------------------------------------------------- device and precision


@pytest.mark.parametrize(
    ("wanted", "available", "chosen"),
    [("auto", True, CUDA), ("auto", False, CPU), ("cpu", True, CPU), ("cuda", True, CUDA)],
)
def test_device(monkeypatch, wanted, available, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert hardware.choose_device(wanted) == chosen


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch finds no GPU here"):
        hardware.choose_device("cuda")


@pytest.mark.parametrize("here", [True, False])
def test_auto_is_float32_on_every_cpu(monkeypatch, here):
    """One command gives comparable numbers, whatever the processor could do."""
    monkeypatch.setattr(hardware, "has_bf16", lambda device: here)
    assert hardware.choose_precision("auto", CPU) == "fp32"
    assert hardware.choose_precision("auto", CUDA) == ("bf16" if here else "fp32")


@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_was_asked_for_is_taken(monkeypatch, wanted, device):
    for here in (True, False):
        monkeypatch.setattr(hardware, "has_bf16", lambda device, here=here: here)
        assert hardware.choose_precision(wanted, device) == wanted


def test_slow_bfloat16_is_said(monkeypatch):
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    assert "slower than fp32" in hardware.describe_precision("bf16", CPU)
    assert hardware.describe_precision("fp32", CPU) == "fp32"
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    assert hardware.describe_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(False, False, False), (True, False, True), (False, True, True)],
)
def test_which_cpus_compute_in_bfloat16(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert hardware.has_bf16(CPU) is expected


def test_the_number_of_threads_is_said(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert hardware.describe_device(CPU) == "cpu, 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert hardware.describe_device(CPU) == "cpu, 8 threads"


def test_cores_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert hardware.available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on a Mac
    assert hardware.available_cores() == 64


# ------------------------------------------------------------------------------------------- memory


def calls_to_libc(monkeypatch, name):
    """What a program whose C library has this name is told of memory. -> arguments of mallopt"""
    calls = []
    libc = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(platform, "libc_ver", lambda: (name, "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda library: libc)
    hardware.reuse_freed_memory()
    return calls


def test_glibc_keeps_freed_memory(monkeypatch):
    mmap_max, trim_threshold = -4, -1
    assert calls_to_libc(monkeypatch, "glibc") == [(mmap_max, 0), (trim_threshold, -1)]


@pytest.mark.parametrize("name", ["", "musl"])
def test_other_libraries_are_left_alone(monkeypatch, name):
    assert calls_to_libc(monkeypatch, name) == []


def test_torch_is_prepared(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    calls = []
    monkeypatch.setattr(hardware, "reuse_freed_memory", lambda: calls.append("memory"))
    hardware.prepare_torch()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.allow_tf32
    assert calls == ["memory"]


# ------------------------------------------------------------------------------------------ kernels


def compiled(monkeypatch, problem=""):
    """Have csrc be compiled, with this problem. -> the module"""
    module = SimpleNamespace(problem=lambda device: problem)
    monkeypatch.setitem(sys.modules, "csrc", module)
    return module


def test_compiled_kernels_are_the_default(monkeypatch):
    module = compiled(monkeypatch)
    for device, name in ((CPU, "cpp"), (CUDA, "cuda")):
        expected = (module, f"{name}, compiled from csrc")
        assert hardware.compiled_kernels("auto", device) == expected
        assert hardware.compiled_kernels(name, device) == expected


def test_the_definitions_by_option(monkeypatch):
    compiled(monkeypatch)
    for device in (CPU, CUDA):
        assert hardware.compiled_kernels("torch", device) == (None, "torch, as asked")


@pytest.mark.parametrize(
    ("wanted", "device", "words"),
    [
        ("cuda", CPU, "--kernels cuda: not for cpu; choose cpp, torch or auto"),
        ("cpp", CUDA, "--kernels cpp: not for cuda; choose cuda, torch or auto"),
    ],
)
def test_kernels_of_another_device(monkeypatch, wanted, device, words):
    compiled(monkeypatch)
    with pytest.raises(UserError, match=words):
        hardware.compiled_kernels(wanted, device)


@pytest.mark.parametrize(("device", "name"), [(CPU, "cpp"), (CUDA, "cuda")])
def test_kernels_that_are_not_compiled(monkeypatch, device, name):
    monkeypatch.setitem(sys.modules, "csrc", None)  # importing it raises ImportError
    module, reason = hardware.compiled_kernels("auto", device)
    assert module is None
    assert reason.startswith("torch: csrc is not compiled")
    assert "pip install" in reason
    with pytest.raises(UserError, match=f"--kernels {name}: csrc is not compiled .*pip install"):
        hardware.compiled_kernels(name, device)


def test_kernels_that_cannot_run_here(monkeypatch):
    compiled(monkeypatch, "the driver is too old")
    assert hardware.compiled_kernels("auto", CUDA) == (None, "torch: the driver is too old")
    with pytest.raises(UserError, match="--kernels cuda: the driver is too old"):
        hardware.compiled_kernels("cuda", CUDA)


def test_the_choice_is_a_set_of_operations(monkeypatch):
    module = compiled(monkeypatch)
    for name in fedgs.Kernels._fields[1:]:
        setattr(module, name, f"compiled {name}")
    kernels, _ = fedgs.choose_kernels("auto", CPU)
    names = ("mask_difficulty", "adamw_accumulate_", "aggregate")
    assert kernels == ("cpp", *(f"compiled {name}" for name in names))
    assert fedgs.choose_kernels("torch", CPU)[0] is fedgs.PYTORCH


# ----------------------------------------------------------------------------------- captured steps


class Recording:
    """A CUDA graph's part, on a CPU: to replay is to call once more what was recorded."""

    last = None  # the call that was made last, and its results

    def replay(self):
        call, results = self.recorded
        for name, x in call().items():
            results[name].copy_(x)


@contextlib.contextmanager
def record(recording, capture_error_mode):
    yield
    recording.recorded = Recording.last


def recorded_step(*given):
    """training_step, and what a recording needs to know of it."""
    measured = training_step(*given)
    Recording.last = functools.partial(training_step, *given), measured
    return measured


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs, played on a CPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)


def some_batch(generator, device=CUDA):
    """A batch of four images."""
    images = square_images("C1", 4, generator, size=64).to(device)
    draws = torch.rand(4, 9, generator=generator).to(device)
    noise = torch.randn(2, 4, 8, generator=generator).to(device)
    return Batch(images.images, images.masks, images.small, draws, noise)


@pytest.mark.parametrize("method", ["fedgs", "fedavg"])
def test_rounds_of_captured_steps_are_rounds(graphs, method, generator):
    """One recording serves every client and round. It reads each batch, and keeps nothing else."""
    config = replace(CONFIG, method=method, image_size=16, width=2, batch_size=2, local_epochs=1)
    take_step = CapturedStep(recorded_step)
    plain = FlatNetwork(build_network(config))
    replayed = FlatNetwork(build_network(config))
    state = plain.state()

    for round_, client in enumerate(("C1", "C2"), start=1):
        images = square_images(client, 6, generator, size=16)
        given = (state, images, config, round_, PYTORCH)
        expected = fedgs.train_client(plain, *given)
        update = fedgs.train_client(replayed, *given, take_step)

        assert expected.vector.norm() > 0
        assert torch.equal(update.vector, expected.vector)
        assert torch.equal(update.buffers, expected.buffers)
        assert torch.equal(update.counters, expected.counters)
        assert update.log == expected.log
        assert replayed.progress.step == 3


def test_a_batch_stays_as_it_is(graphs, generator):
    """The next one is copied into tensors of the recording, not into those of the first."""
    flat = FlatNetwork(build_network(CONFIG))
    take_step = CapturedStep(recorded_step)
    first = some_batch(generator, CPU)
    before = Batch._make(x.clone() for x in first)
    take_step(flat, first, CONFIG, PYTORCH)
    take_step(flat, some_batch(generator, CPU), CONFIG, PYTORCH)
    for x, value in zip(first, before, strict=True):
        assert torch.equal(x, value)


def test_only_on_a_gpu_steps_are_captured(square_root):
    where = {"data_root": str(square_root), "centres": ("C1", "C6")}
    config = replace(CONFIG, **where, image_size=16, width=2, local_epochs=1)
    federation = fedgs.load_data(config, config.centres)
    flat = FlatNetwork(build_network(config))
    for name in ("torch", "cpp", "cuda"):
        clients = fedgs.LocalClients(flat, federation, config, PYTORCH._replace(name=name))
        assert isinstance(clients.take_step, CapturedStep) == (name == "cuda")

    # Whichever it is, clients train with it.
    taken = []
    clients.take_step = lambda *given: taken.append(given) or training_step(*given)
    [update] = clients.train(flat.state(), 1)
    assert len(taken) == update.log.steps > 0


# ----------------------------------------------------------------------------------------- on a GPU


def flat_network(config):
    return FlatNetwork(build_network(config).to(CUDA))


@on_gpu
@pytest.mark.parametrize("model", ["utnet", "sd-utnet"])
@pytest.mark.parametrize(
    ("precision", "cosine", "tolerance"), [("fp32", 0.9999, 1e-3), ("bf16", 0.9, 0.05)]
)
def test_captured_step_is_the_definition(model, precision, cosine, tolerance, generator):
    """The same gradient from the same state, up to the order of sums, and the step for it."""
    config = replace(CONFIG, model=model, precision=precision)
    kernels, _ = fedgs.choose_kernels("auto", CUDA)
    plain = flat_network(config)
    replayed = flat_network(config)
    captured = CapturedStep(training_step)

    for number in (1, 2):
        batch = some_batch(generator)
        before = replayed.state()
        progress = [x.clone() for x in replayed.progress]
        plain.load(before)
        expected = batch_gradient(plain, batch, config, kernels)
        measured = captured(replayed, batch, config, kernels)
        assert torch.cosine_similarity(replayed.grad, plain.grad, dim=0) > cosine
        assert torch.equal(replayed.counters, plain.counters)
        assert replayed.counters.unique().tolist() == [number]  # warming up leaves no trace

        # The step for the gradient that the graph has found: the same bits.
        theta = before.parameters
        m, v, step, update = progress
        step += 1
        kernels.adamw_accumulate_(
            theta, replayed.grad, m, v, step, config.lr, update, measured["eta"]
        )
        assert torch.equal(replayed.parameters, theta)
        for x, value in zip(replayed.progress, progress, strict=True):
            assert torch.equal(x, value)

        expected = {name: x.item() for name, x in expected.items()}
        measured = {name: x.item() for name, x in measured.items()}
        assert measured == pytest.approx(expected, rel=tolerance)


@on_gpu
@pytest.mark.parametrize("take_step", [training_step, CapturedStep(training_step)])
def test_a_step_does_not_wait_for_the_gpu(take_step, generator):
    kernels, _ = fedgs.choose_kernels("auto", CUDA)
    flat = flat_network(CONFIG)
    batch = some_batch(generator)
    take_step(flat, batch, CONFIG, kernels)

    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(flat, batch, CONFIG, kernels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_captured_step_is_one_launch(generator):
    """After its batch is copied: the graph holds the gradient, the step, and the count of steps."""
    kernels, _ = fedgs.choose_kernels("auto", CUDA)
    flat = flat_network(CONFIG)
    batch = some_batch(generator)
    captured = CapturedStep(training_step)
    captured(flat, batch, CONFIG, kernels)
    with torch.profiler.profile() as profile:
        captured(flat, batch, CONFIG, kernels)
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if "Launch" in event.name]
    assert launches == ["cudaGraphLaunch"]  # copies are no launches


@on_gpu
def test_attention_is_fused():
    """Nothing but the fused kernel is allowed, and it is there for this head size and this bias."""
    network = build_network(replace(CONFIG, width=32)).to(CUDA)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        network(torch.rand(2, 3, 64, 64, device=CUDA)).square().mean().backward()
