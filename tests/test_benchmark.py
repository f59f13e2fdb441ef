"""csrc/benchmark.py, as far as it times whole steps: at a small size all of it runs, and its tables hold the figures."""

import sys

import pytest
import torch

import fedgs

benchmark = pytest.importorskip("csrc.benchmark", reason="the kernels are not compiled: pip install -v -e . says why")
CPU = torch.device("cpu")


class Small(fedgs.Config):
    """A narrow network in float32."""

    def __init__(self, **given):
        super().__init__(width=4, **{"precision": "fp32", **given})


def test_steps_and_their_parts_are_timed(monkeypatch):
    monkeypatch.setattr(fedgs, "Config", Small)
    monkeypatch.setattr(fedgs, "has_bf16", lambda device: False)
    monkeypatch.setattr(benchmark, "alone", lambda function, *given: function(*given))
    rows = [benchmark.time_overhead(CPU, 32, fedgs.PYTORCH, 1), benchmark.time_training(CPU, 32, 1),
            benchmark.time_round(CPU, 32, 2)]
    assert all(figures["ms"] > 0 and figures["steps"] == 7 for figures in rows[1]["paths"].values())
    lines = benchmark.markdown(benchmark.machine(CPU, 1e9), rows).splitlines()
    for start in ("| 4 x 32², fp32 | torch |", "| 4 x 32² | plain |", "| 4 x 32² | fp32 |", "bf16 is left out",
                  *(f"| {part} |" for part in benchmark.PARTS), "| aggregation of 5 clients |", "| evaluation of an image |"):
        assert sum(line.startswith(start) for line in lines) == 1, start


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_a_path_has_a_peak_of_its_own():
    torch.ones(2**27)  # 512 MiB
    assert benchmark.alone(benchmark.peak_memory, CPU) < benchmark.peak_memory(CPU) - 2**28
