"""csrc/benchmark.py: every path agrees with float64, and at small sizes all of it runs."""

import json
import sys
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
    """Small sizes, few calls, nothing compiled by PyTorch, and no processes."""
    monkeypatch.setattr(benchmark, "WIDTH", 4)
    monkeypatch.setattr(benchmark, "UTNET", 1000)
    monkeypatch.setattr(benchmark, "STEP_SIZES", (1000,))
    monkeypatch.setattr(benchmark, "SUM_SIZES", ((1000, 3),))
    monkeypatch.setattr(benchmark, "MASK_SIZES", ((2, 16),))
    for name in ("OVERHEAD_SIDES", "TRAINING_SIDES", "ROUND_SIDES"):
        monkeypatch.setattr(benchmark, name, {"cpu": {32: 1}})

    monkeypatch.setattr(benchmark, "tensor_sizes", cut_in_two)
    monkeypatch.setattr(benchmark, "median_seconds", benchmark.time_call)
    monkeypatch.setattr(benchmark, "copy_bandwidth", bandwidth)
    monkeypatch.setattr(benchmark, "alone", here)
    monkeypatch.setattr(hardware, "has_bf16", no_bf16)
    monkeypatch.setattr(torch, "compile", as_it_is)


def cut_in_two(size):
    return [size - size // 3, size // 3]


def bandwidth(device):
    return 1e9


def here(function):
    return function()


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


def test_a_time_is_the_median_of_five_calls_after_two():
    calls = []

    def call():
        calls.append(len(calls))

    assert benchmark.median_seconds(call, CPU, budget=0) >= 0
    assert len(calls) == 2 + 5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_a_path_has_a_peak_of_its_own():
    torch.ones(2**27)  # 512 MiB
    peak = benchmark.alone(partial(benchmark.peak_memory, CPU))
    assert peak < benchmark.peak_memory(CPU) - 2**28


# --------------------------------------------------------------------------------- wrong kernels


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
@pytest.mark.slow
def test_a_wrong_result_ends_the_program(quick, monkeypatch, check, kernel, faulty, message):
    check = getattr(benchmark, check)
    check(CPU)
    monkeypatch.setattr(benchmark.csrc, kernel, faulty)
    with pytest.raises(SystemExit, match=f"{message} is off by .*; nothing was timed"):
        check(CPU)


# -------------------------------------------------------------------------------------- everything


@pytest.mark.slow
def test_everything_is_timed_and_in_the_tables(quick, monkeypatch, capsys, tmp_path):
    path = tmp_path / "figures.json"
    arguments = ["benchmark.py", "--device", "cpu", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()

    lines = capsys.readouterr().out.splitlines()
    starts = [
        "| adamw_accumulate_ | 0.0 M |",
        "| aggregate | 0.0 M, K = 3 |",
        "| mask_difficulty | 2 x 16², uint8 |",
        "| mask_difficulty | 2 x 16², int64 |",
        "| 4 x 32², fp32 | cpp |",
        "| 4 x 32², fp32 | torch |",
        "| 4 x 32² | plain |",
        "| 4 x 32² | fp32 |",
        "bf16 is left out",
        "| aggregation of 5 clients |",
        "| evaluation of an image |",
    ]
    starts += [f"| {part} |" for part in benchmark.PARTS]
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, start

    figures = json.loads(path.read_text())["figures"]
    training = next(row for row in figures if row["operation"] == "training")
    for measured in training["paths"].values():
        assert measured["ms"] > 0
        assert measured["steps"] == 7


@pytest.mark.slow
def test_only_what_is_asked_for_is_timed(quick, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cpu", "--only", "masks"])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "mask_difficulty" in printed
    assert "aggregate" not in printed
