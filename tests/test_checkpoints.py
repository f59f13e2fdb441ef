"""Checkpoints: what travels with a state dict, and every kind of file that is none."""

import contextlib
import functools
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import assert_same_weights
from test_files import flipped

from models import UTNet
from support import checkpoints
from support.errors import UserError
from support.files import checksum

ABOUT = {"data": "PolypGen stand-in", "round": 3, "config": {"width": 2, "centres": ("C1", "C6")}}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return UTNet(width=2)


@pytest.fixture
def path(network, tmp_path):
    """The file of a network that says what it is of."""
    path = tmp_path / "best.pt"
    checkpoints.save(path, checkpoints.with_about(network, ABOUT))
    return path


# -------------------------------------------------------------------------------------------- whole


def test_weights_and_facts_come_back(network, path):
    state, about = checkpoints.read_weights(path)
    assert about == ABOUT
    assert list(state) == list(network.state_dict())  # the published names, and no other
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_copy_is_saved(network):
    """Training goes on while the copy is written."""
    weights = checkpoints.with_about(network, ABOUT)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert "fedgs" not in network.state_dict()._metadata


@pytest.mark.parametrize("mmap", [False, True])
def test_anyone_can_load_it(network, path, mmap):
    other = UTNet(width=2)
    other.load_state_dict(torch.load(path, weights_only=True, mmap=mmap))
    theirs = network.state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_bare_state_dict_says_nothing(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    torch.save(dict(network.state_dict()), tmp_path / "published.pt")
    assert checkpoints.read_weights(tmp_path / "plain.pt")[1] == {}
    assert checkpoints.read_weights(tmp_path / "published.pt")[1] == {}


def test_what_was_saved_on_a_gpu_is_read_onto_the_cpu(network, tmp_path, monkeypatch):
    def first_gpu(storage):
        return "cuda:0"

    monkeypatch.setattr(torch.serialization, "location_tag", first_gpu)
    torch.save(network.state_dict(), tmp_path / "best.pt")
    state, _ = checkpoints.read_weights(tmp_path / "best.pt")
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}


def test_saving_replaces_a_file_whole(network, path, tmp_path):
    (tmp_path / "copy.pt").write_bytes(path.read_bytes())

    class Unwritable:
        def __reduce__(self):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        checkpoints.save(path, {"weights": torch.ones(9), "rest": Unwritable()})
    assert_same_weights(path, tmp_path / "copy.pt")
    assert {item.name for item in tmp_path.iterdir()} == {"best.pt", "copy.pt"}


# ------------------------------------------------------------------------------------- flipped bits


@pytest.fixture
def small(tmp_path):
    """The file of a network that is read in no time."""
    path = tmp_path / "small.pt"
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    checkpoints.save(path, checkpoints.with_about(network, ABOUT))
    return path


def test_the_comment_of_the_archive_is_the_checksum_of_the_rest(path):
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.comment == b"blake2b " + checksum(content[:-64]).encode()
        assert archive.testzip() is None  # it is still one for other readers, too


def test_every_flipped_bit_is_noticed(small):
    """In what says that it is an archive, in its checksum and what stands before it; anywhere."""
    content = small.read_bytes()
    begins = [0, 1, 2, 3, -94, -93, -74, -73]
    for damaged in flipped(content, places=[*begins, *range(-72, -62), -1], count=200):
        small.write_bytes(damaged)
        with pytest.raises(UserError, match=r"small.pt is damaged, or no checkpoint: ."):
            checkpoints.read(small)


@pytest.mark.parametrize("length", [1, 64, 72, 73, 94, 1000])
def test_a_checksum_that_is_cut_off(small, length):
    content = small.read_bytes()
    for damaged in (content[:-length], content + content[-length:]):
        small.write_bytes(damaged)
        with pytest.raises(UserError, match=r"small.pt is damaged, or no checkpoint: ."):
            checkpoints.read(small)


def test_a_flipped_bit_anywhere_in_a_large_file(tmp_path):
    path = tmp_path / "large.pt"
    checkpoints.save(path, {"w": torch.zeros(1_000_000)})
    whole = path.read_bytes()
    for share in (0.3, 0.6, 0.97):
        content = bytearray(whole)
        content[int(share * len(whole))] ^= 4
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"large.pt is damaged"):
            checkpoints.read(path)


def test_flipped_bits_of_a_checkpoint_from_elsewhere(small):
    """Its archive has checksums of what it holds, though torch does not look at them."""
    state = torch.load(small, weights_only=True)
    torch.save(state, small)
    content = small.read_bytes()
    with zipfile.ZipFile(small) as archive:
        pickled, weights = [archive.read(f"small/{name}") for name in ("data.pkl", "data/0")]

    for held in (pickled, weights):
        start = content.index(held)
        for damaged in flipped(held, places=(0, -1)):
            small.write_bytes(content[:start] + damaged + content[start + len(held) :])
            with pytest.raises(UserError, match=r"small.pt is damaged, or no .*, by its CRC-32"):
                checkpoints.read(small)


def test_checkpoints_from_elsewhere_without_any_checksum(small):
    """Torch can be told not to compute them, and had none before 1.6."""
    state = torch.load(small, weights_only=True)
    bare = io.BytesIO()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, bare)
    finally:
        torch.serialization.set_crc32_options(True)
    old = io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)

    for content in (bare, old):
        small.write_bytes(content.getvalue())
        found, _ = checkpoints.read_weights(small)
        assert all(torch.equal(found[name], state[name]) for name in state)


# ------------------------------------------------------------------------------------------- damage


def half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("hello world\n")


def braces(path):
    path.write_text("{}")


def another_archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "")


def flipped_bytes(path):
    """The pickled names are near the beginning."""
    content = bytearray(path.read_bytes())
    for i in range(60, 1500, 7):
        content[i] ^= 0x55
    path.write_bytes(content)


HARMS = [half, empty, text, braces, another_archive, flipped_bytes]


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_an_error_for_people(path, harm):
    harm(path)
    with pytest.raises(UserError, match=r"best.pt is damaged, or no checkpoint: .") as caught:
        checkpoints.read(path)
    assert "\n" not in str(caught.value)


def test_the_reason_is_torchs_or_that_there_is_nothing(path):
    empty(path)
    with pytest.raises(UserError, match=r"no checkpoint: it is empty$"):
        checkpoints.read(path)
    text(path)
    with pytest.raises(UserError, match=r"no checkpoint: PyTorch makes no sense of it$"):
        checkpoints.read(path)


def test_beginnings_of_files(small):
    """PyTorch has several formats, and each of them stumbles over other bytes."""
    content = small.read_bytes()
    for first in b"PX\x80\x00":
        for length in range(1, 40):
            small.write_bytes(bytes([first]) + content[1:length])
            with pytest.raises(UserError, match=r"small.pt is damaged, or no checkpoint: ."):
                checkpoints.read(small)


def test_a_name_that_is_no_text(network, tmp_path):
    """In an archive that is whole otherwise."""
    torch.save(network.state_dict(), tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "harmed.pt", "w") as harmed,
    ):
        for item in whole.infolist():
            harmed.writestr(item, whole.read(item).replace(b"outc", b"out\xca"))
    with pytest.raises(UserError, match=r"harmed.pt is damaged, or no checkpoint: .*utf-8"):
        checkpoints.read(tmp_path / "harmed.pt")


class Rebuilt:
    """What a file says is a tensor of these parts."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.parts


@pytest.mark.parametrize("parts", [(1,), ((1,), 0, (1,), (1,), False, {})])
def test_a_tensor_of_other_parts(tmp_path, parts):
    torch.save({"w": Rebuilt(*parts)}, tmp_path / "harmed.pt")
    with pytest.raises(UserError, match=r"harmed.pt is damaged, or no checkpoint: ."):
        checkpoints.read(tmp_path / "harmed.pt")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none.pt is missing"):
        checkpoints.read(tmp_path / "none.pt")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Malicious()}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code.pt is damaged, or no checkpoint"):
        checkpoints.read_weights(tmp_path / "code.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2),
        [torch.ones(2)],
        "weights",
        {"state": (torch.ones(2),), "velocity": torch.ones(2)},  # a run's resume.pt
        {"weights": torch.ones(2), "round": 3},
    ],
)
def test_what_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "resume.pt")
    with pytest.raises(UserError, match=r"resume.pt is no network's state dict \(best.pt"):
        checkpoints.read_weights(tmp_path / "resume.pt")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(network, tmp_path, value):
    state = network.state_dict()
    state["outc.bias"][1] = value
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad.pt holds weights that are not finite \(outc.bias\)"):
        checkpoints.read_weights(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    "about",
    [
        "text",
        [],
        {"data": "PolypGen"},
        {"config": {"width": 2}},
        {"config": 3, "data": "PolypGen"},
        {"config": {}, "data": None},
    ],
)
def test_facts_of_another_kind(network, path, about):
    checkpoints.save(path, checkpoints.with_about(network, about))
    with pytest.raises(UserError, match=r"best.pt: its configuration is damaged"):
        checkpoints.read_weights(path)


def test_metadata_of_another_kind(network, path):
    state = network.state_dict()
    state._metadata = "text"
    torch.save(state, path)
    with pytest.raises(UserError, match=r"best.pt: its configuration is damaged"):
        checkpoints.read_weights(path)


# ---------------------------------------------------------------------------------- another network


def test_weights_are_loaded(network, path):
    other = UTNet(width=2)
    state, _ = checkpoints.read_weights(path)
    checkpoints.load(other, state, path)
    assert torch.equal(other.state_dict()["outc.weight"], network.state_dict()["outc.weight"])


@pytest.mark.parametrize(("channels", "width"), [(3, 4), (1, 2)])
def test_weights_of_another_network(path, channels, width):
    other = UTNet(channels, width=width)
    state, _ = checkpoints.read_weights(path)
    message = r"^[^\n]*best.pt does not fit this network: size mismatch for outc.weight: [^\n]*$"
    if channels == 1:
        message = message.replace("outc", "inc.0.shortcut.2")
    with pytest.raises(UserError, match=message):
        checkpoints.load(other, state, path)


def test_weights_that_lack_some(network, path):
    state, _ = checkpoints.read_weights(path)
    del state["outc.bias"]
    with pytest.raises(UserError, match=r"does not fit this network"):
        checkpoints.load(network, state, path)


def test_names_and_versions_that_no_network_has(network, path):
    state, _ = checkpoints.read_weights(path)
    state._metadata["inc.0.bn1"] = {"version": "x"}
    with pytest.raises(UserError, match=r"best.pt does not fit this network"):
        checkpoints.load(network, state, path)
    with pytest.raises(UserError, match=r"best.pt does not fit this network"):
        checkpoints.load(network, {1: torch.ones(1)}, path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_is_an_error_for_people(tmp_path, monkeypatch, size):
    """Not one of torch's own: its writer reports it as a fault of the program."""

    @contextlib.contextmanager
    def full(path):
        yield Path("/dev/full")

    monkeypatch.setattr(checkpoints, "replacing", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path / "best.pt", {"w": torch.zeros(size)})


# ------------------------------------------------------------ tensors that no network here has

KINDS = {
    "complex": lambda x: x.to(torch.complex64),
    "of whole numbers": lambda x: x.to(torch.int64),
    "of bytes": lambda x: x.to(torch.int8),
    "of flags": lambda x: x.bool(),
    "of eight bits": lambda x: x.to(torch.float8_e5m2),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.reshape(1, -1).to_sparse_csr(),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "without values": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "of one number, many times": lambda x: torch.zeros(1).expand(10**6, 10**6),
    "infinite in float32": lambda x: x.double() + 1e300,
    "negative": lambda x: -torch.ones_like(x),
    "flat": lambda x: x.reshape(1, -1),
    "empty": lambda x: torch.empty(0),
}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["0.bias", "1.running_var", "1.num_batches_tracked"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_no_network_has(tiny, tmp_path, kind, name):
    state = tiny.state_dict()
    if kind == "negative" and name == "0.bias":
        return  # that is fine
    if name == "1.num_batches_tracked" and kind in ("of whole numbers", "compressed"):
        return  # that is what it is
    state[name] = KINDS[kind](state[name].float())
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=rf"odd\.pt .*{name}"):
        weights, _ = checkpoints.read_weights(tmp_path / "odd.pt")
        checkpoints.load(tiny, weights, tmp_path / "odd.pt")


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_read(tiny, tmp_path, kind):
    state = {
        name: x.to(kind) if x.is_floating_point() else x for name, x in tiny.state_dict().items()
    }
    torch.save(state, tmp_path / "half.pt")
    weights, _ = checkpoints.read_weights(tmp_path / "half.pt")
    checkpoints.load(tiny, weights, tmp_path / "half.pt")
    assert tiny[0].weight.dtype == torch.float32


def test_an_index_table_is_a_constant(network, path):
    state, _ = checkpoints.read_weights(path)
    name = next(name for name, x in state.items() if not x.is_floating_point() and x.ndim)
    state[name] = state[name].roll(1)
    with pytest.raises(UserError, match=rf"best\.pt does not fit this network: {name} holds other"):
        checkpoints.load(network, state, path)


def test_an_empty_state_dict(tmp_path):
    torch.save({}, tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"none\.pt is no network's state dict"):
        checkpoints.read_weights(tmp_path / "none.pt")


def test_an_archive_that_would_fill_the_memory(small):
    """Torch compresses nothing. Which record is large does not matter, nor whether it is read."""
    torch.save({"w": torch.zeros(4)}, small)
    with zipfile.ZipFile(small, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small/data/9", bytes(10**6))
    with pytest.raises(UserError, match=r"small\.pt .* more than a file of this size can"):
        checkpoints.read(small)


def test_an_archive_of_very_many_records(small, monkeypatch):
    torch.save({"v": torch.zeros(2), "w": torch.zeros(4)}, small)
    monkeypatch.setattr(checkpoints, "MOST_RECORDS", 3)
    with pytest.raises(UserError, match=r"small\.pt .* more than a file of this size can"):
        checkpoints.read(small)


def test_a_network_is_not_made_before_the_weights_fit_it(network, path):
    """Options in a file may ask for any amount of memory."""
    state, _ = checkpoints.read_weights(path)
    assert isinstance(checkpoints.build(lambda: UTNet(width=2), state, path), UTNet)
    for width in (3, 10**6, 10**12, 2**63):
        with pytest.raises(UserError, match=r"best\.pt"):
            checkpoints.build(functools.partial(UTNet, width=width), state, path)


@pytest.mark.parametrize(
    "facts",
    [
        {"data": "a\nb"},
        {"data": "a\udce4"},
        {"data": "x" * 301},
        *({"round": x} for x in (0, "3", 1.5, True)),
    ],
)
def test_facts_that_tables_cannot_hold(network, path, facts):
    checkpoints.save(path, checkpoints.with_about(network, {**ABOUT, **facts}))
    with pytest.raises(UserError, match=r"best.pt: its configuration is damaged"):
        checkpoints.read_weights(path)


def test_reasons_are_short_and_in_our_words(tmp_path):
    torch.save({"weights": Malicious()}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"holds more than tensors and plain values$"):
        checkpoints.read(tmp_path / "code.pt")
    with pytest.raises(UserError) as caught:
        checkpoints.load(nn.Linear(1, 1), {"x" * 10**6: torch.ones(1)}, Path("a.pt"))
    assert len(str(caught.value)) < 500


def test_one_negative_variance_is_enough(tiny, tmp_path):
    state = tiny.state_dict()
    state["1.running_var"] = torch.tensor([1.0, -1e-3])
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"odd\.pt holds a negative variance \(1\.running_var\)"):
        checkpoints.read_weights(tmp_path / "odd.pt")
