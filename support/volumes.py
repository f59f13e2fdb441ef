"""Volumes: NIfTI files, sixteen slices at a time, and slices with a lesion as image files.

A full volume is up to 512 x 512 x 1000 voxels. None is ever in memory whole: blocks of slices are
read, and what training needs of them, grey slices with a lesion and their masks, is written once as
lossless 8-bit images into a cache, where it is read like any other image.

LiTS (Bilic et al., Med Image Anal 84, 2023) numbers its files, in any sub-folders:

    volume-0.nii    segmentation-0.nii    … also .nii.gz: 0 background, 1 liver, 2 tumour
"""

import gzip
import itertools
import json
import logging
import math
import operator
import os
import re
import warnings
import zlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from PIL import Image

from support import files
from support.errors import UserError
from support.masks import is_lesion
from support.pixels import check_values, percentiles, to_grey

# What is read of LiTS, as published.
WINDOW = (-200.0, 200.0)  # Hounsfield units that become grey values 0 and 255
TUMOUR = 2  # its label
TUMOUR_PIXELS = 50  # slices with more of them are kept

BLOCK = 16  # slices that are read at a time
MARK_BYTES = 16  # of a PNG file: the checksum of its last pixels, and what ends it
SAMPLE = 2**24  # about so many voxels of a volume are enough for its percentiles

SPACINGS = 1e-3, 1e3  # mm between two voxels: less, or more, is no volume of a person
SLOPES = 1e-12, 1e12  # factors of values; a larger one makes every volume black and white
HIGHEST_LABEL = 65535
MORE = 2**20  # bytes that may follow the voxels: a small file may decompress to any size

# What reading a damaged file raises.
DAMAGE = (OSError, EOFError, ValueError, OverflowError, zlib.error)


# ---------------------------------------------------------------------------------- a NIfTI file


def open_volume(path: Path) -> nibabel.spatialimages.SpatialImage:
    """A NIfTI file whose voxels are read on demand. Raises UserError naming the file."""
    # nibabel would also print what is raised here, and warn of what nobody reads.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"nibabel\.")
    files.check_regular(path)
    try:
        # A compressed file that was closed would be decompressed from its beginning for each block.
        volume = nibabel.load(path, keep_file_open=True)
        with nibabel.openers.ImageOpener(path) as file:
            header = type(volume.header).from_fileobj(file, check=False)
    except Exception as error:
        # What nibabel stumbles over in a damaged header may be of any kind.
        raise UserError(f"cannot read {path}: {error}") from error

    if len(volume.shape) != 3 or min(volume.shape) < 1:
        raise UserError(
            f"{path} has {len(volume.shape)} dimensions, {volume.shape}; a volume has three, "
            "and a slice at least"
        )
    kind = volume.get_data_dtype()
    if kind.kind not in "iuf":
        raise UserError(f"{path} holds values of type {kind}; a volume holds numbers")
    check_header(volume, header, path)
    return volume


def check_header(
    volume: nibabel.spatialimages.SpatialImage, header: nibabel.Nifti1Header, path: Path
) -> None:
    """Raise UserError for fields of a header that contradict each other, or cannot be.

    header: as it is in the file, where nibabel has replaced what it could not use.
    """

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise UserError(f"{path}: {what} cannot be: mend its header")

    spacing = header["pixdim"][1:4]
    fits = ((SPACINGS[0] <= spacing) & (spacing <= SPACINGS[1])).all()
    require(fits, f"a spacing of {' x '.join(f'{mm:g}' for mm in spacing)} mm")
    unit = int(header["xyzt_units"]) & 7
    require(unit in (0, 2), f"a spacing in other units than mm (xyzt_units {unit})")
    require(np.isfinite(volume.affine).all(), "an affine that is not finite")

    # A slope of 0 or NaN says that values are what they are; the intercept is not read then.
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope != 0 and not math.isnan(slope):
        require(SLOPES[0] <= abs(slope) <= SLOPES[1], f"scl_slope {slope:g}")
        require(abs(intercept) <= SLOPES[1], f"scl_inter {intercept:g}")

    bits = 8 * volume.get_data_dtype().itemsize
    require(header["bitpix"] == bits, f"{header['bitpix']} bits for values of {bits} (bitpix)")
    offset = volume.dataobj.offset
    require(offset >= header["sizeof_hdr"], f"vox_offset {offset}, which is in the header,")


def check_whole(path: Path, volume: nibabel.spatialimages.SpatialImage) -> None:
    """Raise UserError for a file that is cut short, or compressed and unlike its checksum."""
    needed = volume.dataobj.offset
    needed += math.prod(volume.shape) * volume.get_data_dtype().itemsize
    try:
        held = path.stat().st_size
        if path.suffix.lower() == ".gz":
            # Python compares the checksum when it arrives at the end.
            held = 0
            with gzip.open(path) as file:
                while (block := file.read(MORE)) and held <= needed + MORE:
                    held += len(block)
        if held < needed:
            raise EOFError(f"{held} bytes are too few")
    except DAMAGE as error:
        raise damaged(path, error) from error
    if held > needed + MORE:
        raise UserError(f"{path} holds far more than the {needed} bytes that its header tells of")


def read_block(volume: nibabel.spatialimages.SpatialImage, path: Path, start: int) -> np.ndarray:
    """Up to sixteen slices from this one on, (H, W, n). Raises UserError naming the file."""
    try:
        return np.asarray(volume.dataobj[..., start : start + BLOCK])
    except DAMAGE as error:
        raise damaged(path, error) from error


def check_geometry(volume_path: Path, segmentation_path: Path) -> None:
    """Raise UserError for a segmentation that is of another shape than its volume, or elsewhere."""
    apart = distance(volume_path, segmentation_path)
    if apart:
        raise UserError(
            f"{segmentation_path} lies up to {apart:.1f} mm away from its volume {volume_path}: "
            "their affines differ"
        )


def distance(volume_path: Path, segmentation_path: Path) -> float:
    """By how many mm a segmentation lies elsewhere than its volume; 0 for less than half a voxel.

    Raises UserError for one of another shape.
    """
    volume = open_volume(volume_path)
    segmentation = open_volume(segmentation_path)
    check_shape(volume, segmentation, segmentation_path)

    # Where the corners of both arrays are. Programs round affines; half a voxel is no rounding.
    ends = itertools.product(*[(0, length - 1) for length in volume.shape])
    corners = np.array([(*corner, 1) for corner in ends])
    apart = corners @ (segmentation.affine - volume.affine).T
    furthest = float(np.linalg.norm(apart[:, :3], axis=1).max())
    return furthest if furthest > min(volume.header.get_zooms()) / 2 else 0.0


def is_axial(path: Path) -> bool:
    """Whether the slices of a volume, along its third axis, run from feet to head.

    So they do where its header says nothing of that.
    """
    volume = open_volume(path)
    header = volume.header
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        return True
    return int(np.abs(volume.affine[:3, 2]).argmax()) == 2


def remarks_on_slices(centre: str, paths: Sequence[Path]) -> list[str]:
    """Which volumes of a centre are sliced along another axis than most."""
    turned = [path.name for path in paths if not is_axial(path)]
    if not turned:
        return []
    return [
        f"{len(turned)} volumes of {centre} are cut into slices that are not axial, by their "
        f"affines, as {turned[0]}"
    ]


def remarks_on_places(centre: str, pairs: Sequence[tuple[Path, Path]]) -> list[str]:
    """Which segmentations of a centre lie elsewhere than their volumes. pairs: see `distance`"""
    apart = [segmentation.name for volume, segmentation in pairs if distance(volume, segmentation)]
    if not apart:
        return []
    return [
        f"{len(apart)} segmentations of {centre} lie elsewhere than their volumes, by their "
        f"affines, as {apart[0]}"
    ]


def check_shape(
    volume: nibabel.spatialimages.SpatialImage,
    segmentation: nibabel.spatialimages.SpatialImage,
    path: Path,
) -> None:
    """Raise UserError for a segmentation, read from path, of another shape than its volume."""
    if volume.shape != segmentation.shape:
        raise UserError(f"{path} is of shape {segmentation.shape}, its volume {volume.shape}")


def damaged(path: Path, error: Exception) -> UserError:
    """What to raise where a file turns out not to be whole."""
    return UserError(f"cannot read {path}, it is damaged or cut short: {error}")


# --------------------------------------------------------------------------------- grey slices


def window(values: np.ndarray, path: Path, levels: Sequence[float] = WINDOW) -> np.ndarray:
    """Values of a volume (H, W, n) as grey values (n, H, W) uint8: `levels` become 0 and 255.

    Hounsfield units of soft tissue, -200 to 200, by default: what lies outside is air or bone.
    Raises UserError naming the file for values that are no numbers.
    """
    values = as_float32(values).transpose(2, 0, 1)
    check_values(values, path)
    low, high = levels
    return to_grey(values, low, high)


def as_float32(values: np.ndarray) -> np.ndarray:
    """Values in the precision that all are read in; infinite where they are too large for it."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def own_levels(volume: nibabel.spatialimages.SpatialImage, path: Path) -> tuple[float, float]:
    """The values that become 0 and 255 where no window is given: percentiles of the volume.

    Raises UserError naming the file.
    """
    # Of large volumes every so many rows and columns, so that little is in memory at a time.
    step = math.ceil((math.prod(volume.shape) / SAMPLE) ** 0.5)
    parts = []
    for start in range(0, volume.shape[2], BLOCK):
        block = read_block(volume, path, start)[::step, ::step]
        parts.append(as_float32(block).ravel())
    return percentiles(np.concatenate(parts), path)


def to_size(grey: np.ndarray, size: int) -> np.ndarray:
    """A grey slice (H, W) uint8 as the network sees it, (size, size, 1)."""
    resized = Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized)[..., None]


class Cut(NamedTuple):
    """How volumes become slices."""

    window: tuple[float, ...]  # what becomes grey 0 and 255; empty: percentiles of each volume
    lesion: tuple[int, ...]  # labels that are lesion; empty: the only one beside 0
    fewest: int = 1  # pixels of lesion that a slice is kept for
    labels: tuple[int, ...] = ()  # that there may be; empty: all whole numbers from 0 on


LITS = Cut(WINDOW, (TUMOUR,), TUMOUR_PIXELS + 1, labels=(0, 1, TUMOUR))


class Slice(NamedTuple):
    """One slice of a volume, as it is in the file."""

    number: int
    grey: np.ndarray  # (H, W) uint8, see window
    lesion: np.ndarray  # (H, W) bool


def cut_slices(volume_path: Path, segmentation_path: Path, cut: Cut = LITS) -> Iterator[Slice]:
    """The slices (along the third axis) with a lesion, one after another.

    cut: says of which labels. Sixteen slices are in memory at a time. Raises UserError naming the
    file.
    """
    volume = open_volume(volume_path)
    segmentation = open_volume(segmentation_path)
    check_shape(volume, segmentation, segmentation_path)

    # The lesions may all lie before the damage: what is cut short has to be noticed first.
    check_whole(volume_path, volume)
    check_whole(segmentation_path, segmentation)
    levels = cut.window or own_levels(volume, volume_path)

    for start in range(0, volume.shape[2], BLOCK):
        labels = read_block(segmentation, segmentation_path, start)
        check_labels(labels, segmentation_path, cut.labels)
        lesion = is_lesion(labels, cut.lesion).transpose(2, 0, 1)
        kept = np.flatnonzero(lesion.sum(axis=(1, 2)) >= cut.fewest)

        # Most blocks have no lesion: their grey values are never decoded.
        if len(kept):
            values = read_block(volume, volume_path, start)
            grey = window(values[..., kept], volume_path, levels)
            for i, k in enumerate(kept.tolist()):
                yield Slice(start + k, grey[i], lesion[k])


def check_labels(labels: np.ndarray, path: Path, known: Sequence[int]) -> None:
    """Raise UserError for values that are no labels, or none of those that are known."""
    if known:
        wrong = ~np.isin(labels, known)
        rule = "LiTS has 0 (background), 1 (liver), 2 (tumour)"
    else:
        in_range = (labels >= 0) & (labels <= HIGHEST_LABEL)
        wrong = ~(in_range & (labels == np.round(labels)))
        rule = f"a label is a whole number from 0 to {HIGHEST_LABEL}"
    if wrong.any():
        raise UserError(f"{path} holds the label {labels[wrong][0]:g}; {rule}")


def only_label(path: Path) -> tuple[int, ...]:
    """The one label of a segmentation beside 0; none where all of it is 0.

    Raises UserError where there are several, and nobody has said which of them are lesion.
    """
    segmentation = open_volume(path)
    check_whole(path, segmentation)
    found = set()
    for start in range(0, segmentation.shape[2], BLOCK):
        labels = read_block(segmentation, path, start)
        check_labels(labels, path, known=())
        found.update(np.unique(labels).astype(int).tolist())

    found = sorted(found - {0})
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise UserError(
            f"{path} holds the labels {listed}: say which of them are lesion, as in --lesion "
            f"{found[-1]}"
        )
    return tuple(found)


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


# ------------------------------------------------------------------------- slices as image files


class SliceFiles(NamedTuple):
    """The kept slices of a volume, as images in a cache."""

    slices: list[tuple[int, Path, Path]]  # (number, grey slice, mask) of each, in order
    lesion: tuple[int, ...]  # the labels that are lesion; none where the segmentation is empty
    spacing: tuple[float, float]  # mm from row to row, and from column to column


def slice_files(
    volume_path: Path, segmentation_path: Path, folder: Path, cut: Cut = LITS
) -> SliceFiles:
    """The kept slices of a volume as images in a folder of the cache.

    They are cut anew where one is missing or damaged, or the volume or the rule has changed. Raises
    UserError for files that cannot be read or written.
    """
    sources = [describe(volume_path), describe(segmentation_path)]
    made_from = json.dumps([cut, sources])

    # Folders of equally named volumes may share a cache: what counts is which files they are.
    index = read_index(folder)
    if index.get("made_from") != made_from or not is_whole(folder, index):
        try:
            content, marks = write_slices(volume_path, segmentation_path, folder, cut)
            index = {"made_from": made_from, **content}
            # Last: an index means that all of its images are there.
            files.write_text(folder / "index.json", files.to_checked_json(index, marks))
        except OSError as error:
            why = error.strerror or error
            raise UserError(
                f"cannot write the cache {folder.parent} ({why}): choose another folder with "
                "--cache"
            ) from error

    slices = [(k, folder / grey_name(k), folder / mask_name(k)) for k in index["slices"]]
    between_rows, between_columns = index["spacing"]
    return SliceFiles(slices, tuple(index["lesion"]), (between_rows, between_columns))


def grey_name(k: int) -> str:
    return f"slice-{k}.png"


def mask_name(k: int) -> str:
    return f"slice-{k}_mask.png"


def describe(path: Path) -> list:
    """What tells a file from another, and from itself after a change."""
    about = path.stat()
    return [os.path.realpath(path), about.st_size, about.st_mtime_ns]


def read_index(folder: Path) -> dict:
    """What is said of the images in a folder of the cache; empty where nothing can be read."""
    path = folder / "index.json"
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError:
        return {}
    index = files.from_checked_json(content) or {}

    # Without a checksum it is that of an earlier version.
    return index if "checksum" in index else {}


def is_whole(folder: Path, index: dict) -> bool:
    """Whether all images of an index are there, and are those that were written."""
    for name, mark in index["checksums"].items():
        path = folder / name
        if not path.is_file() or mark_of(path) != mark:
            return False
    return True


def mark_of(path: Path) -> str:
    """What tells a PNG file from others: its length, and its end.

    The end holds a checksum of the last pixels. All of them have one, which is looked at when they
    are decoded; to read them twice would take too long.
    """
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - MARK_BYTES))
        return f"{length} {file.read().hex()}"


def write_slices(
    volume_path: Path, segmentation_path: Path, folder: Path, cut: Cut
) -> tuple[dict, dict[str, str]]:
    """Cut a volume into images. -> what the index says of them, {file name: see mark_of}

    The former is {"slices": their numbers, "lesion": labels, "spacing": mm}.
    """
    lesion = cut.lesion or only_label(segmentation_path)
    slices = []
    if lesion:
        slices = cut_slices(volume_path, segmentation_path, cut._replace(lesion=lesion))

    numbers = []
    marks = {}
    for number, grey, mask in slices:
        numbers.append(number)
        mask = np.where(mask, np.uint8(255), np.uint8(0))
        for name, pixels in ((grey_name(number), grey), (mask_name(number), mask)):
            save_png(folder / name, pixels)
            marks[name] = mark_of(folder / name)

    between_rows, between_columns = open_volume(volume_path).header.get_zooms()[:2]
    spacing = float(between_rows), float(between_columns)
    return {"slices": numbers, "lesion": lesion, "spacing": spacing}, marks


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image of the cache. Another process may be reading it: it is never half written.

    Waiting for the disk after each of thousands would take longer than cutting them. After a power
    cut, the lengths in the index tell what has not arrived.
    """
    with files.replacing(path, synced=False) as new:
        Image.fromarray(pixels).save(new, "PNG", compress_level=1)
