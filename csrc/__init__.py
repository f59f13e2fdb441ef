"""The method's three operations, compiled: drop-ins for the PyTorch definitions of the same names in fedgs.py.

Importing raises ImportError where they are not compiled; `pip install -e .` does that. Tensors on a CPU go to
kernels_cpu.cpp, tensors on a GPU to kernels_cuda.cu, on torch's current stream. Every argument is checked here, since
the kernels see addresses only: what does not fit raises ValueError with the argument's name.
"""

import functools
from pathlib import Path

import torch

import csrc._kernels as _kernels  # "from csrc" would blame a circular import where it is not compiled

if Path(_kernels.__file__).resolve().parent != Path(__file__).resolve().parent:
    raise ImportError(f"{_kernels.__file__} belongs to another copy of FedGS")  # where two share an environment

PIXELS = {torch.bool: _kernels.Pixel.byte, torch.uint8: _kernels.Pixel.byte, torch.int64: _kernels.Pixel.int64,
          torch.float32: _kernels.Pixel.float32}


def problem(device):
    """Why the kernels cannot run on a torch.device; "" where they can."""
    if device.type == "cpu":
        return ""
    if not hasattr(_kernels, "cuda_problem"):
        return "csrc was compiled without CUDA, as nvcc was not found: `pip install -e .` compiles it again"
    return _kernels.cuda_problem(torch.cuda.current_device() if device.index is None else device.index)


def mask_difficulty(masks, small, log_base):
    """Lesion areas, difficulties and the step scale of a batch, each mask read once; one launch on a GPU.

    masks (B, 1, H, W) or (B, H, W) bool, uint8, int64 or float32, nonzero = lesion; small (B,); log_base > 1.
    -> area (B,) int64, in pixels; delta (B,) float32; eta, 0-dim float32. See fedgs.mask_difficulty for the formulas.
    Raises ValueError for other shapes and types, and for flags on another device.
    """
    require(masks.dtype in PIXELS, f"masks must be bool, uint8, int64 or float32, not {masks.dtype}")
    require(masks.ndim == 3 or (masks.ndim == 4 and masks.shape[1] == 1),
            f"masks must be (B, 1, H, W) or (B, H, W), not {tuple(masks.shape)}")
    require(small.shape == masks.shape[:1], f"small must be ({len(masks)},), one flag a mask, not {tuple(small.shape)}")
    require(small.device == masks.device, f"small is on {small.device}, masks are on {masks.device}")
    require(log_base > 1, f"log_base must be above 1, not {log_base}")
    masks, small = masks.contiguous(), small.to(torch.bool).contiguous()
    images, pixels = len(masks), masks.shape[-2] * masks.shape[-1]
    area = torch.empty(images, dtype=torch.int64, device=masks.device)
    delta, eta = torch.empty(images, device=masks.device), torch.empty((), device=masks.device)
    given = (masks.data_ptr(), PIXELS[masks.dtype], small.data_ptr(), images, pixels, log_base, area.data_ptr(),
             delta.data_ptr(), eta.data_ptr())
    if on_cpu(masks, "masks"):
        _kernels.mask_difficulty_cpu(*given, torch.get_num_threads())
    else:
        partial = area.new_empty(_kernels.mask_partials(PIXELS[masks.dtype], images, pixels), dtype=torch.int32)
        _kernels.mask_difficulty_cuda(*given, partial.data_ptr(), ticket(masks.device).data_ptr(), *place(masks))
    return area, delta, eta


def adamw_accumulate_(theta, grad, m, v, step, lr, delta=None, eta=None,
                      betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    """One AdamW step on flat vectors, in place, and delta += eta s, in one pass: 5 reads and 4 writes a parameter.

    theta, grad, m, v, delta: (P,) float32 on one device; step counts from 1; eta: 0-dim float32 on the same device,
    or leave delta and eta out. See fedgs.adamw_accumulate_ for the formulas.
    Raises ValueError for other shapes, types and devices, and for vectors that overlap in memory.
    """
    vectors = {"theta": theta, "grad": grad, "m": m, "v": v} | ({} if delta is None else {"delta": delta})
    check_vectors(vectors, theta)
    check_apart(vectors | ({} if eta is None else {"eta": eta}))
    require((delta is None) == (eta is None), "delta and eta go together")
    if eta is not None:
        require(eta.shape == () and eta.dtype == torch.float32,
                f"eta must be 0-dim float32, not {eta.dtype} of shape {tuple(eta.shape)}")
        require(eta.device == theta.device, f"eta is on {eta.device}, theta on {theta.device}")
    require(step >= 1, f"step must count from 1, not {step}")
    given = (theta.data_ptr(), grad.data_ptr(), m.data_ptr(), v.data_ptr(), 0 if delta is None else delta.data_ptr(),
             0 if eta is None else eta.data_ptr(), theta.numel(), step, lr, betas, eps, weight_decay)
    if on_cpu(theta, "theta"):
        _kernels.adamw_accumulate_cpu(*given, torch.get_num_threads())
    else:
        _kernels.adamw_accumulate_cuda(*given, *place(theta))


def aggregate(theta, updates, weights, server_lr=1.0):
    """theta - server_lr sum_k w_k Delta_k, in client order and one pass: K + 1 reads and 1 write a parameter.

    theta (P,) float32; updates: K vectors like it; weights: K numbers. -> new theta (P,), squared norm of each update
    (K,) float64, whether each update is finite (K,) bool. See fedgs.aggregate.
    Raises ValueError for other shapes, types and devices, for no update, and for another number of weights.
    """
    require(len(updates) > 0, "updates is empty: there is nothing to aggregate")
    require(len(weights) == len(updates), f"weights must be {len(updates)} numbers, one an update, not {len(weights)}")
    check_vectors({"theta": theta} | {f"updates[{k}]": update for k, update in enumerate(updates)}, theta)
    new = torch.empty_like(theta)
    norms = torch.empty(len(updates), dtype=torch.float64, device=theta.device)
    given = (theta.data_ptr(), [update.data_ptr() for update in updates], [server_lr * weight for weight in weights],
             theta.numel(), new.data_ptr(), norms.data_ptr())
    if on_cpu(theta, "theta"):
        _kernels.aggregate_cpu(*given, torch.get_num_threads())
    else:
        partial = norms.new_empty(len(updates) * _kernels.AGGREGATE_BLOCKS)
        _kernels.aggregate_cuda(*given, partial.data_ptr(), *place(theta))
    return new, norms, norms.isfinite()


# ---------------------------------------------------------------------------------------------- arguments


def require(condition, message):
    if not condition:
        raise ValueError(message)


def check_vectors(vectors, like):
    """Whether {name: tensor} are contiguous float32 vectors of one size and device."""
    for name, x in vectors.items():
        require(x.dtype == torch.float32, f"{name} must be float32, not {x.dtype}")
        require(x.ndim == 1 and x.is_contiguous(), f"{name} must be a contiguous vector, not of shape {tuple(x.shape)}, "
                f"strides {x.stride()}")
        require(x.numel() == like.numel(), f"{name} has {x.numel()} elements, theta {like.numel()}")
        require(x.device == like.device, f"{name} is on {x.device}, theta on {like.device}")


def check_apart(tensors):
    """Whether no two of {name: tensor} overlap in memory."""
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, name) for name, x in tensors.items() if x.numel())
    for (_, end, name), (start, _, other) in zip(spans, spans[1:]):
        require(end <= start, f"{name} and {other} share memory")


def on_cpu(x, name):
    """Whether a tensor is on a CPU; if not, on a GPU. Raises ValueError where the kernels were not compiled for it."""
    if x.device.type == "cpu":
        return True
    require(x.device.type == "cuda", f"{name} is on {x.device}: the kernels run on CPUs and CUDA GPUs")
    require(hasattr(_kernels, "cuda_problem"), f"{name} is on {x.device}, but {problem(x.device)}")
    return False


# ------------------------------------------------------------------------------------------ where CUDA runs


def place(x):
    """The number of a tensor's GPU, and the address of torch's current stream there."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def ticket(device):
    """The counter from which the blocks of mask_difficulty learn which of them is the last: 0 between calls.

    Each stream has its own. While a graph is captured it is new, and belongs to the graph, which zeroes it at each replay.
    """
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(1, dtype=torch.int32, device=device)
        return lasting_ticket(device, torch.cuda.current_stream())


@functools.cache
def lasting_ticket(device, stream):
    return torch.zeros(1, dtype=torch.int32, device=device)
