"""python -m tools.look: what a data set is like, and what tau and l would do, before training."""

import math

import nibabel
import numpy as np
import pytest
import torch
from conftest import exit_code, refused, rows, shrink_stand_ins, square_images
from PIL import Image
from tiny_volumes import labels_of, write_volume

import data
import fedgs
from support import pictures
from tools import look


def manifest_of(folder, frames, name="cohort.csv"):
    """A manifest of frames {centre: number of them}, noise with a rectangle in each. -> its path"""
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
    path = folder / name
    path.write_text("\n".join(lines))
    return path


def looked_at(capsys, path, *options):
    """What a look at a manifest prints."""
    assert exit_code(look.main, ["--dataset", path, "--image-size", "32", *options]) == 0
    return capsys.readouterr().out


def cells(text, heading, name):
    """The row of a centre in a table of a look, {column: cell}."""
    lines = text.splitlines()
    [start] = [i for i, line in enumerate(lines) if line.startswith(heading)]
    columns = [column.strip() for column in lines[start].split("   ") if column.strip()]
    row = next(line for line in lines[start:] if line.startswith(name))
    found = [cell.strip() for cell in row.split("   ") if cell.strip()]
    return dict(zip(columns, found, strict=True))


# ------------------------------------------------------------------------ files that cannot be used


def cut_short(path):
    path.write_bytes(path.read_bytes()[:900])


def test_all_files_that_cannot_be_used_are_named(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Berlin": 14, "Oslo": 12})
    (tmp_path / "Berlin2.png").write_bytes(b"no image")
    (tmp_path / "Berlin5_mask.png").unlink()
    cut_short(tmp_path / "Berlin0.png")
    Image.new("RGB", (48, 32), "red").save(tmp_path / "Oslo3_mask.png")
    Image.new("L", (48, 48)).save(tmp_path / "Oslo7_mask.png")
    text = looked_at(capsys, path, "--out", tmp_path / "out")

    problems = [
        "  cannot be used, and would end a run:",
        f"cannot read {tmp_path}/Berlin0.png: ",
        f"cannot read {tmp_path}/Berlin2.png: it is no image",
        f"{path}, row 7: there is no file {tmp_path}/Berlin5_mask.png",
        f"{tmp_path}/Oslo3_mask.png is coloured",
        f"{tmp_path}/Oslo7_mask.png is 48x48, its image 48x32",
    ]
    places = [text.find(problem) for problem in problems]
    assert min(places) > 0
    assert places == sorted(places)

    # The look goes on with the others.
    berlin = cells(text, "files of", "Berlin")
    oslo = cells(text, "files of", "Oslo")
    assert (berlin["all"], berlin["unusable"]) == ("14", "3")
    assert (oslo["all"], oslo["unusable"]) == ("12", "2")
    assert cells(text, "lesions of", "Berlin")["images"] == "11"
    assert "suggestion" in text

    table = rows(tmp_path / "out" / "look.csv")
    assert len(table) == 26
    bad = {row["name"]: row for row in table[21:]}
    assert set(bad) == {"Berlin0", "Berlin2", "Berlin5", "Oslo3", "Oslo7"}
    assert bad["Oslo7"]["remark"].endswith("is 48x48, its image 48x32")
    assert bad["Oslo7"]["inverse_area"] == ""
    assert bad["Oslo7"]["data"] == "cohort"


def test_what_is_used_is_as_if_the_bad_files_were_not_there(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Oslo": 12})
    lines = path.read_text().splitlines()
    without = tmp_path / "without.csv"
    without.write_text("\n".join([*lines[:3], *lines[4:]]))
    (tmp_path / "Oslo2.png").write_bytes(b"no image")
    some, effects_of_some = look.look({"dataset": str(path), "image_size": 32})
    all_, effects_of_all = look.look({"dataset": str(without), "image_size": 32})
    assert [one[:7] for one in some] == [one[:7] for one in all_]
    assert effects_of_some == effects_of_all


def test_ten_of_many_bad_files_are_listed(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Oslo": 20})
    for i in range(13):
        (tmp_path / f"Oslo{i}_mask.png").unlink()
    text = looked_at(capsys, path)
    assert text.count("there is no file") == 10
    assert "… and 3 more: --out lists all in look.csv" in text


def test_centres_that_cannot_be_used_are_left_out(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Berlin": 10, "Oslo": 10, "Lund": 2})
    for i in range(10):
        Image.new("L", (48, 32)).save(tmp_path / f"Oslo{i}_mask.png")
    for i in range(2):
        (tmp_path / f"Lund{i}.png").unlink()
    text = looked_at(capsys, path, "--out-centre", "Oslo")
    assert "Oslo is left out here, and would end a run: the masks of centre Oslo are all" in text
    assert "Lund is left out here, and would end a run: no file of 2 can be used: " in text
    assert "suggestion" in text and "held out" not in text
    assert cells(text, "files of", "Lund")["unusable"] == "2"
    assert "too little to train on" not in text


def test_a_held_out_centre_may_come_first(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Berlin": 10, "Oslo": 12, "Lund": 11})
    text = looked_at(capsys, path, "--out-centre", "Berlin", "--out", tmp_path / "out")
    assert cells(text, "lesions of", "Berlin (held out)")["images"] == "10"
    splits = {row["split"] for row in rows(tmp_path / "out" / "look.csv")[:10]}
    assert splits == {"out_test"}


def test_where_nothing_can_be_used_one_line_says_why(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Oslo": 3})
    for i in range(3):
        (tmp_path / f"Oslo{i}.png").unlink()
    code = exit_code(look.main, ["--dataset", path, "--image-size", "32", "--out", tmp_path / "o"])
    refused(capsys, code, "no centre can be used, as Oslo: no file of 3 can be used: ", "no file")
    assert not (tmp_path / "o").exists()


def test_where_lesions_are_not_measured_as_the_rule_does_it_is_said(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Oslo": 12})
    said = "small is what is small at 512x512: a suggestion is best made there"
    assert said in looked_at(capsys, path)
    assert exit_code(look.main, ["--dataset", path]) == 0
    assert said not in capsys.readouterr().out


def test_lesions_that_all_vanish_leave_tables(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Oslo": 12})
    mask = Image.new("L", (480, 320))
    mask.putpixel((3, 3), 1)
    for i in range(12):
        mask.save(tmp_path / f"Oslo{i}_mask.png")
    text = looked_at(capsys, path, "--out", tmp_path / "out")
    assert "12 lesions vanish at 32x32" in text
    assert cells(text, "lesions of", "Oslo")["with one"] == "0"
    assert "no suggestion: no training image has a lesion" in text
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["look.csv"]


def test_bad_frames_in_the_published_layout(square_root, tmp_path, capsys):
    for number in (1, 2, 6):
        source = square_root / f"data_C{number}"
        for path in source.rglob("*.jpg"):
            target = tmp_path / path.relative_to(square_root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    cut_short(tmp_path / "data_C1" / "images_C1" / "03.jpg")
    (tmp_path / "data_C2" / "masks_C2" / "05_mask.jpg").unlink()
    dim = tmp_path / "data_C1" / "masks_C1" / "09_mask.jpg"
    with Image.open(dim) as mask:
        mask.point(lambda value: value // 3).save(dim)

    where = ["--data-root", tmp_path, "--image-size", "64", "--centres", "C1", "C2", "C6"]
    assert exit_code(look.main, where) == 0
    text = capsys.readouterr().out
    assert f"cannot read {tmp_path}/data_C1/images_C1/03.jpg" in text
    assert f"{dim} has values up to" in text
    assert "C2 is left out here" in text and "05_mask.jpg is missing" in text
    assert cells(text, "lesions of", "C1")["images"] == "12"


def test_bad_volumes(tmp_path, capsys):
    for number in range(12):
        write_volume(tmp_path, number, labels_of(60, 0, 80))
    write_volume(tmp_path, 120, labels_of(60, 70))
    path = tmp_path / "volume-3.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])
    arguments = ["--dataset", "lits", "--data-root", tmp_path, "--image-size", "32"]
    assert exit_code(look.main, [*arguments, "--centres", "C1", "C5", "--tau", "5"]) == 0
    text = capsys.readouterr().out
    assert "volume-3.nii.gz, it is damaged or cut short" in text
    assert cells(text, "files of", "C1")["unusable"] == "1"
    assert cells(text, "lesions of", "C1")["images"] == "22"
    assert cells(text, "lesions of", "C5")["images"] == "2"
    assert "alike" not in text


def test_bad_volumes_of_a_manifest(tmp_path, capsys):
    lines = ["centre,image,mask"]
    hu = np.random.default_rng(0).integers(0, 99, (16, 20, 3))
    for number in range(11):
        write_volume(tmp_path, number, labels_of(60, 0, 80) // 2, hu)
        lines.append(f"Lund,volume-{number}.nii.gz,segmentation-{number}.nii.gz")
    labels = np.asarray(nibabel.load(tmp_path / "segmentation-4.nii.gz").dataobj)
    moved = nibabel.Nifti1Image(labels, np.diag([1.0, 1, -1, 1]))
    moved.to_filename(tmp_path / "segmentation-4.nii.gz")
    path = tmp_path / "ct.csv"
    path.write_text("\n".join(lines))
    text = looked_at(capsys, path)
    assert "segmentation-4.nii.gz lies up to" in text
    assert cells(text, "files of", "Lund") == {
        "files of": "Lund",
        "all": "11",
        "unusable": "1",
        "suspicious": "0",
        "sizes": "–",
    }
    assert cells(text, "lesions of", "Lund")["images"] == "20"
    assert (tmp_path / "fedgs-cache").is_dir()


def test_suspicious_images_are_named_but_used(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Oslo": 12})
    Image.new("RGB", (48, 32), "navy").save(tmp_path / "Oslo4.png")
    Image.new("L", (48, 32), 1).save(tmp_path / "Oslo6_mask.png")
    text = looked_at(capsys, path, "--out", tmp_path / "out")
    assert "  suspicious, but used:" in text
    assert "Oslo, Oslo4: shows nothing, all of its pixels are equal" in text
    assert "Oslo, Oslo6: its lesion covers 100% of it: is the mask inverted?" in text
    assert cells(text, "files of", "Oslo")["suspicious"] == "2"
    assert cells(text, "lesions of", "Oslo")["images"] == "12"
    remarks = [row["remark"] for row in rows(tmp_path / "out" / "look.csv") if row["remark"]]
    assert len(remarks) == 2


def test_a_lesion_that_fills_less_than_nine_tenths_is_not_suspicious(generator):
    [pixels] = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=generator)
    assert look.suspect(pixels, 1.12) == ""
    assert "91%" in look.suspect(pixels, 1.1)
    assert look.suspect(pixels, math.inf) == ""
    assert "shows nothing" in look.suspect(torch.full((3, 8, 8), 7, dtype=torch.uint8), math.inf)

    # One pixel is enough to show something, in whichever channel it is.
    pixels = torch.full((3, 8, 8), 7, dtype=torch.uint8)
    pixels[2, 4, 4] = 8
    assert look.suspect(pixels, math.inf) == ""


# ------------------------------------------------------------------------------- what is measured


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


def test_tau_is_compared_with_the_smallest_lesion_of_images_and_with_all_of_slices(varied):
    varied.masks[5, 0, 10, 10] = 1
    frames = [look.see(varied, i, "train", "colour") for i in range(7)]
    assert frames[5].smallest == 256
    assert [one.lesions for one in frames] == [1, 1, 1, 1, 1, 2, 0]
    assert [one.small for one in frames] == [True, True, *[False] * 5]
    slices = [look.see(varied, i, "train", "slices") for i in range(7)]
    assert [one.smallest for one in slices] == varied.inverse_area.tolist()
    assert slices[5].lesions == 2


def test_tau_marks_lesions_that_are_as_small_or_smaller():
    sizes = {"A": torch.tensor([149.9, 150, 151, math.inf], dtype=torch.float64)}
    assert look.small_by(sizes, 150)["A"].tolist() == [False, True, True, False]


def test_quantiles_are_those_of_images_with_a_lesion(varied):
    seen = [look.see(varied, i, "train", "colour") for i in (0, 1, 6)]
    text = look.lesions_table(seen, "")
    row = cells(text, "lesions of", "C1")
    assert (row["images"], row["with one"], row["each"], row["small"]) == ("3", "2", "1.00", "2")
    assert (row["1/a: 5 %"], row["50 %"], row["95 %"]) == ("67.2", "96.0", "124.8")
    empty = cells(look.lesions_table(seen[2:], ""), "lesions of", "C1")
    assert (empty["each"], empty["50 %"]) == ("–", "–")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({(64, 48)}, "64x48"),
        ({(64, 48), (0, 0), (90, 20), (20, 20)}, "20x20 to 64x48"),
        ({(0, 0)}, "–"),
        (set(), "–"),
    ],
)
def test_sizes_of_files(sizes, text):
    assert look.describe_sizes(sizes) == text


# --------------------------------------------------------------------------------- near-duplicates


def federation_of(generator, **counts):
    """A federation of centres with so many training images each, and a test image more."""
    federation = data.Federation("x", "", "", "", 32, "")
    for centre, count in counts.items():
        images = square_images(centre, count + 1, generator)
        federation.train[centre] = images.subset(range(count))
        federation.validation[centre] = images.subset([])
        federation.in_test[centre] = images.subset([count])
        federation.facts[centre] = data.Facts(count, 0, 1, 0, 0, "")
    return federation


def counted(federation):
    """(anywhere, across splits, across centres) of each centre."""
    seen = look.see_all(federation, "colour")
    alike = look.count_alike(seen, look.number_by_looks(federation))
    return {centre: tuple(counts[centre] for counts in alike) for centre in federation.facts}


def test_images_that_look_alike_are_counted_where_they_are(generator):
    federation = federation_of(generator, A=4, B=3, C=3)
    assert counted(federation) == {"A": (0, 0, 0), "B": (0, 0, 0), "C": (0, 0, 0)}

    # Two of A's training images, then the test image, too.
    a = federation.train["A"].images
    a[1] = a[0]
    assert counted(federation) == {"A": (2, 0, 0), "B": (0, 0, 0), "C": (0, 0, 0)}
    federation.in_test["A"].images[0] = a[0]
    assert counted(federation) == {"A": (3, 3, 0), "B": (0, 0, 0), "C": (0, 0, 0)}

    # Training images of B and C, which are in equal splits of two centres.
    federation.train["C"].images[2] = federation.train["B"].images[1]
    assert counted(federation) == {"A": (3, 3, 0), "B": (1, 0, 1), "C": (1, 0, 1)}


def test_the_same_scene_in_less_light_is_alike(generator):
    federation = federation_of(generator, A=4)
    a = federation.train["A"].images
    a[3] = (a[0].float() * 0.7).byte()
    assert counted(federation) == {"A": (2, 0, 0)}


def test_near_duplicates_are_warned_of(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Berlin": 12, "Lund": 10, "Oslo": 20})
    for i in range(20):
        (tmp_path / f"Oslo{i}.png").write_bytes((tmp_path / "Oslo0.png").read_bytes())
    (tmp_path / "Berlin3.png").write_bytes((tmp_path / "Lund1.png").read_bytes())
    text = looked_at(capsys, path, "--out", tmp_path / "out")
    assert "near-duplicates are in several splits of Oslo: a group, or --split grouped" in text
    assert "near-duplicates are in several centres, of Berlin, Lund: keep each in one" in text
    oslo = cells(text, "files of", "Oslo")
    assert (oslo["alike"], oslo["across splits"], oslo["across centres"]) == ("20", "20", "0")
    berlin = cells(text, "files of", "Berlin")
    assert (berlin["alike"], berlin["across splits"], berlin["across centres"]) == ("1", "0", "1")

    number = {row["name"]: row["alike"] for row in rows(tmp_path / "out" / "look.csv")}
    assert number["Berlin3"] == number["Lund1"] != number["Berlin4"]
    assert len({number[f"Oslo{i}"] for i in range(20)}) == 1


# ---------------------------------------------------------------------------------- a whole look


def test_a_look_says_what_there_is(square_root, capsys):
    seen, effects_of = look.look({"data_root": str(square_root), "image_size": 64})
    text = capsys.readouterr().out
    assert text.startswith(f"PolypGen, in {square_root}; looked at with 64x64 pixels")
    assert "C6 (held out)" in text
    assert "suggestion, to start from: --tau" in text
    assert max(map(len, text.splitlines()[1:])) <= 100

    of_centre = look.count_by_centre(seen)
    assert of_centre == {"C1": 14, "C2": 18, "C3": 26, "C4": 12, "C5": 11, "C6": 10}
    first = [one for one in seen if one.centre == "C1"]
    areas = [one.inverse_area for one in first]
    expected = [f"{value:.1f}" for value in np.quantile(areas, (0.05, 0.25, 0.5, 0.75, 0.95))]
    row = cells(text, "lesions of", "C1")
    small = sum(one.small for one in first)
    assert list(row.values()) == ["C1", "14", "14", "1.00", str(small), *expected]
    assert cells(text, "files of", "C1")["sizes"] == "64x64"
    assert list(effects_of) == ["C1", "C2", "C3", "C4", "C5", "all"]


def test_what_is_said_of_all_is_weighted_by_steps(square_root, capsys):
    given = {"data_root": str(square_root), "image_size": 64, "tau": 40.0}
    _, found = look.look(given)
    steps = {"C1": 2, "C2": 3, "C3": 5, "C4": 2, "C5": 2}  # 11, 14, 20, 9 and 8 images by four
    mean = sum(steps[client] * found[client].eta for client in steps) / 14
    assert found["all"].eta == pytest.approx(mean)
    assert found["C3"].eta != found["C4"].eta


def test_the_suggestion_is_made_of_training_images(square_root, capsys):
    # At 512, lesions are measured as the rule measures them.
    given = {"data_root": str(square_root), "image_size": 512, "centres": ["C1", "C2"]}
    given["out_centre"] = ""
    seen, _ = look.look(given)
    said = capsys.readouterr().out

    # What it would do is what it does when it is chosen.
    words = said[said.index("suggestion") :].split()
    tau = float(words[words.index("--tau") + 1])
    log_base = float(words[words.index("--log-base") + 1])
    _, chosen = look.look({**given, "tau": tau, "log_base": log_base})
    of_choice = f"the effect of --tau {tau:g} --log-base {log_base:g}, before augmentation:"
    assert of_choice in capsys.readouterr().out
    effect = chosen["all"]
    assert f"tau: {effect.small:.1%} of the training images" in said
    assert f"scale {effect.scaled:.1%} of the steps; mean η {effect.eta:.3f}" in said

    # Whatever is tested on may be of any size.
    config = look.choose_config(given)
    federation = fedgs.load_data(config, config.centres)
    others = [one._replace(smallest=1e5) if one.split != "train" else one for one in seen]
    assert look.describe_suggestion(config, federation, others) in said


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
    text = capsys.readouterr().out
    assert text.startswith("PolypGen stand-in, drawn images")
    held_out = cells(text, "lesions of", "C6")["images"]
    assert cells(text, "files of", "C6")["all"] == held_out


def test_slices_are_looked_at_by_all_of_their_lesions(tmp_path, monkeypatch, capsys):
    shrink_stand_ins(monkeypatch, frames=10, volumes=4, slices=4)
    arguments = ["--dataset", "lits", "--data-root", "stand-in", "--cache", tmp_path]
    arguments += ["--image-size", "64", "--centres", "C1", "C5", "--batch-size", "2"]
    assert exit_code(look.main, arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("LiTS stand-in")
    assert "LiTS's with the paper's 1000" in text
    assert "near-duplicates" not in text


def test_drawn_images_are_small_unless_a_size_is_given():
    assert look.choose_config({"data_root": "stand-in"}).image_size == 80
    assert look.choose_config({"data_root": "stand-in", "image_size": 96}).image_size == 96


def test_data_of_ones_own_are_looked_at_even_if_they_are_too_few_to_train(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Berlin": 10, "Oslo": 4})
    text = looked_at(capsys, path)
    assert text.startswith(f"cohort, in {path}")
    assert "too little to train on: centre Oslo has 3 training images" in text
    assert "48x32" in text


def test_where_no_client_can_train_there_are_tables_and_a_picture(tmp_path, capsys):
    path = manifest_of(tmp_path, {"Oslo": 4})
    text = looked_at(capsys, path, "--out", tmp_path / "out")
    assert "no suggestion: no centre has 4 training images for a batch" in text
    assert (tmp_path / "out" / "look.png").exists()


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
    seen, effects_of = look.look({"data_root": str(polypgen_root), "image_size": 80})
    assert effects_of["all"].eta == pytest.approx(1.12, abs=0.01)

    for centre, (images, empty, flagged, quantiles) in SPEC.items():
        here = [one for one in seen if one.centre == centre]
        areas = [one.inverse_area for one in here if one.lesions]
        assert len(here) == images
        # A lesion of the full size may have vanished in resizing.
        assert abs(images - len(areas) - empty) <= 1
        assert sum(one.small for one in here) == flagged
        assert np.percentile(areas, look.QUANTILES) == pytest.approx(quantiles, rel=0.02)
