"""Trained networks as files: plain state dicts, which say what they are of.

They load with `network.load_state_dict(torch.load(path, weights_only=True))`, and are only ever
read as tensors and plain values, never as code.

A file of torch is a zip archive. Its comment, which nothing else uses, holds the checksum of all
that comes before, so that a file with a changed bit is told from a good one.
"""

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from support.errors import UserError
from support.files import CHECKSUM_SIZE, check_regular, checksum, replacing

ABOUT = "fedgs"  # under this name a state dict's `_metadata` says what it is of
LONGEST = 300  # characters of a text in a checkpoint, or of what PyTorch says of it
MOST_RECORDS = 10_000  # tensors of an archive: a network has some hundreds
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
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
            # Torch compresses nothing: what is larger than its file would fill the memory.
            items = archive.infolist()
            size = sum(item.file_size for item in items)
            if size > len(content) or len(items) > MOST_RECORDS:
                raise ValueError("it holds more than a file of this size can")

            # Torch can be told to compute none, and writes 0 then.
            has_crc = any(item.CRC for item in items)
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
    check_regular(path)
    try:
        content = path.read_bytes()
        check_content(content)
        # PyTorch warns of old formats, and of what is an error here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:
        # What PyTorch stumbles over in damaged bytes may be of any kind.
        reason = str(error).partition("\n")[0][:LONGEST] or "it is empty"
        if isinstance(error, LookupError | MemoryError):  # whose message is a byte, or a name
            reason = "PyTorch makes no sense of it"
        if isinstance(error, pickle.UnpicklingError):  # whose message tells how to trust it
            reason = "it is cut short, or holds more than tensors and plain values"
        raise UserError(f"{path} is damaged, or no checkpoint: {reason}") from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A network's state dict, and what `with_about` put beside it; {} for a bare one.

    Raises UserError for a missing or damaged file, what is no state dict, and tensors that no
    network has.
    """
    state = read(path)
    return state, check_weights(state, path)


def check_weights(state: object, path: Path) -> dict:
    """What travels with the state dict that path holds; raises as `read_weights` does."""
    is_state = isinstance(state, dict) and all(isinstance(x, Tensor) for x in state.values())
    if not (is_state and state):
        raise UserError(
            f"{path} is no network's state dict (best.pt, best_small.pt and last.pt of a run are)"
        )
    for name, tensor in state.items():
        check_tensor(tensor, name, path)

        # Batch norm divides by its root.
        if str(name).endswith("running_var") and tensor.numel() and tensor.min() < 0:
            raise UserError(f"{path} holds a negative variance ({name})")

    about = read_about(state)
    if about is None:
        raise UserError(f"{path}: its configuration is damaged")
    return about


def check_tensor(tensor: Tensor, name: object, path: Path) -> None:
    """Raise UserError for a tensor, read from path, that holds no finite numbers of float32.

    Counters and index tables are whole numbers: whether these belong there, `load` looks at.
    """
    name = str(name)[:LONGEST]
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    plain = plain and not (tensor.is_quantized or tensor.is_nested)
    if not (plain and tensor.dtype in (*FLOATS, torch.int64)):
        raise UserError(f"{path} holds {name} as a tensor of a kind that no network here has")

    # By its strides, a tensor of a few bytes may claim to be of any size.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{path} holds {name} with more elements than were written")
    if not tensor.to(torch.float32).isfinite().all():
        raise UserError(f"{path} holds weights that are not finite ({name})")


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
        and about["data"].isprintable()
        and len(about["data"]) <= LONGEST
        and is_round(about.get("round", 1))
    )
    return about if whole else None


def is_round(value: object) -> bool:
    """Whether a value from a file can be the number of a round."""
    return type(value) is int and value >= 1


def load(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load the state dict that was read from path. Raises UserError for another network's."""
    check_whole_numbers(network, state, path)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()[:LONGEST]
        raise UserError(f"{path} does not fit this network: {reason}") from error


def check_whole_numbers(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise UserError where one has whole numbers and the other has not, or other index tables."""
    for name, own in network.state_dict().items():
        given = state.get(name)
        if given is None or given.numel() != own.numel():
            continue  # PyTorch says that, all names at once
        fits = given.is_floating_point() == own.is_floating_point()
        if fits and not own.is_floating_point():
            # Index tables are constants, while counters count.
            fits = torch.equal(given, own.cpu()) if own.ndim else given.item() >= 0
        if not fits:
            raise UserError(f"{path} does not fit this network: {name} holds other numbers")


def build(new_network: Callable[[], nn.Module], state: dict[str, Tensor], path: Path) -> nn.Module:
    """The network that a state dict, read from path, is of.

    new_network: makes it, as the options say. It is first made without memory: options in a file
    may ask for any amount. Raises UserError where the state dict does not fit it.
    """
    try:
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in new_network().state_dict().items()}
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path}: there is no such network as its options say") from error
    for name, tensor in state.items():
        if name in shapes and tensor.shape != shapes[name] and shapes[name].numel() > 1:
            raise UserError(
                f"{path} does not fit this network: size mismatch for {name}: "
                f"{tuple(tensor.shape)} in the file, {tuple(shapes[name])} by the options"
            )

    network = new_network()
    load(network, state, path)
    return network


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
