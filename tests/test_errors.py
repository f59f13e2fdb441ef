"""How a program ends: one line and an exit code, or the traceback of a fault."""

import errno
import io
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from support.errors import (
    Terminated,
    UserError,
    for_people,
    is_out_of_memory,
    readable_errors,
)


def ended_by(error, **options):
    """-> the exit code of a program in which this is raised"""
    with pytest.raises(SystemExit) as caught, readable_errors("program", **options):
        raise error
    return caught.value.code


def test_a_program_that_ends_well(capsys):
    with readable_errors("program"):
        print("done")
    assert capsys.readouterr() == ("done\n", "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("--lr 0: must be above 0"), "--lr 0: must be above 0"),
        (OSError("no space left"), "no space left"),
        (FileNotFoundError(2, "No such file", "a.png"), "[Errno 2] No such file: 'a.png'"),
        (OSError(errno.ENOSPC, "Full", "a.pt"), "[Errno 28] Full: 'a.pt': make room there"),
        (OSError(errno.EDQUOT, "Quota", "a.pt"), f"[Errno {errno.EDQUOT}] Quota: 'a.pt': make"),
        (MemoryError(), "out of memory: choose a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: choose a smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: choose"),
    ],
)
def test_errors_for_people(capsys, error, message):
    assert ended_by(error) == 2
    output, line = capsys.readouterr()
    assert output == ""
    assert line.startswith(f"program: error: {message}")
    assert line.count("\n") == 1


def test_an_interruption(capsys):
    assert ended_by(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "program: interrupted; what was written stays\n"
    assert ended_by(KeyboardInterrupt(), interrupted="go on with --resume") == 130
    assert capsys.readouterr().err == "program: interrupted; go on with --resume\n"


def test_a_stop_by_the_system(capsys):
    """Whoever started the program must not take it for a finished one."""
    assert ended_by(Terminated(signal.SIGTERM), interrupted="--resume goes on") == 143
    assert capsys.readouterr().err == "program: stopped by SIGTERM; --resume goes on\n"
    assert ended_by(Terminated(signal.SIGTERM)) == 143
    assert "what was written stays" in capsys.readouterr().err


ENDING = """
import os, signal, sys
from support.errors import end_on_signals, readable_errors
with readable_errors("program", interrupted="go on"):
    end_on_signals()
    {what}
"""


def program(what: str, shell: str = "{}") -> subprocess.CompletedProcess:
    """A program that does this, started by a shell's command line around it."""
    command = shell.format('"$0" -c "$1"')
    return subprocess.run(
        ["sh", "-c", command, sys.executable, ENDING.format(what=what)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )


on_posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell and signals")


@on_posix
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_that_end_a_program(name, code):
    done = program(f"os.kill(os.getpid(), signal.{name})")
    assert done.returncode == code
    assert done.stderr == f"program: stopped by {name}; go on\n"


@on_posix
def test_nohup_is_respected():
    done = program("os.kill(os.getpid(), signal.SIGHUP); print('here')", "nohup {} 2>&1")
    assert (done.returncode, done.stdout[-5:]) == (0, "here\n")


@on_posix
@pytest.mark.parametrize("flush", [True, False])
def test_nobody_reads_on(flush):
    """As `head` ends before a program has printed all: one line, whenever the text gets there."""
    done = program(
        f"sys.stdin.read(); print('text', flush={flush})",
        "( ( sleep 0.3 | {}; echo $? >&2 ) | true )",
    )
    assert done.stderr == "program: nobody reads its output any more; go on\n141\n"


@on_posix
def test_a_terminal_that_is_gone():
    """A line that nobody can be shown does not change how a program ends."""
    done = program("raise KeyboardInterrupt", "{} 2>/dev/full")
    assert done.returncode == 130


@on_posix
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_program_without_its_streams(tmp_path, closed):
    """Its first file must not become one of them."""
    path = tmp_path / "file"
    prints = "print('out'); print('error', file=sys.stderr); "
    library = "[os.write(number, b'library') for number in (1, 2)]; "
    what = f"file = open({str(path)!r}, 'w'); {prints}{library}file.close()"
    done = program(what, "{} " + closed)
    assert done.returncode == 0
    assert path.read_text() == ""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a shape"),  # UserError is one, but not every ValueError is for people
        RuntimeError("a size"),
        KeyError("x"),
        AssertionError(),
    ],
)
def test_faults_keep_their_traceback(capsys, error):
    with pytest.raises(type(error)) as caught, readable_errors("program"):
        raise error
    assert caught.value is error
    assert capsys.readouterr().err == ""


def test_a_chosen_end_is_left_alone(capsys):
    assert ended_by(SystemExit(0)) == 0  # as of --help
    assert capsys.readouterr().err == ""


def test_the_cause_is_not_shown(capsys):
    with pytest.raises(SystemExit), readable_errors("program"):
        try:
            int("x")
        except ValueError as error:
            raise UserError("x is no number") from error
    assert capsys.readouterr().err == "program: error: x is no number\n"


def test_a_real_allocation_that_fails():
    """Torch says it in its own words, which may change."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert "smaller" in for_people(caught.value)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\u2028b", "a\u202eb", "a\udce4", "a\x07"])
def test_names_that_are_no_text_are_one_line_all_the_same(capsys, name):
    assert ended_by(UserError(f"{name}: no such file")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip().isprintable()
    assert "no such file" in error


def test_what_a_terminal_cannot_show_ends_nothing(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    with readable_errors("program"):
        print("η a\udce4", flush=True)
    assert narrow.buffer.getvalue() == b"\\u03b7 a\\udce4\n"


def test_an_error_is_one_line_wherever_it_is_shown():
    assert str(UserError("a\nb: c\x01")) == "a\\nb: c\\x01"
    assert str(pickle.loads(pickle.dumps(UserError("a\nb")))) == "a\\nb"
