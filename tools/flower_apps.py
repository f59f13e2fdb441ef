"""What Flower starts: the coordinator's side of a run, and the hospital's.

    flwr run flower CONNECTION --stream --run-config "options='--dataset polypgen --rounds 100'"

flower/pyproject.toml names the two apps below. docs/hospitals.md has all commands in order.
"""

import shlex
from dataclasses import fields
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

import fedgs
from support import flower, options

server = ServerApp()
client = ClientApp()


@server.main()
def coordinate(grid: Grid, context: Context) -> None:
    """A whole run: the round loop with the hospitals as its clients."""
    config, policy = configure(str(context.run_config.get("options", "")))
    fedgs.run(config, "for hospitals", flower.hospitals(grid, policy, fedgs))


def configure(text: str) -> tuple[fedgs.Config, flower.Policy]:
    """Options as one would type them after fedgs.py, and those of the policy.

    Raises UserError.
    """
    arguments = shlex.split(text)
    parser = options.new_parser(__doc__)
    options.add_options(parser, fedgs.Config)
    options.add_options(parser, flower.Policy, POLICY)
    given = vars(parser.parse_args(arguments))

    own = {name: given.pop(name) for name in POLICY if name in given}
    policy = flower.Policy(**own)
    flower.check_policy(policy)

    # No image is here, by which a preset could be chosen.
    config, _ = fedgs.configure({"preset": "paper", **given})
    return config, policy


POLICY = [f.name for f in fields(flower.Policy) if "help" in f.metadata]


def work(message: Message, context: Context) -> Message:
    """One request, at a hospital."""
    return flower.work(message, context, fedgs)


def register(app: Any) -> None:
    """One function does whatever is asked for: the message says what that is."""
    for name in flower.MESSAGES:
        category, _, action = name.partition(".")
        getattr(app, category)(action or "default")(work)


register(client)
