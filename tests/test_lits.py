"""LiTS: volumes to slices, clients by volume number, the cache, the stand-in, and errors people can read."""

import csv
import gzip
import os
import shutil

import nibabel
import numpy as np
import pytest
import torch

import data
import fedgs
import standin
from conftest import SHARED
from data import DataError


def write_volume(folder, number, labels, hu=None, suffix=".nii.gz", dtype=np.int16):
    """A volume and its segmentation, both (H, W, slices), as NIfTI files."""
    folder.mkdir(parents=True, exist_ok=True)
    hu = np.where(labels == 2, 60, 100) if hu is None else hu
    nibabel.Nifti1Image(hu.astype(dtype), np.eye(4)).to_filename(folder / f"volume-{number}{suffix}")
    nibabel.Nifti1Image(labels.astype(np.uint8), np.eye(4)).to_filename(folder / f"segmentation-{number}{suffix}")


def labels_of(*areas, height=16, width=20):
    """Slices with so many pixels of tumour, the rest liver."""
    labels = np.ones((height * width, len(areas)), np.uint8)
    for k, area in enumerate(areas):
        labels[:area, k] = 2
    return labels.reshape(height, width, len(areas))


@pytest.fixture
def two_clients(tmp_path):
    """Ten volumes of client 1 with tumours of two slices, two of client 5."""
    root = tmp_path / "lits"
    for number in (*range(10), 120, 121):
        write_volume(root / ("part1" if number % 2 else "part2"), number, labels_of(60, 0, 70 + number),
                     suffix=".nii" if number % 3 else ".nii.gz")
    return root


def read(root, **options):
    return data.lits(root, **{"centres": (1, 5), "size": 16, **options})


# ------------------------------------------------------------------------------------------------ slices


def test_slices_and_window(tmp_path):
    """More than 50 pixels of tumour along the third axis; HU of -200 to 200 become 0 to 255."""
    hu = np.linspace(-1000, 1000, 16 * 20 * 4).reshape(16, 20, 4).round()
    labels = labels_of(50, 51, 0, 320)
    write_volume(tmp_path, 3, labels, hu)
    slices, images, masks, _ = data.read_slices(tmp_path / "volume-3.nii.gz", tmp_path / "segmentation-3.nii.gz")
    assert slices.tolist() == [1, 3] and images.dtype == np.uint8 and images.shape == (2, 16, 20)
    for k, image, mask in zip(slices, images, masks):
        assert np.array_equal(mask, labels[:, :, k] == 2)
        assert np.array_equal(image, np.round((np.clip(hu[:, :, k], -200, 200) + 200) / 400 * 255))


@pytest.mark.parametrize("depth", [1, 15, 16, 17, 40])
def test_no_slice_is_lost_between_blocks(tmp_path, depth):
    areas = [(60 + k) * (k % 3 != 1) for k in range(depth)]
    write_volume(tmp_path, 0, labels_of(*areas), np.random.default_rng(0).integers(-300, 300, (16, 20, depth)), dtype=np.float32)
    slices, _, masks, _ = data.read_slices(tmp_path / "volume-0.nii.gz", tmp_path / "segmentation-0.nii.gz")
    assert dict(zip(slices.tolist(), masks.sum((1, 2)).tolist())) == {k: a for k, a in enumerate(areas) if a}


def test_scaled_files(tmp_path):
    """NIfTI files may store (HU - intercept) / slope."""
    write_volume(tmp_path, 0, labels_of(100), dtype=np.int16)
    stored = nibabel.Nifti1Image(np.full((16, 20, 1), 150, np.int16), np.eye(4))
    stored.header.set_slope_inter(2.0, -250.0)  # HU 50
    nibabel.save(stored, tmp_path / "volume-0.nii.gz")
    _, images, _, _ = data.read_slices(tmp_path / "volume-0.nii.gz", tmp_path / "segmentation-0.nii.gz")
    assert np.unique(images).tolist() == [round((50 + 200) / 400 * 255)]


def test_spacing_of_what_the_network_sees(tmp_path):
    """0.8 mm from row to row and 0.5 from column to column, of 160 x 400 pixels that become 32 x 32; also from the cache."""
    write_volume(tmp_path, 0, labels_of(64, height=160, width=400))
    volume = nibabel.load(tmp_path / "volume-0.nii.gz")
    nibabel.Nifti1Image(np.asarray(volume.dataobj), np.diag([-0.8, 0.5, 5, 1])).to_filename(tmp_path / "volume-0.nii.gz")
    for _ in range(2):
        [images], _ = data.read_lits(tmp_path, (1,), 32, 1000, tmp_path / "cache")
        assert images.spacing.tolist() == [pytest.approx([0.8 * 160 / 32, 0.5 * 400 / 32])]


def test_sizes_of_lesions(tmp_path):
    """Small at 1/1000 of the slice as it is in the file, whatever the network sees."""
    write_volume(tmp_path, 0, labels_of(64, 65, height=160, width=400))
    write_volume(tmp_path, 120, labels_of(64, height=160, width=400))
    federation = data.lits(tmp_path, centres=(1, 5), size=160, split="fold", fold=5)
    everything = [part[1] for part in (federation.train, federation.validation, federation.in_test)]
    facts = {name: (a, s) for images in everything for name, a, s in zip(images.names, images.inverse_area.tolist(), images.small.tolist())}
    assert facts == {"volume-0_slice-0": (1000.0, True), "volume-0_slice-1": (64000 / 65, False)}


def test_images_are_grey_squares(two_clients):
    images = read(two_clients).train[1]
    assert images.images.shape[1:] == images.masks.shape[1:] == (1, 16, 16)
    assert images.images.dtype == images.masks.dtype == torch.uint8 and images.masks.unique().tolist() == [0, 1]
    assert torch.equal(data.normalise(images.images.float()), images.images.float())


def test_augmentation_leaves_grey_values_alone(generator):
    images, masks = torch.rand(8, 1, 16, 16, generator=generator), torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    draws = torch.tensor([[0.9, 0.9, 0.9, 0.5, 0.0, 0.9, 0.9, 0.9, 0.9]]).expand(8, -1)  # colour jitter alone
    torch.testing.assert_close(data.augment(images, masks, draws)[0], images)


# ----------------------------------------------------------------------------------------------- clients


def volumes_of(images):
    """The volumes of an Images in order, each once."""
    return list(dict.fromkeys(int(name.split("_")[0].removeprefix("volume-")) for name in images.names))


def test_published_split(tmp_path):
    """SPEC's example: volumes 0 to 29, all with tumours."""
    for number in (*range(30), 120):
        write_volume(tmp_path, number, labels_of(*[60] * (1 + number % 2)))
    federation = data.lits(tmp_path, centres=(1, 5), size=16)
    parts = [volumes_of(part[1]) for part in (federation.train, federation.validation, federation.in_test)]
    assert parts[1:] == [[19, 11, 6], [4, 21, 8]]
    assert sorted(sum(parts, [])) == list(range(30))  # none twice
    assert len(federation.train[1]) == sum(1 + number % 2 for number in parts[0])


@pytest.mark.parametrize("fold", [1, 2, 3, 4, 5])
def test_folds_are_of_volumes(two_clients, fold):
    federation = read(two_clients, split="fold", fold=fold)
    parts = [volumes_of(part[1]) for part in (federation.train, federation.validation, federation.in_test)]
    assert sorted(sum(parts, [])) == list(range(10)) and list(map(len, parts)) == [8, 1, 1]
    assert sorted(parts[1] + parts[2]) == [2 * fold - 2, 2 * fold - 1]


def test_clients_by_volume_number(tmp_path):
    for number in (0, 29, 30, 59, 60, 89, 90, 119, 120, 130):
        write_volume(tmp_path, number, labels_of(60))
    loaded, units = data.read_lits(tmp_path, (1, 2, 3, 4, 5), 16, 1000, tmp_path / "cache")
    assert [volumes_of(images) for images in loaded] == [[0, 29], [30, 59], [60, 89], [119, 90], [120, 130]]  # sorted as text
    assert units == {centre: [[0], [1]] for centre in (1, 2, 3, 4, 5)}


def test_centres_that_are_loaded_elsewhere(two_clients):
    whole, client, held_out = (read(two_clients, here=here) for here in (None, [1], [5]))
    assert {**client.facts, **held_out.facts} == whole.facts and client.out_test is None and not held_out.train
    assert torch.equal(client.train[1].images, whole.train[1].images) and len(held_out.out_test) == len(whole.out_test)
    assert data.work("lits", two_clients, 1) == 10 and data.work("lits", two_clients, 5) == 2


# ----------------------------------------------------------------------------------------------- the cache


def test_cache_is_lossless_and_used(two_clients, monkeypatch):
    first = read(two_clients)
    monkeypatch.setattr(data, "read_slices", lambda *files: pytest.fail("read again"))
    again = read(two_clients)
    assert data.fingerprint(first) == data.fingerprint(again)
    assert len(list((two_clients / "fedgs-cache").iterdir())) == 12
    assert torch.equal(read(two_clients, size=32).train[1].inverse_area, first.train[1].inverse_area)  # for every size


def test_cache_elsewhere(two_clients, tmp_path):
    read(two_clients, cache=str(tmp_path / "elsewhere"))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 12 and not (two_clients / "fedgs-cache").exists()


def test_stale_and_damaged_caches_are_made_anew(two_clients):
    first = read(two_clients)
    cache = two_clients / "fedgs-cache"
    (cache / "volume-0.npz").write_bytes(b"")
    (cache / "volume-1.npz").write_bytes((cache / "volume-1.npz").read_bytes()[:200])
    (cache / "volume-2.npz").write_bytes(b"PK\3\4 no archive")
    shutil.copy(cache / "volume-4.npz", cache / "volume-3.npz")  # whole, but of other files
    assert data.fingerprint(read(two_clients)) == data.fingerprint(first)
    write_volume(two_clients / "part1", 5, labels_of(100, 0, 0), suffix=".nii")
    os.utime(two_clients / "part1" / "segmentation-5.nii", ns=(1, 1))
    changed = read(two_clients)
    assert data.fingerprint(changed) != data.fingerprint(first)
    everything = [part[1] for part in (changed.train, changed.validation, changed.in_test)]
    assert [name for images in everything for name in images.names if "-5_" in name] == ["volume-5_slice-0"]


def test_files_that_look_alike_do_not_share_a_cache(tmp_path):
    for folder, value in (("a", 0), ("b", 100)):
        for number in (0, 1, 2, 120):
            write_volume(tmp_path / folder, number, labels_of(60), np.full((16, 20, 1), value), suffix=".nii")
        for path in (tmp_path / folder).iterdir():
            os.utime(path, ns=(1, 1))
    greys = [data.lits(tmp_path / folder, centres=(1, 5), size=16, cache=str(tmp_path / "cache")).out_test.images.unique().tolist()
             for folder in ("a", "b")]
    assert greys == [[128], [191]]


def test_folders_may_be_links(two_clients, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "lits").symlink_to(two_clients, target_is_directory=True)
    assert data.find("lits", str(tmp_path / "linked")) == tmp_path / "linked"
    assert data.fingerprint(read(tmp_path / "linked")) == data.fingerprint(read(two_clients))


# --------------------------------------------------------------------------------------------------- errors


def break_missing_segmentation(root):
    next(root.rglob("segmentation-3.*")).unlink()


def break_missing_volume(root):
    next(root.rglob("volume-3.*")).unlink()


def break_shape(root):
    write_volume(root, 99, labels_of(60))
    nibabel.Nifti1Image(np.zeros((16, 20, 3), np.int16), np.eye(4)).to_filename(root / "volume-99.nii.gz")
    os.rename(root / "volume-99.nii.gz", root / "part2" / "volume-0.nii.gz")
    os.remove(root / "segmentation-99.nii.gz")
    nibabel.Nifti1Image(labels_of(60), np.eye(4)).to_filename(root / "part2" / "segmentation-0.nii.gz")


def break_truncated(root):
    labels = labels_of(*[200] * 30)
    write_volume(root / "part2", 0, labels, np.random.default_rng(0).integers(-300, 300, labels.shape))
    path = root / "part2" / "volume-0.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_dimensions(root):
    nibabel.Nifti1Image(np.zeros((4, 4, 2, 2), np.int16), np.eye(4)).to_filename(root / "part2" / "volume-0.nii.gz")


def break_label(root):
    write_volume(root / "part2", 0, labels_of(60) + 1)


def break_file(root):
    (root / "part2" / "volume-0.nii.gz").write_bytes(gzip.compress(b"not a NIfTI file" * 99))


def break_twice(root):
    write_volume(root / "part1", 0, labels_of(60), suffix=".nii")


def break_number(root):
    write_volume(root / "part1", 131, labels_of(60))


def break_tumours(root):
    for path in root.rglob("segmentation-12*"):
        nibabel.Nifti1Image(np.ones((16, 20, 3), np.uint8), np.eye(4)).to_filename(path)


def break_checksum(root):
    """A bit that turned over; the slices with a tumour can still be decoded."""
    path = root / "part2" / "volume-0.nii.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


def break_end(root):
    path = root / "part1" / "volume-1.nii"
    path.write_bytes(path.read_bytes()[:-1])


def break_type(root):
    rgb = np.zeros((16, 20, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.Nifti1Image(rgb, np.eye(4)).to_filename(root / "part2" / "volume-0.nii.gz")


def break_header(root):
    path = root / "part1" / "volume-1.nii"
    content = bytearray(path.read_bytes())
    content[70:72] = (9999).to_bytes(2, "little")  # the type of the values
    path.write_bytes(content)


def break_values(root):
    write_volume(root / "part2", 0, labels_of(60), np.full((16, 20, 1), np.nan), dtype=np.float32)


@pytest.mark.parametrize("harm, words", [
    (break_missing_segmentation, ("volume-3", "segmentation-3.nii or .nii.gz is missing")),
    (break_missing_volume, ("segmentation-3", "volume-3.nii or .nii.gz is missing")),
    (break_shape, ("segmentation-0.nii.gz", "(16, 20, 1)", "(16, 20, 3)")),
    (break_truncated, ("volume-0.nii.gz", "damaged or cut short")),
    (break_dimensions, ("volume-0.nii.gz", "4 dimensions")),
    (break_label, ("segmentation-0.nii.gz", "label 3")),
    (break_file, ("cannot read", "volume-0.nii.gz")),
    (break_twice, ("part2/segmentation-0.nii.gz", "part1/segmentation-0.nii", "keep one")),
    (break_number, ("segmentation-131", "0 to 130")),
    (break_tumours, ("no slice with a tumour for centre 5", "--centres")),
    (break_values, ("volume-0.nii.gz", "no numbers")),
    (break_checksum, ("volume-0.nii.gz", "damaged or cut short")),
    (break_end, ("volume-1.nii", "damaged or cut short")),
    (break_type, ("volume-0.nii.gz", "type")),
    (break_header, ("cannot read", "volume-1.nii")),
])
def test_bad_input_is_one_line(two_clients, harm, words, capsys, tmp_path):
    harm(two_clients)
    assert fedgs.main(["--dataset", "lits", "--data-root", str(two_clients), "--centres", "1", "5", "--image-size", "16",
                       "--width", "2", "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options, words", [
    (["--centres", "1", "2", "5"], ("no slice with a tumour for centre 2", "volumes 30 to 59")),
    (["--centres", "1", "6", "--out-centre", "6"], ("--centres 1 6", "1 2 3 4 5")),
    (["--split", "grouped"], ("--split grouped", "LiTS is split by volume")),
    (["--fold", "2"], ("--fold 2", "--split centre has no folds")),
    (["--cache", "FILE/cache"], ("cannot write the cache", "--cache")),
    (["--data-root", "FILE"], ("--data-root", "no such folder")),
])
def test_bad_options_are_one_line(two_clients, options, words, capsys, tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    options = [option.replace("FILE", str(tmp_path / "file")) for option in options]
    assert fedgs.main(["--dataset", "lits", "--data-root", str(two_clients), "--centres", "1", "5", "--image-size", "16",
                       "--width", "2", "--out", str(tmp_path / "run"), *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message


# ------------------------------------------------------------------------------------------------- stand-in


@pytest.fixture
def small_stand_in(monkeypatch):
    """A stand-in that is drawn in a second."""
    monkeypatch.setattr(standin, "LITS", {k: (5, 15, share) for k, (_, _, share) in standin.LITS.items()})
    monkeypatch.setattr(standin, "LITS_SIDE", 256)


def test_stand_in_is_written_once_and_read_as_lits_is(small_stand_in, tmp_path, monkeypatch):
    federation = data.lits(None, size=32, cache=str(tmp_path / "drawn"))
    assert federation.source == "LiTS stand-in" and len(federation.out_test) == 15
    assert len(list((tmp_path / "drawn").glob("volume-*.nii.gz"))) == 25
    monkeypatch.setattr(standin, "lits_volumes", lambda *_: pytest.fail("drawn again"))
    again = data.lits(None, size=32, cache=str(tmp_path / "drawn"))
    assert data.fingerprint(federation) == data.fingerprint(again)
    for root in (tmp_path / "drawn", tmp_path):  # also when it, or what holds it, is named as the data
        assert data.lits(root, size=32).source == "LiTS stand-in"


def test_drawing_that_was_interrupted_begins_again(small_stand_in, tmp_path):
    data.stand_in_volumes(tmp_path)
    mark = tmp_path / data.STAND_IN_MARK
    mark.write_text("Unfinished. " + mark.read_text())
    (tmp_path / "volume-0.nii.gz").write_bytes(b"half a file")
    assert data.lits(None, size=32, cache=str(tmp_path)).source == "LiTS stand-in"


def test_stand_in_never_takes_the_place_of_volumes(two_clients):
    before = {path: path.read_bytes() for path in two_clients.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="holds volumes that are not the stand-in's"):
        data.lits(None, cache=str(two_clients))
    assert {path: path.read_bytes() for path in two_clients.rglob("*") if path.is_file()} == before


def test_stand_in_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the stand-in .* --cache"):
        data.lits(None, cache=str(tmp_path / "file" / "folder"))


@pytest.mark.parametrize("centre", [1, 5])
def test_stand_in_has_the_published_share_of_small_slices(centre):
    volumes, slices, share = standin.LITS[centre]
    areas = []
    for hu, labels in standin.lits_volumes(centre):
        assert hu.shape == labels.shape and hu.dtype == np.int16 and set(np.unique(labels)) == {0, 1, 2}
        assert hu.min() <= -1000 and 100 < hu[labels == 1].mean() < 130 > 75 > hu[labels == 2].mean()
        areas += [int(area) for area in (labels == 2).sum((0, 1)) if area]
    assert len(areas) == slices and min(areas) > 50
    assert sum(labels.shape[0] * labels.shape[1] >= 1000 * area for area in areas) / slices == pytest.approx(share, abs=1 / slices)


# -------------------------------------------------------------------------------------------- a whole run


def test_a_run(two_clients, tmp_path, capsys):
    assert fedgs.main(["--dataset", "lits", "--data-root", str(two_clients), "--centres", "1", "5", "--image-size", "32",
                       "--width", "2", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert "fedgs, utnet, published split, seed 0 on LiTS" in output and "C1 16 + 2 + 2, C5 (held out) 4" in output
    with (tmp_path / "run" / "scores.csv").open(newline="") as file:
        assert {row["name"] for row in csv.DictReader(file) if row["split"] == "out_test"} == {
            f"volume-{v}_slice-{k}" for v in (120, 121) for k in (0, 2)}


def test_defaults_are_lits_own():
    config, _ = fedgs.configure({"dataset": "lits", "preset": "paper"})
    assert (config.rounds, config.local_epochs, config.log_base, config.tau) == (60, 5, 1000.0, 1000.0)
    assert (config.centres, config.out_centre, config.split) == ((1, 2, 3, 4, 5), 5, "centre")


# ------------------------------------------------------------------------------------------- real volumes


def test_real_volumes_against_an_independent_count(tmp_path):
    """All slices, masks and areas of real CT volumes, counted once more with nibabel and numpy alone."""
    root = SHARED / "ct_nifti"
    if not root.is_dir():
        pytest.skip("the real CT volumes are not here")
    loaded, units = data.read_lits(root, (1, 2), 64, 1000, tmp_path / "cache")
    found = {name: a for images in loaded for name, a in zip(images.names, images.inverse_area.tolist())}
    expected = {}
    for path in root.glob("segmentation-*.nii.gz"):
        labels = np.asarray(nibabel.load(path).dataobj)
        counts = (labels == 2).sum(axis=(0, 1))
        number = path.name.removeprefix("segmentation-").removesuffix(".nii.gz")
        expected |= {f"volume-{number}_slice-{k}": labels[:, :, 0].size / n for k, n in enumerate(counts) if n > 50}
    assert found == expected and len(found) > 1000
    with (root / "index_slices.csv").open(newline="") as file:
        listed = {f"volume-{r['volume']}_slice-{r['slice']}" for r in csv.DictReader(file) if int(r["mask_px"]) > 50}
    assert listed == set(found)
    for number in (0, 13, 44):
        files = root / f"volume-{number}.nii.gz", root / f"segmentation-{number}.nii.gz"
        slices, _, masks, _ = data.cached_slices(number, *files, tmp_path / "cache")
        labels = np.asarray(nibabel.load(root / f"segmentation-{number}.nii.gz").dataobj)
        assert np.array_equal(masks, (labels == 2).transpose(2, 0, 1)[slices])
    assert [max(volumes_of(images)) for images in loaded] == [29, 50] and [len(u) for u in units.values()] == [30, 21]
