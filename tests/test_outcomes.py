"""Runs whose outcome is known: solved problems, rounds by hand, and every number of every file.

The other files test pieces. Here they are put together, and what comes out is compared with what
has to: lesions that anybody can see are found, a round is what a plain loop over tensors with
torch's own AdamW gives, and the files say what the checkpoints and images say.
"""

import contextlib
import io
import itertools
import json
import math
import re
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import nibabel
import numpy as np
import pytest
import torch
from conftest import exit_code, rows
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import data
import fedgs
from fedgs import STATISTICS, Config, FlatNetwork, LocalClients, Server
from models import UTNet
from support.runs import Folder
from tools import evaluate, predict

pytestmark = pytest.mark.usefixtures("plain_pictures")

BATCH = 4
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


# ---------------------------------------------------------------------------------- discs on noise


def disc(generator: np.random.Generator, height: int, width: int, radius: float) -> np.ndarray:
    """A mask (height, width) bool with one disc, anywhere in it."""
    y, x = np.mgrid[:height, :width]
    top = generator.uniform(radius, height - radius)
    left = generator.uniform(radius, width - radius)
    return (y - top) ** 2 + (x - left) ** 2 <= radius**2


@pytest.fixture(scope="session")
def frames(tmp_path_factory) -> Path:
    """PolypGen's layout: bright discs on noise. C2 is brighter and redder, C6 held out."""
    root = tmp_path_factory.mktemp("discs")
    generator = np.random.default_rng(0)
    hospitals = {  # centre: images, how bright the noise is, by how much a disc is brighter
        "C1": (60, 70, (110, 80, 80)),
        "C2": (45, 95, (80, 80, 110)),
        "C6": (20, 80, (100, 90, 90)),
    }
    for centre, (count, brightness, contrast) in hospitals.items():
        images = root / f"data_{centre}" / f"images_{centre}"
        masks = root / f"data_{centre}" / f"masks_{centre}"
        images.mkdir(parents=True)
        masks.mkdir()
        for i in range(count):
            mask = disc(generator, 36, 40, generator.uniform(2.5, 10))
            if i % 8 == 7:  # several lesions: the smallest decides
                mask |= disc(generator, 36, 40, 2.5)
            if i % 20 == 19:
                mask[:] = False
            frame = generator.normal(brightness, 20, (36, 40, 3))
            frame[mask] += contrast
            frame = frame.clip(0, 255).astype(np.uint8)
            Image.fromarray(frame).save(images / f"{i:02}.png")
            Image.fromarray(mask).convert("L").save(masks / f"{i:02}_mask.png")
    return root


@pytest.fixture(scope="session")
def scans(tmp_path_factory) -> Path:
    """LiTS's layout: volumes with a bright disc on noise in every slice, C5 held out."""
    root = tmp_path_factory.mktemp("scans")
    generator = np.random.default_rng(0)
    hospitals = {  # numbers of volumes, Hounsfield units of the noise and of a disc above it
        "C1": (range(12), -60, 150),
        "C2": (range(30, 39), -20, 130),
        "C5": (range(120, 124), -40, 140),
    }
    for numbers, level, contrast in hospitals.values():
        for number in numbers:
            labels = np.ones((36, 36, 5), np.uint8)
            for k in range(5):
                labels[disc(generator, 36, 36, generator.uniform(5, 11)), k] = 2
            hu = generator.normal(level, 30, labels.shape) + contrast * (labels == 2)
            for kind, voxels in (("volume", hu.astype(np.int16)), ("segmentation", labels)):
                path = root / f"{kind}-{number}.nii"
                nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(path)
    return root


DISCS = [
    *("--image-size", 32, "--width", 4, "--batch-size", BATCH, "--lr", 5e-3),
    *("--rounds", 5, "--local-epochs", 1, "--workers", 1),
]
RGB = ["--centres", "C1", "C2", "C6", "--tau", 30]
GREY = ["--dataset", "lits", "--centres", "C1", "C2", "C5", "--split", "fold", "--tau", 12]


def assert_solved(checkpoint: dict, out_centre: str) -> None:
    """The lesions of every client's test images, and of the held-out centre's, were found."""
    for batch_norm in ("averaged", "local"):
        found = checkpoint[batch_norm]
        in_test = found["in_test_by_centre"]
        assert set(in_test) == {"C1", "C2"}
        for measures in (*in_test.values(), found["in_test"], found["out_test"]):
            assert measures["dice"]["mean"] >= 0.9, checkpoint
            assert measures["dice_n"]["mean"] >= 0.9, checkpoint
            assert measures["recall"]["mean"] >= 0.9, checkpoint
        assert set(found["out_test_by_centre"]) == {out_centre}


@pytest.mark.parametrize(
    ("colours", "model", "method"),
    [  # every two of these together
        ("rgb", "utnet", "fedgs"),
        ("rgb", "sd-utnet", "fedavg"),
        ("grey", "utnet", "fedavg"),
        ("grey", "sd-utnet", "fedgs"),
    ],
)
@pytest.mark.slow
def test_discs_are_found(colours, model, method, frames, scans, tmp_path, capsys):
    """No network that was trained, tested or chosen wrongly finds them."""
    root, options = {"rgb": (frames, RGB), "grey": (scans, GREY)}[colours]
    where = ["--data-root", root, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    what = ["--model", model, "--method", method]
    assert exit_code(fedgs.main, [*DISCS, *options, *where, *what]) == 0

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    out_centre = options[options.index("--centres") + 3]
    assert_solved(results["checkpoints"]["best"], out_centre)
    history = rows(tmp_path / "run" / "rounds.csv")
    for name in ("loss_C1", "loss_C2"):
        assert float(history[-1][name]) < 0.5 * float(history[0][name])

    # The checkpoint, read again, finds them too.
    capsys.readouterr()
    best = tmp_path / "run" / "best.pt"
    again = tmp_path / "again"
    assert exit_code(evaluate.main, [best, *where[:4], "--out", again]) == 0
    tested = json.loads((again / "results.json").read_text())["checkpoints"]["best"]
    assert_solved(tested, out_centre)


def read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image) > 128


# -------------------------------------------------------------------- the method, without its code


@dataclass
class Trained:
    """What a client's round comes to."""

    update: Tensor
    buffers: list[Tensor]
    losses: list[float] = field(default_factory=list)
    etas: list[float] = field(default_factory=list)
    network: nn.Module | None = None


def vector(tensors) -> Tensor:
    return torch.cat([x.detach().flatten().double() for x in tensors])


def loss_by_hand(logits: Tensor, masks: Tensor) -> Tensor:
    p = logits.softmax(1)[:, 1]
    y = masks[:, 0].double()
    return 1 - (2 * (p * y).sum() + 0.1) / (p.sum() + y.sum() + 0.1)


def eta_by_hand(masks: Tensor, small: list[bool], log_base: float) -> float:
    """1 + (2 / B) sum of tanh(log_l(1 / a)^2) over the small lesions in view."""
    total = 0.0
    for mask, is_small in zip(masks, small, strict=True):
        area = int(mask.sum())
        if is_small and area:
            total += math.tanh(math.log(mask.numel() / area, log_base) ** 2)
    return 1 + 2 / len(masks) * total


def train_by_hand(network: nn.Module, batches: list, config: Config) -> Trained:
    """A client's round on a copy of the server's network, float64."""
    server = network
    network = deepcopy(server).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.lr)
    start = vector(network.parameters())
    trained = Trained(torch.zeros_like(start), [])

    for images, masks, small in batches:
        logits = network((images.double() - MEAN) / STD)
        loss = loss_by_hand(logits, masks)
        trained.losses.append(loss.item())
        if config.method == "fedprox":  # mu / 2 |theta_k - theta|^2
            for x, x_of_server in zip(network.parameters(), server.parameters(), strict=True):
                loss = loss + config.mu / 2 * ((x - x_of_server.detach()) ** 2).sum()
        before = vector(network.parameters())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

        # AdamW has taken its step from where the decay had left the parameters.
        step = before * (1 - config.lr * 0.01) - vector(network.parameters())
        scaled = (config.method, config.scaling) == ("fedgs", "auto") or config.scaling == "on"
        eta = eta_by_hand(masks, small, config.log_base) if scaled else 1.0
        trained.update += eta * step
        trained.etas.append(eta)

    if averages(config):
        trained.update = start - vector(network.parameters())
    trained.buffers = list(network.buffers())
    trained.network = network
    return trained


def averages(config: Config) -> bool:
    """Whether the server averages parameters, by numbers of images, as FedAvg does."""
    return config.method != "fedgs" and config.scaling != "on"


class ServerByHand:
    """The server's network, float64, and its rounds."""

    def __init__(self, network: nn.Module, config: Config):
        self.network = deepcopy(network).double()
        self.velocity = torch.zeros_like(vector(self.network.parameters()))
        self.config = config
        self.norms = {}  # FedBN: {client: the scales and shifts that it has kept}

    def network_of(self, client: str) -> nn.Module:
        """The server's network, with batch norm of the client's own where it keeps that."""
        network = deepcopy(self.network)
        if client in self.norms:
            scale, shift = self.norms[client]
            network[0].weight.data = scale.clone()
            network[0].bias.data = shift.clone()
        return network

    def round(self, batches_of: dict[str, list], images_of: dict[str, int]) -> dict[str, Trained]:
        trained = {}
        shares = {}
        for client, batches in batches_of.items():
            trained[client] = train_by_hand(self.network_of(client), batches, self.config)
            if self.config.method == "fedbn":
                norm = trained[client].network[0]
                self.norms[client] = norm.weight.data, norm.bias.data
            shares[client] = images_of[client] if averages(self.config) else len(batches)
        weights = {client: share / sum(shares.values()) for client, share in shares.items()}

        self.velocity *= self.config.server_momentum
        for client, one in trained.items():
            self.velocity += weights[client] * one.update
        theta = vector(self.network.parameters()) - self.config.server_lr * self.velocity
        nn.utils.vector_to_parameters(theta, self.network.parameters())

        for i, buffer in enumerate(self.network.buffers()):
            if buffer.ndim and not buffer.is_floating_point():
                continue  # index tables are constants
            mean = sum(weights[client] * one.buffers[i] for client, one in trained.items())
            buffer.copy_(mean if buffer.is_floating_point() else mean.round())
        return trained


class Watched:
    """Every batch as augmentation gave it, with its images as they were: what the network saw."""

    def __init__(self, monkeypatch):
        self.seen = []
        self.augment = data.augment
        monkeypatch.setattr(data, "augment", self)

    def __call__(self, images: Tensor, masks: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        found = self.augment(images, masks, draws)
        self.seen.append((images, *found))
        return found

    def batches(self, client: data.Images, steps: int) -> list:
        """The next `steps` batches, which must be of this client: images, masks, small flags."""
        number = {image.numpy().tobytes(): i for i, image in enumerate(client.images)}
        batches = []
        for _ in range(steps):
            before, images, masks = self.seen.pop(0)
            order = [number[image.numpy().tobytes()] for image in before]
            assert len(set(order)) == len(order)
            batches.append((images, masks, [bool(client.small[i]) for i in order]))
        return batches


# ---------------------------------------------------------------------------------- rounds by hand


def lesions(centre: str, count: int, seed: int) -> data.Images:
    """Noise with a square lesion in each image, of 1 to 36 pixels; every other one is small."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 200, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(count, 1, 16, 16, dtype=torch.uint8)
    for i in range(count):
        side = 1 + i % 6
        masks[i, :, i % 8 : i % 8 + side, 5 : 5 + side] = 1
    images += 50 * masks
    area = masks.flatten(1).sum(1)
    small = torch.arange(count) % 2 == 0
    names = [f"{centre}-{i}" for i in range(count)]
    pixels = torch.ones(count, 2, dtype=torch.float64)
    return data.Images(centre, names, images, masks, 256 / area.double(), small, pixels)


def two_clients() -> data.Federation:
    """C1 with 7 images and C2 with 10, of which each batch takes two."""
    federation = data.Federation("squares", "nowhere", "by hand", "", 16, "C6")
    for k, (client, count) in enumerate({"C1": 7, "C2": 10}.items()):
        federation.train[client] = lesions(client, count, k)
        federation.validation[client] = lesions(client, 3 + k, 10 + k)
        federation.in_test[client] = lesions(client, 2, 20 + k)
        federation.facts[client] = data.Facts(count, 3 + k, 2, 0, 0, "")
    return federation


def one_layer() -> nn.Module:
    """One convolution on normalised colours: parameters, means, variances and a counter."""
    torch.manual_seed(3)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1))


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "fedavg"},
        {"server_lr": 0.6},
        {"server_momentum": 0.8, "server_lr": 1.2},
        {"method": "fedavg", "server_momentum": 0.5},
        {"log_base": 1000.0},
        {"scaling": "off"},
        {"method": "fedavg", "scaling": "on"},
        {"method": "fedprox", "mu": 3.0},
        {"method": "fedprox", "mu": 3.0, "scaling": "on"},
        {"batch_norm": "local"},
        {"method": "fedbn"},
        {"method": "fedbn", "batch_norm": "local", "server_lr": 0.7},
        {"method": "fedbn", "scaling": "on"},
    ],
)
def test_rounds_by_hand(options, kernels, monkeypatch):
    """Three rounds of two unequal clients, two epochs each, to 1e-6."""
    federation = two_clients()
    config = Config(
        rounds=3,
        local_epochs=2,
        batch_size=2,
        lr=1e-2,
        image_size=16,
        centres=("C1", "C2", "C6"),
        precision="fp32",
    )
    config = replace(config, **options)

    network = one_layer()
    server_by_hand = ServerByHand(network, config)
    flat = FlatNetwork(network)
    chosen, _ = fedgs.choose_kernels(kernels, torch.device("cpu"))
    clients = LocalClients(flat, federation, config, chosen)
    weights = fedgs.client_weights(config, federation.facts)
    server = Server(flat.state(), weights, config, chosen)
    watched = Watched(monkeypatch)

    rounds = 0
    for _, logs, validation in fedgs.federate(server, clients, config):
        rounds += 1
        steps = {"C1": 6, "C2": 10}  # two epochs of 7 // 2 and of 10 // 2 batches
        batches = {name: watched.batches(federation.train[name], n) for name, n in steps.items()}
        trained = server_by_hand.round(batches, {"C1": 7, "C2": 10})

        # The same state.
        theirs = server_by_hand.network
        assert_close(server.state.parameters, vector(theirs.parameters()))
        running = theirs[0]
        assert_close(server.state.buffers, vector([running.running_mean, running.running_var]))
        assert server.state.counters.tolist() == [running.num_batches_tracked]
        assert list(server.state.own) == list(server_by_hand.norms)
        for client, norm in server_by_hand.norms.items():
            assert_close(server.state.own[client], vector(norm))

        # The same report.
        assert [log.client for log in logs] == ["C1", "C2"]
        for log in logs:
            one = trained[log.client]
            assert (log.images, log.steps) == (len(federation.train[log.client]), len(one.etas))
            assert log.loss == pytest.approx(np.mean(one.losses), abs=1e-6)
            assert log.eta == pytest.approx(np.mean(one.etas), abs=1e-6)
            assert (log.eta > 1.05) == config.scales
            assert log.scaled == pytest.approx(np.mean([eta > 1 for eta in one.etas]), abs=1e-6)
            assert log.update_norm == pytest.approx(one.update.norm().item(), rel=1e-5)

        # And the same scores, of the state that the next round starts from.
        expected = []
        for client, images in federation.validation.items():
            used = server_by_hand.network_of(client)
            if config.batch_norm == "local":
                used = adapted_by_hand(used, federation.train[client])
            expected.extend(scores_by_hand(used, images))
        assert validation["dice"]["n"] == len(expected) == 7
        assert validation["dice"]["mean"] == pytest.approx(np.mean(expected), abs=1e-9)

    assert rounds == server.round == 3
    assert not watched.seen
    moved = server.state.parameters.double() - vector(one_layer().parameters())
    assert moved.abs().median() > 1e-3  # which is more than a rounding


def test_a_round_takes_its_own_time(monkeypatch, tmp_path):
    """Training and validation, from the end of the round before: nothing else runs on the clock."""
    monkeypatch.setattr(fedgs.time, "perf_counter", itertools.count().__next__)
    config = Config(rounds=3, batch_size=2, image_size=16, out=str(tmp_path))
    flat = FlatNetwork(one_layer())
    clients = LocalClients(flat, two_clients(), config)
    server = Server(flat.state(), {"C1": 0.5, "C2": 0.5}, config)
    history = []
    fedgs.train(
        server, clients, replace(config, centres=("C1", "C2", "C6")), Folder(config), history
    )
    assert [row["seconds"] for row in history] == [1, 1, 1]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def adapted_by_hand(network: nn.Module, images: data.Images) -> nn.Module:
    """The network with the means and variances of a client's training images."""
    network = deepcopy(network)
    colours = (images.images.double() / 255 - MEAN) / STD
    network[0].running_mean.copy_(colours.mean(dim=(0, 2, 3)))
    network[0].running_var.copy_(colours.var(dim=(0, 2, 3)))
    return network


def scores_by_hand(network: nn.Module, images: data.Images) -> list[float]:
    """The Dice of each image."""
    network.eval()
    with torch.no_grad():
        logits = network((images.images.double() / 255 - MEAN) / STD)
    found = (logits[:, 1] > logits[:, 0]).numpy()
    truth = images.masks[:, 0].bool().numpy()
    return [dice_by_hand(*pair) for pair in zip(found, truth, strict=True)]


def dice_by_hand(found: np.ndarray, truth: np.ndarray) -> float:
    hits = int((found & truth).sum())
    errors = int((found ^ truth).sum())
    return 2 * hits / (2 * hits + errors) if hits or errors else 1.0


# -------------------------------------------------------------------- every number of every file


class Solved(NamedTuple):
    """A run that found the discs, what it printed, and every batch that it saw."""

    folder: Path
    printed: str
    watched: Watched


ROUNDS = 4
IMAGES = {"C1": 60, "C2": 45, "C6": 20}
OPTIONS = ["--fold", 2, "--seed", 5, "--log-base", 50, "--rounds", ROUNDS]


@pytest.fixture(scope="module")
def solved(frames, tmp_path_factory) -> Solved:
    folder = tmp_path_factory.mktemp("solved") / "run"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        watched = Watched(patch)
        arguments = [*DISCS, *RGB, *OPTIONS, "--data-root", frames, "--out", folder]
        assert exit_code(fedgs.main, arguments) == 0
    return Solved(folder, printed.getvalue(), watched)


def test_discs_are_found_in_files(solved, frames, tmp_path):
    """The best network of a run draws masks beside images that no client has trained on."""
    results = json.loads((solved.folder / "results.json").read_text())
    assert_solved(results["checkpoints"]["best"], "C6")

    images = frames / "data_C6" / "images_C6"
    arguments = ["--checkpoint", solved.folder / "best.pt", "--out", tmp_path, images]
    assert exit_code(predict.main, arguments) == 0
    found = []
    for path in sorted(images.iterdir()):
        mask = read_mask(tmp_path / f"{path.stem}_mask.png")
        truth = read_mask(frames / "data_C6" / "masks_C6" / f"{path.stem}_mask.png")
        assert mask.shape == truth.shape == (36, 40)
        found.append(dice_by_hand(mask, truth))
    assert np.mean(found) >= 0.85


class Split(NamedTuple):
    """Some images of a centre, read and resized by hand."""

    centre: str
    names: list[str]
    images: Tensor  # (N, 3, 32, 32) uint8
    masks: np.ndarray  # (N, 32, 32) bool
    inverse_area: list[float]
    small: list[bool]


def read_by_hand(frames: Path, centre: str, chosen: list[int]) -> Split:
    paths = sorted((frames / f"data_{centre}" / f"images_{centre}").iterdir())
    split = Split(centre, [], torch.zeros(len(chosen), 3, 32, 32, dtype=torch.uint8), [], [], [])
    for row, i in enumerate(chosen):
        name = paths[i].stem
        with Image.open(paths[i]) as image:
            pixels = np.array(image.resize((32, 32), Image.Resampling.BILINEAR))
        split.images[row] = torch.from_numpy(pixels).permute(2, 0, 1)

        mask = Image.open(frames / f"data_{centre}" / f"masks_{centre}" / f"{name}_mask.png")
        at_512 = np.asarray(mask.resize((512, 512), Image.Resampling.NEAREST)) > 128
        components, count = ndimage.label(at_512, np.ones((3, 3)))
        smallest = min([int((components == i).sum()) for i in range(1, count + 1)], default=0)
        split.names.append(name)
        split.masks.append(np.asarray(mask.resize((32, 32), Image.Resampling.NEAREST)) > 128)
        split.inverse_area.append(512 * 512 / at_512.sum() if count else math.inf)
        split.small.append(0 < smallest <= 512 * 512 / 30)
    return split


def parts_by_hand(count: int) -> tuple[list[int], list[int], list[int]]:
    """Training, validation and in-test images of fold 2, as the published lists have them."""
    block = list(range(count // 5, 2 * count // 5))  # 60 and 45 are multiples of five
    train = [i for i in range(count) if i not in block]
    shuffled = [block[i] for i in np.random.RandomState(0).permutation(len(block))]
    tests = len(block) - len(block) // 2
    return train, shuffled[tests:], shuffled[:tests]


def components_by_hand(mask: np.ndarray) -> list[set]:
    """The 8-connected components of a mask, as sets of pixels."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    components = []
    while left:
        component = set()
        edge = [left.pop()]
        while edge:
            y, x = edge.pop()
            component.add((y, x))
            around = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= around
            edge.extend(around)
        components.append(component)
    return components


def lesions_by_hand(found: np.ndarray, truth: np.ndarray) -> dict:
    """The columns of scores.csv about lesions; "sizes" and "hits" are of each lesion."""
    predicted = components_by_hand(found)
    lesions = components_by_hand(truth)
    scores = []
    for lesion in lesions:
        touching = set().union(*[c for c in predicted if c & lesion])
        scores.append(2 * len(touching & lesion) / (len(touching) + len(lesion)))
    false = sum(not any(component & lesion for lesion in lesions) for component in predicted)
    count = len(lesions) + false
    return {
        "lesion_dice": sum(scores) / count if count else 1.0,
        "lesions": len(lesions),
        "found": sum(score > 0 for score in scores),
        "false_components": false,
        "sizes": [1024 / len(lesion) for lesion in lesions],
        "hits": [score > 0 for score in scores],
        "predicted": len(predicted) > 0,
    }


def rows_by_hand(checkpoint: Path, split: Split, own: Split | None = None) -> list[dict]:
    """A row of scores.csv for each image, from the checkpoint and the images.

    own: those that the centre's own means and variances are of.
    """
    network = UTNet(width=4)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    if own is not None:
        count = math.ceil(len(own.images) / 16)
        batches = [(own.images[i::count].float() / 255 - MEAN) / STD for i in range(count)]
        update_bn(batches, network)
    network.eval()
    with torch.no_grad():
        logits = network((split.images.float() / 255 - MEAN) / STD)
    found = (logits[:, 1] > logits[:, 0]).numpy()

    tested = []
    for i, (mask, truth) in enumerate(zip(found, split.masks, strict=True)):
        row = {
            "batch_norm": "averaged" if own is None else "local",
            "centre": split.centre,
            "name": split.names[i],
            "inverse_area": split.inverse_area[i],
            "small": int(split.small[i]),
            "dice": dice_by_hand(mask, truth),
        }
        tested.append({**row, **lesions_by_hand(mask, truth)})
    return tested


def measures_by_hand(tested: list[dict]) -> dict[str, list[float]]:
    """What each measure is the mean of."""
    sizes = [size for row in tested for size in row["sizes"]]
    hits = [hit for row in tested for hit in row["hits"]]

    def hits_between(low, high):
        return [hit for size, hit in zip(sizes, hits, strict=True) if low <= size < high]

    lesion = [row for row in tested if row["lesions"]]
    return {
        "dice_s": [row["dice"] for row in lesion if row["small"]],
        "dice_l": [row["dice"] for row in lesion if not row["small"]],
        "dice_n": [row["dice"] for row in lesion],
        "dice": [row["dice"] for row in tested],
        "false_positive": [row["predicted"] for row in tested if not row["lesions"]],
        "lesion_dice": [row["lesion_dice"] for row in tested],
        "false_components": [row["false_components"] for row in tested],
        "recall": hits,
        "recall_0_50": hits_between(0, 50),
        "recall_50_150": hits_between(50, 150),
        "recall_150_1000": hits_between(150, 1000),
        "recall_1000_up": hits_between(1000, math.inf),
    }


def assert_means(found: dict, tested: list[dict]) -> None:
    """What results.json says of these images, and nothing else."""
    expected = measures_by_hand(tested)
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name]["n"] == len(values), name
        if values:
            assert found[name]["mean"] == pytest.approx(np.mean(values), rel=1e-12, abs=1e-12), name
        else:
            assert found[name]["mean"] is None, name


@pytest.fixture(scope="module")
def by_hand(solved, frames) -> dict[str, dict[str, list[dict]]]:
    """{checkpoint: {split: rows}}"""
    tested = {}
    for name in ("best", "best_small"):
        of_name = {"in_test": [], "out_test": []}
        for centre, count in IMAGES.items():
            held_out = centre == "C6"
            chosen = list(range(count)) if held_out else parts_by_hand(count)[2]
            split = read_by_hand(frames, centre, chosen)
            own = split if held_out else read_by_hand(frames, centre, parts_by_hand(count)[0])
            for images in (None, own):
                found = rows_by_hand(solved.folder / f"{name}.pt", split, images)
                of_name["out_test" if held_out else "in_test"].extend(found)
        tested[name] = of_name
    return tested


def of_kind(tested: list[dict], batch_norm: str) -> list[dict]:
    return [row for row in tested if row["batch_norm"] == batch_norm]


def test_scores_by_hand(solved, by_hand):
    """scores.csv: every image of every test, in order, with every number."""
    expected = []
    for checkpoint, splits in by_hand.items():
        for split, tested in splits.items():
            expected.extend({"checkpoint": checkpoint, "split": split, **row} for row in tested)
    found = rows(solved.folder / "scores.csv")
    assert len(found) == len(expected) == 2 * 2 * (6 + 5 + 20)

    for row, ours in zip(found, expected, strict=True):
        assert row.pop("data") == "PolypGen"
        for name, value in row.items():
            if isinstance(ours[name], str):
                assert value == ours[name], (row, name)
            else:
                assert float(value) == pytest.approx(ours[name], rel=1e-12), (row, name)


def test_results_by_hand(solved, by_hand):
    """results.json: every mean, by split and centre, and what it was made with."""
    results = json.loads((solved.folder / "results.json").read_text())
    history = rows(solved.folder / "rounds.csv")
    for (checkpoint, splits), batch_norm in itertools.product(by_hand.items(), STATISTICS):
        found = results["checkpoints"][checkpoint][batch_norm]
        for split, of_both in splits.items():
            tested = of_kind(of_both, batch_norm)
            assert_means(found[split], tested)
            by_centre = found[f"{split}_by_centre"]
            assert list(by_centre) == list(dict.fromkeys(row["centre"] for row in tested))
            for centre, measures in by_centre.items():
                assert_means(measures, [row for row in tested if row["centre"] == centre])

    assert results["data"] == "PolypGen"
    assert results["rounds"] == ROUNDS
    seconds = sum(float(row["seconds"]) for row in history)
    assert results["seconds"] == pytest.approx(seconds, abs=1e-9)
    given = {"fold": 2, "seed": 5, "log_base": 50.0, "rounds": 4, "tau": 30.0, "width": 4}
    assert given.items() <= results["config"].items()


def test_validation_by_hand(solved, frames):
    """rounds.csv: measures of the validation images, and the rounds that the checkpoints are of."""
    history = rows(solved.folder / "rounds.csv")
    results = json.loads((solved.folder / "results.json").read_text())["checkpoints"]
    round_of = {"last": ROUNDS}
    for name, measure in {"best": "dice", "best_small": "dice_s"}.items():
        values = [float(row[measure]) for row in history]
        round_of[name] = results[name]["round"]
        assert round_of[name] == 1 + values.index(max(values))

    for name, round_ in round_of.items():
        tested = []
        for centre in ("C1", "C2"):
            split = read_by_hand(frames, centre, parts_by_hand(IMAGES[centre])[1])
            tested.extend(rows_by_hand(solved.folder / f"{name}.pt", split))
        measures = measures_by_hand(tested)
        assert measures["dice_s"]
        for measure in ("dice", "dice_s", "dice_l"):
            found = float(history[round_ - 1][measure])
            assert found == pytest.approx(np.mean(measures[measure]), rel=1e-12), (name, measure)


def test_training_by_hand(solved, frames):
    """rounds.csv: losses, scales and update norms, from the batches that the network saw."""
    config = Config(width=4, lr=5e-3, seed=5, log_base=50.0)
    server_by_hand = ServerByHand(fedgs.build_network(config), config)
    seen = solved.watched.seen
    steps = {"C1": 12, "C2": 9}  # of 48 and 36 training images, four at a time
    clients = {}
    for centre in steps:
        split = read_by_hand(frames, centre, parts_by_hand(IMAGES[centre])[0])
        clients[centre] = SimpleNamespace(images=split.images, small=split.small)
    assert len(seen) == ROUNDS * (12 + 9)
    solved.watched.seen = list(seen)

    for row in rows(solved.folder / "rounds.csv"):
        batches = {
            centre: solved.watched.batches(clients[centre], n) for centre, n in steps.items()
        }
        etas = []
        for of_client in batches.values():
            etas.extend(eta_by_hand(masks, small, 50.0) for _, masks, small in of_client)
        assert float(row["eta"]) == pytest.approx(np.mean(etas), abs=1e-6)
        scaled = [eta > 1 for eta in etas]
        assert float(row["scaled_steps"]) == pytest.approx(np.mean(scaled), abs=1e-6)

        # In later rounds float32 has gone its own way.
        if row["round"] == "1":
            trained = server_by_hand.round(batches, {"C1": 48, "C2": 36})
            for client, one in trained.items():
                loss = float(row[f"loss_{client}"])
                assert loss == pytest.approx(np.mean(one.losses), rel=2e-2)
                norm = float(row[f"update_norm_{client}"])
                assert norm == pytest.approx(one.update.norm().item(), rel=5e-2)
    solved.watched.seen = seen


def test_what_a_run_prints_by_hand(solved, by_hand):
    """The header's numbers, a line a round, and the final table cell by cell."""
    parameters = sum(p.numel() for p in UTNet(width=4).parameters())
    folder = str(solved.folder)
    for text in (
        f"fedgs with utnet of width 4, {parameters:,} parameters",
        "C1 48 + 6 + 6, C2 36 + 4 + 5, C6 (held out) 20 (train + validation + test)",
        "4 rounds x 1 epochs, batch 4, 32x32, lr 0.005, server lr 1, seed 5",
        "PolypGen, in ",
        f"in {folder}: tables",
    ):
        assert text in solved.printed, text

    lines = re.findall(
        r"round +(\d)/4   loss ([\d.]+)   η ([\d.]+)   validation: Dice ([\d.]+)   "
        r"Dice_S ([\d.]+)   Dice_L ([\d.]+) ",
        solved.printed,
    )
    history = rows(solved.folder / "rounds.csv")
    for line, row in zip(lines, history, strict=True):
        loss = (float(row["loss_C1"]) + float(row["loss_C2"])) / 2
        numbers = [loss] + [float(row[name]) for name in ("eta", "dice", "dice_s", "dice_l")]
        assert line == (row["round"], *[f"{number:.3f}" for number in numbers])

    # Columns: best in-test, best out-test, and the same of best_small where that is another round.
    table = solved.printed[solved.printed.index("in-test") :]
    results = json.loads((solved.folder / "results.json").read_text())["checkpoints"]
    names = ["best", "best_small"]
    if results["best"]["round"] == results["best_small"]["round"]:
        names = ["best"]
    headings = {"dice_s": "Dice_S", "dice_l": "Dice_L", "dice_n": "Dice_N", "dice": "Dice"}
    for measure, heading in headings.items():
        cells = re.search(rf"^{heading} (.*)$", table, re.MULTILINE)[1]
        expected = []
        for name in names:
            for tested in by_hand[name].values():
                values = measures_by_hand(of_kind(tested, "averaged"))[measure]
                expected.append((f"{np.mean(values):.3f}", str(len(values))))
        assert re.findall(r"([\d.]+) \(n=(\d+)\)", cells) == expected
