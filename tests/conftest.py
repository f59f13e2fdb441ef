"""What the tests share: where the real data is, tiny runs, and what a refusal looks like."""

import csv
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import data
import fedgs
from support import pictures, standin

# The networks here are so small that threads would wait for each other more than compute, and for
# ever beside other work. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def ignore(*_: object) -> None:
    """A signal's handler that does nothing."""


# Under nohup, or in the background, signals are ignored. Programs that tests start, and end by a
# signal, would inherit that; a handler of Python's they do not.
for name in ("SIGINT", "SIGHUP"):
    number = getattr(signal, name, None)
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, ignore)

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("FEDGS_SHARED", ROOT.parent / "shared"))

# A federation of two clients on drawn images that trains in a second or two.
TINY = [
    *("--data-root", "stand-in", "--centres", "C4", "C5", "C6", "--image-size", "32"),
    *("--width", "2", "--batch-size", "24", "--local-epochs", "1", "--lr", "1e-3"),
    *("--rounds", "2", "--workers", "1"),
]


@pytest.fixture(scope="session")
def polypgen_root() -> Path:
    """A folder with the real PolypGen single frames, its published size flags and fold lists."""
    for root in (ROOT / "datasets" / "polypgen", SHARED / "polypgen256"):
        if (root / "data_C1").is_dir():
            return root
    pytest.skip("the real PolypGen is not here")


@pytest.fixture(scope="session")
def published() -> Path:
    """A folder with the names and shapes of the published checkpoints."""
    if not (SHARED / "published").is_dir():
        pytest.skip("the lists of published names are not here")
    return SHARED / "published"


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Where the stand-ins are drawn, once for all tests."""
    return tmp_path_factory.mktemp("stand-in")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def shrink_stand_ins(monkeypatch, frames: int, volumes: int, slices: int) -> None:
    """Have stand-ins of so many frames, or volumes and slices, a centre: they are drawn at once."""
    for centre, known in standin.POLYPGEN.items():
        fewer = known._replace(frames=frames, empty=3, several=5)
        monkeypatch.setitem(standin.POLYPGEN, centre, fewer)
    for centre, known in standin.LITS.items():
        monkeypatch.setitem(standin.LITS, centre, known._replace(volumes=volumes, slices=slices))


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="session")
def run(cache) -> Callable[..., int]:
    """run(folder, option, …): train the tiny federation in a folder. -> exit code"""

    def run_tiny(out: Path, *options: object) -> int:
        arguments = [*TINY, "--cache", cache, "--out", out, *options]
        return exit_code(fedgs.main, arguments)

    return run_tiny


@pytest.fixture(scope="session")
def finished(run, tmp_path_factory) -> Path:
    """The folder of an uninterrupted tiny run. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(folder) == 0
    return folder


@pytest.fixture
def plain_pictures(monkeypatch) -> None:
    """Draw empty pictures where a test is not about them: most of a tiny run's time is theirs."""

    def draw_nothing(*what: object) -> Figure:
        return Figure(figsize=(1, 1))

    for name in ("draw_curves", "draw_predictions"):
        monkeypatch.setattr(pictures, name, draw_nothing)


def exit_code(main: Callable, arguments: list) -> int:
    """Call a program's main with these arguments. -> its exit code"""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def refused(capsys, code: int, *words: str) -> None:
    """Exit code 2, one line on stderr, no traceback, and these words in it."""
    error = capsys.readouterr().err
    assert code == 2, error
    assert ": error: " in error and error.count("\n") == 1, error
    for word in words:
        assert word in error, error


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_time(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without the seconds that they took."""
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows(path)]


def assert_same_weights(one: Path, other: Path) -> None:
    """Two checkpoints hold the same bits."""
    first = torch.load(one, weights_only=True)
    second = torch.load(other, weights_only=True)
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ----------------------------------------------------------------------------------------- images


def square_images(
    centre: str, count: int, generator: torch.Generator, size: int = 32, small: bool = True
) -> data.Images:
    """Noise with one lesion of 12 pixels in each image, small or not."""
    masks = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    masks[:, :, 10:13, 10:14] = 1
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return data.Images(
        centre=centre,
        names=[str(i) for i in range(count)],
        images=images,
        masks=masks,
        inverse_area=torch.full((count,), size**2 / 12, dtype=torch.float64),
        small=torch.full((count,), small),
        spacing=torch.ones(count, 2, dtype=torch.float64),
    )


@pytest.fixture
def varied(generator):
    """Seven training images of a client: 2 lesions that count as small, 4 others, 1 empty."""
    images = square_images("C1", 7, generator, size=16, small=False)
    images.masks[:] = 0
    for i in range(6):
        images.masks[i, :, : i + 1, :2] = 1
    images.small[:2] = True
    images.inverse_area = 256 / torch.arange(2, 16, 2).double()
    images.inverse_area[6] = math.inf
    return images


@pytest.fixture(scope="session")
def square_root(tmp_path_factory) -> Path:
    """Six centres in PolypGen's layout: 10 to 26 images of a bright square on noise in each."""
    root = tmp_path_factory.mktemp("frames")
    generator = np.random.default_rng(0)
    for centre, count in {1: 14, 2: 18, 3: 26, 4: 12, 5: 11, 6: 10}.items():
        images = root / f"data_C{centre}" / f"images_C{centre}"
        masks = root / f"data_C{centre}" / f"masks_C{centre}"
        images.mkdir(parents=True)
        masks.mkdir()
        for i in range(count):
            frame = generator.integers(0, 90, (64, 64, 3), dtype=np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            side = 3 + i
            top, left = generator.integers(0, 30, 2)
            mask[top : top + side, left : left + side] = 255
            frame[mask > 0] += 150
            Image.fromarray(frame).save(images / f"{i:02}.jpg")
            Image.fromarray(mask).save(masks / f"{i:02}_mask.jpg")
    return root
