"""Data of one's own: what a manifest may say, what is said of one that cannot be used, and runs."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import assert_same_weights, exit_code, refused, rows
from PIL import Image

import data
import fedgs
from support import manifest
from support.errors import UserError
from tools import compare, evaluate, predict
from tools import manifest as manifest_tool

CENTRES = ("St. Olav", "Berlin")
TINY = ["--image-size", "32", "--width", "2", "--rounds", "1", "--workers", "1", "--device", "cpu"]


# ------------------------------------------------------------------------------ folders to read


def save(path, pixels):
    """An array as an image file. -> path"""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def frame_and_mask(generator, value=1, height=30, width=40):
    """Noise with a bright lesion, and its mask: 0, and a value."""
    frame = generator.integers(0, 90, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    top, left = generator.integers(0, 15, 2)
    mask[top : top + 8, left : left + 12] = value
    frame[mask > 0] += 150
    return frame, mask


def write_rows(path, table):
    """A table, {column: cell} a row, as a CSV file. -> path"""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def change(root, number, **cells):
    """Change cells of a row of the manifest, which its first one is 2."""
    table = rows(root / "manifest.csv")
    for row in table:
        row.update({name: row.get(name, "") for name in cells})
    table[number - 2].update(cells)
    write_rows(root / "manifest.csv", table)


@pytest.fixture
def cohort(tmp_path):
    """Two centres of ten frames in PNG, with masks of 0 and 1, and their manifest."""
    root = tmp_path / "cohort"
    generator = np.random.default_rng(0)
    table = []
    for centre in CENTRES:
        for i in range(10):
            frame, mask = frame_and_mask(generator)
            name = f"frame{i}.png"
            save(root / centre / "images" / name, frame)
            save(root / centre / "masks" / name, mask)
            paths = {"image": f"{centre}/images/{name}", "mask": f"{centre}/masks/{name}"}
            table.append({"centre": centre, **paths})
    write_rows(root / "manifest.csv", table)
    return root


def write_scan(root, name, labels, values=None, affine=None):
    """A volume and its segmentation in root. -> a row of the manifest"""
    labels = np.asarray(labels)
    if values is None:
        values = np.where(labels > 0, 60, 100)
    affine = np.eye(4) if affine is None else affine
    nibabel.Nifti1Image(np.asarray(values, np.float32), affine).to_filename(root / f"{name}.nii.gz")
    segmentation = nibabel.Nifti1Image(labels.astype(np.float32), affine)
    segmentation.to_filename(root / f"{name}_seg.nii.gz")
    return {"centre": name[0].upper(), "image": f"{name}.nii.gz", "mask": f"{name}_seg.nii.gz"}


@pytest.fixture
def scans(tmp_path):
    """Two centres, A and B, of ten volumes with a lesion in slices 1 and 2 of four."""
    root = tmp_path / "scans"
    root.mkdir()
    labels = np.zeros((16, 20, 4), np.uint8)
    labels[4:9, 5:12, 1:3] = 1
    table = [write_scan(root, f"{centre}{i}", labels) for centre in "ab" for i in range(10)]
    write_rows(root / "manifest.csv", table)
    return root


def load(root, **given):
    """The federation of a manifest, as a run has it."""
    config, _ = fedgs.configure({"dataset": str(root), "image_size": 32, **given})
    return fedgs.load_data(fedgs.settle(config), config.centres)


def everything(federation, centre):
    """{name: index of its part} of a client's images."""
    parts = federation.train, federation.validation, federation.in_test
    return {name: i for i, part in enumerate(parts) for name in part[centre].names}


# ------------------------------------------------------------------------------ what is read of it


def test_what_a_manifest_is_read_as(cohort):
    federation = load(cohort)
    assert federation.source == "cohort"
    assert federation.place == f"in {cohort / 'manifest.csv'}"
    assert federation.notes == ["size flags by rule", "lesion is 1 in a mask"]
    assert list(federation.train) == list(CENTRES)
    assert (federation.out_centre, federation.out_test) == ("", None)
    for centre in CENTRES:
        assert federation.facts[centre][:5] == (8, 1, 1, 0, 0)
    images = federation.train["Berlin"]
    assert images.images.shape == (8, 3, 32, 32)
    assert images.names == [f"frame{i}" for i in range(2, 10)]
    inside = images.masks.bool().expand_as(images.images)
    assert images.images[inside].float().mean() > images.images[~inside].float().mean() + 80


@pytest.mark.parametrize(
    ("name", "called"), [("manifest.csv", "cohort"), ("Köln 2.csv", "Köln 2"), ("a.B.CSV", "a.B")]
)
def test_data_are_called_as_the_user_calls_them(cohort, name, called, monkeypatch):
    path = (cohort / "manifest.csv").rename(cohort / name)
    assert load(path).source == called
    monkeypatch.chdir(cohort)
    assert fedgs.configure({"dataset": name})[0].dataset == called
    if name == "manifest.csv":
        assert fedgs.configure({"dataset": "."})[0].dataset == "cohort"


def test_the_default_place_of_own_data(cohort, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    cohort.rename(tmp_path / "datasets" / "cohort")
    config, why = fedgs.configure({"dataset": "cohort", "device": "cpu"})
    assert (config.dataset, config.data_root) == ("cohort", "")
    assert len(fedgs.load_data(config, config.centres).train) == 2
    assert (config.preset, why) == ("quick", "real data and no GPU")
    with pytest.raises(UserError, match="stand-in: no manifest there"):
        fedgs.configure({"dataset": "cohort", "data_root": "stand-in"})


def test_what_follows_from_a_manifest(cohort, scans):
    config, _ = fedgs.configure({"dataset": str(cohort), "preset": "paper"})
    assert (config.images, config.centres, config.out_centre) == ("colour", CENTRES, "")
    assert (config.tau, config.log_base, config.split) == (150, 100, "fold")
    config, _ = fedgs.configure({"dataset": str(scans), "preset": "paper"})
    assert (config.images, config.centres, config.out_centre) == ("slices", ("A", "B"), "")
    assert (config.tau, config.log_base, config.split) == (1000, 1000, "fold")
    given = {"tau": 9.0, "out_centre": "B", "centres": ["B", "A"], "split": "centre"}
    config, _ = fedgs.configure({"dataset": str(scans), **given})
    assert (config.tau, config.out_centre, config.split) == (9, "B", "centre")
    assert config.centres == ("B", "A")


def test_rows_in_any_order_and_tables_of_spreadsheets(cohort):
    """Semicolons, a byte order mark, capitals, empty lines, the other slash, further columns."""
    before = load(cohort)
    table = rows(cohort / "manifest.csv")[::-1]
    lines = ["Image;Mask;CENTRE;remark", ";;;"]
    for row in table:
        image = row["image"].replace("/", "\\")
        lines.append(f'{image};{row["mask"]}; {row["centre"]} ;"seen; twice"')
    (cohort / "manifest.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8-sig")
    after = load(cohort)
    assert list(after.train) == list(CENTRES)[::-1]
    assert after.fingerprint == before.fingerprint


def test_a_name_in_either_way_of_writing_it(cohort):
    """macOS writes an accent as a letter of its own."""
    text = (cohort / "manifest.csv").read_text().replace("Berlin,", "Malm\u00f6,")
    first, _, rest = text.partition("Malm\u00f6,")
    (cohort / "manifest.csv").write_text(f"{first}Malmo\u0308,{rest}", encoding="utf-8")
    assert list(load(cohort).train) == ["St. Olav", "Malm\u00f6"]


def test_paths_may_lead_anywhere(cohort, tmp_path):
    table = rows(cohort / "manifest.csv")
    for row in table:
        row["image"] = str(cohort / row["image"])
        row["mask"] = f"cohort/{row['mask']}"
    moved = write_rows(tmp_path / "moved.csv", table)
    assert load(moved).fingerprint == load(cohort).fingerprint


def test_names_tell_images_of_a_centre_apart(cohort):
    (cohort / "Berlin" / "images" / "later").mkdir()
    source = cohort / "Berlin" / "images" / "frame1.png"
    source.rename(source.parent / "later" / "frame0.png")
    change(cohort, 13, image="Berlin/images/later/frame0.png")
    names = everything(load(cohort), "Berlin")
    assert {"frame0", "later/frame0", "frame2"} < set(names)
    assert "frame1" not in names


def test_groups_stay_together(cohort):
    table = rows(cohort / "manifest.csv")
    for i, row in enumerate(table):
        row["group"] = f"video {i % 3}" if i < 15 else ""
    write_rows(cohort / "manifest.csv", table)
    for split, folds in (("fold", range(1, 6)), ("grouped", (2,)), ("centre", (1,))):
        for fold in folds:
            federation = load(cohort, split=split, fold=fold)
            for centre, start, end in (("St. Olav", 0, 10), ("Berlin", 10, 15)):
                part_of = everything(federation, centre)
                for video in range(3):
                    chosen = [i % 10 for i in range(start, end) if i % 3 == video]
                    assert len({part_of[f"frame{i}"] for i in chosen}) == 1
            assert len(everything(federation, "Berlin")) == 10


def test_near_duplicates_are_looked_for_without_groups(cohort):
    frames = cohort / "Berlin" / "images"
    shutil.copy(frames / "frame0.png", frames / "frame9.png")
    part_of = everything(load(cohort, split="grouped"), "Berlin")
    assert part_of["frame0"] == part_of["frame9"]
    assert len(set(part_of.values())) > 1


def test_a_split_that_is_given(cohort):
    table = rows(cohort / "manifest.csv")
    parts = ["val", "test", "train", "TRAIN", *["train"] * 6]
    for i, row in enumerate(table):
        row["split"] = parts[i % 10]
    write_rows(cohort / "manifest.csv", table)
    federation = load(cohort)
    for centre in CENTRES:
        part_of = everything(federation, centre)
        assert (part_of["frame0"], part_of["frame1"], part_of["frame2"]) == (1, 2, 0)
        assert federation.facts[centre][:3] == (8, 1, 1)

    # Folds are there for whoever asks for them; the held-out centre has no parts.
    assert load(cohort, split="fold", fold=3).in_test["Berlin"].names != ["frame1"]
    held_out = load(cohort, out_centre="Berlin")
    assert len(held_out.out_test) == 10
    assert list(held_out.train) == ["St. Olav"]


def test_files_of_other_centres_may_be_elsewhere(cohort):
    """Where several machines train, each has its own clients' images."""
    shutil.rmtree(cohort / "St. Olav")
    config, _ = fedgs.configure({"dataset": str(cohort), "image_size": 32})
    here = fedgs.load_data(config, ["Berlin"])
    assert list(here.train) == ["Berlin"]
    with pytest.raises(UserError, match=r"row 2: there is no file .*St. Olav/images/frame0\.png"):
        fedgs.load_data(config, config.centres)


def test_size_flags_of_a_manifest(cohort):
    for number, flag in ((12, "TRUE"), (13, "1"), (14, "false"), (15, "0")):
        change(cohort, number, small=flag)
    federation = load(cohort, tau=2.0, out_centre="Berlin")  # at most half of an image: all are
    assert federation.out_test.small.tolist() == [True, True, False, False, *[True] * 6]
    assert federation.notes[0] == "size flags of the manifest for 4 of 20 images"


def test_masks_that_look_inverted_are_said(cohort):
    map_masks(cohort, lambda mask: 1 - mask)
    notes = load(cohort).notes
    assert "lesions fill most images of Berlin: are its masks inverted?" in notes
    assert not any("St. Olav" in note for note in notes)


def test_each_centre_may_write_masks_in_its_own_way(cohort):
    before = load(cohort)
    map_masks(cohort, lambda mask: mask * 255)
    after = load(cohort)
    assert after.fingerprint == before.fingerprint
    assert after.notes[1:] == [
        "lesion is 1 in a mask (St. Olav)",
        "lesion is 255 in a mask (Berlin)",
    ]
    map_masks(cohort, lambda mask: mask // 255 + 1)
    chosen = load(cohort, lesion=[2, 1], centres=["Berlin"])
    assert chosen.notes[1] == "lesion is 2 or 1 in a mask"
    assert chosen.train["Berlin"].masks.all()


def test_grey_images_have_one_channel(cohort):
    """Also those that are saved in colour; one that shows some makes all of them colour."""
    for path in cohort.rglob("images/*.png"):
        grey = Image.open(path).convert("L")
        (grey.convert("RGB") if "Berlin" in path.parts else grey).save(path)
    federation = load(cohort)
    assert federation.train["St. Olav"].images.shape[1] == 1
    assert federation.train["Berlin"].images.shape[1] == 1
    assert load(cohort, images="colour").train["Berlin"].images.shape[1] == 3

    red = np.zeros((30, 40, 3), np.uint8)
    red[..., 0] = 200
    save(cohort / "Berlin" / "images" / "frame3.png", red)
    assert load(cohort).train["St. Olav"].images.shape[1] == 3
    assert load(cohort, images="grey").train["St. Olav"].images.shape[1] == 1


def test_a_window_of_deep_images(cohort):
    for path in cohort.rglob("images/*.png"):
        grey = np.asarray(Image.open(path).convert("L"))
        save(path, grey.astype(np.uint16) * 16)
    whole = load(cohort, window=[0.0, 4080.0]).train["Berlin"]
    half = load(cohort, window=[0.0, 2040.0]).train["Berlin"]
    assert whole.images.max() < 250
    assert half.images.max() == 255
    assert half.images.float().mean() > 1.7 * whole.images.float().mean()


# --------------------------------------------------------------------------- volumes of a manifest


def test_volumes_become_slices_with_a_lesion(scans):
    """Of patients who stay in one split, and small by all of a slice's lesion."""
    federation = load(scans, out_centre="B", tau=9.2)
    assert federation.notes == ["slices with a lesion", "lesion is 1 in a mask"]
    assert federation.out_test.names == [f"b{i}_slice-{k}" for i in range(10) for k in (1, 2)]
    assert federation.out_test.images.shape == (20, 1, 32, 32)
    assert federation.out_test.inverse_area.tolist() == pytest.approx([320 / 35] * 20)
    assert not federation.out_test.small.any()
    assert load(scans, out_centre="B", tau=9.1).out_test.small.all()
    assert federation.out_test.spacing.tolist() == [[0.5, 20 / 32]] * 20
    part_of = everything(federation, "A")
    for i in range(10):
        assert part_of[f"a{i}_slice-1"] == part_of[f"a{i}_slice-2"]


def test_a_volume_without_a_lesion_has_no_say_in_what_one_is(scans):
    for name in ("b0", "b4"):
        write_scan(scans, name, np.zeros((16, 20, 4)))
    federation = load(scans, out_centre="B")
    assert len(federation.out_test) == 16
    assert federation.notes == ["slices with a lesion", "lesion is 1 in a mask"]


def test_labels_and_windows_of_volumes(scans):
    labels = np.zeros((16, 20, 4))
    labels[4:9, 5:12, 1:3] = 1
    labels[4:6, 5:7, 2] = 2
    values = np.linspace(0, 4000, labels.size).reshape(labels.shape)
    for row in rows(scans / "manifest.csv"):
        write_scan(scans, row["image"].removesuffix(".nii.gz"), labels, values)
    both = load(scans, lesion=[1, 2], out_centre="B").out_test
    tumour = load(scans, lesion=[2], out_centre="B").out_test
    assert len(both) == 20
    assert tumour.names == [f"b{i}_slice-2" for i in range(10)]
    assert tumour.inverse_area.tolist() == [320 / 4] * 10

    # Without a window percentiles of the volume are black and white.
    low, high = np.percentile(values, [0.5, 99.5])
    middle = values[:, :, 2].mean()
    assert tumour.images.float().mean() == pytest.approx(255 * (middle - low) / (high - low), abs=2)
    darker = load(scans, lesion=[2], out_centre="B", window=[0.0, 40000.0]).out_test
    assert darker.images.float().mean() == pytest.approx(255 * middle / 40000, abs=2)


def test_slices_are_cut_once(scans, tmp_path, monkeypatch):
    first = load(scans)
    assert len(list((scans / "fedgs-cache").iterdir())) == 20
    load(scans, cache=str(tmp_path / "elsewhere"), centres=["A"])
    assert len(list((tmp_path / "elsewhere").iterdir())) == 10
    monkeypatch.setattr(data.volumes, "cut_slices", None)
    assert load(scans).fingerprint == first.fingerprint


def test_rounded_affines_are_no_other_place(scans):
    path = scans / "b3_seg.nii.gz"
    labels = np.asarray(nibabel.load(path).dataobj)
    affine = np.eye(4)
    affine[:3, 3] = 0.2
    nibabel.Nifti1Image(labels, affine).to_filename(path)
    assert len(load(scans, out_centre="B").out_test) == 20


# ------------------------------------------------------------------------- as the known data sets


def test_polypgens_frames_through_a_manifest(square_root, tmp_path):
    """The same records, splits and bits; only the data's name is another."""
    table = []
    for centre in data.CENTRES["polypgen"]:
        for image, mask in data.list_pairs(square_root, centre):
            table.append({"centre": centre, "image": str(image), "mask": str(mask)})
    path = write_rows(tmp_path / "squares.csv", table)
    how = {"image_size": 48, "fold": 3, "out_centre": "C6"}
    own = load(path, **how)
    config, _ = fedgs.configure({"data_root": str(square_root), **how})
    published = fedgs.load_data(config, config.centres)
    assert own.fingerprint == published.fingerprint
    assert own.source == "squares"
    for centre in own.train:
        assert own.train[centre].names == published.train[centre].names
        assert own.facts[centre][:6] == published.facts[centre][:6]


def test_lits_volumes_through_a_manifest(tmp_path):
    labels = np.ones((16, 20, 4))
    labels[3:12, 3:12, :3] = 2
    values = np.random.default_rng(0).integers(-300, 300, labels.shape)
    table = []
    for number in (0, 7, 120):
        row = write_scan(tmp_path, f"x{number}", labels, values)
        image = (tmp_path / row["image"]).rename(tmp_path / f"volume-{number}.nii.gz")
        mask = (tmp_path / row["mask"]).rename(tmp_path / f"segmentation-{number}.nii.gz")
        centre = "C5" if number == 120 else "C1"
        table.append({"centre": centre, "image": image.name, "mask": mask.name})
    write_rows(tmp_path / "ct.csv", table)

    how = {"image_size": 32, "centres": ["C1", "C5"], "out_centre": "C5", "split": "centre"}
    own = load(tmp_path / "ct.csv", lesion=[2], window=[-200.0, 200.0], **how)
    config, _ = fedgs.configure({"dataset": "lits", "data_root": str(tmp_path), **how})
    published = fedgs.load_data(config, config.centres)
    assert own.fingerprint == published.fingerprint
    assert len(own.out_test) == 3


def test_a_stand_in_is_called_one_through_a_manifest_too(cohort):
    (cohort / "STAND-IN.txt").write_text("Drawn by FedGS")
    change(cohort, 2, small="1")
    federation = load(cohort)
    assert federation.source == "cohort stand-in"
    assert federation.notes[0] == "size flags by rule"


# --------------------------------------------------------------------- what cannot be used: tables


def text(root, content, encoding="utf-8"):
    (root / "manifest.csv").write_bytes(content.encode(encoding))


def no_manifest(root):
    (root / "manifest.csv").unlink()


def no_folder(root):
    shutil.rmtree(root)


def empty_file(root):
    text(root, "")


def header_alone(root):
    text(root, "centre,image,mask\n")


def no_mask_column(root):
    text(root, "centre,image\nA,a.png\n")


def column_twice(root):
    text(root, "centre,image,mask,group,group\nA,a.png,b.png,1,2\n")


def column_misspelt(root):
    text(root, "centre,image,mask,groups\nA,a.png,b.png,1\n")


def other_encoding(root):
    text(root, "centre,image,mask\nÅrhus,a.png,b.png\n", "latin-1")


def unicode_of_windows(root):
    text(root, "centre,image,mask\nA,a.png,b.png\n", "utf-16")


def no_table(root):
    shutil.copy(root / "Berlin" / "masks" / "frame0.png", root / "manifest.csv")


def quote_left_open(root):
    text(root, 'centre,image,mask\nA,"a.png,b.png\n')


def comma_in_a_path(root):
    text(root, "centre,image,mask\nA,a,b.png,c.png\n")


def cell_missing(root):
    text(root, "centre,image,mask\nA,a.png\n")


def no_centre(root):
    change(root, 3, centre="")


def no_mask(root):
    change(root, 4, mask=" ")


def slash_in_a_centre(root):
    change(root, 3, centre="Berlin/Mitte")


def centre_that_legends_hide(root):
    change(root, 3, centre="_Berlin")


def two_spellings(root):
    change(root, 13, centre="berlin")


def image_missing(root):
    (root / "Berlin" / "images" / "frame3.png").unlink()


def mask_missing(root):
    (root / "Berlin" / "masks" / "frame3.png").unlink()


def image_is_a_folder(root):
    change(root, 2, image="Berlin/images")


def path_that_cannot_be(root):
    change(root, 2, image="Berlin\0.png")


def own_mask(root):
    change(root, 2, mask="St. Olav/images/frame0.png")


def image_twice(root):
    change(root, 5, image="Berlin/../St. Olav/images/frame0.png")


def name_twice(root):
    frame = root / "Berlin" / "images" / "frame0.png"
    Image.open(frame).save(frame.with_suffix(".jpg"))
    change(root, 13, image="Berlin/images/frame0.jpg")


def small_in_words(root):
    change(root, 6, small="tiny")


def unknown_split(root):
    change(root, 6, split="dev")


def split_of_one_row(root):
    change(root, 6, split="train")


def parted_group(root):
    table = rows(root / "manifest.csv")
    for i, row in enumerate(table):
        row["group"] = "patient 7" if i in (3, 8) else ""
        row["split"] = "test" if i == 8 else "train"
    write_rows(root / "manifest.csv", table)


def volume_among_images(root):
    row = write_scan(root, "berlin", np.ones((4, 4, 2)))
    change(root, 20, image=row["image"], mask=row["mask"])


def mask_is_a_volume(root):
    row = write_scan(root, "berlin", np.ones((4, 4, 2)))
    change(root, 20, mask=row["mask"])


TABLES = [
    (no_manifest, ("cohort: no manifest there", "tools.manifest")),
    (no_folder, ("cohort: no manifest there", "--dataset")),
    (empty_file, ("manifest.csv has no column centre, image, mask",)),
    (header_alone, ("manifest.csv has no rows",)),
    (no_mask_column, ("manifest.csv has no column mask",)),
    (column_twice, ("manifest.csv has two columns group",)),
    (column_misspelt, ("column groups is not read", "group")),
    (other_encoding, ("cannot read", "manifest.csv", "UTF-8")),
    (unicode_of_windows, ("cannot read", "manifest.csv", "UTF-8")),
    (no_table, ("cannot read", "manifest.csv", "UTF-8")),
    (quote_left_open, ("manifest.csv, row 2",)),
    (comma_in_a_path, ("manifest.csv, row 2: 4 cells for 3 columns", "quotes")),
    (cell_missing, ("manifest.csv, row 2: 2 cells for 3 columns",)),
    (no_centre, ("manifest.csv, row 3: centre is empty",)),
    (no_mask, ("manifest.csv, row 4: mask is empty",)),
    (slash_in_a_centre, ("row 3", "'Berlin/Mitte' cannot be the name of a centre", "letters")),
    (centre_that_legends_hide, ("row 3", "'_Berlin' cannot be the name of a centre")),
    (two_spellings, ("row 13: centre berlin is Berlin in row 12", "row 12")),
    (image_missing, ("row 15: there is no file", "cohort/Berlin/images/frame3.png")),
    (mask_missing, ("row 15: there is no file", "cohort/Berlin/masks/frame3.png")),
    (image_is_a_folder, ("row 2: there is no file", "cohort/Berlin/images")),
    (path_that_cannot_be, ("cannot read", "manifest.csv: it is no text")),
    (own_mask, ("row 2", "frame0.png is the image and its mask")),
    (image_twice, ("row 5", "frame0.png is in row 2, too")),
    (name_twice, ("row 13", "frame0.jpg has the name of", "frame0.png in row 12")),
    (small_in_words, ("row 6: small is 'tiny', none of true",)),
    (unknown_split, ("row 6: split is 'dev', none of train",)),
    (split_of_one_row, ("row 2: split is empty",)),
    (parted_group, ("row 10: group patient 7 of St. Olav is in test", "train in row 5")),
    (volume_among_images, ("row 20", "berlin.nii.gz", "of two kinds")),
    (mask_is_a_volume, ("row 20", "berlin_seg.nii.gz is a volume, the other none")),
]


# ------------------------------------------------------------------ what cannot be used: images


def masks_of(root, centre="Berlin"):
    return sorted((root / centre / "masks").iterdir())


def map_masks(root, function, suffix=".png", **how):
    """Replace Berlin's masks by functions of them, perhaps in another format."""
    table = rows(root / "manifest.csv")
    for path in masks_of(root):
        mask = np.asarray(Image.open(path))
        path.unlink()
        Image.fromarray(function(mask)).save(path.with_suffix(suffix), **how)
    for row in table:
        if row["centre"] == "Berlin":
            row["mask"] = row["mask"].replace(".png", suffix)
    write_rows(root / "manifest.csv", table)


def empty_masks(root):
    map_masks(root, np.zeros_like)


def full_masks(root):
    map_masks(root, lambda mask: np.full_like(mask, 255))


def classes(root):
    map_masks(root, lambda mask: mask + (np.arange(40) < 3).astype(np.uint8))


def either_way_of_writing(root):
    save(masks_of(root)[4], 255 * np.asarray(Image.open(masks_of(root)[4])))


def classes_saved_with_loss(root):
    map_masks(root, lambda mask: 9 * mask, ".jpg", quality=60)


def photographs(root):
    for path in masks_of(root):
        grey = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
        save(path, grey)


def one_dim_among_bright(root):
    map_masks(root, lambda mask: 255 * mask, ".jpg", quality=30)
    path = root / "Berlin" / "masks" / "frame4.jpg"
    pixels = np.zeros((30, 40), np.uint8)
    pixels[8:16, 8:16] = 60
    Image.fromarray(pixels).save(path)


def lesions_by_number(root):
    deep = np.arange(30 * 40).reshape(30, 40) // 9
    map_masks(root, lambda mask: deep.astype(np.uint16))


def coloured(root):
    red = np.array([255, 0, 0], np.uint8)
    map_masks(root, lambda mask: mask[..., None] * red)


def transparent(root):
    map_masks(root, lambda mask: np.dstack([0 * mask] * 3 + [255 * mask]))


def probabilities(root):
    map_masks(root, lambda mask: mask.astype(np.float32) * 0.7, ".tif")


def negative(root):
    map_masks(root, lambda mask: -mask.astype(np.int32), ".tif")


def other_shape(root):
    save(masks_of(root)[2], np.ones((30, 30), np.uint8))


def turned_image(root):
    path = root / "Berlin" / "images" / "frame5.png"
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    Image.open(path).save(path, exif=turned)


def truncated(root):
    path = root / "Berlin" / "images" / "frame5.png"
    path.write_bytes(path.read_bytes()[:900])


def no_image(root):
    (root / "Berlin" / "images" / "frame5.png").write_text("no image")


def no_mask_image(root):
    (root / "Berlin" / "masks" / "frame5.png").write_text("no image")


def stack(root):
    pages = [Image.new("RGB", (40, 30)) for _ in range(3)]
    path = root / "Berlin" / "images" / "frame5.png"
    pages[0].save(path, "TIFF", save_all=True, append_images=pages[1:])


def no_numbers(root):
    path = root / "Berlin" / "images" / "frame5.png"
    Image.fromarray(np.full((30, 40), np.nan, np.float32)).save(path, "TIFF")


IMAGES = [
    (empty_masks, ("masks of centre Berlin are all empty", "frame0.png", "--centres")),
    (full_masks, ("masks of centre Berlin hold nothing but 255", "frame0.png")),
    (classes, ("centre Berlin hold the values 0, 1, 2", "2 in", "frame", "--lesion 2")),
    (
        either_way_of_writing,
        ("centre Berlin hold the values 0, 1, 255", "frame4.png", "--lesion 1 255"),
    ),
    (classes_saved_with_loss, ("centre Berlin", ".jpg", "saved with loss", "0 and 1")),
    (photographs, ("centre Berlin are grey", "frame0.png", "photographs")),
    (one_dim_among_bright, ("frame4.jpg has no pixel brighter than 128", "0 and 255")),
    (lesions_by_number, ("centre Berlin hold", "values from 0 to 133", "one for each lesion")),
    (coloured, ("frame0.png is coloured", "grey")),
    (transparent, ("frame0.png has transparent pixels",)),
    (probabilities, ("frame0.tif holds values that are no whole numbers",)),
    (negative, ("frame0.tif holds values that are no whole numbers",)),
    (other_shape, ("frame2.png is 30x30, its image 40x30",)),
    (turned_image, ("frame5.png is 40x30, its image 30x40", "EXIF")),
    (truncated, ("cannot read", "frame5.png")),
    (no_image, ("cannot read", "frame5.png", "no image")),
    (no_mask_image, ("cannot read", "masks/frame5.png")),
    (stack, ("frame5.png holds 3 images",)),
    (no_numbers, ("frame5.png holds values that are no numbers",)),
]


# ----------------------------------------------------------------- what cannot be used: volumes


def rewrite(root, labels, **how):
    """Volume b3 anew."""
    write_scan(root, "b3", labels, **how)


def one_slice_less(root):
    labels = np.zeros((16, 20, 3))
    nibabel.Nifti1Image(labels, np.eye(4)).to_filename(root / "b3_seg.nii.gz")


def moved(root):
    """By an origin that somebody has forgotten to copy."""
    labels = np.asarray(nibabel.load(root / "b3_seg.nii.gz").dataobj)
    affine = np.eye(4)
    affine[0, 3] = 40
    nibabel.Nifti1Image(labels, affine).to_filename(root / "b3_seg.nii.gz")


def mirrored(root):
    labels = np.asarray(nibabel.load(root / "b3_seg.nii.gz").dataobj)
    nibabel.Nifti1Image(labels, np.diag([-1.0, 1, 1, 1])).to_filename(root / "b3_seg.nii.gz")


def liver_and_tumour(root):
    labels = np.ones((16, 20, 4))
    labels[3:9, 3:9, 1] = 2
    rewrite(root, labels)


def another_label(root):
    rewrite(root, np.full((16, 20, 4), 3))


def no_lesion_anywhere(root):
    for i in range(10):
        write_scan(root, f"b{i}", np.zeros((16, 20, 4)))


def fractions(root):
    rewrite(root, np.full((16, 20, 4), 0.5))


def gaps(root):
    labels = np.zeros((16, 20, 4))
    labels[3:9, 3:9, 1] = 1
    rewrite(root, labels, values=np.full((16, 20, 4), np.nan))


def cut_short(root):
    path = root / "b3.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])


def four_dimensions(root):
    nibabel.Nifti1Image(np.zeros((4, 4, 2, 2)), np.eye(4)).to_filename(root / "b3.nii.gz")


def flagged_volume(root):
    change(root, 15, small="true")


VOLUMES = [
    (one_slice_less, ("b3_seg.nii.gz is of shape (16, 20, 3), its volume (16, 20, 4)",)),
    (moved, ("b3_seg.nii.gz lies up to 40.0 mm away", "b3.nii.gz", "affines differ")),
    (mirrored, ("b3_seg.nii.gz lies up to 30.0 mm away", "affines differ")),
    (liver_and_tumour, ("b3_seg.nii.gz holds the labels 1, 2", "--lesion 2")),
    (another_label, ("centre B have the label 1 in", "b0_seg.nii.gz", "3 in", "b3_seg.nii.gz")),
    (no_lesion_anywhere, ("no slice with a lesion in centre B", "b0_seg.nii.gz", "--lesion")),
    (fractions, ("b3_seg.nii.gz holds the label 0.5", "whole number")),
    (gaps, ("b3.nii.gz holds values that are no numbers",)),
    (cut_short, ("cannot read", "b3.nii.gz")),
    (four_dimensions, ("b3.nii.gz has 4 dimensions",)),
    (flagged_volume, ("row 15: small says nothing of a volume",)),
]


def files_below(folder):
    """{path: its content}, but for the cache of slices."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and "fedgs-cache" not in path.parts:
            found[path] = path.read_bytes()
    return found


def assert_refused(capsys, root, words, *options):
    """One line, exit code 2, and nothing is written."""
    before = files_below(root.parent)
    arguments = ["--dataset", root, "--out", root.parent / "run", *TINY, *options]
    refused(capsys, exit_code(fedgs.main, arguments), *words)
    assert files_below(root.parent) == before
    assert not (root.parent / "run").exists()


@pytest.mark.parametrize(("harm", "words"), TABLES + IMAGES)
def test_what_cannot_be_used_is_named(cohort, capsys, harm, words):
    harm(cohort)
    assert_refused(capsys, cohort, words)


@pytest.mark.parametrize(("harm", "words"), VOLUMES)
def test_volumes_that_cannot_be_used_are_named(scans, capsys, harm, words):
    harm(scans)
    assert_refused(capsys, scans, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--centres", "Oslo", "Berlin"), ("--centres Oslo Berlin: must be among", "St. Olav")),
        (("--out-centre", "Oslo"), ("--out-centre Oslo: must be among",)),
        (("--images", "slices"), ("--images slices", "manifest.csv", "colour or grey")),
        (("--split", "given"), ("--split given", "manifest.csv", "no column split")),
        (("--data-root", "elsewhere"), ("--dataset", "leave out --data-root")),
        (("--lesion", "7"), ("--lesion 7", "centre St. Olav", "0, 1")),
        (("--lesion", "-1"), ("--lesion -1", "above 0")),
        (("--lesion", "tumour"), ("--lesion", "tumour")),
        (("--window", "0", "99"), ("--window 0.0 99.0", "grey")),
        (("--batch-size", "9"), ("St. Olav has 8 training images", "--batch-size 9")),
    ],
)
def test_options_that_do_not_suit_it(cohort, capsys, options, words):
    assert_refused(capsys, cohort, words, *options)


def test_centres_elsewhere_are_those_that_are_named(cohort):
    """Hospitals have a manifest each, of one centre. Of PolypGen all centres are known."""
    config, _ = fedgs.configure({"dataset": str(cohort), "centres": ["St. Olav", "Oslo"]})
    assert fedgs.settle(config, elsewhere=True).centres == ("St. Olav", "Oslo")
    with pytest.raises(UserError, match="Oslo Oslo: names a centre twice"):
        fedgs.settle(replace(config, centres=("St. Olav", "Oslo", "Oslo")), elsewhere=True)
    with pytest.raises(UserError, match="--centres Oslo C6: must be among C1"):
        fedgs.settle(fedgs.Config(centres=("Oslo", "C6")), elsewhere=True)


@pytest.mark.parametrize("name", ["polypgen.csv", "LiTS.csv", "a$b.csv", "-my.csv"])
def test_names_that_own_data_cannot_have(cohort, capsys, name):
    path = (cohort / "manifest.csv").rename(cohort / name)
    arguments = [f"--dataset={path}", "--out", cohort.parent / "run", *TINY]
    refused(capsys, exit_code(fedgs.main, arguments), name, "cannot be the name of a data set")
    assert not (cohort.parent / "run").exists()


# ------------------------------------------------------------------------------------ a first one


def guess(folder, *options):
    """What tools.manifest writes. -> (exit code, rows)"""
    code = exit_code(manifest_tool.main, [folder, *options])
    path = folder / "manifest.csv"
    return code, rows(path) if path.exists() else []


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["A/images/1.png", "A/masks/1.png", "B b/images/x.jpg", "B b/masks/x_mask.png"],
            ["A,A/images/1.png,A/masks/1.png", "B b,B b/images/x.jpg,B b/masks/x_mask.png"],
        ),
        (
            ["imagesTr/c_001_0000.nii.gz", "labelsTr/c_001.nii.gz", "imagesTs/c_2_0000.nii.gz"],
            ["FOLDER,imagesTr/c_001_0000.nii.gz,labelsTr/c_001.nii.gz"],
        ),
        (
            ["A/imagesTr/1_0000.png", "A/labelsTr/1.png", "A/dataset.json"],
            ["A,A/imagesTr/1_0000.png,A/labelsTr/1.png"],
        ),
        (
            ["A/7.png", "A/7_seg.png", "A/7_overlay.png", "B/7.tif", "B/mask-7.tif", "B/._7.png"],
            ["A,A/7.png,A/7_seg.png", "B,B/7.tif,B/mask-7.tif"],
        ),
        (
            ["volume-3.nii", "segmentation-3.nii", "fedgs-cache/volume-3/slice-1.png"],
            ["FOLDER,volume-3.nii,segmentation-3.nii"],
        ),
        (
            ["data_C1/images_C1/a.jpg", "data_C1/masks_C1/a_mask.jpg"],
            ["data_C1,data_C1/images_C1/a.jpg,data_C1/masks_C1/a_mask.jpg"],
        ),
        (
            ["images/A/frame_0001.png", "labels/A/frame_0001.png", "images/A/frame_0000.png"],
            ["A,images/A/frame_0001.png,labels/A/frame_0001.png"],
        ),
        (
            ["A/p1/images/0.png", "A/p1/masks/0.png", "A/p2/0.png", "A/p2/0 label.png"],
            ["A,A/p1/images/0.png,A/p1/masks/0.png,p1", "A,A/p2/0.png,A/p2/0 label.png,p2"],
        ),
        (
            ["A/img_1.png", "A/img_1_mask.png", "A/2_image.png", "A/2_gt.png"],
            ["A,A/img_1.png,A/img_1_mask.png", "A,A/2_image.png,A/2_gt.png"],
        ),
    ],
)
def test_layouts_that_are_understood(tmp_path, files, expected):
    folder = tmp_path / "FOLDER"
    touch(folder, *files)
    code, found = guess(folder)
    assert code == 0
    assert [",".join(row.values()) for row in found] == expected


def test_what_is_left_out_is_said(tmp_path, capsys):
    touch(tmp_path, "A/images/1.png", "A/masks/1.png", "A/images/2.png", "A/masks/3.png")
    touch(tmp_path, "B/images/1.png", "B/masks/1_mask.png", "B/masks/1_label.png")
    touch(tmp_path, "C/imagesTr/1_0000.png", "C/imagesTr/1_0001.png", "C/labelsTr/1.png")
    code, found = guess(tmp_path)
    assert (code, len(found)) == (0, 2)
    text = capsys.readouterr().out
    assert "2 images with masks, by centre: A 1, C 1" in text
    assert "left out: files without a mask (1), as" in text and "A/images/2.png" in text
    assert "left out: files without an image (1), as" in text and "A/masks/3.png" in text
    assert "left out: files of several that may belong together (3)" in text
    assert "left out: files that are further channels (1)" in text and "1_0001.png" in text
    assert "few images: A, C" in text
    for program in ("-m tools.look", "fedgs.py"):
        assert f": python {program} --dataset {tmp_path / 'manifest.csv'}\n" in text


def test_a_manifest_elsewhere(cohort, tmp_path):
    out = tmp_path / "tables" / "my.csv"
    (cohort / "manifest.csv").unlink()
    assert guess(cohort, "--out", out) == (0, [])
    assert rows(out)[0]["image"].startswith("../cohort/Berlin/images/")
    assert load(out).source == "my"


def nothing_there(folder):
    pass


def no_pairs(folder):
    touch(folder, "A/1.png", "A/2.png")


def two_kinds(folder):
    touch(folder, "A/1.png", "A/1_mask.png", "B/1.nii", "B/1_seg.nii")


def centre_with_a_dollar(folder):
    touch(folder, "A$/1.png", "A$/1_mask.png")


@pytest.mark.parametrize(
    ("harm", "options", "words"),
    [
        (nothing_there, (), ("0 images, but none that has a mask", "HOSPITAL/images")),
        (no_pairs, (), ("2 images, but none that has a mask",)),
        (two_kinds, (), ("images and volumes",)),
        (centre_with_a_dollar, (), ("'A$' cannot be the name of a centre", "rename")),
        (no_pairs, ("--out", "my.txt"), ("--out my.txt: must end in .csv",)),
        (no_pairs, ("--out", "LITS.csv"), ("LITS.csv", "cannot be the name of a data set")),
    ],
)
def test_folders_of_which_there_is_no_manifest(tmp_path, capsys, harm, options, words):
    folder = tmp_path / "FOLDER"
    folder.mkdir()
    harm(folder)
    before = files_below(tmp_path)
    refused(capsys, exit_code(manifest_tool.main, [folder, *options]), *words)
    assert files_below(tmp_path) == before


def test_no_manifest_is_overwritten(cohort, capsys):
    before = (cohort / "manifest.csv").read_bytes()
    refused(capsys, exit_code(manifest_tool.main, [cohort]), "manifest.csv is there already")
    refused(capsys, exit_code(manifest_tool.main, [cohort / "none"]), "none: no such folder")
    assert (cohort / "manifest.csv").read_bytes() == before


# ---------------------------------------------------------------------------- from folder to tables


@pytest.fixture
def hospitals(tmp_path):
    """Three of them, with PNG frames and masks of 0 and 1, as somebody brings them along."""
    generator = np.random.default_rng(1)
    root = tmp_path / "three hospitals"
    for hospital, count in {"St. Olav": 11, "Århus 2": 12, "Berlin-Mitte": 13}.items():
        for i in range(count):
            frame, mask = frame_and_mask(generator)
            save(root / hospital / "images" / f"frame{i:02}.png", frame)
            save(root / hospital / "masks" / f"frame{i:02}.png", mask)
    return root


def train(root, out, *options):
    arguments = ["--dataset", root, "--out", out, *TINY, *options]
    return exit_code(fedgs.main, arguments)


@pytest.mark.slow
def test_three_hospitals_on_the_first_attempt(hospitals, tmp_path, capsys):
    assert exit_code(manifest_tool.main, [hospitals]) == 0
    runs = [tmp_path / "fedgs", tmp_path / "fedavg"]
    assert train(hospitals, runs[0]) == 0
    text = capsys.readouterr().out
    assert "data     three hospitals, in" in text
    assert "images   Berlin-Mitte 10 + 1 + 2, St. Olav 8 + 1 + 2, Århus 2 9 + 1 + 2" in text
    assert "three hospitals-fedgs-utnet-f1-s0 on three hospitals" in text
    assert "in-test" in text and "out-test" not in text

    # Whatever tells of the run calls the data by their name, and there are lesions to find.
    for name in ("rounds.csv", "scores.csv"):
        table = rows(runs[0] / name)
        assert {row["data"] for row in table} == {"three hospitals"}
    assert "loss_Århus 2" in rows(runs[0] / "rounds.csv")[0]
    results = json.loads((runs[0] / "results.json").read_text())
    assert results["data"] == "three hospitals"
    best = results["checkpoints"]["best"]["averaged"]
    assert best["in_test"]["dice_n"]["n"] == 6
    assert best["out_test"]["dice"] == {"mean": None, "n": 0}
    everything_written = [path.read_bytes() for path in runs[0].iterdir()]
    for known in (b"PolypGen", b"LiTS", b"polypgen", b"lits"):
        assert not any(known in content for content in everything_written)

    assert train(hospitals, runs[1], "--method", "fedavg") == 0
    capsys.readouterr()
    plot = tmp_path / "comparison.png"
    assert exit_code(compare.main, [*runs, "--plot", plot]) == 0
    text = capsys.readouterr().out
    assert text.startswith("three hospitals, utnet") and "out-test" not in text
    assert plot.exists()


@pytest.mark.slow
def test_a_network_of_own_data_is_tested_and_used(cohort, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(cohort, run, "--out-centre", "Berlin") == 0
    assert "Berlin (held out) 10" in capsys.readouterr().out

    checkpoint = run / "best.pt"
    refused(capsys, exit_code(evaluate.main, [checkpoint]), "datasets/cohort", "--data-root")
    again = [checkpoint, "--data-root", cohort, "--out", tmp_path / "again", "--surfaces", "2"]
    assert exit_code(evaluate.main, again) == 0
    assert "boundaries" in capsys.readouterr().out
    scores = [row for row in rows(run / "scores.csv") if row["checkpoint"] == "best"]
    for old, new in zip(scores, rows(tmp_path / "again" / "scores.csv"), strict=True):
        assert (old["name"], old["dice"]) == (new["name"], new["dice"])

    # Of another cohort the centres have other names.
    other = write_rows(
        tmp_path / "other.csv",
        [
            {**row, "centre": "Oslo", "image": f"cohort/{row['image']}"}
            | {"mask": f"cohort/{row['mask']}"}
            for row in rows(cohort / "manifest.csv")
            if row["centre"] == "Berlin"
        ],
    )
    refused(capsys, exit_code(evaluate.main, [checkpoint, "--data-root", other]), "it has Oslo")
    elsewhere = [checkpoint, "--data-root", other, "--centres", "Oslo", "--out-centre", ""]
    assert exit_code(evaluate.main, elsewhere) == 0
    assert "other (trained on cohort)" in capsys.readouterr().out

    frame = cohort / "Berlin" / "images" / "frame0.png"
    arguments = ["--checkpoint", checkpoint, "--out", tmp_path / "masks", frame]
    assert exit_code(predict.main, arguments) == 0
    with Image.open(tmp_path / "masks" / "frame0_mask.png") as mask:
        assert mask.size == (40, 30)
        assert mask.text["Comment"] == "FedGS, trained on cohort"


@pytest.mark.slow
def test_own_data_in_several_processes(cohort, tmp_path):
    """Without a held-out centre, too, and to the same bits."""
    assert train(cohort, tmp_path / "one") == 0
    assert train(cohort, tmp_path / "two", "--workers", 2) == 0
    assert_same_weights(tmp_path / "one" / "last.pt", tmp_path / "two" / "last.pt")
    assert rows(tmp_path / "one" / "scores.csv") == rows(tmp_path / "two" / "scores.csv")


@pytest.mark.slow
def test_a_run_on_own_volumes(scans, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(scans, run, "--model", "sd-utnet") == 0
    assert "slices with a lesion; lesion is 1 in a mask" in capsys.readouterr().out
    assert (run / "anatomy.png").exists()
    arguments = ["--checkpoint", run / "best.pt", "--out", tmp_path / "masks"]
    assert exit_code(predict.main, [*arguments, scans / "a0.nii.gz"]) == 0
    mask = nibabel.load(tmp_path / "masks" / "a0_mask.nii.gz")
    assert mask.shape == (16, 20, 4)


@pytest.mark.parametrize("column", ["image", "mask", "group"])
@pytest.mark.parametrize("text", ["a\nb", "a\x1b[31mb", "a\u2028b"])
def test_cells_that_are_no_text(tmp_path, column, text):
    cells = {"centre": "A", "image": "a.png", "mask": "b.png", "group": "", column: text}
    with pytest.raises(UserError, match=rf"m\.csv, row 2: {column} holds what is no text"):
        manifest.read_row(tmp_path / "m.csv", 2, cells)


def test_two_slashes_are_no_other_place():
    assert manifest.path_of(Path("/data"), "\\\\server\\a.png") == Path("/server/a.png")
    assert str(manifest.path_of(Path("/data"), "\\\\server\\a.png"))[:2] == "/s"
