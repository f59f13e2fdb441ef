"""Options: the command line of a run, what has moved, and what no run can use."""

from dataclasses import asdict, fields, replace

import pytest

import data
from fedgs import DATASETS, METHODS, PRESETS, SHOWN_DEFAULTS, Config
from support import options
from support.errors import UserError

OTHERS = {"lits": DATASETS["lits"], "quick": PRESETS["quick"]}


def parse(*arguments):
    return options.parse(Config, "", list(arguments), OTHERS)


# ------------------------------------------------------------------------------------ command line


def test_only_what_was_given():
    assert parse() == {}
    given = parse("--method", "fedavg", "--centres", "C1", "C6", "--lr", "0.5", "--resume")
    assert given == {"method": "fedavg", "centres": ["C1", "C6"], "lr": 0.5, "resume": True}


def test_every_field_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for f in fields(Config):
        assert options.spelling(f.name) in text
    assert "(100, lits 60, quick 7)" in text  # rounds, with the defaults of others


def test_the_defaults():
    """Those of the paper, for PolypGen."""
    assert asdict(Config()) == {
        **{"dataset": "polypgen", "method": "fedgs", "scaling": "auto", "model": "utnet"},
        **{"preset": "auto", "rounds": 100, "local_epochs": 5, "batch_size": 4, "lr": 1e-4},
        **{"image_size": 512, "width": 32, "mu": 0.01, "images": "colour", "lesion": ()},
        **{"window": (), "server_lr": 1.0, "server_momentum": 0.0, "log_base": 100.0},
        **{"tau": 150.0, "split": "fold", "fold": 1, "out_centre": "C6", "seed": 0},
        **{"centres": ("C1", "C2", "C3", "C4", "C5", "C6"), "batch_norm": "averaged"},
        **{"device": "auto", "precision": "auto", "kernels": "auto", "workers": "auto"},
        **{"data_root": "", "cache": "", "out": "", "label": "", "resume": False},
    }


def test_what_differs_from_the_defaults():
    lits = {
        **{"images": "slices", "window": (-200.0, 200.0), "rounds": 60, "log_base": 1000.0},
        **{"tau": 1000.0, "centres": data.CENTRES["lits"], "out_centre": "C5", "split": "centre"},
    }
    quick = {"rounds": 7, "local_epochs": 1, "lr": 1e-3, "image_size": 80, "width": 8}
    assert list(DATASETS.values()) == [{}, lits]
    assert list(PRESETS.values()) == [{}, quick]
    assert list(SHOWN_DEFAULTS.values()) == [lits, quick]
    assert METHODS == {"fedbn": {"batch_norm": "local"}}


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("--method", ["fedgs", "fedavg", "fedprox", "fedbn"]),
        ("--scaling", ["auto", "on", "off"]),
        ("--model", ["utnet", "sd-utnet"]),
        ("--preset", ["auto", "paper", "quick"]),
        ("--images", ["colour", "grey", "slices"]),
        ("--split", ["fold", "centre", "grouped", "given"]),
        ("--fold", [1, 2, 3, 4, 5]),
        ("--batch-norm", ["averaged", "local"]),
        ("--device", ["auto", "cpu", "cuda"]),
        ("--precision", ["auto", "fp32", "bf16"]),
        ("--kernels", ["auto", "torch", "cpp", "cuda"]),
    ],
)
def test_what_can_be_chosen(name, choices):
    key = name.removeprefix("--").replace("-", "_")
    for choice in choices:
        assert parse(name, str(choice)) == {key: choice}
    with pytest.raises(UserError, match=name):
        parse(name, "x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "fedsgd"], ["--method", "fedsgd", "fedavg"]),
        (["--no-such-option", "1"], ["--no-such-option", "--help"]),
        (["--round", "1"], ["--round"]),  # no abbreviations
        (["--rounds", "many"], ["--rounds", "many"]),
        (["--fold", "6"], ["--fold", "6"]),
        (["--predict", "a.png"], ["--predict has moved", "python -m tools.predict"]),
        (["--evaluate"], ["python -m tools.evaluate"]),
        (["--nsd-tolerance=2"], ["python -m tools.evaluate", "--surfaces"]),
        (["--checkpoint", "x.pt"], ["python -m tools.evaluate"]),
        (["--folds", "1", "2"], ["python -m tools.experiment --folds"]),
        (["--seed", "0", "1"], ["--seed takes one value here", "--seeds"]),
        (["--lr", "1", "--fold", "1", "2"], ["--fold takes one value here", "--folds"]),
    ],
)
def test_what_is_no_option_of_a_run(arguments, words):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    for word in words:
        assert word in str(caught.value)


def test_flags():
    free = options.flagged(Config, "free")
    assert free == {
        *("preset", "rounds", "device", "kernels", "workers"),
        *("data_root", "cache", "out", "label", "resume"),
    }
    assert options.flagged(Config, "path") == {"data_root", "cache", "out"}
    assert options.flagged(Config, "place") == {
        *("centres", "out_centre", "lesion"),
        *("batch_norm", "precision"),
    }


# ------------------------------------------------------------------------------------------ checks


def test_the_papers_configurations_pass():
    for dataset, values in DATASETS.items():
        for preset in PRESETS.values():
            for model in ("utnet", "sd-utnet"):
                config = Config(**{**values, **preset, "dataset": dataset, "model": model})
                options.check(config, data.CENTRES[dataset])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 0}, "--rounds 0: must be at least 1"),
        ({"local_epochs": -1}, "--local-epochs -1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"width": 0}, "--width 0"),
        ({"image_size": 100}, "--image-size 100: must be a multiple of 16"),
        ({"image_size": 0}, "--image-size 0"),
        ({"batch_size": 1, "image_size": 16}, "--batch-size 1: too small for batch norm"),
        ({"lr": -1.0}, "--lr -1"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"server_lr": 0.0}, "--server-lr 0"),
        ({"server_lr": float("inf")}, "--server-lr inf"),
        ({"tau": 0.0}, "--tau 0"),
        ({"log_base": 1.0}, "--log-base 1"),
        ({"server_momentum": 1.0}, "--server-momentum 1"),
        ({"seed": -1}, "--seed -1"),
        ({"fold": 0}, "--fold 0"),
        ({"centres": ("C1", "C9")}, "--centres C1 C9: must be among C1 C2"),
        ({"centres": ("C1", "C1", "C6")}, "--centres C1 C1 C6: names a centre twice"),
        ({"centres": ("C6",)}, "--centres C6: leaves no client"),
        ({"out_centre": "C7"}, "--out-centre C7: must be among --centres"),
        ({"images": "slices"}, "--images slices: PolypGen's are colour or grey"),
        ({"lesion": (1,)}, "--lesion 1: is for masks of your own"),
        ({"split": "given"}, "--split given: is for a manifest"),
        ({"window": (0.0, 9.0)}, "--window 0.0 9.0: is for volumes and grey images"),
        ({"images": "grey", "window": (9.0, 0.0)}, "--window 9.0 0.0: must be two numbers"),
        ({"images": "grey", "window": (9.0,)}, "--window 9.0: must be two numbers"),
        ({"model": "sd-utnet", "batch_size": 1}, "sd-utnet needs two images"),
        ({"model": "sd-utnet", "width": 1}, "sd-utnet needs 2 or more"),
        ({"split": "centre", "fold": 2}, "--fold 2: --split centre has no folds"),
        ({"workers": "many"}, "--workers many: must be auto, or a number"),
        ({"workers": "0"}, "--workers 0"),
        ({"workers": "-1"}, "--workers -1"),
    ],
)
def test_values_that_no_run_can_use(changes, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        options.check(replace(Config(), **changes), data.CENTRES["polypgen"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "grouped"}, "--split grouped: LiTS is split by volume anyway"),
        ({"images": "grey"}, "--images grey: LiTS is read as slices"),
        ({"lesion": (1, 2)}, "--lesion 1 2: is for masks of your own"),
    ],
)
def test_what_lits_does_not_have(changes, words):
    lits = Config(**{**DATASETS["lits"], "dataset": "lits", **changes})
    with pytest.raises(UserError, match=words):
        options.check(lits, data.CENTRES["lits"])


def test_own_data_may_do_without_a_held_out_centre():
    own = {"dataset": "my", "centres": ("St. Olav", "Berlin"), "out_centre": ""}
    config = Config(**own, images="grey", lesion=(1, 2), split="given", window=(0.0, 9.0))
    options.check(config, config.centres)
    assert config.clients == ["St. Olav", "Berlin"]
    with pytest.raises(UserError, match="--lesion 0 1: must be whole numbers above 0"):
        options.check(replace(config, lesion=(0, 1)), config.centres)
    with pytest.raises(UserError, match="--fold 2: --split given has no folds"):
        options.check(replace(config, fold=2), config.centres)
    with pytest.raises(UserError, match=r"--centres Oslo: must be among 'St\. Olav' Berlin"):
        options.check(replace(config, centres=("Oslo",)), own["centres"])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("width", 4, True),
        ("width", 4.0, False),
        ("width", True, False),
        ("lr", 1, True),
        ("lr", "1", False),
        ("method", "fedavg", True),
        ("method", "fedsgd", False),
        ("centres", ["C1", "C2"], True),
        ("centres", [1, 2], False),
        ("centres", "C1", False),
        ("lesion", [1, 2], True),
        ("lesion", ["1"], False),
        ("window", [-200.0, 200.0], True),
        ("resume", False, True),
        ("resume", 0, False),
    ],
)
def test_plausible_values(name, value, expected):
    [f] = [f for f in fields(Config) if f.name == name]
    assert options.plausible(f, value) is expected


def facts(train, validation):
    """What clients of these numbers of images have."""
    numbers = zip(train, validation, strict=True)
    return {f"C{k}": data.Facts(n, m, 1, 0, 0, "") for k, (n, m) in enumerate(numbers, start=1)}


def test_sizes_that_are_enough():
    """A batch fills a client; one client alone may have what all are validated on."""
    config = Config(batch_size=4, centres=("C1", "C2", "C6"))
    options.check_sizes(config, facts([4, 9], [0, 1]))


@pytest.mark.parametrize(
    ("train", "validation", "words"),
    [
        ([9, 3], [1, 1], "centre C2 has 3 training images, less than --batch-size 4"),
        ([9, 9], [0, 0], "--split fold leaves no validation images"),
    ],
)
def test_sizes_that_are_not(train, validation, words):
    config = Config(batch_size=4, centres=("C1", "C2", "C6"))
    with pytest.raises(UserError, match=words):
        options.check_sizes(config, facts(train, validation))


def test_somebody_has_to_have_test_images():
    config = Config(batch_size=4, centres=("C1",), out_centre="", split="given")
    untested = {"C1": data.Facts(9, 1, 0, 0, 0, "")}
    with pytest.raises(UserError, match="--split given leaves no test images"):
        options.check_sizes(config, untested)


@pytest.mark.parametrize(
    ("name", "values", "fine"),
    [
        ("label", ("a/b", "a\\b", "a\nb", "a\0b", "\x1b[31m", "x" * 61), ("", "x" * 60, "a b, é")),
        ("image_size", (8208, 16 * 10**8), (8192,)),
        ("rounds", (1_000_001, 10**20), (1_000_000,)),
        ("width", (10**9,), ()),
        ("mu", (1.1e6, 1e308), (1e6,)),
    ],
)
def test_values_of_which_more_is_a_slip(name, values, fine):
    for value in fine:
        options.check(replace(Config(), **{name: value}), Config().centres)
    for value in values:
        with pytest.raises(UserError, match=f"^{options.spelling(name)} "):
            options.check(replace(Config(), **{name: value}), Config().centres)


@pytest.mark.parametrize("window", [(-2e30, 0.0), (0.0, 2e30), (0.0, 1e-31)])
def test_windows_beyond_what_float32_tells_apart(window):
    with pytest.raises(UserError, match=r"^--window .* two numbers"):
        options.check(replace(Config(), images="grey", window=window), Config().centres)
