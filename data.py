"""The images: PolypGen, LiTS, or your own from disk; their splits, and augmentation.

    federation = load(
        "polypgen", find("polypgen"), centres=CENTRES["polypgen"], out_centre="C6",
        size=512, tau=150, split="fold",
    )
    federation.train["C1"].images    # (N, 3, 512, 512) uint8, the training images of centre C1
    federation.out_test.masks        # (N, 1, 512, 512) uint8, 1 = lesion, of the held-out centre

PolypGen (Ali et al., Sci Data 10:75, 2023) is read in its own layout, as .jpg or .png; so is LiTS
(Bilic et al., Med Image Anal 84, 2023), as .nii or .nii.gz, from any sub-folders:

    data_C1/images_C1/NAME.jpg    data_C1/masks_C1/NAME_mask.jpg    … and so for C2 to C6
    metadata/my_dataDetails_C1.csv …  optional: published size flags (img_name, small_polyp)
    index.csv                         optional: near-duplicates (centre, name, near_dup_group)

    volume-0.nii    segmentation-0.nii    … to 130: 0 background, 1 liver, 2 tumour

Data of your own are listed in a manifest, a table with the columns centre, image and mask
(support/manifest.py).

Whatever the data set, a centre's files are listed as records, split, and decoded once into uint8
tensors of the network's size. A batch becomes float, and is augmented and normalised, on the device
that trains.
"""

import functools
import hashlib
import itertools
import math
import operator
import os
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from tqdm import tqdm

from support import files, manifest, standin, volumes
from support.errors import UserError
from support.masks import check_bright, count_values, describe_reading, is_lesion, lesion_values
from support.options import shown
from support.pixels import ORIENTATION, mask_values, open_file, open_image

# LiTS's clients are made by the numbers of its volumes.
LITS_VOLUMES = {
    "C1": range(30),
    "C2": range(30, 60),
    "C3": range(60, 90),
    "C4": range(90, 120),
    "C5": range(120, 131),
}
CENTRES = {  # of the data sets that are known by name; all others are manifests
    "polypgen": ("C1", "C2", "C3", "C4", "C5", "C6"),
    "lits": tuple(LITS_VOLUMES),
}
FILES = {  # by which a data set is known
    "polypgen": "data_C1 to data_C6",
    "lits": "volume-0.nii, segmentation-0.nii and so on",
}


# ------------------------------------------------------------------------------------------ values


class Record(NamedTuple):
    """One image on disk."""

    centre: str
    name: str
    image: Path
    mask: Path
    group: str  # images of a group stay in one split; empty: nobody has written down the groups
    small: bool | None  # size flag that somebody has written down; None: by rule
    split: str = ""  # train, validation or test, where somebody has written that down
    lesion: tuple[int, ...] = ()  # values of the mask that are lesion; none: those that are bright
    spacing: tuple[float, float] | None = None  # mm between rows, and between columns, if known


class Listing(NamedTuple):
    """What a data set holds, before any of it is decoded."""

    source: str  # what the images are, for every table, picture and file
    kind: str  # colour or grey images, or slices of volumes
    rule: str  # by what slices or size flags were chosen, where nobody has written down flags
    flags: str  # what the flags are that somebody has
    records: list[Record]
    folders: set[Path]  # where the files lie: they are drawn ones where one of these says so
    masks: Mapping[str, str]  # {centre: how its masks are read}, where that was found out
    remarks: Mapping[str, list[str]]  # {centre: what its user should know of single files}


class Reading(NamedTuple):
    """How images are decoded, the same for all of a data set."""

    kind: str  # colour or grey images, or slices of volumes
    window: tuple[float, ...]  # what becomes black and white, of values of more than 8 bits
    size: int  # side of the square that the network sees
    tau: float  # a lesion is small if it covers at most 1/tau of its image

    @property
    def mode(self) -> str:
        """What Pillow calls such images."""
        return "RGB" if self.kind == "colour" else "L"


def channels_of(kind: str) -> int:
    """How many channels images of a kind have."""
    return 3 if kind == "colour" else 1


@dataclass
class Images:
    """Images of one centre, decoded."""

    centre: str
    names: list[str]
    images: Tensor  # (N, 3, S, S) uint8; (N, 1, S, S) for grey ones
    masks: Tensor  # (N, 1, S, S) uint8, 1 = lesion
    inverse_area: Tensor  # (N,) float64, image pixels / lesion pixels; inf for an empty mask
    small: Tensor  # (N,) bool
    spacing: Tensor  # (N, 2) float64, from row to row and column to column: mm, or 1 if unknown
    # Files that EXIF turns otherwise than their masks.
    turned: Sequence[Path] = ()

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices: Sequence[int]) -> "Images":
        """The images at these indices, in their order."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        return Images(
            self.centre,
            [self.names[i] for i in indices],
            self.images[chosen],
            self.masks[chosen],
            self.inverse_area[chosen],
            self.small[chosen],
            self.spacing[chosen],
        )

    def to(self, device: torch.device) -> "Images":
        """The same images on a device; sizes and flags too, since batches index them there."""
        return Images(
            self.centre,
            self.names,
            self.images.to(device),
            self.masks.to(device),
            self.inverse_area.to(device),
            self.small.to(device),
            self.spacing.to(device),
        )


class Facts(NamedTuple):
    """What may be known of a centre's data outside it."""

    train: int  # numbers of images; the held-out centre has test images alone
    validation: int
    test: int
    flagged: int  # images whose size flags somebody has written down
    lost: int  # lesions that vanish at the network's size
    fingerprint: str  # a hash of every name, image, mask and size flag, split by split
    masks: str = ""  # how the masks are read, where that was found out
    filled: bool = False  # whether lesions fill more than half of most images
    remarks: str = ""  # on single files, by name: this stays in the centre


@dataclass
class Federation:
    """What the centres hold. Of centres that were not loaded here the facts may be added."""

    source: str  # what the images are, for every table, picture and file
    place: str  # where they lie, for people
    rule: str  # by what slices or size flags were chosen, where nobody has written down flags
    flags: str  # what the flags are that somebody has
    size: int  # side of the images
    out_centre: str  # the centre that is held out for testing; empty: none is
    facts: dict[str, Facts] = field(default_factory=dict)
    train: dict[str, Images] = field(default_factory=dict)
    validation: dict[str, Images] = field(default_factory=dict)
    in_test: dict[str, Images] = field(default_factory=dict)
    out_test: Images | None = None

    @property
    def notes(self) -> list[str]:
        """What a reader should know about the data, a sentence each."""
        everywhere = self.facts.values()
        images = sum(facts.train + facts.validation + facts.test for facts in everywhere)
        flagged = sum(facts.flagged for facts in everywhere)
        lost = sum(facts.lost for facts in everywhere)

        notes = [self.rule]
        if flagged:
            notes = [f"{self.flags} for {flagged} of {images} images"]
        if lost:
            size = f"{self.size}x{self.size}"
            notes.append(f"{lost} lesions vanish at {size}, so their images count as empty")
        return notes + self.notes_on_masks

    @property
    def notes_on_masks(self) -> list[str]:
        """How masks were read where nobody has said it, and whether they look inverted."""
        centres_of = {}
        for centre, facts in self.facts.items():
            centres_of.setdefault(facts.masks, []).append(centre)

        notes = []
        for reading, centres in centres_of.items():
            where = f" ({', '.join(centres)})" if len(centres_of) > 1 else ""
            if reading:
                notes.append(reading + where)
        for centre, facts in self.facts.items():
            if facts.filled:
                notes.append(f"lesions fill most images of {centre}: are its masks inverted?")
            if facts.remarks:
                notes.append(facts.remarks)
        return notes

    @property
    def fingerprint(self) -> str:
        """A hash of all centres' data: a run must go on with the data that it began with."""
        hashes = [f"{centre} {self.facts[centre].fingerprint}" for centre in sorted(self.facts)]
        return hashlib.blake2b(" ".join(hashes).encode(), digest_size=8).hexdigest()


# ----------------------------------------------------------------------------------------- loading


def find(dataset: str, root: str = "") -> Path | None:
    """The folder of a data set, or the file of a manifest. None for the stand-in: if root is
    "stand-in", or root is empty and there is nothing in datasets/<dataset>.

    Raises UserError where a place was given that does not hold the data set. Of one's own data
    there is no stand-in.
    """
    folder = Path(root or f"datasets/{dataset}")
    if dataset not in CENTRES:
        return manifest.find(folder)
    if root == "stand-in":
        return None

    if holds(dataset, folder):
        return folder
    if not root:
        return None
    problem = f"no {FILES[dataset]} in it" if folder.is_dir() else "no such folder"
    raise UserError(f"--data-root {root}: {problem}")


def holds(dataset: str, folder: Path) -> bool:
    """Whether a folder holds any of PolypGen or LiTS."""
    if dataset == "lits":
        return any(kind == "volume" for kind, _, _ in volumes.nifti_files(folder))
    return any((folder / f"data_{centre}").is_dir() for centre in CENTRES["polypgen"])


def centres_in(dataset: str, root: str = "") -> tuple[str, ...]:
    """The names of the centres that a data set has."""
    if dataset in CENTRES:
        return CENTRES[dataset]
    return manifest.centres_of(manifest.read(find(dataset, root)))


def workloads(dataset: str, root: Path | None, centres: Sequence[str]) -> dict[str, int]:
    """{centre: how much there is of it}, before any of it is read: its images, or its volumes."""
    if dataset not in CENTRES:
        of_rows = [row.centre for row in manifest.read(root)]
        return {centre: of_rows.count(centre) for centre in centres}

    if dataset == "polypgen":
        if root is None:
            return {centre: standin.frames_of(centre) for centre in centres}
        return {centre: len(list_pairs(root, centre)) for centre in centres}

    if root is None:
        return {centre: standin.LITS[centre].volumes for centre in centres}
    numbers = {number for kind, number, _ in volumes.nifti_files(root) if kind == "volume"}
    return {centre: len(numbers.intersection(LITS_VOLUMES[centre])) for centre in centres}


def load(
    dataset: str,
    root: Path | None,
    *,
    centres: Sequence[str],
    out_centre: str,
    size: int,
    tau: float,
    split: str,
    fold: int = 1,
    kind: str = "colour",
    lesion: Sequence[int] = (),
    window: Sequence[float] = (),
    only: Sequence[str] | None = None,
    skip: Container[Path] = (),
    cache: str = "",
) -> Federation:
    """Read a data set, and split it into clients and a held-out centre.

    root: its folder or manifest, or None for the stand-in; centres: those that take part, the
    held-out one included; size: side of the images; tau: a lesion is small if it covers at most
    1/tau of its image; split: "fold" (published folds), "centre" (published per-centre split),
    "grouped" (folds, near-duplicate frames kept together) or "given" (a manifest's own); kind,
    lesion, window: Config's images, lesion and window; only: the centres to load here, None for
    all; skip: files of images, or of volumes, that are left out; cache: folder for what is drawn or
    decoded once, by default beside the data.
    Raises UserError for files and masks that cannot be used, and a cache that cannot be written.
    """
    wanted = [centre for centre in centres if only is None or centre in only]

    # A stand-in is read as the real thing is.
    place = f"in {root}"
    if root is None:
        known = f"for real ones put {FILES[dataset]} into datasets/{dataset} or name their folder"
        place = f"drawn images ({known} with --data-root)"
        root = draw_stand_in(dataset, wanted, size, cache)
        cache = ""

    # All files are listed before the first is decoded: what is missing is said at once.
    if dataset == "lits":
        found = list_lits(root, wanted, window, skip, cache)
    elif dataset == "polypgen":
        clients = [centre for centre in wanted if centre != out_centre]
        grouped = clients if split == "grouped" else []
        found = list_polypgen(root, wanted, tau, grouped, kind, skip)
    else:
        found = list_own(root, wanted, kind, lesion, window, split, skip, cache)

    # A stand-in brings its flags along, but nobody has written them down.
    source = found.source
    flags = found.flags
    if any(standin.is_marked(folder) for folder in found.folders):
        source += " stand-in"
        flags = ""

    federation = Federation(source, place, found.rule, flags, size, out_centre)
    reading = Reading(found.kind, tuple(window), size, tau)
    for centre in wanted:
        of_centre = [record for record in found.records if record.centre == centre]
        add_centre(federation, of_centre, reading, split, fold, found)
    return federation


def add_centre(
    federation: Federation,
    records: Sequence[Record],
    reading: Reading,
    split: str,
    fold: int,
    found: Listing,
) -> None:
    """Split one centre's images, decode them, and add them and their facts to a federation.

    found: what is said of its files. Raises UserError for files that cannot be used, and a centre
    without any lesion.
    """
    # The held-out centre only tests.
    centre = records[0].centre
    held_out = centre == federation.out_centre
    parts = [], [], records
    if not held_out:
        parts = split_records(records, reading, split, fold)

    # Part by part, so that no image is in memory twice.
    train, validation, test = (decode(centre, part, reading) for part in parts)
    if held_out:
        federation.out_test = test
    else:
        federation.train[centre] = train
        federation.validation[centre] = validation
        federation.in_test[centre] = test

    decoded = [train, validation, test]
    remarks = [*found.remarks.get(centre, []), *remarks_on_turned(centre, decoded)]
    check_lesions(decoded, records)
    lost = sum(count_as_empty(images) for images in decoded)
    filled = sum(int((images.inverse_area < 2).sum()) for images in decoded)
    flagged = sum(record.small is not None for record in records) if federation.flags else 0
    federation.facts[centre] = Facts(
        train=len(train),
        validation=len(validation),
        test=len(test),
        flagged=flagged,
        lost=lost,
        fingerprint=hash_of(decoded),
        masks=found.masks.get(centre, ""),
        filled=filled > len(records) / 2,
        remarks="; ".join(remarks),
    )


def check_lesions(parts: Sequence[Images], records: Sequence[Record]) -> None:
    """Raise UserError where all masks of a centre are empty."""
    if not any(images.inverse_area.isfinite().any() for images in parts):
        first = records[0]
        raise UserError(
            f"the masks of centre {first.centre} are all empty, as {first.mask}: leave it out with "
            "--centres"
        )


def remarks_on_turned(centre: str, parts: Sequence[Images]) -> list[str]:
    """Whether EXIF turns images of a centre, and not their masks: one of them may be wrong."""
    turned = [path for images in parts for path in images.turned]
    if not turned:
        return []
    return [
        f"{len(turned)} images of {centre} are turned by EXIF otherwise than their masks, as "
        f"{turned[0].name}: look whether they match"
    ]


def draw_stand_in(dataset: str, centres: Sequence[str], size: int, cache: str) -> Path:
    """Draw the stand-in of these centres where it is not there yet. -> its folder"""
    if dataset == "lits":
        return standin.draw_lits(cache, {centre: LITS_VOLUMES[centre] for centre in centres})
    return standin.draw_polypgen(cache, centres, size, is_small)


def count_as_empty(images: Images) -> int:
    """Treat images whose lesion vanished in resizing as the empty ones that they have become.

    -> their number
    """
    empty = images.masks.flatten(1).amax(dim=1) == 0
    lost = empty & images.inverse_area.isfinite()
    images.inverse_area[lost] = math.inf
    images.small[lost] = False
    return int(lost.sum())


def hash_of(parts: Sequence[Images]) -> str:
    """A hash of every name, image, mask and size flag of these parts."""
    digest = hashlib.blake2b(digest_size=8)
    for images in parts:
        digest.update(" ".join(images.names).encode())
        digest.update(images.images.numpy())
        digest.update(images.masks.numpy())
        digest.update(images.small.numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------- PolypGen's files


POLYPGEN_TAU = 150  # the threshold that the published size flags were made with
READ = (".jpg", ".jpeg", ".png")  # suffixes of its images, in either case
NOT_READ = (".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".tif", ".tiff", ".webp")


def list_polypgen(
    root: Path,
    centres: Sequence[str],
    tau: float,
    grouped: Sequence[str] = (),
    kind: str = "colour",
    skip: Container[Path] = (),
) -> Listing:
    """The images of these centres, sorted by file name.

    grouped: those of them whose near-duplicate frames are to stay together. Published size flags
    are used where they lie beside the data and tau is theirs. Raises UserError naming what is
    missing.
    """
    check_metadata(root)
    records = []
    for centre in centres:
        pairs = [pair for pair in list_pairs(root, centre) if pair[0] not in skip]
        names = [image.stem for image, _ in pairs]

        # Each image is a group of its own, unless near-duplicates are looked for.
        groups = {name: name for name in names}
        if centre in grouped:
            groups = read_groups(root, centre, names)

        # They were made with one threshold, and say nothing of another.
        flags = {}
        if tau == POLYPGEN_TAU:
            flags = read_size_flags(root, centre, {image.name for image, _ in pairs})

        for name, (image, mask) in zip(names, pairs, strict=True):
            small = flags.get(image.name)
            records.append(Record(centre, name, image, mask, groups[name], small))

    # A link to one of its centres does not lead past the mark of a stand-in.
    folders = {(root / f"data_{centre}").resolve().parent for centre in centres}
    folders.add(root)
    rule = "size flags by rule"
    return Listing("PolypGen", kind, rule, "published size flags", records, folders, {}, {})


def list_pairs(root: Path, centre: str) -> list[tuple[Path, Path]]:
    """The (image, mask) paths of a centre. Raises UserError naming what is missing."""
    image_folder = root / f"data_{centre}" / f"images_{centre}"
    mask_folder = root / f"data_{centre}" / f"masks_{centre}"
    images = image_files(image_folder)
    if not images:
        raise UserError(
            f"no readable .jpg or .png images in {image_folder}: centre {centre} has no data "
            "(leave it out with --centres)"
        )

    masks = {mask.name: mask for mask in image_files(mask_folder)}
    pairs = []
    of_name = {}
    for image in images:
        if image.stem in of_name:
            other = of_name[image.stem]
            raise UserError(f"{image} and {other} have the same name: keep one of them")
        of_name[image.stem] = image

        mask = mask_folder / f"{image.stem}_mask{image.suffix}"
        if mask.name not in masks:
            raise UserError(f"{image} has no mask: {mask} is missing")
        pairs.append((image, masks.pop(mask.name)))

    # A mask that no image has asked for is most likely a misspelt name.
    if masks:
        mask = next(iter(masks.values()))
        raise UserError(
            f"{mask} has no image: the mask of NAME{mask.suffix} in {image_folder} is "
            f"NAME_mask{mask.suffix}"
        )
    return pairs


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, sorted by name. Raises UserError for those of other formats."""
    found = []
    for path in folder.glob("*"):
        suffix = path.suffix.lower()
        # Beside others that are read, these would be left out without a word. What begins with a
        # dot was written by an operating system.
        if suffix in NOT_READ:
            raise UserError(f"{path} is not read: PolypGen's images are {', '.join(READ)}")
        if suffix in READ and not path.name.startswith("."):
            check_name(path)
            found.append(path)
    return sorted(found, key=operator.attrgetter("name"))


def check_name(path: Path) -> None:
    """Raise UserError for a name that tables cannot hold: bytes that are no text, line breaks."""
    if not path.name.isprintable():
        raise UserError(f"{path}: this name holds what is no text: give the file another one")


def check_metadata(root: Path) -> None:
    """Raise UserError for a table whose name says that it has size flags, but not of which centre.

    It would be left out without a word.
    """
    known = [flags_of(root, centre) for centre in CENTRES["polypgen"]]
    for path in (root / "metadata").glob("*"):
        if path.name.lower().startswith("my_datadetails") and path not in known:
            raise UserError(f"{path} is not read: tables of size flags are called {known[0].name}")


def flags_of(root: Path, centre: str) -> Path:
    """Where a centre's published size flags are, if they are there."""
    return root / "metadata" / f"my_dataDetails_{centre}.csv"


def read_size_flags(root: Path, centre: str, names: Set[str]) -> dict[str, bool]:
    """A centre's published size flags, {image file name: small}; empty where there are none.

    names: of its images. Raises UserError for a table that contradicts itself, or has none of them.
    """
    path = flags_of(root, centre)
    if not os.path.lexists(path):
        return {}

    flags = {}
    meanings = {"true": True, "1": True, "false": False, "0": False}
    for row in files.read_csv(path, ("img_name", "small_polyp")):
        text = row["small_polyp"]
        small = meanings.get(text.strip().lower())
        if small is None:
            raise UserError(
                f"{path}: small_polyp of {row['img_name']} is {text!r}, neither True nor False"
            )
        # The paths in these tables have either kind of slash.
        name = PureWindowsPath(row["img_name"]).name
        if flags.setdefault(name, small) != small:
            raise UserError(f"{path}: small_polyp of {name} is both True and False")

    # A table of another centre, or of files that have other names by now.
    if not flags.keys() & names:
        raise UserError(f"{path} has flags for none of the images of {centre}: delete or mend it")
    return flags


def read_groups(root: Path, centre: str, names: Sequence[str]) -> dict[str, str]:
    """The groups of near-duplicate frames in index.csv, {name: group}; all empty without one.

    Raises UserError for a frame of which the table says nothing.
    """
    path = root / "index.csv"
    if not os.path.lexists(path):
        return dict.fromkeys(names, "")

    groups = {}
    for row in files.read_csv(path, ("centre", "name", "near_dup_group")):
        name = row["name"]
        group = row["near_dup_group"].strip()
        if f"C{row['centre']}" != centre or not group:
            continue
        if groups.setdefault(name, f"group {group}") != f"group {group}":
            raise UserError(f"{path}: {name} of centre {centre} is in two groups")

    for name in names:
        if name not in groups:
            raise UserError(f"{path}: no near_dup_group for centre {centre}, {name}")
    return groups


# ----------------------------------------------------------------------------------- LiTS's files


def list_lits(
    root: Path,
    centres: Sequence[str],
    window: Sequence[float] = (),
    skip: Container[Path] = (),
    cache: str = "",
) -> Listing:
    """The slices of these centres with a tumour, volume by volume in the published order.

    window: another than the published one. Slices that are not in the cache yet are cut from their
    volumes. Raises UserError for volumes that are missing, unreadable or not LiTS, and centres
    without tumours.
    """
    last = LITS_VOLUMES["C5"][-1]
    folders = {root}
    for _, number, path in volumes.nifti_files(root):
        folders.add(path.parent)
        if number > last:
            raise UserError(f"{path}: LiTS numbers its volumes from 0 to {last}")

    records = []
    remarks = {}
    for centre in centres:
        found = volumes.find_volumes(root, LITS_VOLUMES[centre])
        present = [number for number in published_order(centre) if number in found]
        numbers = [number for number in present if found[number][0] not in skip]
        pairs = [found[number] for number in numbers]
        remarks[centre] = [
            *volumes.remarks_on_slices(centre, [volume for volume, _ in pairs]),
            *volumes.remarks_on_places(centre, pairs),
        ]
        before = len(records)
        for number in tqdm(
            numbers, desc=f"cutting slices of {centre}", unit="volume", leave=False, disable=None
        ):
            # No patient is in two splits.
            group = f"volume-{number}"
            cut_volume = cut_lits(root, number, found[number], window, cache)
            records.extend(slice_records(centre, group, group, cut_volume))

        if len(records) == before:
            of_centre = LITS_VOLUMES[centre]
            raise UserError(
                f"{root}: no slice with a tumour for centre {centre}, volumes {of_centre[0]} to "
                f"{of_centre[-1]} (leave it out with --centres)"
            )

    rule = f"slices with more than {volumes.TUMOUR_PIXELS} tumour pixels"
    return Listing("LiTS", "slices", rule, "published size flags", records, folders, {}, remarks)


def cut_lits(
    root: Path, number: int, pair: tuple[Path, Path], window: Sequence[float], cache: str
) -> volumes.SliceFiles:
    """The slices of one of LiTS's volumes, cut where they are not in the cache yet.

    pair: the volume and its segmentation
    """
    cut = volumes.LITS
    if window:
        cut = cut._replace(window=tuple(window))
    folder = Path(cache or root / CACHE) / f"volume-{number}"
    return volumes.slice_files(*pair, folder, cut)


def slice_records(
    centre: str, name: str, group: str, cut_volume: volumes.SliceFiles, split: str = ""
) -> list[Record]:
    """The slices of one volume."""
    records = []
    for k, grey, mask in cut_volume.slices:
        # Comparisons know the slices of a volume by their names.
        slice_name = f"{name}_slice-{k}"
        spacing = cut_volume.spacing
        records.append(Record(centre, slice_name, grey, mask, group, None, split, spacing=spacing))
    return records


def published_order(centre: str) -> list[int]:
    """The numbers of a client's volumes, sorted as the published split sorts them: as text."""
    texts = sorted(f"image{number}_" for number in LITS_VOLUMES[centre])
    return [int(text.removeprefix("image").removesuffix("_")) for text in texts]


# ------------------------------------------------------------------------------ one's own files


CACHE = "fedgs-cache"  # the folder of slices, beside the volumes that they were cut from


def list_own(
    path: Path,
    centres: Sequence[str],
    kind: str,
    lesion: Sequence[int],
    window: Sequence[float],
    split: str,
    skip: Container[Path] = (),
    cache: str = "",
) -> Listing:
    """The images of these centres in a manifest, or its volumes' slices with a lesion.

    Raises UserError for centres that it does not have, options that do not suit it, files that
    cannot be read, and masks that cannot be understood or hold no lesion.
    """
    rows = [row for row in manifest.read(path) if row.image not in skip]
    check_suits(path, rows, centres, kind, split)
    of_centre = {}
    folders = set()
    for row in rows:
        of_centre.setdefault(row.centre, []).append(row)
        folders.update(Path(os.path.realpath(row.image)).parents)

    # All that can be told without reading pixels is looked at before the first are.
    remarks = {}
    for centre in centres:
        of_rows = of_centre[centre]
        manifest.check_files(path, of_rows)
        if kind == "slices":
            for row in of_rows:
                volumes.check_geometry(row.image, row.mask)
            remarks[centre] = volumes.remarks_on_slices(centre, [row.image for row in of_rows])

    cut = volumes.Cut(tuple(window), tuple(lesion))
    cache_folder = cache_of(path, cache)
    records = []
    masks = {}
    for centre in centres:
        of_rows = of_centre[centre]
        if kind == "slices":
            found, values = slices_of_rows(centre, of_rows, cut, cache_folder)
        else:
            found, values = images_of_rows(centre, of_rows, lesion, by_looks=split == "grouped")
        records.extend(found)
        masks[centre] = describe_reading(values)

    rule = "slices with a lesion" if kind == "slices" else "size flags by rule"
    flags = "size flags of the manifest"
    return Listing(manifest.name_of(path), kind, rule, flags, records, folders, masks, remarks)


def check_suits(
    path: Path, rows: Sequence[manifest.Row], centres: Sequence[str], kind: str, split: str
) -> None:
    """Raise UserError for options that do not suit a manifest."""
    known = manifest.centres_of(rows)
    for centre in centres:
        if centre not in known:
            raise UserError(f"{path} has no centre {centre}: it has {', '.join(known)}")

    of_volumes = manifest.is_volume(rows[0].image)
    if of_volumes != (kind == "slices"):
        suits = "slices" if of_volumes else "colour or grey"
        raise UserError(f"--images {kind}: those of {path} are {suits}")
    if split == "given" and not rows[0].split:
        raise UserError(f"--split given: {path} has no column split")


def images_of_rows(
    centre: str, rows: Sequence[manifest.Row], lesion: Sequence[int], by_looks: bool
) -> tuple[list[Record], tuple[int, ...]]:
    """One centre's images in a manifest, and the values of their masks that are lesion.

    by_looks: near-duplicates are looked for where no groups are written down.
    """
    # Each centre has its own way of writing masks, and all of them together tell what it is.
    values = lesion_values(centre, count_values([row.mask for row in rows]), lesion)

    unknown = by_looks and not any(row.group for row in rows)
    records = []
    for row in rows:
        unit = "" if unknown else row.unit
        records.append(
            Record(centre, row.name, row.image, row.mask, unit, row.small, row.split, values)
        )
    return records, values


def slices_of_rows(
    centre: str, rows: Sequence[manifest.Row], cut: volumes.Cut, cache: Path
) -> tuple[list[Record], tuple[int, ...]]:
    """One centre's slices of a manifest's volumes, and the labels that are lesion in them."""
    records = []
    lesion = {}  # labels -> the first segmentation that has them
    bar = tqdm(rows, desc=f"cutting slices of {centre}", unit="volume", leave=False, disable=None)
    for row in bar:
        found = cut_row(row, cut, cache)
        records.extend(slice_records(centre, row.name, row.unit, found, row.split))

        if found.lesion:
            lesion.setdefault(found.lesion, row.mask)
        if len(lesion) > 1:
            (label, other), (second, here) = lesion.items()
            raise UserError(
                f"lesions of centre {centre} have the label {shown(label)} in {other}, and "
                f"{shown(second)} in {here}: say which are lesion, as in --lesion {shown(label)}"
            )

    if not records:
        raise UserError(
            f"no slice with a lesion in centre {centre}, as in {rows[0].mask}: look for other "
            "values with --lesion, or leave it out with --centres"
        )
    return records, next(iter(lesion))


def cache_of(path: Path, cache: str) -> Path:
    """Where the slices of a manifest's volumes are kept. cache: as given"""
    return Path(cache or path.parent / CACHE)


def cut_row(row: manifest.Row, cut: volumes.Cut, cache: Path) -> volumes.SliceFiles:
    """The slices of the volume of a row, cut where they are not in the cache yet."""
    # Volumes of two folders may have the same name, and a volume may be cut in several ways.
    number = zlib.crc32(repr([os.path.realpath(row.image), cut]).encode())
    folder = cache / f"{manifest.base_name(row.image)}-{number:08x}"
    return volumes.slice_files(row.image, row.mask, folder, cut)


# ---------------------------------------------------------------------------------------- decoding


AHEAD = 64  # images that are decoded before they are asked for


class Decoded(NamedTuple):
    """One image as the network sees it."""

    pixels: np.ndarray  # (S, S, 3) or (S, S) uint8
    mask: np.ndarray  # (S, S) bool
    inverse_area: float
    small: bool
    spacing: tuple[float, float]
    turned: bool  # by EXIF otherwise than its mask


def decode(centre: str, records: Sequence[Record], reading: Reading) -> Images:
    """Read images of one centre. Raises UserError naming a file that cannot be used."""
    # Filled one by one, so that no image is in memory twice.
    count = len(records)
    size = reading.size
    images = np.empty((count, channels_of(reading.kind), size, size), np.uint8)
    masks = np.empty((count, 1, size, size), np.uint8)
    inverse_area = torch.empty(count, dtype=torch.float64)
    small = torch.empty(count, dtype=torch.bool)
    spacing = torch.ones(count, 2, dtype=torch.float64)
    turned = []

    bar = tqdm(
        read_records(records, reading),
        total=count,
        desc=f"reading {centre}",
        unit="image",
        leave=False,
        disable=None,
    )
    with bar:
        for i, one in enumerate(bar):
            images[i] = one.pixels.reshape(size, size, -1).transpose(2, 0, 1)
            masks[i, 0] = one.mask
            inverse_area[i] = one.inverse_area
            small[i] = one.small
            spacing[i] = torch.tensor(one.spacing)
            if one.turned:
                turned.append(records[i].image)

    names = [record.name for record in records]
    pixels = torch.from_numpy(images)
    truth = torch.from_numpy(masks)
    return Images(centre, names, pixels, truth, inverse_area, small, spacing, turned)


def read_records(records: Sequence[Record], reading: Reading) -> Iterator[Decoded]:
    """Images one after another, each decoded a little before it is asked for."""
    # Pillow decodes and resizes outside the interpreter lock.
    read = functools.partial(read_record, reading=reading)
    with ThreadPoolExecutor() as pool:
        # All at once, threads would be far ahead, and what they have decoded in memory twice.
        for start in range(0, len(records), AHEAD):
            yield from pool.map(read, records[start : start + AHEAD])


def read_record(record: Record, reading: Reading) -> Decoded:
    """Read, check, measure and resize one image. Raises UserError naming the file."""
    image = open_image(record.image, reading.mode, reading.window)
    mask = open_file(record.mask)
    values = mask_values(mask, record.mask)
    if not record.lesion:
        check_bright(values, mask.format, record.mask)
    lesion = Image.fromarray(is_lesion(values, record.lesion))
    check_proportions(record.mask, lesion.size, image.size)

    area, by_rule = measure_lesion(lesion, reading)
    small = by_rule if record.small is None else record.small

    # What is in the file in mm is so at another size, too; of other images nobody knows.
    size = reading.size
    spacing = 1.0, 1.0
    if record.spacing:
        between_rows, between_columns = record.spacing
        spacing = between_rows * image.height / size, between_columns * image.width / size

    pixels = image.resize((size, size), Image.Resampling.BILINEAR)
    lesion = lesion.resize((size, size), Image.Resampling.NEAREST)
    turned = image.info[ORIENTATION] != mask.info[ORIENTATION]
    return Decoded(np.asarray(pixels), np.asarray(lesion), area, small, spacing, turned)


def check_proportions(mask: Path, size: tuple[int, int], of_image: tuple[int, int]) -> None:
    """Raise UserError for a mask of another shape than its image. Sizes are width and height."""
    # It was cropped, or is that of another image.
    width, height = size
    image_width, image_height = of_image
    stretch = abs(image_width * height - image_height * width)
    if stretch > 0.01 * image_width * height:
        turned = size == (image_height, image_width)
        why = " (one of them is turned, perhaps as EXIF says)" if turned else ""
        raise UserError(f"{mask} is {width}x{height}, its image {image_width}x{image_height}{why}")


# --------------------------------------------------------------------------------- size of lesions


RULE_SIZE = 512  # PolypGen's lesions are measured at 512 x 512, whatever the network sees


def measure_lesion(lesion: Image.Image, reading: Reading) -> tuple[float, bool]:
    """Inverse area of an image's lesion, and whether it counts as small.

    lesion: its mask, at its own size. The two data sets of the paper differ in where and what they
    measure, and other images follow the one that they are like.
    """
    # Slices, as LiTS: all of a slice's lesion, in the slice as it is.
    tau = reading.tau
    if reading.kind == "slices":
        area = inverse_area(np.asarray(lesion))
        return area, tau <= area < math.inf

    # Images, as PolypGen: the smallest lesion, after resizing.
    at_rule_size = lesion.resize((RULE_SIZE, RULE_SIZE), Image.Resampling.NEAREST)
    mask = np.asarray(at_rule_size)
    return inverse_area(mask), is_small(mask, tau)


def inverse_area(mask: np.ndarray) -> float:
    """Image pixels / lesion pixels of a mask (H, W) bool; inf where it is empty."""
    if not mask.any():
        return math.inf
    return float(mask.size / mask.sum())


def is_small(mask: np.ndarray, tau: float = POLYPGEN_TAU) -> bool:
    """Whether the smallest polyp, an 8-connected component of the mask (H, W) bool, covers at most
    1/tau of the image.
    """
    components, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return False
    areas = np.bincount(components.ravel())[1:]  # the first is that of the background
    return bool(areas.min() * tau <= mask.size)


# ------------------------------------------------------------------------------------------ splits


def split_records(
    records: Sequence[Record], reading: Reading, split: str, fold: int
) -> list[list[Record]]:
    """A client's training, validation and test images, as written down or by the rules."""
    if split == "given":
        of_part = {"train": [], "validation": [], "test": []}
        for record in records:
            of_part[record.split].append(record)
        return list(of_part.values())

    train, validation, test = split_units(units_of(records, reading), split, fold)
    return [
        [records[i] for i in train],
        [records[i] for i in validation],
        [records[i] for i in test],
    ]


def units_of(records: Sequence[Record], reading: Reading) -> list[list[int]]:
    """What is split: lists of indices that stay together, in the order of their first members."""
    groups = [record.group for record in records]

    # Where nobody has written down the groups.
    if not all(groups):
        decoded = decode(records[0].centre, records, reading)
        groups = groups_by_looks(thumbnails(decoded))

    units = {}
    for i, group in enumerate(groups):
        units.setdefault(group, []).append(i)
    return list(units.values())


ALIKE = 0.97  # correlation of two thumbnails above which their images are near-duplicates


def thumbnails(images: Images) -> Tensor:
    """32 x 32 versions of images, (N, 32 * 32 * channels) float32."""
    # A few at a time: as floats all of them may not fit in memory.
    small = [F.adaptive_avg_pool2d(some.float(), 32) for some in images.images.split(64)]
    return torch.cat(small).flatten(1)


def groups_by_looks(thumbnails: Tensor) -> list[int]:
    """A group for each of N images: those are linked whose thumbnails (N, D) are alike."""
    # The correlation is the product of vectors of mean 0 and length 1. A plain image has no length,
    # and is like no other.
    centred = thumbnails.double() - thumbnails.double().mean(dim=1, keepdim=True)
    vectors = F.normalize(centred, dim=1)

    # A block of rows of the N x N matrix at a time, as few of its entries matter. It is symmetric:
    # what is to the left of the diagonal has been there in the blocks before.
    links = []
    for start in range(0, len(vectors), 512):
        rows = vectors[start : start + 512]
        alike = rows @ vectors[start:].T > ALIKE
        links.append((alike.nonzero().int() + start).T)
    first, second = torch.cat(links, dim=1).numpy()

    count = len(vectors)
    linked = np.ones(len(first), bool)
    graph = coo_array((linked, (first, second)), shape=(count, count))
    _, groups = connected_components(graph, directed=False)
    return groups.tolist()


def split_units(
    units: Sequence[Sequence[int]], split: str, fold: int
) -> tuple[list[int], list[int], list[int]]:
    """Indices of a client's training, validation and test images by the published rules.

    units: lists of indices that stay together, in the order in which the rules count them.
    """
    train = []
    held = []
    if split == "centre":
        train, held = shuffled_split(units, 0.8)
    else:
        # The fold-th of five consecutive blocks is held, as by scikit-learn's KFold(5).
        blocks = np.array_split(np.arange(len(units)), 5)
        for number, block in enumerate(blocks, start=1):
            part = held if number == fold else train
            part.extend(units[i] for i in block)

    validation, in_test = shuffled_split(held, 0.5)
    return joined(train), joined(validation), joined(in_test)


def shuffled_split(units: Sequence, share: float) -> tuple[list, list]:
    """floor(share n) of n units and the rest, as scikit-learn's train_test_split shuffles them.

    The seed of its shuffling, random_state, is 0 in all published splits.
    """
    first = math.floor(share * len(units))
    rest = len(units) - first
    order = np.random.RandomState(0).permutation(len(units))

    # The rest is taken first.
    return [units[i] for i in order[rest:]], [units[i] for i in order[:rest]]


def joined(units: Sequence[Sequence[int]]) -> list[int]:
    """The indices of all units, one after another."""
    return list(itertools.chain.from_iterable(units))


# ------------------------------------------------------------------------------------ augmentation


AUGMENTATION_DRAWS = 9  # uniform numbers that one image's augmentation takes
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def augment(images: Tensor, masks: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Flips, rotation and colour jitter of a batch, each image by its own nine draws.

    images (B, 3, S, S), or (B, 1, S, S), uint8; masks (B, 1, S, S) uint8; draws (B, 9) in [0, 1).
    -> images, float in [0, 1]; masks

    Horizontal flip with probability 1/2, vertical 1/2, rotation by up to 90 degrees either way 1/2;
    colour jitter, of RGB images only, 0.3.
    """
    # Four draws decide about flips and rotation, one whether colours change, and four how.
    images = to_unit(images)
    images, masks = flip_and_rotate(images, masks, draws[:, :4])
    if images.shape[1] == 1:
        return images, masks

    jittered = jitter_colours(images, draws[:, 5:])
    chosen = draws[:, 4, None, None, None] < 0.3
    return torch.where(chosen, jittered, images), masks


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as float ones in [0, 1]; those are left as they are."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images


def flip_and_rotate(images: Tensor, masks: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Flips and rotation in one resampling with reflected borders. draws (B, 4)

    Bilinear for images, nearest for masks.
    """
    flip_x = torch.where(draws[:, 0] < 0.5, -1.0, 1.0)
    flip_y = torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
    angle = (2 * draws[:, 3] - 1) * math.pi / 2
    angle = torch.where(draws[:, 2] < 0.5, angle, 0.0)

    # Where a pixel of the result comes from: turned by the angle, and then flipped.
    cos = angle.cos()
    sin = angle.sin()
    zero = torch.zeros_like(angle)
    source_x = torch.stack([flip_x * cos, -flip_x * sin, zero], dim=1)
    source_y = torch.stack([flip_y * sin, flip_y * cos, zero], dim=1)
    to_source = torch.stack([source_x, source_y], dim=1)

    grid = F.affine_grid(to_source, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    masks = F.grid_sample(masks.float(), grid, "nearest", "reflection", align_corners=False)
    return images, masks.to(torch.uint8)


def jitter_colours(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness, contrast and saturation times 0.8 to 1.2, hue by up to 0.2 of a turn, in order.

    images (B, 3, S, S) in [0, 1]; draws (B, 4)
    """
    factors = 0.8 + 0.4 * draws[:, :3, None, None, None]
    brightness, contrast, saturation = factors.unbind(1)
    turns = 0.4 * draws[:, 3, None, None] - 0.2

    # Contrast changes the distance from the image's mean, saturation that from each pixel's grey.
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp(0, 1)
    images = torch.lerp(grey(images), images, saturation).clamp(0, 1)
    return shift_hue(images, turns)


def grey(images: Tensor) -> Tensor:
    """Luma of RGB images: (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of RGB images (B, 3, H, W) in HSV by turns (B, 1, 1), a full turn being 1."""
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)

    # The hue in sixths of a turn, counted from the strongest channel.
    sector = torch.where(value == green, blue - red, red - green)
    sector = torch.where(value == red, green - blue, sector)
    offset = torch.where(value == green, 2.0, 4.0)
    offset = torch.where(value == red, 0.0, offset)
    hue = sector / chroma.clamp(min=1e-8) + offset + 6 * turns

    # And back: each channel falls by the chroma as the hue leaves its own sectors.
    channels = []
    for start in (5, 3, 1):
        ramp = (start + hue) % 6
        falling = torch.minimum(ramp, 4 - ramp).clamp(0, 1)
        channels.append(value - chroma * falling)
    return torch.stack(channels, dim=1)


def normalise(images: Tensor) -> Tensor:
    """Images as a network expects them: RGB with ImageNet's mean 0 and deviation 1, grey in [0, 1].

    images (B, 3, H, W) or (B, 1, H, W), uint8, or float in [0, 1]
    """
    images = to_unit(images)
    if images.shape[1] == 1:
        return images

    # Numbers, not tensors, which would be copied to the device at every step.
    channels = images.unbind(dim=1)
    normalised = []
    for channel, mean, std in zip(channels, IMAGENET_MEAN, IMAGENET_STD, strict=True):
        normalised.append((channel - mean) / std)
    return torch.stack(normalised, dim=1)
