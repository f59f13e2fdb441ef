"""Every reader on damaged files: a refusal in one line that names the file, or a right result.

A file is damaged at random places: bits are flipped, bytes exchanged, cut off or put in, numbers
replaced by absurd ones. What has a checksum is then refused, or is what it was. In the suite this
takes some seconds; `FEDGS_FUZZ=3600 pytest -n 0 tests/test_fuzz.py` goes on for an hour.
"""

import contextlib
import functools
import os
import signal
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_compare import cases, make_run
from tiny_volumes import labels_of, write_volume
from torch import Tensor

from support import checkpoints, files, manifest, pixels, volumes
from support.errors import UserError
from tools import compare

SECONDS = float(os.environ.get("FEDGS_FUZZ", "0"))  # of all readers together; 0: as in the suite
PATIENCE = 20  # seconds after which a reader hangs
ABSURD = [0.0, -1.0, 1e30, -1e30, 1e-30, float("nan"), float("inf"), -float("inf")]


# ------------------------------------------------------------------------------------------- damage


class Damage(NamedTuple):
    """What happens to a file: bytes from a place on give way to others, and bits are flipped."""

    place: float  # as a share of the file
    gone: int  # bytes
    new: bytes
    bits: list[tuple[float, int]]
    length: float  # share of the file that is left

    def of(self, content: bytes) -> bytes:
        start = int(self.place * len(content))
        damaged = bytearray(content[:start] + self.new + content[start + self.gone :])
        for place, bit in self.bits:
            if damaged:
                damaged[int(place * (len(damaged) - 1))] ^= 1 << bit
        return bytes(damaged[: int(self.length * len(damaged))])


def numbers() -> st.SearchStrategy[bytes]:
    """Absurd numbers, as headers hold them."""
    floats = st.sampled_from([struct.pack("<f", value) for value in ABSURD])
    whole = st.sampled_from([struct.pack("<h", value) for value in (0, 1, -1, 2**15 - 1, -(2**15))])
    return floats | whole


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """What happens to a file, mostly near its beginning or its end."""
    share = st.floats(0, 1)
    near_the_ends = share | st.floats(0, 0.02) | st.floats(0.98, 1)
    new = draw(st.just(b"") | numbers() | st.binary(max_size=12))

    # A number takes the place of another one, other bytes that of more or fewer.
    gone = draw(st.just(len(new)) | st.integers(0, 12))
    bits = draw(st.lists(st.tuples(near_the_ends, st.integers(0, 7)), max_size=3))
    length = draw(st.just(1.0) | st.just(1.0) | share)
    return Damage(draw(near_the_ends), gone, new, bits, length)


# ---------------------------------------------------------------------------------------- readers


class Reader(NamedTuple):
    """How a file is read, and what of it may come out."""

    name: str  # of the file
    write: Callable[[Path], None]  # a good one into a folder, and what belongs to it
    read: Callable[[Path], object]
    is_right: Callable[[object, object], bool]  # what was read, and what is read of the good one


def same(found: object, good: object) -> bool:
    """Nothing is read but what was written."""
    return repr(found) == repr(good)


def same_pixels(found: np.ndarray, good: np.ndarray) -> bool:
    return np.array_equal(found, good)


def is_image(found: np.ndarray, good: np.ndarray) -> bool:
    """Formats without a checksum may show something else, but always an image."""
    return found.dtype == np.uint8 and found.ndim == 3 and 0 < found.size <= 3 * 100_000_000


def save_as(kind: str, folder: Path, name: str = "file", **how: object) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    picture[4:20] //= 8
    Image.fromarray(picture).save(folder / name, kind, **how)


def image_reader(kind: str, is_right: Callable = is_image, **how: object) -> Reader:
    return Reader("file", functools.partial(save_as, kind, **how), read_image, is_right)


def read_image(path: Path) -> np.ndarray:
    return np.asarray(pixels.open_image(path, "RGB"))


def write_mask(folder: Path) -> None:
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20) % 2).save(folder / "file", "PNG")


def write_table(folder: Path) -> None:
    (folder / "file").write_text('name,small\na,True\n"b, c",False\n')


def read_table(path: Path) -> list[dict]:
    return files.read_csv(path, ("name", "small"))


def is_table(found: list[dict], good: object) -> bool:
    return all(isinstance(row["name"], str) and isinstance(row["small"], str) for row in found)


def write_manifest(folder: Path) -> None:
    rows = ["centre,image,mask,group,small", "A,a/1.png,m/1.png,p,true", "B,b/1.png,m/2.png,,"]
    (folder / "file").write_text("\n".join(rows))


def is_manifest(found: list[manifest.Row], good: object) -> bool:
    rule = [manifest.NAME.fullmatch(row.centre) and row.group.isprintable() for row in found]
    return bool(found) and all(rule)


def write_volumes(suffix: str, folder: Path) -> None:
    write_volume(folder, 0, labels_of(60, 0, 70), suffix=suffix)
    (folder / f"volume-0{suffix}").rename(folder / f"file{suffix}")


def read_volume(path: Path) -> list:
    segmentation = path.with_name(path.name.replace("file", "segmentation-0"))
    volumes.check_geometry(path, segmentation)
    slices = list(volumes.cut_slices(path, segmentation))
    spacing = volumes.open_volume(path).header.get_zooms()
    return [[one.grey.tolist() for one in slices], np.array(spacing).tolist()]


def is_volume(found: list, good: list) -> bool:
    """Voxels of a file without a checksum may be others; as many, and of a size that can be."""
    greys, spacing = found
    shapes = [np.shape(grey) for grey in greys]
    return shapes == [np.shape(grey) for grey in good[0]] and all(1e-3 <= x <= 1e3 for x in spacing)


def write_cache(name: str, folder: Path) -> None:
    paths = write_volume(folder, 0, labels_of(60, 0, 70))
    volumes.slice_files(*paths, folder)
    (folder / name).rename(folder / "file")
    (folder / name).symlink_to("file")


def read_cache(path: Path) -> list:
    sources = path.with_name("volume-0.nii.gz"), path.with_name("segmentation-0.nii.gz")
    found = volumes.slice_files(*sources, path.parent)
    read = [
        [number, read_image(grey), pixels.open_mask(mask)] for number, grey, mask in found.slices
    ]
    return [found.lesion, found.spacing, [[n, g.tolist(), m.tolist()] for n, g, m in read]]


def network() -> nn.Module:
    """A network that is made in no time."""
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def write_checkpoint(folder: Path) -> None:
    about = {"data": "somewhere", "round": 3, "config": {"width": 1}}
    torch.manual_seed(0)
    checkpoints.save(folder / "file", checkpoints.with_about(network(), about))


def write_bare_checkpoint(folder: Path) -> None:
    torch.save(dict(network().state_dict()), folder / "file")


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    weights, about = checkpoints.read_weights(path)
    checkpoints.build(network, weights, path)
    return weights, about


def same_weights(found: tuple, good: tuple) -> bool:
    (weights, about), (others, good_about) = found, good
    equal = [torch.equal(weights[name], others[name]) for name in others]
    return list(weights) == list(others) and all(equal) and about == good_about


def write_results(name: str, folder: Path) -> None:
    make_run(folder, cases(0.1, 0.2, 0.3, 0.4))
    (folder / name).rename(folder / "file")
    (folder / name).symlink_to("file")


def read_results(path: Path) -> compare.Run:
    return compare.read_run(path.parent)


READERS = {
    "png": image_reader("PNG", same_pixels),
    "jpeg": image_reader("JPEG"),
    "tiff": image_reader("TIFF", compression="tiff_lzw"),
    "bmp": image_reader("BMP"),
    "gif": image_reader("GIF"),
    "webp": image_reader("WEBP"),
    "jpeg2000": image_reader("JPEG2000"),
    "mask": Reader("file", write_mask, pixels.open_mask, same_pixels),
    "csv": Reader("file", write_table, read_table, is_table),
    "manifest": Reader("file", write_manifest, manifest.read, is_manifest),
    "nifti": Reader("file.nii", functools.partial(write_volumes, ".nii"), read_volume, is_volume),
    "nifti.gz": Reader(
        "file.nii.gz", functools.partial(write_volumes, ".nii.gz"), read_volume, is_volume
    ),
    "cache": Reader("file", functools.partial(write_cache, "index.json"), read_cache, same),
    "slice": Reader("file", functools.partial(write_cache, "slice-0.png"), read_cache, same),
    "checkpoint": Reader("file", write_checkpoint, read_checkpoint, same_weights),
    "bare checkpoint": Reader("file", write_bare_checkpoint, read_checkpoint, same_weights),
    "results": Reader("file", functools.partial(write_results, "results.json"), read_results, same),
    "scores": Reader("file", functools.partial(write_results, "scores.csv"), read_results, same),
}


# ------------------------------------------------------------------------------------ the property


class Hangs(BaseException):
    """Raised in the middle of a reader, which must not catch it."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Raise Hangs where the block takes too long."""

    def ring(*signal: object) -> None:
        raise Hangs(f"more than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(reader: Reader, path: Path, content: bytes, good: object, capfd) -> None:
    """The property: of this content either nothing is read, with a reason, or what is right."""
    path.write_bytes(content)
    try:
        with in_time(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = reader.read(path)
    except UserError as error:
        folder = str(path.parent)
        assert folder in str(error) or path.name in str(error), error
        assert str(error).isprintable(), error
    else:
        assert reader.is_right(found, good), found
    assert not warned
    assert capfd.readouterr().err == ""


few = settings(
    max_examples=40,
    deadline=None,
    derandomize=not SECONDS,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_by_name_or_read_rightly(name, tmp_path, capfd):
    reader = READERS[name]
    reader.write(tmp_path)
    path = tmp_path / reader.name
    content = path.read_bytes()
    good = reader.read(path)
    assert reader.is_right(good, good)

    @few
    @given(damages())
    def fuzz(damage):
        check(reader, path, damage.of(content), good, capfd)

    # Hypothesis draws other damages each time, but for those of the suite.
    end = time.monotonic() + SECONDS / len(READERS)
    fuzz()
    while time.monotonic() < end:
        fuzz()
