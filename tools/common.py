"""What the programs share: opening a trained network."""

import functools
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch.nn as nn

import data
from fedgs import DATASETS, Config, build_network, configure
from support import checkpoints, hardware, manifest, options
from support.errors import UserError

# What a bare state dict lacks.
DESCRIBES = ("dataset", "images", "window", "model", "width", "image_size", "device")


def open_checkpoint(path: Path, given: Mapping[str, Any]) -> tuple[nn.Module, Config, dict]:
    """A trained network, on its device. -> network, its Config, what its file says of it

    given: options by name. A checkpoint of this project says, among other things, on what "data" it
    was trained and after which "round" it was saved, and brings its configuration with it. A bare
    state dict, as published ones are, says nothing, {}: options tell what it is, and are the
    paper's where they do not. Raises UserError for a file that is no checkpoint, options that
    contradict it, and weights that do not fit.
    """
    # The sums of a test are then those of the test at the end of a run.
    hardware.prepare_torch()
    given = manifest.locate(given)

    weights, about = checkpoints.read_weights(path)
    if about:
        config = trained_config(path, about["config"], given)
    else:
        config, _ = configure({"preset": "paper", "method": "unknown", **given})

    # Of one's own data, which need not be here, the checkpoint knows the centres.
    try:
        options.check(config, data.CENTRES.get(config.dataset, config.centres))
    except UserError as error:
        # The option that is named may be one that nobody has typed, but the file holds.
        raise UserError(f"{path}: {error}") if about else error from error
    network = checkpoints.build(functools.partial(build_network, config), weights, path)
    return network.to(hardware.choose_device(config.device)), config, about


def trained_config(path: Path, trained: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """The configuration in a checkpoint, with options that say where and on what it is used."""
    free = options.flagged(Config, "free")
    adjustable = free | options.flagged(Config, "place")

    known = {}
    for f in fields(Config):
        if f.name in free or f.name not in trained:
            continue
        value = trained[f.name]
        if not options.plausible(f, value):
            raise UserError(f"{path}: its configuration is damaged ({f.name} is {value!r})")
        known[f.name] = value

    for name, value in given.items():
        was = options.shown(known.get(name, "another"))
        if name not in adjustable and options.shown(value) != was:
            option = f"{options.spelling(name)} {options.shown(value)}"
            raise UserError(f"{option}: {path} was trained with {was}")

    # An option that it does not know of yet has the value that its data set gives.
    defaults = DATASETS.get(known.get("dataset"), {})
    config = Config(**options.with_tuples(Config, {**defaults, **known, **given}))
    for name in (config.dataset, *config.centres):
        if not manifest.NAME.fullmatch(name):
            raise UserError(f"{path}: its configuration is damaged ({name!r} is no name)")
    return config


def describe_origin(about: Mapping[str, Any]) -> str:
    """What a checkpoint was trained on, for people. about: as from open_checkpoint"""
    return f"trained on {about['data']}" if about else "trained elsewhere"
