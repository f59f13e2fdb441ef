"""How a program ends: one line and an exit code, or the traceback of a fault."""

import io
import pickle
import sys

import pytest
import torch

from support.errors import Terminated, UserError, for_people, is_out_of_memory, readable_errors


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
    assert ended_by(Terminated(), interrupted="--resume goes on") == 143
    assert capsys.readouterr().err == "program: stopped by SIGTERM; --resume goes on\n"
    assert ended_by(Terminated()) == 143
    assert "what was written stays" in capsys.readouterr().err


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


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_a_shell_has_closed(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    with readable_errors("program"):
        getattr(sys, name).write("a bar of progress")
    assert ended_by(UserError("x")) == 2


def test_an_error_is_one_line_wherever_it_is_shown():
    assert str(UserError("a\nb: c\x01")) == "a\\nb: c\\x01"
    assert str(pickle.loads(pickle.dumps(UserError("a\nb")))) == "a\\nb"
