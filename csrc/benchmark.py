"""The kernels against every way PyTorch has of doing the same: checked first, then timed.

    python csrc/benchmark.py                        # this machine's GPU if there is one, else its CPU
    python csrc/benchmark.py --device cpu --only adamw aggregate --json figures.json
    python csrc/benchmark.py --only training round  # whole steps of training, and where their time goes

Each operation counts the bytes that it cannot avoid moving. Its time gives a bandwidth, which is compared with that of
a plain copy in the same run, and with the best of the PyTorch paths. Medians; on a GPU by CUDA events, with cold caches.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import csrc
import data
import fedgs
from models import UTNet

LR, BETAS, EPS, DECAY, STEP, ETA = 1e-4, (0.9, 0.999), 1e-8, 0.01, 10, 1.7
UTNET, SD_UTNET = 14_418_788, 18_836_223  # numbers of parameters, at 512x512
PAPER = 100 * 5 * sum(images // 4 for images in (204, 240, 365, 181, 166))  # steps: rounds, epochs, PolypGen's fold 1
PARTS = "data", "forward", "backward", "difficulty", "step"
OPERATIONS = "adamw", "aggregate", "masks", "steps", "training", "round"


# ------------------------------------------------------------------------------------------------ measuring


def seconds(function, device, budget=2.0):
    """Median time of a call, of at least 5 calls and as many as fit the budget (in seconds), after two to warm up."""
    cold = torch.empty(64 * 2**20, device=device) if device.type == "cuda" else None  # 256 MB, more than any cache holds
    times = []
    for call in range(-2, 200):
        if cold is not None:
            cold.zero_()
        times.append(timed(function, device)())
        if call >= 5 and sum(times) > budget:
            break
    return statistics.median(times[2:])


def timed(function, device):
    """The function with its result replaced by the seconds it took, on a GPU those between two events."""

    def on_cpu(*given):
        start = time.perf_counter()
        function(*given)
        return time.perf_counter() - start

    def on_gpu(*given):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(*given)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return on_cpu if device.type == "cpu" else on_gpu


class Clock:
    """Takes the place of a progress bar: notes when each step ends, on a GPU without waiting for it."""

    def __init__(self, device):
        self.device, self.ends = device, []

    def update(self):
        if self.device.type == "cuda":
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())

    def seconds(self):
        """From each end to the next."""
        if self.device.type == "cpu":
            return np.diff(self.ends)
        self.ends[-1].synchronize()
        return np.array([start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(self.ends)])


def alone(function, *given):
    """The function's result in a fresh process, which has its own allocator and its own peak of memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def peak_memory(device):
    """The most bytes that this process has held, on a GPU in tensors. (A CPU's ru_maxrss would include its parent's.)"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # Linux
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) if status.exists() else math.nan


def gpu_seconds(function):
    """How long the kernels and copies of a call keep the GPU busy; one after another, as UTNet's are."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.self_device_time_total for e in events) / 1e6


def copy_bandwidth(device):
    """Bytes a second, read and written, of a copy that no cache holds."""
    source, target = torch.ones(2, 100_000_000, device=device)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


# ------------------------------------------------------------------------------------------ adamw_accumulate_


@functools.cache
def shapes_of(size):
    """Sizes of UTNet's tensors, as often as all of them fit into a vector of this size, and what is left."""
    sizes = [p.numel() for p in UTNet(in_channels=3, classes=2, width=32).parameters()]
    whole, rest = divmod(size, UTNET)
    return sizes * whole + [rest] * (rest > 0)


def step_inputs(size, device, dtype=torch.float32):
    """theta, grad, m, v, delta, eta"""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(size, generator=generator).to(device, dtype) for _ in range(5)]
    vectors[3].square_()
    return *vectors, torch.tensor(ETA, device=device, dtype=dtype)


def step_paths(theta, grad, m, v, delta, eta):
    """{name: a function that takes one step in place}"""
    vectors = theta, grad, m, v, delta
    tensors = [x.split(shapes_of(len(theta))) for x in vectors]
    flat = torch.compile(fedgs.adamw_accumulate_, dynamic=False)

    def one_by_one():
        for t, g, first, second, d in zip(*tensors):
            fedgs.adamw_accumulate_(t, g, first, second, STEP, LR, d, eta)

    def foreach():
        t, g, first, second, d = tensors
        torch._foreach_mul_(t, 1 - LR * DECAY)
        torch._foreach_lerp_(first, g, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, g, g, 1 - BETAS[1])
        root = torch._foreach_div(second, 1 - BETAS[1] ** STEP)
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, EPS)
        s = torch._foreach_div(first, root)
        torch._foreach_mul_(s, LR / (1 - BETAS[0] ** STEP))
        torch._foreach_sub_(t, s)
        torch._foreach_mul_(s, eta)
        torch._foreach_add_(d, s)

    parameter = torch.nn.Parameter(theta)  # shares theta's memory
    parameter.grad = grad
    optimiser = torch.optim.AdamW([parameter], LR, BETAS, EPS, DECAY, fused=True)

    def fused():
        count = torch.tensor(STEP - 1.0, device=theta.device)
        optimiser.state[parameter] = {"step": count, "exp_avg": m, "exp_avg_sq": v}
        before = theta.clone()
        optimiser.step()
        s = torch._foreach_mul([before], 1 - LR * DECAY)
        torch._foreach_sub_(s, [theta])
        torch._foreach_mul_(s, eta)
        torch._foreach_add_([delta], s)

    return {
        "kernel": lambda: csrc.adamw_accumulate_(theta, grad, m, v, STEP, LR, delta, eta),
        "eager": lambda: fedgs.adamw_accumulate_(theta, grad, m, v, STEP, LR, delta, eta),
        "eager, tensor by tensor": one_by_one,
        "foreach": foreach,
        "AdamW(fused) + foreach": fused,
        "torch.compile": lambda: flat(theta, grad, m, v, STEP, LR, delta, eta),
    }


def check_step(device):
    start = step_inputs(UTNET + 3, "cpu", torch.float64)
    expected = [x.clone() for x in start]
    fedgs.adamw_accumulate_(*expected[:4], STEP, LR, *expected[4:])
    given = [x.to(device, torch.float32) for x in start]
    for name, path in step_paths(*given).items():
        for x, value in zip(given, start):
            x.copy_(value)
        path()
        # AdamW(fused) does not report s: what it leaves of it is a difference of parameters, rounded like them
        allowed = 3e-7 * (start[0].abs().max() * ETA if "fused" in name else 1)
        for what, x, value, before in zip(("theta", "grad", "m", "v", "delta"), given, expected, start):
            accept(f"adamw_accumulate_, {name}: {what}", (x.cpu() - value).abs() / (1 + before.abs()), allowed)


def time_step(device, size):
    paths = step_paths(*step_inputs(size, device))
    return row("adamw_accumulate_", f"{size / 1e6:.1f} M", 36 * size, paths, device)


# -------------------------------------------------------------------------------------------------- aggregate


def aggregate_inputs(size, clients, device, dtype=torch.float32):
    """theta, updates, weights"""
    generator = torch.Generator().manual_seed(0)
    theta, *updates = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(clients + 1))
    return theta, updates, [1 / clients] * clients


def loop(theta, updates, weights):
    """The definition's sum, without norms and without the check."""
    new = theta.clone()
    for update, weight in zip(updates, weights):
        new = new.sub_(update, alpha=weight)
    return new


def aggregate_paths(theta, updates, weights):
    """{name: a function that returns the new theta}"""
    shapes = shapes_of(len(theta))
    tensors, clients = theta.split(shapes), [update.split(shapes) for update in updates]
    stacked, stacked_weights = torch.stack(updates).T, torch.tensor(weights, device=theta.device)
    compiled = torch.compile(loop, dynamic=False)

    def foreach():
        new = torch.empty_like(theta)
        out = new.split(shapes)
        torch._foreach_copy_(out, tensors)
        for update, weight in zip(clients, weights):
            torch._foreach_add_(out, update, alpha=-weight)
        return new

    paths = {
        "kernel": lambda: csrc.aggregate(theta, updates, weights)[0],
        "eager, with norms and check": lambda: fedgs.aggregate(theta, updates, weights)[0],
        "eager": lambda: loop(theta, updates, weights),
        "foreach": foreach,
        "addmv, stacked before": lambda: torch.addmv(theta, stacked, stacked_weights, alpha=-1),
        "torch.compile": lambda: compiled(theta, updates, weights),
    }
    if theta.device.type == "cpu":
        layers = [x.numpy() for x in tensors], [[x.numpy() for x in client] for client in clients]
        paths["numpy, layer by layer"] = lambda: torch.from_numpy(np.concatenate(by_layer(*layers, weights)))
    return paths


def by_layer(theta, clients, weights):
    """How federated learning frameworks aggregate: one layer after another, summed by reduce."""
    weighted = ([layer * np.float32(weight) for layer in client] for client, weight in zip(clients, weights))
    return [t - functools.reduce(np.add, layers) for t, *layers in zip(theta, *weighted)]


def check_aggregate(device):
    for clients in (1, 5, 33):
        theta, updates, weights = aggregate_inputs(100_003, clients, "cpu", torch.float64)
        expected = loop(theta, updates, weights)
        theta, updates = theta.float(), [x.float() for x in updates]
        given = theta.to(device), [x.to(device) for x in updates], weights
        for name, path in aggregate_paths(*given).items():
            roundings = 2**-24 * 5 * (clients + 1)  # one for each client, of sums up to 5
            accept(f"aggregate of {clients}, {name}", (path().cpu() - expected).abs(), roundings)
        norms = torch.stack([x.double().square().sum() for x in updates])
        accept(f"aggregate of {clients}, norms", (csrc.aggregate(*given)[1].cpu() / norms - 1).abs(), 1e-12)


def time_aggregate(device, size, clients):
    paths = aggregate_paths(*aggregate_inputs(size, clients, device))
    return row("aggregate", f"{size / 1e6:.1f} M, K = {clients}", 4 * size * (clients + 2), paths, device)


# -------------------------------------------------------------------------------------------- mask_difficulty


def mask_inputs(images, side, dtype, device):
    masks = torch.rand(images, 1, side, side, generator=torch.Generator().manual_seed(0)) < 0.01
    return masks.to(device, dtype), torch.ones(images, dtype=torch.bool, device=device)


def mask_paths(masks, small):
    compiled = torch.compile(fedgs.mask_difficulty, dynamic=False)
    functions = {"kernel": csrc.mask_difficulty, "eager": fedgs.mask_difficulty, "torch.compile": compiled}
    return {name: functools.partial(function, masks, small, 100.0) for name, function in functions.items()}


def check_masks(device):
    for dtype in (torch.uint8, torch.int64):
        masks, small = mask_inputs(3, 181, dtype, device)
        areas = masks.cpu().numpy().reshape(3, -1).astype(bool).sum(1)
        expected = torch.from_numpy(np.tanh(np.log(181**2 / areas) ** 2 / math.log(100) ** 2))
        for name, path in mask_paths(masks, small).items():
            area, delta, eta = (x.cpu().double() for x in path())
            accept(f"mask_difficulty, {name}: area", (area - torch.from_numpy(areas)).abs(), 0)
            accept(f"mask_difficulty, {name}: delta", (delta - expected).abs(), 1e-6)
            accept(f"mask_difficulty, {name}: eta", (eta - 1 - 2 * expected.mean()).abs(), 1e-6)


def time_masks(device, images, side, dtype):
    masks, small = mask_inputs(images, side, dtype, device)
    size = f"{images} x {side}², {str(dtype).removeprefix('torch.')}"
    return row("mask_difficulty", size, masks.nbytes, mask_paths(masks, small), device)


# ------------------------------------------------------------------------------------------------ whole steps


def time_overhead(device, side, kernels, repetitions):
    """Steps of fedgs.train_client, FedAvg and FedGS in turn, and in them what difficulty and update take."""
    client = drawn_images(4, side).to(device)
    configs = {method: fedgs.Config(method=method, local_epochs=4, image_size=side, device=device.type)
               for method in ("fedavg", "fedgs")}
    flat = fedgs.FlatNetwork(fedgs.build_network(configs["fedgs"]).to(device))
    server, steps, update = fedgs.Server(flat), {}, {}
    for repetition in range(repetitions + 1):
        for method, config in configs.items():
            clock, spent = Clock(device), []
            watched = kernels._replace(mask_difficulty=watch(kernels.mask_difficulty, spent, device),
                                       adamw_accumulate_=watch(kernels.adamw_accumulate_, spent, device))
            fedgs.train_client(flat, server, client, config, 1, watched, clock)
            if repetition:  # the first one warms up
                steps.setdefault(method, []).extend(clock.seconds())
                update.setdefault(method, []).extend(np.reshape(spent, (4, -1)).sum(1)[1:])
    step, plain, scaled = (statistics.median(x) for x in (steps["fedavg"], update["fedavg"], update["fedgs"]))
    whole = statistics.median(steps["fedgs"]) / step - 1
    size = f"4 x {side}², {config.precision}"
    return {"operation": "UTNet step", "kernels": kernels.name, "size": size, "steps": len(steps["fedavg"]),
            "fedavg_ms": 1e3 * step, "update_fedavg_ms": 1e3 * plain, "update_fedgs_ms": 1e3 * scaled,
            "overhead": (scaled - plain) / step, "whole_step_difference": whole}


def drawn_images(number, side):
    """Some of the stand-in's smallest centre. -> data.Images"""
    return data.stand_in_images(6, side, fedgs.Config.tau).subset(range(number))


def watch(function, spent, device):
    """The function, with the seconds of each call added to a list."""

    def watched(*given):
        results = []
        spent.append(timed(lambda: results.append(function(*given)), device)())
        return results[0]

    return watched


# ------------------------------------------------------------------------------------------- paths of training


def prepare(path, device, side, epochs):
    """What a path trains with: its Config, FlatNetwork, Kernels and gradient. For a process of its own.

    plain: float32 with the definitions, batch by batch, in memory as the system gives it; fp32, bf16: as in fedgs.run.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    precision = "bf16" if path == "bf16" else "fp32"
    config = fedgs.Config(local_epochs=epochs, image_size=side, device=device.type, precision=precision)
    flat = fedgs.FlatNetwork(fedgs.build_network(config).to(device))
    if path == "plain":
        return config, flat, fedgs.PYTORCH, fedgs.batch_gradient
    fedgs.reuse_freed_memory()
    kernels, _ = fedgs.choose_kernels("auto", device)
    return config, flat, kernels, fedgs.CapturedGradient() if device.type == "cuda" else fedgs.batch_gradient


def train_path(path, device, side, epochs):
    """Epochs of eight steps of fedgs.train_client. -> the path's figures"""
    config, flat, kernels, gradient = prepare(path, device, side, epochs)
    server, client, clock = fedgs.Server(flat, kernels), drawn_images(32, side).to(device), Clock(device)

    def train(images, clock=None):
        return fedgs.train_client(flat, server, images, config, 1, kernels, clock, gradient)

    steps = train(client.subset(range(8))).steps  # warms up
    train(client, clock)
    step = statistics.median(clock.seconds())
    figures = {"ms": 1e3 * step, "steps": len(clock.ends) - 1, "peak_bytes": peak_memory(device)}
    if device.type == "cuda":
        busy = gpu_seconds(lambda: train(client.subset(range(8)))) / steps
        figures |= {"steps_a_second": 1 / step, "gpu_busy": busy / step, "paper_hours": PAPER * step / 3600}
    return figures


def time_training(device, side, epochs):
    """A step of training by every path that the hardware has."""
    print(f"timing training, 4 x {side}²", file=sys.stderr)
    paths = ["plain", "fp32"] + ["bf16"] * fedgs.has_bf16(device)
    return {"operation": "training", "size": f"4 x {side}²",
            "paths": {path: alone(train_path, path, device, side, epochs) for path in paths}}


def train_in_parts(path, device, side, steps):
    """A path's steps part by part, and what comes once a round. -> {part: ms}"""
    config, flat, kernels, _ = prepare(path, device, side, 1)
    images, server, clock = drawn_images(16, side), fedgs.Server(flat, kernels), Clock(device)
    client = images.to(device)
    update = fedgs.train_client(flat, server, client, config, 1, kernels)  # warms up
    m, v, delta = (torch.zeros_like(flat.parameters) for _ in range(3))
    order, draws = torch.arange(16, device=device).view(4, 4), torch.rand(steps, 4, data.AUGMENTATION_DRAWS, device=device)
    clock.update()
    for step in range(1, steps + 1):
        chosen = order[step % 4]
        x, y = data.augment(client.images[chosen].float() / 255, client.masks[chosen], draws[step - 1])
        x = data.normalise(x)
        clock.update()
        loss, _ = fedgs.training_loss(flat.network, x, y, None, config.precision)
        clock.update()
        flat.grad.zero_()
        loss.backward()
        clock.update()
        _, _, eta = kernels.mask_difficulty(y, client.small[chosen], config.log_base)
        clock.update()
        kernels.adamw_accumulate_(flat.parameters, flat.grad, m, v, step, config.lr, delta, eta)
        clock.update()
    parts = dict(zip(PARTS, np.median(np.reshape(clock.seconds(), (steps, 5)), axis=0).tolist()))
    updates, clock = [replace(update, delta=update.delta.clone()) for _ in range(5)], Clock(device)
    parts["aggregation of 5 clients"] = seconds(lambda: server.apply(updates, config, 1), device)
    for _ in range(4):
        fedgs.evaluate(flat.network, images)
        clock.update()
    parts["evaluation of an image"] = statistics.median(clock.seconds()) / 16
    return {part: 1e3 * spent for part, spent in parts.items()}


def time_round(device, side, steps):
    """Where a round's time goes, plain and as fedgs.run goes about it. A captured step has no parts: it is timed whole."""
    print(f"timing a round, 4 x {side}²", file=sys.stderr)
    parts = {path: alone(train_in_parts, path, device, side, steps) for path in ("plain", "fp32")}
    if device.type == "cuda":
        parts["fp32"]["the step, captured"] = alone(train_path, "fp32", device, side, 2)["ms"]
    return {"operation": "round", "size": f"4 x {side}²", "parts_ms": parts}


# ---------------------------------------------------------------------------------------------------- results


def accept(what, error, allowed):
    """Stop if a result is further from the float64 reference than rounding explains."""
    worst = error.max().item()
    if not worst <= allowed:
        sys.exit(f"benchmark.py: {what} is off by {worst:.1e}, more than {allowed:.0e}; nothing was timed")


def row(operation, size, moved, paths, device):
    """Time all paths of an operation that has to move so many bytes."""
    print(f"timing {operation}, {size}", file=sys.stderr)
    times = {name: seconds(path, device) for name, path in paths.items()}
    torch.compiler.reset()
    others = {name: t for name, t in times.items() if name != "kernel"}
    best = min(others, key=others.get)
    return {"operation": operation, "size": size, "bytes": moved, "ms": {name: 1e3 * t for name, t in times.items()},
            "bandwidth": moved / times["kernel"], "best": best, "ratio": others[best] / times["kernel"]}


def machine(device, copy):
    """What the figures were measured on."""
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model = next((line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), platform.processor())
        where = f"{model}, {torch.get_num_threads()} threads"
    return {"device": where, "copy_bandwidth": copy, "torch": torch.__version__, "python": platform.python_version(),
            "numpy": np.__version__, "system": f"{platform.system()} {platform.machine()}"}


def markdown(machine, rows):
    """The figures as tables."""
    lines = [f"{machine['device']}; copy {machine['copy_bandwidth'] / 1e9:.1f} GB/s; torch {machine['torch']}, Python "
             f"{machine['python']}, {machine['system']}", ""]
    if kernels := [r for r in rows if "ratio" in r]:
        lines += ["| operation | size | kernel | GB/s | of copy | best PyTorch path | ratio | the others |", "|" + "---|" * 8]
    for r in kernels:
        others = ", ".join(f"{name} {ms:.3g}" for name, ms in r["ms"].items() if name not in ("kernel", r["best"]))
        lines.append(f"| {r['operation']} | {r['size']} | {r['ms']['kernel']:.3g} ms | {r['bandwidth'] / 1e9:.1f} | "
                     f"{r['bandwidth'] / machine['copy_bandwidth']:.0%} | {r['best']}, {r['ms'][r['best']]:.3g} ms | "
                     f"**{r['ratio']:.1f}×** | {others} |")
    if steps := [r for r in rows if "overhead" in r]:
        lines += ["", "| UTNet step, width 32 | kernels | FedAvg's step | its update | FedGS's difficulty and update | overhead | "
                  "whole steps compared |", "|" + "---|" * 7]
    for r in steps:
        lines.append(f"| {r['size']} | {r['kernels']} | {r['fedavg_ms']:.0f} ms | {r['update_fedavg_ms']:.2f} ms | "
                     f"{r['update_fedgs_ms']:.2f} ms | **{r['overhead']:.2%}** | {r['whole_step_difference']:+.1%} (median of {r['steps']}) |")
    if training := [r for r in rows if r["operation"] == "training"]:
        lines += ["", *training_table(training)]
    for r in rows:
        if r["operation"] == "round":
            lines += ["", *round_table(r)]
    return "\n".join(lines)


def training_table(rows):
    """Lines of markdown: a step by each path, beside the plain one."""
    columns = ["UTNet, width 32", "path", "a step (median of)", "ratio to plain", "peak memory"]
    if "gpu_busy" in rows[0]["paths"]["plain"]:
        columns += ["steps a second", "GPU busy", f"{PAPER:,} steps, as the paper's PolypGen experiment has"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for r in rows:
        for path, f in r["paths"].items():
            cells = [r["size"], path, f"{f['ms']:.4g} ms ({f['steps']})", f"**{r['paths']['plain']['ms'] / f['ms']:.2f}×**",
                     f"{f['peak_bytes'] / 2**30:.2f} GiB"]
            if "gpu_busy" in f:
                cells += [f"{f['steps_a_second']:.1f}", f"{f['gpu_busy']:.0%}", f"{f['paper_hours']:.1f} h"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines if "bf16" in rows[0]["paths"] else lines + ["", "bf16 is left out: this hardware does not compute in it."]


def round_table(row):
    """Lines of markdown: the parts of a step with their shares of it, then the rest of a round."""
    parts = row["parts_ms"]
    whole = {path: sum(ms[part] for part in PARTS) for path, ms in parts.items()}
    lines = [f"| a step, {row['size']} | plain | share | fp32 | share |", "|" + "---|" * 5]
    for part in PARTS:
        cells = [f"{ms[part]:.4g} ms | {ms[part] / whole[path]:.2%}" for path, ms in parts.items()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines.append(f"| **all of these** | {whole['plain']:.4g} ms | | {whole['fp32']:.4g} ms | |")
    for part in list(parts["fp32"])[len(PARTS):]:
        cells = [f"{ms[part]:.4g} ms" if part in ms else "" for ms in parts.values()]
        lines.append(f"| {part} | {cells[0]} | | {cells[1]} | |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="what to time")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if problem := csrc.problem(device):
        sys.exit(f"benchmark.py: {problem}")
    torch.manual_seed(0)
    for check in (check_step, check_aggregate, check_masks):
        check(device)
    bandwidth, steps = copy_bandwidth(device), []
    if "adamw" in options.only:
        steps += [functools.partial(time_step, device, size) for size in (UTNET, SD_UTNET, 100_000_000)]
    if "aggregate" in options.only:
        sizes = ((UTNET, 5), (UTNET, 32), (SD_UTNET, 5), (100_000_000, 5))
        steps += [functools.partial(time_aggregate, device, *size) for size in sizes]
    if "masks" in options.only:
        sizes = [(4, 128), (4, 512), (16, 1024)]
        steps += [functools.partial(time_masks, device, *size, dtype) for size in sizes for dtype in (torch.uint8, torch.int64)]
    if "steps" in options.only:
        sides = {"cpu": ((128, 5), (256, 2)), "cuda": ((128, 10), (256, 10), (512, 10))}[device.type]
        compiled, _ = fedgs.choose_kernels("auto", device)
        steps += [functools.partial(time_overhead, device, side, kernels, repetitions)
                  for side, repetitions in sides for kernels in (compiled, fedgs.PYTORCH)]
    if "training" in options.only:
        sizes = {"cpu": ((128, 3), (256, 2)), "cuda": ((256, 10), (512, 10))}[device.type]
        steps += [functools.partial(time_training, device, *size) for size in sizes]
    if "round" in options.only:
        steps.append(functools.partial(time_round, device, *{"cpu": (256, 12), "cuda": (512, 50)}[device.type]))
    rows = [step() for step in steps]
    header = machine(device, bandwidth)
    print(markdown(header, rows))
    if options.json:
        options.json.write_text(json.dumps({"machine": header, "figures": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
