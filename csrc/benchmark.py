"""The kernels against every way PyTorch has of doing the same: checked first, then timed.

    python csrc/benchmark.py                        # this machine's GPU, else its CPU
    python csrc/benchmark.py --device cpu --only adamw aggregate --json figures.json
    python csrc/benchmark.py --only training round  # whole steps, and where their time goes

Each operation counts the bytes that it cannot avoid moving. Its time gives a bandwidth, which is
compared with that of a plain copy in the same run, and with the best of the PyTorch paths. Medians;
on a GPU by CUDA events, with cold caches.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# This file is a program inside the package: Python looks for imports beside it, not above it.
sys.path.insert(0, str(Path(__file__).parent.parent))

import csrc
import data
import fedgs
from models import UTNet
from support import hardware, standin, tables

# The arguments of a step, and a batch's step scale.
LR = 1e-4
BETAS = (0.9, 0.999)
EPS = 1e-8
DECAY = 0.01
STEP = 10
ETA = 1.7

# Numbers of parameters, at 512 x 512, and what is timed with them.
UTNET = 14_418_788
SD_UTNET = 18_836_223
STEP_SIZES = (UTNET, SD_UTNET, 100_000_000)
SUM_SIZES = ((UTNET, 5), (UTNET, 32), (SD_UTNET, 5), (100_000_000, 5))  # with numbers of clients
MASK_SIZES = ((4, 128), (4, 512), (16, 1024))  # images, and their side

# Whole steps: sides of images, and how often a client's images are gone through.
WIDTH = 32
OVERHEAD_SIDES = {"cpu": {128: 5, 256: 2}, "cuda": {128: 10, 256: 10, 512: 10}}
TRAINING_SIDES = {"cpu": {128: 3, 256: 2}, "cuda": {256: 10, 512: 10}}
ROUND_SIDES = {"cpu": {256: 3}, "cuda": {512: 12}}

PARTS = ("data", "forward", "backward", "difficulty", "step")  # of a training step, in order
PAPER_IMAGES = (204, 240, 365, 181, 166)  # of PolypGen's clients, in fold 1
PAPER_STEPS = 100 * 5 * sum(images // 4 for images in PAPER_IMAGES)  # rounds x epochs x batches


# --------------------------------------------------------------------------------------- measuring


class Clock:
    """Notes when each of several steps ends."""

    def __init__(self):
        self.ends = []

    def tick(self) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each end to the next."""
        return [end - start for start, end in itertools.pairwise(self.ends)]


class GpuClock(Clock):
    """The same by CUDA events: the GPU notes the time when it gets there, and nobody waits."""

    def tick(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.ends.append(event)

    def seconds(self) -> list[float]:
        self.ends[-1].synchronize()
        pairs = itertools.pairwise(self.ends)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def new_clock(device: torch.device) -> Clock:
    if device.type == "cuda":
        return GpuClock()
    return Clock()


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes."""
    clock = new_clock(device)
    clock.tick()
    function()
    clock.tick()
    return clock.seconds()[0]


def median_seconds(
    function: Callable[[], object], device: torch.device, budget: float = 2.0
) -> float:
    """Median time of a call: of at least 5 calls, and as many as fit the budget (in seconds)."""
    # On a GPU, writing 256 MB before each call pushes everything else out of its caches.
    cold = None
    if device.type == "cuda":
        cold = torch.empty(64 * 2**20, device=device)

    # Two calls warm up.
    function()
    function()

    times = []
    while len(times) < 5 or (sum(times) < budget and len(times) < 200):
        if cold is not None:
            cold.zero_()
        times.append(time_call(function, device))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source, target = torch.ones(2, 100_000_000, device=device)
    return 2 * source.nbytes / median_seconds(partial(target.copy_, source), device)


def alone(function: Callable[[], object]) -> object:
    """A call's result from a fresh process, which has its own allocator and peak of memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process has held; on a GPU, in tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()

    # Linux says it here; ru_maxrss would include what the parent process held.
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    kilobytes = re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]
    return 1024 * int(kilobytes)


def gpu_seconds(function: Callable[[], object]) -> float:
    """How long a call's kernels and copies keep the GPU busy, one after another as UTNet's are."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()

    microseconds = 0
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            microseconds += event.self_device_time_total
    return microseconds / 1e6


# -------------------------------------------------- an operation: its paths, their errors and times

Paths = dict[str, Callable[[], object]]  # {name: what does the whole operation, as PyTorch could}


def accept(what: str, error: Tensor, allowed: float) -> None:
    """End the program if a result is further from float64's than rounding explains."""
    worst = error.max().item()
    if not worst <= allowed:
        sys.exit(
            f"benchmark.py: {what} is off by {worst:.1e}, more than {allowed:.0e}; "
            "nothing was timed"
        )


def time_paths(
    operation: str, size: str, moved: int, paths: Paths, device: torch.device
) -> dict[str, object]:
    """The figures of an operation that has to move so many bytes."""
    print(f"timing {operation}, {size}", file=sys.stderr)
    times = {name: median_seconds(path, device) for name, path in paths.items()}

    # What torch.compile has made for this size would only be in the next one's way.
    torch.compiler.reset()

    others = [name for name in times if name != "kernel"]
    best = min(others, key=times.get)
    return {
        "operation": operation,
        "size": size,
        "bytes": moved,
        "ms": {name: 1e3 * seconds for name, seconds in times.items()},
        "bandwidth": moved / times["kernel"],
        "best": best,
        "ratio": times[best] / times["kernel"],
    }


@functools.cache
def tensor_sizes(size: int) -> list[int]:
    """How a vector of this size is cut into UTNet's tensors, as often as they fit, and a rest."""
    network = UTNet(in_channels=3, classes=2, width=32)
    sizes = [parameter.numel() for parameter in network.parameters()]
    whole, rest = divmod(size, UTNET)
    return sizes * whole + ([rest] if rest else [])


# ------------------------------------------------------------------------------- adamw_accumulate_


class StepInputs(NamedTuple):
    """What a step reads and writes."""

    theta: Tensor
    grad: Tensor
    m: Tensor
    v: Tensor
    update: Tensor
    eta: Tensor


def step_inputs(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> StepInputs:
    """Drawn vectors; the same numbers on every device and in every precision."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(size, generator=generator).to(device, dtype) for _ in range(5)]
    theta, grad, m, v, update = vectors
    eta = torch.tensor(ETA, device=device, dtype=dtype)
    return StepInputs(theta, grad, m, v.square_(), update, eta)


def step_whole(adamw_accumulate_: Callable, x: StepInputs) -> None:
    """One call for whole vectors: the kernel, the definition, and the definition compiled."""
    adamw_accumulate_(x.theta, x.grad, x.m, x.v, STEP, LR, x.update, x.eta)


def step_each(tensors: list[StepInputs]) -> None:
    """The definition for one tensor after another, as a network without a flat vector would."""
    for x in tensors:
        step_whole(fedgs.adamw_accumulate_, x)


def step_foreach(theta: list, grad: list, m: list, v: list, update: list, eta: Tensor) -> None:
    """The definition's lines by torch._foreach_*, which PyTorch's own optimisers use."""
    torch._foreach_mul_(theta, 1 - LR * DECAY)
    torch._foreach_lerp_(m, grad, 1 - BETAS[0])
    torch._foreach_mul_(v, BETAS[1])
    torch._foreach_addcmul_(v, grad, grad, 1 - BETAS[1])

    root = torch._foreach_div(v, 1 - BETAS[1] ** STEP)
    torch._foreach_sqrt_(root)
    torch._foreach_add_(root, EPS)
    s = torch._foreach_div(m, root)
    torch._foreach_mul_(s, LR / (1 - BETAS[0] ** STEP))
    torch._foreach_sub_(theta, s)

    torch._foreach_mul_(s, eta)
    torch._foreach_add_(update, s)


def fused_step(x: StepInputs) -> Callable[[], None]:
    """PyTorch's fused AdamW. It does not report s, so theta before and after have to tell."""
    # The parameter shares theta's memory.
    parameter = torch.nn.Parameter(x.theta)
    parameter.grad = x.grad
    optimiser = torch.optim.AdamW([parameter], LR, BETAS, EPS, DECAY, fused=True)

    def step() -> None:
        # It counts steps itself. Here every call is to be the same step, number STEP.
        count = torch.tensor(STEP - 1.0, device=x.theta.device)
        optimiser.state[parameter] = {"step": count, "exp_avg": x.m, "exp_avg_sq": x.v}
        before = x.theta.clone()
        optimiser.step()

        # s = what the decay has left of theta before, less theta after
        s = torch._foreach_mul([before], 1 - LR * DECAY)
        torch._foreach_sub_(s, [x.theta])
        torch._foreach_mul_(s, x.eta)
        torch._foreach_add_([x.update], s)

    return step


def step_paths(x: StepInputs) -> Paths:
    """All ways of taking one step, in place."""
    sizes = tensor_sizes(len(x.theta))
    theta, grad, m, v, update = (vector.split(sizes) for vector in x[:5])
    etas = [x.eta] * len(sizes)
    columns = zip(theta, grad, m, v, update, etas, strict=True)
    tensors = [StepInputs._make(column) for column in columns]

    compiled = torch.compile(fedgs.adamw_accumulate_, dynamic=False)
    return {
        "kernel": partial(step_whole, csrc.adamw_accumulate_, x),
        "eager": partial(step_whole, fedgs.adamw_accumulate_, x),
        "eager, tensor by tensor": partial(step_each, tensors),
        "foreach": partial(step_foreach, theta, grad, m, v, update, x.eta),
        "AdamW(fused) + foreach": fused_step(x),
        "torch.compile": partial(step_whole, compiled, x),
    }


def check_step(device: torch.device) -> None:
    """Every path against the definition in float64."""
    start = step_inputs(UTNET + 3, torch.device("cpu"), torch.float64)
    expected = StepInputs._make(x.clone() for x in start)
    step_whole(fedgs.adamw_accumulate_, expected)

    # The paths share their vectors: each begins from the same values again.
    found = StepInputs._make(x.to(device, torch.float32) for x in start)
    for name, path in step_paths(found).items():
        for x, value in zip(found, start, strict=True):
            x.copy_(value)
        path()

        # What AdamW(fused) leaves of s is a difference of parameters, and rounded like them.
        allowed = 3e-7
        if "fused" in name:
            allowed *= start.theta.abs().max().item() * ETA

        for i, what in enumerate(("theta", "grad", "m", "v", "update")):
            error = (found[i].cpu() - expected[i]).abs() / (1 + start[i].abs())
            accept(f"adamw_accumulate_, {name}: {what}", error, allowed)


def time_steps(device: torch.device) -> list[dict]:
    """5 reads and 4 writes of 4 bytes a parameter."""
    figures = []
    for size in STEP_SIZES:
        paths = step_paths(step_inputs(size, device))
        label = f"{size / 1e6:.1f} M"
        figures.append(time_paths("adamw_accumulate_", label, 36 * size, paths, device))
    return figures


# --------------------------------------------------------------------------------------- aggregate


class SumInputs(NamedTuple):
    """The arguments of aggregate."""

    total: Tensor
    updates: list[Tensor]
    weights: list[float]


def sum_inputs(size: int, clients: int, device: torch.device) -> SumInputs:
    """Drawn vectors; the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(size, generator=generator).to(device)
    updates = [torch.randn(size, generator=generator).to(device) for _ in range(clients)]
    return SumInputs(total, updates, [1 / clients] * clients)


def sum_whole(aggregate: Callable, x: SumInputs) -> Tensor:
    """The kernel or the definition, which measure and check the updates as well."""
    result, _, _ = aggregate(x.total, x.updates, x.weights)
    return result


def add_up(total: Tensor, updates: list[Tensor], weights: list[float]) -> Tensor:
    """The definition's sum alone, without norms and without the check."""
    result = total.clone()
    for update, weight in zip(updates, weights, strict=True):
        result = result.add_(update, alpha=weight)
    return result


def add_foreach(x: SumInputs, sizes: list[int]) -> Callable[[], Tensor]:
    """The same for a network's tensors by torch._foreach_*."""
    tensors = x.total.split(sizes)
    clients = [update.split(sizes) for update in x.updates]

    def add() -> Tensor:
        result = torch.empty_like(x.total)
        parts = result.split(sizes)
        torch._foreach_copy_(parts, tensors)
        for update, weight in zip(clients, x.weights, strict=True):
            torch._foreach_add_(parts, update, alpha=weight)
        return result

    return add


def add_layers(x: SumInputs, sizes: list[int]) -> Callable[[], Tensor]:
    """How frameworks of federated learning do it: numpy, a layer after another, by reduce."""
    totals = layers_of(x.total, sizes)
    clients = [layers_of(update, sizes) for update in x.updates]

    def add() -> Tensor:
        weighted = []
        for layers, weight in zip(clients, x.weights, strict=True):
            weighted.append([layer * np.float32(weight) for layer in layers])

        result = []
        for i, total in enumerate(totals):
            layers = [client[i] for client in weighted]
            result.append(total + functools.reduce(np.add, layers))
        return torch.from_numpy(np.concatenate(result))

    return add


def layers_of(vector: Tensor, sizes: list[int]) -> list[np.ndarray]:
    return [layer.numpy() for layer in vector.split(sizes)]


def sum_paths(x: SumInputs) -> Paths:
    """All ways of adding weighted updates up; each returns the sum."""
    sizes = tensor_sizes(len(x.total))

    # Stacking costs as much as the sum does, and is not counted: a kindness to addmv.
    stacked = torch.stack(x.updates).T
    weights = torch.tensor(x.weights, device=x.total.device)
    compiled = torch.compile(add_up, dynamic=False)
    paths = {
        "kernel": partial(sum_whole, csrc.aggregate, x),
        "eager, with norms and check": partial(sum_whole, fedgs.aggregate, x),
        "eager": partial(add_up, x.total, x.updates, x.weights),
        "foreach": add_foreach(x, sizes),
        "addmv, stacked before": partial(torch.addmv, x.total, stacked, weights),
        "torch.compile": partial(compiled, x.total, x.updates, x.weights),
    }
    if x.total.device.type == "cpu":
        paths["numpy, layer by layer"] = add_layers(x, sizes)
    return paths


def check_sum(device: torch.device) -> None:
    """Every path against the sum in float64, and the kernel's norms."""
    for clients in (1, 5, 33):
        x = sum_inputs(100_003, clients, torch.device("cpu"))
        doubles = [update.double() for update in x.updates]
        expected = add_up(x.total.double(), doubles, x.weights)
        norms = torch.stack([update.square().sum() for update in doubles])

        on_device = [update.to(device) for update in x.updates]
        x = SumInputs(x.total.to(device), on_device, x.weights)
        allowed = 2**-24 * 5 * (clients + 1)  # one rounding for each client, of sums up to 5
        for name, path in sum_paths(x).items():
            error = (path().cpu() - expected).abs()
            accept(f"aggregate of {clients}, {name}", error, allowed)

        _, found, _ = csrc.aggregate(x.total, x.updates, x.weights)
        accept(f"aggregate of {clients}, norms", (found.cpu() / norms - 1).abs(), 1e-12)


def time_sums(device: torch.device) -> list[dict]:
    """K + 1 reads and one write of 4 bytes a parameter."""
    figures = []
    for size, clients in SUM_SIZES:
        paths = sum_paths(sum_inputs(size, clients, device))
        label = f"{size / 1e6:.1f} M, K = {clients}"
        moved = 4 * size * (clients + 2)
        figures.append(time_paths("aggregate", label, moved, paths, device))
    return figures


# --------------------------------------------------------------------------------- mask_difficulty


def mask_inputs(
    images: int, side: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Drawn masks, 1 % lesion, and flags that all of them are small."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(images, 1, side, side, generator=generator) < 0.01
    small = torch.ones(images, dtype=torch.bool, device=device)
    return masks.to(device, dtype), small


def mask_paths(masks: Tensor, small: Tensor) -> Paths:
    """All ways of working out areas, difficulties and eta; each returns the three."""
    compiled = torch.compile(fedgs.mask_difficulty, dynamic=False)
    return {
        "kernel": partial(csrc.mask_difficulty, masks, small, 100.0),
        "eager": partial(fedgs.mask_difficulty, masks, small, 100.0),
        "torch.compile": partial(compiled, masks, small, 100.0),
    }


def check_masks(device: torch.device) -> None:
    """Every path against the formulas in numpy's float64."""
    side = 181  # no multiple of anything
    for dtype in (torch.uint8, torch.int64):
        masks, small = mask_inputs(3, side, dtype, device)
        pixels = masks.cpu().numpy().reshape(3, -1)
        areas = pixels.astype(bool).sum(axis=1)
        power = np.log(side**2 / areas) / math.log(100)
        difficulties = torch.from_numpy(np.tanh(power**2))
        areas = torch.from_numpy(areas)

        for name, path in mask_paths(masks, small).items():
            area, difficulty, eta = (x.cpu().double() for x in path())
            what = f"mask_difficulty, {name}"
            accept(f"{what}: area", (area - areas).abs(), 0)
            accept(f"{what}: difficulty", (difficulty - difficulties).abs(), 1e-6)
            accept(f"{what}: eta", (eta - 1 - 2 * difficulties.mean()).abs(), 1e-6)


def time_masks(device: torch.device) -> list[dict]:
    """Every pixel is read once."""
    figures = []
    for images, side in MASK_SIZES:
        for dtype in (torch.uint8, torch.int64):
            masks, small = mask_inputs(images, side, dtype, device)
            label = f"{images} x {side}², {str(dtype).removeprefix('torch.')}"
            paths = mask_paths(masks, small)
            figures.append(time_paths("mask_difficulty", label, masks.nbytes, paths, device))
    return figures


# ------------------------------------------------------------------- what FedGS adds to whole steps


def configure(
    device: torch.device, side: int, epochs: int, precision: str, method: str = "fedgs"
) -> fedgs.Config:
    """The paper's options but for these."""
    return fedgs.Config(
        method=method,
        local_epochs=epochs,
        image_size=side,
        width=WIDTH,
        device=device.type,
        precision=precision,
    )


def drawn_images(count: int, side: int) -> data.Images:
    """Some images as the stand-in for PolypGen has them."""
    images, masks = standin.polypgen_frames("C6", count, side)
    areas = masks.reshape(count, -1).sum(axis=1)
    return data.Images(
        centre="C6",
        names=[str(i) for i in range(count)],
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        masks=torch.from_numpy(masks).unsqueeze(1).byte(),
        inverse_area=torch.from_numpy(side**2 / np.maximum(areas, 1)),
        small=torch.ones(count, dtype=torch.bool),
        spacing=torch.ones(count, 2, dtype=torch.float64),
    )


def watch(function: Callable, spent: list[float], device: torch.device) -> Callable:
    """The function, with the seconds of each call added to a list."""

    def watched(*given: object) -> object:
        clock = new_clock(device)
        clock.tick()
        result = function(*given)
        clock.tick()
        spent.extend(clock.seconds())
        return result

    return watched


def time_overhead(
    device: torch.device, side: int, kernels: fedgs.Kernels, repetitions: int
) -> dict[str, object]:
    """Steps inside fedgs.train_client, and in them what difficulty and update take."""
    epochs = 4  # of one step each
    images = drawn_images(4, side).to(device)
    precision = hardware.choose_precision("auto", device)
    configs = {
        method: configure(device, side, epochs, precision, method) for method in ("fedavg", "fedgs")
    }
    flat = fedgs.FlatNetwork(fedgs.build_network(configs["fedgs"]).to(device))
    state = flat.state()

    # The methods take turns, so that a slow moment of the machine meets both.
    steps = {"fedavg": [], "fedgs": []}
    updates = {"fedavg": [], "fedgs": []}
    for repetition in range(repetitions + 1):
        for method, config in configs.items():
            clock = new_clock(device)
            spent = []
            watched = kernels._replace(
                mask_difficulty=watch(kernels.mask_difficulty, spent, device),
                adamw_accumulate_=watch(kernels.adamw_accumulate_, spent, device),
            )
            fedgs.train_client(flat, state, images, config, 1, watched, on_step=clock.tick)

            # The first repetition warms up, and a first step has no beginning on the clock.
            if repetition > 0:
                by_step = np.reshape(spent, (epochs, -1)).sum(axis=1)
                updates[method] += by_step.tolist()[1:]
                steps[method] += clock.seconds()

    # Whole steps vary by more than what FedGS adds: the overhead comes from the parts that differ.
    step = statistics.median(steps["fedavg"])
    plain = statistics.median(updates["fedavg"])
    scaled = statistics.median(updates["fedgs"])
    return {
        "operation": "UTNet step",
        "kernels": kernels.name,
        "size": f"4 x {side}², {precision}",
        "steps": len(steps["fedavg"]),
        "fedavg_ms": 1e3 * step,
        "update_fedavg_ms": 1e3 * plain,
        "update_fedgs_ms": 1e3 * scaled,
        "overhead": (scaled - plain) / step,
        "whole_step_difference": statistics.median(steps["fedgs"]) / step - 1,
    }


def time_overheads(device: torch.device) -> list[dict]:
    """With the kernels and with the definitions."""
    compiled, _ = fedgs.choose_kernels("auto", device)
    figures = []
    for side, repetitions in OVERHEAD_SIDES[device.type].items():
        figures.append(time_overhead(device, side, compiled, repetitions))
        figures.append(time_overhead(device, side, fedgs.PYTORCH, repetitions))
    return figures


# --------------------------------------------------------------------- whole steps by several paths


class Training(NamedTuple):
    """What a path trains with."""

    config: fedgs.Config
    flat: fedgs.FlatNetwork
    kernels: fedgs.Kernels
    gradient: Callable


def prepare(path: str, device: torch.device, side: int, epochs: int) -> Training:
    """Set up a path of training, in a process of its own.

    plain: float32 with the definitions, batch by batch, in memory as the system gives it; fp32,
    bf16: as in a run of fedgs.py.
    """
    precision = "bf16" if path == "bf16" else "fp32"
    config = configure(device, side, epochs, precision)
    if path == "plain":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        kernels = fedgs.PYTORCH
    else:
        hardware.prepare_torch()
        kernels, _ = fedgs.choose_kernels("auto", device)

    flat = fedgs.FlatNetwork(fedgs.build_network(config).to(device))
    gradient = fedgs.batch_gradient
    if path != "plain" and device.type == "cuda":
        gradient = hardware.CapturedGradient(fedgs.batch_gradient)
    return Training(config, flat, kernels, gradient)


def train_path(path: str, device: torch.device, side: int, epochs: int) -> dict[str, float]:
    """Epochs of eight steps of fedgs.train_client. -> the path's figures"""
    config, flat, kernels, gradient = prepare(path, device, side, epochs)
    state = flat.state()
    images = drawn_images(32, side).to(device)
    few = images.subset(range(8))

    # Two batches of each epoch warm up.
    warm_up = partial(fedgs.train_client, flat, state, few, config, 1, kernels, gradient)
    steps = warm_up().log.steps

    clock = new_clock(device)
    fedgs.train_client(flat, state, images, config, 1, kernels, gradient, clock.tick)
    seconds = clock.seconds()
    step = statistics.median(seconds)
    figures = {"ms": 1e3 * step, "steps": len(seconds), "peak_bytes": peak_memory(device)}

    if device.type == "cuda":
        busy = gpu_seconds(warm_up) / steps
        figures["steps_a_second"] = 1 / step
        figures["gpu_busy"] = busy / step
        figures["paper_hours"] = PAPER_STEPS * step / 3600
    return figures


def time_training(device: torch.device, side: int, epochs: int) -> dict[str, object]:
    """A step of training by every path that the hardware has."""
    print(f"timing training, 4 x {side}²", file=sys.stderr)
    names = ["plain", "fp32"]
    if hardware.has_bf16(device):
        names.append("bf16")
    paths = {name: alone(partial(train_path, name, device, side, epochs)) for name in names}
    return {"operation": "training", "size": f"4 x {side}²", "paths": paths}


def time_trainings(device: torch.device) -> list[dict]:
    sides = TRAINING_SIDES[device.type]
    return [time_training(device, side, epochs) for side, epochs in sides.items()]


# ----------------------------------------------------------------------- where a round's time goes


def train_in_parts(path: str, device: torch.device, side: int, epochs: int) -> dict[str, float]:
    """A path's steps part by part, and what comes once a round. -> {part: ms}"""
    config, flat, kernels, _ = prepare(path, device, side, 1)
    state = flat.state()
    images = drawn_images(16, side)
    client = images.to(device)
    update = fedgs.train_client(flat, state, client, config, 1, kernels)  # warms up

    clock = new_clock(device)
    time_parts(flat, client, config, kernels, epochs, clock)
    by_step = np.reshape(clock.seconds(), (-1, len(PARTS)))
    medians = np.median(by_step, axis=0).tolist()
    seconds = dict(zip(PARTS, medians, strict=True))

    # Each client's update is in memory of its own, as it would be.
    names = ("C1", "C2", "C3", "C4", "C5")
    updates = [replace(update, client=name, vector=update.vector.clone()) for name in names]
    server = fedgs.Server(state, dict.fromkeys(names, 1 / 5), config, kernels)
    apply = partial(server.apply, updates)
    seconds["aggregation of 5 clients"] = median_seconds(apply, device)

    clock = new_clock(device)
    for _ in range(4):
        fedgs.evaluate(flat.network, images)
        clock.tick()
    seconds["evaluation of an image"] = statistics.median(clock.seconds()) / len(images)
    return {part: 1e3 * spent for part, spent in seconds.items()}


def time_parts(
    flat: fedgs.FlatNetwork,
    client: data.Images,
    config: fedgs.Config,
    kernels: fedgs.Kernels,
    epochs: int,
    clock: Clock,
) -> None:
    """The lines of fedgs.train_client, with a tick of the clock after each of PARTS."""
    theta, grad = flat.parameters, flat.grad
    m = torch.zeros_like(theta)
    v = torch.zeros_like(theta)
    update = torch.zeros_like(theta)
    step = 0
    generator = torch.Generator().manual_seed(0)
    flat.network.train()

    clock.tick()
    for _ in range(epochs):
        for batch in fedgs.epoch_batches(client, config, generator):
            images, masks = data.augment(batch.images, batch.masks, batch.draws)
            images = data.normalise(images)
            clock.tick()

            loss, _ = fedgs.training_loss(
                flat.network, images, masks, batch.noise, config.precision
            )
            clock.tick()

            grad.zero_()
            loss.backward()
            clock.tick()

            _, _, eta = kernels.mask_difficulty(masks, batch.small, config.log_base)
            clock.tick()

            step += 1
            kernels.adamw_accumulate_(theta, grad, m, v, step, config.lr, update, eta)
            clock.tick()


def time_round(device: torch.device, side: int, epochs: int) -> dict[str, object]:
    """Where a round's time goes, plain and as in a run of fedgs.py."""
    print(f"timing a round, 4 x {side}²", file=sys.stderr)
    parts = {}
    for path in ("plain", "fp32"):
        parts[path] = alone(partial(train_in_parts, path, device, side, epochs))

    # A captured step is one launch and has no parts: it is timed whole.
    if device.type == "cuda":
        captured = alone(partial(train_path, "fp32", device, side, 2))
        parts["fp32"]["the step, captured"] = captured["ms"]
    return {"operation": "round", "size": f"4 x {side}²", "parts_ms": parts}


def time_rounds(device: torch.device) -> list[dict]:
    sides = ROUND_SIDES[device.type]
    return [time_round(device, side, epochs) for side, epochs in sides.items()]


# ------------------------------------------------------------------------------------------ tables


def machine(device: torch.device, copy: float) -> dict[str, object]:
    """What the figures were measured on."""
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        where = f"{processor()}, {torch.get_num_threads()} threads"
    return {
        "device": where,
        "copy_bandwidth": copy,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor() -> str:
    """The CPU's name. Linux knows it, Python only its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        if name is not None:
            return name[1]
    return platform.processor()


def markdown(machine: dict, figures: list[dict]) -> str:
    """The figures as tables, one for each kind that is there."""
    sections = [
        f"{machine['device']}; copy {machine['copy_bandwidth'] / 1e9:.1f} GB/s; "
        f"torch {machine['torch']}, Python {machine['python']}, {machine['system']}"
    ]

    kernels = [row for row in figures if "ratio" in row]
    if kernels:
        bandwidth = machine["copy_bandwidth"]
        sections.append(table([kernel_cells(row, bandwidth) for row in kernels]))

    overheads = [row for row in figures if "overhead" in row]
    if overheads:
        sections.append(table([overhead_cells(row) for row in overheads]))

    trainings = [row for row in figures if "paths" in row]
    if trainings:
        sections.append(training_table(trainings))

    rounds = [row for row in figures if "parts_ms" in row]
    sections += [round_table(row) for row in rounds]
    return "\n\n".join(sections)


def table(rows: list[dict[str, str]]) -> str:
    """Rows of {heading: cell}."""
    header = list(rows[0])
    return tables.markdown([header, *[list(row.values()) for row in rows]])


def kernel_cells(row: dict, copy_bandwidth: float) -> dict[str, str]:
    """An operation's kernel beside the best of the PyTorch paths."""
    ms = row["ms"]
    best = row["best"]
    others = [f"{name} {ms[name]:.3g}" for name in ms if name not in ("kernel", best)]
    return {
        "operation": row["operation"],
        "size": row["size"],
        "kernel": f"{ms['kernel']:.3g} ms",
        "GB/s": f"{row['bandwidth'] / 1e9:.1f}",
        "of copy": f"{row['bandwidth'] / copy_bandwidth:.0%}",
        "best PyTorch path": f"{best}, {ms[best]:.3g} ms",
        "ratio": f"**{row['ratio']:.1f}×**",
        "the others": ", ".join(others),
    }


def overhead_cells(row: dict) -> dict[str, str]:
    """What FedGS adds to a step of FedAvg."""
    whole = f"{row['whole_step_difference']:+.1%} (median of {row['steps']})"
    return {
        "UTNet step, width 32": row["size"],
        "kernels": row["kernels"],
        "FedAvg's step": f"{row['fedavg_ms']:.0f} ms",
        "its update": f"{row['update_fedavg_ms']:.2f} ms",
        "FedGS's difficulty and update": f"{row['update_fedgs_ms']:.2f} ms",
        "overhead": f"**{row['overhead']:.2%}**",
        "whole steps compared": whole,
    }


def training_table(figures: list[dict]) -> str:
    """A step by each path, beside the plain one."""
    rows = []
    for row in figures:
        plain = row["paths"]["plain"]
        for name, path in row["paths"].items():
            rows.append(training_cells(row["size"], name, path, plain))

    text = table(rows)
    if "bf16" not in figures[0]["paths"]:
        text += "\n\nbf16 is left out: this hardware does not compute in it."
    return text


def training_cells(size: str, name: str, path: dict, plain: dict) -> dict[str, str]:
    """One path of training; on a GPU with more columns."""
    cells = {
        "UTNet, width 32": size,
        "path": name,
        "a step (median of)": f"{path['ms']:.4g} ms ({path['steps']})",
        "ratio to plain": f"**{plain['ms'] / path['ms']:.2f}×**",
        "peak memory": f"{path['peak_bytes'] / 2**30:.2f} GiB",
    }
    if "gpu_busy" in path:
        paper = f"{PAPER_STEPS:,} steps, as the paper's PolypGen experiment has"
        cells["steps a second"] = f"{path['steps_a_second']:.1f}"
        cells["GPU busy"] = f"{path['gpu_busy']:.0%}"
        cells[paper] = f"{path['paper_hours']:.1f} h"
    return cells


def round_table(row: dict) -> str:
    """The parts of a step with their shares of it, then the rest of a round."""
    plain = row["parts_ms"]["plain"]
    fp32 = row["parts_ms"]["fp32"]
    plain_step = sum(plain[part] for part in PARTS)
    fp32_step = sum(fp32[part] for part in PARTS)

    lines = [[f"a step, {row['size']}", "plain", "share", "fp32", "share"]]
    for part in PARTS:
        before, after = plain[part], fp32[part]
        shares = f"{before / plain_step:.2%}", f"{after / fp32_step:.2%}"
        lines.append([part, milliseconds(before), shares[0], milliseconds(after), shares[1]])
    lines.append(["**all of these**", milliseconds(plain_step), "", milliseconds(fp32_step), ""])

    for part in fp32:
        if part not in PARTS:
            before = milliseconds(plain[part]) if part in plain else ""
            lines.append([part, before, "", milliseconds(fp32[part]), ""])
    return tables.markdown(lines)


def milliseconds(ms: float) -> str:
    return f"{ms:.4g} ms"


# ------------------------------------------------------------------------------------ command line

BENCHMARKS = {  # what --only chooses from, in the order of the tables
    "adamw": time_steps,
    "aggregate": time_sums,
    "masks": time_masks,
    "steps": time_overheads,
    "training": time_trainings,
    "round": time_rounds,
}


def main() -> None:
    """Check every path, then time what was asked for, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    names = tuple(BENCHMARKS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="what to time")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    device = torch.device(options.device)
    problem = csrc.problem(device)
    if problem:
        sys.exit(f"benchmark.py: {problem}")

    # A fast path that computes something else is no path.
    torch.manual_seed(0)
    check_step(device)
    check_sum(device)
    check_masks(device)

    about = machine(device, copy_bandwidth(device))
    figures = []
    for name, benchmark in BENCHMARKS.items():
        if name in options.only:
            figures += benchmark(device)

    print(markdown(about, figures))
    if options.json:
        content = {"machine": about, "figures": figures}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
