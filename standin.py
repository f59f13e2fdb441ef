"""Drawn data sets that take the place of PolypGen and LiTS where those are not at hand.

They have the published sizes of lesions, six camera styles or a scanner's noise, and things that look like lesions and
are none. Training on them shows that everything works, and how it looks; its scores say nothing about real images.
"""

import numpy as np
from scipy import ndimage
from scipy.special import ndtri

# --------------------------------------------------------------------------------------------- PolypGen

# Stylised colonoscopy frames with PolypGen's published lesion statistics. All geometry is in normalised
# coordinates, x and y in [-1, 1], so that a frame shows the same scene at every size.

STAND_IN_SHARE = 0.4  # of PolypGen's numbers of images: a federation that a laptop trains in minutes

# Centre: frames, frames without a polyp, frames with several polyps, and the 5/25/50/75/95 % quantiles
# of the inverse lesion area (image pixels / lesion pixels) over the frames with a polyp.
POLYPGEN = {
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


def polypgen_frames(centre, count, size, seed=0):
    """Frames of one centre -> images (count, size, size, 3) uint8, masks (count, size, size) bool."""
    plan = plan_polyps(centre, count, np.random.default_rng([seed, centre]))
    frames = [paint_frame(areas, CAMERAS[centre], size, np.random.default_rng([seed, centre, index]))
              for index, areas in enumerate(plan)]
    images, masks = zip(*frames)
    return np.stack(images), np.stack(masks)


def plan_polyps(centre, count, rng):
    """For each frame the areas of its polyps as shares of the frame, largest first; empty for no polyp."""
    frames, empty, several, quantiles = POLYPGEN[centre]
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

# ------------------------------------------------------------------------------------------------- LiTS

# CT volumes of an upper abdomen, each with one tumour in the liver. Numbers are Hounsfield units.

# Client: volumes, slices with more than 50 pixels of tumour, and the share of them in which it covers at most 1/1000
# (published: 30, 25, 27, 24, 11 volumes with 1476, 688, 800, 2823, 825 such slices).
LITS = {1: (12, 120, 0.268), 2: (10, 56, 0.199), 3: (11, 65, 0.199), 4: (10, 200, 0.197), 5: (5, 65, 0.118)}
LITS_SIDE = 320  # pixels: a slice has room for more than 50 of tumour that are less than 1/1000 of it
LITS_MEDIAN = 150  # inverse area; with the share above it gives the spread of a log-normal distribution
AIR, FAT, ORGAN, LIVER, VESSEL, CYST, BONE = -1000, -90, 30, 110, 160, 10, 500
NOISE, NOISE_STEP = 14, 14  # noise is rounded to steps, so that files stay small


def lits_volumes(client, seed=0):
    """A client's volumes, one at a time -> (HU (H, W, slices) int16, labels (H, W, slices) uint8: 1 liver, 2 tumour)"""
    volumes, slices, share = LITS[client]
    rng = np.random.default_rng([seed, client])
    # Evenly spaced levels: also a small data set has the published share of small slices.
    spread = np.log(1000 / LITS_MEDIAN) / ndtri(1 - share)
    inverse = np.exp(np.log(LITS_MEDIAN) + spread * ndtri((rng.permutation(slices) + 0.5) / slices))
    areas = 1 / np.clip(inverse, 12, LITS_SIDE**2 / 60)
    for number, mine in enumerate(np.array_split(areas, volumes)):
        # Slice by slice a tumour grows, and shrinks again.
        mine = np.sort(mine)
        yield paint_volume(np.concatenate([mine[::2], mine[1::2][::-1]]), np.random.default_rng([seed, client, number]))


def paint_volume(areas, rng):
    """Consecutive tumour areas -> HU and labels, with two slices more at either end."""
    empty = 2
    depth = len(areas) + 2 * empty
    x = ((2 * np.arange(LITS_SIDE) + 1) / LITS_SIDE - 1).astype(np.float32)[None, :]
    y = x.T
    around = np.hypot(x / rng.uniform(0.8, 0.92), y / rng.uniform(0.62, 0.72)) + 0.03 * waves(x, y, 5, rng)
    lx, ly = rng.uniform(-0.36, -0.28), rng.uniform(-0.12, 0.06)
    liver_reach = np.hypot((x - lx) / 0.5, (y - ly) / 0.46) + 0.1 * waves(x, y, 5, rng)
    tumour_reach = outline(x - lx - rng.uniform(-0.15, 0.15), y - ly - rng.uniform(-0.15, 0.15), rng)
    spleen = np.hypot((x - 0.5) / 0.2, (y - 0.12) / 0.25)
    cysts = [np.hypot(x - rng.uniform(0.05, 0.6), y - rng.uniform(-0.35, 0.05)) / rng.uniform(0.02, 0.16) for _ in range(4)]
    spine = np.hypot(x, (y - 0.48) / 0.9) / 0.11
    vessels = abs(waves(x, y, 9, rng)) < 0.05
    contrast = rng.uniform(45, 70)  # how much darker than the liver a tumour is
    hu, labels = np.empty((LITS_SIDE, LITS_SIDE, depth), np.int16), np.empty((LITS_SIDE, LITS_SIDE, depth), np.uint8)
    for k in range(depth):
        bulge = 1 + 0.12 * np.cos(np.pi * (k / depth - 0.4))
        liver = (liver_reach < bulge) & (around < 0.86)
        tumour = np.zeros_like(liver)
        if empty <= k < depth - empty:
            # The radius at which exactly the wanted number of the liver's pixels lies within the outline.
            pixels = max(1, round(areas[k - empty] * liver.size))
            reach = np.where(liver, tumour_reach, 9)
            tumour = reach < np.partition(reach.ravel(), pixels)[pixels]
        scan = np.where(around < 1, np.where(around < 0.88, ORGAN, FAT), AIR).astype(np.float32)
        scan[spleen < 1] = 100
        for cyst in cysts:
            scan[(cyst < 1) & (around < 0.86)] = CYST
        scan[liver] = np.where(vessels, VESSEL, LIVER)[liver]
        scan[tumour] = LIVER - contrast
        scan[spine < 1] = BONE
        noise = NOISE * rng.standard_normal(scan.shape, np.float32)
        scan = ndimage.gaussian_filter(scan, 0.7) + NOISE_STEP * np.round(noise / NOISE_STEP)
        hu[..., k] = np.clip(np.round(scan), -1024, 1500)
        labels[..., k] = liver.astype(np.uint8) + tumour
    return hu, labels
