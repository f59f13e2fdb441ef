"""Which files of a data set cannot be used: all of them, where a run ends at the first."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import data
import fedgs
from support import manifest, volumes
from support.errors import UserError
from support.masks import check_bright
from support.pixels import mask_values, open_file, open_image


class File(NamedTuple):
    """An image with its mask, or a volume with its segmentation, and whether they can be used."""

    centre: str
    name: str
    path: Path  # of the image
    size: tuple[int, int]  # width and height; zeros for volumes, and where it cannot be used
    problem: str  # why it cannot be used; empty: it can


def check_files(config: fedgs.Config, root: Path) -> list[File]:
    """Read all files of a data set, each by itself."""
    # A run ends at the first that cannot be used. Here all of them are to be found.
    check = functools.partial(check_file, config=config, root=root)

    # Pillow reads images side by side. One volume at a time is all that fits into memory.
    threads = 1 if config.images == "slices" else None

    files = []
    for centre in config.centres:
        rows = rows_of(config.dataset, root, centre)
        with ThreadPoolExecutor(threads) as pool:
            checked = pool.map(check, rows)
            bar = tqdm(checked, f"checking {centre}", len(rows), leave=False, disable=None)
            files.extend(bar)
    return files


def rows_of(dataset: str, root: Path, centre: str) -> list[manifest.Row]:
    """A centre's files as rows of a manifest, whatever the data set is.

    None where files are missing in the layout of a published one: then the centre is left out as a
    whole when it is loaded, and the reason is said there.
    """
    if dataset not in data.CENTRES:
        return [row for row in manifest.read(root) if row.centre == centre]

    pairs = {}
    try:
        if dataset == "polypgen":
            for image, mask in data.list_pairs(root, centre):
                pairs[image.stem] = 0, image, mask
        else:
            found = volumes.find_volumes(root, data.LITS_VOLUMES[centre])
            for number, (volume, segmentation) in found.items():
                pairs[f"volume-{number}"] = number, volume, segmentation
    except UserError:
        return []

    rows = []
    for name, (number, image, mask) in pairs.items():
        rows.append(manifest.Row(number, centre, name, image, mask, "", None, ""))
    return rows


def check_file(row: manifest.Row, config: fedgs.Config, root: Path) -> File:
    """Read the files of a row, and keep what is wrong with them."""
    # Each file is read whole: many that are damaged have a header that is not.
    size = 0, 0
    problem = ""
    try:
        size = read_files(row, config, root)
    except UserError as error:
        problem = str(error)
    return File(row.centre, row.name, row.image, size, problem)


def read_files(row: manifest.Row, config: fedgs.Config, root: Path) -> tuple[int, int]:
    """Read the files of a row. -> width and height of its image; zeros for a volume

    Raises UserError for what a run would refuse of this row, whatever the others are.
    """
    if config.dataset == "lits":
        pair = row.image, row.mask
        data.cut_lits(root, row.number, pair, config.window, config.cache)
        return 0, 0

    # A published layout was searched, so its files are there.
    if config.dataset != "polypgen":
        manifest.check_files(root, [row])

    # The slices stay in the cache, from which they are loaded.
    if config.images == "slices":
        volumes.check_geometry(row.image, row.mask)
        cut = volumes.Cut(config.window, config.lesion)
        data.cut_row(row, cut, data.cache_of(root, config.cache))
        return 0, 0

    image = open_image(row.image, "RGB", config.window)
    mask = open_file(row.mask)
    values = mask_values(mask, row.mask)
    # Of one's own masks, what is lesion is decided by the values of all.
    if config.dataset == "polypgen":
        check_bright(values, mask.format, row.mask)
    data.check_proportions(row.mask, mask.size, image.size)
    return image.size
