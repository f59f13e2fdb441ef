"""Trained networks as files: plain state dicts, which say what they are of.

They load with `network.load_state_dict(torch.load(path, weights_only=True))`, and are only ever
read as tensors and plain values, never as code.
"""

import io
import pickle
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from support.errors import UserError
from support.files import replacing

ABOUT = "fedgs"  # under this name a state dict's `_metadata` says what it is of


def save(path: Path, value: object) -> None:
    """torch.save, whole or not at all. Raises OSError."""
    # Torch reports a full disk as a fault of its own, so the file is written here.
    content = io.BytesIO()
    torch.save(value, content)
    with replacing(path) as new:
        new.write_bytes(content.getbuffer())


def with_about(network: nn.Module, about: dict) -> dict[str, Tensor]:
    """A copy of the network's state dict that carries facts, plain values, with it.

    They travel in the attribute `_metadata` that torch gives its state dicts, so that the names
    in it stay the published ones.
    """
    state = network.state_dict()
    for name, tensor in state.items():
        state[name] = tensor.to("cpu", copy=True)
    state._metadata[ABOUT] = about
    return state


def read(path: Path) -> object:
    """torch.load of tensors and plain values. Raises UserError for every kind of damage."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).partition("\n")[0] or "it is empty"
        raise UserError(f"{path} is damaged, or no checkpoint: {reason}") from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A network's state dict, and what `with_about` put beside it; {} for a bare one.

    Raises UserError for a missing or damaged file, what is no state dict, and weights that are not
    finite.
    """
    state = read(path)
    is_state = isinstance(state, dict) and all(isinstance(x, Tensor) for x in state.values())
    if not is_state:
        raise UserError(
            f"{path} is no network's state dict (best.pt, best_small.pt and last.pt of a run are)"
        )
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} holds weights that are not finite ({name})")

    about = read_about(state)
    if about is None:
        raise UserError(f"{path}: its configuration is damaged")
    return state, about


def read_about(state: dict[str, Tensor]) -> dict | None:
    """What travels with a state dict; {} where nothing does, None where that is damaged."""
    metadata = getattr(state, "_metadata", {})
    about = metadata.get(ABOUT, {}) if isinstance(metadata, dict) else None
    if about == {}:
        return about
    whole = (
        isinstance(about, dict)
        and isinstance(about.get("config"), dict)
        and isinstance(about.get("data"), str)
    )
    return about if whole else None


def load(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load the state dict that was read from path. Raises UserError for another network's."""
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not fit this network: {reason}") from error
