"""The images: PolypGen and LiTS from disk or their stand-ins, splits, augmentation on the batch.

    data = polypgen("datasets/polypgen", centres=(1, 2, 3, 4, 5, 6), out_centre=6, size=512, tau=150)
    data.train[1].images     # (N, 3, 512, 512) uint8, centre 1's training images
    data = lits("datasets/lits", centres=(1, 2, 3, 4, 5), out_centre=5, size=512, tau=1000)
    data.train[1].images     # (N, 1, 512, 512) uint8, slices with a tumour

Everything is decoded once into uint8 tensors; a batch becomes float, is augmented and normalised on the
training device. PolypGen (Ali et al., Sci Data 10:75, 2023) is read in its own layout, and so is LiTS (Bilic et al.,
Med Image Anal 84, 2023), from any sub-folders, as .nii or .nii.gz:

    data_C1/images_C1/NAME.jpg    data_C1/masks_C1/NAME_mask.jpg    … and so for centres 2 to 6
    metadata/my_dataDetails_C1.csv …    optional: published size flags (img_name, small_polyp, inv_area)
    volume-0.nii    segmentation-0.nii    … to 130: 0 background, 1 liver, 2 tumour
"""

import contextlib
import csv
import gzip
import hashlib
import json
import logging
import math
import os
import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist, squareform
from tqdm import tqdm

import standin

POLYPGEN_CENTRES = (1, 2, 3, 4, 5, 6)
POLYPGEN_TAU = 150  # the threshold that the published size flags were made with
RULE_SIZE = 512  # smallness and inverse area are measured on the mask at 512 x 512, whatever the network sees
LITS_CENTRES = {1: range(30), 2: range(30, 60), 3: range(60, 90), 4: range(90, 120), 5: range(120, 131)}  # volumes
CENTRES = {"polypgen": POLYPGEN_CENTRES, "lits": tuple(LITS_CENTRES)}
FILES = {"polypgen": "data_C1 to data_C6", "lits": "volume-0.nii, segmentation-0.nii and so on"}  # by which it is known


class DataError(ValueError):
    """Data that cannot be used: the message names the file or option and says what to do."""


@dataclass
class Images:
    """Images of one centre, decoded."""

    centre: int
    names: list
    images: torch.Tensor  # (N, 3, S, S) uint8; (N, 1, S, S) for CT
    masks: torch.Tensor  # (N, 1, S, S) uint8, 1 = lesion
    inverse_area: torch.Tensor  # (N,) float64, image pixels / lesion pixels at 512 x 512, CT as it is; inf for an empty mask
    small: torch.Tensor  # (N,) bool
    spacing: torch.Tensor  # (N, 2) float64, from row to row and column to column of images: mm for CT, else 1 (pixel)

    def __len__(self):
        return len(self.names)

    def subset(self, indices):
        """The images at these indices, in their order."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        return Images(self.centre, [self.names[i] for i in indices], *(x[chosen] for x in self.tensors()))

    def to(self, device):
        """The same images on a device; the per-image facts too, since batches index them there."""
        return Images(self.centre, self.names, *(x.to(device) for x in self.tensors()))

    def tensors(self):
        """What there is of each image, in the order of the fields."""
        return self.images, self.masks, self.inverse_area, self.small, self.spacing


class Facts(NamedTuple):
    """What may be known of a centre's data outside it."""

    parts: tuple  # numbers of images: (train, validation, in-test), or of the held-out centre (out-test,)
    flagged: int  # images whose published size flags are used
    lost: int  # lesions that vanish at the network's size
    fingerprint: str  # a hash of every name, image, mask and size flag, split by split


@dataclass
class Federation:
    """What the clients hold, by centre number, and the held-out centre; of other processes' centres the facts alone."""

    source: str  # where the images come from, for every table, plot and file
    rule: str  # by what slices or size flags were chosen, where no published flags are used
    size: int  # side of the images
    facts: dict = field(default_factory=dict)  # {centre: Facts}
    out_test: Images | None = None
    train: dict = field(default_factory=dict)
    validation: dict = field(default_factory=dict)
    in_test: dict = field(default_factory=dict)

    @property
    def notes(self):
        """What a reader should know about the data, a sentence each."""
        flagged, lost = (sum(getattr(facts, name) for facts in self.facts.values()) for name in ("flagged", "lost"))
        images = sum(sum(facts.parts) for facts in self.facts.values())
        notes = [f"published size flags for {flagged} of {images} images" if flagged else self.rule]
        if lost:
            notes.append(f"{lost} lesions vanish at {self.size}x{self.size}, so their images count as empty")
        return notes


def polypgen(root, centres=POLYPGEN_CENTRES, out_centre=6, size=512, tau=POLYPGEN_TAU, split="fold", fold=1, here=None):
    """PolypGen at root, or the stand-in where root is None, split into clients and a held-out centre.

    centres: those that take part, the held-out one included; here: those of them to load, all if None. split: "fold"
    (published folds), "centre" (published per-centre split) or "grouped" (fold, near-duplicate frames kept together).
    Raises DataError for files that are missing or unreadable and centres without images.
    """
    centres = [k for k in centres if here is None or k in here]
    if root is None:
        drawn = tqdm(centres, desc="drawing the stand-in", unit="centre", leave=False, disable=None)
        source, loaded, flagged = "PolypGen stand-in", [stand_in_images(centre, size, tau) for centre in drawn], {}
    else:
        source, (loaded, flagged) = "PolypGen", read_polypgen(Path(root), centres, size, tau)
    units = {images.centre: near_duplicates(root, images) if split == "grouped" else [[i] for i in range(len(images))]
             for images in loaded if images.centre != out_centre}
    return federate(Federation(source, "size flags by rule", size), loaded, flagged, out_centre, units, split, fold)


def lits(root, centres=tuple(LITS_CENTRES), out_centre=5, size=512, tau=1000, split="centre", fold=1, here=None, cache=""):
    """The slices with a tumour of LiTS at root, or of the stand-in where root is None: clients and a held-out centre.

    A client holds the volumes of its numbers; no volume is in two splits. split: "centre" (published per-centre split) or
    "fold" (five folds), both of volumes. centres, here: as for polypgen. cache: a folder for decoded slices; default:
    root/fedgs-cache.
    Raises DataError for files that are missing, unreadable or not LiTS, centres without tumours, an unwritable cache.
    """
    centres = [k for k in centres if here is None or k in here]
    if root is None:
        root = stand_in_volumes(cache)
        cache = root / "fedgs-cache"
    drawn = any((path.parent / STAND_IN_MARK).exists() for _, _, path in nifti_files(root))
    loaded, units = read_lits(Path(root), centres, size, tau, Path(cache or Path(root) / "fedgs-cache"))
    empty = Federation("LiTS stand-in" if drawn else "LiTS", f"slices with more than {TUMOUR_PIXELS} tumour pixels", size)
    return federate(empty, loaded, {}, out_centre, units, split, fold)


def federate(federation, loaded, flagged, out_centre, units, split, fold):
    """Split the centres' images into the parts of a Federation. -> the federation

    flagged: {centre: number of published flags used}; units: {centre: lists of indices that stay together, in the order in
    which the rules of the split count them}
    """
    for images in loaded:
        lost = count_as_empty(images)
        if images.centre == out_centre:
            federation.out_test, parts = images, [images]
        else:
            parts = [images.subset(indices) for indices in split_units(units[images.centre], split, fold)]
            for part, chosen in zip((federation.train, federation.validation, federation.in_test), parts, strict=True):
                part[images.centre] = chosen
        numbers = tuple(len(part) for part in parts)
        federation.facts[images.centre] = Facts(numbers, flagged.get(images.centre, 0), lost, hash_of(parts))
    return federation


def count_as_empty(images):
    """Treat images whose lesion vanished in resizing as the empty ones they have become. -> their number"""
    lost = (images.masks.flatten(1).amax(1) == 0) & images.inverse_area.isfinite()
    images.inverse_area[lost], images.small[lost] = math.inf, False
    return int(lost.sum())


def hash_of(parts):
    """A hash of every name, image, mask and size flag of these Images."""
    digest = hashlib.blake2b(digest_size=8)
    for images in parts:
        digest.update(" ".join(images.names).encode())
        for tensor in (images.images, images.masks, images.small):
            digest.update(tensor.numpy())
    return digest.hexdigest()


def fingerprint(federation):
    """A hash of all centres' hashes: a run must go on with the data it began with."""
    text = " ".join(f"{centre} {facts.fingerprint}" for centre, facts in sorted(federation.facts.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def work(dataset, root, centre):
    """How much there is of a centre, before anything of it is loaded: its number of images, or of CT volumes."""
    if dataset == "lits":
        return sum(kind == "volume" and number in LITS_CENTRES[centre] for kind, number, _ in nifti_files(root))
    return standin.POLYPGEN[centre][0] if root is None else len(list_pairs(Path(root), centre))


def find(dataset, root=""):
    """The folder of a data set, or None for the stand-in: root "stand-in", or no root and nothing in datasets/<dataset>.

    Raises DataError where a folder was given that does not hold it.
    """
    folder = Path(root or f"datasets/{dataset}")
    if dataset == "polypgen":
        held = any((folder / f"data_C{k}").is_dir() for k in POLYPGEN_CENTRES)
    else:
        held = any(kind == "volume" for kind, _, _ in nifti_files(folder))
    found = root != "stand-in" and held
    if root and root != "stand-in" and not found:
        raise DataError(f"--data-root {root}: " + (f"no {FILES[dataset]} in it" if folder.is_dir() else "no such folder"))
    return folder if found else None


# ------------------------------------------------------------------------------------ PolypGen on disk


def stand_in_images(centre, size, tau):
    """One centre of the stand-in, as if it had been read from disk. -> Images"""
    images, masks = standin.polypgen_frames(centre, round(standin.STAND_IN_SHARE * standin.POLYPGEN[centre][0]), size)
    names = [f"stand-in_C{centre}_{i:04d}" for i in range(len(images))]
    nearest = (np.arange(RULE_SIZE) * size) // RULE_SIZE
    at_rule_size = masks[:, nearest][:, :, nearest]
    inverse_areas, small = zip(*((inverse_area(mask), is_small(mask, tau)) for mask in at_rule_size))
    return collect(centre, names, images, masks, inverse_areas, small)


def read_polypgen(root, centres, size, tau):
    """Read these centres of PolypGen. -> list of Images, {centre: number of images with a published size flag}"""
    pairs = [(centre, *pair) for centre in centres for pair in list_pairs(root, centre)]
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes outside the interpreter lock
        jobs = pool.map(lambda pair: read_pair(pair[1], pair[2], size, tau), pairs)
        decoded = list(tqdm(jobs, total=len(pairs), desc="reading PolypGen", unit="image", leave=False, disable=None))
    loaded, flagged = [], {}
    for centre in centres:
        published = read_size_flags(root, centre) if tau == POLYPGEN_TAU else {}
        names, rows = zip(*((image.name, row) for (c, image, _), row in zip(pairs, decoded, strict=True) if c == centre))
        pixels, masks, inverse_areas, by_rule = zip(*rows)
        small = [published.get(name, flag) for name, flag in zip(names, by_rule)]
        flagged[centre] = sum(name in published for name in names)
        loaded.append(collect(centre, [Path(name).stem for name in names], pixels, masks, inverse_areas, small))
    return loaded, flagged


def list_pairs(root, centre):
    """The (image, mask) paths of a centre, sorted by image file name. Raises DataError naming what is missing."""
    folder, masks = root / f"data_C{centre}" / f"images_C{centre}", root / f"data_C{centre}" / f"masks_C{centre}"
    images = sorted(folder.glob("*.jpg"), key=lambda path: path.name)
    if not images:
        raise DataError(f"no readable .jpg images in {folder}: centre {centre} has no data (leave it out with --centres)")
    pairs = [(image, masks / f"{image.stem}_mask.jpg") for image in images]
    for image, mask in pairs:
        if not mask.exists():
            raise DataError(f"{image} has no mask: {mask} is missing")
    if left := sorted(set(masks.glob("*.jpg")) - {mask for _, mask in pairs}):
        raise DataError(f"{left[0]} has no image: the mask of NAME.jpg in {folder} is NAME_mask.jpg")
    return pairs


def read_pair(image_path, mask_path, size, tau):
    """-> image (S, S, 3) uint8, mask (S, S) bool, inverse area, small. Raises DataError naming the file."""
    image, mask = open_image(image_path, "RGB"), open_image(mask_path, "L")
    if abs(image.width * mask.height - image.height * mask.width) > 0.01 * image.width * mask.height:
        raise DataError(f"{mask_path} is {mask.width}x{mask.height}, its image {image.width}x{image.height}")
    lesion = mask.point(lambda grey: 255 * (grey > 128))
    at_rule_size = np.asarray(lesion.resize((RULE_SIZE, RULE_SIZE), Image.Resampling.NEAREST)) > 0
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    mask = np.asarray(lesion.resize((size, size), Image.Resampling.NEAREST)) > 0
    return pixels, mask, inverse_area(at_rule_size), is_small(at_rule_size, tau)


def open_image(path, mode):
    """A fully decoded Pillow image. Raises DataError naming the file."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # converting would cut values off
                raise DataError(f"{path} has pixels of type {image.mode}: save it with 8 bits a channel")
            return image.convert(mode)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: how some decoders call damage
        raise DataError(f"cannot read {path}: {error}") from error


def read_size_flags(root, centre):
    """A centre's published size flags beside the data, {image file name: small}; empty where there are none."""
    path = root / "metadata" / f"my_dataDetails_C{centre}.csv"
    flags, truth = {}, {"true": True, "1": True, "false": False, "0": False}
    for row in read_table(path, ("img_name", "small_polyp")) if path.exists() else []:
        small = row["small_polyp"].strip().lower()
        if small not in truth:
            raise DataError(f"{path}: small_polyp of {row['img_name']} is {row['small_polyp']!r}, neither True nor False")
        flags[PureWindowsPath(row["img_name"]).name] = truth[small]  # either kind of slash
    return flags


def read_table(path, columns):
    """The rows of a CSV file as dictionaries. Raises DataError for another kind of file and for missing columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if any(row.get(column) is None for row in rows for column in columns):
        raise DataError(f"{path}: every row needs the columns {', '.join(columns)}")
    return rows


def collect(centre, names, images, masks, inverse_areas, small, spacing=None):
    """Lists of one centre's decoded images -> Images. spacing: of the pixels in mm, where it is known"""
    return Images(
        centre,
        names,
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack(masks)[:, None].astype(np.uint8)),
        torch.tensor(inverse_areas, dtype=torch.float64),
        torch.tensor(small),
        torch.tensor(spacing or [(1.0, 1.0)] * len(names), dtype=torch.float64),
    )


# ---------------------------------------------------------------------------------------- LiTS on disk

WINDOW = (-200, 200)  # Hounsfield units that become 0 and 255
TUMOUR_PIXELS = 50  # slices with more of them are kept
BLOCK = 16  # slices that are decoded at a time
DAMAGE = (OSError, EOFError, ValueError, zlib.error)  # what reading a damaged file raises
STAND_IN_MARK = "STAND-IN.txt"  # lies in the folder of drawn volumes, so that nobody takes them for LiTS


def read_lits(root, centres, size, tau, cache):
    """-> list of Images, {centre: its volumes as lists of indices}"""
    files = find_volumes(root)
    numbers = {centre: sorted(LITS_CENTRES[centre], key=lambda i: f"image{i}_") for centre in centres}  # the published order
    loaded, units = [], {}
    with tqdm(total=sum(i in files for centre in centres for i in numbers[centre]), desc="reading LiTS", unit="volume",
              leave=False, disable=None) as progress:
        for centre in centres:
            rows, units[centre] = [], []
            for number in numbers[centre]:
                if number in files:
                    start = len(rows)
                    rows += slices_at_size(number, cached_slices(number, *files[number], cache), size)
                    progress.update()
                    if len(rows) > start:
                        units[centre].append(list(range(start, len(rows))))
            if not rows:
                raise DataError(f"{root}: no slice with a tumour for centre {centre}, volumes {min(numbers[centre])} to "
                                f"{max(numbers[centre])} (leave it out with --centres)")
            names, images, masks, inverse_areas, spacing = zip(*rows)
            small = [a >= tau for a in inverse_areas]
            loaded.append(collect(centre, list(names), images, masks, inverse_areas, small, spacing))
    return loaded, units


def find_volumes(root):
    """{number: (volume, segmentation)} of the NIfTI files in root and below. Raises DataError naming what is missing."""
    found = {"volume": {}, "segmentation": {}}
    for kind, number, path in nifti_files(root):
        if number in found[kind]:
            raise DataError(f"{path} and {found[kind][number]} are the same {kind}: keep one of them")
        if number > LITS_CENTRES[5][-1]:
            raise DataError(f"{path}: LiTS numbers its volumes from 0 to {LITS_CENTRES[5][-1]}")
        found[kind][number] = path
    volumes, segmentations = found["volume"], found["segmentation"]
    for files, others, name in ((volumes, segmentations, "segmentation"), (segmentations, volumes, "volume")):
        if missing := files.keys() - others:
            first = min(missing)
            raise DataError(f"{files[first]} has no {name}: {name}-{first}.nii or .nii.gz is missing in {root}")
    return {number: (volumes[number], segmentations[number]) for number in volumes}


def nifti_files(root):
    """LiTS's files in root and below, in order -> [("volume" or "segmentation", number, path)]"""
    paths = sorted(Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names)
    matches = ((path, re.fullmatch(r"(volume|segmentation)-(\d+)\.nii(\.gz)?", path.name)) for path in paths)
    return [(match[1], int(match[2]), path) for path, match in matches if match and path.is_file()]


class Slices(NamedTuple):
    """The slices of a CT volume that are kept, as they are in the file."""

    numbers: np.ndarray  # (n,)
    images: np.ndarray  # (n, H, W) uint8, see window
    masks: np.ndarray  # (n, H, W) bool
    spacing: np.ndarray  # (2,) mm, from row to row and from column to column


def cached_slices(number, volume, segmentation, cache):
    """read_slices, through a file in the cache that is made anew where it is missing, stale or damaged."""
    path = cache / f"volume-{number}.npz"
    sources = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in (volume, segmentation)]
    key = json.dumps([WINDOW, TUMOUR_PIXELS, sources])
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                shape = tuple(stored["shape"])
                masks = np.unpackbits(stored["masks"], count=math.prod(shape)).reshape(shape).astype(bool)
                return Slices(stored["numbers"], stored["images"].reshape(shape), masks, stored["spacing"])
    except (*DAMAGE, KeyError, TypeError, RuntimeError, zipfile.BadZipFile):
        pass  # not there, or not whole; zipfile raises RuntimeErrors, too
    slices = read_slices(volume, segmentation)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            np.savez_compressed(new, key=key, shape=slices.images.shape, **slices._replace(masks=np.packbits(slices.masks))._asdict())
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"cannot write the cache {cache} ({why}): choose another folder with --cache") from error
    return slices


@contextlib.contextmanager
def replacing(path):
    """A new file beside path: it takes path's place when the block ends well, and is gone when it does not."""
    new = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield new
        os.replace(new, path)
    except BaseException:  # an interruption, too
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def read_slices(volume_path, segmentation_path):
    """The slices (along the third axis) of a CT volume with more than 50 pixels of tumour, as they are in the file.

    -> Slices. At no time are more than 16 slices in memory beside them. Raises DataError naming the file.
    """
    volume, segmentation = open_nifti(volume_path), open_nifti(segmentation_path)
    if volume.shape != segmentation.shape:
        raise DataError(f"{segmentation_path} is of shape {segmentation.shape}, its volume {volume.shape}")
    for path, image in ((volume_path, volume), (segmentation_path, segmentation)):
        check_whole(path, image)
    slices, images, masks = [], [np.zeros((0, *volume.shape[:2]), np.uint8)], [np.zeros((0, *volume.shape[:2]), bool)]
    for start in range(0, volume.shape[2], BLOCK):
        labels = read_block(segmentation, segmentation_path, start)
        if not np.isin(labels, (0, 1, 2)).all():
            other = labels[~np.isin(labels, (0, 1, 2))][0]
            raise DataError(f"{segmentation_path} holds the label {other:g}; LiTS has 0 (background), 1 (liver), 2 (tumour)")
        tumour = (labels == 2).transpose(2, 0, 1)
        kept = np.flatnonzero(tumour.sum((1, 2)) > TUMOUR_PIXELS)
        if len(kept):
            images.append(window(read_block(volume, volume_path, start)[..., kept], volume_path))
            masks.append(tumour[kept])
            slices.extend(start + kept)
    spacing = np.array(volume.header.get_zooms()[:2], dtype=np.float64)
    return Slices(np.array(slices, dtype=np.int64), np.concatenate(images), np.concatenate(masks), spacing)


def window(hu, path):
    """Hounsfield units (H, W, n) as grey values (n, H, W) uint8, -200 to 200 as 0 to 255. Raises DataError naming the file."""
    hu = hu.astype(np.float32).transpose(2, 0, 1)
    if not np.isfinite(hu).all():
        raise DataError(f"{path} holds values that are no numbers")
    low, high = WINDOW
    return np.round((np.clip(hu, low, high) - low) * np.float32(255 / (high - low))).astype(np.uint8)


def open_nifti(path):
    """A NIfTI file whose data is read on demand. Raises DataError naming the file."""
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it would print what is raised here
    try:
        image = nibabel.load(path, keep_file_open=True)  # otherwise every block would decompress from the beginning
    except (*DAMAGE, nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError,
            nibabel.wrapstruct.WrapStructError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(image.shape) != 3 or min(image.shape) < 1:
        raise DataError(f"{path} has {len(image.shape)} dimensions, {image.shape}; a volume has three, and a slice at least")
    if image.get_data_dtype().kind not in "iuf":
        raise DataError(f"{path} holds values of type {image.get_data_dtype()}; a volume holds numbers")
    return image


def check_whole(path, image):
    """Raise DataError for a NIfTI file that is cut short, or compressed and not what its checksum says."""
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as file:
                while file.read(1 << 20):
                    pass
        elif path.stat().st_size < image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize:
            raise EOFError(f"{path.stat().st_size} bytes are too few")
    except DAMAGE as error:
        raise DataError(f"cannot read {path}, it is damaged or cut short: {error}") from error


def read_block(image, path, start):
    """Some slices of an open NIfTI file, (H, W, up to 16). Raises DataError naming the file."""
    try:
        return np.asarray(image.dataobj[..., start : start + BLOCK])
    except DAMAGE as error:
        raise DataError(f"cannot read {path}, it is damaged or cut short: {error}") from error


def slices_at_size(number, slices, size):
    """A volume's Slices as the network sees them -> [(name, image (S, S, 1) uint8, mask (S, S) bool, inverse area, spacing)]"""
    spacing = tuple(slices.spacing * slices.images.shape[1:] / size)
    for k, image, mask in zip(slices.numbers, slices.images, slices.masks):
        lesion = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
        yield f"volume-{number}_slice-{k}", to_size(image, size), lesion, inverse_area(mask), spacing


def to_size(image, size):
    """A grey slice (H, W) uint8 at the size of the network, (S, S, 1)."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))[..., None]


def stand_in_volumes(folder=""):
    """Write the drawn volumes into a folder, once, as NIfTI files with LiTS's names. -> the folder, by default datasets/lits-stand-in

    Raises DataError for a folder that cannot be written, or that holds volumes which were not drawn.
    """
    folder = Path(folder or "datasets/lits-stand-in")
    mark, text = folder / STAND_IN_MARK, "Drawn by FedGS's standin.py (version 1): these volumes are not LiTS.\n"
    if mark.exists() and mark.read_text(errors="replace") == text:
        return folder
    if not mark.exists() and nifti_files(folder):
        raise DataError(f"{folder} holds volumes that are not the stand-in's: choose another folder with --cache")
    total = sum(volumes for volumes, _, _ in standin.LITS.values())
    affine = np.diag([-0.8 * 512 / standin.LITS_SIDE, -0.8 * 512 / standin.LITS_SIDE, 5.0, 1.0])  # mm
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(f"Unfinished. {text}")
        with tqdm(total=total, desc="drawing the stand-in", unit="volume", leave=False, disable=None) as progress:
            for centre, numbers in LITS_CENTRES.items():
                for number, (hu, labels) in zip(numbers, standin.lits_volumes(centre)):
                    for kind, values in (("volume", hu), ("segmentation", labels)):
                        with replacing(folder / f"{kind}-{number}.nii.gz") as new:
                            nibabel.Nifti1Image(values, affine).to_filename(new)
                    progress.update()
        mark.write_text(text)
    except OSError as error:
        raise DataError(f"cannot write the stand-in into {folder} ({error.strerror or error}): choose another folder with "
                        "--cache") from error
    return folder


# ---------------------------------------------------------------------------------------- size of lesions


def inverse_area(mask):
    """Image pixels / lesion pixels of a mask (H, W) bool; inf where it is empty."""
    return mask.size / mask.sum() if mask.any() else math.inf


def is_small(mask, tau):
    """Whether the smallest polyp, an 8-connected component of the mask (H, W), covers at most 1/tau of the image."""
    components, count = ndimage.label(mask, structure=np.ones((3, 3)))
    return count > 0 and bool(np.bincount(components.ravel())[1:].min() * tau <= mask.size)


# ------------------------------------------------------------------------------------------------ splits


def split_units(units, split, fold):
    """Indices (train, validation, in_test) of one centre by the published rules.

    units: lists of indices that stay together, in the order of sorted file names.
    """
    if split == "centre":
        train, held = shuffled_split(units, 0.8)
    else:  # the fold-th of five consecutive blocks is held, as by scikit-learn's KFold(5)
        blocks = np.array_split(np.arange(len(units)), 5)
        held = [units[i] for i in blocks[fold - 1]]
        train = [units[i] for block in blocks[: fold - 1] + blocks[fold:] for i in block]
    validation, in_test = shuffled_split(held, 0.5)
    return tuple([i for unit in part for i in unit] for part in (train, validation, in_test))


def shuffled_split(units, share):
    """(first floor(share n), the rest), shuffled as scikit-learn's train_test_split(random_state=0) does."""
    count = math.floor(share * len(units))
    order = np.random.RandomState(0).permutation(len(units))
    rest = len(units) - count
    return [units[i] for i in order[rest:]], [units[i] for i in order[:rest]]


def near_duplicates(root, images):
    """Groups of near-duplicate frames of one centre: lists of indices, ordered by their first members.

    By the column near_dup_group of an index.csv (centre, name, near_dup_group) beside the data; without
    one, frames are linked where their 32 x 32 thumbnails correlate above 0.97.
    """
    index = Path(root) / "index.csv" if root else None
    if index and index.exists():
        rows = read_table(index, ("centre", "name", "near_dup_group"))
        group = {row["name"]: row["near_dup_group"] for row in rows if row["centre"] == str(images.centre)}
        if missing := [name for name in images.names if name not in group]:
            raise DataError(f"{index}: no near_dup_group for centre {images.centre}, {missing[0]}")
        labels = [group[name] for name in images.names]
    else:
        thumbnails = F.adaptive_avg_pool2d(images.images.float(), 32).flatten(1).numpy()
        labels = connected_components(squareform(pdist(thumbnails, "correlation")) < 0.03)[1].tolist()
    groups = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    return list(groups.values())


# ------------------------------------------------------------------------------------------ augmentation

AUGMENTATION_DRAWS = 9  # uniform numbers that one image's augmentation takes
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def augment(images, masks, draws):
    """Flips, rotation and colour jitter of a batch, each image by its own nine draws from [0, 1).

    images (B, 3, S, S), or (B, 1, S, S), float in [0, 1]; masks (B, 1, S, S) uint8; draws (B, 9) -> images, masks
    Horizontal flip with probability 1/2, vertical 1/2, rotation by up to 90 degrees either way 1/2, colour 0.3 (RGB).
    """
    images, masks = flip_and_rotate(images, masks, draws[:, :4])
    if images.shape[1] == 1:
        return images, masks
    jittered = jitter_colours(images, draws[:, 5:])
    return torch.where(draws[:, 4, None, None, None] < 0.3, jittered, images), masks


def flip_and_rotate(images, masks, draws):
    """One resampling for all three, with reflected borders: bilinear for images, nearest for masks. draws (B, 4)"""
    flip_x, flip_y = (torch.where(draws[:, i] < 0.5, -1.0, 1.0) for i in (0, 1))
    angle = torch.where(draws[:, 2] < 0.5, (2 * draws[:, 3] - 1) * math.pi / 2, 0.0)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    to_source = torch.stack([flip_x * cos, -flip_x * sin, zero, flip_y * sin, flip_y * cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(to_source, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    masks = F.grid_sample(masks.float(), grid, "nearest", "reflection", align_corners=False)
    return images, masks.to(torch.uint8)


def jitter_colours(images, draws):
    """Brightness, contrast and saturation times 0.8 to 1.2, hue by up to 0.2 of a turn; (B, 3, S, S), (B, 4)."""
    brightness, contrast, saturation = (0.8 + 0.4 * draws[:, i, None, None, None] for i in range(3))
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp(0, 1)
    images = torch.lerp(grey(images), images, saturation).clamp(0, 1)
    return shift_hue(images, 0.4 * draws[:, 3, None, None] - 0.2)


def grey(images):
    """Luma of RGB images: (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def shift_hue(images, turns):
    """Rotate the hue of RGB images (B, 3, H, W) in HSV by turns (B, 1, 1), a full turn being 1."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    sector = torch.where(value == red, (green - blue), torch.where(value == green, blue - red, red - green))
    offset = torch.where(value == red, 0.0, torch.where(value == green, 2.0, 4.0))
    hue = sector / chroma.clamp(min=1e-8) + offset + 6 * turns  # in sixths of a turn
    ramps = [(n + hue) % 6 for n in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in ramps], dim=1)


def normalise(images):
    """RGB in [0, 1] (B, 3, H, W) -> ImageNet's mean 0 and standard deviation 1; grey (B, 1, H, W) as it is."""
    if images.shape[1] == 1:
        return images
    # numbers, not tensors, which would be copied to the device at every step
    channels = zip(images.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
