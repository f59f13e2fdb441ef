"""Trained networks as files: plain state dicts, which say what they are of.

They load with `network.load_state_dict(torch.load(path, weights_only=True))`, and are only ever
read as tensors and plain values, never as code.

A file of torch is a zip archive. Its comment, which nothing else uses, holds the checksum of all
that comes before, so that a file with a changed bit is told from a good one.
"""

import io
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from support.errors import UserError
from support.files import CHECKSUM_SIZE, checksum, replacing

ABOUT = "fedgs"  # under this name a state dict's `_metadata` says what it is of
MARK = b"blake2b "  # how the comment of an archive begins that ends with its checksum


def save(path: Path, value: object) -> None:
    """torch.save, whole or not at all, with a checksum. Raises OSError."""
    # Torch reports a full disk as a fault of its own, so the file is written here.
    content = io.BytesIO()
    torch.save(value, content)
    add_checksum(content)
    with replacing(path) as new:
        new.write_bytes(content.getbuffer())


def add_checksum(archive: io.BytesIO) -> None:
    """Make the checksum of an archive its comment."""
    # The last two bytes are the comment's length: 0 as torch leaves it.
    length = len(MARK) + CHECKSUM_SIZE
    archive.seek(-2, os.SEEK_END)
    archive.write(length.to_bytes(2, "little") + MARK)
    archive.write(checksum(archive.getbuffer()).encode())


def check_content(content: bytes) -> None:
    """Raise ValueError, or an error of the zip format, where a file's bits have changed.

    Checkpoints from elsewhere have no checksum of ours. For most of their bits an archive has some
    of its own (CRC-32), which torch does not look at; files of torch before 1.6 have none.
    """
    before = memoryview(content)[:-CHECKSUM_SIZE]
    if before[-len(MARK) :] == MARK:
        if content[-CHECKSUM_SIZE:] != checksum(before).encode():
            raise ValueError("it is not what was written, by its checksum")
    elif zipfile.is_zipfile(io.BytesIO(content)):
        # It ends with the length of a comment that is not there, or with what is left of ours.
        if not content.endswith(b"\0\0"):
            raise ValueError("its checksum is damaged")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # Torch can be told to compute none, and writes 0 then.
            has_crc = any(item.CRC for item in archive.infolist())
            name = archive.testzip() if has_crc else None
            if name is not None:
                raise ValueError(f"{name} is not what was written, by its CRC-32")


def with_about(
    network: nn.Module, about: dict, own: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A copy of the network's state dict that carries facts, plain values, with it.

    own: what clients have of their own, see fedgs.State. It travels like the facts in the attribute
    `_metadata` that torch gives its state dicts, so that the names in it stay the published ones.
    """
    state = network.state_dict()
    for name, tensor in state.items():
        state[name] = tensor.to("cpu", copy=True)
    if own:
        kept = {client: tensor.to("cpu", copy=True) for client, tensor in own.items()}
        about = {**about, "own": kept}
    state._metadata[ABOUT] = about
    return state


def read(path: Path) -> object:
    """torch.load of tensors and plain values. Raises UserError for every kind of damage."""
    try:
        content = path.read_bytes()
        check_content(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
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
        AssertionError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = str(error).partition("\n")[0] or "it is empty"
        if isinstance(error, LookupError):  # whose message is a byte, or a name
            reason = "PyTorch makes no sense of it"
        raise UserError(f"{path} is damaged, or no checkpoint: {reason}") from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A network's state dict, and what `with_about` put beside it; {} for a bare one.

    Raises UserError for a missing or damaged file, what is no state dict, and weights that are not
    finite.
    """
    state = read(path)
    return state, check_weights(state, path)


def check_weights(state: object, path: Path) -> dict:
    """What travels with the state dict that path holds; raises as `read_weights` does."""
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
    return about


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


def load_state(flat: Any, weights: dict[str, Tensor], path: Path) -> Any:
    """Load weights that were read from path into a fedgs.FlatNetwork. -> fedgs.State

    Raises UserError for another network's, and where what clients have of their own is damaged.
    """
    load(flat.network, weights, path)
    return flat.state(own_of(read_about(weights), flat, path))


def own_of(about: dict, flat: Any, path: Path) -> dict[str, Tensor]:
    """What clients have of their own (see fedgs.State), from what travels with a checkpoint."""
    own = about.get("own", {})
    try:
        for tensor in own.values():
            if tensor.shape != flat.affine.shape or not tensor.isfinite().all():
                raise ValueError("it does not fit, or is not finite")
        return {client: tensor.to(flat.parameters) for client, tensor in own.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: a client's own batch norm is damaged ({error})") from error
