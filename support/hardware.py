"""What the machine offers: device, arithmetic, cores, memory, compiled kernels, CUDA graphs."""

import ctypes
import os
import platform
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from support.errors import UserError


def choose_device(wanted: str) -> torch.device:
    """--device -> torch.device. Raises UserError for a GPU that torch does not find."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("--device cuda: torch finds no GPU here")
    if wanted == "auto":
        return torch.device("cuda" if available else "cpu")
    return torch.device(wanted)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_precision(wanted: str, device: torch.device) -> str:
    """--precision -> "fp32" or "bf16".

    On a CPU auto is float32 whatever the processor can do, so that one command gives comparable
    numbers on all of them.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda" and has_bf16(device):
        return "bf16"
    return "fp32"


def describe_precision(precision: str, device: torch.device) -> str:
    """What the header of a run says of its arithmetic."""
    if precision == "bf16" and not has_bf16(device):
        return "bf16, for which this hardware has no instructions: slower than fp32"
    return precision


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the number of threads on a CPU, which decides the last bits of a sum."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare_torch() -> None:
    """Repeatable sums and exact float32 on a GPU, and quick memory on a CPU."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    reuse_freed_memory()


def reuse_freed_memory() -> None:
    """Have glibc keep freed memory for what comes next, instead of giving it back to the system.

    A training step on a CPU takes and frees large maps hundreds of times. New memory comes in
    pages that the system clears one by one: at 256 x 256 that took a third of the step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # their numbers in <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)  # large maps come from the heap, too
    libc.mallopt(trim_threshold, -1)  # and its free end stays


def compiled_kernels(wanted: str, device: torch.device) -> tuple[ModuleType | None, str]:
    """--kernels, for a device. -> the module csrc, or None for PyTorch; what to say of the choice

    Raises UserError for kernels that were asked for and cannot run.
    """
    if wanted == "torch":
        return None, "torch, as asked"
    name = "cuda" if device.type == "cuda" else "cpp"
    if wanted not in ("auto", name):
        raise UserError(f"--kernels {wanted}: not for {device.type}; choose {name}, torch or auto")

    try:
        import csrc

        problem = csrc.problem(device)
    except ImportError as error:
        problem = f"csrc is not compiled ({error}); `pip install -v -e .` compiles it"

    if not problem:
        return csrc, f"{name}, compiled from csrc"
    if wanted == name:
        raise UserError(f"--kernels {wanted}: {problem}")
    return None, f"torch: {problem}"


class CapturedStep:
    """A training step, captured as a CUDA graph: one launch instead of some thousand.

    It is called like the function that it captures, `take_step(flat, batch, config, kernels)`,
    always with the same network. A graph's tensors stay where they are: a batch is copied into
    those that the graph reads, and what it returns lies in those that the next step overwrites.
    """

    def __init__(self, take_step: Callable[..., dict[str, torch.Tensor]]):
        self.take_step = take_step
        self.graph = None

    def __call__(self, flat: Any, batch: Any, config: Any, kernels: Any) -> dict[str, torch.Tensor]:
        if self.graph is None:
            self.capture(flat, batch, config, kernels)
        for mine, theirs in zip(self.batch, batch, strict=True):
            mine.copy_(theirs)
        self.graph.replay()
        return self.measured

    def capture(self, flat: Any, batch: Any, config: Any, kernels: Any) -> None:
        """Record a step. The network and its progress stay as they were."""
        state = flat.state()
        progress = [x.clone() for x in flat.progress]
        self.batch = type(batch)._make(x.clone() for x in batch)

        # Libraries set themselves up in their first calls, which no graph may hold.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.take_step(flat, self.batch, config, kernels)
        torch.cuda.current_stream().wait_stream(side)

        # Recording takes no step. thread_local: other threads of this process may go on using the
        # GPU.
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.measured = self.take_step(flat, self.batch, config, kernels)

        flat.load(state)
        for mine, before in zip(flat.progress, progress, strict=True):
            mine.copy_(before)
