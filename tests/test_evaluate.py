"""python -m tools.evaluate: the tables of a trained network, once more or on other images."""

import itertools
import json
import math

import nibabel
import numpy as np
import pytest
import torch
from conftest import exit_code, refused, rows
from PIL import Image
from test_common import LITS, save_checkpoint

import fedgs
import metrics
from support import checkpoints, runs
from tools import compare, evaluate
from tools.common import open_checkpoint


@pytest.fixture
def test_again(finished, cache):
    """test_again(option, …): evaluate the finished run's best.pt on its own data. -> exit code"""

    def evaluate_best(*options):
        where = ["--data-root", "stand-in", "--cache", cache]
        return exit_code(evaluate.main, [finished / "best.pt", *where, *options])

    return evaluate_best


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


# ------------------------------------------------------------------------------- on the same images


@pytest.mark.slow
def test_the_table_is_the_runs_own(test_again, finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert test_again("--out", out) == 0
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "results.json",
        "scores.csv",
        "predictions.png",
    }
    own = results_in(finished)
    again = results_in(out)
    assert again["checkpoints"] == {"best": own["checkpoints"]["best"]}
    assert (again["data"], again["notes"]) == (own["data"], own["notes"])

    own_rows = [row for row in rows(finished / "scores.csv") if row["checkpoint"] == "best"]
    assert rows(out / "scores.csv") == own_rows
    with Image.open(out / "predictions.png") as picture:
        assert picture.width > 100

    text = capsys.readouterr().out
    round_ = own["checkpoints"]["best"]["round"]
    assert f"best (round {round_})" in text
    assert "best.pt on PolypGen stand-in, from stand-in" in text
    assert "best.pt: polypgen-fedgs-utnet-f1-s0 on PolypGen stand-in" in text
    for batch_norm in ("averaged", "local"):
        mean = own["checkpoints"]["best"][batch_norm]["out_test"]["dice"]["mean"]
        assert f"{mean:.3f}" in text


def test_without_out_nothing_is_written(test_again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert test_again() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_results_are_what_comparisons_read(test_again, finished, tmp_path):
    assert test_again("--out", tmp_path / "out") == 0
    [[section], [own]] = compare.compare([tmp_path / "out"]), compare.compare([finished])
    assert section.title == own.title
    assert section.title.startswith("PolypGen stand-in, utnet, checkpoint best, averaged")
    key = ("out_test", "dice", "fedgs")
    assert section.summaries[key] == own.summaries[key]


def test_results_of_something_else_are_left_alone(test_again, finished, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    refused(capsys, test_again("--out", finished), "not empty: choose another --out")
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_results_that_came_meanwhile_are_left_alone(test_again, tmp_path, capsys, monkeypatch):
    """A test takes its time, and someone else may have chosen the same folder."""
    out = tmp_path / "out"
    whole_draw = fedgs.draw_tests

    def draw_while_others_write(*given: object) -> dict:
        out.mkdir()
        (out / "results.json").write_text("of others")
        return whole_draw(*given)

    monkeypatch.setattr(fedgs, "draw_tests", draw_while_others_write)
    refused(capsys, test_again("--out", out), "not empty: choose another --out")
    assert (out / "results.json").read_text() == "of others"

    monkeypatch.setattr(fedgs, "draw_tests", whole_draw)
    with runs.locked(tmp_path / "in use"):
        refused(capsys, test_again("--out", tmp_path / "in use"), "in use is in use")


def test_a_centres_own_batch_norm_is_tested(finished, cache, tmp_path, monkeypatch):
    weights, about = checkpoints.read_weights(finished / "best.pt")
    network, _, _ = open_checkpoint(finished / "best.pt", {})
    about["own"] = {"C4": torch.full(fedgs.affine_places(network).shape, 0.5)}
    checkpoints.save(tmp_path / "own.pt", weights)

    class Seen(Exception):
        pass

    def see(clients, state):
        assert state.own["C4"].tolist() == about["own"]["C4"].tolist()
        raise Seen

    monkeypatch.setattr(fedgs.LocalClients, "test", see)
    given = {"data_root": "stand-in", "cache": str(cache)}
    with pytest.raises(Seen):
        evaluate.evaluate(tmp_path / "own.pt", given, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["utnet", "sd-utnet"])
def test_pictures_of_either_network(cache, tmp_path, model):
    path = save_checkpoint(tmp_path / "best.pt", model=model)
    where = ["--data-root", "stand-in", "--cache", cache, "--out", tmp_path / "out"]
    assert exit_code(evaluate.main, [path, *where]) == 0
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    expected = {"predictions.png"} if model == "utnet" else {"predictions.png", "anatomy.png"}
    assert names == expected


# ---------------------------------------------------------------------------------- on other images


@pytest.mark.slow
def test_other_centres(test_again, tmp_path):
    centres = ["--centres", "C5", "C6", "--out-centre", "C5"]
    assert test_again(*centres, "--out", tmp_path / "out") == 0
    found = results_in(tmp_path / "out")
    best = found["checkpoints"]["best"]["averaged"]
    assert list(best["in_test_by_centre"]) == ["C6"]
    assert list(best["out_test_by_centre"]) == ["C5"]
    assert found["config"]["centres"] == ["C5", "C6"]
    places = {(row["split"], row["centre"]) for row in rows(tmp_path / "out" / "scores.csv")}
    assert places == {("in_test", "C6"), ("out_test", "C5")}


@pytest.mark.slow
def test_other_data_are_named_beside_where_it_was_trained(finished, square_root, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [finished / "best.pt", "--data-root", square_root, "--out", out]
    assert exit_code(evaluate.main, arguments) == 0
    source = "PolypGen (trained on PolypGen stand-in)"
    assert f"on {source}" in capsys.readouterr().out
    assert results_in(out)["data"] == source
    assert {row["data"] for row in rows(out / "scores.csv")} == {source}


@pytest.mark.slow
def test_a_published_checkpoint_beside_a_run(test_again, finished, cache, tmp_path, capsys):
    """A bare state dict by option; the same weights, so the same numbers and no difference."""
    weights = torch.load(finished / "best.pt", weights_only=True)
    torch.save(dict(weights), tmp_path / "published.pt")
    options = [
        *("--image-size", 32, "--width", 2, "--centres", "C4", "C5", "C6"),
        *("--data-root", "stand-in", "--cache", cache, "--out", tmp_path / "published"),
    ]
    assert exit_code(evaluate.main, [tmp_path / "published.pt", *options]) == 0
    assert "published.pt: polypgen-unknown-utnet-f1-s0" in capsys.readouterr().out

    [section] = compare.compare([finished, tmp_path / "published"])
    assert len(section.groups) == 2
    for (_, _, split, measure), difference in section.differences.items():
        if difference.images:
            assert difference.mean == 0, (split, measure)

    wrong = [tmp_path / "published.pt", "--image-size", 32, "--width", 4]
    refused(capsys, exit_code(evaluate.main, wrong), "published.pt does not fit")


# --------------------------------------------------------------------------------------- boundaries


def surfaces_by_hand(checkpoint, given, spacing_of, tolerance):
    """{(split, batch_norm, centre, name): (NSD, HD95)} of all test images."""
    network, config, _ = open_checkpoint(checkpoint, given)
    averaged = {name: x.clone() for name, x in network.state_dict().items()}
    federation = fedgs.load_data(config, config.centres)
    parts = [("in_test", images) for images in federation.in_test.values()]
    parts.append(("out_test", federation.out_test))
    expected = {}
    for (split, images), batch_norm in itertools.product(parts, ("averaged", "local")):
        network.load_state_dict(averaged)
        if batch_norm == "local":
            fedgs.adapt(network, federation.train.get(images.centre, images).images)
        predicted = fedgs.evaluate(network, images).predicted[:, 0].numpy()
        truth = images.masks[:, 0].bool().numpy()
        for i, name in enumerate(images.names):
            pair = metrics.surface_measures(predicted[i], truth[i], spacing_of(name), tolerance)
            expected[split, batch_norm, images.centre, name] = pair
    return expected


def assert_same_surfaces(folder, checkpoint, expected):
    """The rows of scores.csv and the means of results.json are these."""
    found = {}
    for row in rows(folder / "scores.csv"):
        image = row["split"], row["batch_norm"], row["centre"], row["name"]
        found[image] = float(row["nsd"]), float(row["hd95"])
    assert found.keys() == expected.keys()
    for image, pair in expected.items():
        assert found[image] == pytest.approx(pair, nan_ok=True), image

    results = results_in(folder)["checkpoints"][checkpoint]
    for kind in itertools.product(("in_test", "out_test"), ("averaged", "local")):
        split, batch_norm = kind
        pairs = np.array([pair for image, pair in expected.items() if image[:2] == kind])
        for column, name in enumerate(("nsd", "hd95")):
            values = pairs[~np.isnan(pairs[:, column]), column]
            found = results[batch_norm][split][name]
            assert found["n"] == len(values)
            assert found["mean"] == pytest.approx(values.mean())


@pytest.mark.slow
def test_boundaries_in_pixels_of_frames(test_again, finished, cache, tmp_path, capsys):
    out = tmp_path / "out"
    assert test_again("--surfaces", 1.5, "--out", out) == 0
    text = capsys.readouterr().out
    assert "NSD: within 1.5 pixels of the network's image; HD95 in pixels" in text
    given = {"data_root": "stand-in", "cache": str(cache)}
    expected = surfaces_by_hand(finished / "best.pt", given, lambda name: (1.0, 1.0), 1.5)
    assert_same_surfaces(out, "best", expected)

    # The other measures are what they are without.
    best = results_in(out)["checkpoints"]["best"]["local"]
    own = results_in(finished)["checkpoints"]["best"]["local"]
    assert {**best["in_test"], **own["in_test"]} == best["in_test"]
    assert compare.compare([out])


@pytest.mark.parametrize("tolerance", ["0", "-1", "nan", "inf"])
def test_distances_that_are_none(test_again, capsys, tolerance):
    refused(capsys, test_again("--surfaces", tolerance), f"--surfaces {tolerance}", "above 0")


SPACINGS = {
    0: (0.5, 2.0),
    1: (1.0, 1.5),
    30: (0.9, 1.1),
    31: (2.0, 0.8),
    120: (3.0, 0.25),
    121: (0.6, 0.7),
}  # mm, by volume
HEIGHT, WIDTH = 48, 40


@pytest.fixture
def ct_root(tmp_path):
    """Small volumes in LiTS's layout, of three centres, whose pixels have other sizes."""
    root = tmp_path / "ct"
    root.mkdir()
    generator = np.random.default_rng(0)
    for number, (between_rows, between_columns) in SPACINGS.items():
        labels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
        labels[10:24, 12:20, 1:3] = 2
        hu = generator.integers(-200, 200, labels.shape).astype(np.int16)
        affine = np.diag([between_rows, between_columns, 5, 1])
        for kind, voxels in (("volume", hu), ("segmentation", labels)):
            image = nibabel.Nifti1Image(voxels, affine)
            image.to_filename(root / f"{kind}-{number}.nii.gz")
    return root


def test_boundaries_in_mm_of_ct(ct_root, tmp_path, capsys):
    """Each volume has its own pixels, which resizing has made larger or smaller."""
    centres = ("C1", "C2", "C4", "C5")
    path = save_checkpoint(tmp_path / "ct.pt", "LiTS", **{**LITS, "centres": centres})
    out = tmp_path / "out"
    centres = ["--centres", "C1", "C2", "C5"]
    arguments = [path, "--data-root", ct_root, *centres, "--surfaces", 2.5, "--out", out]
    assert exit_code(evaluate.main, arguments) == 0
    assert "NSD: within 2.5 mm; HD95 in mm" in capsys.readouterr().out

    def spacing_of(name):
        number = int(name.removeprefix("volume-").partition("_")[0])
        between_rows, between_columns = SPACINGS[number]
        return between_rows * HEIGHT / 32, between_columns * WIDTH / 32

    given = {"data_root": str(ct_root), "centres": ["C1", "C2", "C5"]}
    expected = surfaces_by_hand(path, given, spacing_of, 2.5)
    names = {name for *_, name in expected}
    assert names > {"volume-120_slice-1", "volume-120_slice-2", "volume-121_slice-1"}
    assert any(math.isfinite(hd95) for _, hd95 in expected.values())
    assert_same_surfaces(out, "ct", expected)


def test_means_over_images():
    """An image without a boundary is no 0, and no image is no mean."""
    measured = np.array([[0.5, 3.0], [0.0, math.nan], [math.nan, math.nan]])
    means = evaluate.means_over_images(measured)
    assert means == {"nsd": {"mean": 0.25, "n": 2}, "hd95": {"mean": 3.0, "n": 1}}
    nothing = evaluate.means_over_images(np.zeros((0, 2)))
    assert nothing["nsd"]["n"] == 0
    assert math.isnan(nothing["nsd"]["mean"])


# ----------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_tested(test_again, finished, tmp_path, capsys):
    refused(capsys, exit_code(evaluate.main, [tmp_path / "none.pt"]), "none.pt is missing")
    refused(capsys, exit_code(evaluate.main, [finished / "resume.pt"]), "resume.pt is no network's")
    refused(capsys, exit_code(evaluate.main, []), "CHECKPOINT")
    refused(capsys, test_again("--width", 4), "--width 4", "trained with 2")
    refused(capsys, test_again("--fold", 2), "--fold 2", "trained with 1")
    refused(capsys, test_again("--seed", 2), "--seed")  # no option of a test
    refused(capsys, test_again("--out-centre", "C1"), "--out-centre C1", "--centres")
    refused(capsys, test_again("--data-root", tmp_path), "--data-root", "no data_C1")


@pytest.mark.slow
def test_options_that_agree_are_fine(test_again):
    assert test_again("--width", 2, "--model", "utnet", "--tau", 150, "--device", "cpu") == 0
