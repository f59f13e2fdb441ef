"""CT volumes: NIfTI files, sixteen slices at a time, and the slices of LiTS as image files.

A full volume is up to 512 x 512 x 1000 voxels. None is ever in memory whole: blocks of slices are
read, and what training needs of them, grey slices with a tumour and their masks, is written once as
lossless 8-bit images into a cache, where it is read like any other image.

LiTS (Bilic et al., Med Image Anal 84, 2023) numbers its files, in any sub-folders:

    volume-0.nii    segmentation-0.nii    … also .nii.gz: 0 background, 1 liver, 2 tumour
"""

import gzip
import json
import logging
import math
import operator
import os
import re
import zlib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from PIL import Image

from support import files
from support.errors import UserError

WINDOW = (-200, 200)  # Hounsfield units that become grey values 0 and 255
TUMOUR = 2  # its label
TUMOUR_PIXELS = 50  # slices with more of them are kept
BLOCK = 16  # slices that are read at a time

DAMAGE = (OSError, EOFError, ValueError, zlib.error)  # what reading a damaged file raises
NOT_NIFTI = (
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
    nibabel.wrapstruct.WrapStructError,
)


# ---------------------------------------------------------------------------------- a NIfTI file


def open_volume(path: Path) -> nibabel.spatialimages.SpatialImage:
    """A NIfTI file whose voxels are read on demand. Raises UserError naming the file."""
    # nibabel would also print what is raised here.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    try:
        # A compressed file that was closed would be decompressed from its beginning for each block.
        volume = nibabel.load(path, keep_file_open=True)
    except (*DAMAGE, *NOT_NIFTI) as error:
        raise UserError(f"cannot read {path}: {error}") from error

    if len(volume.shape) != 3 or min(volume.shape) < 1:
        raise UserError(
            f"{path} has {len(volume.shape)} dimensions, {volume.shape}; a volume has three, "
            "and a slice at least"
        )
    kind = volume.get_data_dtype()
    if kind.kind not in "iuf":
        raise UserError(f"{path} holds values of type {kind}; a volume holds numbers")
    return volume


def check_whole(path: Path, volume: nibabel.spatialimages.SpatialImage) -> None:
    """Raise UserError for a file that is cut short, or compressed and unlike its checksum."""
    try:
        if path.suffix.lower() == ".gz":
            # Python compares the checksum when it arrives at the end.
            with gzip.open(path) as file:
                while file.read(1 << 20):
                    pass
        else:
            voxels = math.prod(volume.shape) * volume.get_data_dtype().itemsize
            held = path.stat().st_size
            if held < volume.dataobj.offset + voxels:
                raise EOFError(f"{held} bytes are too few")
    except DAMAGE as error:
        raise damaged(path, error) from error


def read_block(volume: nibabel.spatialimages.SpatialImage, path: Path, start: int) -> np.ndarray:
    """Up to sixteen slices from this one on, (H, W, n). Raises UserError naming the file."""
    try:
        return np.asarray(volume.dataobj[..., start : start + BLOCK])
    except DAMAGE as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> UserError:
    """What to raise where a file turns out not to be whole."""
    return UserError(f"cannot read {path}, it is damaged or cut short: {error}")


def pixel_spacing(path: Path, size: int) -> tuple[float, float]:
    """Distance in mm from row to row and from column to column of a volume's slices at this size.

    size: side of the square that the network sees. Raises UserError naming the file.
    """
    volume = open_volume(path)
    height, width = volume.shape[:2]
    between_rows, between_columns = volume.header.get_zooms()[:2]
    return float(between_rows) * height / size, float(between_columns) * width / size


# --------------------------------------------------------------------------------- grey slices


def window(hu: np.ndarray, path: Path) -> np.ndarray:
    """Hounsfield units (H, W, n) as grey values (n, H, W) uint8: -200 to 200 become 0 to 255.

    Raises UserError naming the file for values that are no numbers.
    """
    hu = hu.astype(np.float32).transpose(2, 0, 1)
    if not np.isfinite(hu).all():
        raise UserError(f"{path} holds values that are no numbers")

    # The window is that of soft tissue: what lies outside is air or bone.
    low, high = WINDOW
    scale = np.float32(255 / (high - low))
    return np.round((np.clip(hu, low, high) - low) * scale).astype(np.uint8)


def to_size(grey: np.ndarray, size: int) -> np.ndarray:
    """A grey slice (H, W) uint8 as the network sees it, (size, size, 1)."""
    resized = Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized)[..., None]


class Slice(NamedTuple):
    """One slice of a CT volume, as it is in the file."""

    number: int
    grey: np.ndarray  # (H, W) uint8, see window
    tumour: np.ndarray  # (H, W) bool


def cut_slices(volume_path: Path, segmentation_path: Path) -> Iterator[Slice]:
    """The slices (along the third axis) with more than 50 pixels of tumour, one after another.

    Sixteen slices are in memory at a time. Raises UserError naming the file.
    """
    volume = open_volume(volume_path)
    segmentation = open_volume(segmentation_path)
    if volume.shape != segmentation.shape:
        raise UserError(
            f"{segmentation_path} is of shape {segmentation.shape}, its volume {volume.shape}"
        )

    # The tumours may all lie before the damage: what is cut short has to be noticed first.
    check_whole(volume_path, volume)
    check_whole(segmentation_path, segmentation)

    for start in range(0, volume.shape[2], BLOCK):
        labels = read_block(segmentation, segmentation_path, start)
        check_labels(labels, segmentation_path)
        tumour = (labels == TUMOUR).transpose(2, 0, 1)
        kept = np.flatnonzero(tumour.sum(axis=(1, 2)) > TUMOUR_PIXELS)

        # Most blocks have no tumour: their grey values are never decoded.
        if len(kept):
            hu = read_block(volume, volume_path, start)
            grey = window(hu[..., kept], volume_path)
            for i, k in enumerate(kept.tolist()):
                yield Slice(start + k, grey[i], tumour[k])


def check_labels(labels: np.ndarray, path: Path) -> None:
    """Raise UserError for labels that LiTS does not have."""
    known = np.isin(labels, (0, 1, TUMOUR))
    if not known.all():
        other = labels[~known][0]
        raise UserError(
            f"{path} holds the label {other:g}; LiTS has 0 (background), 1 (liver), 2 (tumour)"
        )


# ------------------------------------------------------------------------------- LiTS in a folder


def nifti_files(root: Path) -> list[tuple[str, int, Path]]:
    """LiTS's files in root and below, in order. -> [("volume" or "segmentation", number, path)]"""
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            match = re.fullmatch(r"(volume|segmentation)-(\d+)\.nii(\.gz)?", name)
            path = Path(folder, name)
            if match and path.is_file():
                found.append((match[1], int(match[2]), path))

    found.sort(key=operator.itemgetter(2))
    return found


def find_volumes(root: Path, wanted: Container[int]) -> dict[int, tuple[Path, Path]]:
    """{number: (volume, segmentation)} of the files in root and below, in order.

    Only of wanted numbers: another process may be writing the others. Raises UserError naming what
    is missing, or there twice.
    """
    found = {"volume": {}, "segmentation": {}}
    for kind, number, path in nifti_files(root):
        if number not in wanted:
            continue
        if number in found[kind]:
            raise UserError(
                f"{path} and {found[kind][number]} are the same {kind}: keep one of them"
            )
        found[kind][number] = path

    volumes = found["volume"]
    segmentations = found["segmentation"]
    for number in sorted(volumes.keys() ^ segmentations.keys()):
        if number in volumes:
            there, missing = volumes[number], "segmentation"
        else:
            there, missing = segmentations[number], "volume"
        raise UserError(
            f"{there} has no {missing}: {missing}-{number}.nii or .nii.gz is missing in {root}"
        )

    return {number: (volumes[number], segmentations[number]) for number in sorted(volumes)}


# -------------------------------------------------------------------- its slices as image files


def slice_files(
    number: int, volume_path: Path, segmentation_path: Path, cache: Path
) -> list[tuple[int, Path, Path]]:
    """The kept slices of a volume as images. -> (number, grey slice, mask) of each, in order

    They lie in a folder of the cache, and are cut anew where one is missing or damaged, or the
    volume has changed. Raises UserError for files that cannot be read or written.
    """
    folder = cache / f"volume-{number}"
    sources = [describe(volume_path), describe(segmentation_path)]
    made_from = json.dumps([WINDOW, TUMOUR_PIXELS, sources])

    # Folders of equally named volumes may share a cache: what counts is which files they are.
    index = read_index(folder)
    if index.get("made_from") != made_from or not is_whole(folder, index):
        try:
            index = {"made_from": made_from, **write_slices(volume_path, segmentation_path, folder)}
            # Last: an index means that all of its images are there.
            files.write_text(folder / "index.json", files.to_json(index))
        except OSError as error:
            why = error.strerror or error
            raise UserError(
                f"cannot write the cache {cache} ({why}): choose another folder with --cache"
            ) from error

    return [(k, folder / grey_name(k), folder / mask_name(k)) for k in index["slices"]]


def grey_name(k: int) -> str:
    return f"slice-{k}.png"


def mask_name(k: int) -> str:
    return f"slice-{k}_mask.png"


def describe(path: Path) -> list:
    """What tells a file from another, and from itself after a change."""
    about = path.stat()
    return [str(path.resolve()), about.st_size, about.st_mtime_ns]


def read_index(folder: Path) -> dict:
    """What is said of the images in a folder of the cache; empty where nothing can be read."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def is_whole(folder: Path, index: dict) -> bool:
    """Whether all images of an index are there, and as long as they were when they were written."""
    for name, length in index["bytes"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != length:
            return False
    return True


def write_slices(volume_path: Path, segmentation_path: Path, folder: Path) -> dict:
    """Cut a volume into images. -> {"slices": their numbers, "bytes": {file name: its length}}"""
    numbers = []
    lengths = {}
    for number, grey, tumour in cut_slices(volume_path, segmentation_path):
        numbers.append(number)
        mask = np.where(tumour, np.uint8(255), np.uint8(0))
        for name, pixels in ((grey_name(number), grey), (mask_name(number), mask)):
            save_png(folder / name, pixels)
            lengths[name] = (folder / name).stat().st_size
    return {"slices": numbers, "bytes": lengths}


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image of the cache. Another process may be reading it: it is never half written.

    Waiting for the disk after each of thousands would take longer than cutting them. After a power
    cut, the lengths in the index tell what has not arrived.
    """
    with files.replacing(path, synced=False) as new:
        Image.fromarray(pixels).save(new, "PNG", compress_level=1)
