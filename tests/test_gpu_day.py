"""csrc/gpu_day.py: calls that follow each other do every step once, whatever happens to a step."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT, exit_code, refused, rows

import fedgs
from support import runs

gpu_day = pytest.importorskip(
    "csrc.gpu_day", reason="the kernels are not compiled: pip install -v -e . says why"
)
Day, Step = gpu_day.Day, gpu_day.Step
Failed, Missing, TimeIsUp = gpu_day.Failed, gpu_day.Missing, gpu_day.TimeIsUp


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call(steps, minutes): what one call of the program does with these steps. -> Day"""

    def call_once(steps, minutes=1.0):
        monkeypatch.setattr(gpu_day, "STEPS", steps)
        day = Day(tmp_path / "day", minutes, data_root="", dry=True, at_once=1)
        gpu_day.work(day)
        return day

    return call_once


@pytest.fixture
def day(tmp_path, monkeypatch):
    """A day at full size whose commands are only noted, in day.commands."""
    day = Day(tmp_path / "day", 1, data_root="frames", dry=False, at_once=2)

    def note(*commands, **variables):
        day.commands += [gpu_day.shown(command) for command in commands]
        return "=== ERROR SUMMARY: 0 errors\n12 passed in 3 s\n"

    monkeypatch.setattr(day, "call", note)
    return day


def python(code):
    return [sys.executable, "-c", code]


def counted(calls, name, figures=None):
    """A step that only notes that it was done."""

    def function(day):
        calls.append(name)
        return figures or {}, f"what {name} found"

    return Step(name, 0, function)


def raising(error):
    """A step's function that ends with an error."""

    def function(day):
        raise error

    return function


def end_when(day, condition):
    """A thread that ends the call as soon as a condition holds, however busy the machine is."""

    def wait():
        while not condition():
            time.sleep(0.05)
        day.deadline = 0

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def states(day):
    return {name: step["state"] for name, step in day.steps.items()}


def report_of(day):
    return (day.out / "gpu_day.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------ a call


def test_a_call_goes_on_where_the_last_one_was(call):
    calls = []
    steps = [counted(calls, "first", {"ms": 2}), Step("second", 0, raising(KeyboardInterrupt))]
    with pytest.raises(KeyboardInterrupt):
        call(steps)

    steps[1:] = [counted(calls, "second"), counted(calls, "third")]
    day = call(steps)
    assert calls == ["first", "second", "third"]
    assert states(day) == {"first": "done", "second": "done", "third": "done"}
    assert day.steps["first"]["figures"] == {"ms": 2}
    call(steps)
    assert len(calls) == 3


def test_every_step_is_in_the_report_from_the_beginning(call):
    day = call([counted([], "first"), Step("later", 5, raising(AssertionError))], minutes=0)
    text = report_of(day)
    assert "| first | done | 0 |" in text
    assert "| later | not begun | 0 |" in text
    assert "## first\n\nwhat first found" in text
    assert "## later\n\nNot begun." in text


def test_a_step_waits_where_too_little_time_is_left(call):
    calls = []
    steps = [counted(calls, "first"), Step("long", 3, raising(AssertionError))]
    day = call([*steps, counted(calls, "short")], minutes=2)
    assert calls == ["first", "short"]
    assert "long" not in states(day)


def test_minutes_are_minutes(tmp_path):
    day = Day(tmp_path, 9, data_root="", dry=True, at_once=1)
    assert 530 < day.left() <= 540


def test_the_first_step_of_a_call_never_waits(call):
    calls = []
    build = counted(calls, "build")._replace(every_call=True)
    steps = [build, counted(calls, "long")._replace(minutes=60)]
    call(steps, minutes=1)
    assert calls == ["build", "long"]


def test_the_build_is_looked_at_in_every_call(call):
    """On another machine, nothing is compiled."""
    calls = []
    steps = [counted(calls, "build")._replace(every_call=True), counted(calls, "first")]
    call(steps)
    call(steps)
    assert calls == ["build", "first", "build"]


# ---------------------------------------------------------------------------------------- failures

BROKEN = """
import sys
for i in range(90):
    print("line", i)
print("the reason", file=sys.stderr)
sys.exit(3)
"""


def test_a_failed_step_is_reported_and_the_others_go_on(call):
    calls = []

    def broken(day):
        calls.append("broken")
        return {}, day.call(python(BROKEN))

    steps = [Step("broken", 0, broken), counted(calls, "next")]
    day = call(steps)
    assert states(day) == {"broken": "failed", "next": "done"}

    text = report_of(day)
    assert "| broken | failed |" in text
    assert "python -c" in text
    assert "ended with 3" in text
    assert "line 89\nthe reason\n" in text
    assert "line 50\n" not in text

    # It is not tried again by itself.
    call(steps)
    assert calls == ["broken", "next"]


@pytest.mark.parametrize("error", [KeyError("ms"), IndexError("no line"), OSError("no such file")])
def test_results_that_cannot_be_read_are_a_failure(call, error):
    calls = []
    day = call([Step("broken", 0, raising(error)), counted(calls, "next")])
    assert states(day) == {"broken": "failed", "next": "done"}
    assert type(error).__name__ in report_of(day)


def test_what_is_missing_is_said_until_it_is_there(call):
    calls = []
    day = call([Step("checked", 0, raising(Missing("no tool"))), counted([], "next")])
    assert states(day) == {"checked": "missing", "next": "done"}
    assert "Not done: no tool." in report_of(day)
    call([counted(calls, "checked"), counted(calls, "next")])
    assert calls == ["checked"]


def test_one_of_two_commands_fails(call):
    def function(day):
        return {}, day.call(python("print('fine')"), python("print('not fine'); exit(1)"))

    text = report_of(call([Step("both", 0, function)]))
    assert "`python -c 'print('\"'\"'not fine'\"'\"'); exit(1)'` ended with 1" in text
    assert "\nfine" not in text


# --------------------------------------------------------------------------------------- the clock

# Takes longer than any test. It says that it was asked to end, and has started another process.
ENDLESS = """
import pathlib, signal, subprocess, sys, time
def stop(*_):
    pathlib.Path("FOLDER", "goodbye").touch()
    sys.exit()
signal.signal(signal.SIGTERM, stop)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path("FOLDER", "child").write_text(str(child.pid))
time.sleep(100)
"""


def is_running(pid):
    """Whether a process is there, and is more than an entry that nobody has asked about yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_command_is_ended_by_the_clock_with_all_it_has_started(call, tmp_path):
    child = tmp_path / "child"

    def endless(day):
        child.unlink(missing_ok=True)
        end_when(day, lambda: child.exists() and child.read_text())
        return {}, day.call(python(ENDLESS.replace("FOLDER", str(tmp_path))))

    steps = [counted([], "build")._replace(every_call=True), counted([], "first")]
    steps.append(Step("endless", 0, endless))
    day = call(steps)
    assert states(day) == {"build": "done", "first": "done", "endless": "unfinished"}
    assert (tmp_path / "goodbye").exists()
    assert not is_running(int(child.read_text()))

    # In the next call it has all the time that there is.
    assert states(call(steps))["endless"] == "failed"


def test_a_call_after_the_clock_goes_on_with_what_was_cut_off(call, tmp_path):
    calls = []
    call([counted([], "first"), Step("long", 0, raising(TimeIsUp()))])
    day = call([counted(calls, "first"), counted(calls, "long")])
    assert calls == ["long"]
    assert states(day)["long"] == "done"


def test_what_has_more_to_do_goes_on_in_every_call(call):
    def train(day):
        time.sleep(0.2)
        return {"unfinished": True}, "as far as it has come"

    steps = [Step("experiment", 0, train)]
    assert states(call(steps)) == {"experiment": "unfinished"}
    day = call(steps)
    assert states(day) == {"experiment": "unfinished"}
    assert day.steps["experiment"]["seconds"] >= 0.4


def test_an_experiment_that_was_cut_off_is_unfinished(day, monkeypatch):
    def cut_off(*commands):
        raise TimeIsUp

    monkeypatch.setattr(day, "call", cut_off)
    figures, _ = gpu_day.experiment(day)
    assert figures == {"rounds": {}, "unfinished": True}


# ------------------------------------------------------------------------------------------- steps


def test_a_sanitizer_looks_at_our_kernels_alone(day, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    monkeypatch.setattr(shutil, "which", lambda name, path: f"{path.split(':')[-1]}/{name}")
    _, text = gpu_day.sanitizer("racecheck", day)
    assert text == "* ERROR SUMMARY: 0 errors\n* 12 passed in 3 s"
    (command,) = day.commands
    assert command.startswith(
        "/opt/cuda/bin/compute-sanitizer --tool racecheck --error-exitcode 9 "
    )
    assert " --kernel-regex kns=fedgs python -m pytest " in command
    assert "-k '(cuda or hardware) and not graph" in command


def test_without_a_sanitizer_it_is_missing(day, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(Missing, match="compute-sanitizer"):
        gpu_day.sanitizer("memcheck", day)


def test_tests_that_were_all_skipped_are_no_success():
    assert gpu_day.passed("...\n12 passed, 3 skipped in 2.1s\n") == "12 passed, 3 skipped in 2.1s"
    with pytest.raises(Failed, match="no test ran"):
        gpu_day.passed("sss\n3 skipped, 40 deselected in 0.1s\n")


def test_the_better_learning_rate_is_taken(day):
    left = day.out / "trial-1e-4"  # by a call that was over
    left.mkdir(parents=True)

    def train(*commands):
        assert not left.exists()
        for lr, dice in {"1e-4": [0.1, 0.31, 0.2], "5e-4": [0.28, 0.29, 0.3]}.items():
            folder = day.out / f"trial-{lr}"
            folder.mkdir()
            (folder / "rounds.csv").write_text("\n".join(["dice", *map(str, dice)]))

    day.call = train
    figures, text = gpu_day.learning_rate(day)
    assert figures == {"lr": "1e-4"}
    assert "0.310 with 1e-4, 0.300 with 5e-4" in text


def test_folds_are_shared_out_and_all_arms_of_one_come_before_the_next(day):
    day.steps["learning rate"] = {"figures": {"lr": "5e-4"}}
    gpu_day.experiment(day)
    first, second = day.commands
    assert "--folds 1 3 5 " in first
    assert "--folds 2 4 " in second
    for command in day.commands:
        assert "--methods fedavg fedgs --control " in command
        assert "--image-size 128 --rounds 100 " in command
        assert "--seeds 0 --lr 5e-4 --resume --data-root frames " in command


def test_without_frames_there_is_no_experiment(day):
    day.data_root = ""
    for step in (gpu_day.learning_rate, gpu_day.experiment):
        with pytest.raises(Missing, match="no --data-root"):
            step(day)


def test_finished_runs_travel_to_another_machine(day, finished, tmp_path):
    name = "polypgen-fedgs-utnet-f1-s0"
    shutil.copytree(finished, day.out / "runs" / name)
    (day.out / "runs" / "begun").mkdir()
    rounds, _ = gpu_day.runs_so_far(day)
    assert rounds == {name: 2}
    gpu_day.keep_runs(day)
    assert "| Dice_L |" in gpu_day.runs_so_far(day)[1]
    day.keep("experiment", "unfinished", 1.0, {}, "")

    # Only this file is taken along.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(day.out / "gpu_day.json", elsewhere)
    there = Day(elsewhere, 1, data_root="", dry=False, at_once=1)
    gpu_day.restore_runs(there)
    for file in ("config.json", "rounds.csv", "scores.csv", "results.json"):
        carried = elsewhere / "runs" / name / file
        assert carried.read_text() == (finished / file).read_text()

    config = json.loads((finished / "config.json").read_text())["config"]
    config = fedgs.Config(**{**config, "centres": tuple(config["centres"])})
    folder = runs.Folder(config)
    folder.path = elsewhere / "runs" / name
    assert asdict(config)["rounds"] == 2
    assert runs.is_complete(folder)
    assert gpu_day.runs_so_far(there) == gpu_day.runs_so_far(day)


# -------------------------------------------------------------------------------- the whole program


def test_without_a_gpu_nothing_begins(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", bool)
    refused(capsys, exit_code(gpu_day.main, ["--out", tmp_path / "day"]), "no GPU")
    assert not (tmp_path / "day").exists()


def test_a_step_is_done_again_if_asked(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_day, "STEPS", [counted(calls, "first"), counted(calls, "second")])
    options = ["--out", tmp_path, "--dry"]
    assert exit_code(gpu_day.main, options) == 0
    assert exit_code(gpu_day.main, [*options, "--again", "second"]) == 0
    assert calls == ["first", "second", "second"]


def test_nothing_but_one_step_if_asked(tmp_path, monkeypatch):
    calls = []
    build = counted(calls, "build")._replace(every_call=True)
    monkeypatch.setattr(gpu_day, "STEPS", [build, counted(calls, "first"), counted(calls, "last")])
    assert exit_code(gpu_day.main, ["--out", tmp_path, "--dry", "--only", "last"]) == 0
    assert calls == ["build", "last"]
    assert "| first | not begun |" in (tmp_path / "gpu_day.md").read_text()


def test_tiny_figures_and_others_are_kept_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_day, "STEPS", [counted([], "first")])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert exit_code(gpu_day.main, ["--out", tmp_path, "--dry"]) == 0
    assert "no figure here means anything" in (tmp_path / "gpu_day.md").read_text()
    refused(capsys, exit_code(gpu_day.main, ["--out", tmp_path]), "is of calls with --dry")


@pytest.mark.slow
def test_a_run_that_the_clock_ends_goes_on_in_the_next_call(tmp_path, cache):
    """Whole rounds stay, and the run is trained to its end as if nothing had happened."""
    table = tmp_path / "day" / "runs" / "polypgen-fedavg-utnet-f1-s0" / "rounds.csv"
    (tmp_path / "day").mkdir()
    (tmp_path / "day" / "cache").symlink_to(cache)

    def call_until(rounds):
        day = Day(tmp_path / "day", 5, data_root="stand-in", dry=True, at_once=1)
        many = day.sizes.experiment.replace("--rounds 1", "--rounds 10000")
        day.sizes = day.sizes._replace(experiment=many)

        thread = end_when(day, lambda: table.exists() and len(rows(table)) >= rounds)
        figures, text = gpu_day.experiment(day)
        thread.join()
        assert figures["unfinished"]
        assert f"| {table.parent.name} | {len(rows(table))} |" in text
        return rows(table)

    before = call_until(rounds=1)
    after = call_until(rounds=len(before) + 1)
    assert after[: len(before)] == before
    assert len(after) > len(before)


def commands_about(folder):
    """The command lines of all processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            words = path.read_text().split("\0")
            if any(str(folder) in word for word in words):
                found.append(words)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent on Linux only")
def test_a_whole_day_that_is_killed_in_the_middle(tmp_path, cache):
    (tmp_path / "cache").symlink_to(cache)
    command = [sys.executable, "csrc/gpu_day.py", "--dry"]
    command += ["--out", str(tmp_path), "--data-root", "stand-in"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    kept = tmp_path / "gpu_day.json"
    program = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not any("fedgs.py" in words for words in commands_about(tmp_path)):
        assert program.poll() is None
        time.sleep(0.05)
    program.send_signal(signal.SIGKILL)
    program.wait()
    before = json.loads(kept.read_text())["steps"]

    # What it had started ends with it, and is not in the way of the next call.
    deadline = time.monotonic() + 30
    while commands_about(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    printed = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True
    ).stdout
    begun = [line.removesuffix(" …") for line in printed.splitlines() if line.endswith("…")]
    begun = [name for name in begun if "check" not in name]  # looked for in every call
    assert begun == ["build", "two processes", "learning rate", "experiment"]
    steps = json.loads(kept.read_text())["steps"]
    for name, step in before.items():
        assert steps[name] == step or name == "build"

    # Everything that this machine can do has been done.
    text = (tmp_path / "gpu_day.md").read_text(encoding="utf-8")
    for step in gpu_day.STEPS:
        state = steps[step.name]["state"]
        assert state == "done" or (step.name in ("memcheck", "racecheck") and state == "missing")
        assert f"## {step.name}\n" in text
    assert "| adamw_accumulate_ | 0.1 M | 36, 36, 116 |" in text
    assert "| 4 x 32² | plain fp32 |" in text
    assert "fedgs - fedavg: 1 pair of runs" in text
    assert kept.stat().st_size < 200_000
