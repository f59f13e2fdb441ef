"""A run's folder: what is refused, damage, going on, and the rows and texts of a run."""

import contextlib
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import refused
from matplotlib.figure import Figure
from test_files import flipped

import data
import metrics
from fedgs import ClientLog, Config, FlatNetwork
from support import checkpoints, runs
from support.errors import UserError

pytestmark = pytest.mark.usefixtures("plain_pictures")

# ---------------------------------------------------------------------------------- before a run


def test_where_a_run_goes(tmp_path):
    assert str(runs.Folder(Config()).path) == "runs/polypgen-fedgs-utnet-f1-s0"
    assert runs.Folder(Config(out=str(tmp_path))).path == tmp_path
    for split in ("given", "centre"):
        assert runs.run_name(Config(split=split)) == f"polypgen-fedgs-utnet-{split}-s0"


def test_results_of_another_run_are_left_alone(run, finished, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    refused(capsys, run(finished), "not empty: continue its run with --resume, or choose another")
    code = run(finished, "--resume", "--lr", 0.5)
    refused(capsys, code, "another run", "lr 0.001, now 0.5")
    refused(capsys, run(finished, "--resume", "--width", 4), "width 2, now 4")
    refused(capsys, run(finished, "--resume", "--rounds", 1), "--rounds 1", "2 rounds already")
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_a_folder_with_something_else(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    refused(capsys, run(tmp_path), "not empty", "choose another --out")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_a_killed_write_leaves_is_no_obstacle(tmp_path):
    (tmp_path / ".tmp-12-last.pt").write_text("")
    runs.Folder(Config(out=str(tmp_path))).check({"config": {}})


def test_a_folder_is_of_one_process_at_a_time(tmp_path):
    folder = tmp_path / "run"
    refusal = pytest.raises(UserError, match=r"run is in use by another process.*--out")
    with runs.locked(folder):
        with refusal, runs.locked(folder):
            pass
        with runs.locked(tmp_path / "another"):
            pass

    # A lock that is free again is no obstacle, nor is what it leaves.
    with runs.locked(folder):
        runs.Folder(Config(out=str(folder))).check({"config": {}})
    with pytest.raises(RuntimeError), runs.locked(folder):
        raise RuntimeError
    with runs.locked(folder):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs an operating system that forks")
def test_a_killed_process_leaves_no_lock(tmp_path):
    child = os.fork()
    if child == 0:
        with runs.locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / runs.LOCK).exists()
    with runs.locked(tmp_path):
        pass


def test_a_run_in_a_folder_that_is_in_use(run, finished, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    with runs.locked(finished):
        refused(capsys, run(finished, "--resume", "--rounds", 3), f"{finished} is in use")
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_a_run_has_its_folder_from_its_last_check_to_its_last_file(run, tmp_path, monkeypatch):
    """So that it does not matter in which order two runs come to a folder."""
    folder = tmp_path / "run"
    found = []

    def note_lock(name: str, method: Callable) -> Callable:
        def noted(*given: object) -> object:
            try:
                with runs.locked(folder) if folder.exists() else contextlib.nullcontext():
                    found.append(f"{name} without")
            except UserError:
                found.append(name)
            return method(*given)

        return noted

    for name in ("check", "load_progress", "claim", "save_round", "save_results"):
        monkeypatch.setattr(runs.Folder, name, note_lock(name, getattr(runs.Folder, name)))
    assert run(folder, "--rounds", 1) == 0
    rest = ["load_progress", "claim", "save_round", "save_results"]
    assert found == ["check without", "check", *rest]


def test_what_was_half_written_goes_when_the_run_goes_on(tmp_path):
    folder = runs.Folder(Config(out=str(tmp_path)))
    for name in (".tmp-12-last.pt", "notes.txt"):
        (tmp_path / name).write_text("")
    folder.claim({"config": {}})
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt"}


@pytest.mark.skipif(os.name != "posix", reason="needs permissions of POSIX")
def test_a_folder_that_everyone_can_write_to_is_said_to_be(run, tmp_path, capsys):
    for mode, expected in ((0o755, ""), (0o775, ""), (0o777, " (every user of this machine can")):
        tmp_path.chmod(mode)
        assert runs.who_can_write(tmp_path).startswith(expected)
        assert bool(runs.who_can_write(tmp_path)) == bool(expected)
    assert run(tmp_path, "--rounds", 1) == 0
    assert f"{tmp_path} (every user of this machine can" in capsys.readouterr().out


@pytest.mark.slow
def test_options_added_later_do_not_keep_a_run_from_going_on(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    del record["config"]["workers"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    assert run(tmp_path / "run", "--resume") == 0


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resume.pt", "config.json"])
def test_damage_is_a_line(run, tmp_path, finished, capsys, name):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / name).write_text("hello world")
    refused(capsys, run(folder, "--resume"), f"{folder / name} is damaged")


def test_lost_state_of_a_finished_run(run, tmp_path, finished, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "resume.pt").unlink()
    refused(capsys, run(folder, "--resume", "--rounds", 3), "resume.pt is missing")


# ---------------------------------------------------------------------------------- saving a round


class Rounds:
    """Made-up rounds in a folder, after those that are there. Their weights are their numbers."""

    def __init__(self, out, source="here", **options):
        torch.manual_seed(0)
        self.config = Config(out=str(out), resume=True, **options)
        self.folder = runs.Folder(self.config)
        flat = FlatNetwork(nn.BatchNorm1d(2))
        federation = SimpleNamespace(source=source)
        self.clients = SimpleNamespace(flat=flat, federation=federation)
        self.server = SimpleNamespace(state=flat.state(), velocity=torch.zeros(4), round=0)
        self.history = self.folder.load_progress(self.server, self.clients)

    def save(self, *validations, **row):
        """A round for each of these validation measures."""
        for validation in validations:
            number = len(self.history) + 1
            row_of = {"round": number, "eta": 1.0, "dice": 0.5, "seconds": 1.0}
            self.history.append({**row_of, **row})
            flat = self.clients.flat
            for vector in (flat.parameters, flat.buffers, flat.counters, self.server.velocity):
                vector.fill_(number)

            source = self.clients.federation.source
            about = runs.describe_weights(self.config, source, number, "0")
            weights = checkpoints.with_about(flat.network, about)
            self.folder.save_round(self.server, weights, self.history, validation)
        return self


def validation(dice, dice_s, small=5):
    """Validation measures with these two means."""
    measures = {name: {"mean": 0.5, "n": 5} for name in metrics.MEASURES}
    measures["dice"] = {"mean": dice, "n": 5}
    measures["dice_s"] = {"mean": dice_s, "n": small}
    return measures


def kept(folder, name):
    """The round of a checkpoint, by its weights and by what it says."""
    state, about = checkpoints.read_weights(folder / f"{name}.pt")
    numbers = torch.cat([x.flatten().double() for x in state.values()]).unique()
    assert numbers.tolist() == [about["round"]]
    return about["round"]


def test_the_best_rounds_are_kept(tmp_path):
    measures = [
        validation(0.2, 0.9),
        validation(0.8, 0.1),
        validation(0.8, 0.9),
        validation(0.7, 0),
    ]
    rounds = Rounds(tmp_path).save(*measures)
    assert kept(tmp_path, "best") == 2  # of equal rounds the earlier one
    assert kept(tmp_path, "best_small") == 1
    assert kept(tmp_path, "last") == 4
    assert rounds.folder.best["best"] == {"round": 2, "score": 0.8}


def test_best_small_goes_by_dice_where_nothing_is_small(tmp_path):
    Rounds(tmp_path).save(*[validation(dice, math.nan, small=0) for dice in (0.2, 0.6, 0.4)])
    assert kept(tmp_path, "best_small") == kept(tmp_path, "best") == 2


def test_rounds_that_not_all_validated_are_never_the_best(tmp_path):
    rounds = Rounds(tmp_path).save(validation(0.2, 0.2))
    rounds.save(validation(0.9, 0.9), **{runs.VALIDATED: "3 of 5"})
    assert [kept(tmp_path, name) for name in ("best", "best_small", "last")] == [1, 1, 2]
    rounds.save(validation(0.5, 0.5))
    assert [kept(tmp_path, name) for name in ("best", "best_small", "last")] == [3, 3, 3]


def test_a_round_is_over_with_resume_pt_and_a_run_with_results_json(tmp_path, monkeypatch):
    written = []
    whole = os.replace

    def noted(source, target):
        written.append(target.name)
        whole(source, target)

    rounds = Rounds(tmp_path)
    monkeypatch.setattr(os, "replace", noted)
    rounds.save(validation(0.9, 0.9), validation(0.8, 0.8))
    first = ["resume.pt", "best.pt", "best_small.pt", "last.pt", "rounds.csv"]
    assert written == [*first, "resume.pt", "last.pt", "rounds.csv"]

    written.clear()
    rounds.folder.save_results({}, [{"dice": 1}], {"curves.png": Figure(figsize=(1, 1))})
    assert written == ["scores.csv", "curves.png", "results.json"]


def test_a_run_that_goes_on_has_no_results(tmp_path):
    """Its tables must not stand beside the results of an earlier, shorter part of it."""
    rounds = Rounds(tmp_path).save(validation(0.9, 0.9))
    rounds.folder.claim({"config": {}})
    rounds.folder.save_results({}, [{"dice": 1}], {})
    assert runs.read_results(tmp_path)["checksums"].keys() == {
        "config.json",
        "rounds.csv",
        "scores.csv",
    }

    again = Rounds(tmp_path)
    assert (tmp_path / "results.json").exists()
    again.folder.claim({"config": {}})
    assert not (tmp_path / "results.json").exists()


def test_results_vouch_for_what_was_written(tmp_path):
    """Not for what is there by then: a table may have been damaged while the run went on."""
    rounds = Rounds(tmp_path).save(validation(0.9, 0.9))
    rounds.folder.claim({"config": {}})
    (tmp_path / "config.json").write_text("damaged")
    rounds.folder.save_results({}, [{"dice": 1}], {})
    with pytest.raises(UserError, match=r"config.json is not what was written there"):
        runs.read_results(tmp_path)


# ---------------------------------------------------------------------------------------- going on


def test_a_run_goes_on_where_it_was(tmp_path):
    Rounds(tmp_path).save(validation(0.9, 0.2), validation(0.1, 0.1))
    rounds = Rounds(tmp_path)
    assert [row["round"] for row in rounds.history] == [1, 2]
    assert rounds.server.round == 2
    for vector in (*rounds.server.state[:3], rounds.server.velocity):
        assert vector.unique().tolist() == [2]
    assert Rounds(tmp_path, rounds=2).server.round == 2  # it may be over

    rounds.save(validation(0.5, 0.6))
    assert [kept(tmp_path, name) for name in ("best", "best_small", "last")] == [1, 3, 3]
    assert [row["round"] for row in Rounds(tmp_path).history] == [1, 2, 3]


@pytest.mark.parametrize("writes", range(6))
def test_the_best_files_are_never_of_a_round_that_was_given_up(tmp_path, monkeypatch, writes):
    """Killed in round 2, which another number of threads makes a worse one when it is repeated."""
    rounds = Rounds(tmp_path).save(validation(0.5, 0.5))
    whole = os.replace
    left = writes

    def failing(source, target):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        whole(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with contextlib.suppress(KeyboardInterrupt):
        rounds.save(validation(0.9, 0.9))
    monkeypatch.setattr(os, "replace", whole)

    again = Rounds(tmp_path)
    assert len(again.history) == (2 if writes else 1)
    again.save(*[validation(0.1, 0.1)] * (3 - len(again.history)))
    for name in runs.BEST:
        assert kept(tmp_path, name) == again.folder.best[name]["round"] == (2 if writes else 1)
    assert kept(tmp_path, "last") == 3


def test_what_follows_from_resume_pt_is_written_again(tmp_path):
    Rounds(tmp_path).save(validation(0.2, 0.9), validation(0.8, 0.1))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("best.pt", "last.pt", "rounds.csv"):
        (tmp_path / name).write_bytes(b"damaged")
    Rounds(tmp_path)
    for path in before:
        if path.suffix == ".csv":
            assert path.read_bytes() == before[path]
    assert [kept(tmp_path, name) for name in ("best", "best_small", "last")] == [2, 1, 2]


DAMAGE = {
    "half": lambda content: content[: len(content) // 2],
    "start": lambda content: content[: min(5000, len(content) // 3)],
    "empty": lambda content: b"",
    "braces": lambda content: b"{}",
    "text": lambda content: b"hello world",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(tmp_path, damage):
    Rounds(tmp_path).save(validation(0.9, 0.9)).folder.claim({"config": {"lr": 1}})
    for name in ("resume.pt", "config.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(damage(content))
        with pytest.raises(UserError, match=f"{name} is damaged"):
            Rounds(tmp_path).folder.check({"config": {"lr": 1}})
        (tmp_path / name).write_bytes(content)


@pytest.mark.parametrize("name", ["resume.pt", "best.pt", "best_small.pt"])
def test_every_flipped_bit_is_noticed_before_a_run_goes_on(tmp_path, name):
    Rounds(tmp_path).save(validation(0.9, 0.9), validation(0.8, 0.8))
    content = (tmp_path / name).read_bytes()
    for damaged in flipped(content, places=(0, -94, -72, -1)):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name} is damaged, or no checkpoint: .") as caught:
            Rounds(tmp_path)
        assert "\n" not in str(caught.value)


def test_flipped_bits_of_config_json_are_noticed_or_written_over(tmp_path):
    """Where a run goes on with other options than it says, it is not this run's."""
    record = {"config": {"lr": 0.25, "rounds": 3}, "data": {"source": "here"}}
    folder = Rounds(tmp_path).folder
    folder.claim(record)
    path = tmp_path / "config.json"
    content = path.read_bytes()
    noticed = 0
    for damaged in flipped(content):
        path.write_bytes(damaged)
        try:
            folder.check(record)
        except UserError as error:
            assert f"{path} is " in str(error) and "\n" not in str(error)
            noticed += 1
            continue
        known = json.loads(damaged)
        assert (known["config"]["lr"], known["data"]) == (0.25, {"source": "here"})
        folder.claim(record)
        assert path.read_bytes() == content
    assert noticed > 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 3}, "seed 3, now 0"),
        ({"lr": 0.5, "method": "fedavg"}, "method fedavg, now fedgs, lr 0.5, now 0.0001"),
        ({"source": "elsewhere"}, "source elsewhere, now here"),
    ],
)
@pytest.mark.parametrize("name", ["resume.pt", "best.pt", "best_small.pt"])
def test_files_of_another_run_of_equal_shapes(tmp_path, options, words, name):
    measures = [validation(0.9, 0.9), validation(0.8, 0.8)]
    Rounds(tmp_path / "mine").save(*measures)
    Rounds(tmp_path / "other", **options).save(*measures)
    shutil.copy(tmp_path / "other" / name, tmp_path / "mine" / name)
    with pytest.raises(UserError, match=rf"mine/{name} is of another run \({words}\): "):
        Rounds(tmp_path / "mine")


def test_what_may_change_when_a_run_goes_on(tmp_path):
    Rounds(tmp_path, rounds=5, workers="2", label="a").save(validation(0.9, 0.9))
    assert Rounds(tmp_path, rounds=9, workers="1", label="b").server.round == 1


def test_a_best_file_of_another_round(tmp_path):
    Rounds(tmp_path).save(validation(0.9, 0.9), validation(0.8, 0.8))
    shutil.copy(tmp_path / "last.pt", tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"best.pt is of round 2, .* of round 1 belongs: put"):
        Rounds(tmp_path)
    (tmp_path / "best.pt").unlink()
    with pytest.raises(UserError, match=r"best.pt is missing"):
        Rounds(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("best", {}),
        ("best", {"best": {"score": 1}, "best_small": {"score": 1}}),
        ("weights", "abc"),
        ("weights", {"weight": torch.ones(2)}),
        ("velocity", None),
        ("velocity", torch.ones(5)),
        ("history", [{}]),
        ("history", [{"round": 2}]),
        ("history", [{"round": 1}, {"round": 2}]),
    ],
)
def test_state_of_another_kind(tmp_path, key, value):
    Rounds(tmp_path).save(validation(0.9, 0.9))
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    checkpoints.save(tmp_path / "resume.pt", {**saved, key: value})
    with pytest.raises(UserError, match=r"resume.pt"):
        Rounds(tmp_path)


BEST = {name: {"round": 1, "score": 0.5} for name in runs.BEST}
ROW = {"round": 1, "eta": 1.0, "dice": 0.5, "seconds": 1.0, "data": "somewhere"}
PROGRESS = {
    "weights": {},
    "velocity": torch.zeros(3),
    "history": [ROW],
    "best": BEST,
}


def test_the_state_of_a_run():
    runs.check_progress(PROGRESS, Path("resume.pt"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("velocity", x) for x in (None, 3, "x", [0.0])],
        *[("history", x) for x in (None, 3, "x", {}, torch.ones(2, 2))],
        *[("best", x) for x in (None, 3, "x", [], torch.ones(2, 2))],
        ("velocity", torch.tensor([0, torch.nan])),
        ("velocity", torch.tensor([0, torch.inf])),
        ("velocity", torch.zeros(3, dtype=torch.float64)),
        ("velocity", torch.zeros(3, dtype=torch.int64)),
        ("velocity", torch.zeros(3, device="meta")),
        ("history", [1]),
        ("history", [{**ROW, "eta": "1"}]),
        ("history", [{**ROW, "loss_C1": [1]}]),
        ("history", [{**ROW, "loss_C1": torch.ones(1)}]),
        ("history", [{name: x for name, x in ROW.items() if name != "seconds"}]),
        ("history", [{**ROW, "round": True}]),
        ("best", {**BEST, "best": 3}),
        ("best", {**BEST, "best": {"round": 1}}),
        ("best", {**BEST, "best": {"round": "1", "score": 0.5}}),
        ("best", {**BEST, "best": {"round": 1, "score": math.nan}}),
        ("best", {**BEST, "best": {"round": 1, "score": math.inf}}),
        ("best", {"best": {"round": 1, "score": 0.5}}),
        ("best", {**BEST, "another": 3}),
    ],
)
def test_what_is_no_state_of_a_run(key, value):
    with pytest.raises(UserError, match=r"resume\.pt"):
        runs.check_progress({**PROGRESS, key: value}, Path("resume.pt"))


def test_something_else_is_no_state_of_a_run():
    with pytest.raises(UserError, match=r"resume\.pt is not the state of a run"):
        runs.check_progress([PROGRESS], Path("resume.pt"))


def test_state_that_is_no_dictionary(tmp_path):
    for value in (None, [1]):
        checkpoints.save(tmp_path / "resume.pt", value)
        with pytest.raises(UserError, match=r"resume.pt is not the state of a run"):
            Rounds(tmp_path)


# ---------------------------------------------------------------------------------- complete runs


def test_a_complete_run(finished, tmp_path):
    config = Config(**json.loads((finished / "config.json").read_text())["config"])
    folder = runs.Folder(config)
    assert folder.path == finished
    assert runs.is_complete(folder)

    shutil.copytree(finished, tmp_path / "run")
    moved = runs.Folder(config)
    moved.path = tmp_path / "run"
    (moved.path / "results.json").unlink()
    assert not runs.is_complete(moved)


@pytest.mark.parametrize("name", ["config.json", "rounds.csv", "scores.csv", "results.json"])
def test_changed_files_are_not_taken_for_complete(finished, tmp_path, name):
    shutil.copytree(finished, tmp_path / "run")
    record = json.loads((finished / "config.json").read_text())["config"]
    folder = runs.Folder(Config(**{**record, "out": str(tmp_path / "run")}))
    assert runs.is_complete(folder)
    path = folder.path / name
    path.write_bytes(next(flipped(path.read_bytes())))
    with pytest.raises(UserError, match=f"{path} is not what was written there"):
        runs.is_complete(folder)


# ------------------------------------------------------------------------------------------ tables


def test_a_row_of_rounds():
    logs = [
        ClientLog("C1", 10, 4, 0.5, {"dice": 0.2}, 1.5, 0.25, 2.0),
        ClientLog("C2", 33, 12, 0.7, {"dice": 0.4}, 1.1, 0.75, 3.0),
    ]
    row = runs.round_row(3, logs, validation(0.6, math.nan), 1.23456, "somewhere")
    assert row["round"] == 3
    assert (row["loss_C1"], row["loss_C2"]) == (0.5, 0.7)
    assert row["term_dice"] == pytest.approx((4 * 0.2 + 12 * 0.4) / 16)
    assert row["eta"] == pytest.approx((4 * 1.5 + 12 * 1.1) / 16)  # over steps, not over clients
    assert row["scaled_steps"] == pytest.approx((4 * 0.25 + 12 * 0.75) / 16)
    assert (row["update_norm_C1"], row["update_norm_C2"]) == (2.0, 3.0)
    assert row["dice"] == 0.6
    assert math.isnan(row["dice_s"])
    assert (row["seconds"], row["data"]) == (1.235, "somewhere")

    line = runs.describe_round(row, 20)
    assert line.startswith("round   3/20   loss 0.600   η 1.200   ")

    alone = runs.round_row(3, logs[1:], validation(0.6, 0.5), 1, "somewhere")
    assert (alone["term_dice"], alone["eta"]) == (pytest.approx(0.4), pytest.approx(1.1))


def test_clients_that_are_missing_are_in_the_row():
    facts = {name: SimpleNamespace(validation=5) for name in ("C1", "C2", "C3")}
    federation = SimpleNamespace(facts=facts)
    row = {"loss_C2": 0.5}
    runs.mark_missing(row, ["C1", "C2", "C3"], federation, {"dice": {"mean": 0.5, "n": 10}})
    assert row["missing"] == "C1 C3"
    assert row["validated"] == "10 of 15"
    for name in ("loss_C1", "update_norm_C1", "loss_C3", "update_norm_C3"):
        assert math.isnan(row.pop(name))
    assert row.keys() == {"loss_C2", "missing", "validated"}

    whole = {"loss_C1": 0.5, "loss_C2": 0.5}
    runs.mark_missing(whole, ["C1", "C2"], federation, {"dice": {"mean": 0.5, "n": 15}})
    assert whole == {"loss_C1": 0.5, "loss_C2": 0.5}


def test_rounds_have_the_same_columns():
    history = [{"round": 1, "dice": 0.5}, {"round": 2, "missing": "C1"}]
    assert runs.same_columns(history) == [
        {"round": 1, "dice": 0.5, "missing": ""},
        {"round": 2, "dice": "", "missing": "C1"},
    ]


def test_what_a_run_says_of_itself(monkeypatch, tmp_path):
    """In config.json, in the lines that it begins with, and as a title."""
    monkeypatch.setattr(runs, "describe_hardware", lambda config, clients: "a machine")
    facts = {"C6": data.Facts(0, 0, 9, 0, 0, "")}
    about = {"source": "here", "notes": ["a", "b"], "fingerprint": "abc"}
    federation = SimpleNamespace(**about, facts=facts, out_centre="C6", place="in a folder")
    flat = SimpleNamespace(parameters=torch.zeros(1234))
    clients = SimpleNamespace(federation=federation, flat=flat)
    config = Config(seed=3, out=str(tmp_path))

    record = runs.describe_run(config, clients, "9.9")
    assert record["config"]["seed"] == 3
    assert record["data"] == {**about, "images": {"C6 (held out)": "9"}}
    assert record["hardware"] == "a machine"
    assert list(record["versions"]) == ["fedgs", "python", "torch", "numpy"]
    assert record["versions"]["fedgs"] == "9.9"

    lines = runs.header(config, clients, record, "why", runs.Folder(config)).splitlines()
    names = ["method", "data", "images", "preset", "training", "hardware", "folder"]
    assert [line.split()[0] for line in lines] == names
    assert lines[0] == "method   fedgs with utnet of width 32, 1,234 parameters"
    assert lines[1] == "data     here, in a folder; a; b"
    assert runs.title(config, federation) == "polypgen-fedgs-utnet-f1-s3 on here"


def test_what_results_say_beside_the_measures():
    federation = SimpleNamespace(source="here", notes=["a", "b"])
    found = runs.describe_results(Config(seed=3), federation, {"best": {}})
    assert found.pop("config")["seed"] == 3
    assert found == {"data": "here", "notes": ["a", "b"], "checkpoints": {"best": {}}}


def test_tests_are_summarised_by_split_and_centre():
    def test_of(centre, split, value, batch_norm="averaged"):
        tally = torch.full((len(metrics.MEASURES), 2), float(value), dtype=torch.float64)
        tally[:, 1] = 4
        return SimpleNamespace(centre=centre, split=split, batch_norm=batch_norm, tally=tally)

    tests = [test_of("C1", "in_test", 4), test_of("C2", "in_test", 2), test_of("C6", "out_test", 1)]
    tests.append(test_of("C1", "in_test", 3, "local"))
    summary = runs.summarise_tests(tests, 5)
    assert list(summary) == ["round", "averaged", "local"]
    assert summary["round"] == 5

    averaged = summary["averaged"]
    assert averaged["in_test"]["dice"] == {"mean": 6 / 8, "n": 8}
    assert averaged["out_test"]["dice"] == {"mean": 0.25, "n": 4}
    assert list(averaged["in_test_by_centre"]) == ["C1", "C2"]
    assert averaged["in_test_by_centre"]["C2"]["dice"] == {"mean": 0.5, "n": 4}
    assert summary["local"]["in_test"]["dice"] == {"mean": 3 / 4, "n": 4}
    assert summary["local"]["out_test"]["dice"]["n"] == 0


def test_changes_are_named(tmp_path):
    path = tmp_path / "config.json"
    earlier = {"config": {"lr": 1, "rounds": 3}, "data": {"source": "PolypGen"}}
    same = {"config": {"lr": 1, "rounds": 9}, "data": {"source": "PolypGen"}}
    runs.check_same(path, earlier, same, Config())  # rounds may change
    with pytest.raises(UserError, match=r"config.json .*\(source PolypGen, now LiTS\)"):
        runs.check_same(path, earlier, {"data": {"source": "LiTS"}}, Config())


def test_seconds_and_rounds_are_of_the_whole_run():
    assert runs.count_rounds([{"seconds": 1.5}, {"seconds": 2}]) == {"rounds": 2, "seconds": 3.5}


def test_images_by_centre():
    facts = {"C5": data.Facts(7, 2, 1, 0, 0, ""), "C6": data.Facts(0, 0, 9, 0, 0, "")}
    federation = SimpleNamespace(facts=facts, out_centre="C6")
    assert runs.count_images(federation) == {"C5": "7 + 2 + 1", "C6 (held out)": "9"}


def test_results_of_another_run_are_no_complete_run(finished):
    record = json.loads((finished / "config.json").read_text())["config"]
    with pytest.raises(UserError, match=r"results.json is of another run \(seed 0, now 3\)"):
        runs.is_complete(runs.Folder(Config(**{**record, "seed": 3})))


def test_a_run_of_other_rounds_is_not_complete(finished):
    record = json.loads((finished / "config.json").read_text())["config"]
    assert runs.is_complete(runs.Folder(Config(**{**record, "rounds": 2})))
    for rounds in (1, 3):
        assert not runs.is_complete(runs.Folder(Config(**{**record, "rounds": rounds})))
