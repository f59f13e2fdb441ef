"""The one error class for people, and how a program ends with one line instead of a traceback."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn, TextIO


class UserError(ValueError):
    """Something a person can put right. The message says what was wrong, where, and what to do.

    It is one line, whatever names of files, or texts of libraries, are in it.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class Terminated(KeyboardInterrupt):
    """A signal that ends everything, like Ctrl-C: see end_on_signals."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def end_on_signals() -> None:
    """End with a line on SIGTERM, which schedulers send, and on SIGHUP, of a closed terminal."""

    def stop(number: int, _: object) -> NoReturn:
        raise Terminated(number)

    signal.signal(signal.SIGTERM, stop)
    # Under nohup it is ignored, and stays so.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, stop)


@contextlib.contextmanager
def readable_errors(program: str, interrupted: str = "") -> Iterator[None]:
    """End the program with one line on stderr: exit code 2 for an error, 128 and the signal's
    number for a signal: 130 for Ctrl-C, 143 for SIGTERM.

    interrupted says what to do next. Errors of other kinds are faults of this program, and keep
    their traceback.
    """
    interrupted = interrupted or "what was written stays"
    prepare_streams()
    try:
        yield
        sys.stdout.flush()
    except Terminated as error:
        name = signal.Signals(error.number).name
        end(program, f"stopped by {name}; {interrupted}", 128 + error.number)
    except KeyboardInterrupt:
        end(program, f"interrupted; {interrupted}", 130)
    except BrokenPipeError:
        lead_nowhere(sys.stdout)
        end(program, f"nobody reads its output any more; {interrupted}", 141)
    except Exception as error:
        if not for_people(error):
            raise
        end(program, f"error: {for_people(error)}", 2)


def prepare_streams() -> None:
    """Have the standard streams take whatever is printed."""
    # Streams that the program was started without (`2>&-`) lead nowhere, instead of being None: the
    # first file that it opens would otherwise become the stream, for libraries that print.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as the program

    # What a terminal cannot show, as a name in other bytes than its own, is no reason to end.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def for_people(error: Exception) -> str:
    """What to tell a person of an error; empty for a fault of this program."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}: make room there"
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
    try:
        print(f"{program}: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:  # the terminal may be gone
        lead_nowhere(sys.stderr)
    raise SystemExit(code)


def lead_nowhere(stream: TextIO) -> None:
    """Have a stream that broke take what is in its buffer: Python writes that at the very end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    """Text in one line, in which nothing is invisible or commands a terminal.

    The names of files may hold line breaks, escape sequences, and bytes that are no text.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
