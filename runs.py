"""A run's folder: checkpoints, exact resume, and files that are written whole or not at all."""

import csv
import io
import json
import math
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import torch

# Options that may change when a run goes on: what a round computes stays the same, up to rounding.
FREE_ON_RESUME = {"preset", "rounds", "device", "kernels", "data_root", "cache", "out", "resume", "nsd_tolerance"}


class RunError(ValueError):
    """A run that cannot go on, or be used: the message says what was wrong, where, and what to do."""


def run_folder(config):
    """Where a run keeps its files."""
    return Path(config.out or Path("runs") / run_name(config))


def run_name(config):
    """The folder's name where none is given."""
    part = "centre" if config.split == "centre" else f"f{config.fold}"
    return f"{config.dataset}-{config.method}-{config.model}-{part}-s{config.seed}"


def is_complete(folder, config):
    """Whether a run with this configuration has all its results in the folder. Raises RunError for another run's."""
    path = folder / "results.json"
    if not (path.exists() and (folder / "scores.csv").exists()):
        return False
    earlier = check_same(path, {"config": asdict(config)})["config"]
    return all(earlier.get(name) == getattr(config, name) for name in ("rounds", "nsd_tolerance"))


def check_folder(folder, record, resume):
    """Raise RunError where the folder cannot be used without touching the results of another run."""
    path = folder / "config.json"
    if resume and path.exists():
        check_same(path, record)
        if not (folder / "resume.pt").exists() and (folder / "results.json").exists():
            raise RunError(f"{folder / 'resume.pt'} is missing, so its run cannot go on: choose another --out")
    else:
        check_empty(folder, "continue its run with --resume, or " if path.exists() else "")


def check_empty(folder, hint=""):
    """Raise RunError where there is something in the folder that its run would have to be asked about."""
    if folder.exists() and any(item.name != "config.json" and not is_temporary(item) for item in folder.iterdir()):
        raise RunError(f"{folder} is not empty: {hint}choose another --out")


def check_same(path, record):
    """Raise RunError where the JSON file tells of another run than record does, or is damaged. -> its content"""
    try:
        earlier, record = json.loads(path.read_text()), json.loads(to_json(record))
        pairs = {name: (earlier[part].get(name), value) for part in ("config", "data") if part in record
                 for name, value in record[part].items() if name not in FREE_ON_RESUME}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r}): choose another --out") from error
    changed = [f"{name} {old}, now {new}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise RunError(f"{path.parent} holds another run ({', '.join(changed)}): give its options, or choose another --out")
    return earlier


def save_progress(folder, weights, server, history, best, validation):
    """Write what a round leaves. resume.pt comes last: until it is there, --resume repeats the round.

    `best` has the highest validation Dice so far, `best_small` the highest Dice_S (Dice where no such image is small).
    """
    for name, measure in (("best", "dice"), ("best_small", "dice_s" if validation["dice_s"]["n"] else "dice")):
        if validation[measure]["mean"] > best.get(name, {"score": -1.0})["score"]:
            best[name] = {"round": len(history), "score": validation[measure]["mean"]}
            write(folder / f"{name}.pt", weights)
    write(folder / "last.pt", weights)
    write(folder / "rounds.csv", to_csv(history))
    write(folder / "resume.pt", {"state": server.state, "velocity": server.velocity, "history": history, "best": best})


def save_results(folder, files):
    """Write {name: content}. results.json comes last: until it is there, the run is not complete."""
    (folder / "results.json").unlink(missing_ok=True)
    for name, content in files.items():
        write(folder / name, content)


def load_progress(folder, server, config):
    """Take up a run where resume.pt left it; from the start where it is not there yet. -> history, best"""
    path = folder / "resume.pt"
    if not path.exists():
        return [], {}
    saved, device = read_checkpoint(path), server.velocity.device
    try:
        state, velocity = tuple(x.to(device) for x in saved["state"]), saved["velocity"].to(device)
        history, best = saved["history"], {name: dict(saved["best"][name]) for name in ("best", "best_small")}
        fits = [x.shape for x in (*state, velocity)] == [x.shape for x in (*server.state, server.velocity)]
        complete = [row["round"] for row in history] == list(range(1, len(history) + 1))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RunError(f"{path} is not the state of a run ({error!r})") from error
    if not (fits and complete):
        raise RunError(f"{path} is of another network than {config.model} of width {config.width}, or of no whole run")
    if len(history) > config.rounds:
        raise RunError(f"--rounds {config.rounds}: the run in {folder} has {len(history)} rounds already")
    server.state, server.velocity = state, velocity
    return history, best


def read_checkpoint(path):
    """torch.load of tensors and plain values only. Raises RunError for a missing file and for every kind of damage."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path} is missing") from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or "it is empty"
        raise RunError(f"{path} is damaged, or no checkpoint: {reason}") from error


def read_weights(path):
    """A network's state dict, and what fedgs.checkpoint put beside its tensors; {} for a bare one, as published ones are.

    Raises RunError for a missing or damaged file, what is no state dict, and weights that are not finite.
    """
    state = read_checkpoint(path)
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise RunError(f"{path} is no network's state dict (best.pt, best_small.pt and last.pt of a run are)")
    if bad := [name for name, x in state.items() if not x.isfinite().all()]:
        raise RunError(f"{path} holds weights that are not finite ({bad[0]})")
    about = getattr(state, "_metadata", {})
    about = about.get("fedgs", {}) if isinstance(about, dict) else about
    if about and not (isinstance(about, dict) and isinstance(about.get("config"), dict) and isinstance(about.get("data"), str)):
        raise RunError(f"{path}: its configuration is damaged")
    return state, about


def load_weights(network, state, path):
    """Load the state dict that was read from path. Raises RunError for another network's weights."""
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RunError(f"{path} does not fit this network: {str(error).splitlines()[-1].strip()}") from error


def write(path, content):
    """Write a file, and its folder, whole or not at all: text, a figure (as its suffix says), or what torch.save takes.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    if isinstance(content, str):
        file.write(content.encode())
    elif hasattr(content, "savefig"):
        content.savefig(file, format=path.suffix[1:].lower(), dpi=130)
    else:
        torch.save(content, file)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as target:
        target.write(file.getbuffer())
        target.flush()
        os.fsync(target.fileno())
    os.replace(temporary, path)


def is_temporary(path):
    """Whether this is what `write` leaves when it is killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def to_csv(rows):
    """Dictionaries with equal keys as CSV text with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys() if rows else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(value):
    """JSON text; NaN, which JSON has no word for, becomes null."""

    def plain(x):
        if isinstance(x, dict):
            return {key: plain(item) for key, item in x.items()}
        return None if isinstance(x, float) and math.isnan(x) else x

    return json.dumps(plain(value), indent=2) + "\n"
