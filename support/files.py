"""Files that are written whole or not at all, checksums, and the text formats of a run's tables."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from support.errors import UserError

TEMPORARY = ".tmp-"  # how the name of a file begins until it is whole
CHECKSUM_SIZE = 64  # characters
JSON_END = b'"\n}\n'  # what follows the checksum in JSON text that ends with one


@contextlib.contextmanager
def replacing(path: Path, synced: bool = True) -> Iterator[Path]:
    """A new file beside `path` that takes its place when the block ends well.

    The new file has the same suffixes, since some writers choose a format by them. If the block
    fails or is interrupted, the new file is removed and `path` stays as it was. Without `synced`
    that is not so after a power cut, which is for files that can be told to be damaged and made
    again. Raises OSError, which names a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        # In a folder that others can write to, it might be their link to a file of this user's.
        new.unlink(missing_ok=True)
        yield new

        # The content has to be on the disk before the name is: a power cut in between would
        # otherwise leave an empty file in the place of a good one.
        if synced:
            with new.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        # That of a full disk does not.
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        new.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether this is what `replacing` leaves behind when it is killed."""
    return path.name.startswith(TEMPORARY)


def check_regular(path: Path) -> None:
    """Raise UserError for a folder, a pipe or a device: a pipe would be waited for without end.

    What is missing, or may not be looked at, is said by what opens it.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"cannot read {path}: it is no file, but a folder, a pipe or a device")


def write_text(path: Path, text: str) -> str:
    """Write a text file, whole or not at all. -> its checksum. Raises OSError."""
    content = text.encode()
    with replacing(path) as new:
        new.write_bytes(content)
    return checksum(content)


def checksum(content: bytes | memoryview) -> str:
    """BLAKE2b in hexadecimal, which `b2sum -l 256` prints, too: a changed bit changes it."""
    return hashlib.blake2b(content, digest_size=CHECKSUM_SIZE // 2).hexdigest()


def to_csv(rows: Sequence[dict]) -> str:
    """Dictionaries with equal keys as CSV text with a header."""
    text = io.StringIO()
    names = list(rows[0]) if rows else []
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(value: dict) -> str:
    """JSON text. NaN and infinity, for which JSON has no word, become null."""

    def finite(x):
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        if isinstance(x, list | tuple):
            return [finite(item) for item in x]
        if isinstance(x, float) and not math.isfinite(x):
            return None
        return x

    return json.dumps(finite(value), indent=2) + "\n"


def to_checked_json(value: dict, checksums: Mapping[str, str]) -> str:
    """JSON text that ends with checksums: these of other files, and that of all before it."""
    text = to_json({**value, "checksums": checksums, "checksum": ""})
    before = text.removesuffix(JSON_END.decode())
    return before + checksum(before.encode()) + JSON_END.decode()


def from_checked_json(content: bytes) -> dict | None:
    """What `to_checked_json` wrote; None where it has changed since.

    Text from which someone has taken the checksums, or that never had any, is not checked. The two
    names of them are never both lost to a flipped bit.
    """
    before = content[: -CHECKSUM_SIZE - len(JSON_END)]
    is_checked = b"checksum" in content
    if is_checked and content != before + checksum(before).encode() + JSON_END:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises UserError for another kind of file and for missing columns."""
    check_regular(path)
    try:
        # Spreadsheets begin a UTF-8 file with a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            text = file.read()
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = list(table.fieldnames or ())
        rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error

    if "\0" in text:
        raise UserError(f"cannot read {path}: it is no text")
    for column in columns:
        if header.count(column) != 1:
            raise UserError(f"{path}: its header needs the column {column}, once")

    for row in rows:
        if any(row.get(column) is None for column in columns):
            raise UserError(f"{path}: every row needs the columns {', '.join(columns)}")
    return rows
