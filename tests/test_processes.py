"""A run in several processes: the same results as in one, and a clear end when one of them dies."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fedgs
from conftest import ROOT
from processes import Processes, available_cores
from runs import RunError

OPTIONS = ["--image-size", "32", "--width", "2", "--batch-size", "4", "--local-epochs", "1", "--lr", "1e-3", "--rounds", "2"]


def torchrun(count, *options):
    """Start a run in `count` processes. -> Popen"""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone", "fedgs.py"]
    return subprocess.Popen([*command, *OPTIONS, *map(str, options)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six centres in PolypGen's layout, of 10 to 26 images with a bright square on noise each; centre 3 is the largest."""
    root = tmp_path_factory.mktemp("frames")
    generator = np.random.default_rng(0)
    for centre, count in {1: 14, 2: 18, 3: 26, 4: 12, 5: 11, 6: 10}.items():
        images, masks = (root / f"data_C{centre}" / f"{kind}_C{centre}" for kind in ("images", "masks"))
        images.mkdir(parents=True)
        masks.mkdir()
        for i in range(count):
            frame, mask = generator.integers(0, 90, (64, 64, 3), dtype=np.uint8), np.zeros((64, 64), np.uint8)
            side, (top, left) = 3 + i, generator.integers(0, 30, 2)
            mask[top : top + side, left : left + side] = 255
            frame[mask > 0] += 150
            Image.fromarray(frame).save(images / f"{i:02}.jpg")
            Image.fromarray(mask).save(masks / f"{i:02}_mask.jpg")
    return root


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """The folder of a run in one process, of as many threads as a given number of processes get each."""
    folders = {}

    def run(count, rounds=2):
        which = threads, rounds = max(1, available_cores() // count), rounds
        if which not in folders:
            before, folders[which] = torch.get_num_threads(), tmp_path_factory.mktemp("alone") / "run"
            torch.set_num_threads(threads)
            assert fedgs.main([*OPTIONS, "--data-root", str(root), "--rounds", str(rounds), "--out", str(folders[which])]) == 0
            torch.set_num_threads(before)
        return folders[which]

    return run


def assert_equal_runs(one, other):
    """Weights of the last and the best round, and every file of numbers but for the time that they took."""
    for name in ("last", "best", "best_small"):
        states = [torch.load(folder / f"{name}.pt", weights_only=True) for folder in (one, other)]
        assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    for name in ("scores.csv", "lesions.csv", "rounds.csv"):
        tables = []
        for folder in (one, other):
            with (folder / name).open(newline="") as file:
                tables.append([{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)])
        assert tables[0] == tables[1] and tables[0]


def test_five_processes_are_one(root, alone, tmp_path):
    run = torchrun(5, "--data-root", root, "--out", tmp_path / "run")
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert out.count("round   2/2") == 1 and "process 0: C3; process 1: C2; process 2: C1; process 3: C4; process 4: C5 (" in out
    assert "fedgs.py" not in err and "\r" not in err  # no bars where there is no terminal
    assert_equal_runs(alone(5), tmp_path / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process to kill in /proc")
def test_a_process_that_dies_ends_the_run_which_can_go_on(root, alone, tmp_path):
    folder = tmp_path / "run"
    run = torchrun(2, "--data-root", root, "--out", folder, "--rounds", 1000)
    deadline = time.monotonic() + 120
    while not (folder / "resume.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    [victim] = [pid for pid in children(run.pid) if b"\0RANK=1\0" in environment(pid)]
    os.kill(victim, signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0 and "fedgs.py: error: process 0 of 2 " in err and "--resume goes on" in err
    done = torch.load(folder / "resume.pt", weights_only=True)["history"]
    assert 1 <= len(done) < 1000
    rounds = max(2, len(done) + 1)
    run = torchrun(2, "--data-root", root, "--out", folder, "--rounds", rounds, "--resume")
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert_equal_runs(alone(2, rounds), folder)


def children(pid):
    """Processes that this one started."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue  # gone
            if parent == pid:
                yield int(entry)


def environment(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        return b"\0" + file.read()


def test_an_error_of_one_process_is_everyones(root, tmp_path):
    """A damaged image of a centre that process 1 holds: one message, before anything is written."""
    shutil.copytree(root, tmp_path / "frames")
    damaged = tmp_path / "frames" / "data_C2" / "images_C2" / "03.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    run = torchrun(2, "--data-root", tmp_path / "frames", "--out", tmp_path / "run")
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0 and err.count("fedgs.py: error: ") == 1 and f"cannot read {damaged}" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("clients, count, expected", [
    ({1: 204, 2: 240, 3: 365, 4: 181, 5: 166}, 2, {1: 1, 2: 1, 3: 0, 4: 0, 5: 1}),  # 546 and 610
    ({1: 5, 2: 5, 3: 5}, 3, {1: 0, 2: 1, 3: 2}),
    ({1: 5, 2: 9}, 1, {1: 0, 2: 0}),
])
def test_clients_are_spread_by_size(clients, count, expected):
    processes = Processes()
    processes.count = count
    here = processes.spread(clients)
    assert processes.owners == expected and list(processes.owners) == list(clients)
    assert here == [k for k, owner in expected.items() if owner == 0]


def test_more_processes_than_clients():
    processes = Processes()
    processes.count = 3
    with pytest.raises(RunError, match="--nproc-per-node 3: there are 2 clients"):
        processes.spread({1: 5, 2: 9})


def test_a_process_loads_its_own_centres_alone(root):
    """The parts' facts together are the whole's, their images are the whole's of these centres."""
    whole, first, second = (data.polypgen(root, (3, 4, 5), 5, size=32, here=here) for here in (None, [3], [4, 5]))
    assert list(first.train) == [3] and list(second.train) == [4] and first.out_test is None
    assert {**first.facts, **second.facts} == whole.facts and list(whole.facts) == [3, 4, 5]
    assert torch.equal(second.train[4].images, whole.train[4].images)
    assert torch.equal(second.out_test.images, whole.out_test.images)
