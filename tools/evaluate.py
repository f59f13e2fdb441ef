"""Test a trained network, as at the end of a run.

    python -m tools.evaluate runs/…/best.pt --data-root /data/polypgen
    python -m tools.evaluate runs/…/best.pt --surfaces 2 --out evaluation
    python -m tools.evaluate published.pt --dataset lits --model utnet --data-root /data/lits

Prints the table of measures for the clients' test images and the held-out centre's, and with --out
also writes results.json, scores.csv and predictions.png, which `python -m tools.compare` reads.

--surfaces T measures how far boundaries are apart, too: NSD, the share of them within T of each
other, and HD95, the 95th percentile of their distances. T is in mm for CT, and in pixels of the
network's image for frames, whose physical size nobody knows.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fedgs
import metrics
from support import checkpoints, options, runs, tables
from support.errors import UserError, readable_errors
from tools.common import DESCRIBES, describe_origin, open_checkpoint

WHERE = ("data_root", "cache", "centres", "out_centre", "lesion", "split", "fold", "tau")
SURFACES = {"nsd": "NSD", "hd95": "HD95"}  # name in files -> heading


def measure_surfaces(test: fedgs.CentreTest, tolerance: float) -> np.ndarray:
    """NSD and HD95 of every image of a centre's test. -> (N, 2) float64, NaN where there is none

    The tolerance is in the unit of the images' spacing.
    """
    predicted = test.evaluation.predicted[:, 0].numpy()
    truth = test.images.masks[:, 0].bool().numpy()
    measured = np.full((len(truth), 2), math.nan)
    for i, spacing in enumerate(test.images.spacing.tolist()):
        measured[i] = metrics.surface_measures(predicted[i], truth[i], spacing, tolerance)
    return measured


def means_over_images(measured: np.ndarray) -> dict[str, dict]:
    """(N, 2) -> {"nsd": {"mean", "n"}, "hd95": …}; NaN with n = 0 where nothing was measured."""
    means = {}
    for column, name in enumerate(SURFACES):
        values = measured[:, column]
        values = values[~np.isnan(values)]
        mean = float(values.mean()) if len(values) else math.nan
        means[name] = {"mean": mean, "n": len(values)}
    return means


def add_surfaces(tests: Sequence[fedgs.CentreTest], summary: dict, tolerance: float) -> None:
    """Measure boundaries, and add them to the rows of scores.csv and the summary of the splits."""
    # All splits have these measures, and of nothing where nothing was tested.
    nothing = np.empty((0, len(SURFACES)))
    parts_of = {}
    for key in itertools.product(fedgs.STATISTICS, tables.SPLITS):
        parts_of[key] = [nothing]

    for test in tests:
        measured = measure_surfaces(test, tolerance)
        parts_of[test.batch_norm, test.split].append(measured)
        for row, (nsd, hd95) in zip(test.scores, measured.tolist(), strict=True):
            row["nsd"] = nsd
            row["hd95"] = hd95

    for (batch_norm, split), parts in parts_of.items():
        summary[batch_norm][split].update(means_over_images(np.concatenate(parts)))


def surfaces_table(name: str, summary: dict, images: str, tolerance: float) -> str:
    """What was measured of boundaries, as text. images: what they are, as in Config"""
    unit = "mm" if images == "slices" else "pixels of the network's image"
    splits = [split for split in tables.SPLITS if summary["averaged"][split]["dice"]["n"]]
    rows = [[f"{name}, boundaries", *(tables.SPLITS[split] for split in splits)]]
    for batch_norm, (measure, heading) in itertools.product(fedgs.STATISTICS, SURFACES.items()):
        found = summary[batch_norm]
        cells = [tables.cell(found[split][measure]) for split in splits]
        rows.append([f"{heading}, {batch_norm} statistics", *cells])
    return f"{tables.aligned(rows)}\nNSD: within {tolerance:g} {unit}; HD95 in {unit}"


def evaluate(checkpoint: Path, given: dict, out: Path | None, tolerance: float | None) -> dict:
    """Test a checkpoint. -> content of results.json; files only where `out` says

    given: options by name; tolerance: of boundaries, which are not measured without one.
    """
    network, config, about = open_checkpoint(checkpoint, given)
    if out:
        runs.check_empty(out)

    federation = fedgs.load_data(config, config.centres)
    where = config.data_root or "the default place"
    print(f"testing {checkpoint} on {federation.source}, from {where}", flush=True)
    if about and about["data"] != federation.source:
        federation.source += f" ({describe_origin(about)})"

    flat = fedgs.FlatNetwork(network)
    clients = fedgs.LocalClients(flat, federation, config)
    state = flat.state(checkpoints.own_of(about, flat, checkpoint))
    tests = list(clients.test(state))
    summary = runs.summarise_tests(tests, about.get("round"))
    heading = f"{checkpoint.name}: {runs.title(config, federation)}"
    print(f"\n{heading}\n{tables.results_tables({checkpoint.stem: summary})}")
    if tolerance is not None:
        add_surfaces(tests, summary, tolerance)
        print("\n" + surfaces_table(checkpoint.stem, summary, config.images, tolerance))

    results = runs.describe_results(config, federation, {checkpoint.stem: summary})
    if out:
        scores = runs.score_table(checkpoint.stem, tests)
        chosen = [test for test in tests if test.batch_norm == config.batch_norm]
        figures = fedgs.draw_tests(clients, chosen, heading)
        # Another process may have written there since.
        with runs.locked(out):
            runs.check_empty(out)
            runs.save_results(out, results, scores, figures)
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line: options of a run are attributes only where they were given."""
    parser = options.new_parser(__doc__, "python -m tools.evaluate")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pt file of a run")
    parser.add_argument("--surfaces", type=float, metavar="T", help="measure boundaries, too")
    parser.add_argument("--out", type=Path, help="folder for tables and pictures")
    options.add_options(parser, fedgs.Config, (*DESCRIBES, *WHERE))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with readable_errors("tools.evaluate"):
        given = vars(parse(arguments))
        checkpoint = given.pop("checkpoint")
        tolerance = given.pop("surfaces", None)
        out = given.pop("out", None)
        if tolerance is not None and not 0 < tolerance < math.inf:
            raise UserError(f"--surfaces {tolerance:g}: must be a distance above 0")
        evaluate(checkpoint, given, out, tolerance)


if __name__ == "__main__":
    main()
