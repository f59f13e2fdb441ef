"""A data set of one's own: a table that names its images, one a row.

    centre,image,mask,group
    St. Olav,olav/images/001.png,olav/masks/001.png,patient 7
    Berlin,berlin/scan-3.png,berlin/scan-3_mask.png,patient 2

Paths are relative to the table. What else there may be: `group` (images of a patient or a video,
which stay in one split), `small` (a size flag), `split` (train, validation or test). Rows may also
name NIfTI volumes and their segmentations.
"""

import csv
import difflib
import io
import math
import operator
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from support.errors import UserError
from support.pixels import is_saved_in_colour, shows_colour

FILE = "manifest.csv"  # its name where a folder is named in its place
REQUIRED = ("centre", "image", "mask")
OPTIONAL = ("group", "small", "split")
FLAGS = {"": None, "true": True, "1": True, "false": False, "0": False}
PARTS = {"": "", "train": "train", "validation": "validation", "val": "validation", "test": "test"}
VOLUMES = (".nii", ".nii.gz")
LOOKED_AT = 50  # of the images that are saved in colour so many tell whether they show any

# Names become parts of file names, columns of tables, and labels of pictures.
NAME = re.compile(r"[^\W_][\w .'-]{0,59}")
NAME_RULE = "letters, digits, spaces and . _ - ' after a letter or digit, up to 60 of them"
TAKEN = ("polypgen", "lits")  # nobody's own data is called so


class Row(NamedTuple):
    """One image, or one volume, of a manifest."""

    number: int  # its line in the file, as a spreadsheet counts
    centre: str
    name: str  # the image's path below the folder of its centre's images, without suffix
    image: Path
    mask: Path
    group: str  # empty: an image by itself
    small: bool | None  # None: by rule
    split: str  # train, validation or test; empty: by the folds

    @property
    def unit(self) -> str:
        """What stays in one split: its group, or it by itself."""
        return f"group {self.group}" if self.group else self.name


# ----------------------------------------------------------------------- what it is, as options


def locate(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, in which the path of a manifest has become a name and a place.

    {"dataset": "cohort/my.csv"} -> {"dataset": "my", "data_root": "cohort/my.csv"}. Raises
    UserError for a name that no data set can have.
    """
    dataset = given.get("dataset", "polypgen")
    if dataset in TAKEN:
        return dict(given)

    name = name_of(Path(dataset))
    root = given.get("data_root", "")
    if root and dataset != name:
        raise UserError(f"--dataset {dataset} says where the data are: leave out --data-root")
    if not root and (dataset != name or Path(dataset).exists()):
        root = dataset
    return {**given, "dataset": name, "data_root": root}


def name_of(path: Path) -> str:
    """What a manifest's data are called: as the file, or as the folder of a manifest.csv.

    Raises UserError for a name that files and tables cannot have.
    """
    where = path.parent if path.name.lower() == FILE else path
    if where.name in ("", ".."):
        where = where.resolve()
    name = where.name
    if where.suffix.lower() == ".csv":
        name = where.stem

    name = unicodedata.normalize("NFC", name)
    if not NAME.fullmatch(name) or name.lower() in TAKEN:
        raise UserError(
            f"{path}: {name!r} cannot be the name of a data set: call it otherwise ({NAME_RULE})"
        )
    return name


def find(path: Path) -> Path:
    """The file of a manifest, which a folder may be named for. Raises UserError without one."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{path}: no manifest there (polypgen and lits are known by name; name your own with "
            "--dataset or --data-root; python -m tools.manifest FOLDER writes one)"
        )
    return file


def options_of(path: Path) -> dict[str, Any]:
    """What a manifest decides about a run: its centres, the kind of its images, their splits.

    -> {field of Config: value}
    """
    rows = read(path)
    kind = kind_of(rows)
    options = {
        "images": kind,
        "centres": centres_of(rows),
        "out_centre": "",
        "split": "given" if rows[0].split else "fold",
    }

    return {**options, **measured_as(kind)}


def measured_as(kind: str) -> dict[str, Any]:
    """What the kind of one's own images decides about the measure of lesions."""
    # Slices are measured as LiTS's are, so its values are theirs. Images are measured as
    # PolypGen's, whose values are Config's defaults.
    if kind == "slices":
        return {"tau": 1000.0, "log_base": 1000.0}
    return {}


def kind_of(rows: Sequence[Row]) -> str:
    """colour, grey or slices: what the images of a manifest are."""
    if is_volume(rows[0].image):
        return "slices"

    # Many programs save grey images in colour. Some of these, evenly spaced, tell.
    in_colour = [row.image for row in rows if is_saved_in_colour(row.image)]
    step = math.ceil(len(in_colour) / LOOKED_AT) or 1
    return "colour" if any(map(shows_colour, in_colour[::step])) else "grey"


def centres_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The names of the centres, in the order of the file."""
    return tuple(dict.fromkeys(row.centre for row in rows))


def is_volume(path: Path) -> bool:
    """Whether a file is a NIfTI volume, by its name."""
    return path.name.lower().endswith(VOLUMES)


def base_name(path: Path) -> str:
    """A file's name without its suffix, which may be .nii.gz."""
    return re.sub(r"(\.nii\.gz|\.[^.]*)$", "", path.name, flags=re.IGNORECASE)


# ---------------------------------------------------------------------------------------- reading


def read(path: Path) -> list[Row]:
    """The rows of a manifest: centres in the order of the file, each sorted by name.

    Raises UserError for a file that cannot be read, and naming the row that cannot be used.
    """
    rows = [read_row(path, number, cells) for number, cells in read_lines(path)]
    if not rows:
        raise UserError(f"{path} has no rows below its header")
    check_rows(path, rows)
    check_splits(path, rows)

    of_centre = {}
    for row in rows:
        of_centre.setdefault(row.centre, []).append(row)

    # The rules of the splits count in this order, so that of the rows does not matter.
    named = []
    for unnamed in of_centre.values():
        named.extend(sorted(with_names(path, unnamed), key=operator.attrgetter("name")))
    return named


def read_lines(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The lines below the header that are not empty. -> [(number, {column: cell})]"""
    try:
        # Spreadsheets begin a UTF-8 file with a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: save it as CSV in UTF-8 ({error.reason})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if "\0" in text:
        raise UserError(f"cannot read {path}: it is no text")

    # Where the decimal sign is a comma, they separate columns by semicolons.
    header = text.partition("\n")[0]
    table = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=header.count), strict=True)
    lines = []
    try:
        columns = [name.strip().lower() for name in next(table, [])]
        check_columns(path, columns)
        for cells in table:
            if len(cells) != len(columns) and any(cells):
                raise UserError(
                    f"{path}, row {table.line_num}: {len(cells)} cells for {len(columns)} columns "
                    "(a cell that holds the separator needs quotes)"
                )
            if any(cells):
                stripped = [cell.strip() for cell in cells]
                lines.append((table.line_num, dict(zip(columns, stripped, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}, row {table.line_num}: {error}") from error
    return lines


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Raise UserError for columns that are missing, there twice, or seem to be misspelt."""
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}: its first line names the columns, "
            f"{', '.join(REQUIRED)} and, if need be, {', '.join(OPTIONAL)}"
        )

    # Other columns do not matter. But a misspelt group would not be read, and mix up the splits.
    known = (*REQUIRED, *OPTIONAL)
    for name in columns:
        alike = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if columns.count(name) > 1 and name in known:
            raise UserError(f"{path} has two columns {name}")
        if alike and name not in known:
            raise UserError(f"{path}: column {name} is not read; if it is {alike[0]}, call it so")


def read_row(path: Path, number: int, cells: Mapping[str, str]) -> Row:
    """One line as a Row, whose name is yet to be found. Raises UserError for what has no sense."""
    where = f"{path}, row {number}"
    for column in REQUIRED:
        if not cells[column]:
            raise UserError(f"{where}: {column} is empty")
    for column in ("image", "mask", "group"):
        # Names of files become cells of tables, and lines on a terminal.
        if not cells.get(column, "").isprintable():
            raise UserError(f"{where}: {column} holds what is no text: {cells[column]!r}")

    centre = unicodedata.normalize("NFC", cells["centre"])
    if not NAME.fullmatch(centre):
        raise UserError(f"{where}: {centre!r} cannot be the name of a centre: {NAME_RULE}")

    image = path_of(path.parent, cells["image"])
    mask = path_of(path.parent, cells["mask"])
    if image == mask:
        raise UserError(f"{where}: {cells['image']} is the image and its mask")
    if is_volume(image) != is_volume(mask):
        raise UserError(f"{where}: one of {image.name} and {mask.name} is a volume, the other none")

    small = meaning(where, cells, "small", FLAGS)
    if is_volume(image) and small is not None:
        raise UserError(f"{where}: small says nothing of a volume, whose slices differ")
    split = meaning(where, cells, "split", PARTS)
    return Row(number, centre, "", image, mask, cells.get("group", ""), small, split)


def path_of(folder: Path, cell: str) -> Path:
    """The path that a cell means, below the folder of its manifest."""
    # Spreadsheets of Windows have the other slash.
    path = os.path.normpath(folder / cell.replace("\\", "/"))
    # Two of them begin the name of another machine there, and say nothing elsewhere.
    return Path(path[1:] if path.startswith("//") else path)


def meaning(where: str, cells: Mapping[str, str], column: str, meanings: Mapping[str, Any]) -> Any:
    """What the cell of a column means, whether the file has that column or not."""
    cell = cells.get(column, "")
    if cell.lower() not in meanings:
        known = ", ".join(name for name in meanings if name)
        raise UserError(f"{where}: {column} is {cell!r}, none of {known}")
    return meanings[cell.lower()]


# ----------------------------------------------------------------------------- rows among others


def check_files(path: Path, rows: Sequence[Row]) -> None:
    """Raise UserError for files of these rows that are not there.

    Of other rows they may be on other machines.
    """
    for row in rows:
        for file in (row.image, row.mask):
            if not file.is_file():
                raise UserError(f"{path}, row {row.number}: there is no file {file}")


def check_rows(path: Path, rows: Sequence[Row]) -> None:
    """Raise UserError for rows that contradict each other: spellings, kinds, the same image."""
    spellings = {}
    images = {}
    first = rows[0]
    for row in rows:
        where = f"{path}, row {row.number}"
        spelling = spellings.setdefault(row.centre.lower(), row)
        if row.centre != spelling.centre:
            raise UserError(
                f"{where}: centre {row.centre} is {spelling.centre} in row {spelling.number}"
            )
        if is_volume(row.image) != is_volume(first.image):
            raise UserError(
                f"{where}: {row.image.name} and {first.image.name} of row {first.number} are of "
                "two kinds: a manifest is of images, or of volumes"
            )
        other = images.setdefault(row.image, row)
        if other is not row:
            raise UserError(
                f"{where}: {row.image} is in row {other.number}, too (an image has one mask)"
            )


def check_splits(path: Path, rows: Sequence[Row]) -> None:
    """Raise UserError where splits are not written down for all rows, or part a group."""
    if not any(row.split for row in rows):
        return

    parts = {}
    for row in rows:
        where = f"{path}, row {row.number}"
        if not row.split:
            raise UserError(f"{where}: split is empty, but not in other rows")
        if not row.group:
            continue
        other = parts.setdefault((row.centre, row.group), row)
        if row.split != other.split:
            raise UserError(
                f"{where}: group {row.group} of {row.centre} is in {row.split} here, and in "
                f"{other.split} in row {other.number}"
            )


def with_names(path: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows of one centre, each with its name. Raises UserError where two have the same."""
    folders = [row.image.absolute().parent for row in rows]
    common = os.path.commonpath(folders)

    named = {}
    for row, folder in zip(rows, folders, strict=True):
        name = (folder / base_name(row.image)).relative_to(common).as_posix()
        if name in named:
            other = named[name]
            raise UserError(
                f"{path}, row {row.number}: {row.image} has the name of {other.image} in row "
                f"{other.number}: keep one of them"
            )
        named[name] = row._replace(name=name)
    return list(named.values())
