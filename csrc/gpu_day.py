"""Everything that has to be done on a GPU, in portions: checked, measured, and in one report.

    python csrc/gpu_day.py --out day --data-root /data/polypgen --minutes 9  # again: goes on
    python csrc/gpu_day.py --out try --data-root stand-in --dry              # tiny, on any machine

A GPU is often lent for minutes. Each call does as many steps as fit, in the order of STEPS, and the
experiment takes what time is left. Two files in --out say everything: gpu_day.md to be read, and
gpu_day.json, with which another machine can go on, finished runs included. A step that fails is
reported by its command and last lines, and the others go on; --again STEP does it once more.

The experiment is that of docs/results.md with a wider network, longer, and on all folds: FedAvg,
FedGS and the control, on real frames, all three of a fold before the next.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

# This file is a program inside the package: Python looks for imports beside it, not above it.
sys.path.insert(0, str(Path(__file__).parent.parent))

from support import hardware
from support.errors import UserError, end_on_signals, readable_errors
from support.files import read_csv, write_text
from support.tables import markdown
from tools import compare

ROOT = Path(__file__).resolve().parent.parent
LAST_LINES = 30  # of a command that failed
TEST_FILES = ("tests/test_kernels.py", "tests/test_hardware.py")
ALONE = ("-p", "no:cacheprovider", "-o", "addopts=")  # in one process: there is one GPU
LEARNING_RATES = ("1e-4", "5e-4")  # the paper's, and one for a training that is much shorter
RUN_FILES = ("config.json", "rounds.csv", "scores.csv", "results.json")  # of a run that is complete


class Sizes(NamedTuple):
    """Which tests, and options of the runs."""

    tests: str  # of TEST_FILES, as pytest -k takes it
    two_processes: str
    trial: str
    experiment: str
    folds: tuple[int, ...]


PAPER_NETWORK = "--width 32 --batch-size 4 --local-epochs 1"
FULL = Sizes(
    tests="cuda or hardware",
    two_processes=f"{PAPER_NETWORK} --image-size 512 --rounds 2 --centres C4 C5 C6",
    trial=f"{PAPER_NETWORK} --image-size 128 --rounds 10",
    experiment=f"{PAPER_NETWORK} --image-size 128 --rounds 100",
    folds=(1, 2, 3, 4, 5),
)

# For --dry: nothing is compiled, and no figure means anything.
TINY_NETWORK = "--width 2 --batch-size 24 --local-epochs 1 --image-size 32 --centres C4 C5 C6"
TINY = Sizes(
    tests="refused",
    two_processes=f"{TINY_NETWORK} --rounds 1",
    trial=f"{TINY_NETWORK} --rounds 1 --workers 1",
    experiment=f"{TINY_NETWORK} --rounds 1 --workers 1",
    folds=(1,),
)
TINY_VARIABLES = {"FEDGS_TINY": "1", "FEDGS_KERNELS": "torch", "TORCHDYNAMO_DISABLE": "1"}


class Failed(Exception):
    """A step that did not work, in words for the report."""


class Missing(Exception):
    """What a step needs and this machine has not."""


class TimeIsUp(Exception):
    """A command was still running at the end of the call."""


# ------------------------------------------------------------------------------------------ a call


class Day:
    """What one call of this program works with."""

    def __init__(self, out: Path, minutes: float, data_root: str, dry: bool, at_once: int):
        self.out = out
        self.deadline = time.monotonic() + 60 * minutes
        self.data_root = data_root
        self.dry = dry
        self.sizes = TINY if dry else FULL
        self.at_once = at_once
        self.commands = []  # of the step that is at work

        # What earlier calls have found, perhaps on another machine.
        self.steps = {}  # name -> {"state", "seconds", "commands", "figures", "text"}
        self.runs = {}  # name -> {file: its text}
        path = out / "gpu_day.json"
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["dry"] != dry:
                raise UserError(f"{path} is of calls {'without' if dry else 'with'} --dry")
            self.steps = known["steps"]
            self.runs = known["runs"]

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def call(self, *commands: list[str], **variables: str) -> str:
        """Run commands side by side, with more variables in their environment. -> what they printed

        Raises Failed for one that fails, and TimeIsUp; they have all ended then.
        """
        self.commands += [shown(command) for command in commands]
        logs = self.out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        environment = os.environ | (TINY_VARIABLES if self.dry else {}) | variables
        running = []
        try:
            for i, command in enumerate(commands):
                running.append(start(command, logs / f"{i}", environment))
            while any(process.poll() is None for process in running):
                if self.left() < 0:
                    raise TimeIsUp
                time.sleep(0.1)
        finally:
            for process in running:
                end(process)

        printed = ""
        for i, process in enumerate(running):
            output = (logs / f"{i}.out").read_text(errors="replace")
            if process.returncode != 0:
                output += (logs / f"{i}.err").read_text(errors="replace")
                raise Failed(describe_failure(commands[i], process.returncode, output))
            printed += output
        return printed

    def keep(self, name: str, state: str, seconds: float, figures: dict, text: str) -> None:
        """Note how a step ended, and write both files."""
        self.steps[name] = {
            "state": state,
            "seconds": round(seconds, 1),
            "commands": self.commands,
            "figures": figures,
            "text": text,
        }
        self.commands = []
        known = {"dry": self.dry, "steps": self.steps, "runs": self.runs}
        write_text(self.out / "gpu_day.json", json.dumps(known, indent=1) + "\n")
        write_text(self.out / "gpu_day.md", report(self.steps, self.dry))

    def training(self, options: str, folder: str) -> list[str]:
        """Options of a run, or of an experiment, that leaves its files in a folder of --out."""
        data_root = self.data_root or "stand-in"
        where = ["--data-root", data_root, "--cache", str(self.out / "cache")]
        return [*options.split(), *where, "--out", str(self.out / folder)]


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start a command in the project's folder, in a process group of its own."""
    # If this program is killed, what it has started must not go on beside the next call's. Only
    # Linux can promise that.
    with_parent = None
    if sys.platform == "linux":
        set_death_signal = 1
        with_parent = partial(ctypes.CDLL(None).prctl, set_death_signal, signal.SIGTERM)

    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=with_parent,
        )


def end(process: subprocess.Popen) -> None:
    """End a command that still runs, and what it has started. A run has time to say goodbye."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, signal_)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            continue


def describe_failure(command: list[str], code: int, output: str) -> str:
    """The command, and its last lines."""
    lines = "\n".join(output.rstrip().splitlines()[-LAST_LINES:])
    return f"`{shown(command)}` ended with {code}:\n\n```\n{lines}\n```"


def shown(command: list[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["python" if word == sys.executable else word for word in command])


# ------------------------------------------------------------------------------------------- steps

# Each takes a Day, and returns its figures and what the report says of them.
Found = tuple[dict, str]


def build(day: Day) -> Found:
    """Compile the kernels, and note what the figures of this machine come from."""
    day.call([sys.executable, "setup.py", "build_ext", "--inplace"])

    machine = {"torch": importlib.metadata.version("torch"), "python": sys.version.split()[0]}
    questions = {
        "GPU, driver, memory": "nvidia-smi --query-gpu=name,driver_version,memory.total "
        "--format=csv,noheader",
        "nvcc": "nvcc --version",
    }
    for what, command in questions.items():
        program, *options = command.split()
        found = shutil.which(program)
        machine[what] = f"{program} is missing"
        if found:
            machine[what] = day.call([found, *options]).strip().splitlines()[-1]
    return machine, "\n".join(f"* {what}: {answer}" for what, answer in machine.items())


def tests(day: Day) -> Found:
    """The kernels' and the hardware's tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", *ALONE]
    printed = day.call([*command, *TEST_FILES, "-k", day.sizes.tests])
    return {}, passed(printed)


def passed(printed: str) -> str:
    """What pytest says last. Raises Failed where every test was skipped."""
    last = printed.strip().splitlines()[-1]
    if " passed" not in last:
        raise Failed(f"no test ran:\n\n```\n{printed[-2000:]}\n```")
    return last


def sanitizer(tool: str, day: Day) -> Found:
    """The kernels' tests under one of CUDA's sanitizers."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = os.pathsep.join([os.environ.get("PATH", ""), f"{cuda}/bin"])
    program = shutil.which("compute-sanitizer", path=places)
    if program is None:
        raise Missing("compute-sanitizer is missing; it is part of the CUDA toolkit")

    # Only our kernels are looked at. Each tensor gets memory of its own, so that what lies beyond
    # it is nobody's; a graph cannot be captured then, and the profiler would want the sanitizer's
    # place.
    selected = f"({day.sizes.tests}) and not graph and not launch and not round"
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=fedgs"]
    command += [sys.executable, "-m", "pytest", "-q", *ALONE]
    printed = day.call(
        [*command, "tests/test_kernels.py", "-k", selected], PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    summaries = [line for line in printed.splitlines() if "SUMMARY" in line or " passed" in line]
    return {}, "\n".join(f"* {line.strip('= ')}" for line in summaries)


def measure(names: str, day: Day) -> Found:
    """Parts of csrc/benchmark.py, which checks before it times."""
    path = day.out / "logs" / "figures.json"
    command = [sys.executable, "csrc/benchmark.py", "--only", *names.split(), "--json", str(path)]
    printed = day.call(command)
    return json.loads(path.read_text(encoding="utf-8")), printed


def two_processes(day: Day) -> Found:
    """A round of two clients in one process, and in two that share the GPU."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ways = {"one process": ["fedgs.py", "--workers", "1"], "two": [*torchrun, "fedgs.py"]}
    figures = {}
    lines = [["a round in", "seconds", "validation Dice", "data"]]
    for name, program in ways.items():
        shutil.rmtree(day.out / name, ignore_errors=True)  # what a call that was over has left
        options = day.training(day.sizes.two_processes, name)
        day.call([sys.executable, *program, *options])

        # The first round also captures graphs, so the last one counts.
        last = read_csv(day.out / name / "rounds.csv", ("seconds", "dice", "data"))[-1]
        figures[name] = float(last["seconds"])
        lines.append([name, f"{figures[name]:.1f}", f"{float(last['dice']):.3f}", last["data"]])
    return figures, markdown(lines)


def learning_rate(day: Day) -> Found:
    """A short trial of FedAvg: the rate that is better for the baseline is taken for all."""
    need_data(day)
    commands = []
    for lr in LEARNING_RATES:
        shutil.rmtree(day.out / f"trial-{lr}", ignore_errors=True)
        options = day.training(f"{day.sizes.trial} --method fedavg --lr {lr}", f"trial-{lr}")
        commands.append([sys.executable, "fedgs.py", *options])
    day.call(*commands)

    best = {}
    for lr in LEARNING_RATES:
        rounds = read_csv(day.out / f"trial-{lr}" / "rounds.csv", ("dice",))
        best[lr] = max(float(row["dice"]) for row in rounds)
    chosen = max(best, key=best.get)
    scores = ", ".join(f"{dice:.3f} with {lr}" for lr, dice in best.items())
    return {"lr": chosen}, f"FedAvg's best validation Dice in fold 1: {scores}. Taken: {chosen}."


def need_data(day: Day) -> None:
    if not day.data_root:
        raise Missing("no --data-root: this needs PolypGen's frames")


def experiment(day: Day) -> Found:
    """FedAvg, FedGS and the control on five folds, as far as the time goes."""
    need_data(day)
    restore_runs(day)
    trial = day.steps.get("learning rate", NOT_BEGUN)
    lr = trial["figures"].get("lr", LEARNING_RATES[0])
    commands = []
    for first in range(min(day.at_once, len(day.sizes.folds))):
        folds = " ".join(str(fold) for fold in day.sizes.folds[first :: day.at_once])
        arms = f"--methods fedavg fedgs --control --folds {folds} --seeds 0 --lr {lr} --resume"
        options = day.training(f"{day.sizes.experiment} {arms}", "runs")
        commands.append([sys.executable, "-m", "tools.experiment", *options])

    ending = None
    try:
        day.call(*commands)
    except (Failed, TimeIsUp) as error:
        ending = error

    # Whatever has stopped it, what is there counts.
    keep_runs(day)
    rounds, text = runs_so_far(day)
    if isinstance(ending, Failed):
        raise Failed(f"{ending}\n\n{text}")
    return {"rounds": rounds, "unfinished": ending is not None}, text


def keep_runs(day: Day) -> None:
    """Take the tables of finished runs into gpu_day.json; weights are too large to be carried."""
    for path in sorted((day.out / "runs").glob("*/results.json")):
        folder = path.parent
        day.runs[folder.name] = {name: (folder / name).read_text() for name in RUN_FILES}


def restore_runs(day: Day) -> None:
    """The folders of finished runs, where this machine has not seen them."""
    for run, files in day.runs.items():
        for name, text in files.items():
            path = day.out / "runs" / run / name
            if not path.exists():
                write_text(path, text)


def runs_so_far(day: Day) -> tuple[dict[str, int], str]:
    """{run: its rounds}, and a table of them with the comparison of those that are finished."""
    rounds = {}
    lines = [["run", "rounds", "last validation Dice", "finished"]]
    for path in sorted((day.out / "runs").glob("*/rounds.csv")):
        name = path.parent.name
        rows = read_csv(path, ("dice",))
        rounds[name] = len(rows)
        dice = float(rows[-1]["dice"])
        lines.append([name, str(len(rows)), f"{dice:.3f}", "yes" if name in day.runs else ""])

    text = markdown(lines)
    if day.runs:
        sections = compare.compare(day.out / "runs" / name for name in day.runs)
        text += "\n\n" + compare.report(sections, markdown)
    return rounds, text


class Step(NamedTuple):
    """A part of the day."""

    name: str
    minutes: float  # a guess of how long it takes: with less left, it waits for the next call
    function: Callable[[Day], Found]
    every_call: bool = False


STEPS = (
    # Another machine has nothing compiled yet; where all is, this takes a second.
    Step("build", 3, build, every_call=True),
    Step("tests", 2, tests),
    Step("memcheck", 3, partial(sanitizer, "memcheck")),
    Step("adamw_accumulate_", 2, partial(measure, "adamw")),
    Step("aggregate", 2, partial(measure, "aggregate")),
    Step("mask_difficulty", 2, partial(measure, "masks")),
    Step("training", 4, partial(measure, "training")),
    Step("racecheck", 3, partial(sanitizer, "racecheck")),
    Step("two processes", 2, two_processes),
    Step("learning rate", 2, learning_rate),
    Step("experiment", 0.5, experiment),
)


NOT_BEGUN = {
    "state": "not begun",
    "seconds": 0,
    "commands": [],
    "figures": {},
    "text": "Not begun.",
}


# ---------------------------------------------------------------------------------------- the loop


def work(day: Day, only: Sequence[str] = ()) -> None:
    """The steps that are left and fit. Each is in the report as soon as it has ended.

    only: names of steps; none: all.
    """
    begun = 0
    for step in STEPS:
        if only and step.name not in only and not step.every_call:
            continue
        known = day.steps.get(step.name, NOT_BEGUN)
        if known["state"] in ("done", "failed") and not step.every_call:
            continue

        # A guess may be wrong: the first step of a call may take all of it.
        first = begun == 0
        if not first and day.left() < 60 * step.minutes:
            print(f"{step.name}: waits for the next call", flush=True)
            continue

        print(f"{step.name} …", flush=True)
        begun += not step.every_call
        started = time.monotonic()
        state, figures, text = attempt(step, day, first)
        seconds = known["seconds"] + time.monotonic() - started
        day.keep(step.name, state, seconds, figures, text)
        print(f"{step.name}: {state}, {seconds:.0f} s", flush=True)


def attempt(step: Step, day: Day, first: bool) -> tuple[str, dict, str]:
    """Do a step. -> how it ended, its figures, its text"""
    try:
        figures, text = step.function(day)
    except Missing as reason:
        return "missing", {}, f"Not done: {reason}."
    except TimeIsUp:
        # If it had a whole call for itself, the next one would end in the same way.
        if first:
            return "failed", {}, "It had not ended when the call was over, and it was the first."
        return "unfinished", {}, "It had not ended when the call was over, and begins anew."
    except Failed as error:
        return "failed", {}, str(error)
    except (OSError, LookupError, ValueError) as error:
        return "failed", {}, f"Its results cannot be read ({type(error).__name__}: {error})."
    return ("unfinished" if figures.get("unfinished") else "done"), figures, text


def report(steps: dict[str, dict], dry: bool) -> str:
    """All that is known, as Markdown."""
    title = "# A day with a GPU"
    if dry:
        title += ", tried out with --dry: no figure here means anything"
    overview = [["step", "state", "seconds"]]
    sections = []
    for step in STEPS:
        known = steps.get(step.name, NOT_BEGUN)
        overview.append([step.name, known["state"], f"{known['seconds']:.0f}"])

        sections.append(f"## {step.name}")
        if known["commands"]:
            sections.append("\n".join(["```", *known["commands"], "```"]))
        sections.append(known["text"].strip())
    return "\n\n".join([title, markdown(overview), *sections]) + "\n"


# ------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--minutes", type=float, default=9, help="how long this call may take")
    parser.add_argument("--data-root", default="", help="PolypGen's frames, for the experiment")
    parser.add_argument("--at-once", type=int, default=1, help="folds that are trained together")
    for option, what in (("--only", "nothing but these steps"), ("--again", "these once more")):
        parser.add_argument(option, nargs="+", choices=names, default=(), help=what)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to try the program out")
    options = parser.parse_args(arguments)

    with readable_errors("gpu_day.py", interrupted="the same command goes on"):
        end_on_signals()
        if not options.dry:
            hardware.choose_device("cuda")
        data_root = options.data_root
        if data_root not in ("", "stand-in"):
            data_root = str(Path(data_root).resolve())

        out = options.out.resolve()
        day = Day(out, options.minutes, data_root, options.dry, options.at_once)
        for name in options.again:
            day.steps.pop(name, None)
        work(day, options.only)
        print(f"\n{out / 'gpu_day.md'}")


if __name__ == "__main__":
    main()
