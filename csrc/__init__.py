"""The method's three operations, compiled: drop-ins for the definitions in fedgs.py.

Importing raises ImportError where they are not compiled; `pip install -e .` does that. Tensors on a
CPU go to kernels_cpu.cpp, tensors on a GPU to kernels_cuda.cu, on torch's current stream. The
kernels see nothing but addresses, so every argument is checked here: what does not fit raises
ValueError with the argument's name.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

# "from csrc import" would blame a circular import where the kernels are not compiled.
import csrc._kernels as _kernels

# Two checkouts may share an environment, in which only one of them is installed.
if Path(_kernels.__file__).resolve().parent != Path(__file__).resolve().parent:
    raise ImportError(f"{_kernels.__file__} belongs to another copy of FedGS")

PIXELS = {
    torch.bool: _kernels.Pixel.byte,
    torch.uint8: _kernels.Pixel.byte,
    torch.int64: _kernels.Pixel.int64,
    torch.float32: _kernels.Pixel.float32,
}


def problem(device: torch.device) -> str:
    """Why the kernels cannot run on a device; "" where they can."""
    if device.type == "cpu":
        return ""
    if not hasattr(_kernels, "cuda_problem"):
        return (
            "csrc was compiled without CUDA, as nvcc was not found: "
            "`pip install -e .` compiles it again"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    return _kernels.cuda_problem(index)


def mask_difficulty(masks: Tensor, small: Tensor, log_base: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lesion areas, difficulties and the step scale of a batch (paper, section 2).

    Each mask is read once; on a GPU it is one launch.

    masks (B, 1, H, W) or (B, H, W) bool, uint8, int64 or float32, nonzero = lesion; small (B,);
    log_base > 1. -> area (B,) int64, in pixels; difficulty (B,) float32; eta, 0-dim float32.
    Raises ValueError for other shapes and types, and for flags on another device.
    """
    masks, small, batch, results = mask_arguments(masks, small, log_base)
    if on_cpu(masks, "masks"):
        _kernels.mask_difficulty_cpu(batch, torch.get_num_threads())
    else:
        # What the blocks of a launch need to tell each other.
        pixels = masks.shape[-2] * masks.shape[-1]
        count = _kernels.mask_partials(PIXELS[masks.dtype], len(masks), pixels)
        partial = torch.empty(count, dtype=torch.int32, device=masks.device)
        counter = ticket(masks.device)
        index, stream = place(masks)
        _kernels.mask_difficulty_cuda(batch, address(partial), address(counter), index, stream)
    return results


def adamw_accumulate_(
    theta: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: float,
    update: Tensor | None = None,
    eta: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """One AdamW step on flat vectors, in place; with update and eta also update += eta s.

    One pass over memory: 5 reads and 4 writes a parameter.

    theta, grad, m, v, update: (P,) float32 on one device; step: 0-dim int64, which counts from 1,
    and eta: 0-dim float32, both on the same device. Raises ValueError for other shapes, types and
    devices, and for tensors that overlap in memory.
    """
    vectors, options = step_arguments(
        theta, grad, m, v, step, lr, update, eta, betas, eps, weight_decay
    )
    if on_cpu(theta, "theta"):
        _kernels.adamw_accumulate_cpu(vectors, options, torch.get_num_threads())
    else:
        index, stream = place(theta)
        _kernels.adamw_accumulate_cuda(vectors, options, index, stream)


def aggregate(
    total: Tensor, updates: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """total + sum_k w_k Delta_k, summed in client order.

    One pass over memory: K + 1 reads and 1 write a parameter. On a GPU every further 32 clients
    read and write the sum once more.

    total (P,) float32; updates: K vectors like it; weights: K numbers. -> the sum (P,), the squared
    norm of each update (K,) float64, whether each update is finite (K,) bool.
    Raises ValueError for other shapes, types and devices, for no update, and for another number of
    weights.
    """
    weighted_sum, result, norms = sum_arguments(total, updates, weights)
    if on_cpu(total, "total"):
        _kernels.aggregate_cpu(weighted_sum, torch.get_num_threads())
    else:
        partial = norms.new_empty(len(updates) * _kernels.AGGREGATE_BLOCKS)
        index, stream = place(total)
        _kernels.aggregate_cuda(weighted_sum, address(partial), index, stream)

    # A sum of squares is finite exactly where all its terms are.
    return result, norms, norms.isfinite()


# ---------------------------------------------------------------------------------- to learn from

# The same three by the kernels that one would write first, on a GPU only. kernels_cuda.cu says what
# those above do differently, and csrc/benchmark.py times both.


def naive_mask_difficulty(
    masks: Tensor, small: Tensor, log_base: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mask_difficulty, with a thread and an atomic addition a pixel, in three launches."""
    masks, small, batch, results = mask_arguments(masks, small, log_base)
    refuse_cpu(masks, "masks")
    index, stream = place(masks)
    _kernels.naive_mask_difficulty(batch, index, stream)
    return results


def naive_adamw_accumulate_(
    theta: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: float,
    update: Tensor | None = None,
    eta: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """adamw_accumulate_, with a thread a parameter."""
    vectors, options = step_arguments(
        theta, grad, m, v, step, lr, update, eta, betas, eps, weight_decay
    )
    refuse_cpu(theta, "theta")
    index, stream = place(theta)
    _kernels.naive_adamw_accumulate(vectors, options, index, stream)


def naive_aggregate(
    total: Tensor, updates: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """aggregate, with a launch a client. The norms' last bits vary: they are added in any order."""
    weighted_sum, result, norms = sum_arguments(total, updates, weights)
    refuse_cpu(total, "total")
    index, stream = place(total)
    _kernels.naive_aggregate(weighted_sum, index, stream)
    return result, norms, norms.isfinite()


# --------------------------------------------------------------------------------------- arguments


def mask_arguments(
    masks: Tensor, small: Tensor, log_base: float
) -> tuple[Tensor, Tensor, _kernels.Masks, tuple[Tensor, Tensor, Tensor]]:
    """Check mask_difficulty's arguments, and make its results.

    -> masks and flags, as they lie in memory; these and the results as addresses; the results
    """
    check_masks(masks, small)
    if not log_base > 1:
        raise ValueError(f"log_base must be above 1, not {log_base}")

    # Both may be copies, and have to live for as long as their addresses are used.
    masks = masks.contiguous()
    small = small.to(torch.bool).contiguous()

    area = torch.empty(len(masks), dtype=torch.int64, device=masks.device)
    difficulty = torch.empty(len(masks), dtype=torch.float32, device=masks.device)
    eta = torch.empty((), dtype=torch.float32, device=masks.device)
    batch = _kernels.Masks(
        masks=address(masks),
        pixel=PIXELS[masks.dtype],
        small=address(small),
        images=len(masks),
        pixels=masks.shape[-2] * masks.shape[-1],
        log_base=log_base,
        area=address(area),
        difficulty=address(difficulty),
        eta=address(eta),
    )
    return masks, small, batch, (area, difficulty, eta)


def step_arguments(
    theta: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: float,
    update: Tensor | None,
    eta: Tensor | None,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[_kernels.Step, _kernels.AdamWOptions]:
    """Check adamw_accumulate_'s arguments. -> the tensors as addresses, the numbers"""
    tensors = {"theta": theta, "grad": grad, "m": m, "v": v}
    if update is not None:
        tensors["update"] = update
    check_vectors(tensors)

    if (update is None) != (eta is None):
        raise ValueError("update and eta go together")
    if eta is not None:
        check_number("eta", eta, torch.float32, theta)
        tensors["eta"] = eta
    check_number("step", step, torch.int64, theta)
    tensors["step"] = step
    check_apart(tensors)

    # On a GPU this would make every step wait until the number is there.
    if step.device.type == "cpu" and step < 1:
        raise ValueError(f"step must count from 1, not {step.item()}")

    vectors = _kernels.Step(
        theta=address(theta),
        grad=address(grad),
        m=address(m),
        v=address(v),
        update=address(update),
        eta=address(eta),
        t=address(step),
        n=theta.numel(),
    )
    options = _kernels.AdamWOptions(
        lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay
    )
    return vectors, options


def sum_arguments(
    total: Tensor, updates: Sequence[Tensor], weights: Sequence[float]
) -> tuple[_kernels.Sum, Tensor, Tensor]:
    """Check aggregate's arguments, and make its results. -> all as addresses, the sum, the norms"""
    clients = len(updates)
    if clients == 0:
        raise ValueError("updates is empty: there is nothing to aggregate")
    if len(weights) != clients:
        raise ValueError(f"weights must be {clients} numbers, one an update, not {len(weights)}")

    vectors = {"total": total}
    for k, update in enumerate(updates):
        vectors[f"updates[{k}]"] = update
    check_vectors(vectors)

    result = torch.empty_like(total)
    norms = torch.empty(clients, dtype=torch.float64, device=total.device)
    weighted_sum = _kernels.Sum(
        total=address(total),
        updates=[address(update) for update in updates],
        weights=list(weights),
        n=total.numel(),
        out=address(result),
        norms=address(norms),
    )
    return weighted_sum, result, norms


def check_masks(masks: Tensor, small: Tensor) -> None:
    """Raise ValueError unless these are a batch's masks and flags, on one device."""
    if masks.dtype not in PIXELS:
        raise ValueError(f"masks must be bool, uint8, int64 or float32, not {masks.dtype}")

    one_channel = masks.ndim == 4 and masks.shape[1] == 1
    if not (masks.ndim == 3 or one_channel):
        shape = tuple(masks.shape)
        raise ValueError(f"masks must be (B, 1, H, W) or (B, H, W), not {shape}")

    if small.shape != masks.shape[:1]:
        shape = tuple(small.shape)
        raise ValueError(f"small must be ({len(masks)},), one flag a mask, not {shape}")
    if small.device != masks.device:
        raise ValueError(f"small is on {small.device}, masks are on {masks.device}")


def check_vectors(vectors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all are contiguous float32 vectors, as the first one is."""
    like_name, like = next(iter(vectors.items()))
    for name, x in vectors.items():
        if x.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, not {x.dtype}")
        if x.ndim != 1 or not x.is_contiguous():
            layout = f"of shape {tuple(x.shape)}, strides {x.stride()}"
            raise ValueError(f"{name} must be a contiguous vector, not {layout}")
        if x.numel() != like.numel():
            raise ValueError(f"{name} has {x.numel()} elements, {like_name} {like.numel()}")
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device}, {like_name} on {like.device}")


def check_number(name: str, x: Tensor, dtype: torch.dtype, theta: Tensor) -> None:
    """Raise ValueError unless x is one number of this type on theta's device."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, not {x!r}")
    if x.ndim != 0 or x.dtype != dtype:
        wanted = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be 0-dim {wanted}, not {x.dtype} of shape {tuple(x.shape)}")
    if x.device != theta.device:
        raise ValueError(f"{name} is on {x.device}, theta on {theta.device}")


def check_apart(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if two of these overlap in memory."""
    spans = []
    for name, x in tensors.items():
        if x.numel():
            spans.append((x.data_ptr(), x.data_ptr() + x.nbytes, name))

    # In order of their addresses, only neighbours can overlap.
    end, name = 0, ""
    for next_start, next_end, next_name in sorted(spans):
        if next_start < end:
            raise ValueError(f"{name} and {next_name} share memory")
        end, name = next_end, next_name


def on_cpu(x: Tensor, name: str) -> bool:
    """Whether a tensor is on a CPU; if not, it is on a GPU.

    Raises ValueError where the kernels were not compiled for its device.
    """
    if x.device.type == "cpu":
        return True
    if x.device.type != "cuda":
        raise ValueError(f"{name} is on {x.device}: the kernels run on CPUs and CUDA GPUs")
    if not hasattr(_kernels, "cuda_problem"):
        raise ValueError(f"{name} is on {x.device}, but {problem(x.device)}")
    return False


def refuse_cpu(x: Tensor, name: str) -> None:
    """Raise ValueError unless a tensor is on a GPU that the kernels were compiled for."""
    if on_cpu(x, name):
        raise ValueError(f"{name} is on cpu: the naive kernels run on CUDA GPUs")


def address(x: Tensor | None) -> int:
    """Where a tensor's memory begins; 0 for no tensor."""
    if x is None:
        return 0
    return x.data_ptr()


# -------------------------------------------------------------------------------- where CUDA runs


def place(x: Tensor) -> tuple[int, int]:
    """The number of a tensor's GPU, and the address of torch's current stream there."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def ticket(device: torch.device) -> Tensor:
    """The counter from which the blocks of mask_difficulty learn which of them is the last.

    It is 0 between calls. Each stream has its own. While a graph is captured the counter is new,
    and belongs to the graph, which zeroes it at each replay.
    """
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(1, dtype=torch.int32, device=device)
        return lasting_ticket(device, torch.cuda.current_stream())


@functools.cache
def lasting_ticket(device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
