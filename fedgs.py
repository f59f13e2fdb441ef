"""FedGS: federated segmentation in which small lesions are not drowned out.

    python fedgs.py --dataset polypgen --method fedgs        # a whole federation, from images to tables
    python fedgs.py --dataset lits --model sd-utnet          # the paper's other data set and network
    python fedgs.py --method fedavg fedgs --seeds 0 1 2      # runs one after another, and their comparison
    python fedgs.py --predict scan.nii.gz --checkpoint best.pt --out masks
    python fedgs.py --help                                   # every option

Schutte, Corbetta, Beets-Tan and Silva, "FedGS: Federated Gradient Scaling for Heterogeneous Medical Image
Segmentation", MICCAI DeCaF 2024. Hospitals (clients) train one network without sharing images. Training at
a client is plain AdamW; only what it *reports* is re-weighted, by how small the lesions of each batch were:

    server: initialise theta
    for each round:
        for each client k, in its own hospital:
            theta_k <- theta;  Delta_k <- 0
            for each batch x, y of B images:
                delta_x = tanh(log_l(1 / a_x)^2) if the lesion of x is small, else 0       mask_difficulty
                eta     = 1 + (2 / B) sum_x delta_x
                s       = AdamW's step for the gradient of the loss
                theta_k <- theta_k - s;  Delta_k <- Delta_k + eta s                        adamw_accumulate_
        theta <- theta - sum_k (T_k / sum_j T_j) Delta_k                                   aggregate

a_x is the lesion's share of the image, T_k the number of client k's steps. FedAvg, the baseline, reports
Delta_k = theta - theta_k and weights clients by their numbers of images. This file follows that order.
"""

import argparse
import ctypes
import functools
import itertools
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import inference
import metrics
import plots
import runs
from models import CODE, SDUTNet, UTNet
from processes import GO_ON, OtherEnded, Processes
from runs import RunError

__version__ = "0.1.0"
READABLE = (RunError, data.DataError, OSError)  # errors whose messages are for people
ALONE = Processes(READABLE)  # unless torchrun started more


# ---------------------------------------------------------------------------------------- configuration


def option(default, help, **how):
    """A field of Config that is also a command line option."""
    return field(default=default, metadata={"help": help, **how})


@dataclass
class Config:
    """Everything that decides a run. The defaults are the paper's for PolypGen; DATASETS has those for LiTS."""

    dataset: str = option("polypgen", "data set", choices=("polypgen", "lits"))
    method: str = option("fedgs", "fedgs, or the baseline fedavg", choices=("fedgs", "fedavg"))
    model: str = option("utnet", "network", choices=("utnet", "sd-utnet"))
    preset: str = option("auto", "named values for the options below; auto: paper with real data and a GPU, else quick",
                         choices=("auto", "paper", "quick"))
    rounds: int = option(100, "communication rounds")
    local_epochs: int = option(5, "epochs that a client trains in a round")
    batch_size: int = option(4, "images in a batch; a last incomplete batch is dropped")
    lr: float = option(1e-4, "learning rate of the clients' AdamW")
    image_size: int = option(512, "images are resized to this square; a multiple of 16")
    width: int = option(32, "base channels of the network")
    server_lr: float = option(1.0, "factor on the server's step")
    server_momentum: float = option(0.0, "momentum of the server's step")
    log_base: float = option(100.0, "l, base of the logarithm in the difficulty of a small lesion")
    tau: float = option(150.0, "smallness: a lesion is small if it covers at most 1/tau of the image")
    split: str = option("fold", "a client's train, validation and test images: five folds (PolypGen's published ones; of "
                        "LiTS's volumes), published per-centre split, or folds with near-duplicate frames kept together",
                        choices=("fold", "centre", "grouped"))
    fold: int = option(1, "which of the five folds", choices=(1, 2, 3, 4, 5))
    centres: tuple = option(data.POLYPGEN_CENTRES, "centres that take part, with the held-out one", nargs="+", type=int)
    out_centre: int = option(6, "centre that is held out for testing")
    seed: int = option(0, "seed of initial weights, batches and augmentation")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    precision: str = option("auto", "of forward and backward in training: float32, or bfloat16 where that is as good (weights, "
                            "updates and evaluation stay float32); auto: bf16 if the hardware computes in it",
                            choices=("auto", "fp32", "bf16"))
    kernels: str = option("auto", "what computes difficulty, step and aggregation: compiled kernels for the device, or the "
                          "PyTorch lines that define them; auto: compiled if they are here",
                          choices=("auto", "cuda", "cpp", "torch"))
    data_root: str = option("", "folder of the data set, or stand-in for procedural images; default: datasets/<dataset> "
                            "if it is there, else the stand-in")
    cache: str = option("", "folder for what is decoded or drawn once; default: fedgs-cache beside LiTS's volumes")
    out: str = option("", "folder of the run; default: runs/<dataset>-<method>-<model>-f<fold>-s<seed>, "
                     "or -centre- for that split")
    resume: bool = option(False, "continue the run in its folder")
    nsd_tolerance: float = option(0.0, "also test how far boundaries are apart, by NSD at this tolerance and HD95: in mm for CT, "
                                  "in pixels of the network's image else; 0: no")

    def __post_init__(self):
        if self.precision == "auto":  # a run must go on as it began
            self.precision = "bf16" if has_bf16(choose_device(self)) else "fp32"


DATASETS = {
    "polypgen": {},
    "lits": dict(rounds=60, log_base=1000.0, tau=1000.0, centres=data.CENTRES["lits"], out_centre=5, split="centre"),
}
GRID = ("fold", "seed", "method")  # options of which there may be several, a run for each; the last changes fastest
PRESETS = {
    "paper": {},
    "quick": dict(rounds=7, local_epochs=1, image_size=80, width=8, lr=1e-3),  # two to three minutes on two CPU cores
}


def check(config):
    """Raise RunError, naming the option, for values that no run can use."""
    for name in ("rounds", "local_epochs", "batch_size", "width"):
        require(getattr(config, name) >= 1, name, config, "must be at least 1")
    for name in ("lr", "server_lr", "tau"):
        require(0 < getattr(config, name) <= 1e6, name, config, "must be above 0, and at most 1e6")
    require(1 < config.log_base < math.inf, "log_base", config, "must be a number above 1")
    require(0 <= config.server_momentum < 1, "server_momentum", config, "must be in [0, 1)")
    require(0 <= config.nsd_tolerance < math.inf, "nsd_tolerance", config, "must be 0 or more")
    require(0 <= config.seed < 2**63, "seed", config, "must be in [0, 2^63)")
    require(config.image_size >= 16 and config.image_size % 16 == 0, "image_size", config, "must be a multiple of 16")
    require(config.batch_size > 1 or config.image_size > 16, "batch_size", config, "too small for batch norm at image size 16")
    require(config.batch_size > 1 or config.model != "sd-utnet", "batch_size", config, "sd-utnet needs two images or more")
    require(config.width > 1 or config.model != "sd-utnet", "width", config, "sd-utnet needs 2 or more")
    known = data.CENTRES[config.dataset]
    require(set(config.centres) <= set(known), "centres", config, f"must be among {' '.join(map(str, known))}")
    require(config.split != "grouped" or config.dataset == "polypgen", "split", config,
            "LiTS is split by volume anyway: fold or centre")
    require(config.fold == 1 or config.split != "centre", "fold", config, "--split centre has no folds, choose --split fold")
    require(len(set(config.centres)) == len(config.centres), "centres", config, "names a centre twice")
    require(config.out_centre in config.centres, "out_centre", config, "must be among --centres")
    require(len(config.centres) > 1, "centres", config, "leaves no client beside the held-out centre")
    require(config.device != "cuda" or torch.cuda.is_available(), "device", config, "but torch finds no GPU here")


def choose_device(config):
    """--device -> torch.device"""
    return torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def has_bf16(device):
    """Whether the device computes in bfloat16: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def require(condition, name, config, rule):
    if not condition:
        raise RunError(f"--{name.replace('_', '-')} {shown(getattr(config, name))}: {rule}")


# ------------------------------------------------------- difficulty, step and aggregation: the definitions


def mask_difficulty(masks, small, log_base):
    """Lesion areas, difficulties and the step scale of a batch.

    masks (B, 1, H, W) or (B, H, W), nonzero = lesion; small (B,) bool. -> area (B,) int64, in pixels;
    delta (B,) float32 in [0, 1]: tanh(log_l(1/a)^2) of small images, else 0 (also where a rotation moved
    the lesion out of view); eta, 0-dim float32 in [1, 3]: 1 + (2/B) sum delta. Nothing leaves the device.
    """
    area = (masks != 0).flatten(1).sum(dim=1)
    inverse_area = masks.shape[-2] * masks.shape[-1] / area.clamp(min=1).double()
    delta = torch.tanh((inverse_area.log() / math.log(log_base)) ** 2)
    delta = torch.where(small.bool() & (area > 0), delta, 0.0).float()
    return area, delta, 1 + 2 * delta.sum() / max(len(masks), 1)


def adamw_accumulate_(theta, grad, m, v, step, lr, delta=None, eta=None,
                      betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    """One AdamW step on flat vectors, in place; with delta and eta also delta += eta s.

    theta, grad, m, v, delta: (P,) float32; step counts from 1; eta is a 0-dim tensor on the same device.
    s = lr m_hat / (sqrt(v_hat) + eps) comes after the decoupled weight decay, which is no part of delta.
    """
    theta.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    root = (v / (1 - betas[1] ** step)).sqrt_().add_(eps)
    s = (m / root).mul_(lr / (1 - betas[0] ** step))
    theta.sub_(s)
    if delta is not None:
        delta.add_(s.mul_(eta))


def aggregate(theta, updates, weights, server_lr=1.0):
    """theta - server_lr sum_k w_k Delta_k, summed in client order.

    theta (P,); updates: K vectors (P,); weights: K numbers that sum to 1.
    -> new theta (P,), squared norm of each update (K,) float64, whether each update is finite (K,) bool
    """
    new = theta.clone()
    for update, weight in zip(updates, weights, strict=True):
        new.sub_(update, alpha=server_lr * weight)
    norms = torch.stack([torch.linalg.vector_norm(update, dtype=torch.float64).square() for update in updates])
    return new, norms, norms.isfinite()  # a sum of squares is finite exactly where all its terms are


class Kernels(NamedTuple):
    """The three operations above, as one implementation of them."""

    name: str
    mask_difficulty: Callable
    adamw_accumulate_: Callable
    aggregate: Callable


PYTORCH = Kernels("torch", mask_difficulty, adamw_accumulate_, aggregate)


def choose_kernels(wanted, device):
    """--kernels, for a device -> Kernels, and what to say of the choice. Raises RunError for kernels that cannot run."""
    if wanted == "torch":
        return PYTORCH, "torch, as asked"
    name = "cuda" if device.type == "cuda" else "cpp"
    if wanted not in ("auto", name):
        raise RunError(f"--kernels {wanted}: not for device {device.type}, choose {name}, torch or auto")
    try:
        import csrc

        problem = csrc.problem(device)
    except ImportError as error:
        problem = f"csrc is not compiled ({error}); `pip install -v -e .` does it, or says what is missing"
    if not problem:
        return Kernels(name, csrc.mask_difficulty, csrc.adamw_accumulate_, csrc.aggregate), f"{name}, compiled from csrc"
    if wanted == name:
        raise RunError(f"--kernels {wanted}: {problem}")
    return PYTORCH, f"torch: {problem}"


# ---------------------------------------------------------------------------------- a network as vectors


class FlatNetwork:
    """A network whose tensors are views of three vectors, so that one operation reaches all of them.

    parameters, grad (P,) float32; buffers: batch norm's means and variances, float32; counters: batch norm's
    numbers of batches, int64. Index tables (integer buffers with a shape) are constants: they stay out.
    """

    def __init__(self, network):
        self.network = network
        parameters = list(network.parameters())
        self.parameters = torch.cat([p.detach().flatten() for p in parameters])
        self.grad = torch.zeros_like(self.parameters)
        for p, value, grad in zip(parameters, views(self.parameters, parameters), views(self.grad, parameters), strict=True):
            p.data, p.grad = value, grad
        self.buffers = self._join(lambda buffer: buffer.is_floating_point())
        self.counters = self._join(lambda buffer: not buffer.is_floating_point() and buffer.ndim == 0)

    def _join(self, chosen):
        owners = [(module, name) for module in self.network.modules() for name, buffer in module._buffers.items()
                  if buffer is not None and chosen(buffer)]
        tensors = [module._buffers[name] for module, name in owners]
        vector = torch.cat([x.flatten() for x in tensors])
        for (module, name), view in zip(owners, views(vector, tensors), strict=True):
            module._buffers[name] = view
        return vector

    def load(self, state):
        """Copy a state (parameters, buffers, counters) into the network."""
        for mine, theirs in zip((self.parameters, self.buffers, self.counters), state, strict=True):
            mine.copy_(theirs)

    def state(self):
        """A copy of (parameters, buffers, counters)."""
        return self.parameters.clone(), self.buffers.clone(), self.counters.clone()


def views(vector, tensors):
    """Consecutive pieces of a vector, in the shapes of these tensors."""
    return [piece.view_as(x) for piece, x in zip(vector.split([x.numel() for x in tensors]), tensors, strict=True)]


def build_network(config):
    """The network of a configuration, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    channels = {"polypgen": 3, "lits": 1}[config.dataset]
    if config.model == "sd-utnet":
        return SDUTNet(channels, classes=2, width=config.width, size=config.image_size)
    return UTNet(channels, classes=2, width=config.width)


# ------------------------------------------------------------------------------------------------ client


@dataclass
class Update:
    """What a client sends: nothing in it belongs to a single image."""

    centre: int
    delta: torch.Tensor  # (P,)
    buffers: torch.Tensor
    counters: torch.Tensor
    steps: int  # T_k
    images: int  # n_k
    loss: torch.Tensor  # mean over steps
    terms: dict  # the loss's terms, where it has several: means over steps
    eta: torch.Tensor  # sum over steps
    scaled: torch.Tensor  # number of steps with eta > 1

    def size(self, config):
        """What the client's weight is proportional to."""
        return self.steps if config.method == "fedgs" else self.images

    def without_vectors(self):
        """What rounds.csv needs of it, on the CPU, where any process can read it; the vectors' memory is free again."""
        numbers = {name: getattr(self, name).cpu() for name in ("loss", "eta", "scaled")}
        terms = {name: x.cpu() for name, x in self.terms.items()}
        return replace(self, delta=None, buffers=None, counters=None, terms=terms, **numbers)


class Batch(NamedTuple):
    """What a training step reads."""

    images: torch.Tensor  # (B, C, S, S) uint8
    masks: torch.Tensor  # (B, 1, S, S) uint8
    small: torch.Tensor  # (B,) bool
    draws: torch.Tensor  # (B, 9) from [0, 1), for the augmentation
    noise: torch.Tensor  # (2, B, 8) normal, for SD-UTNet's codes; (0, B, 8) for UTNet


def train_client(flat, server, images, config, round_, kernels=PYTORCH, progress=None, gradient=None):
    """A client's part of a round: local epochs of AdamW from the server's state. -> Update

    flat: the FlatNetwork to work in; images: data.Images on its device; gradient: batch_gradient, or what does the same.
    All randomness follows from (seed, round, centre), so clients may run in any order or place.
    """
    seed = np.random.SeedSequence((config.seed, round_, images.centre)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed) >> 1)
    device, per_epoch = flat.parameters.device, len(images) // config.batch_size
    gradient = gradient or batch_gradient
    flat.load(server.state)
    flat.network.train()
    m, v, delta = (torch.zeros_like(flat.parameters) for _ in range(3))
    codes = 2 if config.model == "sd-utnet" else 0  # how many a step samples
    step, totals = 0, 0.0
    for _ in range(config.local_epochs):
        order = torch.randperm(len(images), generator=generator)[: per_epoch * config.batch_size].view(per_epoch, -1)
        draws = torch.rand(per_epoch, config.batch_size, data.AUGMENTATION_DRAWS, generator=generator)
        noises = torch.randn(per_epoch, codes, config.batch_size, CODE, generator=generator)
        for chosen, draw, noise in zip(order.to(device), draws.to(device), noises.to(device)):
            batch = Batch(images.images[chosen], images.masks[chosen], images.small[chosen], draw, noise)
            measured = gradient(flat, batch, config, kernels)
            step += 1
            report = (delta, measured["eta"]) if config.method == "fedgs" else ()
            kernels.adamw_accumulate_(flat.parameters, flat.grad, m, v, step, config.lr, *report)
            totals = totals + torch.stack(list(measured.values()))
            if progress is not None:
                progress.update()
    if config.method == "fedavg":
        delta = server.state[0] - flat.parameters
    totals = dict(zip(measured, totals))
    eta, scaled, loss = (totals.pop(name) for name in ("eta", "scaled", "loss"))
    terms = {name: total / step for name, total in totals.items()}
    buffers, counters = flat.buffers.clone(), flat.counters.clone()
    return Update(images.centre, delta, buffers, counters, step, len(images), loss / step, terms, eta, scaled)


def batch_gradient(flat, batch, config, kernels=PYTORCH):
    """The loss's gradient for a batch, which is augmented first, into flat.grad.

    -> {name: 0-dim float32}: the loss, its terms, eta (1 for FedAvg), and whether it is above 1 ("scaled")
    """
    x, y = data.augment(batch.images.float() / 255, batch.masks, batch.draws)
    flat.grad.zero_()
    loss, terms = training_loss(flat.network, data.normalise(x), y, batch.noise, config.precision)
    loss.backward()
    if config.method == "fedgs":
        _, _, eta = kernels.mask_difficulty(y, batch.small, config.log_base)
    else:
        eta = torch.ones((), device=y.device)
    return {name: x.detach().float() for name, x in {"loss": loss, **terms, "eta": eta, "scaled": eta > 1}.items()}


class CapturedGradient:
    """batch_gradient on a GPU: captured as a CUDA graph the first time, so that a batch is one launch, not thousands.

    Its tensors stay where they are: a batch is copied into those that the graph reads, and what it returns lies in those
    that the next batch will overwrite.
    """

    def __init__(self):
        self.graph = None

    def __call__(self, flat, batch, config, kernels):
        if self.graph is None:
            self.capture(flat, batch, config, kernels)
        for mine, theirs in zip(self.batch, batch, strict=True):
            mine.copy_(theirs)
        self.graph.replay()
        return self.measured

    def capture(self, flat, batch, config, kernels):
        """Record the work on a batch. The network's state stays as it was."""
        self.batch, state = Batch(*(x.clone() for x in batch)), flat.state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in their first calls, which no graph may hold
            for _ in range(3):
                batch_gradient(flat, self.batch, config, kernels)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads, such as NCCL's, go on
            self.measured = batch_gradient(flat, self.batch, config, kernels)
        flat.load(state)


def training_loss(network, images, masks, noise, precision="fp32"):
    """What a step minimises, and its terms by name. noise (2, B, 8) is what SD-UTNet samples its codes with.

    bf16: the network computes in bfloat16 where autocast finds that good enough, channels-last, as matrix units
    want it (in float32 on a CPU that is slower); losses are float32.
    """
    half = precision == "bf16"
    if half:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        parts = network.decompose(images, noise) if isinstance(network, SDUTNet) else network(images)
    if isinstance(network, SDUTNet):
        return metrics.disentangled_loss(type(parts)(*(x.float() for x in parts)), images, masks)
    return metrics.soft_dice_loss(parts.float(), masks), {}


# ------------------------------------------------------------------------------------------------ server


class Server:
    """The server's state (parameters, buffers, counters) and, with momentum, its velocity."""

    GROUP = 8  # updates that are in memory together, however many clients a process has

    def __init__(self, flat, kernels=PYTORCH):
        self.state = flat.state()
        self.velocity = torch.zeros_like(self.state[0])
        self.aggregate = kernels.aggregate

    def apply(self, updates, config, round_, total=None):
        """Replace the state by the aggregate of the clients' updates. -> the updates without their vectors

        updates: in client order, a list; or an iterator, from which they are taken, summed and forgotten in groups, with the
        total of their sizes. Weights are T_k / sum T for FedGS and n_k / sum n for FedAvg, for parameters and buffers alike.
        With momentum mu, velocity <- mu velocity + sum_k w_k Delta_k and theta <- theta - server_lr velocity.
        Raises RunError naming the clients whose loss or update is not finite, and for a step that is not;
        the state is then unchanged.
        """
        total = total or sum(u.size(config) for u in updates)
        theta, buffers, counters = self.state
        momentum = config.server_momentum
        moved, rate = (momentum * self.velocity, -1.0) if momentum else (theta, config.server_lr)  # -1: a sum
        mean, counts = torch.zeros_like(buffers), torch.zeros_like(counters, dtype=torch.float64)
        updates, seen, finite = iter(updates), [], []
        while group := list(itertools.islice(updates, self.GROUP)):
            weights = [u.size(config) / total for u in group]
            moved, _, fine = self.aggregate(moved, [u.delta for u in group], weights, rate)
            mean, _, buffers_fine = self.aggregate(mean, [u.buffers for u in group], weights, -1.0)
            counts += sum(weight * u.counters.double() for weight, u in zip(weights, group))
            finite += [ok and math.isfinite(u.loss) for ok, u in zip((fine & buffers_fine).tolist(), group)]
            seen += [u.without_vectors() for u in group]
            del group[:]  # before the next ones come
        if bad := [f"C{u.centre}" for u, fine in zip(seen, finite, strict=True) if not fine]:
            raise RunError(f"round {round_} was not applied: loss or update of client {', '.join(bad)} is not finite; "
                           "earlier checkpoints stay as they were (a smaller --lr may help)")
        velocity, theta = (moved, theta - config.server_lr * moved) if momentum else (self.velocity, moved)
        if not all(x.isfinite().all() for x in (theta, mean, velocity)):
            raise RunError(f"round {round_} was not applied: the server's step is not finite; earlier checkpoints stay "
                           "as they were (a smaller --server-lr or --server-momentum may help)")
        self.state, self.velocity = (theta, mean, counts.round().to(counters.dtype)), velocity
        return seen


# ------------------------------------------------------------------------------------------ round loop


def run(config, why="as given", federation=None, processes=ALONE):
    """A whole run: train round by round, keep everything in the run's folder, test, draw. -> content of results.json

    why: the reason for the preset, for the header; federation: its data, where they are loaded already; processes: each
    has clients of its own, and all run this function. Raises RunError or data.DataError where the configuration, the data
    or the folder cannot be used, before anything is written, and for a round that is refused.
    """
    check(config)
    device = choose_device(config)
    torch.backends.cudnn.deterministic = True  # a CPU is repeatable as it is; a GPU adds up the gradients of resizing in any order
    torch.backends.cudnn.allow_tf32 = False  # fp32 is float32
    reuse_freed_memory()
    kernels, which_kernels = choose_kernels(config.kernels, device)
    root, folder = data.find(config.dataset, config.data_root), runs.run_folder(config)
    federation = federation or load_data(config, root, processes)
    steps = count_steps(config, federation)
    record = describe_run(config, federation, device, kernels, processes)
    processes.from_first(lambda: runs.check_folder(folder, record, config.resume))
    network = build_network(config).to(device)
    flat = FlatNetwork(network)
    server, history, best = Server(flat, kernels), [], {}
    if config.resume:
        history, best = processes.from_first(lambda: runs.load_progress(folder, server, config))
        processes.share(server.state)
    processes.from_first(lambda: runs.write(folder / "config.json", runs.to_json(record)))
    print(header(config, why, root, federation, flat, device, which_kernels, folder, processes), flush=True)

    clients = [images.to(device) for images in federation.train.values()]
    gradient = CapturedGradient() if kernels.name == "cuda" else batch_gradient
    total = sum(steps.values()) if config.method == "fedgs" else sum(federation.facts[k].parts[0] for k in steps)
    own = sum(steps[images.centre] for images in clients)
    with tqdm(total=config.rounds * own, initial=len(history) * own, unit="step", leave=False, disable=None) as progress:
        for round_ in range(len(history) + 1, config.rounds + 1):
            start = time.perf_counter()
            progress.set_description(f"round {round_}/{config.rounds}")
            trained = (train_client(flat, server, images, config, round_, kernels, progress, gradient) for images in clients)
            updates = processes.collect(trained, like=server.state)
            updates = processes.from_first(lambda: server.apply(updates, config, round_, total))
            processes.share(server.state)
            flat.load(server.state)
            tallies = processes.union({k: evaluate(network, images).tally for k, images in federation.validation.items()})
            validation = metrics.means(sum(tallies[k] for k in steps))
            history.append(summarise(round_, updates, validation, time.perf_counter() - start, federation.source))
            processes.from_first(lambda: runs.save_progress(folder, checkpoint(network, config, federation.source, round_), server,
                                                            history, best, validation))
            progress.write(describe(history[-1], config.rounds))
    title = f"{describe_model(config)} on {federation.source}"
    checkpoints = {name: folder / f"{name}.pt" for name in ("best", "best_small")}
    results, files = test(network, federation, config, checkpoints, title, processes)
    results |= {"rounds": len(history), "seconds": sum(row["seconds"] for row in history)}
    if processes.rank == 0:
        files |= {"curves.png": plots.draw_curves(history, title), "results.json": runs.to_json(results)}
    processes.from_first(lambda: runs.save_results(folder, files))
    print(f"\nin {folder}: {', '.join(files)}, rounds.csv, best.pt, best_small.pt, last.pt")
    return results


def reuse_freed_memory():
    """Have glibc keep freed memory for what comes next, instead of giving it back to the system.

    A training step on a CPU takes and frees large maps hundreds of times. New memory comes in pages that the system clears
    one by one; at 256 x 256 that took a third of the step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -4  # <malloc.h>
        libc.mallopt(M_MMAP_MAX, 0)  # large maps come from the heap, too
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # and its free end stays


def count_steps(config, federation):
    """{client: its steps in a round}. Raises RunError where a client has too few images, or there is nothing to validate on."""
    numbers = {centre: facts.parts for centre, facts in federation.facts.items() if centre != config.out_centre}
    for centre, (train, _, _) in numbers.items():
        if train < config.batch_size:
            raise RunError(f"centre {centre} has {train} training images, less than --batch-size {config.batch_size}")
    if not any(validation for _, validation, _ in numbers.values()):
        raise RunError(f"--split {config.split} leaves no validation images: the centres have too few images")
    return {centre: train // config.batch_size * config.local_epochs for centre, (train, _, _) in numbers.items()}


def checkpoint(network, config, source, round_):
    """The network's state dict with its tensors copied, for `load_state_dict(torch.load(path, weights_only=True))`.

    Configuration, data source, round and version travel in the attribute `_metadata` that torch gives its state dicts.
    """
    state = network.state_dict()
    for name, tensor in state.items():
        state[name] = tensor.to("cpu", copy=True)
    own = {**asdict(config), "data_root": "", "cache": "", "out": ""}  # no paths of this machine
    state._metadata["fedgs"] = {"version": __version__, "data": source, "round": round_, "config": own}
    return state


def load_data(config, root, processes=ALONE):
    """The data set of a configuration: a process's own centres, and the facts about all. -> data.Federation"""
    cache = config.cache
    if root is None and config.dataset == "lits":  # one process draws it for all
        root, cache = processes.from_first(lambda: data.stand_in_volumes(config.cache)), ""
    clients, held_out = [k for k in config.centres if k != config.out_centre], [config.out_centre]
    here = None  # all of them
    if processes.count > 1:
        work = processes.from_first(lambda: {k: data.work(config.dataset, root, k) for k in clients})
        here = processes.spread(work) + held_out * (processes.rank == 0)
    how = (root, config.centres, config.out_centre, config.image_size, config.tau, config.split, config.fold, here)
    federation = processes.agree(lambda: data.lits(*how, cache) if config.dataset == "lits" else data.polypgen(*how))
    facts = processes.union(federation.facts)
    federation.facts = {k: facts[k] for k in clients + held_out}
    return federation


def summarise(round_, updates, validation, seconds, source):
    """One row of rounds.csv: each client's loss, means of its terms, step scale and scaled steps, validation, time."""
    steps = sum(u.steps for u in updates)
    return {
        "round": round_,
        **{f"loss_C{u.centre}": u.loss.item() for u in updates},
        **{f"term_{name}": sum(u.steps * u.terms[name].item() for u in updates) / steps for name in updates[0].terms},
        "eta": sum(u.eta.item() for u in updates) / steps,
        "scaled_steps": sum(u.scaled.item() for u in updates) / steps,
        **{name: validation[name]["mean"] for name in ("dice", "dice_s", "dice_l")},
        "seconds": round(seconds, 3),
        "data": source,
    }


def describe(row, rounds):
    """The line that a round leaves on the terminal."""
    loss = np.mean([value for name, value in row.items() if name.startswith("loss_")])
    return (f"round {row['round']:>3}/{rounds}   loss {loss:.3f}   η {row['eta']:.3f}   validation: Dice {row['dice']:.3f}"
            f"   Dice_S {row['dice_s']:.3f}   Dice_L {row['dice_l']:.3f}   ({row['seconds']:.1f} s)")


# -------------------------------------------------------------------------------------------- evaluation


@dataclass
class Evaluation:
    """A network's predictions on a set of images, and how good they are."""

    images: data.Images
    predicted: torch.Tensor  # (N, 1, S, S) bool
    dice: torch.Tensor  # (N,) float64
    lesions: list  # N metrics.Lesions
    surfaces: torch.Tensor  # (N, 2) float64: NSD and HD95, NaN where they were not asked for
    tally: torch.Tensor  # (14, 2) float64, see metrics.tally


@torch.no_grad()
def predict(network, images, size=None):
    """Predicted lesion masks (N, 1, S, S) bool, on the CPU, of a batch (N, 3, S, S), or (N, 1, S, S), uint8.

    size: (height, width) to which the network's output is resized, bilinearly, before its larger class is taken.
    """
    network.eval()
    output = network(data.normalise(images.to(next(network.parameters()).device).float() / 255))
    if size is not None and size != output.shape[-2:]:
        output = F.interpolate(output, size, mode="bilinear")
    return (output.argmax(dim=1, keepdim=True) == 1).cpu()


def evaluate(network, images, nsd_tolerance=0.0):
    """Predict and score one centre's data.Images, sixteen at a time. -> Evaluation"""
    batches = tqdm(images.images.split(16), desc=f"evaluating C{images.centre}", unit="batch", delay=2, leave=False, disable=None)
    predicted = torch.cat([torch.zeros_like(images.masks[:0], dtype=torch.bool), *(predict(network, x) for x in batches if len(x))])
    truth = images.masks.bool()
    dice = metrics.dice_per_image(predicted, truth)
    pairs = list(zip(predicted[:, 0].numpy(), truth[:, 0].numpy()))
    lesions = [metrics.match_lesions(*pair) for pair in pairs]
    surfaces = torch.full((len(images), 2), math.nan, dtype=torch.float64)
    if nsd_tolerance:
        for i, (pair, spacing) in enumerate(zip(pairs, images.spacing.tolist())):
            surfaces[i] = torch.tensor(metrics.surface_measures(*pair, spacing, nsd_tolerance))
    tally = metrics.tally(dice, truth.flatten(1).any(1), images.small, predicted.flatten(1).any(1), lesions, surfaces)
    return Evaluation(images, predicted, dice, lesions, surfaces, tally)


class Tested(NamedTuple):
    """What the tables need of one centre's test."""

    tally: torch.Tensor
    scores: list  # rows of scores.csv
    lesions: list  # rows of lesions.csv


def test(network, federation, config, checkpoints, title, processes=ALONE):
    """Test checkpoints, {name: path}, on in-test and out-test, and print the table.

    -> content of results.json, {file name: content} for what a folder keeps: tables, and pictures of the first checkpoint
    (from process 0, of its own images)
    """
    splits = {"in_test": [k for k in federation.facts if k != config.out_centre], "out_test": [config.out_centre]}
    own = [("in_test", images) for images in federation.in_test.values()]
    own += [("out_test", federation.out_test)] if federation.out_test else []
    results, scores, lesions, pictures = {}, [], [], {}
    for name, path in checkpoints.items():
        state, about = processes.from_first(lambda: runs.read_weights(path))
        runs.load_weights(network, state, path)
        round_ = about.get("round")
        evaluations = [(split, evaluate(network, images, config.nsd_tolerance)) for split, images in own]
        tested = processes.union({part.images.centre: describe_test(name, split, part, config, federation.source)
                                  for split, part in evaluations})
        results[name] = {"round": round_}
        for split, centres in splits.items():
            results[name][split] = metrics.means(sum(tested[k].tally for k in centres))
            results[name][f"{split}_by_centre"] = {f"C{k}": metrics.means(tested[k].tally) for k in centres}
            scores += [row for k in centres for row in tested[k].scores]
            lesions += [row for k in centres for row in tested[k].lesions]
        if not pictures and processes.rank == 0:
            where = f"centres of process 0 of {processes.count}, " if processes.count > 1 else ""
            heading = f"{title}\n{name}{f' (round {round_})' if round_ else ''}: test images, {where}evenly spaced by size of lesion"
            everything = [part for _, part in evaluations]
            pictures["predictions.png"] = plots.draw_predictions(everything, heading)
            if config.model == "sd-utnet":
                pictures["anatomy.png"] = show_anatomy(network, next(part.images for part in everything if len(part.images)), 0, title)
    results = {"data": federation.source, "notes": federation.notes, "config": asdict(config), "checkpoints": results}
    files = {**pictures, "scores.csv": runs.to_csv(scores), "lesions.csv": runs.to_csv(lesions)}
    note = metrics.surface_note(results["config"])
    print(f"\n{title}\n{metrics.table(results['checkpoints'])}" + (f"\n{note}" if note else ""))
    return results, files


def describe_test(name, split, part, config, source):
    """One centre's Evaluation without its images. -> Tested"""
    return Tested(part.tally, list(score_rows(name, split, part, config, source)), list(lesion_rows(name, split, part, source)))


@torch.no_grad()
def show_anatomy(network, images, i, title):
    """Image i of a data.Images as SD-UTNet takes it apart: anatomy, and the reconstruction from it. -> Figure"""
    network.eval()
    x = data.normalise(images.images[i : i + 1].to(next(network.parameters()).device).float() / 255)
    anatomy, (mu, _) = network.a_encoder(x), network.m_encoder(x)
    heading = f"{title}\nC{images.centre}, {images.names[i]}"
    return plots.draw_anatomy(x[0], anatomy[0], network.reconstruct(anatomy, mu)[0], heading)


def score_rows(name, split, part, config, source):
    """The rows of scores.csv for one checkpoint and one centre's evaluation: an image each."""
    columns = (part.images.names, part.images.inverse_area.tolist(), part.images.small.tolist(), part.dice.tolist(),
               part.lesions, part.surfaces.tolist())
    for image, inverse_area, small, dice, lesions, (nsd, hd95) in zip(*columns, strict=True):
        yield {"checkpoint": name, "split": split, "centre": part.images.centre, "name": image,
               "inverse_area": inverse_area, "small": int(small), "dice": dice, "lesion_dice": metrics.lesion_dice(lesions),
               "lesions": len(lesions.dice), "found": int((lesions.dice > 0).sum()), "false_components": lesions.false_components,
               **({"nsd": nsd, "hd95": hd95} if config.nsd_tolerance else {}), "data": source}


def lesion_rows(name, split, part, source):
    """The rows of lesions.csv: a lesion each."""
    for image, lesions in zip(part.images.names, part.lesions, strict=True):
        for i, (inverse_area, dice) in enumerate(zip(lesions.inverse_area.tolist(), lesions.dice.tolist()), start=1):
            yield {"checkpoint": name, "split": split, "centre": part.images.centre, "name": image, "lesion": i,
                   "inverse_area": inverse_area, "found": int(dice > 0), "dice": dice, "data": source}


def describe_model(config):
    """What was trained, for titles."""
    part = "published split" if config.split == "centre" else f"fold {config.fold}"
    return f"{config.method}, {config.model}, {part}, seed {config.seed}"


# ------------------------------------------------------------------------------------ using a checkpoint


def open_checkpoint(path, given):
    """A trained network, with options given by name. -> network, its Config, what it was trained on (None: not known)

    The configuration of this project's checkpoints travels with them. A bare state dict, as published ones are, has
    none: options say what it is, and are the paper's where they do not. Raises RunError for a file that is
    no checkpoint, options that contradict it, and weights that do not fit.
    """
    state, about = runs.read_weights(path)
    if about:
        free = runs.FREE_ON_RESUME | {"centres", "out_centre", "precision"}  # these say where, and on what, it is used
        known = [f for f in fields(Config) if f.name in about["config"].keys() - runs.FREE_ON_RESUME]
        trained = {f.name: about["config"][f.name] for f in known}
        if not all(is_plausible(f, trained[f.name]) for f in known):
            raise RunError(f"{path}: its configuration is damaged")
        for name, value in given.items():
            if name not in free and shown(value) != (old := shown(trained.get(name, "another"))):
                raise RunError(f"--{name.replace('_', '-')} {shown(value)}: {path} was trained with {old}")
        config = Config(**{**trained, **given})
    else:
        config, _ = configure({"preset": "paper", "method": "unknown", **given})
    check(config)
    network = build_network(config)
    runs.load_weights(network, state, path)
    return network.to(choose_device(config)), config, about.get("data")


def is_plausible(f, value):
    """Whether a field of Config may have this value, as far as its type and its choices say."""
    if isinstance(f.default, tuple):
        return isinstance(value, list | tuple) and all(type(x) is int for x in value)
    kinds = (int, float) if isinstance(f.default, float) else (type(f.default),)
    return type(value) in kinds and value in f.metadata.get("choices", [value])


def evaluate_checkpoint(path, given):
    """--evaluate: test a checkpoint without training; files only where --out says. -> content of results.json"""
    network, config, trained = open_checkpoint(path, given)
    if config.out:
        runs.check_empty(Path(config.out))
    root = data.find(config.dataset, config.data_root)
    federation = load_data(config, root)
    where = f"in {root}" if root else "drawn images (--data-root names real ones)"
    print(f"testing {path} on {federation.source}, {where}", flush=True)
    if trained not in (None, federation.source):
        federation.source += f" (trained on {trained})"
    title = f"{path.name}: {describe_model(config)} on {federation.source}"
    results, files = test(network, federation, config, {path.stem: path}, title)
    if config.out:
        runs.save_results(Path(config.out), {**files, "results.json": runs.to_json(results)})
    return results


def predict_files(paths, checkpoint_path, given):
    """--predict: write masks of images or CT volumes into --out. Raises RunError where some could not be read."""
    network, config, trained = open_checkpoint(checkpoint_path, given)
    inputs = inference.find_inputs(paths, config.dataset)
    origin = f"trained on {trained}" if trained else "trained elsewhere"
    print(f"{checkpoint_path}: {describe_model(config)}, {origin}, {config.image_size}x{config.image_size}", flush=True)
    failures = inference.segment_files(functools.partial(predict, network), inputs, Path(config.out), config.dataset,
                                       config.image_size, f"FedGS, {origin}")
    if failures:
        raise RunError("; ".join(failures) + f" ({len(inputs) - len(failures)} of {len(inputs)} files were segmented)")


# ------------------------------------------------------------------------------------------ command line


def configure(given):
    """Options given by name -> Config with the data set's and the preset's values for the others, why this preset."""
    preset, why = given.get("preset", "auto"), "as asked"
    dataset = given.get("dataset", Config.dataset)
    if preset == "auto":
        real = data.find(dataset, given.get("data_root", "")) is not None
        gpu = given.get("device") != "cpu" and torch.cuda.is_available()
        preset = "paper" if real and gpu else "quick"
        why = f"{'real' if real else 'no real'} data and {'a' if gpu else 'no'} GPU"
    return Config(**{**DATASETS[dataset], **PRESETS[preset], **given, "preset": preset}), why


def describe_run(config, federation, device, kernels, processes):
    """What config.json says: which run it is, device, processes, kernels, versions."""
    return {
        **identity(config, federation),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "processes": processes.count,
        "kernels": kernels.name,
        "versions": {"fedgs": __version__, "python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__},
    }


def identity(config, federation):
    """What makes a run this one and no other: its options, and its data with a fingerprint of every image."""
    return {"config": asdict(config), "data": {"source": federation.source, "notes": federation.notes,
            "images": count_images(federation), "fingerprint": data.fingerprint(federation)}}


def count_images(federation):
    """{client: "train + validation + test"} and the held-out centre's number, for the header and config.json."""
    numbers = {centre: " + ".join(map(str, facts.parts)) for centre, facts in federation.facts.items()}
    return {f"C{centre}{'' if ' + ' in text else ' (held out)'}": text for centre, text in numbers.items()}


def header(config, why, root, federation, flat, device, which_kernels, folder, processes):
    """What was chosen, why, and how to change it."""
    where = f"in {root}" if root else (f"drawn images (for real ones put {data.FILES[config.dataset]} into "
                                       f"datasets/{config.dataset} or name their folder with --data-root)")
    lines = {
        "method": f"{config.method} with {config.model}, {flat.parameters.numel():,} parameters (width {config.width})",
        "data": "; ".join([f"{federation.source}, {where}", *federation.notes]),
        "images": ", ".join(f"{k} {n}" for k, n in count_images(federation).items()) + " (train + validation + test)",
        "preset": f"{config.preset} ({why}); choose with --preset paper or quick, any option given overrides it",
        "training": f"{config.rounds} rounds x {config.local_epochs} epochs, batch {config.batch_size}, "
                    f"{config.image_size}x{config.image_size}, lr {config.lr:g}, server lr {config.server_lr:g}, "
                    f"seed {config.seed}, on {device}",
        "computes": f"forward and backward in {describe_precision(config, device)}; kernels: {which_kernels}",
        "folder": str(folder),
    }
    if processes.count > 1:
        lines["clients"] = "; ".join(f"process {rank}: " + " ".join(f"C{k}" for k, owner in processes.owners.items() if owner == rank)
                                     for rank in range(processes.count)) + f" (threads of each: {torch.get_num_threads()})"
    return "\n".join(f"{name:<9}{text}" for name, text in lines.items())


def describe_precision(config, device):
    """--precision, and whether it suits the hardware."""
    here, half = has_bf16(device), config.precision == "bf16"
    return {(True, True): "bf16", (False, False): "fp32 (no bf16 in this hardware)", (True, False): "fp32, as asked",
            (False, True): "bf16, as asked: without hardware for it, slower than fp32"}[here, half]


def shown(value):
    """An option's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class Parser(argparse.ArgumentParser):
    """An error here is like every other one."""

    def error(self, message):
        raise RunError(f"{message} (--help lists the options)")


def parse(arguments=None):
    """Command line -> {name: value} of the options given, what to do with a checkpoint instead of training."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in fields(Config):
        how = dict(f.metadata)
        if isinstance(f.default, bool):
            how["action"] = "store_true"
        else:
            how.setdefault("type", type(f.default))
            others = {"lits": DATASETS["lits"], "quick": PRESETS["quick"]}
            values = [shown(f.default)] + [f"{name} {shown(v[f.name])}" for name, v in others.items() if f.name in v]
            how["help"] += f" ({', '.join(values)})" if values[0] else ""
        spellings = [f"--{f.name.replace('_', '-')}"]
        if f.name in GRID:
            spellings, how["nargs"] = spellings + [f"{spellings[0]}s"], "+"
            how["help"] += "; several: one run after another, each in a folder of its own below --out"
        parser.add_argument(*spellings, **how)
    group = parser.add_argument_group("using a checkpoint instead of training")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--evaluate", action="store_true", help="test --checkpoint, as at the end of a run; files only with --out")
    either.add_argument("--predict", nargs="+", metavar="PATH", help="write masks of these images or CT volumes, or of those in "
                        "these folders, into --out")
    group.add_argument("--checkpoint", type=Path, help="a .pt file of a run, or a published one: a bare state dict, of which "
                       "--model and --dataset say the rest")
    given = vars(parser.parse_args(arguments))
    use = {name: given.pop(name) for name in ("evaluate", "predict", "checkpoint") if name in given}
    if use and len(use) < 2:
        parser.error("--evaluate and --predict need --checkpoint FILE, and it needs one of them")
    if "predict" in use and not given.get("out"):
        parser.error("--predict needs --out FOLDER")
    for name in given.keys() & set(GRID):
        values = list(dict.fromkeys(given[name]))
        given[name] = values if len(values) > 1 else values[0]
    if use and several(given):
        parser.error("a checkpoint is of one method, fold and seed")
    return given, use


def several(given):
    """{option: its values} of those that were given several."""
    return {name: given[name] for name in GRID if isinstance(given.get(name), list)}


def run_grid(given, processes=ALONE):
    """A run for each combination of methods, folds and seeds, except those that are complete, and their comparison.

    A run that is refused does not keep the others from running. Raises RunError for them at the end, and before anything
    begins for options that no run can use and folders that hold something else.
    """
    axes, plan = several(given), []
    for values in itertools.product(*axes.values()):
        config, why = configure({**given, **dict(zip(axes, values))})
        folder = Path(config.out or "runs") / runs.run_name(config)
        config.out = str(folder)
        check(config)
        complete = processes.from_first(lambda: runs.is_complete(folder, config))
        if not complete:
            processes.from_first(lambda: runs.check_folder(folder, {"config": asdict(config)}, config.resume))
        plan.append((folder, config, why, complete))
    federation, fold, failures = None, None, []
    for i, (folder, config, why, complete) in enumerate(plan, start=1):
        print(f"run {i} of {len(plan)}: {folder}{' is complete' if complete else ''}\n", flush=True)
        if fold != config.fold:
            federation, fold = load_data(config, data.find(config.dataset, config.data_root), processes), config.fold
        try:
            if complete:
                processes.from_first(lambda: runs.check_same(folder / "config.json", identity(config, federation)))
            else:
                run(config, why, federation, processes)
        except RunError as error:
            failures.append(f"{folder}: {error}")
    folders = [str(folder) for folder, *_ in plan if (folder / "results.json").exists()]
    if folders:
        print("\n" + processes.from_first(lambda: metrics.report(metrics.compare(folders))))
        print(f"\nto draw it: python metrics.py {' '.join(folders)} --plot comparison.png")
    if failures:
        raise RunError(f"{len(failures)} of {len(plan)} runs failed: " + "; ".join(failures))


def main(arguments=None):
    """The command line. -> exit code: 0, 2 for an error (one line on stderr), 130 when interrupted"""
    processes, use = Processes(READABLE), {}
    try:
        processes.join()
        given, use = parse(arguments)
        if use and processes.count > 1:
            raise RunError("--evaluate and --predict are work for one process: start them without torchrun")
        if "evaluate" in use:
            evaluate_checkpoint(use["checkpoint"], given)
        elif "predict" in use:
            predict_files(use["predict"], use["checkpoint"], given)
        elif several(given):
            run_grid(given, processes)
        else:
            run(*configure(given), processes=processes)
        processes.leave()
    except (*READABLE, OtherEnded) as error:
        if processes.rank == 0 or isinstance(error, OtherEnded):  # the others' errors are process 0's, too
            print(f"fedgs.py: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:  # torch says so with a RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        hint = "" if use else ": choose a smaller --batch-size, --image-size or --width"
        print(f"fedgs.py: error: out of memory{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "what was written stays" if use else GO_ON
        if processes.rank == 0:
            print(f"\nfedgs.py: interrupted; {hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
