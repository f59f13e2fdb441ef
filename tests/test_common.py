"""What the programs share: opening a trained network, whoever trained it."""

from dataclasses import replace

import pytest
import torch
from conftest import exit_code, refused

import fedgs
from models import SDUTNet, UTNet
from support import checkpoints, runs
from support.errors import UserError
from tools import evaluate, predict
from tools.common import describe_origin, open_checkpoint

TINY = {"image_size": 32, "width": 2, "centres": ("C4", "C6")}
LITS = {**fedgs.DATASETS["lits"], "dataset": "lits", "centres": ("C1", "C5")}


def save_checkpoint(path, source="PolypGen stand-in", **options):
    """A checkpoint of an untrained network, as a run would leave it. -> path"""
    config = fedgs.Config(**{**TINY, **options})
    about = runs.describe_weights(config, source, 7, fedgs.__version__)
    network = fedgs.build_network(config)
    checkpoints.save(path, checkpoints.with_about(network, about))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "best.pt")


# ---------------------------------------------------------------------------------- of this project


@pytest.mark.parametrize("model", ["utnet", "sd-utnet"])
def test_a_checkpoint_brings_its_configuration(tmp_path, model):
    path = save_checkpoint(tmp_path / "best.pt", model=model, seed=3, fold=2, tau=99.0)
    network, config, about = open_checkpoint(path, {})
    assert config == fedgs.Config(**TINY, model=model, seed=3, fold=2, tau=99.0)
    assert isinstance(config.centres, tuple)
    assert (about["data"], about["round"]) == ("PolypGen stand-in", 7)
    assert isinstance(network, SDUTNet if model == "sd-utnet" else UTNet)

    weights, _ = checkpoints.read_weights(path)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_where_it_was_trained_is_no_part_of_it(tmp_path):
    """A checkpoint goes to other machines: nothing is looked for where the run was."""
    options = {"device": "cuda", "kernels": "cuda", "workers": "3", "resume": True, "rounds": 9}
    path = save_checkpoint(tmp_path / "best.pt", **options, data_root="/a", cache="/b", out="/c")
    _, config, about = open_checkpoint(path, {})
    assert config == fedgs.Config(**TINY)
    for name in ("data_root", "cache", "out"):
        assert about["config"][name] == ""


def test_what_it_is_used_on_may_be_chosen(checkpoint):
    given = {"data_root": "stand-in", "centres": ["C1", "C2"], "out_centre": "C2", "width": 2}
    _, config, _ = open_checkpoint(checkpoint, given)
    places = {"centres": ("C1", "C2"), "out_centre": "C2", "data_root": "stand-in"}
    assert config == replace(fedgs.Config(**TINY), **places)


@pytest.mark.parametrize(
    ("name", "value", "was"),
    [
        ("width", 4, "2"),
        ("model", "sd-utnet", "utnet"),
        ("fold", 2, "1"),
        ("image_size", 64, "32"),
        ("dataset", "lits", "polypgen"),
        ("tau", 1000.0, "150.0"),
        ("split", "centre", "fold"),
    ],
)
def test_options_that_contradict_it(checkpoint, name, value, was):
    option = name.replace("_", "-")
    words = f"--{option} {value}: {checkpoint} was trained with {was}"
    with pytest.raises(UserError, match=words):
        open_checkpoint(checkpoint, {name: value})


def test_centres_that_do_not_exist(checkpoint):
    with pytest.raises(UserError, match="--centres C1 C9"):
        open_checkpoint(checkpoint, {"centres": ["C1", "C9"]})


def test_the_arithmetic_is_that_of_a_run(checkpoint, monkeypatch):
    """On a GPU TF32 would make other numbers of the same network."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    open_checkpoint(checkpoint, {})
    assert not torch.backends.cudnn.allow_tf32


# ------------------------------------------------------------------------------------- damaged ones


@pytest.mark.parametrize("main", [predict.main, evaluate.main])
def test_a_flipped_bit_is_noticed(checkpoint, tmp_path, capsys, main):
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 4
    checkpoint.write_bytes(content)
    options = {
        predict.main: ["--checkpoint", checkpoint, "--out", tmp_path / "masks", tmp_path],
        evaluate.main: [checkpoint],
    }
    refused(capsys, exit_code(main, options[main]), f"{checkpoint} is damaged", "checksum")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", "wide"),
        ("width", [2]),
        ("width", True),
        ("model", "vit"),
        ("dataset", 7),
        ("images", "x-rays"),
        ("centres", [["C4"], "C6"]),
        ("centres", [4, 6]),
        ("centres", "C4"),
        ("fold", 9),
        ("tau", None),
    ],
)
@pytest.mark.slow
def test_a_damaged_configuration(checkpoint, name, value):
    state = torch.load(checkpoint, weights_only=True)
    state._metadata["fedgs"]["config"][name] = value
    torch.save(state, checkpoint)
    with pytest.raises(UserError, match=rf"best.pt: its configuration is damaged \({name} is "):
        open_checkpoint(checkpoint, {})


def test_values_that_no_run_can_have(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    state._metadata["fedgs"]["config"]["image_size"] = 33
    torch.save(state, checkpoint)
    with pytest.raises(UserError, match="--image-size 33: must be a multiple of 16"):
        open_checkpoint(checkpoint, {})


def test_options_that_it_does_not_know_of(checkpoint):
    """Of another version: what is missing is at its default, and what is new there is left out."""
    state = torch.load(checkpoint, weights_only=True)
    config = state._metadata["fedgs"]["config"]
    for name in ("centres", "tau", "split"):
        del config[name]
    config["attention"] = "linear"
    torch.save(state, checkpoint)
    _, config, _ = open_checkpoint(checkpoint, {})
    assert config == fedgs.Config(image_size=32, width=2)


def test_an_older_checkpoint_of_volumes(tmp_path):
    """Once the data set's name said all of what its images are."""
    path = save_checkpoint(tmp_path / "ct.pt", "LiTS", **LITS)
    state = torch.load(path, weights_only=True)
    for name in ("images", "window", "lesion"):
        del state._metadata["fedgs"]["config"][name]
    torch.save(state, path)
    _, config, _ = open_checkpoint(path, {})
    assert (config.images, config.window) == ("slices", (-200.0, 200.0))


def test_weights_that_do_not_fit_their_configuration(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    state._metadata["fedgs"]["config"]["width"] = 4
    torch.save(state, checkpoint)
    with pytest.raises(UserError, match=r"best.pt does not fit this network"):
        open_checkpoint(checkpoint, {})


# --------------------------------------------------------------------------------- bare state dicts


def test_of_a_bare_state_dict_options_say_what_it_is(tmp_path):
    path = tmp_path / "published.pt"
    torch.save(SDUTNet(1, width=2, size=32).state_dict(), path)
    given = {"width": 2, "image_size": 32, "model": "sd-utnet", "dataset": "lits"}
    network, config, about = open_checkpoint(path, given)
    assert isinstance(network, SDUTNet)
    assert about == {}

    # What is not said is the paper's, for this data set.
    assert (config.tau, config.split, config.centres[-1]) == (1000.0, "centre", "C5")
    assert (config.images, config.window) == ("slices", (-200.0, 200.0))
    assert (config.preset, config.method) == ("paper", "unknown")  # nobody wrote down the method


def test_a_bare_state_dict_is_the_papers_by_default(tmp_path):
    path = tmp_path / "published.pt"
    torch.save(dict(UTNet(width=2).state_dict()), path)
    _, config, _ = open_checkpoint(path, {"width": 2})
    assert config.dataset == "polypgen"
    assert (config.model, config.image_size, config.tau) == ("utnet", 512, 150.0)
    with pytest.raises(UserError, match=r"published.pt does not fit this network"):
        open_checkpoint(path, {"width": 4})


def test_where_a_network_comes_from():
    assert describe_origin({"data": "LiTS", "config": {}}) == "trained on LiTS"
    assert describe_origin({}) == "trained elsewhere"


def test_a_line_for_people(tmp_path, capsys):
    """As every program says it."""
    arguments = ["a.png", "--checkpoint", tmp_path / "none.pt", "--out", tmp_path / "out"]
    refused(capsys, exit_code(predict.main, arguments), "tools.predict", "none.pt is missing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("width", x) for x in (0, 3, 10**6, 2**63, True, None)],
        *[("image_size", x) for x in (17, 10**6, 16 * 10**8)],
        ("tau", float("nan")),
        ("window", (2.0, 1.0)),
        ("seed", -1),
        ("centres", ()),
        ("centres", ("a\nb",)),
        ("dataset", "/etc/passwd"),
        ("dataset", "x\ny"),
    ],
)
def test_options_in_a_file_that_no_run_can_have(checkpoint, name, value):
    """They are nobody's who types: the file is named."""
    weights, about = checkpoints.read_weights(checkpoint)
    about["config"][name] = value
    checkpoints.save(checkpoint, weights)
    with pytest.raises(UserError, match=r"best\.pt"):
        open_checkpoint(checkpoint, {})
