"""Whole runs through the command line: the folder, repeatability, resume, and errors people can read."""

import copy
import csv
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import fedgs
import metrics
import plots
import runs
from conftest import ROOT, refused
from metrics import DISENTANGLED_WEIGHTS
from models import SDUTNet, UTNet

TINY = ["--data-root", "stand-in", "--centres", "4", "5", "6", "--image-size", "32", "--width", "2", "--batch-size", "24",
        "--local-epochs", "1", "--lr", "1e-3", "--rounds", "2"]


def run(out, *options):
    """Run the tiny federation in a folder; options override. -> exit code"""
    try:
        return fedgs.main([*TINY, "--out", str(out), *map(str, options)])
    except SystemExit as stop:  # how argparse ends
        return stop.code


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_time(path):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(path)]


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """Draw the stand-in's images once for all the runs of this file."""
    with pytest.MonkeyPatch.context() as patch:
        drawn = functools.cache(fedgs.data.stand_in_images)
        patch.setattr(fedgs.data, "stand_in_images", lambda *which: copy.deepcopy(drawn(*which)))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(folder) == 0
    return folder


@pytest.fixture(autouse=True)
def plain_pictures(monkeypatch):
    """`finished` draws its pictures; the other runs, to be quick, an empty one each."""
    for name in ("draw_curves", "draw_predictions"):
        monkeypatch.setattr(plots, name, lambda *what: Figure(figsize=(1, 1)))


# ----------------------------------------------------------------------------------------- the run's folder


def test_folder_is_complete(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "rounds.csv", "scores.csv", "lesions.csv", "results.json", "last.pt", "best.pt", "best_small.pt", "resume.pt",
        "curves.png", "predictions.png"}


def test_rounds(finished):
    history = rows(finished / "rounds.csv")
    assert [row["round"] for row in history] == ["1", "2"]
    for row in history:
        assert {"loss_C4", "loss_C5", "eta", "scaled_steps", "dice", "dice_s", "dice_l", "seconds", "data"} < set(row)
        assert 0 < float(row["loss_C4"]) < 1 and 1 < float(row["eta"]) < 3 and 0 < float(row["scaled_steps"]) <= 1


def test_scores_are_the_table(finished):
    """The means of results.json, once more from the rows of scores.csv."""
    scores, results = rows(finished / "scores.csv"), json.loads((finished / "results.json").read_text())
    for name in ("best", "best_small"):
        for split in ("in_test", "out_test"):
            chosen = [row for row in scores if (row["checkpoint"], row["split"]) == (name, split)]
            kinds = {"dice": chosen, "dice_n": [r for r in chosen if r["inverse_area"] != "inf"],
                     "dice_s": [r for r in chosen if r["small"] == "1"],
                     "dice_l": [r for r in chosen if r["inverse_area"] != "inf" and r["small"] == "0"]}
            for measure, kind in kinds.items():
                expected = results["checkpoints"][name][split][measure]
                assert expected["n"] == len(kind)
                if kind:
                    assert math.fsum(float(row["dice"]) for row in kind) / len(kind) == pytest.approx(expected["mean"], rel=1e-12)
            lesions = [row for row in rows(finished / "lesions.csv") if (row["checkpoint"], row["split"]) == (name, split)]
            assert len(lesions) == sum(int(row["lesions"]) for row in chosen) == results["checkpoints"][name][split]["recall"]["n"]
            assert sum(int(row["found"]) for row in lesions) == sum(int(row["found"]) for row in chosen)
            for row in chosen:
                own = [float(lesion["dice"]) for lesion in lesions if (lesion["centre"], lesion["name"]) == (row["centre"], row["name"])]
                count = len(own) + int(row["false_components"])
                assert float(row["lesion_dice"]) == pytest.approx(sum(own) / count if count else 1)
    assert {row["centre"] for row in scores if row["split"] == "out_test"} == {"6"}
    assert {row["centre"] for row in scores if row["split"] == "in_test"} == {"4", "5"}


def test_stand_in_is_named_everywhere(finished):
    for name in ("config.json", "results.json"):
        assert "stand-in" in (finished / name).read_text()
    for name in ("rounds.csv", "scores.csv", "lesions.csv"):
        assert all(row["data"] == "PolypGen stand-in" for row in rows(finished / name))


@pytest.mark.parametrize("name", ["last", "best", "best_small"])
def test_checkpoints_are_plain_state_dicts(finished, name):
    state = torch.load(finished / f"{name}.pt", weights_only=True)
    UTNet(width=2).load_state_dict(state, strict=True)
    assert state._metadata["fedgs"]["config"]["width"] == 2


def test_pictures_are_pictures(finished):
    for name in ("curves.png", "predictions.png"):
        with Image.open(finished / name) as image:
            assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_disentangled_run(tmp_path):
    """SD-UTNet from one end to the other: the loss's terms, the picture, and a resumed run like an uninterrupted one."""
    options = ["--model", "sd-utnet"]
    assert run(tmp_path / "whole", *options) == 0
    assert run(tmp_path / "parts", *options, "--rounds", 1) == 0
    assert run(tmp_path / "parts", *options, "--rounds", 2, "--resume") == 0
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    SDUTNet(width=2, size=32).load_state_dict(whole, strict=True)
    for row in rows(tmp_path / "whole" / "rounds.csv"):
        terms = {name: float(row[f"term_{name}"]) for name in DISENTANGLED_WEIGHTS}
        steps = {"C4": 3, "C5": 2}  # of 72 and 66 images
        loss = sum(steps[k] * float(row[f"loss_{k}"]) for k in steps) / sum(steps.values())
        assert sum(weight * terms[name] for name, weight in DISENTANGLED_WEIGHTS.items()) == pytest.approx(loss, rel=1e-4)
    with Image.open(tmp_path / "whole" / "anatomy.png") as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_same_seed_same_rounds(finished, tmp_path):
    assert run(tmp_path / "again") == 0
    assert without_time(tmp_path / "again" / "rounds.csv") == without_time(finished / "rounds.csv")
    assert run(tmp_path / "other", "--seed", 1, "--rounds", 1) == 0
    assert without_time(tmp_path / "other" / "rounds.csv") != without_time(finished / "rounds.csv")[:1]


def test_fedavg_takes_unscaled_steps(tmp_path, capsys):
    assert run(tmp_path, "--method", "fedavg", "--rounds", 1) == 0
    assert [(row["eta"], row["scaled_steps"]) for row in rows(tmp_path / "rounds.csv")] == [("1.0", "0.0")]
    assert "Dice_S" in capsys.readouterr().out


def test_options_override_the_preset():
    config, why = fedgs.configure({"preset": "quick", "rounds": 2, "data_root": "stand-in"})
    assert config.rounds == 2 and config.width == fedgs.PRESETS["quick"]["width"] and why == "as asked"
    config, _ = fedgs.configure({"preset": "paper"})
    assert (config.rounds, config.local_epochs, config.image_size, config.width, config.lr) == (100, 5, 512, 32, 1e-4)
    assert fedgs.configure({"device": "cpu"})[0].preset == "quick"


# ------------------------------------------------------------------------------------------------ resume


def same_end(folder, finished):
    states = [torch.load(f / "last.pt", weights_only=True) for f in (folder, finished)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert without_time(folder / "rounds.csv") == without_time(finished / "rounds.csv")
    assert (folder / "scores.csv").read_text() == (finished / "scores.csv").read_text()


@pytest.mark.parametrize("writes", [0, 1, 3, 4, 5, 7, 9])
def test_stopped_before_any_write_and_resumed(finished, tmp_path, monkeypatch, writes):
    """Stopped short of its next file, at moments through the run, a resumed run ends as one that was not."""
    whole, count = runs.write, 0

    def failing(path, content):
        nonlocal count
        if count == writes:
            raise KeyboardInterrupt
        count += 1
        whole(path, content)

    monkeypatch.setattr(runs, "write", failing)
    assert run(tmp_path) == 130
    monkeypatch.setattr(runs, "write", whole)
    assert run(tmp_path, "--resume") == 0
    same_end(tmp_path, finished)


def test_killed_and_resumed(finished, tmp_path):
    """kill -9 at three random moments, from start-up on, then to the end."""
    command = [sys.executable, str(ROOT / "fedgs.py"), *TINY, "--out", str(tmp_path), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # threads decide the last bits
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.read(1)  # the header: the run has begun
        time.sleep(random.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert run(tmp_path, "--resume") == 0
    same_end(tmp_path, finished)


def test_momentum_is_resumed(tmp_path):
    options = "--server-momentum", 0.9, "--server-lr", 0.5
    assert run(tmp_path / "whole", *options) == 0
    assert run(tmp_path / "parts", *options, "--rounds", 1) == 0
    assert run(tmp_path / "parts", *options, "--resume") == 0
    same_end(tmp_path / "parts", tmp_path / "whole")


def test_last_is_the_aggregate_and_best_is_the_best(finished, tmp_path):
    saved = torch.load(finished / "resume.pt", weights_only=True)
    flat = fedgs.FlatNetwork(UTNet(width=2))
    flat.load(saved["state"])
    last = torch.load(finished / "last.pt", weights_only=True)
    assert all(torch.equal(x, last[name]) for name, x in flat.network.state_dict().items())
    history = rows(finished / "rounds.csv")
    for name, measure in (("best", "dice"), ("best_small", "dice_s")):
        values = [float(row[measure]) for row in history]
        assert saved["best"][name] == {"round": 1 + values.index(max(values)), "score": max(values)}
    assert run(tmp_path, "--rounds", 1) == 0
    of_round = {1: torch.load(tmp_path / "last.pt", weights_only=True), 2: last}
    for name in ("best", "best_small"):
        kept = torch.load(finished / f"{name}.pt", weights_only=True)
        assert all(torch.equal(x, of_round[saved["best"][name]["round"]][key]) for key, x in kept.items())


def test_more_rounds_with_resume(finished, tmp_path):
    assert run(tmp_path, "--rounds", 1) == 0
    assert run(tmp_path, "--resume") == 0
    same_end(tmp_path, finished)


# -------------------------------------------------------------------------------------------------- grid


def test_grid_interrupted_and_resumed(tmp_path, capsys, monkeypatch):
    """Two methods, two seeds, one command: stopped in its third run, resumed, and ended by the right table."""
    options = ["--method", "fedavg", "fedgs", "--seeds", 0, 1]
    names = [f"polypgen-{method}-utnet-f1-s{seed}" for seed in (0, 1) for method in ("fedavg", "fedgs")]
    whole = runs.save_progress

    def failing(folder, weights, server, history, *rest):
        if folder.name == names[2] and len(history) == 2:
            raise KeyboardInterrupt
        whole(folder, weights, server, history, *rest)

    monkeypatch.setattr(runs, "save_progress", failing)
    assert run(tmp_path, *options) == 130
    monkeypatch.setattr(runs, "save_progress", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[:3]) and (tmp_path / names[2] / "resume.pt").exists()
    before = {path: path.stat().st_mtime_ns for name in names[:2] for path in (tmp_path / name).iterdir()}
    capsys.readouterr()
    assert run(tmp_path, *options, "--resume") == 0
    text = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before and text.count("is complete") == 2

    [section] = metrics.compare([tmp_path / name for name in names])
    assert metrics.report([section]) in text and "PolypGen stand-in, utnet, checkpoint best" in text
    assert {label: [r.part for r in group] for label, group in section.groups.items()} == {
        "fedavg": [(1, 0), (1, 1)], "fedgs": [(1, 0), (1, 1)]}
    means = [json.loads((tmp_path / name / "results.json").read_text())["checkpoints"]["best"]["out_test"]["dice"]["mean"]
             for name in names]
    assert section.summary["out_test", "dice", "fedgs"]["mean"] == pytest.approx((means[1] + means[3]) / 2)
    difference = section.differences["fedavg", "fedgs", "out_test", "dice"]
    assert difference["mean"] == pytest.approx((means[1] + means[3] - means[0] - means[2]) / 2)

    assert run(tmp_path, *options) == 0 and capsys.readouterr().out.count("is complete") == 4  # nothing is left to do
    refused(capsys, run(tmp_path, *options, "--lr", 0.5), names[0], "another run", "lr 0.001, now 0.5")
    refused(capsys, run(tmp_path, *options, "--rounds", 3), names[0], "not empty", "--resume")
    (tmp_path / names[3] / "results.json").unlink()
    refused(capsys, run(tmp_path, *options, "--resume", "--lr", 0.5), names[0], "another run")
    real = fedgs.data.stand_in_images
    monkeypatch.setattr(fedgs.data, "stand_in_images", lambda *which: brighter(real(*which)))
    refused(capsys, run(tmp_path, *options, "--resume"), "4 of 4 runs failed", names[0], "another run", "fingerprint")


def brighter(images):
    images.images = images.images | 1
    return images


def test_grid_goes_on_after_a_run_that_fails(tmp_path, capsys, monkeypatch):
    whole = fedgs.run
    monkeypatch.setattr(fedgs, "run", lambda config, *rest: whole(config, *rest) if config.method == "fedgs" else fail())

    def fail():
        raise fedgs.RunError("round 1 was not applied")

    refused(capsys, run(tmp_path, "--method", "fedavg", "fedgs", "--rounds", 1), "1 of 2 runs failed", "polypgen-fedavg", "not applied")
    assert (tmp_path / "polypgen-fedgs-utnet-f1-s0" / "results.json").exists()


def test_options_added_later_do_not_keep_a_run_from_going_on(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    del record["config"]["nsd_tolerance"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    assert run(tmp_path / "run", "--resume") == 0


def test_grid_plan(tmp_path, monkeypatch):
    """Where its runs go without --out, each once, and pairs of methods next to each other."""
    folders = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fedgs, "run", lambda config, *rest: folders.append(config.out))
    assert fedgs.main([*TINY, "--methods", "fedavg", "fedgs", "--seed", "1", "0", "1"]) == 0
    assert folders == [os.path.join("runs", f"polypgen-{method}-utnet-f1-s{seed}") for seed in (1, 0) for method in ("fedavg", "fedgs")]


def test_grid_refuses_before_it_begins(tmp_path, capsys):
    (tmp_path / "polypgen-fedgs-utnet-f3-s0").mkdir()
    (tmp_path / "polypgen-fedgs-utnet-f3-s0" / "notes.txt").write_text("")
    refused(capsys, run(tmp_path, "--folds", 1, 2, 3), "f3-s0 is not empty")
    refused(capsys, run(tmp_path, "--folds", 1, 2, "--split", "centre"), "--fold 2", "no folds")
    assert len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("options, words", [
    (["--method", "fedprox"], ["--method", "fedprox", "fedavg"]),
    (["--no-such-option", "1"], ["--no-such-option"]),
    (["--rounds", "many"], ["--rounds", "many"]),
    (["--rounds", "0"], ["--rounds 0"]),
    (["--image-size", "100"], ["--image-size 100", "multiple of 16"]),
    (["--fold", "6"], ["--fold", "6"]),
    (["--lr", "-1"], ["--lr -1"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--log-base", "1"], ["--log-base"]),
    (["--server-momentum", "1"], ["--server-momentum"]),
    (["--centres", "1", "9"], ["--centres", "9"]),
    (["--centres", "6"], ["--centres", "no client"]),
    (["--out-centre", "3"], ["--out-centre 3"]),
    (["--batch-size", "80"], ["centre 4", "--batch-size 80"]),
    (["--model", "sd-utnet", "--batch-size", "1"], ["--batch-size 1", "sd-utnet needs two images"]),
    (["--data-root", "no/such/folder"], ["--data-root no/such/folder", "no such folder"]),
    (["--data-root", "."], ["--data-root", "data_C1"]),
])
def test_bad_options(tmp_path, capsys, options, words):
    refused(capsys, run(tmp_path / "run", *options), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path, capsys):
    refused(capsys, run(tmp_path / "run", "--device", "cuda"), "--device cuda", "no GPU")


def test_bad_data_folder(tmp_path, capsys):
    folder = tmp_path / "data_C4" / "images_C4"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"")
    refused(capsys, run(tmp_path / "run", "--data-root", tmp_path), "a.jpg has no mask")


def test_results_of_another_run_are_left_alone(finished, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    refused(capsys, run(finished), "not empty", "--resume")
    refused(capsys, run(finished, "--resume", "--lr", 0.5), "another run", "lr 0.001, now 0.5")
    refused(capsys, run(finished, "--resume", "--width", 4), "width 2, now 4")
    refused(capsys, run(finished, "--resume", "--rounds", 1), "--rounds 1", "2 rounds already")
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_checkpoint_of_another_model(finished, tmp_path, capsys):
    assert run(tmp_path / "small", "--rounds", 1) == 0
    assert run(tmp_path / "wide", "--rounds", 1, "--width", 4) == 0
    capsys.readouterr()
    (tmp_path / "small" / "resume.pt").write_bytes((tmp_path / "wide" / "resume.pt").read_bytes())
    refused(capsys, run(tmp_path / "small", "--resume"), "resume.pt", "another network", "width 2")
    (tmp_path / "small" / "resume.pt").write_bytes((finished / "resume.pt").read_bytes())
    (tmp_path / "small" / "best.pt").write_bytes((tmp_path / "wide" / "best.pt").read_bytes())
    refused(capsys, run(tmp_path / "small", "--resume"), "best.pt", "does not fit")


def test_best_that_is_no_network(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    torch.save(torch.ones(2), tmp_path / "run" / "best.pt")
    refused(capsys, run(tmp_path / "run", "--resume"), "best.pt is no network's state dict")


@pytest.mark.parametrize("name", ["resume.pt", "config.json"])
@pytest.mark.parametrize("damage", [lambda x: x[: len(x) // 2], lambda x: x[: min(5000, len(x) // 3)], lambda x: b"", lambda x: b"{}",
                                    lambda x: b"hello world"], ids=["half", "start", "empty", "braces", "text"])
def test_damaged_files(tmp_path, finished, capsys, name, damage):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(damage((finished / name).read_bytes()))
    refused(capsys, run(tmp_path, "--resume"), name)


@pytest.mark.parametrize("key, value", [("best", {}), ("state", "abc"), ("velocity", None), ("history", [{}]), ("history", [{"round": 2}])])
def test_state_of_another_kind(tmp_path, finished, capsys, key, value):
    shutil.copytree(finished, tmp_path / "run")
    torch.save({**torch.load(finished / "resume.pt", weights_only=True), key: value}, tmp_path / "run" / "resume.pt")
    refused(capsys, run(tmp_path / "run", "--resume"), "resume.pt")


def test_lost_state_of_a_finished_run(tmp_path, finished, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "resume.pt").unlink()
    refused(capsys, run(tmp_path / "run", "--resume", "--rounds", 3), "resume.pt is missing")


def test_other_data_with_the_same_counts(tmp_path, finished, capsys, monkeypatch):
    real = fedgs.data.stand_in_images

    def flipped(*which):
        images = real(*which)
        images.images = images.images.flip(3)
        return images

    monkeypatch.setattr(fedgs.data, "stand_in_images", flipped)
    refused(capsys, run(finished, "--resume"), "another run", "fingerprint")


def test_a_server_step_that_overflows(tmp_path, capsys):
    refused(capsys, run(tmp_path, "--lr", "1e6", "--server-lr", "1e6", "--server-momentum", "0.9", "--rounds", 9), "not applied", "not finite")


def test_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, run(tmp_path / "file" / "run"), "file")


def test_a_client_that_diverges(finished, tmp_path, capsys):
    assert run(tmp_path, "--rounds", 1) == 0
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    capsys.readouterr()
    real = fedgs.metrics.soft_dice_loss
    try:
        fedgs.metrics.soft_dice_loss = lambda logits, masks: real(logits, masks) * math.inf
        refused(capsys, run(tmp_path, "--resume", "--rounds", 2), "round 2", "C4, C5", "not finite")
    finally:
        fedgs.metrics.soft_dice_loss = real
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pt")} == kept
