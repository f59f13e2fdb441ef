"""CT volumes: damaged files, grey values, which slices are kept, and the cache of them."""

import csv
import gzip
import json
import os
import shutil
import struct
import warnings

import nibabel
import numpy as np
import pytest
from conftest import SHARED
from PIL import Image
from tiny_volumes import labels_of, write_volume

from support import volumes
from support.errors import UserError


def noise(depth):
    """Slices whose file cannot be compressed much."""
    return np.random.default_rng(0).integers(-300, 300, (16, 20, depth))


# ---------------------------------------------------------------------------------- a NIfTI file


@pytest.fixture
def pair(tmp_path):
    """A volume and its segmentation, with tumours in slices 0 and 2."""
    return write_volume(tmp_path, 0, labels_of(60, 0, 80))


def cut_short(volume, segmentation):
    write_volume(volume.parent, 0, labels_of(*[200] * 30), noise(30))
    volume.write_bytes(volume.read_bytes()[: volume.stat().st_size // 2])


def turn_a_bit_of_the_checksum(volume, segmentation):
    content = bytearray(volume.read_bytes())
    content[-6] ^= 1  # all slices can still be decoded
    volume.write_bytes(content)


def not_nifti(volume, segmentation):
    volume.write_bytes(gzip.compress(b"not a NIfTI file" * 99))


def four_dimensions(volume, segmentation):
    nibabel.Nifti1Image(np.zeros((4, 4, 2, 2), np.int16), np.eye(4)).to_filename(volume)


def colours(volume, segmentation):
    rgb = np.zeros((16, 20, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.Nifti1Image(rgb, np.eye(4)).to_filename(volume)


def other_shape(volume, segmentation):
    nibabel.Nifti1Image(np.zeros((16, 20, 1), np.uint8), np.eye(4)).to_filename(segmentation)


def other_label(volume, segmentation):
    write_volume(volume.parent, 0, labels_of(60, 0, 80) + 1)


def no_numbers(volume, segmentation):
    hu = np.zeros((16, 20, 1))
    hu[3, 4] = np.nan
    write_volume(volume.parent, 0, labels_of(60), hu, dtype=np.float32)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut_short, ("volume-0.nii.gz", "damaged or cut short")),
        (turn_a_bit_of_the_checksum, ("volume-0.nii.gz", "damaged or cut short")),
        (not_nifti, ("cannot read", "volume-0.nii.gz")),
        (four_dimensions, ("volume-0.nii.gz", "4 dimensions")),
        (colours, ("volume-0.nii.gz", "type")),
        (other_shape, ("segmentation-0.nii.gz", "(16, 20, 1)", "(16, 20, 3)")),
        (other_label, ("segmentation-0.nii.gz", "label 3", "1 (liver)")),
        (no_numbers, ("volume-0.nii.gz", "no numbers")),
    ],
)
def test_a_file_that_cannot_be_used_is_named(pair, harm, words):
    harm(*pair)
    with pytest.raises(UserError) as error:
        list(volumes.cut_slices(*pair))
    for word in words:
        assert word in str(error.value)


def test_a_damaged_segmentation_is_noticed_too(pair):
    turn_a_bit_of_the_checksum(pair[1], None)
    with pytest.raises(UserError, match=r"segmentation-0\.nii\.gz, it is damaged"):
        list(volumes.cut_slices(*pair))


def test_an_uncompressed_file_that_lacks_its_last_byte(tmp_path):
    pair = write_volume(tmp_path, 1, labels_of(60, 0, 0), suffix=".nii")
    assert len(list(volumes.cut_slices(*pair))) == 1
    pair[0].write_bytes(pair[0].read_bytes()[:-1])
    with pytest.raises(UserError, match=r"volume-1\.nii, it is damaged or cut short"):
        list(volumes.cut_slices(*pair))


def test_a_header_that_makes_no_sense(tmp_path, caplog):
    pair = write_volume(tmp_path, 1, labels_of(60), suffix=".nii")
    content = bytearray(pair[0].read_bytes())
    content[70:72] = (9999).to_bytes(2, "little")  # the type of the values
    pair[0].write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*volume-1\.nii"):
        volumes.open_volume(pair[0])
    assert not caplog.records  # it is said once


@pytest.mark.parametrize(
    ("change", "apart"),
    [
        (np.diag([1.0, 1, 1, 1]), None),
        (np.diag([1.0, 1, 1.1, 1]), None),  # up to 0.2 mm
        (np.diag([1.0, 1, -1, 1]), "4.0 mm"),  # slices in the other order
        (np.diag([1.0, 1.2, 1, 1]), "3.8 mm"),
    ],
)
def test_a_segmentation_lies_where_its_volume_does(tmp_path, change, apart):
    pair = write_volume(tmp_path, 0, labels_of(60, 0, 80))
    labels = np.asarray(nibabel.load(pair[1]).dataobj)
    nibabel.Nifti1Image(labels, change).to_filename(pair[1])
    if apart is None:
        volumes.check_geometry(*pair)
    else:
        with pytest.raises(UserError, match=rf"segmentation-0.* lies up to {apart} away from"):
            volumes.check_geometry(*pair)


# ------------------------------------------------------------------------------------ grey slices


def test_which_slices_are_kept_and_their_grey_values(tmp_path):
    """More than 50 pixels of tumour along the third axis; HU of -200 to 200 become 0 to 255."""
    hu = np.linspace(-1000, 1000, 16 * 20 * 4).reshape(16, 20, 4).round()
    labels = labels_of(50, 51, 0, 320)
    slices = list(volumes.cut_slices(*write_volume(tmp_path, 3, labels, hu)))

    assert [one.number for one in slices] == [1, 3]
    for k, grey, lesion in slices:
        assert grey.dtype == np.uint8
        assert np.array_equal(lesion, labels[:, :, k] == 2)
        expected = np.round((np.clip(hu[:, :, k], -200, 200) + 200) / 400 * 255)
        assert np.array_equal(grey, expected)


@pytest.mark.parametrize("depth", [1, 15, 16, 17, 40])
def test_no_slice_is_lost_between_blocks(tmp_path, depth):
    expected = {k: 60 + k for k in range(depth) if k % 3 != 1}
    areas = [expected.get(k, 0) for k in range(depth)]
    hu = noise(depth)
    pair = write_volume(tmp_path, 0, labels_of(*areas), hu, dtype=np.float32)

    found = {}
    for k, grey, lesion in volumes.cut_slices(*pair):
        found[k] = lesion.sum()
        assert np.array_equal(grey, volumes.window(hu[..., [k]], pair[0])[0])
    assert found == expected


def test_scaled_files(tmp_path):
    """NIfTI files may store (HU - intercept) / slope."""
    volume, segmentation = write_volume(tmp_path, 0, labels_of(100))
    stored = nibabel.Nifti1Image(np.full((16, 20, 1), 150, np.int16), np.eye(4))
    stored.header.set_slope_inter(2.0, -250.0)  # HU 50
    nibabel.save(stored, volume)
    [one] = volumes.cut_slices(volume, segmentation)
    assert np.unique(one.grey).tolist() == [round((50 + 200) / 400 * 255)]


def test_levels_of_a_large_volume_from_a_part_of_it(tmp_path, monkeypatch):
    """Every third row and column tell about the same as all of them."""
    values = np.random.default_rng(0).normal(500, 100, (60, 60, 20))
    path, _ = write_volume(tmp_path, 0, labels_of(*[60] * 20, height=60, width=60), values)
    volume = volumes.open_volume(path)
    whole = volumes.own_levels(volume, path)
    assert whole == pytest.approx(tuple(np.percentile(values.astype(np.int16), [0.5, 99.5])))
    monkeypatch.setattr(volumes, "SAMPLE", 9000)
    part = volumes.own_levels(volume, path)
    assert part != whole
    assert part == pytest.approx(whole, abs=15)


def test_labels_of_own_volumes(tmp_path):
    """Any one label is lesion, and one of several by its number."""
    tumour = labels_of(60, 0, 5) * 2 - 2  # 0 and 2
    pair = write_volume(tmp_path, 0, tumour)
    any_label = volumes.Cut((), (), fewest=1)
    found = volumes.slice_files(*pair, tmp_path / "cache", any_label)
    assert [k for k, _, _ in found.slices] == [0, 2]
    assert (found.lesion, found.spacing) == ((2,), (1.0, 1.0))

    pair = write_volume(tmp_path, 1, labels_of(60, 0, 5))
    with pytest.raises(UserError, match=r"segmentation-1\.nii\.gz holds the labels 1, 2: say"):
        volumes.slice_files(*pair, tmp_path / "cache1", any_label)
    liver = any_label._replace(lesion=(1,))
    found = volumes.slice_files(*pair, tmp_path / "cache1", liver)
    assert [read(mask).astype(bool).sum() for _, _, mask in found.slices] == [260, 320, 315]


def test_a_slice_at_the_size_of_the_network():
    stripes = np.zeros((64, 32), np.uint8)
    stripes[:, 1::2] = 255
    small = volumes.to_size(stripes, 16)
    assert small.shape == (16, 16, 1)
    assert small.dtype == np.uint8
    assert 100 < small[2:-2, 2:-2].min() <= small[2:-2, 2:-2].max() < 155  # interpolated


# ------------------------------------------------------------------------------- LiTS in a folder


@pytest.fixture
def folder(tmp_path):
    """Volumes 0 to 3 in two sub-folders, with either suffix."""
    root = tmp_path / "lits"
    write_volume(root / "part2", 0, labels_of(60))
    write_volume(root / "part1", 1, labels_of(60), suffix=".nii")
    write_volume(root / "part2", 2, labels_of(60), suffix=".nii")
    write_volume(root / "part1", 3, labels_of(60))
    return root


def test_volumes_in_sub_folders_with_either_suffix(folder):
    (folder / "part1" / "volume-4.nii.gz.part").write_text("a download that goes on")
    (folder / "part1" / "liver-volume-5.nii").write_text("another data set")
    found = volumes.find_volumes(folder, range(4))
    assert list(found) == [0, 1, 2, 3]
    assert found[0] == (
        folder / "part2" / "volume-0.nii.gz",
        folder / "part2" / "segmentation-0.nii.gz",
    )
    assert found[1][1] == folder / "part1" / "segmentation-1.nii"


def test_folders_may_be_links(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "lits").symlink_to(folder, target_is_directory=True)
    assert list(volumes.find_volumes(tmp_path / "linked", range(4))) == [0, 1, 2, 3]


def test_a_volume_without_its_segmentation(folder):
    (folder / "part1" / "segmentation-3.nii.gz").unlink()
    with pytest.raises(UserError, match=r"volume-3.* no segmentation: .*-3\.nii or .* is missing"):
        volumes.find_volumes(folder, range(4))


def test_a_segmentation_without_its_volume(folder):
    (folder / "part1" / "volume-3.nii.gz").unlink()
    with pytest.raises(UserError, match=r"segmentation-3.* no volume: volume-3\.nii or .*missing"):
        volumes.find_volumes(folder, range(4))


def test_volumes_that_nobody_wants_may_be_incomplete(folder):
    """Another process may be writing them."""
    (folder / "part1" / "volume-3.nii.gz").unlink()
    write_volume(folder / "part1", 0, labels_of(60), suffix=".nii")
    assert list(volumes.find_volumes(folder, (1, 2, 7))) == [1, 2]


def test_a_volume_that_is_there_twice(folder):
    write_volume(folder / "part1", 0, labels_of(60), suffix=".nii")
    with pytest.raises(UserError, match=r"part2/seg.*part1/seg.* the same segmentation: keep one"):
        volumes.find_volumes(folder, range(4))


# --------------------------------------------------------------------- its slices as image files


@pytest.fixture
def cut(pair, tmp_path):
    """cut(): the slices of `pair` through a cache."""

    def through_cache():
        return volumes.slice_files(*pair, tmp_path / "cache" / "volume-0").slices

    return through_cache


def never(*files):
    pytest.fail("cut again")


def read(path):
    return np.asarray(Image.open(path))


def test_cached_slices_are_lossless(tmp_path):
    hu = noise(3)
    pair = write_volume(tmp_path, 7, labels_of(60, 0, 80), hu)
    expected = list(volumes.cut_slices(*pair))
    folder = tmp_path / "cache" / "volume-7"
    found = volumes.slice_files(*pair, folder).slices

    assert [k for k, _, _ in found] == [0, 2]
    for (_, grey, mask), one in zip(found, expected, strict=True):
        assert np.array_equal(read(grey), one.grey)
        assert np.array_equal(read(mask), 255 * one.lesion.astype(np.uint8))
        assert grey.parent == mask.parent == folder


def test_a_volume_is_cut_once(cut, monkeypatch):
    first = cut()
    monkeypatch.setattr(volumes, "cut_slices", never)
    assert cut() == first


def test_a_volume_without_tumours_is_looked_at_once(tmp_path, monkeypatch):
    pair = write_volume(tmp_path, 0, labels_of(0, 50))
    assert volumes.slice_files(*pair, tmp_path / "cache").slices == []
    monkeypatch.setattr(volumes, "cut_slices", never)
    assert volumes.slice_files(*pair, tmp_path / "cache").slices == []


def remove_index(folder):
    (folder / "index.json").unlink()


def cut_index_short(folder):
    path = folder / "index.json"
    path.write_bytes(path.read_bytes()[:20])


def index_of_something_else(folder):
    (folder / "index.json").write_text("[1, 2, 3]")


def remove_slice(folder):
    (folder / "slice-2.png").unlink()


def remove_mask(folder):
    (folder / "slice-0_mask.png").unlink()


def empty_slice(folder):
    (folder / "slice-0.png").write_bytes(b"")


def cut_slice_short(folder):
    path = folder / "slice-0.png"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "harm",
    [
        remove_index,
        cut_index_short,
        index_of_something_else,
        remove_slice,
        remove_mask,
        empty_slice,
        cut_slice_short,
    ],
)
def test_what_is_missing_or_damaged_is_cut_anew(cut, tmp_path, harm):
    first = cut()
    before = [read(path).tobytes() for _, *paths in first for path in paths]
    harm(tmp_path / "cache" / "volume-0")
    assert cut() == first
    assert [read(path).tobytes() for _, *paths in first for path in paths] == before


def test_a_volume_that_has_changed_is_cut_anew(cut, pair, tmp_path):
    cut()
    write_volume(tmp_path, 0, labels_of(0, 100, 0))
    assert [k for k, _, _ in cut()] == [1]


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_of_the_same_length_that_is_younger(cut, pair, monkeypatch, which):
    cut()
    os.utime(pair[which], ns=(1, 1))
    monkeypatch.setattr(volumes, "cut_slices", never)
    with pytest.raises(pytest.fail.Exception, match="cut again"):
        cut()


@pytest.mark.parametrize(
    "other", [{"window": (-100.0, 100.0)}, {"window": ()}, {"fewest": 71}, {"lesion": (1,)}]
)
def test_another_rule_cuts_anew(pair, tmp_path, other):
    folder = tmp_path / "cache"
    first = volumes.slice_files(*pair, folder).slices
    before = [read(path).mean() for path in first[-1][1:]]
    again = volumes.slice_files(*pair, folder, volumes.LITS._replace(**other)).slices
    assert len(again) < len(first) or [read(path).mean() for path in again[-1][1:]] != before


def test_volumes_that_look_alike_do_not_share_a_cache(tmp_path):
    greys = []
    for folder, value in (("a", 0), ("b", 100)):
        hu = np.full((16, 20, 1), value)
        pair = write_volume(tmp_path / folder, 0, labels_of(60), hu, suffix=".nii")
        for path in pair:
            os.utime(path, ns=(1, 1))
        [(_, grey, _)] = volumes.slice_files(*pair, tmp_path / "cache").slices
        greys.append(np.unique(read(grey)).tolist())
    assert greys == [[128], [191]]


def test_an_interrupted_cut_begins_again(cut, monkeypatch, tmp_path):
    whole = volumes.cut_slices

    def interrupted(*files):
        yield next(whole(*files))
        raise KeyboardInterrupt

    monkeypatch.setattr(volumes, "cut_slices", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut()
    names = sorted(path.name for path in (tmp_path / "cache" / "volume-0").iterdir())
    assert names == ["slice-0.png", "slice-0_mask.png"]  # and no index
    monkeypatch.setattr(volumes, "cut_slices", whole)
    assert [k for k, _, _ in cut()] == [0, 2]


def test_a_cache_that_cannot_be_written(pair, tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"cannot write the cache .*file/cache .*--cache"):
        volumes.slice_files(*pair, tmp_path / "file" / "cache" / "volume-0")


# ------------------------------------------------------------------------------------ real volumes


@pytest.fixture(scope="module")
def real_volumes():
    if not (SHARED / "ct_nifti").is_dir():
        pytest.skip("the real CT volumes are not here")
    return SHARED / "ct_nifti"


@pytest.mark.slow
def test_real_slices_against_an_independent_count(real_volumes, tmp_path):
    """All slices and areas of real volumes, counted once more with nibabel and numpy alone."""
    found = {}
    expected = {}
    for number, pair in volumes.find_volumes(real_volumes, range(51)).items():
        labels = np.asarray(nibabel.load(pair[1]).dataobj)
        for k, count in enumerate((labels == 2).sum(axis=(0, 1))):
            if count > 50:
                expected[number, k] = count

        for k, _, mask in volumes.slice_files(*pair, tmp_path / str(number)).slices:
            tumour = read(mask) > 0
            found[number, k] = tumour.sum()
            assert np.array_equal(tumour, labels[:, :, k] == 2)
    assert found == expected
    assert len(found) > 1000

    with (real_volumes / "index_slices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    listed = {(int(row["volume"]), int(row["slice"])) for row in rows if int(row["mask_px"]) > 50}
    assert listed == set(found)


def test_a_real_volume_through_a_cache(real_volumes, tmp_path):
    pair = tmp_path / "volume-13.nii.gz", tmp_path / "segmentation-13.nii.gz"
    for path in pair:
        shutil.copy(real_volumes / path.name, path)
    hu = np.asarray(nibabel.load(pair[0]).dataobj).astype(np.float64)
    for k, grey, _ in volumes.slice_files(*pair, tmp_path / "cache").slices:
        expected = (np.clip(hu[:, :, k], -200, 200) + 200) * 255 / 400
        assert np.abs(read(grey) - expected).max() <= 0.501


# ------------------------------------------------------------------------- headers that cannot be


FIELDS = {  # name -> type and place in a NIfTI-1 header
    **{f"pixdim{i}": ("f", 76 + 4 * i) for i in (1, 2, 3)},
    **{"vox_offset": ("f", 108), "scl_slope": ("f", 112), "scl_inter": ("f", 116)},
    **{"xyzt_units": ("B", 123), "bitpix": ("h", 72), "datatype": ("h", 70)},
    **{"srow_x0": ("f", 280), "srow_z3": ("f", 324)},
}


def change_header(path, field, value):
    kind, place = FIELDS[field]
    content = bytearray(path.read_bytes())
    content[place : place + struct.calcsize(kind)] = struct.pack(f"<{kind}", value)
    path.write_bytes(content)


@pytest.fixture
def plain(tmp_path):
    """An uncompressed pair, whose headers can be changed."""
    return write_volume(tmp_path, 0, labels_of(60, 0, 80), suffix=".nii")


def read_pair(pair):
    volumes.check_geometry(*pair)
    return list(volumes.cut_slices(*pair))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("pixdim1", (0, -1, 9e-4, 1.1e3, 1e30, 1e-30, np.nan, np.inf)),
        ("pixdim2", (0, np.nan)),
        ("pixdim3", (0, -1, 1e6)),
        ("scl_slope", (np.inf, -np.inf, 1e30, 1e-30, -1e13)),
        ("vox_offset", (0, 100, np.inf, -np.inf, np.nan)),
        ("xyzt_units", (1, 3, 9)),
        ("bitpix", (0, 32)),
        ("datatype", (0, 64)),
        ("srow_x0", (np.nan, np.inf)),
        ("srow_z3", (-np.inf, 1e30)),
    ],
)
def test_fields_of_a_header_that_cannot_be(plain, which, field, values):
    content = plain[which].read_bytes()
    for value in values:
        change_header(plain[which], field, value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError, match=plain[which].name):
                read_pair(plain)
        plain[which].write_bytes(content)


@pytest.mark.parametrize("intercept", [np.inf, np.nan, 1e30])
def test_an_intercept_counts_with_a_slope(plain, intercept):
    change_header(plain[0], "scl_inter", intercept)
    change_header(plain[0], "scl_slope", 0)
    before = [one.grey.tolist() for one in read_pair(plain)]
    change_header(plain[0], "scl_slope", 1)
    with pytest.raises(UserError, match=r"volume-0\.nii"):
        read_pair(plain)
    change_header(plain[0], "scl_inter", 0)
    assert [one.grey.tolist() for one in read_pair(plain)] == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("pixdim1", 1.1e-3), ("pixdim3", 900), ("xyzt_units", 2), ("xyzt_units", 0)],
)
def test_fields_that_can_be(plain, field, value):
    change_header(plain[0], field, value)
    assert len(read_pair(plain)) == 2


@pytest.mark.parametrize("label", [np.nan, np.inf, -1, 0.5, 65536, 1e30])
def test_values_that_are_no_labels(tmp_path, label):
    labels = labels_of(60, 0).astype(np.float64)
    labels[3, 4, 1] = label
    path = tmp_path / "segmentation.nii"
    nibabel.Nifti1Image(labels, np.eye(4)).to_filename(path)
    with pytest.raises(UserError, match=r"segmentation\.nii holds the label .* 0 to 65535"):
        volumes.only_label(path)


@pytest.mark.parametrize("value", [1e300, -1e300, 2e30, np.nan])
def test_values_too_large_to_be_any(tmp_path, value):
    values = np.zeros((16, 20, 2))
    values[3, 4] = value
    pair = write_volume(tmp_path, 0, labels_of(60, 60), values, dtype=np.float64)
    for cut in (volumes.LITS, volumes.LITS._replace(window=())):
        with pytest.raises(UserError, match=r"volume-0\.nii\.gz holds values that are no numbers"):
            list(volumes.cut_slices(*pair, cut))


def test_a_compressed_file_with_far_more_in_it_than_its_voxels(pair):
    content = gzip.decompress(pair[0].read_bytes())
    pair[0].write_bytes(gzip.compress(content + bytes(1000)))
    assert len(read_pair(pair)) == 2
    pair[0].write_bytes(gzip.compress(content + bytes(volumes.MORE + 1)))
    with pytest.raises(UserError, match=r"volume-0\.nii\.gz holds far more than the \d+ bytes"):
        read_pair(pair)


def test_a_header_that_claims_more_voxels_than_there_are(tmp_path):
    """Before memory is asked for: compressed or not, a file has to hold what it says."""
    pair = write_volume(tmp_path, 0, labels_of(60, 0), suffix=".nii")
    content = bytearray(pair[1].read_bytes())
    content[42:46] = struct.pack("<hh", 32767, 32767)
    packed = tmp_path / "packed.nii.gz"
    packed.write_bytes(gzip.compress(content))
    pair[1].write_bytes(content)
    for path in (pair[1], packed):
        with pytest.raises(UserError, match=rf"cannot read .*{path.name}, it is damaged or cut"):
            volumes.only_label(path)


AXES = {"axial": (0, 1, 2), "sagittal": (1, 2, 0), "coronal": (0, 2, 1)}  # of the array's axes


@pytest.mark.parametrize("name", AXES)
def test_volumes_that_are_not_stored_axially_are_said(tmp_path, name):
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for column, row in enumerate(AXES[name]):
        affine[row, column] = -2
    labels = labels_of(60, 0)
    for kind in ("volume", "segmentation"):
        nibabel.Nifti1Image(labels, affine).to_filename(tmp_path / f"{kind}.nii")
    pair = tmp_path / "volume.nii", tmp_path / "segmentation.nii"
    remarks = volumes.remarks_on_slices("C1", [pair[0]])
    said = "1 volumes of C1 are cut into slices that are not axial, by their affines, as volume.nii"
    assert remarks == ([] if name == "axial" else [said])


def test_nothing_is_said_of_a_volume_that_says_nothing(tmp_path):
    path = tmp_path / "volume.nii"
    nibabel.Nifti1Image(labels_of(60), None).to_filename(path)
    assert volumes.is_axial(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_volume(tmp_path):
    os.mkfifo(tmp_path / "volume.nii")
    with pytest.raises(UserError, match=r"cannot read .*volume\.nii: it is no file"):
        volumes.open_volume(tmp_path / "volume.nii")


@pytest.mark.parametrize(
    "key", ["made_from", "slices", "lesion", "spacing", "checksums", "checksum"]
)
@pytest.mark.parametrize("value", [None, [], [1], "x"])
def test_an_index_that_someone_has_edited_is_not_believed(cut, key, value):
    found = cut()
    path = found[0][1].parent / "index.json"
    index = json.loads(path.read_text())
    if value is None:
        del index[key]
    else:
        index[key] = value
    path.write_text(json.dumps(index))
    assert cut() == found


def test_a_slice_in_the_place_of_another_is_noticed(cut):
    found = cut()
    (_, first, _), (_, second, _) = found
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert cut() == found
    assert first.read_bytes() == content


def test_decompression_ends_where_the_voxels_should(pair, monkeypatch):
    content = gzip.decompress(pair[0].read_bytes())
    pair[0].write_bytes(gzip.compress(content + bytes(100_000)))
    sizes = []
    read = gzip.GzipFile.read

    def counted(file, size):
        sizes.append(size)
        return read(file, size)

    monkeypatch.setattr(volumes, "MORE", 1000)
    volume = volumes.open_volume(pair[0])
    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    with pytest.raises(UserError, match=r"holds far more"):
        volumes.check_whole(pair[0], volume)
    assert sum(sizes) < len(content) + 4000


def test_an_index_without_any_checksum_is_not_believed(cut):
    found = cut()
    path = found[0][1].parent / "index.json"
    index = json.loads(path.read_text())
    del index["checksum"], index["checksums"]
    path.write_text(json.dumps({**index, "slices": [2]}))
    assert cut() == found
