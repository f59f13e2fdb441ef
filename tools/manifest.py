"""A first manifest for a folder of images and masks.

    python -m tools.manifest hospitals                   # writes hospitals/manifest.csv
    python -m tools.manifest nnunet --out cohort.csv

An image that has one mask becomes a row. A file is a mask if it lies in a folder for masks (masks,
labels, labelsTr and the like) or if its name says so; it is that of the image whose name is the
same otherwise:

    HOSPITAL/images/NAME.png     HOSPITAL/masks/NAME.png, or NAME_mask.png and the like
    imagesTr/NAME_0000.nii.gz    labelsTr/NAME.nii.gz       (nnU-Net)
    HOSPITAL/NAME.png            HOSPITAL/NAME_mask.png     (mixed in one folder)

The first folder is the centre, and folders below it are groups, which stay in one split. Look
through the table before you train: file names know little of patients and videos. Nothing is
overwritten.
"""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from support import manifest, options
from support.errors import UserError, readable_errors
from support.files import to_csv, write_text

# Folders that say what their files are, and no more. Their names may go on: images_C1.
IMAGE_FOLDER = re.compile(r"(images?|imgs?|frames?|scans?|volumes?|imagestr)([-_]\w*)?", re.I)
MASK_FOLDER = re.compile(
    r"(masks?|labels?|segs?|segmentations?|annotations?|gt|labelstr)([-_]\w*)?", re.I
)
SKIPPED = ("fedgs-cache", "imagests", "labelsts")  # slices that were cut; nnU-Net's test images

# What a name says of its file: NAME_mask, segmentation-NAME; image_NAME; an overlay of predictions.
MASK = "masks?|labels?|seg|segmentations?|annotations?|gt"
MASK_NAME = re.compile(rf"(?:{MASK})[-_ ](.+)|(.+)[-_ ](?:{MASK})", re.I)
IMAGE_NAME = re.compile(r"(?:image|img|volume)[-_ ](.+)|(.+)[-_ ](?:image|img|volume)", re.I)
OVERLAY = re.compile(r".*_overlay", re.I)
FIRST_CHANNEL = re.compile(r"(.+)_0000")  # nnU-Net's images end in the number of a channel
CHANNEL = re.compile(r".+_\d{4}")

FEW = 5  # a centre of fewer images is more likely a patient


class File(NamedTuple):
    """An image or a mask, and what its path says."""

    path: Path
    is_mask: bool
    centre: str
    group: str  # the folders below the centre
    name: str  # the same for an image and its mask


class Matched(NamedTuple):
    """Rows of a manifest, and what is none."""

    rows: list[tuple[File, File]]  # image, mask
    left_out: dict[str, list[Path]]  # why -> files


# ------------------------------------------------------------------------------- what files are


def find_files(folder: Path) -> list[Path]:
    """Images and volumes in a folder and below, sorted; but no hidden files, and no overlays."""
    kinds = Image.registered_extensions()
    suffixes = (*manifest.VOLUMES, *(suffix for suffix in kinds if kinds[suffix] in Image.OPEN))
    found = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name.lower() not in SKIPPED]
        for name in names:
            overlay = OVERLAY.fullmatch(manifest.base_name(Path(name)))
            if name.lower().endswith(suffixes) and not (name.startswith(".") or overlay):
                found.append(Path(where, name))
    return sorted(found)


def understand(path: Path, folder: Path) -> File:
    """What the path of a file below a folder says."""
    parents = path.relative_to(folder).parts[:-1]
    meaningful = []
    in_mask_folder = False
    for name in parents:
        if MASK_FOLDER.fullmatch(name):
            in_mask_folder = True
        elif not IMAGE_FOLDER.fullmatch(name):
            meaningful.append(name)

    name = manifest.base_name(path)
    without_mask = stripped(name, MASK_NAME)
    is_mask = in_mask_folder or without_mask != name
    if "imagestr" in map(str.lower, parents):
        name = stripped(name, FIRST_CHANNEL)
    else:
        name = stripped(without_mask, IMAGE_NAME)

    # Without folders of centres there is one centre: the folder itself.
    centre, *groups = meaningful or [folder.resolve().name]
    return File(path, is_mask, centre, "/".join(groups), name)


def stripped(name: str, pattern: re.Pattern) -> str:
    """What a pattern leaves of a name; the name where it does not match."""
    match = pattern.fullmatch(name)
    return next(filter(None, match.groups())) if match else name


def match(files: Iterable[File]) -> Matched:
    """Images with their masks."""
    images = {}
    masks = {}
    for file in files:
        key = file.centre, file.group, file.name
        kind = masks if file.is_mask else images
        kind.setdefault(key, []).append(file)

    rows = []
    left_out = {}
    for key in sorted(images.keys() | masks.keys()):
        of_image = images.get(key, [])
        of_mask = masks.get(key, [])
        if len(of_image) == len(of_mask) == 1:
            rows.append((of_image[0], of_mask[0]))
            continue

        problem = "of several that may belong together"
        if not of_mask:
            problem = "without a mask"
            if all(is_other_channel(file.path) for file in of_image):
                problem = "that are further channels"
        elif not of_image:
            problem = "without an image"
        left_out.setdefault(problem, []).extend(file.path for file in of_image + of_mask)
    return Matched(rows, left_out)


def is_other_channel(path: Path) -> bool:
    """Whether this is nnU-Net's second channel of an image, or a later one."""
    name = manifest.base_name(path)
    inside = path.parent.name.lower() == "imagestr"
    return inside and bool(CHANNEL.fullmatch(name)) and not FIRST_CHANNEL.fullmatch(name)


# ----------------------------------------------------------------------------------- the manifest


def table_of(rows: Sequence[tuple[File, File]], folder: Path) -> list[dict[str, str]]:
    """The rows of a manifest that lies in a folder. Raises UserError for what it cannot hold."""
    has_groups = any(image.group for image, _ in rows)
    table = []
    for image, mask in rows:
        if not manifest.NAME.fullmatch(image.centre):
            raise UserError(
                f"{image.path}: {image.centre!r} cannot be the name of a centre: rename its "
                f"folder ({manifest.NAME_RULE})"
            )
        row = {
            "centre": image.centre,
            "image": relative(image.path, folder),
            "mask": relative(mask.path, folder),
        }
        if has_groups:
            row["group"] = image.group
        table.append(row)
    return table


def relative(path: Path, folder: Path) -> str:
    """A path as a manifest in this folder names it."""
    return Path(os.path.relpath(path, folder)).as_posix()


def describe(out: Path, rows: Sequence[tuple[File, File]], left_out: dict[str, list[Path]]) -> str:
    """What was written, what of it was guessed, what was left out, and what comes next."""
    counts = {}
    for image, _ in rows:
        counts[image.centre] = counts.get(image.centre, 0) + 1
    listed = ", ".join(f"{centre} {count}" for centre, count in counts.items())

    lines = [f"{out}: {len(rows)} images with masks, by centre: {listed}"]
    lines.append("guessed: centres are named as their folders")
    if any(image.group for image, _ in rows):
        lines.append("guessed: folders below a centre's are groups, which stay in one split")
    else:
        lines.append("not known: which images are of one patient or video (column group)")
    few = [centre for centre, count in counts.items() if count < FEW]
    if few:
        lines.append(f"few images: {', '.join(few)} (if these are patients: column group)")
    for problem, paths in left_out.items():
        lines.append(f"left out: files {problem} ({len(paths)}), as {paths[0]}")
    where = shlex.quote(str(out))
    lines.append(f"next: python -m tools.look --dataset {where}")
    lines.append(f"then: python fedgs.py --dataset {where}")
    return "\n".join(lines)


def write_manifest(folder: Path, out: Path) -> str:
    """Write the manifest of a folder. -> what to say of it

    Raises UserError where there is nothing to write, or a file already.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if out.exists():
        raise UserError(f"{out} is there already: choose another file with --out")
    if out.suffix.lower() != ".csv":
        raise UserError(f"--out {out}: must end in .csv")
    manifest.name_of(out)

    files = find_files(folder)
    rows, left_out = match(understand(path, folder) for path in files)
    if not rows:
        raise UserError(
            f"{folder}: {len(files)} images, but none that has a mask (HOSPITAL/images/NAME.png "
            "with HOSPITAL/masks/NAME.png, or NAME_mask.png beside NAME.png)"
        )
    kinds = {manifest.is_volume(file.path) for pair in rows for file in pair}
    if len(kinds) > 1:
        raise UserError(f"{folder} holds images and volumes: write a manifest for each, apart")

    write_text(out, to_csv(table_of(rows, out.parent)))
    return describe(out, rows, left_out)


# ----------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with readable_errors("tools.manifest"):
        parser = options.new_parser(__doc__, "python -m tools.manifest")
        parser.add_argument("folder", type=Path, metavar="FOLDER", help="images and masks")
        parser.add_argument("--out", type=Path, help="the file; default: FOLDER/manifest.csv")
        parser.set_defaults(out=None)
        given = parser.parse_args(arguments)
        print(write_manifest(given.folder, given.out or given.folder / manifest.FILE))


if __name__ == "__main__":
    main()
