"""The images: PolypGen from disk or its procedural stand-in, splits, augmentation on the batch.

    data = polypgen("datasets/polypgen", centres=(1, 2, 3, 4, 5, 6), out_centre=6, size=512, tau=150)
    data.train[1].images     # (N, 3, 512, 512) uint8, centre 1's training images

Everything is decoded once into uint8 tensors; a batch becomes float, is augmented and normalised on the
training device. PolypGen (Ali et al., Sci Data 10:75, 2023) is read in its own layout:

    data_C1/images_C1/NAME.jpg    data_C1/masks_C1/NAME_mask.jpg    … and so for centres 2 to 6
    metadata/my_dataDetails_C1.csv …    optional: published size flags (img_name, small_polyp, inv_area)
"""

import csv
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist, squareform
from tqdm import tqdm

POLYPGEN_CENTRES = (1, 2, 3, 4, 5, 6)
POLYPGEN_TAU = 150  # the threshold that the published size flags were made with
RULE_SIZE = 512  # smallness and inverse area are measured on the mask at 512 x 512, whatever the network sees


class DataError(ValueError):
    """Data that cannot be used: the message names the file or option and says what to do."""


@dataclass
class Images:
    """Images of one centre, decoded."""

    centre: int
    names: list
    images: torch.Tensor  # (N, 3, S, S) uint8
    masks: torch.Tensor  # (N, 1, S, S) uint8, 1 = lesion
    inverse_area: torch.Tensor  # (N,) float64, image pixels / lesion pixels at 512 x 512; inf for an empty mask
    small: torch.Tensor  # (N,) bool

    def __len__(self):
        return len(self.names)

    def subset(self, indices):
        """The images at these indices, in their order."""
        tensors, chosen = (self.images, self.masks, self.inverse_area, self.small), torch.tensor(indices, dtype=torch.int64)
        return Images(self.centre, [self.names[i] for i in indices], *(x[chosen] for x in tensors))

    def to(self, device):
        """The same images on a device; the per-image facts too, since batches index them there."""
        tensors = (self.images, self.masks, self.inverse_area, self.small)
        return Images(self.centre, self.names, *(x.to(device) for x in tensors))


@dataclass
class Federation:
    """What the clients hold, by centre number, and the held-out centre."""

    source: str  # where the images come from, for every table, plot and file
    notes: list  # what a reader should know about them: size flags, lesions lost in resizing
    out_test: Images
    train: dict = field(default_factory=dict)
    validation: dict = field(default_factory=dict)
    in_test: dict = field(default_factory=dict)


def polypgen(root, centres=POLYPGEN_CENTRES, out_centre=6, size=512, tau=POLYPGEN_TAU, split="fold", fold=1):
    """PolypGen at root, or the stand-in where root is None, split into clients and a held-out centre.

    centres: those that take part, the held-out one included. split: "fold" (published folds), "centre"
    (published per-centre split) or "grouped" (fold, near-duplicate frames kept together).
    Raises DataError for files that are missing or unreadable and centres without images.
    """
    if root is None:
        source = "PolypGen stand-in"
        drawn = tqdm(centres, desc="drawing the stand-in", unit="centre", leave=False, disable=None)
        loaded, notes = [stand_in_images(centre, size, tau) for centre in drawn], ["size flags by rule"]
    else:
        source = "PolypGen"
        loaded, notes = read_polypgen(Path(root), centres, size, tau)
    if lost := sum(count_as_empty(images) for images in loaded):
        notes.append(f"{lost} lesions vanish at {size}x{size}, so their images count as empty")
    data = Federation(source, notes, out_test=next(images for images in loaded if images.centre == out_centre))
    for images in loaded:
        if images.centre != out_centre:
            units = near_duplicates(root, images) if split == "grouped" else [[i] for i in range(len(images))]
            parts = split_units(units, split, fold)
            for part, indices in zip((data.train, data.validation, data.in_test), parts, strict=True):
                part[images.centre] = images.subset(indices)
    return data


def count_as_empty(images):
    """Treat images whose lesion vanished in resizing as the empty ones they have become. -> their number"""
    lost = (images.masks.flatten(1).amax(1) == 0) & images.inverse_area.isfinite()
    images.inverse_area[lost], images.small[lost] = math.inf, False
    return int(lost.sum())


def fingerprint(federation):
    """A hash of every name, image, mask and size flag, split by split: a run must go on with the data it began with."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (federation.train, federation.validation, federation.in_test, {0: federation.out_test}):
        for images in part.values():
            digest.update(" ".join(images.names).encode())
            for tensor in (images.images, images.masks, images.small):
                digest.update(tensor.numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------ PolypGen on disk


def find_polypgen(root=""):
    """The folder of PolypGen, or None for the stand-in: root "stand-in", or no root and nothing in datasets/polypgen.

    Raises DataError where a folder was given that does not hold PolypGen.
    """
    folder = Path(root or "datasets/polypgen")
    found = root != "stand-in" and any((folder / f"data_C{k}").is_dir() for k in POLYPGEN_CENTRES)
    if root and root != "stand-in" and not found:
        raise DataError(f"--data-root {root}: " + ("no data_C1 to data_C6 in it" if folder.is_dir() else "no such folder"))
    return folder if found else None


def read_polypgen(root, centres, size, tau):
    """Read these centres of PolypGen. -> list of Images, notes on the size flags (list of str)"""
    pairs = [(centre, *pair) for centre in centres for pair in list_pairs(root, centre)]
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes outside the interpreter lock
        jobs = pool.map(lambda pair: read_pair(pair[1], pair[2], size, tau), pairs)
        decoded = list(tqdm(jobs, total=len(pairs), desc="reading PolypGen", unit="image", leave=False, disable=None))
    loaded, flagged = [], 0
    for centre in centres:
        published = read_size_flags(root, centre) if tau == POLYPGEN_TAU else {}
        names, rows = zip(*((image.name, row) for (c, image, _), row in zip(pairs, decoded, strict=True) if c == centre))
        pixels, masks, inverse_areas, by_rule = zip(*rows)
        small = [published.get(name, flag) for name, flag in zip(names, by_rule)]
        flagged += sum(name in published for name in names)
        loaded.append(collect(centre, [Path(name).stem for name in names], pixels, masks, inverse_areas, small))
    return loaded, [f"published size flags for {flagged} of {len(pairs)} images" if flagged else "size flags by rule"]


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


def collect(centre, names, images, masks, inverse_areas, small):
    """Lists of one centre's decoded images -> Images."""
    return Images(
        centre,
        names,
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack(masks)[:, None].astype(np.uint8)),
        torch.tensor(inverse_areas, dtype=torch.float64),
        torch.tensor(small),
    )


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

    images (B, 3, S, S) float in [0, 1]; masks (B, 1, S, S) uint8; draws (B, 9) -> images, masks
    Horizontal flip with probability 1/2, vertical 1/2, rotation by up to 90 degrees either way 1/2, colour 0.3.
    """
    images, masks = flip_and_rotate(images, masks, draws[:, :4])
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
    """RGB in [0, 1] (B, 3, H, W) -> ImageNet's mean 0 and standard deviation 1."""
    # numbers, not tensors, which would be copied to the device at every step
    channels = zip(images.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


# ------------------------------------------------------------------------------------------ the stand-in

# Stylised colonoscopy frames with PolypGen's published lesion statistics. All geometry is in normalised
# coordinates, x and y in [-1, 1], so that a frame shows the same scene at every size.

STAND_IN_SHARE = 0.4  # of PolypGen's numbers of images: a federation that a laptop trains in minutes

# Centre: frames, frames without a polyp, frames with several polyps, and the 5/25/50/75/95 % quantiles
# of the inverse lesion area (image pixels / lesion pixels) over the frames with a polyp.
PUBLISHED = {
    1: (256, 5, 19, (2.8, 7.3, 15.3, 37.2, 103.1)),
    2: (301, 31, 38, (3.6, 8.3, 16.3, 31.2, 71.9)),
    3: (457, 1, 54, (3.6, 8.9, 19.0, 37.0, 104.4)),
    4: (227, 81, 4, (2.8, 10.8, 25.8, 62.6, 355.3)),
    5: (208, 2, 40, (4.8, 10.5, 31.4, 82.6, 294.1)),
    6: (88, 5, 13, (4.4, 9.5, 20.3, 48.5, 175.2)),
}

# Centre: colour cast, gamma (above 1 darkens), vignette, noise, blur (a share of the frame), mean number
# of highlights, and the bounds of the view: on max(|x|, |y|), on |x| + |y| (cuts the corners, as in an
# octagon) and on the distance from the middle (rounds them).
CAMERAS = {
    1: ((1.05, 1.00, 0.97), 1.00, 0.20, 0.012, 0.000, 10, (0.96, 1.50, 2.00)),
    2: ((1.03, 0.98, 0.93), 1.08, 0.30, 0.020, 0.004, 6, (1.00, 2.00, 1.16)),
    3: ((1.04, 1.04, 1.05), 0.93, 0.15, 0.008, 0.000, 16, (1.00, 1.70, 2.00)),
    4: ((1.00, 0.98, 1.04), 1.05, 0.25, 0.025, 0.005, 8, (1.00, 2.00, 2.00)),
    5: ((1.06, 0.96, 0.94), 1.00, 0.35, 0.015, 0.003, 12, (0.92, 2.00, 1.10)),
    6: ((0.97, 1.00, 0.97), 1.10, 0.30, 0.030, 0.006, 5, (0.90, 1.35, 2.00)),
}


def stand_in_images(centre, size, tau):
    """One centre of the stand-in, as if it had been read from disk. -> Images"""
    images, masks = stand_in_polypgen(centre, round(STAND_IN_SHARE * PUBLISHED[centre][0]), size)
    names = [f"stand-in_C{centre}_{i:04d}" for i in range(len(images))]
    nearest = (np.arange(RULE_SIZE) * size) // RULE_SIZE
    at_rule_size = masks[:, nearest][:, :, nearest]
    inverse_areas, small = zip(*((inverse_area(mask), is_small(mask, tau)) for mask in at_rule_size))
    return collect(centre, names, images, masks, inverse_areas, small)


def stand_in_polypgen(centre: int, count: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames of one centre -> images (count, size, size, 3) uint8, masks (count, size, size) bool."""
    plan = plan_polyps(centre, count, np.random.default_rng([seed, centre]))
    frames = [paint_frame(areas, CAMERAS[centre], size, np.random.default_rng([seed, centre, index]))
              for index, areas in enumerate(plan)]
    images, masks = zip(*frames)
    return np.stack(images), np.stack(masks)


def plan_polyps(centre, count, rng):
    """For each frame the areas of its polyps as shares of the frame, largest first; empty for no polyp."""
    frames, empty, several, quantiles = PUBLISHED[centre]
    empty, several = round(count * empty / frames), round(count * several / frames)
    # Evenly spaced levels give a small data set the published quantiles too. Beyond the outer two, the
    # largest lesion fills 1/1.8 of the frame and the smallest is 2.5 times smaller than the 95 % value.
    levels = (rng.permutation(count - empty) + 0.5) / (count - empty)
    knots = np.log([1.8, *quantiles, 2.5 * quantiles[-1]])
    areas = np.exp(-np.interp(levels, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], knots))
    plan = [[area] for area in areas] + [[]] * empty
    for i in range(several):
        # Side polyps are often tiny; 1/2000 of the frame is what a 64 x 64 mask can still hold.
        shares = np.exp(rng.uniform(np.log(0.04), np.log(0.4), size=rng.choice([1, 2], p=[0.8, 0.2])))
        sides = np.clip(shares * areas[i], 1 / 2000, areas[i] / 3)
        plan[i] = [areas[i] - sides.sum(), *sides]
    return [plan[i] for i in rng.permutation(count)]


def paint_frame(areas, camera, size, rng):
    """Polyp areas and a camera -> image (size, size, 3) uint8, mask (size, size) bool."""
    x = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)[None, :]
    y, (side, corner, radius) = x.T, camera[-1]
    view = (np.maximum(abs(x), abs(y)) < side) & (abs(x) + abs(y) < corner) & (np.hypot(x, y) < radius)
    relief, colour = mucosa(x, y, rng)
    mask = np.zeros((size, size), bool)
    for area, (mx, my) in zip(areas, place(areas, rng)):
        reach = outline(x - mx, y - my, rng)
        reach[ndimage.binary_dilation(mask, iterations=1 + size // 64)] = 9  # polyps do not touch
        # The radius at which exactly the wanted number of visible pixels lies within the outline.
        pixels = max(1, round(area * size**2))
        radius = np.partition(reach[view], pixels)[pixels]
        mask |= view & (reach < radius)
        relief, colour = add_polyp(relief, colour, reach / radius, radius, rng)
    scene = colour * shading(relief, rng) + glare(x, y, camera[-2], rng)
    return photograph(scene, x, y, view, camera, rng), mask


def waves(x, y, order, rng):
    """A smooth random field of about unit variance with less than `order` half waves per axis."""
    k = np.arange(order)[:, None]
    weights = rng.normal(size=(order, order)) * (np.hypot(k, k.T) < order)
    weights[0, 0] = 0
    across, down = np.cos(np.pi / 2 * k * (x + 1)), np.cos(np.pi / 2 * k * (y.T + 1))
    return (2 / np.linalg.norm(weights) * down.T @ weights @ across).astype(np.float32)


def mucosa(x, y, rng):
    """The wall of the bowel -> relief (size, size), colour (3, size, size)."""
    # We look down a tube that darkens towards the lumen. Its folds are rings of equal depth: each has a
    # bright crest and hides the wall just behind it in shadow. They come and go around the tube.
    dx, dy = x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)
    bend = 1 + 0.12 * np.cos(3 * np.arctan2(dy, dx) + rng.uniform(0, 6.3)) + 0.12 * waves(x, y, 4, rng)
    distance = np.hypot(dx, dy) * bend
    behind = rng.uniform(0, 1) - rng.uniform(1, 1.7) * np.log(distance + 0.2)
    behind -= np.floor(behind)
    folds = 0.3 * np.exp(8 * (behind - 1)) - 0.6 * np.exp(-5 * behind)
    light = 1 + folds * np.clip(0.5 + 0.6 * waves(x, y, 4, rng), 0, 1)
    light *= 1 - rng.uniform(0.4, 0.9) * np.exp(-((distance / rng.uniform(0.25, 0.6)) ** 2))
    # Vessels run where a random field changes its sign; they come and go too.
    vessels = np.exp(-((waves(x, y, 13, rng) / 0.08) ** 2)) * np.clip(0.4 * waves(x, y, 6, rng), 0, 0.6)
    red = rng.uniform(0.3, 0.6) + 0.12 * waves(x, y, 5, rng) + rng.uniform(0, 1) * vessels
    pale, redder = np.array([[0.93, 0.66, 0.52], [-0.20, -0.34, -0.26]], np.float32)[..., None, None]
    relief = 0.03 * waves(x, y, 6, rng) + 0.0015 * waves(x, y, 28, rng)
    return relief, light * (pale + redder * np.clip(red, 0, 1))


def place(areas, rng):
    """The polyps' middles, each the first random place with room, or the roomiest -> list of (x, y)."""
    radii, middles = np.sqrt(4 / np.pi * np.array(areas)), []
    for radius in radii:
        places = rng.uniform(-0.7, 0.7, size=(20, 2)).astype(np.float32)
        gaps = [np.hypot(*(places - m).T) - r - radius for m, r in zip(middles, radii)]
        middles.append(places[np.argmax(np.min([np.zeros(20), *gaps], axis=0))])
    return middles


def outline(x, y, rng):
    """Distance from a polyp's middle, bent so that the wavy ellipse of its outline is a circle."""
    turn, squeeze = np.float32(rng.uniform(0, np.pi)), np.float32(rng.uniform(0.65, 1))
    along, across = x * np.cos(turn) + y * np.sin(turn), (y * np.cos(turn) - x * np.sin(turn)) / squeeze
    angle = np.arctan2(across, along)
    wobble = sum(rng.normal(0, 0.15 / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 4))
    return np.hypot(along, across) * np.sqrt(squeeze) / (1 + wobble)


def add_polyp(relief, colour, reach, radius, rng):
    """Cover the wall with a tinted dome whose outline is at `reach` 1 -> relief, colour."""
    # How well it stands out does not depend on its size: a small polyp is hard only for being small.
    visible = rng.uniform(0.5, 1)
    tint = np.array([[0.40, 0.16, 0.32], [0.42, 0.43, 0.53]], np.float32)[rng.integers(2)]  # pink or pale
    skin = colour.mean(axis=(1, 2)) + visible * tint
    cover = 0.9 * np.clip((1.06 - reach) / 0.12, 0, 1)
    shadow = rng.uniform(0, 0.4) * visible * np.exp(-(((reach - 1.1) / 0.15) ** 2))
    dome = 0.35 * visible * radius * np.clip(1 - reach**2, 0, 1)
    return relief + dome, colour * ((1 - shadow) * (1 - cover)) + skin[:, None, None] * cover


def shading(relief, rng):
    """How much light each slope throws back to the camera -> (size, size)."""
    down, across = np.gradient(relief, 2 / len(relief))
    tilt = rng.normal(0, 0.4, size=2).astype(np.float32)
    return np.clip((1 + tilt[0] * across + tilt[1] * down) / np.sqrt(1 + across**2 + down**2), 0.15, 1.5)


def glare(x, y, highlights, rng):
    """What looks like a polyp and is none: specular highlights and bubbles -> (size, size)."""
    spots = rng.uniform(-1, 1, size=(rng.poisson(highlights), 2))
    width = np.exp(rng.normal(-4, 0.4, size=(len(spots), 1)) + rng.normal(0, 0.25, size=spots.shape))
    across = np.exp(-(((x - spots[:, :1]) / width[:, :1]) ** 2))
    down = np.exp(-(((y.T - spots[:, 1:]) / width[:, 1:]) ** 2))
    light = np.clip(1.5 * down.T @ across - 0.2, 0, 1).astype(np.float32)
    # Bubbles are as round as polyps and as diverse in size; their rims have a brighter side.
    for _ in range(rng.poisson(2.5)):
        bx, by, radius = rng.uniform(-1, 1), rng.uniform(-1, 1), 0.025 * 10 ** rng.uniform(0, 1)
        dx, dy = (x - bx) / radius, (y - by) / radius
        rim = np.exp(-(((np.hypot(dx, dy) - 1) / 0.12) ** 2))
        light += rng.uniform(0.05, 0.3) * rim * (0.6 + rng.uniform(-0.4, 0.4) * (dx + dy))
    return light


def photograph(scene, x, y, view, camera, rng):
    """What the centre's camera makes of a scene (3, size, size) -> image (size, size, 3) uint8."""
    cast, gamma, vignette, noise, blur, *_ = camera
    lamp = rng.uniform(0.85, 1.15) * (1 - vignette * (x**2 + y**2))
    image = scene * lamp * np.array(cast, np.float32)[:, None, None]
    image = ndimage.gaussian_filter(image, (0, blur * x.size, blur * x.size))
    image = np.clip(image, 0, 1) ** gamma
    # The sensor's noise is the only draw that depends on the size, and so the last.
    image += noise * rng.standard_normal(image.shape, np.float32)
    return (255 * view * np.clip(image, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
