"""python -m tools.experiment: methods x folds x seeds, one run after another."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY, exit_code, refused, rows
from matplotlib.figure import Figure

import fedgs
from support import pictures, runs
from support.errors import UserError
from support.options import METHODS
from tools import compare, experiment

# One client, one round: what the runs learn does not matter here.
OPTIONS = [*TINY, "--centres", "C5", "C6", "--rounds", "1"]


@pytest.fixture(autouse=True)
def plain_pictures(monkeypatch):
    """Real ones take longer than these runs do."""
    for name in ("draw_curves", "draw_predictions"):
        monkeypatch.setattr(pictures, name, lambda *what: Figure(figsize=(1, 1)))


@pytest.fixture
def start(cache):
    """start(folder, option, …): an experiment of tiny runs. -> exit code"""

    def start_in(out, *options):
        arguments = [*OPTIONS, "--cache", cache, "--out", out, *options]
        return exit_code(experiment.main, arguments)

    return start_in


def name_of(method, seed=0, fold=1):
    return f"polypgen-{method}-utnet-f{fold}-s{seed}"


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def times(folder):
    """When each file of a run was written."""
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def without_training(monkeypatch):
    """Have every run fail before it begins. -> their configurations, in order"""
    configs = []

    def refuse(config, why):
        configs.append(config)
        raise UserError("no training today")

    monkeypatch.setattr(experiment, "run", refuse)
    return configs


# ----------------------------------------------------------------------------------------- the plan


def test_pairs_of_methods_lie_next_to_each_other(start, tmp_path, monkeypatch, capsys):
    configs = without_training(monkeypatch)
    options = ["--methods", "fedavg", "fedgs", "--folds", 2, 1, "--seeds", 1, 0, 1]
    refused(capsys, start(tmp_path, *options), "8 of 8 runs failed", "no training today")
    expected = [
        (method, fold, seed)
        for fold in (2, 1)
        for seed in (1, 0)  # each once
        for method in ("fedavg", "fedgs")
    ]
    assert [(config.method, config.fold, config.seed) for config in configs] == expected
    for config in configs:
        assert config.out == str(tmp_path / name_of(config.method, config.seed, config.fold))
        assert config.label == ""
        assert config.lr == 1e-3  # what was given to all of them


def test_by_default_both_methods_with_three_seeds_in_runs(monkeypatch, tmp_path, capsys):
    configs = without_training(monkeypatch)
    monkeypatch.chdir(tmp_path)
    code = exit_code(experiment.main, ["--data-root", "stand-in"])
    refused(capsys, code, "6 of 6 runs failed")
    folders = []
    for seed in (0, 1, 2):
        folders += [f"runs/{name_of(method, seed)}" for method in ("fedavg", "fedgs")]
    assert [config.out for config in configs] == folders


@pytest.mark.parametrize(
    ("options", "seeds"),
    [
        (["--methods", "fedgs"], [0]),
        (["--methods", "fedgs", "fedgs"], [0]),  # each once
        (["--methods", "fedprox", "fedavg"], [0, 1, 2]),
        (["--methods", "fedgs", "--control"], [0, 1, 2]),
        (["--methods", "fedgs", "unscaled"], [0, 1, 2]),
        (["--seeds", "4"], [4]),
    ],
)
def test_three_seeds_where_methods_are_compared(
    start, tmp_path, monkeypatch, capsys, options, seeds
):
    configs = without_training(monkeypatch)
    refused(capsys, start(tmp_path, *options), "runs failed")
    assert sorted({config.seed for config in configs}) == seeds


def test_every_method_can_be_one_of_them(start, tmp_path, monkeypatch, capsys):
    configs = without_training(monkeypatch)
    refused(capsys, start(tmp_path, "--methods", *METHODS, "--seeds", 0), "runs failed")
    assert [config.method for config in configs] == list(METHODS)


def test_unscaled_is_an_arm_beside_the_methods(start, tmp_path, monkeypatch, capsys):
    """What the paper's tables call FedAvg: each seed's FedGS without scaling, told by its label."""
    configs = without_training(monkeypatch)
    options = ["--methods", "fedavg", "fedgs", "unscaled", "--seeds", 0, 1, "--folds", 2]
    refused(capsys, start(tmp_path, *options), "6 of 6 runs failed")
    arms = ("fedavg", "fedgs", "unscaled")
    expected = [tmp_path / name_of(arm, seed, 2) for seed in (0, 1) for arm in arms]
    assert [config.out for config in configs] == [str(folder) for folder in expected]

    scaled, unscaled = configs[1:3]
    assert unscaled == replace(scaled, scaling="off", label="unscaled", out=unscaled.out)
    assert scaled.scales and not unscaled.scales
    assert unscaled.accumulates


def test_fedbn_with_the_steps_of_fedgs(start, tmp_path, monkeypatch, capsys):
    configs = without_training(monkeypatch)
    options = ["--methods", "fedbn", "fedbn+fedgs", "--seeds", 0]
    refused(capsys, start(tmp_path, *options), "2 of 2 runs failed")
    fedbn, both = configs
    assert both == replace(fedbn, scaling="on", label="fedbn+fedgs", out=both.out)
    assert both.scales and not fedbn.scales


def test_names_say_what_there_is_one_of(start, tmp_path, monkeypatch, capsys):
    configs = without_training(monkeypatch)
    options = ["--methods", "fedgs", "--split", "centre", "--model", "sd-utnet"]
    refused(capsys, start(tmp_path, *options), "1 of 1 runs failed")
    assert configs[0].out == str(tmp_path / "polypgen-fedgs-sd-utnet-centre-s0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "-1"], ["--lr -1"]),
        (["--split", "centre", "--folds", "1", "2"], ["--fold 2", "no folds"]),
        (["--seeds", "0", "-1"], ["--seed -1"]),
        (["--folds", "6"], ["--folds", "6"]),
        (["--methods", "fedsgd"], ["--methods", "fedsgd"]),
        (["--methods", "fedavg", "--control"], ["--control needs a FedGS run", "--methods"]),
        (["--method", "fedgs"], ["--method"]),  # of a single run
        (["--label", "mine"], ["--label"]),
        (["--data-root", "nowhere"], ["--data-root nowhere: no such folder"]),
    ],
)
def test_what_is_refused_before_anything_begins(
    start, tmp_path, monkeypatch, capsys, options, words
):
    configs = without_training(monkeypatch)
    refused(capsys, start(tmp_path / "out", *options), "tools.experiment", *words)
    assert configs == []
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else(start, tmp_path, monkeypatch, capsys):
    configs = without_training(monkeypatch)
    folder = tmp_path / name_of("fedgs", fold=3)
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    refused(capsys, start(tmp_path, "--folds", 1, 2, 3), "f3-s0 is not empty")
    assert configs == []
    assert names_in(tmp_path) == {folder.name}


def test_torchrun_starts_no_experiments(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    refused(capsys, start(tmp_path / "out"), "without torchrun")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- the runs


@pytest.mark.slow
def test_it_goes_on_after_a_run_that_fails(start, tmp_path, monkeypatch, capsys):
    whole = experiment.run

    def failing(config, why):
        if config.method == "fedavg":
            raise UserError("round 1 was not applied")
        return whole(config, why)

    monkeypatch.setattr(experiment, "run", failing)
    code = start(tmp_path, "--seeds", 0)
    output, error = capsys.readouterr()
    assert code == 2
    failed = tmp_path / name_of("fedavg")
    assert f"1 of 2 runs failed: {failed}: round 1 was not applied" in error
    assert error.count("\n") == 1
    assert "failed: round 1 was not applied" in output

    # What there is, is compared.
    folder = tmp_path / name_of("fedgs")
    assert compare.report(compare.compare([folder])) in output


def test_a_fault_of_the_program_is_no_failed_run(start, tmp_path, monkeypatch):
    def faulty(config, why):
        raise ValueError("a shape")

    monkeypatch.setattr(experiment, "run", faulty)
    with pytest.raises(ValueError, match="a shape"):
        start(tmp_path)


@pytest.mark.slow
def test_interrupted_and_resumed(start, tmp_path, capsys, monkeypatch):
    """Two methods, two seeds: stopped in the third run's second round, resumed, and compared."""
    options = ["--methods", "fedavg", "fedgs", "--seeds", 0, 1, "--rounds", 2]
    names = [name_of(method, seed) for seed in (0, 1) for method in ("fedavg", "fedgs")]
    folders = [tmp_path / name for name in names]
    save_round = runs.Folder.save_round

    def interrupted(folder, server, weights, history, validation):
        if folder.path.name == names[2] and len(history) == 2:
            raise KeyboardInterrupt
        save_round(folder, server, weights, history, validation)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Folder, "save_round", interrupted)
        assert start(tmp_path, *options) == 130
    assert "--resume" in capsys.readouterr().err
    assert names_in(tmp_path) == set(names[:3])
    assert (folders[2] / "resume.pt").exists()
    assert not (folders[2] / "results.json").exists()

    # Without --resume it stops at the run that was interrupted, before anything begins.
    refused(capsys, start(tmp_path, *options), names[2], "not empty", "--resume")

    before = [times(folder) for folder in folders[:2]]
    first_round = rows(folders[2] / "rounds.csv")
    assert start(tmp_path, *options, "--resume") == 0
    text = capsys.readouterr().out
    assert [times(folder) for folder in folders[:2]] == before
    assert text.count(" is complete") == 2
    assert f"{folders[0]} is complete" in text
    assert rows(folders[2] / "rounds.csv")[:1] == first_round

    [section] = compare.compare(folders)
    assert compare.report([section]) in text
    assert "PolypGen stand-in, utnet, checkpoint best, averaged batch-norm statistics" in text
    assert "2 pairs of runs of the same fold and seed. No conclusion about methods" in text
    assert f"python -m tools.compare {' '.join(map(str, folders))} --plot" in text
    parts = {label: [run.part for run in group] for label, group in section.groups.items()}
    assert parts == {"fedavg": [(1, 0), (1, 1)], "fedgs": [(1, 0), (1, 1)]}

    # Nothing is left to do, with --resume or without.
    assert start(tmp_path, *options) == 0
    assert capsys.readouterr().out.count(" is complete") == 4

    # Other options are another experiment, more rounds go on with this one.
    code = start(tmp_path, *options, "--lr", 0.5)
    refused(capsys, code, names[0], "another run", "lr 0.001, now 0.5")
    code = start(tmp_path, *options, "--rounds", 3)
    refused(capsys, code, names[0], "not empty", "--resume")
    assert [times(folder) for folder in folders[:2]] == before


def test_other_data_of_the_same_number(start, finished, tmp_path, square_root, capsys):
    """Of a run that is not complete; it is noticed once the images are read."""
    options = ["--methods", "fedavg", "--batch-size", 4, "--data-root", square_root]
    assert start(tmp_path, *options) == 0
    folder = tmp_path / name_of("fedavg")
    (folder / "results.json").unlink()
    record = json.loads((folder / "config.json").read_text())
    record["data"]["fingerprint"] = "0" * 16
    (folder / "config.json").write_text(json.dumps(record))
    capsys.readouterr()
    code = start(tmp_path, *options, "--resume")
    refused(capsys, code, "1 of 1 runs failed", "another run", "fingerprint")


# -------------------------------------------------------------------------------------- the control


def mean_eta(folder):
    return float(np.mean([float(row["eta"]) for row in rows(folder / "rounds.csv")]))


@pytest.mark.slow
def test_controls_take_the_mean_eta_of_their_fedgs_run(start, tmp_path, capsys):
    options = ["--seeds", 0, 1, "--control"]
    assert start(tmp_path, *options) == 0
    methods = ("fedavg", "fedgs", "control")
    folders = [tmp_path / name_of(method, seed) for seed in (0, 1) for method in methods]
    assert names_in(tmp_path) == {folder.name for folder in folders}

    text = capsys.readouterr().out
    places = [text.index(f"{folder}\n\n") for folder in folders]
    assert places == sorted(places)
    for seed in (0, 1):
        trained = tmp_path / name_of("fedgs", seed)
        control = results_in(tmp_path / name_of("control", seed))
        eta = mean_eta(trained)
        assert eta > 1
        assert control["config"] == {
            **results_in(trained)["config"],
            "method": "fedavg",
            "server_lr": eta,
            "label": "control",
            "out": str(tmp_path / name_of("control", seed)),
        }
    etas = {mean_eta(tmp_path / name_of("fedgs", seed)) for seed in (0, 1)}
    assert len(etas) == 2  # each has its own

    # Nothing is left to do.
    assert start(tmp_path, *options) == 0
    assert capsys.readouterr().out.count(" is complete") == 6

    # One group, although each control has another server_lr.
    [section] = compare.compare(folders)
    assert {label: len(group) for label, group in section.groups.items()} == {
        "control": 2,
        "fedavg": 2,
        "fedgs": 2,
    }
    assert compare.report([section]) in text


def test_no_control_of_a_run_that_failed(start, tmp_path, monkeypatch, capsys):
    configs = without_training(monkeypatch)
    options = ["--control", "--methods", "fedgs", "--seeds", 0]
    refused(capsys, start(tmp_path, *options), "1 of 1 runs failed")
    assert [config.method for config in configs] == ["fedgs"]


def test_no_control_of_the_run_without_scaling(start, tmp_path, monkeypatch):
    """Its mean eta is 1, so that its control would be FedAvg."""
    trained = []
    monkeypatch.setattr(experiment, "run", lambda config, why: trained.append(config))
    monkeypatch.setattr(experiment, "control_of", lambda config, out: replace(config, label="c"))
    monkeypatch.setattr(compare, "compare", lambda folders: [])
    options = ["--methods", "fedgs", "unscaled", "--control", "--seeds", 0]
    assert start(tmp_path, *options) == 0
    assert [config.label for config in trained] == ["", "c", "unscaled"]


def test_eta_is_averaged_over_all_rounds(tmp_path):
    config = fedgs.Config(out=str(tmp_path / "fedgs"), fold=2, seed=3, rounds=3)
    (tmp_path / "fedgs").mkdir()
    (tmp_path / "fedgs" / "rounds.csv").write_text("round,eta\n1,1.5\n2,1.25\n3,1.0\n")
    control = experiment.control_of(config, tmp_path)
    assert (control.method, control.server_lr, control.label) == ("fedavg", 1.25, "control")
    assert (control.fold, control.seed) == (2, 3)
    assert control.out == str(tmp_path / name_of("control", 3, 2))


def test_a_control_is_as_fast_as_its_fedgs_run_and_scales_nothing(tmp_path):
    config = fedgs.Config(out=str(tmp_path), server_lr=0.5, scaling="on", rounds=1)
    (tmp_path / "rounds.csv").write_text("round,eta\n1,1.25\n")
    control = experiment.control_of(config, tmp_path)
    assert control.server_lr == 0.5 * 1.25
    assert not control.accumulates


@pytest.mark.parametrize(
    "etas", ["", "nan\n1", "inf\n1", "0.9\n1", "3.1\n1", "x\n1", "1", "1\n1\n1"]
)
def test_a_control_needs_an_eta_for_each_round(tmp_path, etas):
    (tmp_path / "rounds.csv").write_text(f"eta\n{etas}\n")
    with pytest.raises(UserError, match=r"rounds\.csv is damaged .*no control"):
        experiment.control_of(fedgs.Config(out=str(tmp_path), rounds=2), tmp_path)
