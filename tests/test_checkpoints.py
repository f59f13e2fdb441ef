"""Checkpoints: what travels with a state dict, and every kind of file that is none."""

import contextlib
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights

from models import UTNet
from support import checkpoints
from support.errors import UserError

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


def test_anyone_can_load_it(network, path):
    other = UTNet(width=2)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(other.state_dict()["outc.weight"], network.state_dict()["outc.weight"])


def test_a_bare_state_dict_says_nothing(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    torch.save(dict(network.state_dict()), tmp_path / "published.pt")
    assert checkpoints.read_weights(tmp_path / "plain.pt")[1] == {}
    assert checkpoints.read_weights(tmp_path / "published.pt")[1] == {}


def test_saving_replaces_a_file_whole(network, path, tmp_path):
    (tmp_path / "copy.pt").write_bytes(path.read_bytes())

    class Unwritable:
        def __reduce__(self):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        checkpoints.save(path, {"weights": torch.ones(9), "rest": Unwritable()})
    assert_same_weights(path, tmp_path / "copy.pt")
    assert {item.name for item in tmp_path.iterdir()} == {"best.pt", "copy.pt"}


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


def folder(path):
    path.unlink()
    path.mkdir()


HARMS = [half, empty, text, braces, another_archive, flipped_bytes, folder]


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_an_error_for_people(path, harm):
    harm(path)
    with pytest.raises(UserError, match=r"best.pt is damaged, or no checkpoint: .") as caught:
        checkpoints.read(path)
    assert "\n" not in str(caught.value)


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
    with pytest.raises(UserError, match=r"best.pt does not fit this network: .") as caught:
        checkpoints.load(other, state, path)
    assert "\n" not in str(caught.value)


def test_weights_that_lack_some(network, path):
    state, _ = checkpoints.read_weights(path)
    del state["outc.bias"]
    with pytest.raises(UserError, match=r"does not fit this network"):
        checkpoints.load(network, state, path)


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
