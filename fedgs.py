"""FedGS: federated segmentation in which small lesions are not drowned out.

    python fedgs.py --dataset polypgen --method fedgs     # a whole federation, images to tables
    python fedgs.py --dataset lits --model sd-utnet       # the paper's other data set and network
    python fedgs.py --dataset hospitals.csv               # your own images, see docs/data.md
    python fedgs.py --help                                # every option

Schutte, Corbetta, Beets-Tan and Silva, "FedGS: Federated Gradient Scaling for Heterogeneous
Medical Image Segmentation", MICCAI DeCaF 2024. Hospitals (clients) train one network without
sharing images. Training at a client is plain AdamW; only what it *reports* is re-weighted, by how
small the lesions of each batch were:

    server: initialise theta
    for each round:
        for each client k, in its own hospital:
            theta_k <- theta;  Delta_k <- 0
            for each batch x, y of B images:
                delta_x = tanh(log_l(1 / a_x)^2) if the lesion of x is small, else 0
                eta     = 1 + (2 / B) sum_x delta_x
                s       = AdamW's step for the gradient of the loss
                theta_k <- theta_k - s
                Delta_k <- Delta_k + eta s
        theta <- theta - sum_k (T_k / sum_j T_j) Delta_k

a_x is the lesion's share of the image, T_k the number of client k's steps. FedAvg, the baseline,
reports Delta_k = theta - theta_k and weights clients by their numbers of images.

This file follows that order: the options of a run, the three operations that are the method, a
network as one vector, client, server, the round loop, and a whole run around it. In the code
delta_x is `difficulty` and Delta_k is `update`.
"""

import contextlib
import itertools
import math
import time
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import data
import metrics
from models import CODE, SDUTNet, UTNet
from support import checkpoints, hardware, manifest, options, pictures, processes, runs, tables
from support.errors import UserError, end_on_signals, readable_errors
from support.options import option

__version__ = "0.2.0"

STATISTICS = tuple(tables.BATCH_NORM)  # whose means and variances batch norm uses: see `adapt`
ENOUGH = 256  # images that `adapt` looks at


# ------------------------------------------------------------------------------------------ options


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. The defaults are the paper's, for PolypGen.

    A plain value: making one asks nothing of the machine. support/options.py turns the fields into
    a command line and checks them; what their flags (free, place, path) mean stands there, too.
    """

    # What is trained, how, and on what.
    dataset: str = option("polypgen", options.DATASET_HELP)
    method: str = option("fedgs", options.METHOD_HELP, choices=options.METHODS)
    scaling: str = option("auto", options.SCALING_HELP, choices=("auto", "on", "off"))
    model: str = option("utnet", "network", choices=("utnet", "sd-utnet"))
    preset: str = option("auto", options.PRESET_HELP, choices=("auto", "paper", "quick"), free=True)

    # The federation, and AdamW at its clients.
    rounds: int = option(100, "communication rounds", free=True)
    local_epochs: int = option(5, "epochs that a client trains in a round")
    batch_size: int = option(4, "images in a batch; a last incomplete batch is dropped")
    lr: float = option(1e-4, "learning rate of the clients' AdamW")
    image_size: int = option(512, "images are resized to this square; a multiple of 16")
    width: int = option(32, "base channels of the network")

    # The baselines. FedProx holds a client near the server's parameters.
    mu: float = option(0.01, "fedprox: weight of the squared distance from the server")

    # What the images are. Of one's own this follows from their manifest, unless it is given.
    images: str = option("colour", options.IMAGES_HELP, choices=("colour", "grey", "slices"))
    lesion: tuple = option((), options.LESION_HELP, item=int, place=True)
    window: tuple = option((), options.WINDOW_HELP, item=float)

    # The server's step. The control experiment is FedAvg with server_lr = the mean eta of FedGS.
    server_lr: float = option(1.0, "factor on the server's step")
    server_momentum: float = option(0.0, "momentum of the server's step")

    # FedGS: which lesions are small, and how much more their steps count.
    log_base: float = option(100.0, "l, base of the logarithm in a small lesion's difficulty")
    tau: float = option(150.0, "a lesion is small if it covers at most 1/tau of the image")

    # Which images train, validate and test.
    split: str = option("fold", options.SPLIT_HELP, choices=options.SPLITS)
    fold: int = option(1, "which of the five folds", choices=(1, 2, 3, 4, 5))
    centres: tuple = option(data.CENTRES["polypgen"], "centres that take part", place=True)
    out_centre: str = option("C6", options.OUT_CENTRE_HELP, place=True)
    seed: int = option(0, "seed of initial weights, batches and augmentation")

    # How a centre uses the network. It is trained in the same way whatever this says.
    batch_norm: str = option("averaged", options.BATCH_NORM_HELP, choices=STATISTICS, place=True)

    # How it computes: none of these changes what a round means.
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"), free=True)
    precision: str = option("auto", options.PRECISION_HELP, choices=options.PRECISIONS, place=True)
    kernels: str = option("auto", options.KERNELS_HELP, choices=options.KERNELS, free=True)
    workers: str = option("auto", options.WORKERS_HELP, free=True)

    # Where everything lies.
    data_root: str = option("", options.DATA_ROOT_HELP, free=True, path=True)
    cache: str = option("", "folder for what is decoded or drawn once", free=True, path=True)
    out: str = option("", options.OUT_HELP, free=True, path=True)
    label: str = option("", "what comparisons call this run; default: its method", free=True)
    resume: bool = option(False, "continue the run in its folder", free=True)

    @property
    def clients(self) -> list[str]:
        """The centres that train, in their order."""
        return [centre for centre in self.centres if centre != self.out_centre]

    @property
    def accumulates(self) -> bool:
        """Whether clients report the sum of their steps, eta s each, or how far they have come."""
        return self.method == "fedgs" or self.scaling == "on"

    @property
    def scales(self) -> bool:
        """Whether eta is above 1 for small lesions."""
        return self.accumulates and self.scaling != "off"


# -------------------------------------------------- the method: difficulty, step and aggregation


def mask_difficulty(masks: Tensor, small: Tensor, log_base: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lesion areas, difficulties and the step scale of a batch (paper, section 2).

    masks (B, 1, H, W) or (B, H, W), nonzero = lesion; small (B,) bool; log_base is l.
    -> area (B,) int64, in pixels; difficulty (B,) float32 in [0, 1]; eta, 0-dim float32 in [1, 3].
    Nothing leaves the device.
    """
    # 1 / a_x. An empty mask counts as one pixel here, and is taken out below.
    area = (masks != 0).flatten(1).sum(dim=1)
    pixels = masks.shape[-2] * masks.shape[-1]
    inverse_area = pixels / area.clamp(min=1).double()

    # delta_x = tanh(log_l(1 / a_x)^2)
    difficulty = torch.tanh((inverse_area.log() / math.log(log_base)) ** 2)

    # Only a small lesion is difficult, and only if augmentation did not rotate it out of view.
    difficult = small.bool() & (area > 0)
    difficulty = torch.where(difficult, difficulty, 0.0).float()

    # eta = 1 + (2 / B) sum_x delta_x
    eta = 1 + 2 * difficulty.sum() / max(len(masks), 1)
    return area, difficulty, eta


def adamw_accumulate_(
    theta: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: float,
    update: Tensor | None = None,
    eta: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """One AdamW step on flat vectors, in place; with update and eta also update += eta s.

    theta, grad, m, v, update: (P,) float32; step: 0-dim int64, which counts from 1, and eta: 0-dim,
    on the same device. The decoupled weight decay is no part of s, so none of the update.
    """
    # The decay pulls theta towards zero whatever the images are: it is not what a client learned
    # from them, and stays out of its update.
    theta.mul_(1 - lr * weight_decay)

    # Running means of the gradient and of its square.
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])

    # s = lr m_hat / (sqrt(v_hat) + eps); the hats undo that both means started at zero.
    t = step.double()
    root = (v / (1 - betas[1] ** t)).sqrt_().add_(eps)
    s = (m / root).mul_(lr / (1 - betas[0] ** t))

    # theta_k <- theta_k - s
    theta.sub_(s)

    # Delta_k <- Delta_k + eta s
    if update is not None:
        update.add_(s.mul_(eta))


def aggregate(
    total: Tensor, updates: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """total + sum_k w_k Delta_k, summed in client order.

    total (P,); updates: K vectors (P,); weights: K numbers. -> the sum (P,), the squared norm of
    each update (K,) float64, whether each update is finite (K,) bool
    """
    # One after another: floating point sums depend on their order, and this one is fixed.
    result = total.clone()
    for update, weight in zip(updates, weights, strict=True):
        result.add_(update, alpha=weight)

    # A sum of squares is finite exactly where all its terms are.
    norms = [torch.linalg.vector_norm(update, dtype=torch.float64) for update in updates]
    squared = torch.stack(norms).square()
    return result, squared, squared.isfinite()


# The lines above are the definitions. csrc/ has the same three operations compiled, each in one
# pass over memory; the tests compare them with these.


class Kernels(NamedTuple):
    """The three operations, in one implementation of them."""

    name: str
    mask_difficulty: Callable
    adamw_accumulate_: Callable
    aggregate: Callable


PYTORCH = Kernels("torch", mask_difficulty, adamw_accumulate_, aggregate)


def choose_kernels(wanted: str, device: torch.device) -> tuple[Kernels, str]:
    """--kernels, for a device -> the operations, and what to say of the choice.

    Raises UserError for kernels that cannot run.
    """
    module, reason = hardware.compiled_kernels(wanted, device)
    if module is None:
        return PYTORCH, reason
    name = "cuda" if device.type == "cuda" else "cpp"
    compiled = Kernels(name, module.mask_difficulty, module.adamw_accumulate_, module.aggregate)
    return compiled, reason


# --------------------------------------------------------------------------- a network as vectors


class State(NamedTuple):
    """What the server sends to its clients: all of a network that training changes."""

    parameters: Tensor  # theta, (P,) float32
    buffers: Tensor  # means and variances of batch norm, float32
    counters: Tensor  # its numbers of batches, int64
    own: dict[str, Tensor]  # FedBN: {client: its own scales and shifts of batch norm, (Q,)}


class Progress(NamedTuple):
    """What a client's steps need beside the network: all of it begins at 0, but for theta."""

    start: Tensor  # (P,), theta, from which the client has started
    m: Tensor  # (P,), AdamW's running mean of the gradient
    v: Tensor  # (P,), and of its square
    step: Tensor  # 0-dim int64, how many steps there were
    update: Tensor  # (P,), Delta_k


class FlatNetwork:
    """A network whose tensors are views of three vectors, so that one operation reaches them all.

    parameters, grad (P,) float32; affine (Q,) int64: where batch norm's scales and shifts are in
    them; buffers and counters as in State; progress: of whichever client is training. Index tables
    (integer buffers with a shape) are constants: they stay out, so that averaging cannot damage
    them.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        parameters = list(network.parameters())
        self.parameters = parameters_to_vector(parameters).detach()
        self.grad = torch.zeros_like(self.parameters)

        # From here on the network's tensors and the vectors are the same memory.
        values = views(self.parameters, parameters)
        grads = views(self.grad, parameters)
        for parameter, value, grad in zip(parameters, values, grads, strict=True):
            parameter.data = value
            parameter.grad = grad

        self.affine = affine_places(network)
        self.buffers = self._join(is_statistic)
        self.counters = self._join(is_counter)

        # Made once and not by every client: a CUDA graph needs its memory to stay where it is.
        self.progress = Progress(
            start=torch.zeros_like(self.parameters),
            m=torch.zeros_like(self.parameters),
            v=torch.zeros_like(self.parameters),
            step=torch.zeros((), dtype=torch.int64, device=self.parameters.device),
            update=torch.zeros_like(self.parameters),
        )

    def _join(self, chosen: Callable[[Tensor], bool]) -> Tensor:
        """One vector of the chosen buffers, which become views of it."""
        owners = []
        for module in self.network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if chosen(buffer):
                    owners.append((module, name))

        tensors = [module.get_buffer(name) for module, name in owners]
        vector = parameters_to_vector(tensors)
        for (module, name), view in zip(owners, views(vector, tensors), strict=True):
            setattr(module, name, view)
        return vector

    def load(self, state: State) -> None:
        """Copy a state into the network."""
        self.parameters.copy_(state.parameters)
        self.buffers.copy_(state.buffers)
        self.counters.copy_(state.counters)

    def state(self, own: Mapping[str, Tensor] | None = None) -> State:
        """A copy of the network's state, beside what clients have of their own."""
        return State(
            self.parameters.clone(), self.buffers.clone(), self.counters.clone(), dict(own or {})
        )


def is_statistic(buffer: Tensor) -> bool:
    return buffer.is_floating_point()


def is_counter(buffer: Tensor) -> bool:
    return not buffer.is_floating_point() and buffer.ndim == 0


def affine_places(network: nn.Module) -> Tensor:
    """Where batch norm's scales and shifts are in the vector of parameters. (Q,) int64"""
    affine = set()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            affine.update(module.parameters(recurse=False))

    marks = [torch.full((x.numel(),), x in affine) for x in network.parameters()]
    return torch.cat(marks).nonzero().squeeze(1).to(next(network.parameters()).device)


def views(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive pieces of a vector, in the shapes of these tensors."""
    pieces = vector.split([x.numel() for x in tensors])
    return [piece.view_as(x) for piece, x in zip(pieces, tensors, strict=True)]


def build_network(config: Config) -> nn.Module:
    """The network of a configuration, with weights drawn from its seed."""
    # Server and clients build it in their own processes, and have to agree on its weights.
    torch.manual_seed(config.seed)
    channels = data.channels_of(config.images)
    if config.model == "sd-utnet":
        return SDUTNet(channels, classes=2, width=config.width, size=config.image_size)
    return UTNet(channels, classes=2, width=config.width)


# ------------------------------------------------------------------------------------------ client


@dataclass
class ClientLog:
    """What a client's round was like, in numbers for the tables."""

    client: str
    images: int  # n_k
    steps: int  # T_k
    loss: float  # mean over steps
    terms: dict[str, float]  # the loss's terms, where it has several: means over steps
    eta: float  # mean over steps
    scaled: float  # share of steps with eta > 1
    update_norm: float = math.nan  # |Delta_k|, which the server measures


@dataclass
class Update:
    """What a client sends to the server: nothing in it belongs to a single image."""

    client: str
    vector: Tensor  # Delta_k, (P,)
    buffers: Tensor
    counters: Tensor
    log: ClientLog
    own: dict[str, Tensor] = field(default_factory=dict)  # as in State, this client's
    share: float = 1.0  # sum of w_j over the clients of this round: less where one is missing


class Batch(NamedTuple):
    """What a training step reads."""

    images: Tensor  # (B, C, S, S) uint8
    masks: Tensor  # (B, 1, S, S) uint8
    small: Tensor  # (B,) bool
    draws: Tensor  # (B, 9) from [0, 1), for the augmentation
    noise: Tensor  # (2, B, 8) normal, for SD-UTNet's codes; (0, B, 8) for UTNet


def train_client(
    flat: FlatNetwork,
    state: State,
    images: data.Images,
    config: Config,
    round_: int,
    kernels: Kernels = PYTORCH,
    take_step: Callable | None = None,
    on_step: Callable[[], object] | None = None,
) -> Update:
    """A client's part of a round: local epochs of AdamW from the server's state. -> Update

    flat: the network to work in; images: the client's training images, on its device; take_step:
    `training_step`, or what does the same; on_step is called after every step. No number is read
    back from the device before the last step.
    """
    take_step = take_step or training_step

    # theta_k <- theta
    generator = client_generator(config.seed, round_, images.centre)
    flat.load(state)
    flat.network.train()

    # Delta_k <- 0, and a fresh optimiser in every round, as in the paper.
    for x in flat.progress:
        x.zero_()
    flat.progress.start.copy_(state.parameters)

    steps = 0
    totals = 0.0
    for _ in range(config.local_epochs):
        for batch in epoch_batches(images, config, generator):
            measured = take_step(flat, batch, config, kernels)
            steps += 1

            # Sums stay on the device: reading one back would make every step wait for the GPU.
            totals = totals + torch.stack(list(measured.values()))
            if on_step is not None:
                on_step()

    # FedAvg reports how far the client has come, theta - theta_k. That includes the decay, and
    # every step counts the same.
    if config.accumulates:
        update = flat.progress.update.clone()
    else:
        update = state.parameters - flat.parameters

    # FedBN's clients keep batch norm for themselves (Li et al., ICLR 2021). This simulation keeps
    # it for them in the server's state, so that any process can train any client.
    own = {}
    if config.method == "fedbn":
        own[images.centre] = flat.parameters[flat.affine]

    log = client_log(images, steps, dict(zip(measured, (totals / steps).tolist(), strict=True)))
    return Update(images.centre, update, flat.buffers.clone(), flat.counters.clone(), log, own)


def training_step(
    flat: FlatNetwork, batch: Batch, config: Config, kernels: Kernels = PYTORCH
) -> dict[str, Tensor]:
    """A client's step for a batch, in the network and its progress. -> as of `batch_gradient`"""
    measured = batch_gradient(flat, batch, config, kernels)
    theta, grad = flat.parameters, flat.grad
    start, m, v, step, update = flat.progress

    # FedProx also minimises mu / 2 |theta_k - theta|^2 (Li et al., MLSys 2020).
    if config.method == "fedprox":
        grad.add_(theta - start, alpha=config.mu)

    # The number of the step is on the device, too, so that a GPU counts for itself.
    step.add_(1)

    # All methods take the same step, theta_k <- theta_k - s.
    # FedGS also adds eta times the step to its update, Delta_k <- Delta_k + eta s.
    if config.accumulates:
        eta = measured["eta"]
        kernels.adamw_accumulate_(theta, grad, m, v, step, config.lr, update, eta)
    else:
        kernels.adamw_accumulate_(theta, grad, m, v, step, config.lr)
    return measured


def client_log(images: data.Images, steps: int, means: dict[str, float]) -> ClientLog:
    """A client's round in numbers. means: over its steps, of what `batch_gradient` measures."""
    return ClientLog(
        client=images.centre,
        images=len(images),
        steps=steps,
        loss=means.pop("loss"),
        eta=means.pop("eta"),
        scaled=means.pop("scaled"),
        terms=means,  # what is left
    )


def client_generator(seed: int, round_: int, client: str) -> torch.Generator:
    """All randomness of a client's round. Clients may so run in any order, or anywhere."""
    # C1 counts as 1; any other name has a number of its own, too.
    published = client in data.CENTRES["polypgen"]
    number = int(client[1:]) if published else zlib.crc32(client.encode())

    # Sums of the three would collide: seed 1 in round 2 must not be seed 2 in round 1.
    sequence = np.random.SeedSequence((seed, round_, number))
    drawn = sequence.generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(drawn) >> 1)  # torch takes 63 bits


def epoch_batches(
    images: data.Images, config: Config, generator: torch.Generator
) -> Iterator[Batch]:
    """A client's images once, in a new order; a last incomplete batch is dropped."""
    batches = len(images) // config.batch_size

    # SD-UTNet samples two codes for each image: of the image, and of its reconstruction.
    codes = 2 if config.model == "sd-utnet" else 0

    # All draws are made on the CPU, so that they are the same whatever the device is.
    order = torch.randperm(len(images), generator=generator)
    order = order[: batches * config.batch_size].view(batches, -1)
    draws = torch.rand(batches, config.batch_size, data.AUGMENTATION_DRAWS, generator=generator)
    noise = torch.randn(batches, codes, config.batch_size, CODE, generator=generator)

    # One copy an epoch: on a GPU no step has to wait for one.
    device = images.images.device
    order, draws, noise = order.to(device), draws.to(device), noise.to(device)

    for chosen, draw, drawn_noise in zip(order, draws, noise, strict=True):
        yield Batch(
            images.images[chosen], images.masks[chosen], images.small[chosen], draw, drawn_noise
        )


def batch_gradient(
    flat: FlatNetwork, batch: Batch, config: Config, kernels: Kernels = PYTORCH
) -> dict[str, Tensor]:
    """The loss's gradient for a batch, which is augmented first, into flat.grad.

    -> {name: 0-dim float32}: the loss, its terms, eta, and whether eta is above 1 ("scaled")
    """
    images, masks = data.augment(batch.images, batch.masks, batch.draws)
    images = data.normalise(images)

    # The gradient is one vector: clearing it is one operation, and backward adds into it.
    flat.grad.zero_()
    loss, terms = training_loss(flat.network, images, masks, batch.noise, config.precision)
    loss.backward()

    # The masks that the network has just seen: a rotation may have moved a lesion out of view.
    if config.scales:
        _, _, eta = kernels.mask_difficulty(masks, batch.small, config.log_base)
    else:
        eta = torch.ones((), device=masks.device)

    measured = {"loss": loss, **terms, "eta": eta, "scaled": eta > 1}
    return {name: x.detach().float() for name, x in measured.items()}


def training_loss(
    network: nn.Module, images: Tensor, masks: Tensor, noise: Tensor, precision: str = "fp32"
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a step minimises, and its terms by name. noise (2, B, 8) is for SD-UTNet's codes.

    bf16: the network computes in bfloat16 where autocast finds that good enough, channels-last, as
    matrix units want it (in float32 on a CPU that is slower). Losses are float32.
    """
    half = precision == "bf16"
    if half:
        images = images.contiguous(memory_format=torch.channels_last)

    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        if isinstance(network, SDUTNet):
            parts = network.decompose(images, noise)
        else:
            logits = network(images)

    # A sum over all pixels of a batch is too long for bfloat16's eight bits.
    if isinstance(network, SDUTNet):
        parts = type(parts)._make(x.float() for x in parts)
        return metrics.disentangled_loss(parts, images, masks)
    return metrics.soft_dice_loss(logits.float(), masks), {}


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Lesion masks (N, 1, S, S) bool, on the CPU, of images (N, C, S, S) uint8.

    size: (height, width) to which the network's output is resized, bilinearly, before its larger
    class is taken.
    """
    # Evaluation mode: batch norm uses its running statistics, and a lone image is no batch.
    network.eval()
    device = next(network.parameters()).device
    output = network(data.normalise(images.to(device)))

    # Resizing the scores and not the mask keeps the outline smooth.
    if size is not None and size != output.shape[-2:]:
        output = F.interpolate(output, size, mode="bilinear")
    return (output.argmax(dim=1, keepdim=True) == 1).cpu()


def adapt(network: nn.Module, images: Tensor) -> None:
    """Give batch norm the means and variances of a centre's own images (N, C, S, S) uint8.

    The server averages statistics of hospitals that differ, and what it gets fits none of them.
    These are measured without labels, and stay in the centre (AdaBN, Li et al., Pattern Recognition
    80, 2018; SiloBN, Andreux et al., DART 2020). Nothing is drawn: the same images have the same
    statistics. At most ENOUGH of them are looked at.
    """
    # Neighbours in a folder look alike, and a batch of them would vary less than the centre does:
    # each batch takes images from all over it.
    images = images[:: math.ceil(len(images) / ENOUGH)]
    if len(images) == 1:
        images = images.repeat(2, 1, 1, 1)  # where all is one value there is no variance to measure
    count = math.ceil(len(images) / 16)
    device = next(network.parameters()).device
    batches = (data.normalise(images[i::count].to(device)) for i in range(count))
    update_bn(batches, network)  # to their mean over the batches


def evaluate(network: nn.Module, images: data.Images) -> metrics.Evaluation:
    """Predict and score one centre's images, sixteen at a time."""
    batches = tqdm(
        images.images.split(16),
        desc=f"evaluating {images.centre}",
        unit="batch",
        delay=2,
        leave=False,
        disable=None,
    )
    # An empty beginning, so that a centre without images has an evaluation, too.
    predicted = [torch.zeros_like(images.masks[:0], dtype=torch.bool)]
    predicted += [predict(network, batch) for batch in batches if len(batch)]
    return metrics.score(torch.cat(predicted), images.masks.bool(), images.small)


# ----------------------------------------------------------------------------------------- clients


@dataclass
class CentreTest:
    """One centre's test: what the tables need of it, and in its own process the images too."""

    centre: str
    split: str  # in_test or out_test
    batch_norm: str  # whose statistics: averaged or local
    tally: Tensor  # sums and counts, see metrics.tally
    scores: list[dict]  # rows of scores.csv
    images: data.Images | None
    evaluation: metrics.Evaluation | None


class LocalClients:
    """Clients whose images are in this process: one after another, in one network.

    federation: who they are and what they have. The round loop sees nothing else of them, so that
    clients in other processes (support/processes.py) can take this class's place.
    """

    def __init__(
        self,
        flat: FlatNetwork,
        federation: data.Federation,
        config: Config,
        kernels: Kernels = PYTORCH,
    ):
        self.flat = flat
        self.federation = federation
        self.config = config
        self.kernels = kernels
        self.device = flat.parameters.device
        self.here = list(federation.train)  # names of the clients in this process
        self.placement = ""  # which client is where, for the header: they are all here
        self.on_step = None  # called after every step, for whoever shows progress

        # Training images lie on the device for the whole run: a step copies nothing from the host.
        self.train_images = [images.to(self.device) for images in federation.train.values()]

        # On a GPU a step is captured once, and replayed as one launch.
        self.take_step = training_step
        if kernels.name == "cuda":
            self.take_step = hardware.CapturedStep(training_step)

    def train(self, state: State, round_: int) -> Iterator[Update]:
        """Every client's update, in client order."""
        for images in self.train_images:
            yield train_client(
                self.flat,
                state_of(state, images.centre, self.flat.affine),
                images,
                self.config,
                round_,
                self.kernels,
                self.take_step,
                self.on_step,
            )

    def evaluate(self, state: State) -> dict[str, Tensor]:
        """{client: sums and counts over its validation images}, see metrics.tally."""
        tallies = {}
        for client, images in self.federation.validation.items():
            self._use(state, client, self.config.batch_norm, self.federation.train[client])
            tallies[client] = evaluate(self.flat.network, images).tally
        return tallies

    def test(self, state: State) -> Iterator[CentreTest]:
        """The clients on their own test images, and the held-out centre if it is here.

        Each twice, with the statistics that the server has averaged and with the centre's own.
        """
        for client, images in self.federation.in_test.items():
            yield from self._test(state, images, "in_test", self.federation.train[client])

        # The held-out centre has only the images that it is tested on, and uses no label of theirs.
        out_test = self.federation.out_test
        if out_test is not None:
            yield from self._test(state, out_test, "out_test", out_test)

    def _test(
        self, state: State, images: data.Images, split: str, own: data.Images
    ) -> Iterator[CentreTest]:
        source = self.federation.source
        for batch_norm in STATISTICS:
            self._use(state, images.centre, batch_norm, own)
            evaluation = evaluate(self.flat.network, images)
            scores = tables.score_rows(split, batch_norm, images, evaluation, source)
            yield CentreTest(
                images.centre, split, batch_norm, evaluation.tally, scores, images, evaluation
            )

    def _use(self, state: State, centre: str, batch_norm: str, own: data.Images) -> None:
        """Load a state as this centre, with these images, uses it."""
        self.flat.load(state_of(state, centre, self.flat.affine))
        if batch_norm == "local" and len(own):
            adapt(self.flat.network, own.images)


def state_of(state: State, centre: str, affine: Tensor) -> State:
    """The server's state as one centre has it, with batch norm's parameters of its own (FedBN).

    affine: their places among the parameters. A centre that has none yet, as one that is held out,
    takes the server's, which are means over the clients.
    """
    if centre not in state.own:
        return state
    parameters = state.parameters.index_copy(0, affine, state.own[centre])
    return state._replace(parameters=parameters)


# ------------------------------------------------------------------------------------------ server


def client_weights(config: Config, facts: Mapping[str, data.Facts]) -> dict[str, float]:
    """{client: w_k}: T_k / sum_j T_j for FedGS, n_k / sum_j n_j for FedAvg (paper, section 2)."""
    # FedGS adds up steps, so a client counts by its steps. FedAvg averages over images.
    if config.accumulates:
        sizes = client_steps(config, facts)
    else:
        sizes = {client: facts[client].train for client in config.clients}

    total = sum(sizes.values())
    return {client: size / total for client, size in sizes.items()}


def client_steps(config: Config, facts: Mapping[str, data.Facts]) -> dict[str, int]:
    """{client: T_k}, its optimiser steps in a round."""
    steps = {}
    for client in config.clients:
        # A last incomplete batch is dropped.
        batches = facts[client].train // config.batch_size
        steps[client] = batches * config.local_epochs
    return steps


class Server:
    """The server's state, and how a round changes it.

    weights: {client: w_k}, summing to 1. Parameters and floating-point buffers are averaged with
    the same weights; counters take the rounded mean.
    """

    GROUP = 8  # updates that are in memory together, however many clients there are

    def __init__(
        self,
        state: State,
        weights: Mapping[str, float],
        config: Config,
        kernels: Kernels = PYTORCH,
    ):
        self.state = state
        self.velocity = torch.zeros_like(state.parameters)
        self.round = 0  # rounds that were applied
        self.weights = weights
        self.config = config
        self.kernels = kernels

    def apply(self, updates: Iterable[Update]) -> list[ClientLog]:
        """Replace the state by the aggregate of the clients' updates, which come in client order.

        velocity <- mu velocity + sum_k w_k Delta_k;  theta <- theta - server_lr velocity

        Raises UserError naming the clients whose loss or update is not finite, and for a step that
        is not. The state is then unchanged.
        """
        # What the round will have changed. Until its end the server's own state stays as it is.
        velocity = self.config.server_momentum * self.velocity
        buffers = torch.zeros_like(self.state.buffers)
        counters = torch.zeros_like(self.state.counters, dtype=torch.float64)
        logs = []
        refused = []
        own = dict(self.state.own)

        for group in in_groups(updates, self.GROUP):
            # velocity <- velocity + sum_k w_k Delta_k, where the w_k of those who report sum to 1
            weights = [self.weights[update.client] / update.share for update in group]
            vectors = [update.vector for update in group]
            velocity, squared_norms, finite = self.kernels.aggregate(velocity, vectors, weights)

            # The same weights for the means and variances of batch norm, and for its counters.
            vectors = [update.buffers for update in group]
            buffers, _, buffers_finite = self.kernels.aggregate(buffers, vectors, weights)
            for update, weight in zip(group, weights, strict=True):
                counters += weight * update.counters.double()

            # Aggregation has measured the updates on its way.
            norms = squared_norms.sqrt().tolist()
            fine = (finite & buffers_finite).tolist()
            for update, norm, is_fine in zip(group, norms, fine, strict=True):
                update.log.update_norm = norm
                own.update(update.own)
                logs.append(update.log)
                if not (is_fine and math.isfinite(update.log.loss)):
                    refused.append(update.client)

            # Nothing here may keep this group's memory: the next group needs it.
            del vectors, update

        # One hospital's broken numbers would reach all the others with the next state.
        if refused:
            self._refuse(f"loss or update of client {', '.join(refused)}", "--lr")

        # theta <- theta - server_lr velocity. Without momentum this is the paper's server step,
        # theta <- theta - sum_k w_k Delta_k.
        theta = self.state.parameters - self.config.server_lr * velocity
        if not theta.isfinite().all():
            self._refuse("the server's step", "--server-lr or --server-momentum")

        counters = counters.round().to(self.state.counters.dtype)
        self.state = State(theta, buffers, counters, own)
        self.velocity = velocity
        self.round += 1
        return logs

    def _refuse(self, what: str, option: str) -> NoReturn:
        raise UserError(
            f"round {self.round + 1} was not applied: {what} is not finite; earlier checkpoints "
            f"stay as they were (a smaller {option} may help)"
        )


def in_groups(items: Iterable, size: int) -> Iterator[list]:
    """Lists of up to `size` items. Each is emptied before the next one is filled."""
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group
        group.clear()


# -------------------------------------------------------------------------------------- round loop


def federate(
    server: Server, clients: LocalClients, config: Config
) -> Iterator[tuple[int, list[ClientLog], dict]]:
    """The rounds that are left, one at a time. -> round, the clients' logs, validation measures

    clients: LocalClients, or what has its three methods and runs elsewhere.
    """
    for round_ in range(server.round + 1, config.rounds + 1):
        # Every client trains from the server's state, and sends back what it accumulated.
        updates = clients.train(server.state, round_)

        # theta <- theta - server_lr sum_k w_k Delta_k
        logs = server.apply(updates)

        # How good is the new state? Sums and counts leave a client, never a single image's score.
        tallies = clients.evaluate(server.state)
        yield round_, logs, metrics.means(sum(tallies.values()))


# ------------------------------------------------------------------------------------- a whole run


def run(config: Config, why: str = "as given", open_hospitals: Callable | None = None) -> dict:
    """Train round by round, keep everything in the run's folder, test, draw. -> results.json

    why: the reason for the preset, for the header; open_hospitals: in place of `open_clients`,
    where the clients are real hospitals (support/flower.py). Raises UserError where options, data
    or folder cannot be used, before anything is written, and for a round that is refused.
    """
    # Everything that can be refused is refused here: nothing is loaded or written yet.
    config = settle(config, elsewhere=open_hospitals is not None)
    folder = runs.Folder(config)
    folder.check({"config": asdict(config)})

    with (open_hospitals or open_clients)(config) as clients:
        # Now the data are known.
        options.check_sizes(config, clients.federation.facts)

        # Two runs in one folder would undo each other's work.
        with runs.locked(folder.path):
            return run_in(folder, clients, config, why)


def run_in(folder: runs.Folder, clients: LocalClients, config: Config, why: str) -> dict:
    """`run`, once the data are known and the folder is locked. Raises as it does."""
    # A run may only go on with the data that it began with.
    federation = clients.federation
    record = runs.describe_run(config, clients, __version__)
    folder.check(record)

    # The server starts from the weights that every client has drawn from the same seed, or
    # from where an earlier process of this run left it.
    weights = client_weights(config, federation.facts)
    server = Server(clients.flat.state(), weights, config, clients.kernels)
    history = folder.load_progress(server, clients)

    # From here on the folder is this run's.
    folder.claim(record)
    print(runs.header(config, clients, record, why, folder), flush=True)
    train(server, clients, config, folder, history)
    results, scores, figures = test(clients, config, folder)

    results.update(runs.count_rounds(history))
    figures["curves.png"] = pictures.draw_curves(history, runs.title(config, federation))
    folder.save_results(results, scores, figures)
    return results


def train(
    server: Server,
    clients: LocalClients,
    config: Config,
    folder: runs.Folder,
    history: list[dict],
) -> None:
    """The rounds that are left, with a bar; each adds a row to history and leaves its files."""
    network = clients.flat.network
    federation = clients.federation

    # The bar counts the steps of this process: the others take theirs at the same time.
    steps = client_steps(config, federation.facts)
    own_steps = sum(steps[client] for client in clients.here)
    # A run that goes on begins where it was.
    bar = tqdm(
        total=config.rounds * own_steps,
        initial=server.round * own_steps,
        unit="step",
        leave=False,
        disable=None,
    )
    with bar:
        # A round's seconds are those of training and validation, not of writing its files.
        clients.on_step = bar.update
        start = time.perf_counter()
        for round_, logs, validation in federate(server, clients, config):
            seconds = time.perf_counter() - start
            row = runs.round_row(round_, logs, validation, seconds, federation.source)
            runs.mark_missing(row, config.clients, federation, validation)
            history.append(row)

            # The round is over with resume.pt, from which its other files follow.
            clients.flat.load(server.state)
            about = runs.describe_weights(config, federation.source, round_, __version__)
            weights = checkpoints.with_about(network, about, server.state.own)
            folder.save_round(server, weights, history, validation)

            bar.set_description(f"round {round_}/{config.rounds}")
            bar.write(runs.describe_round(row, config.rounds))
            start = time.perf_counter()


def test(
    clients: LocalClients, config: Config, folder: runs.Folder
) -> tuple[dict, list[dict], dict]:
    """Test the networks of the best rounds, and print the table.

    -> content of results.json, rows of scores.csv, {file name: figure}
    """
    # The run's last network is in no table: a user would take the best one, so that is tested.
    federation = clients.federation
    heading = runs.title(config, federation)
    tests_of = {}  # round -> its tests: the checkpoints may be of the same round
    tested = {}
    scores = []
    figures = {}

    for name in runs.BEST:
        path = folder.path / f"{name}.pt"
        weights, about = checkpoints.read_weights(path)
        round_ = about["round"]

        # Often both checkpoints are of the same round, and one test is enough.
        if round_ not in tests_of:
            state = checkpoints.load_state(clients.flat, weights, path)
            tests_of[round_] = list(clients.test(state))
            clients.flat.load(state)  # without the statistics of the last centre
        if not figures:
            chosen = [test for test in tests_of[round_] if test.batch_norm == config.batch_norm]
            figures = draw_tests(clients, chosen, f"{heading}\n{name} (round {round_})")

        tested[name] = runs.summarise_tests(tests_of[round_], round_)
        scores.extend(runs.score_table(name, tests_of[round_]))

    print(f"\n{heading}\n{tables.results_tables(tested)}")
    return runs.describe_results(config, federation, tested), scores, figures


def draw_tests(clients: LocalClients, tests: Sequence[CentreTest], heading: str) -> dict:
    """Pictures of the network that was tested, on images of this process. -> {file name: figure}"""
    # Images of other processes have stayed there, and the picture says whose it shows.
    here = [(test.images, test.evaluation) for test in tests if test.images is not None]
    if not here:
        return {}
    whose = ""
    if len(here) < len(tests):
        whose = " of " + ", ".join(images.centre for images, _ in here)
    what = f"{heading}: test images{whose}, evenly spaced by size of lesion"
    figures = {"predictions.png": pictures.draw_predictions(here, what)}

    network = clients.flat.network
    filled = [images for images, _ in here if len(images)]
    if isinstance(network, SDUTNet) and filled:
        figures["anatomy.png"] = draw_anatomy(network, filled[0], 0, heading)
    return figures


@torch.no_grad()
def draw_anatomy(network: SDUTNet, images: data.Images, i: int, heading: str) -> Any:
    """Image i as SD-UTNet takes it apart: anatomy, and the reconstruction from it. -> Figure"""
    network.eval()
    device = next(network.parameters()).device
    x = data.normalise(images.images[i : i + 1].to(device))
    anatomy = network.a_encoder(x)
    mu, _ = network.m_encoder(x)
    reconstruction = network.reconstruct(anatomy, mu)
    heading = f"{heading}\n{images.centre}, {images.names[i]}"
    return pictures.draw_anatomy(x[0], anatomy[0], reconstruction[0], heading)


# ------------------------------------------------------------------------ what a run is made of


def settle(config: Config, elsewhere: bool = False) -> Config:
    """A configuration that can be run, with the arithmetic that its device decides on.

    A run's record has to say which that was, since "auto" is something else on another machine.
    elsewhere: not all images are here, so that no manifest tells which centres there are. Raises
    UserError for values that no run can use.
    """
    known_centres = config.centres
    if config.dataset in data.CENTRES or not elsewhere:
        known_centres = data.centres_in(config.dataset, config.data_root)
    options.check(config, known_centres)
    device = hardware.choose_device(config.device)
    return replace(config, precision=hardware.choose_precision(config.precision, device))


@contextlib.contextmanager
def open_clients(config: Config) -> Iterator[LocalClients]:
    """The clients of a run: all of them here, or spread over processes."""
    device = hardware.choose_device(config.device)
    count = processes.choose_workers(config.workers, len(config.clients), device)
    if count == 1:
        yield open_local_clients(config, config.centres)
        return

    # The largest client decides how long a round takes, so it has to be known before any is read.
    root = data.find(config.dataset, config.data_root)
    work_of = data.workloads(config.dataset, root, config.clients)
    with processes.spread(open_local_clients, config, work_of, count) as spread:
        yield spread


def open_local_clients(config: Config, centres: Sequence[str]) -> LocalClients:
    """Load the images of these centres, and make what trains and tests on them."""
    # This is all that a worker does before it serves, and all that one process needs.
    hardware.prepare_torch()
    device = hardware.choose_device(config.device)
    kernels, _ = choose_kernels(config.kernels, device)
    federation = load_data(config, centres)
    flat = FlatNetwork(build_network(config).to(device))
    return LocalClients(flat, federation, config, kernels)


def load_data(
    config: Config, centres: Sequence[str], skip: Container[Path] = ()
) -> data.Federation:
    """The images of these centres, of the data set of a configuration, but for files to skip."""
    return data.load(
        config.dataset,
        data.find(config.dataset, config.data_root),
        centres=config.centres,
        out_centre=config.out_centre,
        size=config.image_size,
        tau=config.tau,
        split=config.split,
        fold=config.fold,
        kind=config.images,
        lesion=config.lesion,
        window=config.window,
        only=centres,
        skip=skip,
        cache=config.cache,
    )


# ------------------------------------------------------------------------------------ command line


DATASETS = {  # what differs from Config's defaults
    "polypgen": {},
    "lits": {
        "images": "slices",
        "window": (-200.0, 200.0),
        "rounds": 60,
        "log_base": 1000.0,
        "tau": 1000.0,
        "centres": data.CENTRES["lits"],
        "out_centre": "C5",
        "split": "centre",
    },
}
PRESETS = {
    "paper": {},
    "quick": {"rounds": 7, "local_epochs": 1, "lr": 1e-3, "image_size": 80, "width": 8},
}
METHODS = {"fedbn": {"batch_norm": "local"}}  # it keeps nothing of batch norm at the server
SHOWN_DEFAULTS = {"lits": DATASETS["lits"], "quick": PRESETS["quick"]}  # by --help, beside Config's


def configure(given: Mapping[str, Any]) -> tuple[Config, str]:
    """Options by name -> Config with the data set's and the preset's values, why this preset."""
    given = manifest.locate(given)
    dataset = given.get("dataset", Config.dataset)
    root = data.find(dataset, given.get("data_root", ""))
    of_dataset = DATASETS[dataset] if dataset in DATASETS else manifest.options_of(root)

    preset = given.get("preset", "auto")
    why = "as asked"
    if preset == "auto":
        # The paper's numbers take days without a GPU, and mean nothing on drawn images.
        real = root is not None
        gpu = given.get("device") != "cpu" and torch.cuda.is_available()
        preset = "paper" if real and gpu else "quick"
        why = f"{'real' if real else 'no real'} data and {'a' if gpu else 'no'} GPU"

    # What was given overrides the method's values, those the preset's, and those the data set's.
    of_method = METHODS.get(given.get("method"), {})
    values = {**of_dataset, **PRESETS[preset], **of_method, **given}
    values["preset"] = preset
    return Config(**options.with_tuples(Config, values)), why


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exits with 2 for an error, 130 when interrupted, one line on stderr."""
    with readable_errors("fedgs.py", interrupted=processes.GO_ON):
        # Of the processes that torchrun starts, all but one wait for that one's requests.
        if processes.serves():
            processes.join(open_local_clients)
            return

        end_on_signals()
        given = options.parse(Config, __doc__, arguments, SHOWN_DEFAULTS)
        config, why = configure(given)
        run(config, why)


if __name__ == "__main__":
    main()
