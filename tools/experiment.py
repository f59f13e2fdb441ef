"""Methods x folds x seeds: one run after another, and their comparison.

    python -m tools.experiment --methods fedavg fedprox fedbn fedgs
    python -m tools.experiment --methods unscaled fedgs --control --folds 1 2 3 --data-root DATA
    python -m tools.experiment … --resume

Takes every option of a training run (python fedgs.py --help). Each run has a folder of its own
below --out. What is complete is skipped, what was interrupted goes on with --resume, and a run
that is refused does not keep the others from running. Methods are compared over three seeds, since
a difference between two runs is often that of their seeds.

--control adds the run that an honest comparison needs: FedGS lengthens the server's steps, too, so
FedAvg is also trained with the server learning rate that equals the mean eta which the FedGS run
of the same fold and seed measured. Two methods are combinations of options: "unscaled", FedGS whose
steps all count the same, is what the paper's tables call FedAvg; "fedbn+fedgs" is FedGS whose
clients keep batch norm for themselves.
"""

import argparse
import itertools
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedgs import SHOWN_DEFAULTS, Config, configure, run, settle
from support import options, processes, runs
from support.errors import UserError, end_on_signals, readable_errors
from support.files import read_csv
from tools import compare

AXES = ("method", "fold", "seed")  # options of a run of which this program takes several
SEEDS = [0, 1, 2]  # as many pairs of runs as a comparison needs at the least
COMBINED = {  # what is called a method here -> options of its runs
    "unscaled": {"method": "fedgs", "scaling": "off", "label": "unscaled"},
    "fedbn+fedgs": {"method": "fedbn", "scaling": "on", "label": "fedbn+fedgs"},
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line: options of a training run are attributes only where they were given."""
    parser = options.new_parser(__doc__, "python -m tools.experiment")
    add = parser.add_argument
    known = (*options.METHODS, *COMBINED)
    methods = f"of {', '.join(known)}; default: fedavg fedgs"
    add("--methods", nargs="+", choices=known, metavar="METHOD", help=methods)
    add("--folds", nargs="+", type=int, choices=range(1, 6), metavar="FOLD", help="default: 1")
    seeds = "default: 0 1 2 where methods are compared, else 0"
    add("--seeds", nargs="+", type=int, metavar="SEED", help=seeds)
    control = "train FedAvg with FedGS's mean eta as its server learning rate, too"
    add("--control", action="store_true", help=control)

    names = [name for name in Config.__dataclass_fields__ if name not in (*AXES, "label")]
    options.add_options(parser, Config, names, SHOWN_DEFAULTS)
    return parser.parse_args(arguments)


def plan(given: dict[str, Any], axes: dict[str, list], out: Path) -> list[tuple[Config, str]]:
    """A configuration for each fold, seed and method, and why its preset.

    Raises UserError, before anything begins, for options that no run can use, and for folders that
    hold something else.
    """
    planned = []
    for fold, seed, method in itertools.product(axes["fold"], axes["seed"], axes["method"]):
        of_method = COMBINED.get(method, {"method": method})
        config, why = configure({**given, **of_method, "fold": fold, "seed": seed})
        config = settle(replace(config, out=str(out / runs.run_name(config))))

        folder = runs.Folder(config)
        if not runs.is_complete(folder):
            folder.check({"config": asdict(config)})
        planned.append((config, why))
    return planned


def control_of(config: Config, out: Path) -> Config:
    """FedAvg with the mean eta of a finished FedGS run as its server learning rate.

    Raises UserError for a table of rounds that is damaged.
    """
    path = runs.Folder(config).path / "rounds.csv"
    rows = read_csv(path, ("eta",))
    try:
        etas = [float(row["eta"]) for row in rows]
        if len(etas) != config.rounds or not all(1 <= eta <= 3 for eta in etas):
            raise ValueError(f"it needs an eta from 1 to 3 for each of {config.rounds} rounds")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): there is no control for its run") from error
    mean_eta = float(np.mean(etas))

    # As long as the steps of FedGS on average, whatever its own learning rate is.
    server_lr = config.server_lr * mean_eta
    control = replace(config, method="fedavg", scaling="auto", server_lr=server_lr, label="control")
    return replace(control, out=str(out / runs.run_name(control)))


def run_all(
    planned: list[tuple[Config, str]], control: bool, out: Path
) -> tuple[list[Path], list[str]]:
    """Train what is not complete. -> folders with results, what to say of runs that failed

    control: behind each FedGS run comes its control, whose server learning rate is known by then.
    """
    waiting = deque(planned)
    finished = []
    failures = []
    while waiting:
        config, why = waiting.popleft()
        folder = runs.Folder(config)
        try:
            train_unless_complete(config, why, folder)
            finished.append(folder.path)
            if control and config.method == "fedgs" and not config.label:
                waiting.appendleft((control_of(config, out), why))
        except UserError as error:
            print(f"failed: {error}\n", flush=True)
            failures.append(f"{folder.path}: {error}")
    return finished, failures


def train_unless_complete(config: Config, why: str, folder: runs.Folder) -> None:
    """One run. Raises UserError where it is refused."""
    if runs.is_complete(folder):
        print(f"{folder.path} is complete\n", flush=True)
        return
    print(f"{folder.path}\n", flush=True)
    run(config, why)


def choose_axes(given: dict[str, Any], control: bool) -> dict[str, list]:
    """Take methods, folds and seeds out of the options. -> their values, each once

    control: FedGS's control is trained beside --methods.
    """
    methods = given.pop("methods", ["fedavg", "fedgs"])
    several = control or len(set(methods)) > 1
    values = {
        "method": methods,
        "fold": given.pop("folds", [Config.fold]),
        "seed": given.pop("seeds", SEEDS if several else [Config.seed]),
    }
    return {name: list(dict.fromkeys(found)) for name, found in values.items()}


def experiment(given: dict[str, Any]) -> None:
    """Everything from options by name to the comparison. Raises UserError for runs that failed."""
    out = Path(given.pop("out", "runs"))
    control = given.pop("control", False)
    axes = choose_axes(given, control)
    if control and "fedgs" not in axes["method"]:
        raise UserError(
            "--control needs a FedGS run to take its mean eta from: add it to --methods"
        )

    planned = plan(given, axes, out)
    finished, failures = run_all(planned, control, out)

    if finished:
        print("\n" + compare.report(compare.compare(finished)))
        names = " ".join(str(folder) for folder in finished)
        print(f"\nto draw it: python -m tools.compare {names} --plot comparison.png")
    if failures:
        count = len(finished) + len(failures)
        raise UserError(f"{len(failures)} of {count} runs failed: " + "; ".join(failures))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with readable_errors("tools.experiment", interrupted=processes.GO_ON):
        if processes.under_torchrun():
            raise UserError("start an experiment without torchrun: its runs come one after another")
        end_on_signals()
        experiment(vars(parse(arguments)))


if __name__ == "__main__":
    main()
