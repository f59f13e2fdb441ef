"""A run's folder: what it leaves, exact resume, and what its first lines say.

Files are written whole or not at all. A round is over with resume.pt: the files that come after it
say nothing that it does not, and are written again when the run goes on. The run is over with
results.json, which vouches for the tables beside it.
"""

import contextlib
import itertools
import json
import math
import os
import platform
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

import metrics
from support import checkpoints, hardware, options, pictures
from support.errors import UserError
from support.files import (
    check_regular,
    checksum,
    from_checked_json,
    is_temporary,
    to_checked_json,
    to_csv,
    to_json,
    write_text,
)

BEST = {  # checkpoint -> the validation measure in which its round is best
    "best": "dice",
    "best_small": "dice_s",
}
LOCK = ".lock"  # of a folder's process, see `locked`; what it leaves is an empty file
VALIDATED = "validated"  # column of rounds.csv where not all hospitals validated: images of images


def part_name(config: Any) -> str:
    """Which of the possible splits a run uses, for titles and names: f1 … f5, centre or given."""
    return config.split if config.split in ("centre", "given") else f"f{config.fold}"


def run_name(config: Any) -> str:
    """What a run is called: its title, and its folder where none is given."""
    method = config.label or config.method
    return f"{config.dataset}-{method}-{config.model}-{part_name(config)}-s{config.seed}"


class Folder:
    """Where a run keeps its files."""

    def __init__(self, config: Any):
        self.config = config
        self.path = Path(config.out) if config.out else Path("runs") / run_name(config)
        self.best = {}  # {checkpoint: {"round", "score"}}
        self.checksums = {}  # {table: its checksum}, as they were written

    # ------------------------------------------------------------------------- before a run begins

    def check(self, record: dict) -> None:
        """Raise UserError where the folder cannot be used without touching another run's results.

        record: {"config": …}, and once the data are known also {"data": …}.
        """
        path = self.path / "config.json"
        if not (self.config.resume and path.exists()):
            hint = "continue its run with --resume, or " if path.exists() else ""
            check_empty(self.path, hint)
            return

        check_regular(path)
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error!r}): choose another --out") from error
        check_same(path, earlier, record, self.config)

        resume = self.path / "resume.pt"
        if not resume.exists() and (self.path / "results.json").exists():
            raise UserError(f"{resume} is missing, so its run cannot go on: choose another --out")

    def claim(self, record: dict) -> None:
        """Write config.json: from here on the folder is this run's, which is not over."""
        (self.path / "results.json").unlink(missing_ok=True)
        # What this run was writing when it was killed.
        for path in filter(is_temporary, self.path.iterdir()):
            path.unlink()
        self._write_table("config.json", to_json(record))

    def load_progress(self, server: Any, clients: Any) -> list[dict]:
        """Take up a run where resume.pt left it. -> its rounds so far: none for a new run

        Raises UserError where that is not possible; nothing is then written.
        """
        path = self.path / "resume.pt"
        if not (self.config.resume and os.path.lexists(path)):
            return []

        saved = checkpoints.read(path)
        check_progress(saved, path)
        weights = saved["weights"]
        velocity = saved["velocity"].to(server.velocity.device)
        history = saved["history"]
        best = {name: saved["best"][name] for name in BEST}

        # Each file has to be of this run. Those of the last round are written again, below.
        source = clients.federation.source
        about = checkpoints.check_weights(weights, path)
        self._check_origin(path, about, len(history), source)
        for name in BEST:
            round_ = best[name]["round"]
            if round_ != len(history):
                best_path = self.path / f"{name}.pt"
                _, about = checkpoints.read_weights(best_path)
                self._check_origin(best_path, about, round_, source)

        rounds = [row["round"] for row in history]
        complete = rounds == list(range(1, len(history) + 1))
        if not complete or velocity.shape != server.velocity.shape:
            raise UserError(f"{path} is of no whole run: choose another --out")
        if len(history) > self.config.rounds:
            raise UserError(
                f"--rounds {self.config.rounds}: the run in {self.path} has {len(history)} "
                "rounds already"
            )

        server.state = checkpoints.load_state(clients.flat, weights, path)
        server.velocity = velocity
        server.round = len(history)
        self.best = best

        # The run may have been killed between resume.pt and these.
        self._write_round(weights, history)
        return history

    def _check_origin(self, path: Path, about: dict, round_: int, source: str) -> None:
        """Raise UserError where a checkpoint is another run's or round's. about: what it says."""
        earlier = {"config": about.get("config"), "data": {"source": about.get("data")}}
        record = {"config": asdict(self.config), "data": {"source": source}}
        check_same(path, earlier, record, self.config)
        if about.get("round") != round_:
            raise UserError(
                f"{path} is of round {about.get('round')}, where that of round {round_} belongs: "
                "put it back, or choose another --out"
            )

    # ------------------------------------------------------------------------- while it goes on

    def save_round(
        self, server: Any, weights: dict, history: Sequence[dict], validation: dict
    ) -> None:
        """Write what a round leaves. weights: the network's state dict after it."""
        # A mean over fewer hospitals cannot be compared: best only moves where all validated.
        for name, measure in BEST.items() if VALIDATED not in history[-1] else ():
            # Where no validation image is small, Dice decides about best_small, too.
            if not validation[measure]["n"]:
                measure = "dice"
            score = validation[measure]["mean"]

            # Of equal rounds the earlier one stays.
            if name not in self.best or score > self.best[name]["score"]:
                self.best[name] = {"round": len(history), "score": score}

        # First of all, since a round that did not get so far is trained again, and may then end
        # otherwise: its weights must not be in the place of the best ones.
        progress = {
            "weights": weights,
            "velocity": server.velocity,
            "history": list(history),
            "best": self.best,
        }
        checkpoints.save(self.path / "resume.pt", progress)
        self._write_round(weights, history)

    def _write_round(self, weights: dict, history: Sequence[dict]) -> None:
        """The files of the last round that can be told from resume.pt."""
        for name, best in self.best.items():
            if best["round"] == len(history):
                checkpoints.save(self.path / f"{name}.pt", weights)
        checkpoints.save(self.path / "last.pt", weights)
        self._write_table("rounds.csv", to_csv(same_columns(history)))

    def _write_table(self, name: str, text: str) -> None:
        self.checksums[name] = write_text(self.path / name, text)

    def save_results(self, results: dict, scores: list[dict], figures: Mapping[str, Any]) -> None:
        """Write the tables and pictures of the final test."""
        save_results(self.path, results, scores, figures, self.checksums)
        print(
            f"\nin {self.path}: tables (.csv), results.json, {', '.join(figures)}, networks (.pt)"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder for this process while the block runs. It is made where it is not there.

    Raises UserError where another process has it. The lock of one that is killed is free at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(
            f"{folder} is in use by another process: wait for its end, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_progress(saved: object, path: Path) -> None:
    """Raise UserError where what path holds is not what `Folder.save_round` writes."""

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise UserError(f"{path} is not the state of a run, or of another version ({what})")

    require(isinstance(saved, dict), "it holds something else")
    require("weights" in saved, "weights")

    velocity = saved.get("velocity")
    require(isinstance(velocity, Tensor), "velocity")
    checkpoints.check_tensor(velocity, "velocity", path)
    require(velocity.dtype == torch.float32, "velocity")

    history = saved.get("history")
    require(isinstance(history, list), "history")
    for row in history:
        require(isinstance(row, dict), "history")
        known = all(type(value) in (int, float, str) for value in row.values())
        numbers = [row.get(name) for name in ("round", "eta", "dice", "seconds")]
        require(known and all(map(is_number, numbers)), "history")

    best = saved.get("best")
    require(isinstance(best, dict) and set(BEST) <= set(best), "best")
    for found in best.values():
        require(isinstance(found, dict) and is_number(found.get("round")), "best")
        score = found.get("score")
        require(is_number(score) and math.isfinite(score), "best")


def is_number(value: object) -> bool:
    """Whether a value from a file is a number, which True is not."""
    return type(value) in (int, float)


def check_empty(folder: Path, hint: str = "") -> None:
    """Raise UserError where there is something in the folder that a run might overwrite."""
    if not folder.exists():
        return
    for item in folder.iterdir():
        if item.name not in ("config.json", LOCK) and not is_temporary(item):
            raise UserError(f"{folder} is not empty: {hint}choose another --out")


def check_same(path: Path, earlier: Any, record: dict, config: Any) -> None:
    """Raise UserError where what a file says of its run, `earlier`, is not as in this record.

    Options that may change when a run goes on are no part of which run it is.
    """
    free = options.flagged(config, "free")
    changed = []
    try:
        # A tuple is a list, as in a file.
        earlier = json.loads(to_json(earlier))
        now = json.loads(to_json(record))
        for section in ("config", "data"):
            for name, value in now.get(section, {}).items():
                old = earlier[section].get(name)
                if name not in free and old != value:
                    changed.append(f"{name} {options.shown(old)}, now {options.shown(value)}")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): choose another --out") from error

    if changed:
        raise UserError(
            f"{path} is of another run ({', '.join(changed)}): give that run's options, put the "
            "right file back, or choose another --out"
        )


def is_complete(folder: Folder) -> bool:
    """Whether all results of this run are in its folder.

    Raises UserError for another run's, and for changed files.
    """
    path = folder.path / "results.json"
    if not (path.exists() and (folder.path / "scores.csv").exists()):
        return False
    results = read_results(folder.path)
    check_same(path, results, {"config": asdict(folder.config)}, folder.config)
    return results["config"].get("rounds") == folder.config.rounds


# ---------------------------------------------------------------------------- rounds and results


def round_row(
    round_: int, logs: Sequence[Any], validation: dict, seconds: float, source: str
) -> dict[str, Any]:
    """One row of rounds.csv: what each client's round was like, validation, time."""
    steps = sum(log.steps for log in logs)

    def over_steps(values: Sequence[float]) -> float:
        weighted = [log.steps * value for log, value in zip(logs, values, strict=True)]
        return sum(weighted) / steps

    row = {"round": round_}
    for log in logs:
        row[f"loss_{log.client}"] = log.loss
    for name in logs[0].terms:
        row[f"term_{name}"] = over_steps([log.terms[name] for log in logs])
    row["eta"] = over_steps([log.eta for log in logs])
    row["scaled_steps"] = over_steps([log.scaled for log in logs])
    for log in logs:
        row[f"update_norm_{log.client}"] = log.update_norm
    for measure in ("dice", "dice_s", "dice_l"):
        row[measure] = validation[measure]["mean"]
    row["seconds"] = round(seconds, 3)
    row["data"] = source
    return row


def mark_missing(
    row: dict[str, Any], clients: Sequence[str], federation: Any, validation: dict
) -> None:
    """Add to a round's row which clients sent no update, and over how many images it validated.

    Nothing is added where all took part, as they always do in one process.
    """
    missing = [client for client in clients if f"loss_{client}" not in row]
    for client in missing:
        row[f"loss_{client}"] = math.nan
        row[f"update_norm_{client}"] = math.nan
    if missing:
        row["missing"] = " ".join(missing)

    validated = validation["dice"]["n"]
    images = sum(facts.validation for facts in federation.facts.values())
    if validated < images:
        row[VALIDATED] = f"{validated} of {images}"


def same_columns(history: Sequence[dict]) -> list[dict]:
    """The rounds as rows of one table: where a column is another round's, the cell is empty."""
    columns = dict.fromkeys(itertools.chain.from_iterable(history), "")
    return [{**columns, **row} for row in history]


def describe_round(row: dict[str, Any], rounds: int) -> str:
    """The line that a round leaves on the terminal."""
    losses = [value for name, value in row.items() if name.startswith("loss_")]
    return (
        f"round {row['round']:>3}/{rounds}   loss {np.nanmean(losses):.3f}   η {row['eta']:.3f}   "
        f"validation: Dice {row['dice']:.3f}   Dice_S {row['dice_s']:.3f}   "
        f"Dice_L {row['dice_l']:.3f}   ({row['seconds']:.1f} s)"
    )


def summarise_tests(tests: Sequence[Any], round_: int | None) -> dict[str, Any]:
    """What results.json says of one checkpoint: measures with their counts, by split and centre.

    tests: fedgs.CentreTest of each centre. -> {"round", "averaged": measures, "local": measures}
    """
    summary = {"round": round_}
    # Without a held-out centre there is nothing to add up.
    nothing = torch.zeros_like(tests[0].tally)
    for batch_norm in dict.fromkeys(test.batch_norm for test in tests):
        summary[batch_norm] = {}
        for split in ("in_test", "out_test"):
            tallies = {}
            for test in tests:
                if (test.batch_norm, test.split) == (batch_norm, split):
                    tallies[test.centre] = test.tally
            by_centre = {centre: metrics.means(tally) for centre, tally in tallies.items()}
            summary[batch_norm][split] = metrics.means(sum(tallies.values(), nothing))
            summary[batch_norm][f"{split}_by_centre"] = by_centre
    return summary


def score_table(checkpoint: str, tests: Sequence[Any]) -> list[dict]:
    """The rows of scores.csv for one checkpoint, an image each."""
    rows = []
    for test in tests:
        rows.extend({"checkpoint": checkpoint, **row} for row in test.scores)
    return rows


def describe_results(config: Any, federation: Any, tested: Mapping[str, dict]) -> dict:
    """Content of results.json. tested: {checkpoint: its summary}, see summarise_tests"""
    return {
        "data": federation.source,
        "notes": federation.notes,
        "config": asdict(config),
        "checkpoints": tested,
    }


def save_results(
    folder: Path,
    results: dict,
    scores: list[dict],
    figures: Mapping[str, Any],
    checksums: Mapping[str, str] | None = None,
) -> None:
    """Write what a test leaves. results.json says that all is there, and unchanged: it comes last.

    checksums: of the tables that were written before.
    """
    of_scores = write_text(folder / "scores.csv", to_csv(scores))
    checksums = {**(checksums or {}), "scores.csv": of_scores}
    for name, figure in figures.items():
        pictures.save_figure(folder / name, figure)
    text = to_checked_json(results, dict(sorted(checksums.items())))
    write_text(folder / "results.json", text)


def read_results(folder: Path) -> dict:
    """results.json. Raises UserError where it, or a table that it vouches for, has changed."""
    path = folder / "results.json"
    check_regular(path)
    results = from_checked_json(path.read_bytes())
    if results is None:
        raise was_changed(path)

    for name, expected in results.get("checksums", {}).items():
        table = folder / name
        check_regular(table)
        if table.exists() and checksum(table.read_bytes()) != expected:
            raise was_changed(table)
    return results


def was_changed(path: Path) -> UserError:
    """The error to raise for a file that is not what a run wrote."""
    return UserError(
        f"{path} is not what was written there, but damaged or edited: put it back, or delete "
        "results.json and run with --resume; to keep an edit, delete the checksums in results.json"
    )


def count_rounds(history: Sequence[dict]) -> dict[str, float]:
    """How many rounds there were, and how long they took."""
    return {"rounds": len(history), "seconds": sum(row["seconds"] for row in history)}


# ---------------------------------------------------------------------------- which run this is


def title(config: Any, federation: Any) -> str:
    """What the tables and pictures of a run are headed by."""
    return f"{run_name(config)} on {federation.source}"


def describe_run(config: Any, clients: Any, version: str) -> dict:
    """What config.json says: options, data with a fingerprint of every image, versions."""
    federation = clients.federation
    return {
        "config": asdict(config),
        "data": {
            "source": federation.source,
            "notes": federation.notes,
            "images": count_images(federation),
            "fingerprint": federation.fingerprint,
        },
        "hardware": describe_hardware(config, clients),
        "versions": {
            "fedgs": version,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def describe_weights(config: Any, source: str, round_: int, version: str) -> dict:
    """What travels with a checkpoint. No path of this machine does."""
    no_paths = dict.fromkeys(options.flagged(config, "path"), "")
    return {
        "version": version,
        "data": source,
        "round": round_,
        "config": {**asdict(config), **no_paths},
    }


def describe_hardware(config: Any, clients: Any) -> str:
    """Device, processes, arithmetic and kernels of a run."""
    device = clients.flat.parameters.device
    _, which_kernels = hardware.compiled_kernels(config.kernels, device)
    precision = hardware.describe_precision(config.precision, device)
    where = hardware.describe_device(device)
    return f"{where}{clients.placement}; {precision}; kernels: {which_kernels}"


def count_images(federation: Any) -> dict[str, str]:
    """{centre: its numbers of images}, for the header and config.json."""
    numbers = {}
    for centre, facts in federation.facts.items():
        if centre == federation.out_centre:
            numbers[f"{centre} (held out)"] = str(facts.test)
        else:
            numbers[centre] = f"{facts.train} + {facts.validation} + {facts.test}"
    return numbers


def header(config: Any, clients: Any, record: dict, why: str, folder: Folder) -> str:
    """The first lines of a run: what was chosen, why (the preset), and how to change it.

    record: what config.json says, see describe_run
    """
    federation = clients.federation
    size = clients.flat.parameters.numel()
    images = [f"{name} {numbers}" for name, numbers in record["data"]["images"].items()]
    data = [f"{federation.source}, {federation.place}", *federation.notes]
    steps = f"{config.rounds} rounds x {config.local_epochs} epochs, batch {config.batch_size}"
    rates = f"lr {config.lr:g}, server lr {config.server_lr:g}"

    lines = {
        "method": f"{config.method} with {config.model} of width {config.width}, {size:,} "
        "parameters",
        "data": "; ".join(data),
        "images": f"{', '.join(images)} (train + validation + test)",
        "preset": f"{config.preset} ({why}); --preset paper or quick, and any option, override it",
        "training": f"{steps}, {config.image_size}x{config.image_size}, {rates}, seed "
        f"{config.seed}",
        "hardware": record["hardware"],
        "folder": f"{folder.path}{who_can_write(folder.path)}",
    }
    return "\n".join(f"{name:<9}{text}" for name, text in lines.items())


def who_can_write(folder: Path) -> str:
    """What the header says of a folder in which other users could put other files in place."""
    everyone = os.name == "posix" and folder.stat().st_mode & stat.S_IWOTH
    return " (every user of this machine can write there)" if everyone else ""
