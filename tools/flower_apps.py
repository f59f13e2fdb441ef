"""What Flower starts: the coordinator's side of a run, and the hospital's.

    flwr run flower CONNECTION --stream --run-config "options='--dataset polypgen --rounds 100'"

flower/pyproject.toml names the two apps below. docs/hospitals.md has all commands in order.
"""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

import data
import fedgs
from support import flower, manifest, options
from support.errors import UserError

# flower/pyproject.toml finds them under these names.
server = ServerApp()
client = ClientApp()


@server.main()
def coordinate(grid: Grid, context: Context) -> None:
    """A whole run: the round loop with the hospitals as its clients."""
    # Whatever is refused ends the run with its sentence, which Flower shows whoever started it.
    config, policy = configure(str(context.run_config.get("options", "")))
    fedgs.run(config, "for hospitals", flower.hospitals(grid, policy, fedgs))


def configure(text: str) -> tuple[fedgs.Config, flower.Policy]:
    """Options as one would type them after fedgs.py, and those of the policy.

    Raises UserError.
    """
    # As a shell would take them apart.
    arguments = shlex.split(text)
    parser = options.new_parser(__doc__)
    options.add_options(parser, fedgs.Config)
    options.add_options(parser, flower.Policy, POLICY)
    given = vars(parser.parse_args(arguments))

    # The policy is this process's alone. The rest is what a run in one process has, too.
    of_policy = {}
    for name in POLICY:
        if name in given:
            of_policy[name] = given.pop(name)
    policy = flower.Policy(**of_policy)
    flower.check_policy(policy)

    # No image is here, by which a preset could be chosen.
    given = {"preset": "paper", **given}
    if given.get("dataset", "polypgen") not in data.CENTRES:
        return own_images(given), policy
    config, _ = fedgs.configure(given)
    return config, policy


def own_images(given: Mapping[str, Any]) -> fedgs.Config:
    """The configuration of a run on the hospitals' own images.

    In one process a manifest tells what they are. Here each hospital has one, of its own centre,
    and nobody has all. Raises UserError where it is not said instead.
    """
    for name in ("centres", "images"):
        if name not in given:
            raise UserError(
                f"--dataset {given['dataset']}: its manifests are at the hospitals, so name the "
                "centres with --centres, and say with --images whether they have colour or grey "
                "images, or slices"
            )

    # The preset overrides what slices have, and what was typed overrides both: as in
    # fedgs.configure.
    name = manifest.name_of(Path(given["dataset"]))
    preset = fedgs.PRESETS.get(given["preset"], {})
    values = {
        "out_centre": "",
        **manifest.measured_as(given["images"]),
        **preset,
        **given,
        "dataset": name,
    }
    return fedgs.Config(**options.with_tuples(fedgs.Config, values))


# What can be typed, other than how often the coordinator looks for answers.
POLICY = [f.name for f in fields(flower.Policy) if "help" in f.metadata]


def work(message: Message, context: Context) -> Message:
    """One request, at a hospital."""
    return flower.work(message, context, fedgs)


def register(app: Any) -> None:
    """One function does whatever is asked for: the message says what that is."""
    # Flower knows three kinds of messages, and actions of each: "train.on" is an action of train.
    for name in flower.MESSAGES:
        category, _, action = name.partition(".")
        getattr(app, category)(action or "default")(work)


register(client)
