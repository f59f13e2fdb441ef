"""Runs that are killed before every step that they take on the disk, and then go on.

Disks that are full from some step on, and two runs that are started in one folder, are here, too.

A step is what changes a file or a folder: opening a file to write it, either half of a write,
fsync, rename, unlink, mkdir. A killed run cleans nothing up. Each is a process of its own, forked
by this file as a program, which has imported PyTorch once and has no other thread.
"""

import builtins
import contextlib
import csv
import errno
import gc
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, square_images
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
import fedgs
from support import checkpoints, pictures, runs
from support.errors import UserError, for_people
from support.files import is_temporary, to_json

# There is momentum to be lost. With this seed the best rounds are 1 and 2 of three. `resume` is set
# from the beginning, since config.json tells of it.
CONFIG = fedgs.Config(
    rounds=3,
    local_epochs=1,
    batch_size=2,
    lr=0.3,
    image_size=16,
    width=2,
    server_momentum=0.5,
    centres=("C1", "C2", "C6"),
    kernels="torch",
    workers="1",
    out="run",
    seed=43,
    resume=True,
)
WRITTEN = [  # the files of such a run in their order
    "config.json",
    *("resume.pt", "best.pt", "best_small.pt", "last.pt", "rounds.csv"),
    *("resume.pt", "best_small.pt", "last.pt", "rounds.csv"),
    *("resume.pt", "last.pt", "rounds.csv"),
    *("scores.csv", "predictions.png", "curves.png", "results.json"),
]
REFUSED = 2  # the exit code of an error for people
PAIRS = 20  # of runs in one folder
STEPS_OF_A_FILE = ["open", "write", "open", "sync", "replace"]  # with all its writes as one


# ------------------------------------------------------------------------------------- a tiny run


def make_tiny() -> None:
    """Have the runs of this process take no time: neither long, nor by their clock."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread would not survive a fork
    fedgs.build_network = tiny_network
    fedgs.load_data = tiny_federation
    fedgs.time = SimpleNamespace(perf_counter=float)
    pictures.draw_curves = pictures.draw_predictions = tiny_picture


def tiny_network(config: fedgs.Config) -> nn.Module:
    """Two convolutions, and batch norm for its buffers and counter."""
    torch.manual_seed(config.seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )


def tiny_federation(config: fedgs.Config, centres: tuple) -> data.Federation:
    """Two clients and a held-out centre, with a square to find in each image."""
    federation = data.Federation("squares", "memory", "every other one is small", "", 16, "C6")
    generator = torch.Generator().manual_seed(1)
    for centre in centres:
        images = square_images(centre, 6, generator, size=16)
        images.images[:, :, 10:13, 10:14] += 100
        images.small[::2] = False
        if centre == "C6":
            federation.out_test = images.subset(range(2))
            federation.facts[centre] = data.Facts(0, 0, 2, 0, 0, "")
        else:
            federation.train[centre] = images.subset(range(2))
            federation.validation[centre] = images.subset(range(2, 4))
            federation.in_test[centre] = images.subset(range(4, 6))
            federation.facts[centre] = data.Facts(2, 2, 2, 0, 0, "")
    return federation


def tiny_picture(*what: object) -> SimpleNamespace:
    """A figure, as far as saving it goes."""

    def savefig(path, dpi):
        Image.new("L", (1, 1)).save(path)

    return SimpleNamespace(savefig=savefig)


# --------------------------------------------------------------------------------- steps on a disk


class Watch:
    """Notes this process's steps in the folder `run`, and kills it before one of them.

    Or the disk is full from that step on: nothing can be written then, and files can be deleted.
    """

    def __init__(self, fatal: int | None, full: bool = False):
        self.folder = os.path.abspath("run")
        self.fatal = fatal  # number of the step that is not taken any more
        self.full = full
        self.steps = []
        self.names = {}  # {file descriptor: path}
        self.unsynced = set()  # paths whose content may not be on the disk yet
        self.told = 0  # how many files Python says that it has opened or renamed

    def begin(self) -> None:
        """Watch from here on."""
        whole_open, whole_replace = open, os.replace

        def watched_open(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
            if not (set(mode) & set("wax+") and self.is_inside(path)):
                return whole_open(path, mode, buffering, encoding, errors, newline)
            self.step("open", path)
            raw = WatchedFile(path, mode, self)
            self.names[raw.fileno()] = os.path.abspath(path)
            file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline)

        def watched_sync(descriptor):
            # Not even a kill could tell that it is not done, and it takes a while.
            path = self.names[descriptor]
            self.step("sync", path)
            self.unsynced.discard(path)

        def watched_replace(path, target):
            self.step("replace", path)
            whole_replace(path, target)
            target = os.path.abspath(target)
            self.unsynced.discard(target)
            if os.path.abspath(path) in self.unsynced:
                self.unsynced.add(target)

        builtins.open = io.open = watched_open
        os.fsync = watched_sync
        os.replace = os.rename = watched_replace
        os.unlink = os.remove = self.watched("unlink", os.unlink, exists=True)
        os.mkdir = self.watched("mkdir", os.mkdir, exists=False)
        sys.addaudithook(self.listen)

    def watched(self, name: str, function: Callable, exists: bool) -> Callable:
        """A function that is a step where its path exists, or where it does not."""

        def with_step(path, *others, **options):
            if os.path.exists(path) == exists:
                self.step(name, path)
            return function(path, *others, **options)

        return with_step

    def is_inside(self, path: object) -> bool:
        if not isinstance(path, str | Path):
            return False
        path = os.path.abspath(path)
        return path == self.folder or path.startswith(self.folder + os.sep)

    def step(self, what: str, path: str | Path) -> None:
        """A step is about to be taken."""
        if not self.is_inside(path):
            return
        if len(self.steps) == self.fatal:
            if self.full and what == "unlink":
                return
            if self.full:
                name = None if what in ("write", "sync") else str(path)
                raise OSError(errno.ENOSPC, "No space left on device", name)
            self.cut_power()
            os.kill(os.getpid(), signal.SIGKILL)

        self.steps.append(f"{what} {own_name(Path(path))}")

    def cut_power(self) -> None:
        """As if the power failed, too: a file may have its name by then, and no content yet."""
        for path in self.unsynced:
            if os.path.exists(path) and not is_temporary(Path(path)):
                os.truncate(path, 0)

    def listen(self, event: str, values: tuple) -> None:
        """Count what Python does, in whatever way it came to it."""
        if event == "open" and self.is_inside(values[0]):
            self.told += bool(values[2] & (os.O_WRONLY | os.O_RDWR))
        if event == "os.rename" and self.is_inside(values[0]):
            self.told += 1


class WatchedFile(io.FileIO):
    """A file that is written in halves."""

    def __init__(self, path: str | Path, mode: str, watch: Watch):
        super().__init__(path, mode.replace("b", "").replace("t", ""))
        self.watch = watch

    def write(self, content: bytes) -> int:
        content = bytes(content)
        middle = len(content) // 2
        for part in (content[:middle], content[middle:]):
            self.watch.step("write", self.name)
            self.watch.unsynced.add(os.path.abspath(self.name))
            super().write(part)
        return len(content)


# ------------------------------------------------------------------------------------ killed runs


def main(place: Path) -> None:
    """The program: kill runs in a folder, and print what happened as JSON."""
    make_tiny()
    warm_up(place)
    whole = place / "whole"
    whole.mkdir()
    code, steps, told = attempt(whole)
    expected = contents(whole / "run")
    found = {"code": code, "steps": steps, "told": told, "best": best_rounds(whole / "run")}

    # From nothing.
    new = place / "new"
    new.mkdir()
    found["killed"] = break_everywhere(new, steps, expected)

    # From where a first kill has left it: resume.pt knows of round 2. best_small.pt, which is to be
    # of that round as well, is half written.
    begun = place / "begun"
    begun.mkdir()
    second_round = steps.index("replace resume.pt", steps.index("replace resume.pt") + 1)
    attempt(begun, steps.index("write best_small.pt", second_round) + 1)
    again = place / "again"
    shutil.copytree(begun, again)
    _, found["steps again"], _ = attempt(again)
    found["killed again"] = break_everywhere(begun, found["steps again"], expected)

    found["full"] = break_everywhere(new, steps, expected, full=True)
    found["pairs"], found["kept out"] = start_in_pairs(new, steps, expected)
    print(json.dumps(found))


def warm_up(place: Path) -> None:
    """Do in this process what every one of its children would otherwise do once more."""
    os.chdir(place)
    with contextlib.redirect_stdout(io.StringIO()):
        fedgs.run(CONFIG)
    gc.freeze()


def break_everywhere(
    begun: Path, steps: list[str], expected: dict[str, object], full: bool = False
) -> list[str]:
    """Go on from a copy of `begun`, killed before each of these steps; then to the end.

    full: on a disk that is full from that step on, instead. expected: the contents that the run has
    to end with. -> what went wrong
    """
    wrong = []
    seen = set()
    place = begun.with_name("place")
    for number, step in enumerate(steps):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(begun, place)
        code, _, _ = attempt(place, number, full)
        if code != (REFUSED if full else -signal.SIGKILL):
            wrong.append(f"{number} ({step}): ended with {code}")
        if full and any(map(is_temporary, place.glob("run/*"))):
            wrong.append(f"{number} ({step}): left what was half written")

        # Steps may leave nothing new, as fsync does, and nothing new can then come of it.
        state = snapshot(place / "run")
        if state not in seen:
            seen.add(state)
            wrong += [f"{number} ({step}): {what}" for what in go_on(place, expected)]
    return wrong


def start_in_pairs(
    begun: Path, steps: list[str], expected: dict[str, object]
) -> tuple[list[str], int]:
    """Start two runs in one folder, of which every other pair loses one; then to the end.

    -> what went wrong; how many runs were kept out
    """
    generator = random.Random(0)
    kept_out = 0
    wrong = []
    place = begun.with_name("place")
    for number in range(PAIRS):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(begun, place)
        fatal = generator.randrange(len(steps)) if number % 2 else None
        pair = [begin(place, fatal), begin(place)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in pair]

        kept_out += codes.count(REFUSED)
        if not set(codes) <= {0, REFUSED, -signal.SIGKILL} or codes == [REFUSED, REFUSED]:
            wrong.append(f"{number}: ended with {codes}")
        wrong += [f"{number}, {codes}: {what}" for what in go_on(place, expected)]
    return wrong, kept_out


def go_on(place: Path, expected: dict[str, object]) -> list[str]:
    """Look at what a run has left in place/run, and take it to its end. -> what went wrong"""
    wrong = []
    faults = {path.name: fault(path) for path in files_of(place / "run")}
    half = [f"{name} ({why})" for name, why in faults.items() if why]
    if half:
        wrong.append(f"not whole: {', '.join(half)}")

    code, _, _ = attempt(place)
    found = contents(place / "run")
    other = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
    if other:
        wrong.append(f"resumed, {code}, with another {', '.join(other)}")
    return wrong


def attempt(
    place: Path, fatal: int | None = None, full: bool = False
) -> tuple[int, list[str], int]:
    """Train in place/run, in a process of its own that is killed before a step.

    full: there is no room on the disk any more, instead. -> exit code (-9: killed, REFUSED: with an
    error for people); of one that came to its end: its steps, and what Python told
    """
    child = begin(place, fatal, full)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    notes = place / f"{child}.json"
    steps, told = json.loads(notes.read_text()) if code == 0 else ([], 0)
    return code, steps, told


def begin(place: Path, fatal: int | None = None, full: bool = False) -> int:
    """Start what `attempt` waits for. -> the number of its process"""
    child = os.fork()
    if child:
        return child

    code = 1
    try:
        os.chdir(place)
        watch = Watch(fatal, full)
        watch.begin()
        with contextlib.redirect_stdout(io.StringIO()):
            results = fedgs.run(CONFIG)
        saved = json.loads(Path("run/results.json").read_text())
        assert json.loads(to_json(results)).items() <= saved.items()
        Path(f"{os.getpid()}.json").write_text(json.dumps([watch.steps, watch.told]))
        code = 0
    except (UserError, OSError) as error:
        # Of a full disk people have to be told which one.
        words = "'run" if full else "run is in use"
        code = REFUSED if words in for_people(error) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def files_of(folder: Path) -> list[Path]:
    """The files of a run: neither its lock, nor what a killed process has left half written."""
    return list(folder.glob("[!.]*"))


def own_name(path: Path) -> str:
    """The name of a file, or the one that it is to have: without the number of a process."""
    return path.name.rpartition("-")[2]


def snapshot(folder: Path) -> frozenset:
    """All that a killed process has left in a folder."""
    files = folder.glob("*")
    return frozenset((is_temporary(path), own_name(path), path.read_bytes()) for path in files)


def contents(folder: Path) -> dict[str, object]:
    """What is in each file of a run, for comparisons."""
    found = {}
    for path in files_of(folder):
        found[path.name] = path.read_bytes()
        if path.suffix == ".pt" and not fault(path):
            found[path.name] = plain(checkpoints.read(path))
    return found


def plain(value: object) -> object:
    """Tensors as lists with their types, so that == compares every bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        about = getattr(value, "_metadata", {}).get(checkpoints.ABOUT)
        return [(name, plain(x)) for name, x in value.items()], about
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return value


def best_rounds(folder: Path) -> dict[str, int]:
    """{checkpoint: its round}, as the files themselves say."""
    names = (*runs.BEST, "last")
    return {name: checkpoints.read_weights(folder / f"{name}.pt")[1]["round"] for name in names}


def fault(path: Path) -> str:
    """Why a file of a run cannot be read from beginning to end; empty for one that can."""
    try:
        if path.suffix == ".pt":
            checkpoints.read(path)
        elif path.suffix == ".png":
            Image.open(path).verify()
        elif path.name == "results.json":
            runs.read_results(path.parent)
        elif path.name == "config.json":
            json.loads(path.read_text())
        else:
            check_rows(path.read_text())
    except Exception as error:
        return repr(error)
    return ""


def check_rows(text: str) -> None:
    """Raise ValueError for CSV text without a row, or with one that is not whole."""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    lengths = {len(row) for row in rows}
    if len(rows) < 2 or len(lengths) > 1 or not text.endswith("\n"):
        raise ValueError("a row is not whole")


# -------------------------------------------------------------------------------------------- tests

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs an operating system that forks"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="its pathlib cannot be watched"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What this file, as a program, found."""
    done = subprocess.run(
        [sys.executable, __file__, tmp_path_factory.mktemp("killed")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        timeout=1800,  # a quarter of a minute where nothing else is going on
        check=True,
    )
    return json.loads(done.stdout)


def test_the_run_is_worth_killing(found):
    """It has what can be lost, and none of its steps escapes."""
    assert found["code"] == 0
    assert found["best"] == {"best": 1, "best_small": 2, "last": 3}
    assert CONFIG.server_momentum > 0

    expected = ["mkdir run"]
    for name in WRITTEN:
        expected += [f"{step} {name}" for step in STEPS_OF_A_FILE]
    assert [step for step, _ in itertools.groupby(found["steps"])] == expected
    assert len(found["steps"]) >= len(expected) + len(WRITTEN)  # a write has two halves
    opened = [step for step in expected if step.startswith(("open", "replace"))]
    assert found["told"] == len(opened) + 1  # that of the lock


def test_killed_before_every_step_and_resumed(found):
    assert found["killed"] == []


def test_killed_once_more_before_every_step_after_that(found):
    assert found["killed again"] == []

    # What resume.pt tells is written again, and then what is still to come.
    rest = ["best_small.pt", "last.pt", "rounds.csv", "config.json"]
    written = [step for step in found["steps again"] if step.startswith("replace")]
    assert written == [f"replace {name}" for name in rest + WRITTEN[10:]]


def test_a_disk_that_is_full_from_any_step_on(found):
    assert found["full"] == []


def test_two_runs_that_are_started_in_one_folder(found):
    assert found["pairs"] == []
    assert 0 < found["kept out"] <= PAIRS


if __name__ == "__main__":
    main(Path(sys.argv[1]))
