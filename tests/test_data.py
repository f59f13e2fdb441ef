"""Reading images and volumes, sizes of lesions, splits, augmentation."""

import colorsys
import csv
import math
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import SHARED, exit_code, shrink_stand_ins
from PIL import Image
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from tiny_volumes import labels_of, write_volume

import data
import fedgs
from data import augment, is_small, shuffled_split, split_units
from support import standin, volumes
from support.errors import UserError


def parts_of(federation, centre):
    """A client's training, validation and test images."""
    return (
        federation.train[centre],
        federation.validation[centre],
        federation.in_test[centre],
    )


# ------------------------------------------------------------------------ folders to read from


@pytest.fixture
def frames(tmp_path):
    """Two centres of five images each in PolypGen's layout, 40 x 30, with a mask of 16 x 8."""
    rng = np.random.default_rng(0)
    mask = np.zeros((30, 40), np.uint8)
    mask[8:16, 8:24] = 255
    for centre in ("C1", "C2"):
        images = tmp_path / f"data_{centre}" / f"images_{centre}"
        masks = tmp_path / f"data_{centre}" / f"masks_{centre}"
        images.mkdir(parents=True)
        masks.mkdir()
        for i in range(5):
            pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"frame{i}.jpg", quality=95)
            Image.fromarray(mask).save(masks / f"frame{i}_mask.jpg", quality=95)
    return tmp_path


def read_frames(root, **options):
    """A federation of C1, and C2 held out."""
    usual = {"centres": ("C1", "C2"), "out_centre": "C2", "size": 32, "tau": 150, "split": "fold"}
    return data.load("polypgen", root, **(usual | options))


@pytest.fixture
def scans(tmp_path):
    """Ten volumes of client 1 with a tumour in two slices of three, and two of client 5."""
    root = tmp_path / "lits"
    for number in (*range(10), 120, 121):
        folder = root / ("part1" if number % 2 else "part2")
        suffix = ".nii" if number % 3 else ".nii.gz"
        write_volume(folder, number, labels_of(60, 0, 70 + number), suffix=suffix)
    return root


def reading(kind="colour", size=32, tau=150, window=()):
    return data.Reading(kind, window, size, tau)


def read_scans(root, **options):
    """A federation of C1, and C5 held out."""
    usual = {"centres": ("C1", "C5"), "out_centre": "C5", "size": 16, "tau": 1000}
    usual["split"] = "centre"
    return data.load("lits", root, **(usual | options))


def never(*_):
    pytest.fail("done again")


def volumes_of(images):
    """The numbers of the volumes of these images in order, each once."""
    numbers = [int(name.split("_")[0].removeprefix("volume-")) for name in images.names]
    return list(dict.fromkeys(numbers))


# ------------------------------------------------------------------------------------------ values


def test_subset_takes_everything_of_an_image(frames):
    held = read_frames(frames).out_test
    held.inverse_area = torch.arange(5, dtype=torch.float64)
    held.small = torch.tensor([False, True, False, True, True])
    part = held.subset([4, 0])
    assert len(part) == 2
    assert (part.centre, part.names) == ("C2", ["frame4", "frame0"])
    assert torch.equal(part.images, held.images[[4, 0]])
    assert torch.equal(part.masks, held.masks[[4, 0]])
    assert part.inverse_area.tolist() == [4, 0]
    assert part.small.tolist() == [True, False]


def test_images_on_a_device(frames):
    moved = read_frames(frames).out_test.to(torch.device("meta"))
    tensors = (moved.images, moved.masks, moved.inverse_area, moved.small)
    assert {x.device.type for x in tensors} == {"meta"}


def test_fingerprint_tells_other_data(frames):
    before = read_frames(frames).fingerprint
    assert read_frames(frames).fingerprint == before
    path = frames / "data_C1" / "images_C1" / "frame3.jpg"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert read_frames(frames).fingerprint != before


@pytest.mark.parametrize("what", ["images", "masks", "small", "names"])
def test_fingerprint_is_of_all_that_counts(frames, what):
    held = read_frames(frames).out_test
    before = data.hash_of([held])
    if what == "names":
        held.names[2] = "other"
    else:
        numbers = getattr(held, what).view(-1)
        numbers[3] = numbers[3] == 0
    assert data.hash_of([held]) != before


def test_the_fingerprint_of_equal_images_never_changes():
    """A run that an earlier version began has to go on."""
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    small = torch.tensor([True])
    images = data.Images("C1", ["a"], image, mask, torch.ones(1), small, torch.ones(1, 2))
    assert data.hash_of([images, images]) == "bb7dd0b464bcfc40"


# ----------------------------------------------------------------------------------------- loading


def test_where_a_data_set_is_found(frames, scans, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.find("polypgen") is None
    assert data.find("lits") is None
    assert data.find("polypgen", str(frames)) == frames
    assert data.find("lits", str(scans)) == scans
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "polypgen").symlink_to(frames)
    scans.rename(tmp_path / "datasets" / "lits")
    assert str(data.find("polypgen")) == "datasets/polypgen"
    assert str(data.find("lits")) == "datasets/lits"
    assert data.find("polypgen", "stand-in") is None
    assert data.find("lits", "stand-in") is None


@pytest.mark.parametrize(("dataset", "known"), [("polypgen", "data_C1"), ("lits", "volume-0.nii")])
def test_a_folder_that_does_not_hold_the_data_set(tmp_path, dataset, known):
    with pytest.raises(UserError, match=rf"--data-root .*: no {known}.* in it"):
        data.find(dataset, str(tmp_path))
    with pytest.raises(UserError, match=r"--data-root .*nowhere: no such folder"):
        data.find(dataset, str(tmp_path / "nowhere"))


def test_segmentations_alone_are_no_data_set(tmp_path):
    (tmp_path / "segmentation-0.nii").write_text("")
    with pytest.raises(UserError, match=r"no volume-0.nii.* in it"):
        data.find("lits", str(tmp_path))


def test_workload_is_known_before_anything_is_read(frames, scans):
    assert data.workloads("polypgen", frames, ["C2", "C1"]) == {"C2": 5, "C1": 5}
    assert data.workloads("lits", scans, ["C1", "C5"]) == {"C1": 10, "C5": 2}
    drawn = data.workloads("polypgen", None, ["C3", "C6"])
    assert drawn["C3"] > drawn["C6"] > 0
    drawn = data.workloads("lits", None, ["C1", "C5"])
    assert drawn["C1"] > drawn["C5"] > 0

    manifest = frames / "manifest.csv"
    manifest.write_text("centre,image,mask\nOslo,a,1\nRome,b,2\nOslo,c,3\n")
    assert data.workloads("own", manifest, ["Rome", "Oslo"]) == {"Rome": 1, "Oslo": 2}


def test_who_gets_what(frames):
    federation = read_frames(frames)
    assert federation.source == "PolypGen"
    assert federation.notes == ["size flags by rule"]
    assert federation.out_centre == "C2"
    assert [len(part) for part in parts_of(federation, "C1")] == [4, 0, 1]
    assert federation.out_test.names == [f"frame{i}" for i in range(5)]
    assert federation.out_test.centre == "C2"
    assert list(federation.train) == ["C1"]
    assert list(federation.facts) == ["C1", "C2"]
    assert federation.facts["C1"][:5] == (4, 0, 1, 0, 0)
    assert federation.facts["C2"][:5] == (0, 0, 5, 0, 0)


def test_centres_that_are_loaded_elsewhere(scans):
    whole = read_scans(scans)
    client = read_scans(scans, only=["C1"])
    held_out = read_scans(scans, only=["C5"])
    assert {**client.facts, **held_out.facts} == whole.facts
    assert client.out_test is None
    assert not held_out.train
    assert torch.equal(client.train["C1"].images, whole.train["C1"].images)
    assert len(held_out.out_test) == len(whole.out_test)

    # Those who know all facts say the same of the data.
    client.facts = {**client.facts, **held_out.facts}
    assert client.fingerprint == whole.fingerprint
    assert client.notes == whole.notes


def test_a_lesion_lost_in_resizing_counts_as_none(frames):
    mask = np.zeros((300, 400), np.uint8)
    mask[100:104, 100:104] = 255
    path = frames / "data_C2" / "masks_C2" / "frame4_mask.jpg"
    Image.fromarray(mask).save(path, quality=100)

    lost = read_frames(frames, size=16)
    assert not lost.out_test.masks[4].any()
    assert not lost.out_test.small[4]
    assert lost.out_test.inverse_area[4] == math.inf
    assert lost.facts["C2"].lost == 1
    assert lost.notes[-1] == "1 lesions vanish at 16x16, so their images count as empty"

    kept = read_frames(frames, size=512)
    assert kept.out_test.small.tolist() == [False, False, False, False, True]
    assert kept.facts["C2"].lost == 0
    assert len(kept.notes) == 1


# ------------------------------------------------------------------------------- loading a stand-in


@pytest.fixture
def few(monkeypatch):
    """Stand-ins that are drawn in a second."""
    shrink_stand_ins(monkeypatch, frames=25, volumes=5, slices=10)


def read_drawn_frames(cache, root=None, **options):
    return read_frames(root, **({"cache": str(cache), "centres": ("C1", "C2")} | options))


def read_drawn_scans(cache, root=None, **options):
    return read_scans(root, **({"cache": str(cache)} | options))


def test_a_stand_in_of_frames_says_so(few, tmp_path):
    federation = read_drawn_frames(tmp_path)
    assert federation.source == "PolypGen stand-in"
    assert federation.notes == ["size flags by rule"]
    names = federation.out_test.names + federation.train["C1"].names
    assert all(name.startswith("stand-in_C") for name in names)

    # Also when it is named as the data, or linked to from another folder.
    again = read_frames(tmp_path / "32px")
    assert (again.source, again.fingerprint) == (federation.source, federation.fingerprint)
    linked = tmp_path / "linked"
    linked.mkdir()
    for centre in ("C1", "C2"):
        (linked / f"data_{centre}").symlink_to(tmp_path / "32px" / f"data_{centre}")
    assert read_frames(linked).source == "PolypGen stand-in"


@pytest.mark.slow
def test_a_stand_in_of_volumes_says_so(few, tmp_path):
    federation = read_drawn_scans(tmp_path / "drawn", size=32)
    assert federation.source == "LiTS stand-in"
    assert len(federation.out_test) == 10
    assert (tmp_path / "drawn" / "fedgs-cache" / "volume-0" / "index.json").exists()

    # Also when it, or what holds it, is named as the data.
    for root in (tmp_path / "drawn", tmp_path):
        again = read_scans(root, size=32)
        assert (again.source, again.fingerprint) == (federation.source, federation.fingerprint)


@pytest.mark.slow
def test_real_data_is_not_called_a_stand_in(few, frames, scans):
    """Even where one lies beside it."""
    read_drawn_frames(frames)
    read_drawn_scans(frames.parent / "drawn")
    assert read_frames(frames).source == "PolypGen"
    assert read_scans(scans).source == "LiTS"


def test_drawn_frames_are_as_they_were_drawn(few, tmp_path):
    held = read_drawn_frames(tmp_path, size=48).out_test
    images, masks = standin.polypgen_frames("C2", 10, 48)
    assert np.array_equal(held.images.permute(0, 2, 3, 1).numpy(), images)
    assert np.array_equal(held.masks[:, 0].numpy(), masks)
    sample = np.arange(512) * 48 // 512
    small = [is_small(mask[sample][:, sample], 150) for mask in masks]
    assert held.small.tolist() == small


def test_flags_of_a_stand_in_hold_for_their_threshold(few, tmp_path):
    usual = read_drawn_frames(tmp_path).out_test
    other = read_drawn_frames(tmp_path, tau=8).out_test
    areas = smallest_polyps(usual)
    assert usual.small.tolist() == [150 <= area < math.inf for area in areas]
    assert other.small.tolist() == [8 <= area < math.inf for area in areas]
    assert usual.small.sum() < other.small.sum()


def smallest_polyps(images):
    """Image pixels / pixels of the smallest polyp of each image; inf without one."""
    areas = []
    for mask in images.masks[:, 0].numpy():
        components, count = ndimage.label(mask, np.ones((3, 3)))
        sizes = [int((components == k + 1).sum()) for k in range(count)]
        areas.append(mask.size / min(sizes) if sizes else math.inf)
    return areas


@pytest.mark.slow
def test_a_stand_in_is_drawn_where_it_is_not_yet(few, tmp_path, monkeypatch):
    read_drawn_frames(tmp_path)
    read_drawn_scans(tmp_path)

    monkeypatch.setattr(standin, "polypgen_frames", never)
    monkeypatch.setattr(standin, "lits_volumes", never)
    read_drawn_frames(tmp_path)
    read_drawn_scans(tmp_path)
    with pytest.raises(pytest.fail.Exception, match="done again"):
        read_drawn_frames(tmp_path, size=64)


# ------------------------------------------------------------------------------- PolypGen's files


def test_what_is_read_of_frames(frames):
    held = read_frames(frames).out_test
    assert held.images.shape == (5, 3, 32, 32)
    assert held.masks.shape == (5, 1, 32, 32)
    assert held.images.dtype == held.masks.dtype == torch.uint8
    assert held.masks.unique().tolist() == [0, 1]
    assert held.inverse_area.tolist() == pytest.approx([1200 / 128] * 5, rel=0.01)
    assert held.inverse_area.dtype == torch.float64
    assert not held.small.any()


def test_each_frame_has_its_own_mask(square_root):
    """A bright square lies where the mask is, in every image of every part."""
    federation = data.load(
        "polypgen",
        square_root,
        centres=data.CENTRES["polypgen"],
        out_centre="C6",
        size=64,
        tau=150,
        split="fold",
        fold=2,
    )
    everything = [federation.out_test]
    for centre in federation.train:
        everything.extend(parts_of(federation, centre))
    for images in everything:
        for image, mask in zip(images.images.float().mean(dim=1), images.masks[:, 0], strict=True):
            assert image[mask == 1].mean() > image[mask == 0].mean() + 100


def write_flags(root, centre, text, encoding="utf-8"):
    (root / "metadata").mkdir()
    path = root / "metadata" / f"my_dataDetails_{centre}.csv"
    path.write_bytes(text.encode(encoding))


def test_size_flags_beside_the_data_are_used(frames):
    text = "img_name,small_polyp,inv_area\nany/where/frame3.jpg,True,7\nframe0.jpg,False,7\n"
    write_flags(frames, "C2", text)
    federation = read_frames(frames)
    assert federation.out_test.small.tolist() == [False, False, False, True, False]
    assert federation.notes == ["published size flags for 2 of 10 images"]
    assert federation.facts["C2"].flagged == 2

    # They were made with tau = 150.
    other = read_frames(frames, tau=100)
    assert not other.out_test.small.any()
    assert other.notes == ["size flags by rule"]


def test_a_published_flag_overrides_the_rule(frames):
    mask = np.zeros((512, 512), np.uint8)
    mask[100:104, 100:104] = 255
    for i in range(5):
        path = frames / "data_C2" / "masks_C2" / f"frame{i}_mask.jpg"
        Image.fromarray(mask).resize((512, 384)).save(path, quality=100)
    write_flags(frames, "C2", "img_name,small_polyp\nframe1.jpg,False\n")
    held = read_frames(frames, size=512).out_test
    assert held.small.tolist() == [True, False, True, True, True]


def test_size_flags_as_spreadsheets_write_them(frames):
    text = "img_name,small_polyp,inv_area\r\ndata\\images_C2\\frame1.jpg,TRUE,7\r\nframe2.jpg,0,7"
    write_flags(frames, "C2", text, "utf-8-sig")
    assert read_frames(frames).out_test.small.tolist() == [False, True, False, False, False]


def test_png_images_have_png_masks(frames):
    for name in ("images_C2/frame1", "masks_C2/frame1_mask"):
        path = frames / "data_C2" / f"{name}.jpg"
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    held = read_frames(frames).out_test
    assert held.names == [f"frame{i}" for i in range(5)]


def write_index(root, groups):
    """index.csv for centre 1, whose other frames are alone."""
    rows = ["centre,name,near_dup_group", *(f"2,frame{i},0" for i in range(4))]
    rows += [f"1,frame{i},{groups.get(i, f'alone{i}')}" for i in range(5)]
    (root / "index.csv").write_text("\n".join(rows) + "\n")


def test_groups_beside_the_data_stay_together(frames):
    write_index(frames, {0: "same", 4: "same"})
    for fold in range(1, 5):
        parts = parts_of(read_frames(frames, split="grouped", fold=fold), "C1")
        together = [{"frame0", "frame4"} <= set(part.names) for part in parts]
        assert sum(together) == 1
        assert sum(len(part) for part in parts) == 5
    assert read_frames(frames, fold=1).in_test["C1"].names == ["frame0"]


@pytest.mark.parametrize("column", ["centre", "name", "near_dup_group"])
def test_groups_without_a_column(frames, column):
    header = {"centre", "name", "near_dup_group"} - {column}
    (frames / "index.csv").write_text(f"{','.join(sorted(header))}\n1,1\n")
    with pytest.raises(UserError, match=rf"index.csv: its header needs the column {column}, once"):
        read_frames(frames, split="grouped")


def test_groups_are_asked_of_clients_alone(frames):
    write_index(frames, {})  # frame4 of the held-out centre is not in it
    assert len(read_frames(frames, split="grouped").out_test) == 5
    with pytest.raises(UserError, match=r"index\.csv: no near_dup_group for centre C2, frame4"):
        read_frames(frames, split="grouped", out_centre="C1")


def image_without_mask(root):
    (root / "data_C1" / "masks_C1" / "frame2_mask.jpg").unlink()


def mask_without_image(root):
    (root / "data_C1" / "images_C1" / "frame2.jpg").unlink()


def same_name_twice(root):
    shutil.copy(
        root / "data_C1" / "images_C1" / "frame2.jpg", root / "data_C1" / "images_C1" / "frame2.png"
    )
    shutil.copy(
        root / "data_C1" / "masks_C1" / "frame2_mask.jpg",
        root / "data_C1" / "masks_C1" / "frame2_mask.png",
    )


def truncated(root):
    path = root / "data_C1" / "images_C1" / "frame2.jpg"
    path.write_bytes(path.read_bytes()[:700])


def not_an_image(root):
    (root / "data_C1" / "masks_C1" / "frame2_mask.jpg").write_text("no image")


def mask_of_another_shape(root):
    Image.new("L", (40, 40)).save(root / "data_C1" / "masks_C1" / "frame2_mask.jpg")


def mask_too_wide(root):
    Image.new("L", (60, 30)).save(root / "data_C1" / "masks_C1" / "frame2_mask.jpg")


def centre_without_images(root):
    shutil.rmtree(root / "data_C1")


def damaged_flags(root):
    write_flags(root, "C1", "img_name,small_polyp\nframe0.jpg,maybe\n")


def flags_without_column(root):
    write_flags(root, "C1", "name,small_polyp\nframe0.jpg,True\n")


def flags_of_another_encoding(root):
    write_flags(root, "C1", "img_name,small_polyp\nétude.jpg,True\n", "latin-1")


def image_too_large(root):
    path = root / "data_C1" / "images_C1" / "frame2.jpg"
    content = bytearray(path.read_bytes())
    # The frame header: marker, length, precision, height, width, here of 30,000 x 30,000.
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = bytes([0x75, 0x30, 0x75, 0x30])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (image_without_mask, r"frame2\.jpg has no mask.*frame2_mask\.jpg is missing"),
        (mask_without_image, r"frame2_mask\.jpg has no image.*NAME_mask\.jpg"),
        (same_name_twice, r"frame2\.png and .*frame2\.jpg have the same name: keep one"),
        (truncated, r"cannot read .*frame2\.jpg"),
        (not_an_image, r"cannot read .*frame2_mask\.jpg"),
        (mask_of_another_shape, r"frame2_mask\.jpg is 40x40, its image 40x30"),
        (mask_too_wide, r"frame2_mask\.jpg is 60x30, its image 40x30"),
        (centre_without_images, r"centre C1 has no data.*--centres"),
        (damaged_flags, r"my_dataDetails_C1\.csv.*frame0\.jpg.*maybe"),
        (flags_without_column, r"my_dataDetails_C1\.csv.*img_name"),
        (flags_of_another_encoding, r"cannot read .*my_dataDetails_C1\.csv"),
        (image_too_large, r"cannot read .*frame2\.jpg"),
    ],
)
def test_a_bad_file_is_named(frames, harm, message):
    harm(frames)
    with pytest.raises(UserError, match=message):
        read_frames(frames)


# ----------------------------------------------------------------------------------- LiTS's files


def test_what_is_read_of_volumes(scans):
    federation = read_scans(scans)
    assert federation.source == "LiTS"
    assert federation.notes == ["slices with more than 50 tumour pixels"]
    assert federation.out_test.names == [
        "volume-120_slice-0",
        "volume-120_slice-2",
        "volume-121_slice-0",
        "volume-121_slice-2",
    ]
    images = federation.train["C1"]
    assert images.images.shape[1:] == images.masks.shape[1:] == (1, 16, 16)
    assert images.images.dtype == images.masks.dtype == torch.uint8
    assert images.masks.unique().tolist() == [0, 1]
    tumour = images.images[images.masks == 1].float()
    assert tumour.mean() < images.images[images.masks == 0].float().mean()


def test_clients_by_the_numbers_of_volumes(tmp_path):
    for number in (0, 29, 30, 59, 60, 89, 90, 119, 120, 130):
        write_volume(tmp_path, number, labels_of(60))
    listing = data.list_lits(tmp_path, data.CENTRES["lits"])
    found = {}
    for record in listing.records:
        found.setdefault(record.centre, []).append(record.group)
    assert found == {
        "C1": ["volume-0", "volume-29"],
        "C2": ["volume-30", "volume-59"],
        "C3": ["volume-60", "volume-89"],
        "C4": ["volume-119", "volume-90"],  # sorted as text
        "C5": ["volume-120", "volume-130"],
    }


def test_the_published_split_of_volumes(tmp_path):
    """That of client 1, all of whose volumes have tumours, known from outside."""
    for number in (*range(30), 120):
        write_volume(tmp_path, number, labels_of(*[60] * (1 + number % 2)))
    federation = read_scans(tmp_path)
    train, validation, test = map(volumes_of, parts_of(federation, "C1"))
    assert (validation, test) == ([19, 11, 6], [4, 21, 8])
    assert sorted(train + validation + test) == list(range(30))
    assert len(federation.train["C1"]) == sum(1 + number % 2 for number in train)


@pytest.mark.parametrize("fold", [1, 2, 3, 4, 5])
def test_folds_are_of_volumes(scans, fold):
    federation = read_scans(scans, split="fold", fold=fold)
    train, validation, test = map(volumes_of, parts_of(federation, "C1"))
    assert sorted(validation + test) == [2 * fold - 2, 2 * fold - 1]
    assert len(train) == 8
    assert sorted(train + validation + test) == list(range(10))


def test_slices_are_kept_in_a_cache_for_every_size(scans, monkeypatch):
    first = read_scans(scans)
    assert len(list((scans / "fedgs-cache").iterdir())) == 12
    monkeypatch.setattr(volumes, "cut_slices", never)
    assert read_scans(scans).fingerprint == first.fingerprint
    larger = read_scans(scans, size=32)
    assert larger.out_test.images.shape == (4, 1, 32, 32)
    assert torch.equal(larger.out_test.inverse_area, first.out_test.inverse_area)


def test_a_cache_elsewhere(scans, tmp_path):
    read_scans(scans, cache=str(tmp_path / "elsewhere"))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 12
    assert not (scans / "fedgs-cache").exists()


def test_a_changed_volume_is_noticed(scans):
    first = read_scans(scans)
    write_volume(scans / "part1", 121, labels_of(100, 0, 0), suffix=".nii")
    os.utime(scans / "part1" / "segmentation-121.nii", ns=(1, 1))
    changed = read_scans(scans)
    assert changed.fingerprint != first.fingerprint
    assert [name for name in changed.out_test.names if "-121_" in name] == ["volume-121_slice-0"]


def test_spacings(frames, tmp_path):
    root = tmp_path / "scans"
    write_volume(root, 0, labels_of(60, 60))
    write_volume(root, 1, labels_of(60, height=32, width=10))
    write_volume(root, 120, labels_of(60))
    federation = read_scans(root, size=16)
    everything = {}
    for part in parts_of(federation, "C1"):
        everything.update(zip(part.names, part.spacing.tolist(), strict=True))
    assert everything == {
        "volume-0_slice-0": [1.0, 20 / 16],
        "volume-0_slice-1": [1.0, 20 / 16],
        "volume-1_slice-0": [2.0, 10 / 16],
    }
    assert read_frames(frames).out_test.spacing.tolist() == [[1.0, 1.0]] * 5


@pytest.mark.slow
def test_spacings_of_a_stand_in(few, tmp_path):
    held = read_drawn_scans(tmp_path).out_test
    spacing = 0.8 * 512 / 16
    assert held.spacing.tolist() == [pytest.approx([spacing, spacing])] * len(held)


def test_a_volume_that_lits_does_not_have(scans):
    write_volume(scans, 131, labels_of(60))
    with pytest.raises(UserError, match=r"-131.*numbers its volumes from 0 to 130"):
        read_scans(scans)


def test_a_client_without_tumours(scans):
    with pytest.raises(UserError, match=r"no slice.* centre C2, volumes 30 to 59 .*--centres"):
        read_scans(scans, centres=("C1", "C2", "C5"))
    for number in (120, 121):
        for path in scans.rglob(f"segmentation-{number}.*"):
            write_volume(path.parent, number, labels_of(50, 0, 0), suffix=path.name[16:])
    with pytest.raises(UserError, match=r"no slice with a tumour for centre C5"):
        read_scans(scans)


@pytest.mark.slow
def test_a_run_on_volumes(scans, tmp_path, capsys):
    where = ["--dataset", "lits", "--data-root", scans, "--centres", "C1", "C5"]
    size = ["--image-size", "32", "--width", "2", "--rounds", "1", "--device", "cpu"]
    assert exit_code(fedgs.main, [*where, *size, "--out", tmp_path / "run"]) == 0
    assert "C1 16 + 2 + 2, C5 (held out) 4" in capsys.readouterr().out
    with (tmp_path / "run" / "scores.csv").open(newline="") as file:
        names = {row["name"] for row in csv.DictReader(file) if row["split"] == "out_test"}
    assert names == set(read_scans(scans).out_test.names)


# ---------------------------------------------------------------------------------------- decoding


def record_of(folder, image, mask, small=None):
    """These arrays as files of a Record."""
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return data.Record("C1", "image", folder / "image.png", folder / "mask.png", "", small)


def test_threshold_of_masks_and_resizing(tmp_path):
    """Lesion is brighter than 128; masks are resized by nearest neighbour, images interpolated."""
    mask = np.full((64, 64), 128, np.uint8)
    mask[20:40, 20:40] = 129
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 1::2] = 255
    record = record_of(tmp_path, pixels, mask)
    image, found, inverse_area, small, *_ = data.read_record(record, reading())
    assert found.sum() == 100
    assert found[10:20, 10:20].all()
    assert inverse_area == 64 * 64 / 400
    assert not small
    assert 100 < image[4:-4, 4:-4].min() <= image[4:-4, 4:-4].max() < 155


def test_a_mask_of_another_size_but_equal_shape(frames):
    path = frames / "data_C2" / "masks_C2" / "frame1_mask.jpg"
    Image.open(path).resize((80, 60), Image.Resampling.NEAREST).save(path, quality=95)
    masks = read_frames(frames).out_test.masks
    assert torch.equal(masks[1], masks[0])


# --------------------------------------------------------------------------------- size of lesions


def test_small_by_the_smallest_polyp():
    mask = np.zeros((150, 100), bool)
    mask[10:60, 10:60] = True
    assert not is_small(mask, 150)
    mask[100:110, 80:90] = True  # 100 of 15,000 pixels: exactly 1/150
    assert is_small(mask, 150)
    mask[110, 90] = True  # touches at a corner: one polyp of 101 pixels
    assert not is_small(mask, 150)
    assert not is_small(np.zeros((150, 100), bool), 150)

    # All but a pixel: the background is no polyp.
    filled = np.ones((150, 100), bool)
    filled[0, 0] = False
    assert not is_small(filled, 150)


def test_a_mask_may_be_stretched_by_a_hundredth():
    path = Path("mask.png")
    data.check_proportions(path, (1010, 500), (1000, 500))
    data.check_proportions(path, (500, 250), (1000, 500))
    with pytest.raises(UserError, match=r"mask.png is 1011x500, its image 1000x500$"):
        data.check_proportions(path, (1011, 500), (1000, 500))
    with pytest.raises(UserError, match=r"mask.png is 500x1000, its image 1000x500 \(one of them"):
        data.check_proportions(path, (500, 1000), (1000, 500))


def test_frames_are_measured_at_512(tmp_path):
    """Polyps three rows high, of which half the resolution keeps the one in the middle."""
    mask = np.zeros((1024, 1024), np.uint8)
    mask[100:103, :1000] = 255
    mask[200:203, :4] = 255
    record = record_of(tmp_path, np.zeros((1024, 1024, 3), np.uint8), mask)
    found = data.read_record(record, reading(size=64))
    assert found.inverse_area == 512 * 512 / 502
    assert found.small
    assert data.read_record(record, reading(size=64, tau=512 * 512 / 2)).small
    assert not data.read_record(record, reading(size=64, tau=512 * 512 / 1.9)).small


@pytest.mark.parametrize(("pixels", "small"), [(64, True), (65, False)])
def test_slices_are_measured_whole_and_as_they_are(tmp_path, pixels, small):
    """Small at 1/1000 of the slice in the file, all tumours together, whatever the network sees."""
    mask = np.zeros((160, 400), np.uint8)
    mask[0, :60] = 255
    mask[100, : pixels - 60] = 255
    record = record_of(tmp_path, np.zeros((160, 400), np.uint8), mask)
    found = data.read_record(record, reading("slices", tau=1000))
    assert (found.inverse_area, found.small) == (64000 / pixels, small)


@pytest.mark.parametrize("kind", ["colour", "grey", "slices"])
def test_an_empty_mask_is_not_small(tmp_path, kind):
    record = record_of(tmp_path, np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8))
    found = data.read_record(record, reading(kind, tau=1))
    assert (found.inverse_area, found.small) == (math.inf, False)


# ------------------------------------------------------------------------------------------ splits


def test_shuffling_of_thirty_volumes():
    """The published split of LiTS's first client: scikit-learn's permutation, halved twice."""
    order = data.published_order("C1")
    assert order[:4] == [0, 10, 11, 12]
    train, held = shuffled_split(order, 0.8)
    assert len(train) == 24
    assert shuffled_split(held, 0.5) == ([19, 11, 6], [4, 21, 8])


@pytest.mark.parametrize("split", ["fold", "centre"])
@pytest.mark.parametrize("count", [10, 88, 301])
def test_splits_agree_with_scikit_learn(split, count):
    selection = pytest.importorskip("sklearn.model_selection")
    units = [[i] for i in range(count)]
    for fold in range(1, 6):
        if split == "fold":
            train, held = list(selection.KFold(5).split(range(count)))[fold - 1]
        else:
            train, held = selection.train_test_split(range(count), train_size=0.8, random_state=0)
        halves = selection.train_test_split(held, train_size=0.5, random_state=0)
        expected = [list(part) for part in (train, *halves)]
        assert list(split_units(units, split, fold)) == expected


@pytest.mark.parametrize("split", ["fold", "centre", "grouped"])
@pytest.mark.parametrize("fold", [1, 2, 3, 4, 5])
def test_groups_stay_together(split, fold):
    units = [[0, 5, 9], [1], [2, 3], [4], [6, 7, 8], [10], [11], [12, 13]]
    parts = split_units(units, split, fold)
    assert sorted([*parts[0], *parts[1], *parts[2]]) == list(range(14))
    for unit in units:
        holding = [part for part in parts if set(unit) & set(part)]
        assert len(holding) == 1


def test_near_duplicates_are_linked_by_their_looks(few, tmp_path):
    held = read_drawn_frames(tmp_path, size=64).out_test
    copies = held.subset([0, 1, 0, 2, 1, 3])
    copies.images[2] = (copies.images[2].float() * 0.9).byte()  # the same scene, less light
    groups = data.groups_by_looks(data.thumbnails(copies))
    assert groups[0] == groups[2]
    assert groups[1] == groups[4]
    assert len(set(groups)) == 4


def test_near_duplicates_among_more_images_than_are_compared_at_once(generator):
    """Groups are as by the whole matrix of correlations, and chains of images are one group."""
    few = torch.randn(40, 30, generator=generator)
    chosen = torch.randint(0, 40, (1100,), generator=generator)
    chosen[0] = 39
    chosen[1:1099] %= 39
    chosen[1099] = 39  # in the first block, and in the last
    thumbnails = few[chosen] + 0.16 * torch.randn(1100, 30, generator=generator)
    thumbnails[5] = 7.0  # a plain image is like no other
    thumbnails[6] = -thumbnails[0]  # nor is a negative like its image

    with np.errstate(invalid="ignore"):
        correlation = np.corrcoef(thumbnails.numpy())
    _, expected = connected_components(np.nan_to_num(correlation) > 0.97)
    groups = data.groups_by_looks(thumbnails)
    assert groups == expected.tolist()
    assert groups[0] == groups[1099]
    assert groups.count(groups[5]) == groups.count(groups[6]) == 1
    assert 40 < len(set(groups)) < 200


def test_near_duplicates_are_looked_for_where_nobody_has_listed_them(frames):
    copy = frames / "data_C1" / "images_C1" / "frame4.jpg"
    shutil.copy(frames / "data_C1" / "images_C1" / "frame0.jpg", copy)
    held = read_frames(frames, split="grouped", fold=1)
    together = [{"frame0", "frame4"} <= set(part.names) for part in parts_of(held, "C1")]
    assert sum(together) == 1
    apart = read_frames(frames, split="fold", fold=1)
    together = [{"frame0", "frame4"} <= set(part.names) for part in parts_of(apart, "C1")]
    assert sum(together) == 0


# ------------------------------------------------------------------------------------ augmentation

STILL = [0.9, 0.9, 0.9, 0.5, 0.9, 0.5, 0.5, 0.5, 0.5]  # no flip, no rotation, no jitter


def scene(generator):
    """Images whose red channel is 204 inside the mask and 51 outside."""
    masks = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    masks[:, :, 5:12, 8:25] = 1
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images[:, :1] = torch.where(masks > 0, 204, 51)
    return images, masks


@pytest.mark.parametrize(
    ("draw", "flips", "turns"),
    [
        ({}, (), 0),
        ({0: 0.1}, (3,), 0),
        ({1: 0.1}, (2,), 0),
        ({0: 0.1, 1: 0.1}, (2, 3), 0),
        ({2: 0.1, 3: 1.0}, (), 1),  # +90 degrees
        ({2: 0.1, 3: 0.0}, (), -1),
        ({0: 0.1, 2: 0.1, 3: 1.0}, (3,), 1),
        ({0: 0.49, 1: 0.49, 2: 0.49, 3: 1.0}, (2, 3), 1),  # each with probability 1/2
        ({0: 0.51, 1: 0.51, 2: 0.51, 3: 1.0}, (), 0),
    ],
)
def test_flips_and_quarter_turns_are_exact(generator, draw, flips, turns):
    images, masks = scene(generator)
    draws = torch.tensor(STILL)
    for place, number in draw.items():
        draws[place] = number
    turned, turned_masks = augment(images, masks, draws.expand(2, 9))
    expected = (images.float() / 255).flip(flips).rot90(turns, (2, 3))
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-4)
    assert torch.equal(turned_masks, masks.flip(flips).rot90(turns, (2, 3)))


def test_a_mask_follows_its_image(generator):
    images, masks = scene(generator)
    draws = torch.rand(2, 9, generator=generator)
    draws[:, 2] = 0.1  # rotated
    draws[:, 4] = 0.9  # colours as they are
    turned, turned_masks = augment(images, masks, draws)
    assert turned_masks.unique().tolist() == [0, 1]
    assert turned_masks.dtype == torch.uint8
    inside = turned[:, :1] > 0.5
    # But for the rim, where the image is interpolated.
    assert (inside != turned_masks.bool()).float().mean() < 0.01


def test_each_image_has_its_own_draws(generator):
    images, masks = scene(generator)
    draws = torch.rand(2, 9, generator=generator)
    together, _ = augment(images, masks, draws)
    first, _ = augment(images[:1], masks[:1], draws[:1])
    second, _ = augment(images[1:], masks[1:], draws[1:])
    torch.testing.assert_close(together, torch.cat([first, second]))
    assert not torch.allclose(together[0], together[1])


def test_share_of_jittered_images(generator):
    draws = torch.rand(4000, 9, generator=generator)
    draws[:, :4] = torch.tensor(STILL[:4])
    images = torch.linspace(0, 255, 3 * 16 * 16).byte().view(1, 3, 16, 16).expand(4000, -1, -1, -1)
    masks = torch.zeros(4000, 1, 16, 16, dtype=torch.uint8)
    change = (augment(images, masks, draws)[0] - images / 255).abs().amax((1, 2, 3))
    assert (change > 1e-3).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_grey_values_are_left_alone(generator):
    images = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    draws = torch.tensor([0.9, 0.9, 0.9, 0.5, 0.0, 0.9, 0.9, 0.9, 0.9])  # colour jitter alone
    augmented, _ = augment(images, masks, draws.expand(8, -1))
    torch.testing.assert_close(augmented, images / 255)


@pytest.mark.parametrize("turns", [-0.2, 0.0, 0.13])
def test_hue_is_that_of_hsv(generator, turns):
    images = torch.rand(2, 3, 4, 4, generator=generator)
    images[0, :, 0, 0] = 0.5  # a grey pixel has no hue
    shifted = data.shift_hue(images, torch.full((2, 1, 1), turns))
    before = images.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    after = shifted.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    for old, new in zip(before, after, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*old)
        expected = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
        assert new == pytest.approx(expected, abs=1e-5)


def test_borders_are_reflected():
    """Turned by 45 degrees, the corners come from outside the image."""
    draws = torch.tensor([[0.9, 0.9, 0.1, 0.75, 0.9, 0.5, 0.5, 0.5, 0.5]])
    plain = torch.full((1, 3, 32, 32), 180, dtype=torch.uint8)
    images, masks = augment(plain, torch.ones(1, 1, 32, 32, dtype=torch.uint8), draws)
    assert (images - 180 / 255).abs().max() < 1e-5
    assert (masks == 1).all()


def jitter(images, **draws):
    """Jitter one property and leave the others."""
    neutral = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.5}
    return data.jitter_colours(images, torch.tensor([list((neutral | draws).values())]))


def test_range_of_the_jitter():
    grey = torch.full((1, 3, 4, 4), 0.5)
    assert jitter(grey, brightness=1.0).unique().tolist() == pytest.approx([0.6])
    assert jitter(grey, brightness=0.0).unique().tolist() == pytest.approx([0.4])

    halves = torch.cat([grey - 0.2, grey + 0.2], dim=3)  # mean 0.5, 0.2 to either side
    contrast = jitter(halves, contrast=1.0).unique().tolist()
    assert contrast == pytest.approx([0.26, 0.74], abs=1e-6)

    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    paler = jitter(red, saturation=0.0)[0, :, 0, 0].tolist()
    assert paler == pytest.approx([0.8 + 0.2 * 0.299, 0.2 * 0.299, 0.2 * 0.299], abs=1e-6)
    for draw, hue in ((1.0, 0.2), (0.0, 0.8)):
        turned = jitter(red, hue=draw)[0, :, 0, 0].tolist()
        assert turned == pytest.approx(colorsys.hsv_to_rgb(hue, 1, 1), abs=1e-5)


def test_neutral_jitter_changes_nothing(generator):
    images = torch.rand(2, 3, 8, 8, generator=generator)
    neutral = torch.full((2, 4), 0.5)
    torch.testing.assert_close(data.jitter_colours(images, neutral), images, rtol=0, atol=1e-5)


def test_which_draw_decides_what(generator):
    images, masks = scene(generator)
    draws = torch.tensor(STILL).expand(2, 9).clone()
    draws[:, 4] = 0.1  # jitter, but nothing changes yet
    still, _ = augment(images, masks, draws)
    torch.testing.assert_close(still, images / 255, rtol=0, atol=1e-4)

    for i, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=5):
        changed = draws.clone()
        changed[:, i] = 1.0
        expected = jitter(still, **{name: 1.0})
        torch.testing.assert_close(augment(images, masks, changed)[0], expected)


def test_normalise():
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    white = torch.ones(1, 3, 1, 1)
    assert data.normalise(white).flatten().tolist() == pytest.approx(expected)
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert data.normalise(white).flatten().tolist() == pytest.approx(expected)


def test_normalise_leaves_grey_images_in_the_unit_range():
    grey = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert data.normalise(grey).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert torch.equal(data.normalise(grey / 255), grey / 255)


# -------------------------------------------------------------------------------------- real images


@pytest.fixture(scope="module")
def by_rule(polypgen_root):
    """Every real image of each centre, its size flag by the rule."""
    # A threshold beside 150 sets the published flags aside.
    tau = data.POLYPGEN_TAU + 1e-9
    everything = {}
    for centre in data.CENTRES["polypgen"]:
        records = data.list_polypgen(polypgen_root, [centre], tau).records
        everything[centre] = data.decode(centre, records, reading(size=64, tau=tau))
    return everything


def needs(path):
    """Skip a test for want of a file that the data set itself does not bring."""
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the real data")
    return path


def read_index(root):
    """{(centre, name): row} of what is on record about the original files."""
    with needs(root / "index.csv").open(newline="") as file:
        return {(f"C{row['centre']}", row["name"]): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_real_numbers_of_images(by_rule):
    assert [len(images) for images in by_rule.values()] == [256, 301, 457, 227, 208, 88]


@pytest.mark.slow
def test_rule_agrees_with_the_published_flags(by_rule, polypgen_root):
    needs(polypgen_root / "metadata")
    counts = []
    agree = 0
    for centre, images in by_rule.items():
        names = {f"{name}.jpg" for name in images.names}
        published = data.read_size_flags(polypgen_root, centre, names)
        counts.append(sum(published.values()))
        for name, small in zip(images.names, images.small.tolist(), strict=True):
            agree += published[f"{name}.jpg"] == small
    assert counts == [19, 15, 39, 17, 47, 13]
    assert agree >= 0.98 * 1537


@pytest.mark.slow
def test_published_flags_are_the_ones_used(polypgen_root):
    needs(polypgen_root / "metadata")
    federation = read_frames(polypgen_root, centres=("C5", "C6"), out_centre="C6", size=64)
    small = 0
    for images in (federation.out_test, *parts_of(federation, "C5")):
        names = {f"{name}.jpg" for name in images.names}
        published = data.read_size_flags(polypgen_root, images.centre, names)
        flags = images.small.tolist()
        assert flags == [published[f"{name}.jpg"] for name in images.names]
        small += sum(flags)
    assert small == 47 + 13
    assert federation.notes == ["published size flags for 296 of 296 images"]


@pytest.mark.slow
def test_published_folds_name_for_name(by_rule, polypgen_root):
    lists = needs(polypgen_root / "published_folds")
    for centre, images in by_rule.items():
        if centre == "C6":
            continue  # held out whole
        units = [[i] for i in range(len(images))]
        for fold in range(1, 6):
            parts = split_units(units, "fold", fold)
            for part, indices in zip(("train", "val", "in_test"), parts, strict=True):
                listed = lists / f"{centre}_fold{fold}_{part}.txt"
                names = [images.names[i] for i in indices]
                assert names == listed.read_text().split(), listed.name


@pytest.mark.slow
def test_published_groups_stay_together(by_rule, polypgen_root):
    index = read_index(polypgen_root)
    crossing = {"fold": 0, "grouped": 0}
    for split in crossing:
        for centre, images in by_rule.items():
            grouped = [centre] if split == "grouped" else []
            records = data.list_polypgen(polypgen_root, [centre], 150, grouped).records
            group = [index[centre, name]["near_dup_group"] for name in images.names]
            parts = split_units(data.units_of(records, reading()), split, 1)
            train, validation, test = ({group[i] for i in part} for part in parts)
            crossing[split] += len(train & validation) + len(train & test) + len(validation & test)
    assert crossing["fold"] > 0
    assert crossing["grouped"] == 0


@pytest.mark.slow
def test_real_lesion_sizes(by_rule, polypgen_root):
    """The inverse areas measured here against those of the original files, on record."""
    index = read_index(polypgen_root)
    errors = []
    for centre, images in by_rule.items():
        for name, area in zip(images.names, images.inverse_area.tolist(), strict=True):
            native = index[centre, name]["inv_area_native"]
            if native and math.isfinite(float(native)) and math.isfinite(area):
                errors.append(abs(area / float(native) - 1))
    assert len(errors) > 1400
    assert np.median(errors) < 0.01


@pytest.mark.slow
def test_real_volumes(tmp_path):
    """51 volumes of another data set in LiTS's naming, numbered 0 to 50."""
    root = SHARED / "ct_nifti"
    if not root.is_dir():
        pytest.skip("the real CT volumes are not here")
    federation = read_scans(
        root, centres=("C1", "C2"), out_centre="C2", size=64, cache=str(tmp_path)
    )
    parts = [volumes_of(part) for part in parts_of(federation, "C1")]
    assert [len(part) for part in parts] == [24, 3, 3]
    assert parts[1:] == [[19, 11, 6], [4, 21, 8]]
    assert sorted(volumes_of(federation.out_test)) == list(range(30, 51))

    with (root / "index_slices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    listed = {}
    for row in rows:
        if int(row["mask_px"]) > 50 and int(row["volume"]) >= 30:
            listed[f"volume-{row['volume']}_slice-{row['slice']}"] = float(row["inv_area"])
    held = federation.out_test
    found = dict(zip(held.names, held.inverse_area.tolist(), strict=True))
    assert found == pytest.approx(listed, rel=1e-3)


# ------------------------------------------------------- what would be left out, or read otherwise


def pair_of(root, number):
    """The files of an image of C1."""
    folder = root / "data_C1"
    return (
        folder / "images_C1" / f"frame{number}.jpg",
        folder / "masks_C1" / f"frame{number}_mask.jpg",
    )


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".JPEG", ".Png"])
def test_suffixes_in_any_case_are_read(frames, suffix):
    for path in pair_of(frames, 2):
        path.rename(path.with_suffix(suffix))
    assert "frame2" in everything(read_frames(frames))


def everything(federation):
    """The names of all images of C1."""
    return [name for images in parts_of(federation, "C1") for name in images.names]


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".TIFF", ".webp", ".gif", ".jp2", ".jfif"])
def test_images_of_other_formats_are_not_left_out_without_a_word(frames, suffix):
    image, _ = pair_of(frames, 2)
    shutil.copy(image, image.with_name(f"other{suffix}"))
    with pytest.raises(UserError, match=rf"other{suffix} is not read: PolypGen's images are \.jpg"):
        read_frames(frames)


def test_what_an_operating_system_leaves_is_no_image(frames):
    image, _ = pair_of(frames, 2)
    for name in ("._frame2.jpg", ".DS_Store", "Thumbs.db"):
        image.with_name(name).write_bytes(b"x")
    assert len(everything(read_frames(frames))) == 5


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\udce4"])
def test_names_that_tables_cannot_hold(frames, name):
    image, mask = pair_of(frames, 2)
    image.rename(image.with_name(f"{name}.jpg"))
    mask.rename(mask.with_name(f"{name}_mask.jpg"))
    with pytest.raises(UserError, match=r"this name holds what is no text"):
        read_frames(frames)


@pytest.mark.parametrize("value", [0, 1, 127, 135])
def test_masks_of_a_centre_that_would_all_be_empty(frames, value):
    for number in range(5):
        _, path = pair_of(frames, number)
        mask = np.zeros((30, 40), np.uint8)
        mask[8:16, 8:24] = value
        Image.fromarray(mask).save(path, quality=95)
    with pytest.raises(
        UserError, match=r"masks of centre C1 are all empty|_mask\.jpg has values up"
    ):
        read_frames(frames)


@pytest.mark.parametrize("value", [1, 127])
def test_one_mask_that_would_be_empty(frames, value):
    _, path = pair_of(frames, 2)
    mask = np.zeros((30, 40), np.uint8)
    mask[8:16, 8:24] = value
    Image.fromarray(mask).save(path, "PNG")  # which keeps the value, whatever it is called
    with pytest.raises(UserError, match=rf"frame2_mask\.jpg has values up to {value}"):
        read_frames(frames)


def test_images_that_exif_turns_otherwise_than_their_masks(frames):
    note = Image.Exif()
    note[0x112] = 3
    for number in (1, 2):
        image, _ = pair_of(frames, number)
        Image.open(image).save(image, exif=note)
    _, mask = pair_of(frames, 2)
    Image.open(mask).save(mask, exif=note)  # as its image: that is fine

    federation = read_frames(frames)
    said = "1 images of C1 are turned by EXIF otherwise than their masks, as frame1.jpg"
    assert [note for note in federation.notes if note.startswith(said)]
    assert federation.facts["C2"].remarks == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs the column img_name"),
        ("\n", "needs the column img_name"),
        ("img_name,small_polyp\n", "none of the images of C1"),
        ("name,small\n", "needs the column img_name"),
        ("img_name,small_polyp,small_polyp\nframe0.jpg,True,False\n", "small_polyp, once"),
        ("img_name,small_polyp\nother.jpg,True\n", "none of the images of C1"),
        ("img_name,small_polyp\nframe0.png,True\n", "none of the images of C1"),
        (
            "img_name,small_polyp\na/frame0.jpg,True\nb/frame0.jpg,False\n",
            "small_polyp of frame0.jpg is both True and False",
        ),
    ],
)
def test_size_flags_that_say_nothing(frames, text, words):
    write_flags(frames, "C1", text)
    with pytest.raises(UserError, match=f"my_dataDetails_C1.csv.*{words}"):
        read_frames(frames)


def test_size_flags_of_some_images_are_said_to_be(frames):
    write_flags(frames, "C1", "img_name,small_polyp\nx/frame0.jpg,1\ny/frame0.jpg,True\nz.jpg,0\n")
    assert "published size flags for 1 of 10 images" in read_frames(frames).notes


@pytest.mark.parametrize("name", ["my_dataDetails_C1.CSV", "my_datadetails_C1.csv"])
def test_tables_of_size_flags_that_are_called_otherwise(frames, name):
    write_flags(frames, "C2", "img_name,small_polyp\nframe0.jpg,1\n")
    (frames / "metadata" / name).write_text("img_name,small_polyp\nframe0.jpg,1\n")
    with pytest.raises(UserError, match=rf"{name} is not read: .* called my_dataDetails_C1\.csv"):
        read_frames(frames)


def test_tables_that_are_links_to_nowhere(frames):
    (frames / "metadata").mkdir()
    (frames / "metadata" / "my_dataDetails_C1.csv").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"my_dataDetails_C1\.csv"):
        read_frames(frames)
    (frames / "metadata" / "my_dataDetails_C1.csv").unlink()
    (frames / "index.csv").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"index\.csv"):
        read_frames(frames, split="grouped")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("1,frame0,9\n", "frame0 of centre C1 is in two groups"),
        ("1,frame5, \n", "no near_dup_group for centre C1, frame5"),
    ],
)
def test_groups_that_contradict_themselves_or_are_empty(frames, more, words):
    groups = {name: i for i, name in enumerate(["frame0", "frame1", "frame2", "frame3", "frame4"])}
    rows = [f"{centre},{name},{group}" for centre in (1, 2) for name, group in groups.items()]
    (frames / "index.csv").write_text(
        "centre,name,near_dup_group\n" + "\n".join(rows) + "\n" + more
    )
    image, mask = pair_of(frames, 4)
    shutil.copy(image, image.with_name("frame5.jpg"))
    shutil.copy(mask, mask.with_name("frame5_mask.jpg"))
    with pytest.raises(UserError, match=f"index.csv: {words}"):
        read_frames(frames, split="grouped")


def test_how_volumes_of_lits_lie_is_said(scans):
    turned = np.array([[0, 0, 2, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    for path, affine in (
        ("volume-3", turned),
        ("segmentation-3", turned),
        ("volume-1", 5 * turned),
    ):
        path = scans / "part1" / f"{path}{'.nii.gz' if '3' in path else '.nii'}"
        values = np.asarray(nibabel.load(path).dataobj)
        nibabel.Nifti1Image(values, affine).to_filename(path)

    notes = read_scans(scans).notes
    assert any("2 volumes of C1 are cut into slices that are not axial" in note for note in notes)
    assert any(
        "1 segmentations of C1 lie elsewhere than their volumes, by their affines, as "
        "segmentation-1.nii" in note
        for note in notes
    )
