"""The one error class for people, and how a program ends with one line instead of a traceback."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Something a person can put right. The message says what was wrong, where, and what to do.

    It is one line, whatever names of files, or texts of libraries, are in it.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which schedulers and torchrun end a run: like Ctrl-C, it ends everything."""


@contextlib.contextmanager
def readable_errors(program: str, interrupted: str = "") -> Iterator[None]:
    """End the program with one line on stderr: exit code 2 for an error, 130 for Ctrl-C, 143 for
    SIGTERM.

    interrupted says what to do next. Errors of other kinds are faults of this program, and keep
    their traceback.
    """
    # A shell may have closed them (2>&-), and bars of progress need somewhere to go.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115

    # What a terminal cannot show, as a name in other bytes than its own, is no reason to end.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except Terminated:
        end(program, f"stopped by SIGTERM; {interrupted or 'what was written stays'}", 143)
    except KeyboardInterrupt:
        end(program, f"interrupted; {interrupted or 'what was written stays'}", 130)
    except Exception as error:
        if not for_people(error):
            raise
        end(program, f"error: {for_people(error)}", 2)


def for_people(error: Exception) -> str:
    """What to tell a person of an error; empty for a fault of this program."""
    if isinstance(error, UserError | OSError):
        return str(error)
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return "out of memory: choose a smaller --batch-size, --image-size or --width"
    return ""


def is_out_of_memory(error: Exception) -> bool:
    """Torch says so with a RuntimeError, on a GPU with one of its own class."""
    name = type(error).__name__
    return name == "OutOfMemoryError" or "can't allocate memory" in str(error)


def end(program: str, message: str, code: int) -> None:
    """One line on stderr, and the exit code."""
    print(f"{program}: {printable(message)}", file=sys.stderr)
    raise SystemExit(code)


def printable(text: str) -> str:
    """Text in one line, in which nothing is invisible or commands a terminal.

    The names of files may hold line breaks, escape sequences, and bytes that are no text.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
