"""The kernels against every way PyTorch has of doing the same: checked first, then timed.

    python csrc/benchmark.py                  # this machine's GPU, else its CPU
    python csrc/benchmark.py --device cpu --only adamw aggregate --json figures.json
    python csrc/benchmark.py --only training  # whole steps and rounds, and where their time goes

The operations do so little arithmetic that the bytes decide: a kernel that reads and writes all
it has to once, and nothing twice, is as fast as memory allows. So the tables show the bytes that
each element costs, on every machine: those that the kernel moves, and those of the naive CUDA
kernel, both counted by hand, and those of the definition in fedgs.py, for which each line that
PyTorch executes is looked at. What the kernel moves, in its time, is a bandwidth. It is compared
with that of a plain copy in the same run, and the time with the best of the PyTorch paths. The
naive kernels need a GPU. They move hardly more, so what they lose has other reasons, which
kernels_cuda.cu names.

Times are medians; on a GPU by CUDA events, with cold caches.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
LARGE = 100_000_000
STEP_SIZES = (UTNET, SD_UTNET, LARGE)
SUM_SIZES = ((UTNET, 5), (UTNET, 32), (SD_UTNET, 5), (LARGE, 5))  # with numbers of clients
MASK_SIZES = ((4, 128), (4, 512), (16, 1024))  # images, and their side

# Whole steps: sides of images, and how often a client's images are gone through.
WIDTH = 32
TRAINING_SIDES = {"cpu": {128: 3, 256: 2}, "cuda": {512: 10}}

BUDGET = 2.0  # seconds of calls of which a median is taken
TINY = os.environ.get("FEDGS_TINY") == "1"
if TINY:  # everything runs in seconds, and no time means anything
    UTNET, LARGE, WIDTH, BUDGET = 60_000, 100_000, 2, 0.0
    STEP_SIZES, SUM_SIZES, MASK_SIZES = (UTNET,), ((UTNET, 3),), ((2, 16),)
    TRAINING_SIDES = {"cpu": {32: 1}, "cuda": {32: 1}}

# Parts of a training step in their order, and what comes once a round.
PARTS = ("data", "forward", "backward", "difficulty", "step")
ADDED = "what FedGS adds to FedAvg's"
AGGREGATION, EVALUATION = "aggregation of 5 clients", "evaluation of an image"

# The paper's experiment on PolypGen: rounds and epochs, and in fold 1 the clients' images.
PAPER_ROUNDS, PAPER_EPOCHS = 100, 5
PAPER_TRAIN, PAPER_VALIDATION = (204, 240, 365, 181, 166), (26, 30, 46, 23, 21)


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


def median_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median time of a call: of at least 5 calls, and as many as fit the budget."""
    # On a GPU, writing 256 MB before each call pushes everything else out of its caches.
    cold = None
    if device.type == "cuda":
        cold = torch.empty(64 * 2**20, device=device)

    # Two calls warm up.
    function()
    function()

    times = []
    while len(times) < 5 or (sum(times) < BUDGET and len(times) < 200):
        if cold is not None:
            cold.zero_()
        times.append(time_call(function, device))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source, target = torch.ones(2, LARGE, device=device)
    return 2 * source.nbytes / median_seconds(partial(target.copy_, source), device)


def alone(function: Callable[[], object]) -> object:
    """A call's result from a fresh process, which has its own allocator and peak of memory."""
    if TINY:  # a process takes longer than all of this
        return function()
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


class Traffic(TorchDispatchMode):
    """Adds up the bytes of what PyTorch's operations read and write, each as a pass of its own."""

    bytes = 0

    def __torch_dispatch__(
        self, operation: Callable, types: object, arguments: tuple = (), options: dict | None = None
    ) -> object:
        options = options or {}
        result = operation(*arguments, **options)

        # A view of an argument moves nothing.
        if not operation.is_view:
            self.bytes += memory((arguments, options)) + memory(result)
        return result


def memory(things: object) -> int:
    """Bytes of all tensors among these things, each counted once."""
    sizes = {x.data_ptr(): x.nbytes for x in tree_leaves(things) if isinstance(x, Tensor)}
    return sum(sizes.values())


def traffic(function: Callable[[], object]) -> int:
    """The bytes that a call moves, if nothing stays in a cache."""
    with Traffic() as seen:
        function()
    return seen.bytes


# -------------------------------------------------- an operation: its paths, their errors and times

Paths = dict[str, Callable[[], object]]  # {name: what does the whole operation}
KERNEL, NAIVE, DEFINITION = "kernel", "naive kernel", "definition"  # the others are PyTorch's, too


def accept(what: str, error: Tensor, allowed: float) -> None:
    """End the program if a result is further from float64's than rounding explains."""
    worst = error.max().item()
    if not worst <= allowed:
        sys.exit(
            f"benchmark.py: {what} is off by {worst:.1e}, more than {allowed:.0e}; "
            "nothing was timed"
        )


def time_paths(
    operation: str,
    size: str,
    elements: int,
    moved: dict[str, int],
    paths: Paths,
    device: torch.device,
) -> dict[str, object]:
    """The figures of an operation. moved: the bytes of the kernel and of the naive one."""
    print(f"timing {operation}, {size}", file=sys.stderr)
    moved[DEFINITION] = traffic(paths[DEFINITION])
    times = {name: median_seconds(path, device) for name, path in paths.items()}

    # What torch.compile has made for this size would only be in the next one's way.
    torch.compiler.reset()

    others = [name for name in times if name not in (KERNEL, NAIVE)]
    best = min(others, key=times.get)
    return {
        "operation": operation,
        "size": size,
        "bytes": {name: count / elements for name, count in moved.items()},
        "ms": {name: 1e3 * seconds for name, seconds in times.items()},
        "bandwidth": moved[KERNEL] / times[KERNEL],
        "best": best,
        "ratio": times[best] / times[KERNEL],
    }


@functools.cache
def tensor_sizes(size: int) -> list[int]:
    """How a vector of this size is cut into UTNet's tensors, as often as they fit, and a rest."""
    network = UTNet(in_channels=3, classes=2, width=WIDTH)
    sizes = [parameter.numel() for parameter in network.parameters()]
    whole, rest = divmod(size, sum(sizes))
    return sizes * whole + ([rest] if rest else [])


# ------------------------------------------------------------------------------- adamw_accumulate_


class StepInputs(NamedTuple):
    """What a step reads and writes."""

    theta: Tensor
    grad: Tensor
    m: Tensor
    v: Tensor
    update: Tensor
    step: Tensor
    eta: Tensor


def step_inputs(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> StepInputs:
    """Drawn vectors; the same numbers on every device and in every precision."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(size, generator=generator).to(device, dtype) for _ in range(5)]
    theta, grad, m, v, update = vectors
    step = torch.tensor(STEP, device=device)
    eta = torch.tensor(ETA, device=device, dtype=dtype)
    return StepInputs(theta, grad, m, v.square_(), update, step, eta)


def step_whole(adamw_accumulate_: Callable, x: StepInputs) -> None:
    """One call for whole vectors: the kernels, the definition, and the definition compiled."""
    adamw_accumulate_(x.theta, x.grad, x.m, x.v, x.step, LR, x.update, x.eta)


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
    columns = zip(theta, grad, m, v, update, strict=True)
    tensors = [StepInputs(*column, x.step, x.eta) for column in columns]

    compiled = torch.compile(fedgs.adamw_accumulate_, dynamic=False)
    paths = {
        KERNEL: partial(step_whole, csrc.adamw_accumulate_, x),
        DEFINITION: partial(step_whole, fedgs.adamw_accumulate_, x),
        "tensor by tensor": partial(step_each, tensors),
        "foreach": partial(step_foreach, theta, grad, m, v, update, x.eta),
        "AdamW(fused) + foreach": fused_step(x),
        "torch.compile": partial(step_whole, compiled, x),
    }
    if x.theta.is_cuda:
        paths[NAIVE] = partial(step_whole, csrc.naive_adamw_accumulate_, x)
    return paths


def check_step(device: torch.device) -> None:
    """Every path against the definition in float64."""
    start = step_inputs(UTNET + 3, torch.device("cpu"), torch.float64)
    expected = StepInputs._make(x.clone() for x in start)
    step_whole(fedgs.adamw_accumulate_, expected)

    # The paths share their vectors: each begins from the same values again.
    found = step_inputs(UTNET + 3, device)
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
    """5 reads and 4 writes of 4 bytes a parameter, by either kernel."""
    figures = []
    for size in STEP_SIZES:
        paths = step_paths(step_inputs(size, device))
        label = f"{size / 1e6:.1f} M"
        moved = {KERNEL: 36 * size, NAIVE: 36 * size}
        figures.append(time_paths("adamw_accumulate_", label, size, moved, paths, device))
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
    """The kernels or the definition, which measure and check the updates as well."""
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
        KERNEL: partial(sum_whole, csrc.aggregate, x),
        DEFINITION: partial(sum_whole, fedgs.aggregate, x),
        "its sum alone": partial(add_up, x.total, x.updates, x.weights),
        "foreach": add_foreach(x, sizes),
        "addmv, stacked before": partial(torch.addmv, x.total, stacked, weights),
        "torch.compile": partial(compiled, x.total, x.updates, x.weights),
    }
    if x.total.is_cuda:
        paths[NAIVE] = partial(sum_whole, csrc.naive_aggregate, x)
    else:
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
    """K + 1 reads and one write of 4 bytes a parameter; naively a copy, and K times a sum."""
    figures = []
    for size, clients in SUM_SIZES:
        paths = sum_paths(sum_inputs(size, clients, device))
        label = f"{size / 1e6:.1f} M, K = {clients}"
        moved = {KERNEL: 4 * size * (clients + 2), NAIVE: 4 * size * (2 + 3 * clients)}
        figures.append(time_paths("aggregate", label, size, moved, paths, device))
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
    paths = {
        KERNEL: partial(csrc.mask_difficulty, masks, small, 100.0),
        DEFINITION: partial(fedgs.mask_difficulty, masks, small, 100.0),
        "torch.compile": partial(compiled, masks, small, 100.0),
    }
    if masks.is_cuda:
        paths[NAIVE] = partial(csrc.naive_mask_difficulty, masks, small, 100.0)
    return paths


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
    """Every pixel is read once, by either kernel."""
    figures = []
    for images, side in MASK_SIZES:
        for dtype in (torch.uint8, torch.int64):
            masks, small = mask_inputs(images, side, dtype, device)
            label = f"{images} x {side}², {str(dtype).removeprefix('torch.')}"
            paths = mask_paths(masks, small)
            moved = {KERNEL: masks.nbytes, NAIVE: masks.nbytes}
            pixels = masks.numel()
            figures.append(time_paths("mask_difficulty", label, pixels, moved, paths, device))
    return figures


# ------------------------------------------------------------------------- whole steps and rounds


def configure(device: torch.device, side: int, epochs: int, precision: str) -> fedgs.Config:
    """The paper's options but for these."""
    return fedgs.Config(
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


class Training(NamedTuple):
    """What a path trains with."""

    config: fedgs.Config
    flat: fedgs.FlatNetwork
    kernels: fedgs.Kernels
    take_step: Callable


def path_names(device: torch.device) -> list[str]:
    """plain: with the definitions, a launch after another, in memory as the system gives it; the
    others: as in a run of fedgs.py.
    """
    names = ["plain fp32", "fp32"]
    if hardware.has_bf16(device):
        names += ["plain bf16", "bf16"]
    return names


def prepare(path: str, device: torch.device, side: int, epochs: int) -> Training:
    """Set up a path of training, in a process of its own."""
    config = configure(device, side, epochs, precision=path.removeprefix("plain "))
    plain = path.startswith("plain")
    if plain:
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        kernels = fedgs.PYTORCH
    else:
        hardware.prepare_torch()
        kernels, _ = fedgs.choose_kernels("auto", device)

    flat = fedgs.FlatNetwork(fedgs.build_network(config).to(device))
    take_step = fedgs.training_step
    if not plain and device.type == "cuda":
        take_step = hardware.CapturedStep(fedgs.training_step)
    return Training(config, flat, kernels, take_step)


def train_path(path: str, device: torch.device, side: int, epochs: int) -> dict[str, object]:
    """Epochs of eight steps of fedgs.train_client, and a round in parts. -> the path's figures"""
    training = prepare(path, device, side, epochs)
    config, flat, kernels, take_step = training
    state = flat.state()
    images = drawn_images(32, side).to(device)
    few = images.subset(range(8))

    # Two batches of each epoch warm up.
    warm_up = partial(fedgs.train_client, flat, state, few, config, 1, kernels, take_step)
    update = warm_up()

    clock = new_clock(device)
    fedgs.train_client(flat, state, images, config, 1, kernels, take_step, clock.tick)
    seconds = clock.seconds()
    step = statistics.median(seconds)
    figures = {"ms": 1e3 * step, "steps": len(seconds), "peak_bytes": peak_memory(device)}
    if device.type == "cuda":
        figures["gpu_busy"] = gpu_seconds(warm_up) / update.log.steps / step

    parts = time_parts(training, images.subset(range(16)))
    parts |= time_server(training, state, update, images.to(torch.device("cpu")))
    figures["parts_ms"] = {part: 1e3 * spent for part, spent in parts.items()}

    batches = sum(count // config.batch_size for count in PAPER_TRAIN)
    training_time = PAPER_EPOCHS * batches * step
    validation_time = sum(PAPER_VALIDATION) * parts[EVALUATION]
    round_time = training_time + parts[AGGREGATION] + validation_time
    figures["paper_hours"] = PAPER_ROUNDS * round_time / 3600
    return figures


def time_parts(training: Training, images: data.Images) -> dict[str, float]:
    """The lines of fedgs.training_step, with a tick of the clock after each of PARTS.

    -> {part: seconds}, and what FedGS's two parts take more than FedAvg's. The step is not
    captured: then it would be one launch, and have no parts.
    """
    config, flat, kernels, _ = training
    theta, grad = flat.parameters, flat.grad
    _, m, v, step, update = flat.progress
    generator = torch.Generator().manual_seed(0)
    clock = new_clock(theta.device)
    flat.network.train()

    # The methods take turns, so that a slow moment of the machine meets both.
    clock.tick()
    for method in ("fedgs", "fedavg") * config.local_epochs:
        for batch in fedgs.epoch_batches(images, config, generator):
            x, masks = data.augment(batch.images, batch.masks, batch.draws)
            x = data.normalise(x)
            clock.tick()

            loss, _ = fedgs.training_loss(flat.network, x, masks, batch.noise, config.precision)
            clock.tick()

            grad.zero_()
            loss.backward()
            clock.tick()

            if method == "fedgs":
                _, _, eta = kernels.mask_difficulty(masks, batch.small, config.log_base)
            clock.tick()

            step.add_(1)
            if method == "fedgs":
                kernels.adamw_accumulate_(theta, grad, m, v, step, config.lr, update, eta)
            else:
                kernels.adamw_accumulate_(theta, grad, m, v, step, config.lr)
            clock.tick()

    seconds = np.reshape(clock.seconds(), (config.local_epochs, 2, -1, len(PARTS)))
    scaled, plain = np.median(seconds, axis=(0, 2)).tolist()
    parts = dict(zip(PARTS, scaled, strict=True))
    parts[ADDED] = sum(scaled[-2:]) - sum(plain[-2:])
    return parts


def time_server(
    training: Training, state: fedgs.State, update: fedgs.Update, images: data.Images
) -> dict[str, float]:
    """What comes once a round. -> {part: seconds}"""
    config, flat, kernels, _ = training
    device = flat.grad.device

    # Each client's update is in memory of its own, as it would be.
    names = ("C1", "C2", "C3", "C4", "C5")
    updates = [replace(update, client=name, vector=update.vector.clone()) for name in names]
    server = fedgs.Server(state, dict.fromkeys(names, 1 / 5), config, kernels)
    aggregation = median_seconds(partial(server.apply, updates), device)

    clock = new_clock(device)
    for _ in range(4):
        fedgs.evaluate(flat.network, images)
        clock.tick()
    evaluation = statistics.median(clock.seconds()) / len(images)
    return {AGGREGATION: aggregation, EVALUATION: evaluation}


def time_trainings(device: torch.device) -> list[dict]:
    """A training step and a round by every path that the hardware has."""
    figures = []
    for side, epochs in TRAINING_SIDES[device.type].items():
        size = f"4 x {side}²"
        print(f"timing training, {size}", file=sys.stderr)
        paths = {}
        for name in path_names(device):
            paths[name] = alone(partial(train_path, name, device, side, epochs))
        figures.append({"operation": "training", "size": size, "paths": paths})
    return figures


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

    trainings = [row for row in figures if "paths" in row]
    if trainings:
        cells = []
        for row in trainings:
            cells += [training_cells(row, path) for path in row["paths"]]
        sections.append(table(cells))
        sections += [parts_table(row) for row in trainings]
    return "\n\n".join(sections)


def table(rows: list[dict[str, str]]) -> str:
    """Rows of {heading: cell}."""
    header = list(rows[0])
    return tables.markdown([header, *[list(row.values()) for row in rows]])


def kernel_cells(row: dict, copy_bandwidth: float) -> dict[str, str]:
    """An operation's kernel beside the naive one, on a GPU, and the best of the PyTorch paths."""
    ms = row["ms"]
    best = row["best"]
    others = [f"{name} {ms[name]:.3g}" for name in ms if name not in (KERNEL, NAIVE, best)]
    moved = [f"{row['bytes'][name]:.3g}" for name in (KERNEL, NAIVE, DEFINITION)]
    cells = {
        "operation": row["operation"],
        "size": row["size"],
        "bytes an element: kernel, naive, definition": ", ".join(moved),
        "kernel": f"{ms[KERNEL]:.3g} ms",
        "GB/s": f"{row['bandwidth'] / 1e9:.1f}",
        "of copy": f"{row['bandwidth'] / copy_bandwidth:.0%}",
    }
    if NAIVE in ms:
        cells["naive kernel"] = f"{ms[NAIVE]:.3g} ms"
    cells["best PyTorch path"] = f"{best}, {ms[best]:.3g} ms"
    cells["ratio"] = f"**{row['ratio']:.1f}×**"
    cells["the others"] = ", ".join(others)
    return cells


def training_cells(row: dict, name: str) -> dict[str, str]:
    """One path of training; on a GPU with how busy it is."""
    path = row["paths"][name]
    plain = row["paths"]["plain fp32"]
    cells = {
        f"UTNet, width {WIDTH}": row["size"],
        "path": name,
        "a step (median of)": f"{milliseconds(path['ms'])} ({path['steps']})",
        "ratio to plain fp32": f"**{plain['ms'] / path['ms']:.2f}×**",
        "peak memory": f"{path['peak_bytes'] / 2**30:.2f} GiB",
    }
    if "gpu_busy" in path:
        cells["GPU busy"] = f"{path['gpu_busy']:.0%}"
    cells["the paper's experiment, at this size"] = f"{path['paper_hours']:.1f} h"
    return cells


def parts_table(row: dict) -> str:
    """The parts of a step with their shares of it, then the rest of a round, by each path."""
    lines = [[f"a step in parts, {row['size']}", *row["paths"]]]
    for part in (*PARTS, ADDED, AGGREGATION, EVALUATION):
        cells = [part]
        for path in row["paths"].values():
            ms = path["parts_ms"]
            cell = milliseconds(ms[part])
            if part in (*PARTS, ADDED):
                whole = sum(ms[one] for one in PARTS)
                cell += f" ({ms[part] / whole:.2%})"
            cells.append(cell)
        lines.append(cells)
    return tables.markdown(lines)


def milliseconds(ms: float) -> str:
    return f"{ms:.4g} ms"


# ------------------------------------------------------------------------------------ command line

CHECKS = {"adamw": check_step, "aggregate": check_sum, "masks": check_masks}
BENCHMARKS = {  # what --only chooses from, in the order of the tables
    "adamw": time_steps,
    "aggregate": time_sums,
    "masks": time_masks,
    "training": time_trainings,
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

    # A fast path that computes something else is no path. Whole steps take all three.
    torch.manual_seed(0)
    operations_alone = set(options.only) <= set(CHECKS)
    for name, check in CHECKS.items():
        if name in options.only or not operations_alone:
            check(device)

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
