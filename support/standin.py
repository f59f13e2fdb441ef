"""Drawn data sets that take the place of PolypGen and LiTS where those are not at hand.

They have the published sizes of lesions, six camera styles or a scanner's noise, and things that
look like lesions and are none. Small polyps are about as faint, and as soft, as PolypGen's.
Training on them shows that everything works, and how it looks; its scores say nothing about real
images.

The last section writes them as folders of files in the layout of the data set that they stand for,
so that everything else reads them as it reads the real thing. STAND-IN.txt in a folder says what it
is.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.special import ndtri
from tqdm import tqdm

from support import files, volumes
from support.errors import UserError

# ---------------------------------------------------------------------------------------- PolypGen

# Stylised colonoscopy frames with PolypGen's published lesion statistics. All geometry is in
# normalised coordinates, x and y in [-1, 1], so that a frame shows the same scene at every size.

FOLDS = 2  # short ones that look like polyps: their mean number in a frame
ROUND, LONG = (0.65, 1), (0.2, 0.5)  # bounds of width / length: of lesions, and of short folds
INSET = np.array([0.15, 0.72, 0.56], np.float32)  # colour of the box in some cameras' frames
SHARE = 0.4  # of PolypGen's numbers of images: a federation that a laptop trains in minutes


class Centre(NamedTuple):
    """What is known of a centre's frames."""

    frames: int
    empty: int  # frames without a polyp
    several: int  # frames with several polyps

    # 5/25/50/75/95 % quantiles of image pixels / lesion pixels, over the frames with a polyp.
    quantiles: tuple[float, float, float, float, float]


POLYPGEN = {
    "C1": Centre(256, 5, 19, (2.8, 7.3, 15.3, 37.2, 103.1)),
    "C2": Centre(301, 31, 38, (3.6, 8.3, 16.3, 31.2, 71.9)),
    "C3": Centre(457, 1, 54, (3.6, 8.9, 19.0, 37.0, 104.4)),
    "C4": Centre(227, 81, 4, (2.8, 10.8, 25.8, 62.6, 355.3)),
    "C5": Centre(208, 2, 40, (4.8, 10.5, 31.4, 82.6, 294.1)),
    "C6": Centre(88, 5, 13, (4.4, 9.5, 20.3, 48.5, 175.2)),
}


class Camera(NamedTuple):
    """How a centre's frames look."""

    gain: tuple[float, float, float]  # of red, green and blue
    spread: float  # of the gains from frame to frame
    noise: float
    blur: float  # a share of the frame
    highlights: int  # their mean number
    inset: bool  # whether a box beside the view shows the endoscope's course

    # The view begins at this x: text has its place to the left of it. Its corners are cut as in an
    # octagon (a bound on |x| + |y|, with x in [-1, 1] across the view) and rounded (on the distance
    # from its middle).
    left: float
    corner: float
    radius: float


# Gains, spreads and views are chosen so that the centres' colours have about PolypGen's means and
# deviations.
CAMERAS = {
    "C1": Camera((1.05, 1.03, 0.89), 0.00, 0.006, 0.000, 10, False, -1.00, 1.65, 2.00),
    "C2": Camera((0.85, 0.88, 0.85), 0.22, 0.010, 0.004, 6, False, -0.75, 2.00, 1.16),
    "C3": Camera((0.95, 0.97, 0.98), 0.12, 0.004, 0.000, 16, False, -0.80, 1.65, 2.00),
    "C4": Camera((1.02, 1.05, 1.08), 0.06, 0.012, 0.005, 8, True, -0.40, 1.70, 2.00),
    "C5": Camera((0.86, 0.82, 0.78), 0.08, 0.008, 0.003, 12, True, -0.40, 1.60, 2.00),
    "C6": Camera((0.98, 1.02, 0.77), 0.20, 0.014, 0.006, 5, False, -0.50, 1.55, 2.00),
}


def polypgen_frames(
    centre: str, count: int, size: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Frames of one centre -> images (count, size, size, 3) uint8, masks (count, size, size) bool.

    The same centre, count and seed are the same scenes, at every size.
    """
    number = number_of(centre)
    plan = plan_polyps(POLYPGEN[centre], count, np.random.default_rng([seed, number]))

    images = np.empty((count, size, size, 3), np.uint8)
    masks = np.empty((count, size, size), bool)
    for i, areas in enumerate(plan):
        rng = np.random.default_rng([seed, number, i])
        images[i], masks[i] = paint_frame(areas, CAMERAS[centre], size, rng)
    return images, masks


def number_of(centre: str) -> int:
    """C1 -> 1, for the seed."""
    return int(centre.removeprefix("C"))


def plan_polyps(of: Centre, count: int, rng: np.random.Generator) -> list[list[float]]:
    """For each frame the areas of its polyps as shares of the frame, largest first."""
    empty = round(count * of.empty / of.frames)
    several = round(count * of.several / of.frames)

    # Evenly spaced levels give a small data set the published quantiles too. Beyond the outer two,
    # the largest lesion fills 1/1.8 of the frame, and the smallest is 2.5 times smaller than the
    # 95 % value.
    levels = (rng.permutation(count - empty) + 0.5) / (count - empty)
    inverse = np.log([1.8, *of.quantiles, 2.5 * of.quantiles[-1]])
    areas = np.exp(-np.interp(levels, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], inverse))
    plan = [[area] for area in areas] + [[]] * empty

    for i in range(several):
        sides = rng.choice([1, 2], p=[0.8, 0.2])
        shares = np.exp(rng.uniform(np.log(0.04), np.log(0.4), size=sides))
        # Side polyps are often tiny; 1/2000 of the frame is what a 64 x 64 mask can still hold.
        side_areas = np.clip(shares * areas[i], 1 / 2000, areas[i] / 3)
        plan[i] = [areas[i] - side_areas.sum(), *side_areas]

    return [plan[i] for i in rng.permutation(count)]


def paint_frame(
    areas: Sequence[float], camera: Camera, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Areas of polyps and a camera -> image (size, size, 3) uint8, mask (size, size) bool."""
    x, y = coordinates(size)
    view = view_of(camera, x, y)

    relief, colour = mucosa(x, y, rng)
    relief, colour = add_folds(relief, colour, x, y, rng)
    mask = np.zeros((size, size), bool)
    for area, (mx, my) in zip(areas, place(areas, camera, rng), strict=True):
        # Polyps do not touch.
        reach = outline(x - mx, y - my, rng)
        taken = ndimage.binary_dilation(mask, iterations=1 + size // 64)
        reach[taken] = 9

        # The radius at which exactly the wanted number of visible pixels lies within the outline.
        pixels = max(1, round(area * size**2))
        radius = np.partition(reach[view], pixels)[pixels]
        mask |= view & (reach < radius)
        relief, colour = add_dome(relief, colour, reach / radius, radius, rng)

    lit = colour * shading(relief, rng)
    scene = lit + glare(x, y, camera.highlights, rng)
    return photograph(scene, x, y, view, camera, rng), mask


def coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The middles of pixels, x (1, size) and y (size, 1), in [-1, 1]."""
    x = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)[None, :]
    return x, x.T


def view_of(camera: Camera, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a camera's frames show anything -> (size, size) bool."""
    middle = (1 + camera.left) / 2
    across = abs(x - middle) / (1 - middle)
    view = (across < 1) & (across + abs(y) < camera.corner)
    return view & (np.hypot(across, y) < camera.radius)


def waves(x: np.ndarray, y: np.ndarray, order: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth random field of about unit variance with less than `order` half waves per axis."""
    k = np.arange(order)[:, None]
    weights = rng.normal(size=(order, order)) * (np.hypot(k, k.T) < order)
    weights[0, 0] = 0

    across = np.cos(np.pi / 2 * k * (x + 1))
    down = np.cos(np.pi / 2 * k * (y.T + 1))
    field = 2 / np.linalg.norm(weights) * down.T @ weights @ across
    return field.astype(np.float32)


def mucosa(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The wall of the bowel -> relief (size, size), colour (3, size, size)."""
    # We look down a tube that darkens towards the lumen.
    dx = x - rng.uniform(-1, 1)
    dy = y - rng.uniform(-1, 1)
    bend = 1 + 0.12 * np.cos(3 * np.arctan2(dy, dx) + rng.uniform(0, 6.3))
    bend = bend + 0.12 * waves(x, y, 4, rng)
    distance = np.hypot(dx, dy) * bend

    # Its folds are rings of equal depth: each has a bright crest and hides the wall just behind it
    # in shadow. They come and go around the tube.
    phase = rng.uniform(0, 1)
    behind = phase - rng.uniform(1, 2.5) * np.log(distance + 0.2)
    behind -= np.floor(behind)
    folds = 0.3 * np.exp(8 * (behind - 1)) - 0.6 * np.exp(-5 * behind)
    light = 1 + folds * np.clip(0.5 + 0.6 * waves(x, y, 4, rng), 0, 1)
    depth = rng.uniform(0.5, 1)
    lumen = rng.uniform(0.3, 0.9)
    light *= 1 - depth * np.exp(-((distance / lumen) ** 2))

    # Unevenness at every scale, so that whatever a lesion's size is, the wall has spots of it.
    for order, strength in ((3, 0.15), (8, 0.08), (20, 0.05)):
        light *= np.exp(strength * waves(x, y, order, rng))

    # Vessels run where a random field changes its sign; they come and go too.
    vessels = np.exp(-((waves(x, y, 13, rng) / 0.08) ** 2))
    vessels = vessels * np.clip(0.4 * waves(x, y, 6, rng), 0, 0.6)

    # The colour between a pale and a redder wall.
    red = rng.uniform(0.3, 0.6) + 0.12 * waves(x, y, 5, rng)
    red = np.clip(red + rng.uniform(0, 1) * vessels, 0, 1)
    pale = np.array([0.80, 0.58, 0.46], np.float32)[:, None, None]
    redder = np.array([-0.15, -0.28, -0.22], np.float32)[:, None, None]

    relief = 0.03 * waves(x, y, 6, rng)
    relief = relief + 0.0015 * waves(x, y, 28, rng)
    return relief, light * (pale + redder * red)


def place(areas: Sequence[float], camera: Camera, rng: np.random.Generator) -> list[np.ndarray]:
    """The polyps' middles (x, y), each the first random place with room, or the roomiest."""
    radii = np.sqrt(4 / np.pi * np.array(areas))
    middles = []
    for radius in radii:
        places = rng.uniform(-0.7, 0.7, size=(20, 2)).astype(np.float32)
        places[:, 0] += (1 - places[:, 0]) * (1 + camera.left) / 2  # from the frame to the view

        # Room is the distance to the nearest polyp, and no more of it is wanted than enough.
        room = np.zeros(20)
        for middle, other in zip(middles, radii, strict=False):
            dx, dy = (places - middle).T
            room = np.minimum(room, np.hypot(dx, dy) - other - radius)
        middles.append(places[np.argmax(room)])
    return middles


def outline(
    x: np.ndarray,
    y: np.ndarray,
    rng: np.random.Generator,
    widths: tuple[float, float] = ROUND,
) -> np.ndarray:
    """Distance from a lesion's middle, bent so that the wavy ellipse of its outline is a circle.

    widths: bounds of the ellipse's width / length
    """
    turn = np.float32(rng.uniform(0, np.pi))
    squeeze = np.float32(rng.uniform(*widths))
    along = x * np.cos(turn) + y * np.sin(turn)
    across = (y * np.cos(turn) - x * np.sin(turn)) / squeeze

    angle = np.arctan2(across, along)
    wobble = 0
    for k in (2, 3, 4):
        strength = rng.normal(0, 0.15 / k)
        wobble = wobble + strength * np.cos(k * angle + rng.uniform(0, 6.3))
    return np.hypot(along, across) * np.sqrt(squeeze) / (1 + wobble)


def add_folds(
    relief: np.ndarray, colour: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Domes that are no polyps: of their skin and sizes, but longer -> relief, colour."""
    for _ in range(rng.poisson(FOLDS)):
        mx = rng.uniform(-1, 1)
        my = rng.uniform(-1, 1)
        radius = 0.05 * 10 ** rng.uniform(0, 1)
        reach = outline(x - mx, y - my, rng, LONG)
        relief, colour = add_dome(relief, colour, reach / radius, radius, rng)
    return relief, colour


def add_dome(
    relief: np.ndarray,
    colour: np.ndarray,
    reach: np.ndarray,
    radius: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Cover the wall with a tinted dome whose outline is at `reach` 1 -> relief, colour."""
    # A small polyp is not only small: it is flat, and hardly differs from the wall around it. In
    # PolypGen a tenth of the area goes with about half of the contrast.
    visible = rng.uniform(0.5, 1) * min(1, (radius / 0.45) ** 0.7)

    # It is of the wall's colour, but nearer to the lamp.
    bright = rng.uniform(1.4, 2.5)
    tint = bright * np.exp(rng.normal(0, 0.08, size=3)).astype(np.float32)
    skin = colour.mean(axis=(1, 2)) * tint

    # Its outline is as soft as that of a large one, and so the softer for its size.
    softness = min(1, rng.uniform(0.02, 0.06) / radius)
    cover = visible * np.clip((1 + softness - reach) / (2 * softness), 0, 1)
    shadow = rng.uniform(0, 0.4) * visible * np.exp(-(((reach - 1.1) / 0.15) ** 2))
    dome = 0.35 * visible * radius * np.clip(1 - reach**2, 0, 1)
    covered = colour * ((1 - shadow) * (1 - cover)) + skin[:, None, None] * cover
    return relief + dome, covered


def shading(relief: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How much light each slope throws back to the camera -> (size, size)."""
    down, across = np.gradient(relief, 2 / len(relief))
    tilt_x, tilt_y = rng.normal(0, 0.4, size=2).astype(np.float32)
    towards_camera = 1 + tilt_x * across + tilt_y * down
    steepness = np.sqrt(1 + across**2 + down**2)
    return np.clip(towards_camera / steepness, 0.15, 1.5)


def glare(x: np.ndarray, y: np.ndarray, highlights: int, rng: np.random.Generator) -> np.ndarray:
    """What looks like a polyp and is none: specular highlights and bubbles -> (size, size)."""
    spots = rng.uniform(-1, 1, size=(rng.poisson(highlights), 2))
    width = rng.normal(-4, 0.4, size=(len(spots), 1))
    width = np.exp(width + rng.normal(0, 0.25, size=spots.shape))
    across = np.exp(-(((x - spots[:, :1]) / width[:, :1]) ** 2))
    down = np.exp(-(((y.T - spots[:, 1:]) / width[:, 1:]) ** 2))
    light = np.clip(1.5 * down.T @ across - 0.2, 0, 1).astype(np.float32)

    # Bubbles are as round as polyps and as diverse in size; their rims have a brighter side.
    for _ in range(rng.poisson(2.5)):
        bx = rng.uniform(-1, 1)
        by = rng.uniform(-1, 1)
        radius = 0.025 * 10 ** rng.uniform(0, 1)
        dx = (x - bx) / radius
        dy = (y - by) / radius
        rim = np.exp(-(((np.hypot(dx, dy) - 1) / 0.12) ** 2))
        strength = rng.uniform(0.05, 0.3)
        light += strength * rim * (0.6 + rng.uniform(-0.4, 0.4) * (dx + dy))
    return light


def photograph(
    scene: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    view: np.ndarray,
    camera: Camera,
    rng: np.random.Generator,
) -> np.ndarray:
    """What the centre's camera makes of a scene (3, size, size) -> image (size, size, 3) uint8."""
    exposure = np.exp(rng.normal(0, camera.spread))
    gain = exposure * np.exp(rng.normal(0, camera.spread / 3, size=3)) * camera.gain
    image = scene * gain.astype(np.float32)[:, None, None]

    blur = camera.blur * x.size
    image = ndimage.gaussian_filter(image, (0, blur, blur))

    # What is no part of the view is black, but for the box.
    image *= view
    if camera.inset:
        image[:, (x < camera.left) & (y > -camera.left)] = INSET[:, None]

    # The sensor's noise is the only draw that depends on the size, and so the last.
    image += camera.noise * view * rng.standard_normal(image.shape, np.float32)
    return (255 * np.clip(image, 0, 1)).astype(np.uint8).transpose(1, 2, 0)


# -------------------------------------------------------------------------------------------- LiTS

# CT volumes of an upper abdomen, each with one tumour in the liver.

SIDE = 320  # pixels: a slice has room for more than 50 of tumour that are less than 1/1000 of it
MEDIAN = 150  # inverse area; with the share of small slices it gives a log-normal distribution
ENDS = 2  # slices without a tumour at either end of a volume

# Hounsfield units.
AIR, FAT, ORGAN, LIVER, VESSEL, CYST, SPLEEN, BONE = -1000, -90, 30, 110, 160, 10, 100, 500
NOISE = 14
NOISE_STEP = 14  # noise is rounded to steps, so that files stay small


class Client(NamedTuple):
    """A client's volumes, fewer than LiTS has."""

    volumes: int
    slices: int  # with more than 50 pixels of tumour
    small: float  # the share of them in which it covers at most 1/1000, as published


# Published: 30, 25, 27, 24, 11 volumes with 1476, 688, 800, 2823, 825 such slices.
LITS = {
    "C1": Client(12, 120, 0.268),
    "C2": Client(10, 56, 0.199),
    "C3": Client(11, 65, 0.199),
    "C4": Client(10, 200, 0.197),
    "C5": Client(5, 65, 0.118),
}


def lits_volumes(centre: str, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A client's volumes, one at a time.

    -> HU (H, W, slices) int16, labels (H, W, slices) uint8: 1 liver, 2 tumour
    """
    volumes, slices, small = LITS[centre]
    client = number_of(centre)
    rng = np.random.default_rng([seed, client])

    # Evenly spaced levels: also a small data set has the published share of small slices.
    levels = (rng.permutation(slices) + 0.5) / slices
    spread = np.log(1000 / MEDIAN) / ndtri(1 - small)
    inverse = np.exp(np.log(MEDIAN) + spread * ndtri(levels))
    areas = 1 / np.clip(inverse, 12, SIDE**2 / 60)

    for number, areas_here in enumerate(np.array_split(areas, volumes)):
        # Slice by slice a tumour grows, and shrinks again.
        ascending = np.sort(areas_here)
        profile = np.concatenate([ascending[::2], ascending[1::2][::-1]])
        yield paint_volume(profile, np.random.default_rng([seed, client, number]))


class Anatomy(NamedTuple):
    """Where things are in a volume: shapes are what lies below a level of a field (H, W)."""

    body: np.ndarray  # below 1, the outer layer of it fat
    liver: np.ndarray
    tumour: np.ndarray
    spleen: np.ndarray
    cysts: list[np.ndarray]
    spine: np.ndarray
    vessels: np.ndarray  # bool
    contrast: float  # how much darker than the liver a tumour is, in HU


def paint_volume(areas: Sequence[float], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive areas of a tumour -> HU and labels, with two slices more at either end."""
    anatomy = draw_anatomy(rng)
    depth = len(areas) + 2 * ENDS
    hu = np.empty((SIDE, SIDE, depth), np.int16)
    labels = np.empty((SIDE, SIDE, depth), np.uint8)

    for k in range(depth):
        bulge = 1 + 0.12 * np.cos(np.pi * (k / depth - 0.4))
        liver = (anatomy.liver < bulge) & (anatomy.body < 0.86)

        tumour = np.zeros_like(liver)
        if ENDS <= k < depth - ENDS:
            # The radius at which exactly the wanted number of the liver's pixels lies within it.
            pixels = max(1, round(areas[k - ENDS] * liver.size))
            reach = np.where(liver, anatomy.tumour, 9)
            tumour = reach < np.partition(reach.ravel(), pixels)[pixels]

        scan = scan_slice(anatomy, liver, tumour, rng)
        hu[..., k] = np.clip(np.round(scan), -1024, 1500)
        labels[..., k] = liver.astype(np.uint8) + tumour
    return hu, labels


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """One patient."""
    x, y = coordinates(SIDE)
    body = np.hypot(x / rng.uniform(0.8, 0.92), y / rng.uniform(0.62, 0.72))
    body = body + 0.03 * waves(x, y, 5, rng)

    liver_x = x - rng.uniform(-0.36, -0.28)
    liver_y = y - rng.uniform(-0.12, 0.06)
    liver = np.hypot(liver_x / 0.5, liver_y / 0.46)
    liver = liver + 0.1 * waves(x, y, 5, rng)
    tumour_x = liver_x - rng.uniform(-0.15, 0.15)
    tumour_y = liver_y - rng.uniform(-0.15, 0.15)
    tumour = outline(tumour_x, tumour_y, rng)

    spleen = np.hypot((x - 0.5) / 0.2, (y - 0.12) / 0.25)
    cysts = []
    for _ in range(4):
        cyst = np.hypot(x - rng.uniform(0.05, 0.6), y - rng.uniform(-0.35, 0.05))
        cysts.append(cyst / rng.uniform(0.02, 0.16))
    spine = np.hypot(x, (y - 0.48) / 0.9) / 0.11

    vessels = abs(waves(x, y, 9, rng)) < 0.05
    contrast = rng.uniform(45, 70)
    return Anatomy(body, liver, tumour, spleen, cysts, spine, vessels, contrast)


def scan_slice(
    anatomy: Anatomy, liver: np.ndarray, tumour: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """What the scanner makes of a slice -> HU (H, W) float32. liver, tumour (H, W) bool"""
    inside = np.where(anatomy.body < 0.88, ORGAN, FAT)
    scan = np.where(anatomy.body < 1, inside, AIR).astype(np.float32)

    scan[anatomy.spleen < 1] = SPLEEN
    for cyst in anatomy.cysts:
        scan[(cyst < 1) & (anatomy.body < 0.86)] = CYST
    scan[liver] = np.where(anatomy.vessels, VESSEL, LIVER)[liver]
    scan[tumour] = LIVER - anatomy.contrast
    scan[anatomy.spine < 1] = BONE

    noise = NOISE * rng.standard_normal(scan.shape, np.float32)
    return ndimage.gaussian_filter(scan, 0.7) + NOISE_STEP * np.round(noise / NOISE_STEP)


# -------------------------------------------------------------------------------- folders of files

# A file is written whole or not at all, and drawn only where it is not there. So drawing may be
# interrupted, and several processes may draw at once.

MARK = "STAND-IN.txt"  # lies in a folder of drawn files, so that nobody takes them for real ones
VERSION = "(version 2)"  # of the drawings
FLAG_SIZE = 512  # PolypGen's size flags were made at 512 x 512


def draw_polypgen(
    cache: str, centres: Sequence[str], size: int, is_small: Callable[[np.ndarray], bool]
) -> Path:
    """Write the frames of these centres in PolypGen's layout, where they are not there yet.

    cache: by default datasets/polypgen-stand-in; is_small: the rule of the size flags beside the
    frames, for a mask (512, 512) bool. -> the folder of the frames of this size
    Raises UserError for a folder that cannot be written, or that holds other images.
    """
    folder = Path(cache or "datasets/polypgen-stand-in") / f"{size}px"
    missing = [centre for centre in centres if lacks_files(folder, centre)]

    with writing_to(folder):
        claim(folder, list(folder.glob("data_C*")), "images", "PolypGen")
        bar = tqdm(missing, desc="drawing frames", unit="centre", leave=False, disable=None)
        for centre in bar:
            draw_centre(folder, centre, size, is_small)
    return folder


def frames_of(centre: str) -> int:
    """How many frames of a centre are drawn."""
    return round(SHARE * POLYPGEN[centre].frames)


def frame_files(folder: Path, centre: str, i: int) -> tuple[Path, Path]:
    """Where a frame and its mask lie."""
    name = f"stand-in_{centre}_{i:04d}"
    centre_folder = folder / f"data_{centre}"
    image = centre_folder / f"images_{centre}" / f"{name}.png"
    mask = centre_folder / f"masks_{centre}" / f"{name}_mask.png"
    return image, mask


def flags_file(folder: Path, centre: str) -> Path:
    return folder / "metadata" / f"my_dataDetails_{centre}.csv"


def lacks_files(folder: Path, centre: str) -> bool:
    """Whether a centre has not been drawn, or not all of it."""
    paths = [flags_file(folder, centre)]
    for i in range(frames_of(centre)):
        paths.extend(frame_files(folder, centre, i))
    return not all(path.exists() for path in paths)


def draw_centre(
    folder: Path, centre: str, size: int, is_small: Callable[[np.ndarray], bool]
) -> None:
    """Write one centre's frames, masks and size flags."""
    images, masks = polypgen_frames(centre, frames_of(centre), size)
    at_flag_size = np.arange(FLAG_SIZE) * size // FLAG_SIZE  # nearest neighbours

    flags = []
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        image_path, mask_path = frame_files(folder, centre, i)
        save_png(image_path, image)
        save_png(mask_path, np.where(mask, np.uint8(255), np.uint8(0)))
        small = is_small(mask[at_flag_size][:, at_flag_size])
        flags.append({"img_name": image_path.name, "small_polyp": small})
    files.write_text(flags_file(folder, centre), files.to_csv(flags))


def save_png(path: Path, pixels: np.ndarray) -> None:
    if not path.exists():
        with files.replacing(path) as new:
            Image.fromarray(pixels).save(new, "PNG", compress_level=1)


def lits_folder(cache: str) -> Path:
    """Where the drawn volumes lie."""
    return Path(cache or "datasets/lits-stand-in")


def draw_lits(cache: str, numbers: Mapping[str, Sequence[int]]) -> Path:
    """Write the volumes of these clients with LiTS's names, where they are not there yet.

    cache: by default datasets/lits-stand-in; numbers: {client: the numbers of its volumes}, of
    which the first ones are used. -> the folder of the volumes
    Raises UserError for a folder that cannot be written, or that holds other volumes.
    """
    folder = lits_folder(cache)
    missing = {}
    for centre in numbers:
        used = numbers[centre][: LITS[centre].volumes]
        if lacks_volumes(folder, used):
            missing[centre] = used

    with writing_to(folder):
        claim(folder, volumes.nifti_files(folder), "volumes", "LiTS")
        for centre, used in missing.items():
            drawn = lits_volumes(centre)
            for number in tqdm(
                used, desc=f"drawing {centre}", unit="volume", leave=False, disable=None
            ):
                hu, labels = next(drawn)
                volume_path, segmentation_path = volume_files(folder, number)
                save_nifti(volume_path, hu)
                save_nifti(segmentation_path, labels)
    return folder


def lacks_volumes(folder: Path, numbers: Sequence[int]) -> bool:
    """Whether any of these volumes has not been drawn."""
    paths = []
    for number in numbers:
        paths.extend(volume_files(folder, number))
    return not all(path.exists() for path in paths)


def volume_files(folder: Path, number: int) -> tuple[Path, Path]:
    """Where a volume and its segmentation lie."""
    return folder / f"volume-{number}.nii.gz", folder / f"segmentation-{number}.nii.gz"


def save_nifti(path: Path, voxels: np.ndarray) -> None:
    pixel = 0.8 * 512 / SIDE  # mm
    if not path.exists():
        with files.replacing(path) as new:
            affine = np.diag([-pixel, -pixel, 5.0, 1.0])
            nibabel.Nifti1Image(voxels, affine).to_filename(new)


def is_marked(folder: Path) -> bool:
    """Whether the files in a folder were drawn."""
    return (folder / MARK).exists()


def claim(folder: Path, held: Sequence, kind: str, dataset: str) -> None:
    """Say in a folder that its files are drawn.

    held: what is in it; kind: images or volumes. Raises UserError where these were not drawn, or
    were drawn by another version.
    """
    mark = folder / MARK
    if not mark.exists():
        if held:
            raise UserError(
                f"{folder} holds {kind} that are not the stand-in's: choose another folder with "
                "--cache"
            )
        files.write_text(mark, f"Drawn by FedGS {VERSION}: these {kind} are not {dataset}.\n")
    elif VERSION not in mark.read_text(errors="replace"):
        raise UserError(
            f"{folder} holds a stand-in that another version of FedGS has drawn: delete it, or "
            "choose another folder with --cache"
        )


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn errors of writing into one that says what to do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(
            f"cannot write the stand-in into {folder} ({why}): choose another folder with --cache"
        ) from error
