"""A run's folder: what is refused, damage, and the rows and texts of a run."""

import json
import math
import os
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import refused
from matplotlib.figure import Figure

import data
import metrics
from fedgs import ClientLog, Config
from support import runs
from support.errors import UserError

pytestmark = pytest.mark.usefixtures("plain_pictures")

# ---------------------------------------------------------------------------------- before a run


def test_where_a_run_goes(tmp_path):
    assert str(runs.Folder(Config()).path) == "runs/polypgen-fedgs-utnet-f1-s0"
    assert runs.Folder(Config(out=str(tmp_path))).path == tmp_path


def test_results_of_another_run_are_left_alone(run, finished, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    refused(capsys, run(finished), "not empty", "--resume")
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


@pytest.mark.slow
def test_options_added_later_do_not_keep_a_run_from_going_on(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    del record["config"]["workers"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    assert run(tmp_path / "run", "--resume") == 0


# ------------------------------------------------------------------------------------------ damage

DAMAGE = {
    "half": lambda content: content[: len(content) // 2],
    "start": lambda content: content[: min(5000, len(content) // 3)],
    "empty": lambda content: b"",
    "braces": lambda content: b"{}",
    "text": lambda content: b"hello world",
}


@pytest.mark.parametrize("name", ["resume.pt", "config.json"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.slow
def test_damaged_files(run, tmp_path, finished, capsys, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / name).write_bytes(damage((finished / name).read_bytes()))
    refused(capsys, run(folder, "--resume"), name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("best", {}),
        ("state", "abc"),
        ("velocity", None),
        ("history", [{}]),
        ("history", [{"round": 2}]),
    ],
)
@pytest.mark.slow
def test_state_of_another_kind(run, tmp_path, finished, capsys, key, value):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    saved = torch.load(finished / "resume.pt", weights_only=True)
    torch.save({**saved, key: value}, folder / "resume.pt")
    refused(capsys, run(folder, "--resume"), "resume.pt")


def test_lost_state_of_a_finished_run(run, tmp_path, finished, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "resume.pt").unlink()
    refused(capsys, run(folder, "--resume", "--rounds", 3), "resume.pt is missing")


# ---------------------------------------------------------------------------------- saving a round


def validation(dice, dice_s, small=5):
    """Validation measures with these two means."""
    measures = {name: {"mean": 0.5, "n": 5} for name in metrics.MEASURES}
    measures["dice"] = {"mean": dice, "n": 5}
    measures["dice_s"] = {"mean": dice_s, "n": small}
    return measures


def save_rounds(folder, rounds):
    """Save rounds whose weights are their numbers, with these validation measures."""
    server = SimpleNamespace(state=(torch.zeros(1),), velocity=torch.zeros(1))
    history = []
    for number, measures in enumerate(rounds, start=1):
        history.append({"round": number})
        folder.save_round(server, {"w": torch.tensor(float(number))}, history, measures)


def kept(folder, name):
    return torch.load(folder.path / f"{name}.pt", weights_only=True)["w"].item()


def test_the_best_rounds_are_kept(tmp_path):
    folder = runs.Folder(Config(out=str(tmp_path)))
    rounds = [validation(0.2, 0.9), validation(0.8, 0.1), validation(0.8, 0.9), validation(0.7, 0)]
    save_rounds(folder, rounds)
    assert kept(folder, "best") == 2  # of equal rounds the earlier one
    assert kept(folder, "best_small") == 1
    assert kept(folder, "last") == 4
    assert folder.best["best"] == {"round": 2, "score": 0.8}


def test_best_small_goes_by_dice_where_nothing_is_small(tmp_path):
    folder = runs.Folder(Config(out=str(tmp_path)))
    rounds = [validation(dice, math.nan, small=0) for dice in (0.2, 0.6, 0.4)]
    save_rounds(folder, rounds)
    assert kept(folder, "best_small") == kept(folder, "best") == 2


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


class OneTensor(NamedTuple):
    """The smallest state there is."""

    weights: torch.Tensor


def test_the_best_rounds_so_far_are_resumed(tmp_path):
    first = [validation(0.9, 0.2)]
    save_rounds(runs.Folder(Config(out=str(tmp_path))), first)

    folder = runs.Folder(Config(out=str(tmp_path), resume=True))
    state = OneTensor(torch.ones(1))
    server = SimpleNamespace(state=state, velocity=torch.ones(1), round=0)
    history = folder.load_progress(server)
    assert server.round == 1
    assert not server.state.weights.any()
    assert not server.velocity.any()

    history.append({"round": 2})
    folder.save_round(server, {"w": torch.tensor(2.0)}, history, validation(0.5, 0.6))
    assert (kept(folder, "best"), kept(folder, "best_small"), kept(folder, "last")) == (1, 2, 2)


def test_what_says_that_it_is_over_comes_last(tmp_path, monkeypatch):
    """resume.pt of a round, results.json of a run: what is killed before them has not ended."""
    written = []
    whole = os.replace

    def noted(source, target):
        written.append((target.name, (tmp_path / "results.json").exists()))
        whole(source, target)

    folder = runs.Folder(Config(out=str(tmp_path)))
    monkeypatch.setattr(os, "replace", noted)
    save_rounds(folder, [validation(0.9, 0.9)])
    names = [name for name, _ in written]
    assert names == ["best.pt", "best_small.pt", "last.pt", "rounds.csv", "resume.pt"]

    # Tables of this run must not stand beside the results of an earlier, shorter part of it.
    written.clear()
    (tmp_path / "results.json").write_text("of fewer rounds")
    folder.save_results({}, [{"dice": 1}], {"curves.png": Figure(figsize=(1, 1))})
    assert written == [("scores.csv", False), ("curves.png", False), ("results.json", False)]


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


def test_tests_are_summarised_by_split_and_centre():
    def test_of(centre, split, value):
        tally = torch.full((len(metrics.MEASURES), 2), float(value), dtype=torch.float64)
        tally[:, 1] = 4
        return SimpleNamespace(centre=centre, split=split, tally=tally)

    tests = [test_of("C1", "in_test", 4), test_of("C2", "in_test", 2), test_of("C6", "out_test", 1)]
    summary = runs.summarise_tests(tests, 5)
    assert summary["round"] == 5
    assert summary["in_test"]["dice"] == {"mean": 6 / 8, "n": 8}
    assert summary["out_test"]["dice"] == {"mean": 0.25, "n": 4}
    assert list(summary["in_test_by_centre"]) == ["C1", "C2"]
    assert summary["in_test_by_centre"]["C2"]["dice"] == {"mean": 0.5, "n": 4}


def test_changes_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {"lr": 1, "rounds": 3}, "data": {"source": "PolypGen"}}))
    same = {"config": {"lr": 1, "rounds": 9}, "data": {"source": "PolypGen"}}
    runs.check_same(path, same, Config())  # rounds may change
    with pytest.raises(UserError, match="source PolypGen, now LiTS"):
        runs.check_same(path, {"data": {"source": "LiTS"}}, Config())


def test_seconds_and_rounds_are_of_the_whole_run():
    assert runs.count_rounds([{"seconds": 1.5}, {"seconds": 2}]) == {"rounds": 2, "seconds": 3.5}


def test_images_by_centre():
    facts = {"C5": data.Facts(7, 2, 1, 0, 0, ""), "C6": data.Facts(0, 0, 9, 0, 0, "")}
    federation = SimpleNamespace(facts=facts, out_centre="C6")
    assert runs.count_images(federation) == {"C5": "7 + 2 + 1", "C6 (held out)": "9"}


def test_a_run_of_other_rounds_is_not_complete(finished):
    record = json.loads((finished / "config.json").read_text())["config"]
    assert runs.is_complete(runs.Folder(Config(**{**record, "rounds": 2})))
    for rounds in (1, 3):
        assert not runs.is_complete(runs.Folder(Config(**{**record, "rounds": rounds})))
