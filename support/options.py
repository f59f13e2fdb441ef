"""Options: fields of a dataclass that are also arguments of a command, and their checks.

A field says everything about its option: default, help, choices, and in `metadata`

    free   it may change when a run goes on, since it decides where and how long a run computes
    place  it may also change when a trained network is tested: which images, in which arithmetic
    path   it is a path of this machine, and stays out of checkpoints
    item   what each of its values is, where it is several of other things than text
"""

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, NoReturn

from support.errors import UserError

# Help texts that take more than a line, and long lists of choices.
DATASET_HELP = (
    "data set: polypgen, lits, or a manifest of your own, a .csv file or a folder with a "
    "manifest.csv"
)
IMAGES_HELP = "colour, grey, or slices of volumes; default for your own images: as their files are"
LESION_HELP = "which values of a mask are lesion; default: as the masks of a centre tell"
WINDOW_HELP = (
    "the two values that become black and white, of volumes and of images with more than 8 bits; "
    "default: percentiles of each"
)
OUT_CENTRE_HELP = 'the one of them that is held out for testing; "" for none'
PRESET_HELP = "values for other options; auto: paper with real data and a GPU, else quick"
METHODS = ("fedgs", "fedavg", "fedprox", "fedbn")
METHOD_HELP = (
    "fedgs, or a baseline: fedavg; fedprox; fedbn, whose clients keep batch norm for themselves, "
    "and with --scaling on are FedGS's in all else"
)
SCALING_HELP = (
    "clients report the sum of their steps, those on small lesions scaled up; auto: on for fedgs "
    "alone. fedgs with off sums them as they are, which the paper's tables call FedAvg"
)
BATCH_NORM_HELP = (
    "means and variances in validation: averaged by the server, as in the paper, or each centre's "
    "own; the final test shows both"
)
SPLITS = ("fold", "centre", "grouped", "given")
SPLIT_HELP = (
    "each client's train, validation and test images: five folds (the published ones for "
    "PolypGen, of volumes for LiTS), the published per-centre split, folds that keep "
    "near-duplicate frames together, or (given) as a manifest's column says"
)
PRECISIONS = ("auto", "fp32", "bf16")
PRECISION_HELP = (
    "of forward and backward in training, the rest is float32; auto: fp32 on a CPU, bf16 on a GPU "
    "that computes in it"
)
KERNELS = ("auto", "cuda", "cpp", "torch")
KERNELS_HELP = (
    "what computes difficulty, step and aggregation: compiled code for the device, or the PyTorch "
    "lines that define them; auto: compiled code if it is here"
)
WORKERS_HELP = (
    "processes of this machine that share the clients; auto: on a CPU one for each core, on a GPU "
    "one for all"
)
DATA_ROOT_HELP = (
    "folder of the data set, or stand-in for drawn images; default: datasets/<dataset> if it is "
    "there, else the stand-in"
)
OUT_HELP = "folder of the run; default: runs/<dataset>-<method>-<model>-<fold>-s<seed>"

MOST = 1_000_000  # of rounds, epochs, images in a batch, and channels
LONGEST_LABEL = 60
LARGEST_IMAGE = 8192  # side of what a network sees: more is a slip, and would fill any memory
LARGEST_VALUE = 1e30  # beyond, differences are no numbers in float32

MOVED = {  # an option that was here once -> what to type now
    "--predict": "python -m tools.predict --checkpoint FILE --out FOLDER PATH…",
    "--evaluate": "python -m tools.evaluate CHECKPOINT",
    "--checkpoint": "python -m tools.evaluate CHECKPOINT, or python -m tools.predict --help",
    "--nsd-tolerance": "python -m tools.evaluate CHECKPOINT --surfaces MM",
    "--methods": "python -m tools.experiment --methods …",
    "--folds": "python -m tools.experiment --folds …",
    "--seeds": "python -m tools.experiment --seeds …",
}


def option(default: object, help: str, **metadata: object) -> Any:
    """A field of a configuration that is also an option of the command line."""
    return field(default=default, metadata={"help": help, **metadata})


def flagged(config: object, flag: str) -> set[str]:
    """Names of a configuration's fields with this flag in their metadata."""
    return {f.name for f in fields(config) if f.metadata.get(flag)}


def spelling(name: str) -> str:
    """A field's name as its option is typed."""
    return "--" + name.replace("_", "-")


def shown(value: object) -> str:
    """An option's value as it is typed."""
    if isinstance(value, list | tuple):
        return shlex.join(str(item) for item in value)
    return str(value)


# ------------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """An error on the command line is like every other one: a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def new_parser(description: str, prog: str | None = None) -> Parser:
    """A parser that returns only what was given, and takes no abbreviations."""
    return Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )


def add_options(
    parser: argparse.ArgumentParser,
    config: type,
    names: Collection[str] = (),
    other_defaults: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Add an option for each field of a configuration, or for those of these names.

    other_defaults: {"lits": {field: value}, …} are shown beside the defaults.
    """
    for f in fields(config):
        if not names or f.name in names:
            parser.add_argument(spelling(f.name), **argument(f, other_defaults or {}))


def argument(f: Field, other_defaults: Mapping[str, Mapping[str, object]]) -> dict:
    """What argparse has to know of a field."""
    help_text = f.metadata["help"]
    if isinstance(f.default, bool):
        return {"action": "store_true", "help": help_text}

    defaults = [shown(f.default)] if shown(f.default) else []
    for name, values in other_defaults.items():
        if f.name in values:
            defaults.append(f"{name} {shown(values[f.name])}")
    if defaults:
        help_text += f" ({', '.join(defaults)})"

    how = {"help": help_text, "choices": f.metadata.get("choices")}
    if isinstance(f.default, tuple):
        return {**how, "nargs": "+", "type": f.metadata.get("item", str)}
    return {**how, "type": type(f.default)}


def parse(
    config: type,
    description: str,
    arguments: list[str] | None,
    other_defaults: Mapping[str, Mapping[str, object]],
) -> dict[str, Any]:
    """The command line of a training run. -> {field: value} of the options that were given

    Raises UserError for what is no option, and says of a moved one what to type now.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    refuse_moved(arguments)

    parser = new_parser(description)
    add_options(parser, config, other_defaults=other_defaults)
    return vars(parser.parse_args(arguments))


def refuse_moved(arguments: list[str]) -> None:
    """Raise UserError for an option that is another command's now."""
    for given in arguments:
        name = given.partition("=")[0]
        if name in MOVED:
            raise UserError(f"{name} has moved: {MOVED[name]}")

    for name in ("--method", "--fold", "--seed"):
        if name not in arguments:
            continue
        following = arguments[arguments.index(name) + 2 :]
        if following and not following[0].startswith("--"):
            raise UserError(f"{name} takes one value here; several: {MOVED[name + 's']}")


def with_tuples(config: type, values: Mapping[str, object]) -> dict[str, object]:
    """{field: value} in which lists, as command lines and files have them, are tuples."""
    changed = dict(values)
    for f in fields(config):
        if isinstance(f.default, tuple) and f.name in changed:
            changed[f.name] = tuple(changed[f.name])
    return changed


# ------------------------------------------------------------------------------------------ checks


def check(config: Any, known_centres: Collection[str]) -> None:
    """Raise UserError, naming the option, for values that no run can use."""

    def require(condition: bool, name: str, rule: str) -> None:
        if not condition:
            raise UserError(f"{spelling(name)} {shown(getattr(config, name))}: {rule}")

    for name in ("rounds", "local_epochs", "batch_size", "width"):
        require(getattr(config, name) >= 1, name, "must be at least 1")
        require(getattr(config, name) <= MOST, name, f"must be at most {MOST}")
    for name in ("lr", "server_lr", "tau"):
        require(0 < getattr(config, name) <= 1e6, name, "must be above 0, and at most 1e6")
    require(0 <= config.mu <= 1e6, "mu", "must be from 0 to 1e6")
    require(1 < config.log_base < math.inf, "log_base", "must be a number above 1")
    require(0 <= config.server_momentum < 1, "server_momentum", "must be in [0, 1)")
    require(0 <= config.seed < 2**63, "seed", "must be in [0, 2^63)")
    require(config.fold in range(1, 6), "fold", "must be 1, 2, 3, 4 or 5")

    # The networks halve their input four times, and batch norm needs more than one value.
    size = config.image_size
    multiple = 16 <= size <= LARGEST_IMAGE and size % 16 == 0
    require(multiple, "image_size", f"must be a multiple of 16, at most {LARGEST_IMAGE}")
    enough = config.batch_size > 1 or size > 16
    require(enough, "batch_size", "too small for batch norm at image size 16")
    if config.model == "sd-utnet":
        require(config.batch_size > 1, "batch_size", "sd-utnet needs two images or more")
        require(config.width > 1, "width", "sd-utnet needs 2 or more")

    workers = config.workers
    count = workers.isascii() and workers.isdigit() and int(workers) >= 1
    require(workers == "auto" or count, "workers", "must be auto, or a number of processes")

    label = config.label
    plain = label.isprintable() and len(label) <= LONGEST_LABEL and not set(label) & set("/\\")
    require(plain, "label", f"is part of a folder's name: no slashes, at most {LONGEST_LABEL} long")

    centres = config.centres
    known = shown(tuple(known_centres))
    require(set(centres) <= set(known_centres), "centres", f"must be among {known}")
    require(len(set(centres)) == len(centres), "centres", "names a centre twice")
    require(config.out_centre in (*centres, ""), "out_centre", "must be among --centres")
    require(len(config.clients) > 0, "centres", "leaves no client beside the held-out centre")

    if config.split in ("centre", "given"):
        no_folds = f"--split {config.split} has no folds, choose --split fold"
        require(config.fold == 1, "fold", no_folds)
    check_images(config, require)


def check_images(config: Any, require: Callable[[bool, str, str], None]) -> None:
    """The part of `check` that is about what the images are, and how they are read."""
    slices = config.images == "slices"
    if config.dataset == "lits":
        require(slices, "images", "LiTS is read as slices")
        by_volume = "LiTS is split by volume anyway: fold or centre"
        require(config.split != "grouped", "split", by_volume)
    if config.dataset == "polypgen":
        require(not slices, "images", "PolypGen's are colour or grey")
    if config.dataset in ("polypgen", "lits"):
        require(not config.lesion, "lesion", "is for masks of your own")
        require(config.split != "given", "split", "is for a manifest with a column split")

    require(all(value > 0 for value in config.lesion), "lesion", "must be whole numbers above 0")
    window = config.window
    if window:
        require(config.images != "colour", "window", "is for volumes and grey images")
        rising = len(window) == 2 and -LARGEST_VALUE < window[0] < window[1] < LARGEST_VALUE
        rising = rising and window[1] - window[0] > 1 / LARGEST_VALUE
        require(rising, "window", "must be two numbers, the lower one first")


def check_sizes(config: Any, facts: Mapping[str, Any]) -> None:
    """Raise UserError where a client has too few images, or there are none to validate on.

    facts: {centre: data.Facts}
    """
    for client in config.clients:
        images = facts[client].train
        if images < config.batch_size:
            size = f"--batch-size {config.batch_size}"
            raise UserError(f"centre {client} has {images} training images, less than {size}")

    if not any(facts[client].validation for client in config.clients):
        raise UserError(
            f"--split {config.split} leaves no validation images: the centres have too few images, "
            "or too few groups of them"
        )
    if not any(of_centre.test for of_centre in facts.values()):
        raise UserError(f"--split {config.split} leaves no test images")


def plausible(f: Field, value: object) -> bool:
    """Whether a field may have this value, as far as its type and its choices say."""
    if f.default is MISSING:
        return True
    if isinstance(f.default, tuple):
        item = f.metadata.get("item", str)
        return isinstance(value, list | tuple) and all(isinstance(one, item) for one in value)
    if isinstance(f.default, float):
        return type(value) in (int, float)
    choices = f.metadata.get("choices")
    return type(value) is type(f.default) and (choices is None or value in choices)
