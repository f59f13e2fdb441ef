"""python -m tools.look: what a data set is like, and what tau and l would do, before training."""

import math

import numpy as np
import pytest
import torch
from conftest import exit_code, refused, rows, shrink_stand_ins, square_images
from matplotlib.figure import Figure
from PIL import Image

import data
import fedgs
from support import pictures
from tools import look


@pytest.fixture
def varied(generator):
    """Seven training images of a client: 2 lesions that count as small, 4 others, 1 empty."""
    images = square_images("C1", 7, generator, size=16, small=False)
    images.masks[:] = 0
    for i in range(6):
        images.masks[i, :, : i + 1, :2] = 1
    images.small[:2] = True
    images.inverse_area = 256 / torch.arange(2, 16, 2).double()
    images.inverse_area[6] = math.inf
    return images


def simulated(images, config, epochs):
    """Mean eta, and share of steps above 1, over the batches of many epochs."""
    generator = torch.Generator().manual_seed(1)
    etas = []
    for _ in range(epochs):
        for batch in fedgs.epoch_batches(images, config, generator):
            _, _, eta = fedgs.mask_difficulty(batch.masks, batch.small, config.log_base)
            etas.append(eta)
    etas = torch.stack(etas)
    return float(etas.mean()), float((etas > 1).double().mean())


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("batch_size", [2, 3])
def test_the_effect_is_that_of_many_epochs(varied, batch_size):
    config = fedgs.Config(batch_size=batch_size, log_base=20)
    eta, scaled = simulated(varied, config, epochs=800)
    effect = look.effect_on(varied, varied.small, 20, batch_size)

    # Seven standard errors of either.
    assert effect.eta == pytest.approx(eta, abs=0.06)
    assert effect.scaled == pytest.approx(scaled, abs=0.06)
    assert effect.eta > 1.4
    assert effect.small == 2 / 6


def test_the_share_of_scaled_steps_in_cases_that_one_can_count():
    assert look.expected_scaled(10, 0, 4) == 0
    assert look.expected_scaled(10, 10, 4) == 1
    assert look.expected_scaled(5, 2, 4) == 1  # a batch has no room for the others alone
    assert look.expected_scaled(4, 1, 2) == pytest.approx(1 / 2)
    assert look.expected_scaled(4, 2, 2) == pytest.approx(5 / 6)


def test_mean_eta_is_one_and_twice_the_mean_difficulty():
    assert look.expected_eta(torch.tensor([0.0, 0.0, 0.25, 0.75])) == 1.5


def test_clients_count_by_their_steps():
    effects = {"A": look.Effect(0.1, 0.2, 1.1), "B": look.Effect(0.5, 0.6, 1.5)}
    total = look.mean_effect(effects, {"B": 1, "A": 3, "too small": 0})
    assert total == pytest.approx((0.2, 0.3, 1.2))


def test_images_without_a_lesion_are_no_share_of_anything(varied):
    empty = varied.subset([6])
    assert look.effect_on(empty, empty.small, 20, 1) == (0, 0, 1)


# ---------------------------------------------------------------------------------- the suggestion


@pytest.mark.parametrize(("paper", "marked"), [(look.POLYPGEN, 11), (look.LITS, 20)])
def test_where_images_are_like_the_papers_so_is_the_suggestion(paper, marked):
    sizes = np.full(100, 5.0)
    sizes[:marked] = np.linspace(paper.tau + 1, 1e4, marked)
    np.random.default_rng(0).shuffle(sizes)
    assert look.suggest(sizes, paper) == (paper.tau, paper.log_base)


def test_a_suggested_l_makes_a_lesion_at_tau_as_difficult_as_in_the_paper():
    tau, log_base = look.suggest(np.geomspace(2, 3000, 500), look.POLYPGEN)
    difficulty = math.tanh(math.log(tau, log_base) ** 2)
    assert difficulty == pytest.approx(0.829, abs=0.01)
    assert look.POLYPGEN.difficulty == pytest.approx(0.829, abs=0.001)
    assert look.LITS.difficulty == pytest.approx(math.tanh(1))


def test_large_lesions_have_a_suggestion_that_a_run_accepts():
    tau, log_base = look.suggest(np.array([1.0]), look.POLYPGEN)
    assert tau > 1 < log_base


@pytest.mark.parametrize(("x", "rounded"), [(156.2, 150), (9.99, 9.9), (1000, 1000), (2345, 2300)])
def test_two_digits_are_enough(x, rounded):
    assert look.rounded_down(x) == rounded


# --------------------------------------------------------------------------- what a centre is like


def test_lesions_are_counted_with_their_diagonals():
    mask = np.zeros((8, 8), np.uint8)
    assert look.measure_lesions(mask) == (0, math.inf)
    mask[0, 0] = mask[1, 1] = 1
    mask[4:7, 4:7] = 1
    assert look.measure_lesions(mask) == (2, 32)


def test_a_lesion_may_be_larger_than_what_is_around_it():
    mask = np.ones((8, 8), np.uint8)
    mask[0] = 0
    assert look.measure_lesions(mask) == (1, 64 / 56)


def test_quantiles_are_those_of_images_with_a_lesion():
    areas = np.array([10.0, math.inf, 20.0, 30.0])
    assert look.quantile_cells(areas) == ["11.0", "15.0", "20.0", "25.0", "29.0"]
    assert look.quantile_cells(areas[1:2]) == ["–"] * 5


def alike_parts(generator):
    """Two training images that are the same, one of which is a test image, too."""
    train = square_images("C1", 4, generator)
    train.images[1] = train.images[0]
    test = square_images("C1", 2, generator)
    test.images[1] = train.images[0]
    return {"train": train, "validation": train.subset([]), "in_test": test}


def test_images_that_look_alike_are_counted_across_splits(generator):
    parts = alike_parts(generator)
    assert look.count_alike(look.measure(parts, "colour")) == (3, 3)

    parts["in_test"] = parts["in_test"].subset([0])
    assert look.count_alike(look.measure(parts, "colour")) == (2, 0)


def test_looking_part_by_part_finds_the_groups_of_data(generator):
    train = alike_parts(generator)["train"]
    assert look.near_duplicates([train]) == data.groups_by_looks(train)


def test_tau_is_compared_with_the_smallest_lesion_of_images_and_with_all_of_slices(varied):
    varied.masks[5, 0, 10, 10] = 1
    frames = look.measure({"train": varied}, "colour")
    assert frames.smallest[5] == 256
    assert frames.lesions.tolist() == [1, 1, 1, 1, 1, 2, 0]

    slices = look.measure({"train": varied}, "slices")
    assert slices.smallest.tolist() == varied.inverse_area.tolist()
    assert look.count_alike(slices) == (0, 0)


# ---------------------------------------------------------------------------------- a whole look


def test_a_look_says_what_there_is(square_root, capsys):
    centres, effects = look.look({"data_root": str(square_root), "image_size": 64})
    text = capsys.readouterr().out
    assert text.startswith(f"PolypGen, in {square_root}; looked at with 64x64 pixels")
    assert "C6 (held out)" in text
    assert "64x64\n" in text
    assert "suggestion, to start from: --tau" in text

    assert [len(centre.lesions) for centre in centres] == [14, 18, 26, 12, 11, 10]
    first = centres[0].inverse_area
    expected = [f"{value:.1f}" for value in np.quantile(first, (0.05, 0.25, 0.5, 0.75, 0.95))]
    line = next(line for line in text.splitlines() if line.startswith("C1"))
    assert line.split()[1:5] == ["14", "14", "1.00", str(centres[0].small.sum())]
    assert line.split()[5:10] == expected
    assert list(effects) == ["C1", "C2", "C3", "C4", "C5", "all"]


def test_what_is_said_of_all_is_weighted_by_steps(square_root, capsys):
    _, effects = look.look({"data_root": str(square_root), "image_size": 64, "tau": 40.0})
    steps = {"C1": 2, "C2": 3, "C3": 5, "C4": 2, "C5": 2}  # 11, 14, 20, 9 and 8 images by four
    mean = sum(steps[client] * effects[client].eta for client in steps) / 14
    assert effects["all"].eta == pytest.approx(mean)
    assert effects["C3"].eta != effects["C4"].eta


def test_the_suggestion_is_made_of_training_images(square_root):
    # At 512, lesions are measured as the rule measures them.
    given = {"data_root": str(square_root), "image_size": 512, "centres": ["C1", "C2"]}
    given["out_centre"] = ""
    config = look.choose_config(given)
    federation = fedgs.load_data(config, config.centres)
    parts = [look.parts_of(federation, centre) for centre in config.centres]
    centres = [look.measure(of_centre, "colour") for of_centre in parts]
    said = look.predict_suggested(config, federation, centres)

    # What it would do is what it does when it is chosen.
    words = said.split()
    tau = float(words[words.index("--tau") + 1])
    log_base = float(words[words.index("--log-base") + 1])
    chosen = look.choose_config({**given, "tau": tau, "log_base": log_base})
    loaded = fedgs.load_data(chosen, chosen.centres)
    effect = look.predict_chosen(chosen, loaded)["all"]
    assert f"marks {effect.small:.1%} of" in said
    assert f"scale {effect.scaled:.1%} of the steps; mean η {effect.eta:.3f}" in said

    # Whatever is tested on may be of any size.
    for centre in centres:
        for i, split in enumerate(centre.splits):
            if split != "train":
                centre.smallest[i] = 1e5
    assert look.predict_suggested(config, federation, centres) == said


def test_files_are_written_once(square_root, tmp_path, capsys):
    out = tmp_path / "out"
    where = ["--data-root", square_root, "--image-size", "64", "--centres", "C1", "C6"]
    arguments = [*where, "--out", out]
    assert exit_code(look.main, arguments) == 0
    assert {path.name for path in out.iterdir()} == {"look.png", "look.csv"}
    with Image.open(out / "look.png") as picture:
        assert picture.width > 1000

    table = rows(out / "look.csv")
    assert len(table) == 24
    held_out = [row for row in table if row["split"] == "out_test"]
    assert {row["centre"] for row in held_out} == {"C6"}
    assert table[0]["data"] == "PolypGen"

    capsys.readouterr()
    refused(capsys, exit_code(look.main, arguments), "is not empty")


def test_drawn_images_are_called_so(tmp_path, monkeypatch, capsys):
    shrink_stand_ins(monkeypatch, frames=40, volumes=2, slices=4)
    titles = []

    def keep_title(path, figure):
        titles.append(figure.get_suptitle())

    monkeypatch.setattr(pictures, "save_figure", keep_title)
    out = tmp_path / "out"
    arguments = ["--data-root", "stand-in", "--cache", tmp_path, "--image-size", "32"]
    arguments += ["--centres", "C1", "C6", "--out", out]
    assert exit_code(look.main, arguments) == 0
    assert titles == ["A first look at PolypGen stand-in"]
    assert {row["data"] for row in rows(out / "look.csv")} == {"PolypGen stand-in"}
    assert capsys.readouterr().out.startswith("PolypGen stand-in, drawn images")


def test_slices_are_looked_at_by_all_of_their_lesions(tmp_path, monkeypatch, capsys):
    shrink_stand_ins(monkeypatch, frames=10, volumes=4, slices=4)
    arguments = ["--dataset", "lits", "--data-root", "stand-in", "--cache", tmp_path]
    arguments += ["--image-size", "64", "--centres", "C1", "C5", "--batch-size", "2"]
    assert exit_code(look.main, arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("LiTS stand-in")
    assert "as the paper's 1000 does on LiTS (20%)" in text
    assert "near-duplicates" not in text


def test_drawn_images_are_small_unless_a_size_is_given():
    assert look.choose_config({"data_root": "stand-in"}).image_size == 80
    assert look.choose_config({"data_root": "stand-in", "image_size": 96}).image_size == 96


def test_near_duplicates_across_splits_are_warned_of(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Oslo": 20})
    first = (tmp_path / "Oslo0.png").read_bytes()
    for i in range(20):
        (tmp_path / f"Oslo{i}.png").write_bytes(first)
    arguments = ["--dataset", path, "--image-size", "32"]

    assert exit_code(look.main, arguments) == 0
    assert (
        "near-duplicates are in several splits of Oslo: --split grouped" in capsys.readouterr().out
    )


@pytest.mark.parametrize(("count", "listed"), [(3, ["A0", "A1", "A2"]), (20, ["20 centres"])])
def test_histograms_name_their_centres_while_there_is_room(varied, count, listed):
    centre = look.measure({"train": varied}, "grey")
    centres = [centre._replace(name=f"A{i}") for i in range(count)]
    axes = Figure().subplots()
    look.draw_sizes(axes, centres, tau=50)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == [*listed, "τ = 50"]


def test_the_smallest_lesions_are_shown_first(varied):
    centre = look.measure(
        {"train": varied.subset([3, 6, 0]), "in_test": varied.subset([1])}, "grey"
    )
    order = [i for _, i in look.smallest_first([centre])]
    assert order == [2, 3, 0]


def manifest_of(folder, frames):
    """A manifest of frames {centre: number of them}, noise with a square in each."""
    generator = np.random.default_rng(0)
    lines = ["centre,image,mask"]
    for centre, count in frames.items():
        for i in range(count):
            pixels = generator.integers(0, 90, (32, 48, 3), dtype=np.uint8)
            mask = np.zeros((32, 48), np.uint8)
            mask[2 : 4 + i, 2:6] = 1
            Image.fromarray(pixels).save(folder / f"{centre}{i}.png")
            Image.fromarray(mask).save(folder / f"{centre}{i}_mask.png")
            lines.append(f"{centre},{centre}{i}.png,{centre}{i}_mask.png")
    path = folder / "cohort.csv"
    path.write_text("\n".join(lines))
    return path


def test_data_of_ones_own_are_looked_at_even_if_they_are_too_few_to_train(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Berlin": 10, "Oslo": 4})
    assert exit_code(look.main, ["--dataset", path, "--image-size", "32"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"cohort, in {path}")
    assert "cannot be trained on as it is: centre Oslo has 3 training images" in text
    assert "48x32" in text


def test_where_no_client_can_train_the_table_is_still_there(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Oslo": 4})
    code = exit_code(look.main, ["--dataset", path, "--image-size", "32"])
    output = capsys.readouterr()
    assert code == 2
    assert "Oslo" in output.out
    assert output.err.count("\n") == 1 and "--batch-size 4" in output.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data-root", "nowhere"], "--data-root nowhere: no such folder"),
        (["--data-root", "stand-in", "--log-base", "1"], "--log-base 1.0"),
        (["--rounds", "3"], "--rounds"),
    ],
)
def test_errors_are_one_line(options, words, capsys):
    refused(capsys, exit_code(look.main, options), words)


def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Oslo": 6})
    (tmp_path / "Oslo3.png").write_bytes(b"no image")
    refused(capsys, exit_code(look.main, ["--dataset", path]), "Oslo3.png")


# ---------------------------------------------------------------------------------- the real frames


SPEC = {  # images, empty masks, flagged small, quantiles of 1/a
    "C1": (256, 5, 19, (2.8, 7.3, 15.3, 37.2, 103.1)),
    "C2": (301, 31, 15, (3.6, 8.3, 16.3, 31.2, 71.9)),
    "C3": (457, 1, 39, (3.6, 8.9, 19.0, 37.0, 104.4)),
    "C4": (227, 81, 17, (2.8, 10.8, 25.8, 62.6, 355.3)),
    "C5": (208, 2, 47, (4.8, 10.5, 31.4, 82.6, 294.1)),
    "C6": (88, 5, 13, (4.4, 9.5, 20.3, 48.5, 175.2)),
}


@pytest.mark.slow
def test_the_real_frames_are_as_published(polypgen_root, capsys):
    """The mean eta that trainings on these frames measured is 1.12 (docs/results.md)."""
    centres, effects = look.look({"data_root": str(polypgen_root), "image_size": 80})
    assert effects["all"].eta == pytest.approx(1.12, abs=0.01)

    for centre in centres:
        images, empty, flagged, quantiles = SPEC[centre.name]
        known = centre.inverse_area[np.isfinite(centre.inverse_area)]
        assert len(centre.lesions) == images
        # A lesion of the full size may have vanished in resizing.
        assert abs(images - len(known) - empty) <= 1
        assert centre.small.sum() == flagged
        assert np.percentile(known, look.QUANTILES) == pytest.approx(quantiles, rel=0.02)
