"""csrc/benchmark.py: every path agrees with float64, and at small sizes all of it runs."""

import importlib
import json
import sys
import time
from functools import partial

import pytest
import torch

import fedgs
from support import hardware

benchmark = pytest.importorskip(
    "csrc.benchmark", reason="the kernels are not compiled: pip install -v -e . says why"
)
CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Tiny sizes, and nothing compiled by PyTorch."""
    with monkeypatch.context() as patch:
        patch.setenv("FEDGS_TINY", "1")
        patch.setattr(torch, "compile", as_it_is)
        patch.setattr(hardware, "has_bf16", no_bf16)
        importlib.reload(benchmark)
        yield
    importlib.reload(benchmark)


def no_bf16(device):
    return False


def as_it_is(function, dynamic):
    return function


# --------------------------------------------------------------------------------------- measuring


def test_a_clock_measures_from_each_tick_to_the_next():
    clock = benchmark.new_clock(CPU)
    for _ in range(4):
        clock.tick()
    seconds = clock.seconds()
    assert len(seconds) == 3
    assert min(seconds) >= 0


def test_a_time_is_the_median_of_five_calls_after_two(monkeypatch):
    monkeypatch.setattr(benchmark, "BUDGET", 0.0)
    calls = []

    def call():
        calls.append(len(calls))

    assert benchmark.median_seconds(call, CPU) >= 0
    assert len(calls) == 2 + 5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_a_path_has_a_peak_of_its_own():
    torch.ones(2**27)  # 512 MiB
    peak = benchmark.alone(partial(benchmark.peak_memory, CPU))
    assert peak < benchmark.peak_memory(CPU) - 2**28


def test_traffic_counts_every_pass():
    x = torch.zeros(1000)
    y = torch.zeros(1000)

    def three_passes():
        z = x.view(10, 100) * 2  # read, write
        z.flatten().add_(y)  # two reads, write; views are free
        return torch.add(x, x)  # a read, write

    assert benchmark.traffic(three_passes) == 4 * 1000 * (2 + 3 + 2)


# ----------------------------------------------------------------------------------- wrong kernels


def faulty_step(theta, grad, m, v, step, lr, update, eta):
    fedgs.adamw_accumulate_(theta, grad, m, v, step, lr * 1.01, update, eta)


def faulty_sum(total, updates, weights):
    result, norms, finite = fedgs.aggregate(total, updates, weights)
    return result + 1e-3, norms, finite


def faulty_norms(total, updates, weights):
    result, norms, finite = fedgs.aggregate(total, updates, weights)
    return result, norms * 1.001, finite


def faulty_masks(masks, small, log_base):
    area, difficulty, eta = fedgs.mask_difficulty(masks, small, log_base)
    return area, difficulty, eta + 1e-3


@pytest.mark.parametrize(
    "check, kernel, faulty, message",
    [
        ("check_step", "adamw_accumulate_", faulty_step, "adamw_accumulate_, kernel: theta"),
        ("check_sum", "aggregate", faulty_sum, "aggregate of 1, kernel"),
        ("check_sum", "aggregate", faulty_norms, "aggregate of 1, norms"),
        ("check_masks", "mask_difficulty", faulty_masks, "mask_difficulty, kernel: eta"),
    ],
)
def test_a_wrong_result_ends_the_program(quick, monkeypatch, check, kernel, faulty, message):
    check = getattr(benchmark, check)
    check(CPU)
    monkeypatch.setattr(benchmark.csrc, kernel, faulty)
    with pytest.raises(SystemExit, match=f"{message} is off by .*; nothing was timed"):
        check(CPU)


# -------------------------------------------------------------------------------------- everything


def test_a_naive_kernel_is_no_path_of_pytorch(quick, monkeypatch):
    """It stands beside the kernel, though it is faster than what PyTorch does."""
    seconds = {"kernel": 1e-3, "naive kernel": 2e-3, "definition": 6e-3, "foreach": 4e-3}
    monkeypatch.setattr(benchmark, "median_seconds", lambda path, device: seconds[path.args[0]])
    paths = {name: partial(str, name) for name in seconds}
    moved = {"kernel": 8000, "naive kernel": 12000}
    row = benchmark.time_paths("add", "1000", 1000, moved, paths, CPU)
    assert row["bytes"] == {"kernel": 8, "naive kernel": 12, "definition": 0}
    assert row["best"] == "foreach"
    assert row["ratio"] == pytest.approx(4)

    cells = benchmark.kernel_cells(row, copy_bandwidth=16e6)
    assert cells["of copy"] == "50%"
    assert cells["naive kernel"] == "2 ms"
    assert cells["the others"] == "definition 6"


@pytest.mark.slow
def test_everything_is_timed_and_in_the_tables(quick, monkeypatch, capsys, tmp_path):
    path = tmp_path / "figures.json"
    arguments = ["benchmark.py", "--device", "cpu", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()

    lines = capsys.readouterr().out.splitlines()
    starts = [
        "| adamw_accumulate_ | 0.1 M | 36, 36, 116 |",
        "| aggregate | 0.1 M, K = 3 | 20, 44, 56 |",
        "| mask_difficulty | 2 x 16², uint8 | 1, 1, ",
        "| mask_difficulty | 2 x 16², int64 | 8, 8, ",
        "| 4 x 32² | plain fp32 |",
        "| 4 x 32² | fp32 |",
        f"| {benchmark.ADDED} |",
        "| aggregation of 5 clients |",
        "| evaluation of an image |",
    ]
    starts += [f"| {part} |" for part in benchmark.PARTS]
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, start

    figures = json.loads(path.read_text())["figures"]
    training = figures[-1]
    assert list(training["paths"]) == ["plain fp32", "fp32"]
    for measured in training["paths"].values():
        assert measured["ms"] > 0
        assert measured["steps"] == 7


def test_a_whole_experiment_is_its_steps_and_rounds(quick):
    """The paper's: 100 rounds of 5 epochs of 288 batches, and 146 images to validate on."""
    figures = benchmark.train_path("plain fp32", CPU, 32, 1)
    parts = figures["parts_ms"]
    ms = 5 * 288 * figures["ms"] + parts["aggregation of 5 clients"]
    ms += 146 * parts["evaluation of an image"]
    assert figures["paper_hours"] == pytest.approx(100 * ms / 3.6e6)


def test_what_fedgs_adds_is_measured_in_the_same_loop(quick, monkeypatch):
    """Both methods take steps in turn; FedGS's also ask for eta, and add to the update."""
    training = benchmark.prepare("plain fp32", CPU, 32, epochs=2)
    calls = []

    def mask_difficulty(*given):
        calls.append("difficulty")
        time.sleep(0.05)
        return fedgs.mask_difficulty(*given)

    def adamw_accumulate_(*given):
        calls.append(len(given))
        if len(given) == 8:
            time.sleep(0.05)

    kernels = training.kernels._replace(
        mask_difficulty=mask_difficulty, adamw_accumulate_=adamw_accumulate_
    )
    parts = benchmark.time_parts(training._replace(kernels=kernels), benchmark.drawn_images(8, 32))
    assert calls == 2 * (2 * ["difficulty", 8] + 2 * [6])
    assert 0.08 <= parts["what FedGS adds to FedAvg's"] <= parts["difficulty"] + parts["step"]


@pytest.mark.slow
def test_only_what_is_asked_for_is_timed(quick, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cpu", "--only", "masks"])
    monkeypatch.setattr(benchmark, "CHECKS", {**benchmark.CHECKS, "adamw": None})
    benchmark.main()
    printed = capsys.readouterr().out
    assert "mask_difficulty" in printed
    assert "aggregate" not in printed
