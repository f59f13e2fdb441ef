"""Files that are written whole or not at all, checksums, CSV and JSON."""

import errno
import json
import math
import os
import random
import re

import pytest

from support import files
from support.errors import UserError

# ------------------------------------------------------------------------------ whole or not at all


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "below" / "notes.txt"  # the folder is made, too
    files.write_text(path, "one\n")
    with files.replacing(path) as new:
        new.write_text("two\n")
        assert path.read_text() == "one\n"  # until the block ends
    assert path.read_text() == "two\n"
    assert [item.name for item in path.parent.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_does_not_end_well(tmp_path, error):
    path = tmp_path / "notes.txt"
    path.write_text("one\n")
    with pytest.raises(error), files.replacing(path) as new:
        new.write_text("tw")
        raise error
    assert path.read_text() == "one\n"
    assert [item.name for item in tmp_path.iterdir()] == ["notes.txt"]


def test_a_block_that_writes_nothing(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("one\n")
    with pytest.raises(FileNotFoundError), files.replacing(path):
        pass
    assert path.read_text() == "one\n"


@pytest.mark.parametrize("name", ["a.png", "a.nii.gz", "a.b.c", "a"])
def test_the_new_file_has_the_same_suffixes(tmp_path, name):
    """Some writers choose a format by them."""
    path = tmp_path / name
    with files.replacing(path) as new:
        assert new.suffixes == path.suffixes
        assert new.parent == path.parent  # a file can only be renamed within a file system
        assert files.is_temporary(new)
        new.write_text("")
    assert not files.is_temporary(path)


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    sync, rename = os.fsync, os.replace

    def noted_sync(descriptor):
        calls.append("sync")
        sync(descriptor)

    def noted_rename(source, target):
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
    files.write_text(tmp_path / "notes.txt", "one\n")
    assert calls == ["sync", "rename"]

    # What can be made again does not wait for the disk.
    calls.clear()
    with files.replacing(tmp_path / "notes.txt", synced=False) as new:
        new.write_text("two\n")
    assert calls == ["rename"]


def test_what_a_killed_process_leaves_is_in_nobodys_way(tmp_path):
    path = tmp_path / "notes.txt"
    mine = tmp_path / f"{files.TEMPORARY}{os.getpid()}-notes.txt"  # numbers of processes come again
    others = tmp_path / f"{files.TEMPORARY}0-notes.txt"
    mine.write_text("a longer text than the new one\n")
    others.write_text("half")
    assert files.is_temporary(mine)
    assert files.is_temporary(others)

    files.write_text(path, "one\n")
    assert path.read_text() == "one\n"
    assert others.read_text() == "half"  # that process may still be at it
    assert not mine.exists()


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_a_link_in_the_place_of_a_new_file_is_not_followed(tmp_path):
    """In a folder that others can write to, they may put one there."""
    mine = tmp_path / "mine.txt"
    mine.write_text("mine\n")
    (tmp_path / f"{files.TEMPORARY}{os.getpid()}-notes.txt").symlink_to(mine)
    files.write_text(tmp_path / "notes.txt", "one\n")
    assert mine.read_text() == "mine\n"
    assert (tmp_path / "notes.txt").read_text() == "one\n"


def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path):
    path = tmp_path / "notes.txt"
    with pytest.raises(OSError, match=re.escape(f"full: '{path}'")), files.replacing(path):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="other"), files.replacing(path):
        raise OSError(errno.ENOSPC, "full", "other")


def test_text_is_utf_8(tmp_path):
    files.write_text(tmp_path / "notes.txt", "η\n")
    assert (tmp_path / "notes.txt").read_bytes() == "η\n".encode()


# ---------------------------------------------------------------------------------------- checksums


def flipped(content, places=(), count=150):
    """Copies of a file's content with one bit flipped: all bits of these bytes, and random ones."""
    generator = random.Random(0)
    flips = [8 * (place % len(content)) + bit for place in places for bit in range(8)]
    flips += [generator.randrange(8 * len(content)) for _ in range(count)]
    for flip in flips:
        damaged = bytearray(content)
        damaged[flip // 8] ^= 1 << flip % 8
        yield bytes(damaged)


def test_a_bit_is_flipped():
    copies = list(flipped(b"abc", places=(0, -1), count=100))
    assert len(copies) == 2 * 8 + 100
    assert (copies[0], copies[8]) == (b"`bc", b"abb")
    assert len(set(copies)) == 3 * 8
    for copy in copies:
        assert (int.from_bytes(copy, "big") ^ int.from_bytes(b"abc", "big")).bit_count() == 1


def test_the_checksum_is_a_known_one(tmp_path):
    """That of `printf abc | b2sum -l 256`."""
    expected = "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319"
    assert files.checksum(b"abc") == files.checksum(memoryview(b"abc")) == expected
    assert files.write_text(tmp_path / "notes.txt", "abc") == expected


CHECKSUMS = {"a.csv": files.checksum(b"a"), "b.csv": files.checksum(b"b")}


def test_json_with_checksums_comes_back():
    value = {"name": "η", "dice": math.nan, "list": ["\n}", "checksum"]}
    content = files.to_checked_json(value, CHECKSUMS).encode()
    found = files.from_checked_json(content)
    own = {"checksums": CHECKSUMS, "checksum": files.checksum(content[:-68])}
    assert found == json.loads(content) == {**value, "dice": None, **own}


def test_every_flipped_bit_of_checked_json_is_noticed():
    content = files.to_checked_json({"name": "η", "dice": [0.5, None]}, CHECKSUMS).encode()
    for damaged in flipped(content, places=range(len(content)), count=0):
        assert files.from_checked_json(damaged) is None


def test_what_is_no_checked_json():
    content = files.to_checked_json({"name": "a"}, {}).encode()
    others = [content[:-1], content[1:], content + b"\n", content.replace(b"\n", b"\r\n")]
    others += [b"", b"[]", b"hello world", b"\xff", content[:20], b'{"checksum": ""}']
    for other in others:
        assert files.from_checked_json(other) is None


def test_json_without_checksums_is_taken_as_it_is():
    assert files.from_checked_json(b'{"name": "a"}') == {"name": "a"}


# ------------------------------------------------------------------------------------- CSV and JSON


def test_csv_comes_back(tmp_path):
    rows = [{"name": 'a "b", c', "dice": 0.1 + 0.2}, {"name": "two\nlines", "dice": math.inf}]
    text = files.to_csv(rows)
    assert text.startswith("name,dice\n")
    assert "\r" not in text

    files.write_text(tmp_path / "rows.csv", text)
    found = files.read_csv(tmp_path / "rows.csv", ("name", "dice"))
    assert [row["name"] for row in found] == [row["name"] for row in rows]
    assert [float(row["dice"]) for row in found] == [0.1 + 0.2, math.inf]  # every digit


def test_csv_of_no_rows():
    assert files.to_csv([]).strip() == ""


def test_rows_with_other_keys_are_a_fault():
    with pytest.raises(ValueError, match="extra"):
        files.to_csv([{"a": 1}, {"a": 1, "extra": 2}])


def test_a_table_as_a_spreadsheet_saves_it(tmp_path):
    (tmp_path / "rows.csv").write_bytes("\ufeffname,small\r\nη,1\r\n".encode())
    assert files.read_csv(tmp_path / "rows.csv", ("name",)) == [{"name": "η", "small": "1"}]


def test_line_ends_in_a_cell_stay_as_they_were(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b'name,dice\n"two\r\nlines",1\n')
    assert files.read_csv(tmp_path / "rows.csv", ("name",))[0]["name"] == "two\r\nlines"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00\x01", "cannot read .*rows.csv"),
        (b"name,dice\n" + b"a" * 200_000, "cannot read .*rows.csv: field larger than"),
        (b"name\na\n", "rows.csv: its header needs the column dice, once"),
        (b"name,dice,dice\na,1,2\n", "rows.csv: its header needs the column dice, once"),
        (b"hello world", "rows.csv: its header needs the column name, once"),
        (b"", "rows.csv: its header needs the column name, once"),
        (b"name,dice\na\0,1\n", "cannot read .*rows.csv"),
        (b'name,dice\n"a,1\n', "cannot read .*rows.csv"),
        (b"name,dice\na,1\nb\n", "rows.csv: every row needs the columns name, dice"),
    ],
)
def test_what_is_no_such_table(tmp_path, content, words):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(UserError, match=words):
        files.read_csv(tmp_path / "rows.csv", ("name", "dice"))


def test_tables_that_cannot_be_opened(tmp_path):
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            files.read_csv(path, ())


def test_json_is_laid_out_for_people():
    assert files.to_json({"a": {"b": 1}, "c": 2}) == '{\n  "a": {\n    "b": 1\n  },\n  "c": 2\n}\n'


def test_json_has_no_nan():
    lists = [1, "x", (math.inf, [-math.inf])]
    value = {"a": {"b": math.nan, "c": 0.1, "d": {"e": math.nan}}, "f": lists, "g": None}
    text = files.to_json(value)
    without = [1, "x", [None, [None]]]
    expected = {"a": {"b": None, "c": 0.1, "d": {"e": None}}, "f": without, "g": None}
    assert json.loads(text) == expected
    assert "NaN" not in text
    assert "Infinity" not in text
    assert text.endswith("}\n")
    assert math.isnan(value["a"]["b"])  # the value itself stays as it was


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    path = tmp_path / "rows.csv"
    make(path)
    with pytest.raises(UserError, match=r"cannot read .*rows.csv: it is no file"):
        files.check_regular(path)
    with pytest.raises(UserError, match=r"cannot read .*rows.csv: it is no file"):
        files.read_csv(path, ())


def test_a_missing_file_is_another_matter(tmp_path):
    files.check_regular(tmp_path / "none")
    (tmp_path / "file").touch()
    files.check_regular(tmp_path / "file")


def test_json_too_deep_to_be_read():
    assert files.from_checked_json(b"[" * 100_000) is None
