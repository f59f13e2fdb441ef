"""python -m tools.predict: masks of one's own images and volumes."""

import gzip
import itertools
import math

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, exit_code, refused
from PIL import Image
from test_common import LITS, TINY, save_checkpoint

import data
import fedgs
from models import UTNet
from support import checkpoints, runs
from support.errors import UserError
from tools import predict
from tools.common import open_checkpoint

SOURCE = "FedGS, trained on PolypGen stand-in"
BARE = ["--image-size", "32", "--width", "2"]  # what bare state dicts are here, unlike published


@pytest.fixture
def checkpoint(finished):
    return finished / "best.pt"


@pytest.fixture
def ct_checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "ct.pt", "LiTS stand-in", **LITS)


def main(checkpoint, out, *paths):
    """-> exit code"""
    return exit_code(predict.main, [*paths, "--checkpoint", checkpoint, "--out", out])


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def results_of(*names):
    """What images of these names leave."""
    kinds = ("mask", "overlay")
    return {f"{name}_{kind}.png" for name in names for kind in kinds}


def write_image(path, height=41, width=67):
    """A dark frame with a bright rectangle in rows 10 to 19 and columns 20 to 49. -> path"""
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[10:20, 20:50] = 220
    Image.fromarray(pixels).save(path)
    return path


def write_volume(path, shape=(16, 16, 3)):
    """Random Hounsfield units. -> path"""
    hu = np.random.default_rng(0).integers(-300, 300, shape).astype(np.int16)
    nibabel.Nifti1Image(hu, np.diag([-0.9, -0.8, 3, 1])).to_filename(path)
    return path


def bright(images, size):
    """In place of a network: lesion is where the first channel is above 127."""
    lesion = (images[:, :1] > 127).float()
    return F.interpolate(lesion, size, mode="nearest-exact") > 0.5


def reading(kind, size, window=()):
    """CT in its window where no other is given."""
    if kind == "slices":
        window = window or (-200.0, 200.0)
    return data.Reading(kind, window, size, tau=150)


def segment(inputs, out, kind, size, source=SOURCE, network=bright):
    """-> messages of files that could not be read"""
    return predict.segment_files(network, inputs, out, reading(kind, size), source)


# -------------------------------------------------------------------------------- what is segmented


def test_of_a_folder_all_but_masks(tmp_path):
    """LiTS's own folders hold the truth beside the volumes."""
    names = ["volume-3.nii", "segmentation-3.nii", "volume-4.nii.gz", "volume-4_mask.nii.gz"]
    for name in (*names, "a.png", "a_mask.png", "a_overlay.png", "b.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "below.png").mkdir()
    assert list(predict.find_inputs([tmp_path], "slices")) == ["volume-3", "volume-4"]
    assert list(predict.find_inputs([tmp_path], "colour")) == ["a", "b"]

    # A file that is named is taken, whatever it is called.
    mask = tmp_path / "a_mask.png"
    assert predict.find_inputs([str(mask)], "colour") == {"a_mask": mask}


def test_a_file_named_twice_is_one(tmp_path):
    path = write_image(tmp_path / "a.png")
    assert predict.find_inputs([path, tmp_path, path], "colour") == {"a": path}


def test_what_cannot_be_predicted(tmp_path, capsys, checkpoint, ct_checkpoint):
    frame = write_image(tmp_path / "a.png")
    out = tmp_path / "out"
    refused(capsys, main(checkpoint, out, tmp_path / "none.png"), "none.png: no such file")
    code = main(ct_checkpoint, out, frame)
    refused(capsys, code, "a.png: a network for volumes reads .nii, .nii.gz")
    code = main(checkpoint, out, checkpoint)
    refused(capsys, code, "best.pt", ".png")

    empty = tmp_path / "empty"
    empty.mkdir()
    code = main(checkpoint, out, empty)
    refused(capsys, code, "empty holds nothing to segment", ".png")
    twin = write_image(empty / "a.bmp")
    code = main(checkpoint, out, frame, twin)
    refused(capsys, code, "a.png", "a.bmp", "same results")
    assert not out.exists()


def test_what_the_command_needs(tmp_path, capsys, checkpoint):
    frame = write_image(tmp_path / "a.png")
    refused(capsys, exit_code(predict.main, [frame, "--checkpoint", checkpoint]), "--out")
    refused(capsys, exit_code(predict.main, [frame, "--out", tmp_path / "out"]), "--checkpoint")
    files = ["--checkpoint", checkpoint, "--out", tmp_path / "out"]
    refused(capsys, exit_code(predict.main, files), "PATH")
    refused(capsys, exit_code(predict.main, [frame, *files, "--lr", 1]), "--lr")
    refused(capsys, exit_code(predict.main, [frame, *files, "--width", 4]), "trained with 2")
    assert names_in(tmp_path) == {"a.png"}


def test_nothing_is_overwritten(tmp_path, capsys, checkpoint):
    first = write_image(tmp_path / "a.png")
    second = write_image(tmp_path / "b.png")
    out = tmp_path / "out"
    assert main(checkpoint, out, second) == 0
    (out / "b_mask.png").unlink()
    before = (out / "b_overlay.png").read_bytes()
    capsys.readouterr()

    # One result that is there already, and the other file is not begun.
    code = main(checkpoint, out, first, second)
    refused(capsys, code, "b_overlay.png is there already", "--out")
    assert names_in(out) == {"b_overlay.png"}
    assert (out / "b_overlay.png").read_bytes() == before


# ------------------------------------------------------------------------------------------- images


def test_mask_and_overlay_of_an_image(tmp_path):
    path = write_image(tmp_path / "frame.png", 64, 64)
    assert segment({"frame": path}, tmp_path / "out", "colour", 64) == []

    with Image.open(tmp_path / "out" / "frame_mask.png") as mask:
        assert mask.mode == "L"
        assert mask.text["Comment"] == SOURCE
        expected = np.zeros((64, 64), np.uint8)
        expected[10:20, 20:50] = 255
        assert np.array_equal(np.asarray(mask), expected)

    with Image.open(tmp_path / "out" / "frame_overlay.png") as overlay:
        assert overlay.text["Comment"] == SOURCE
        pixels = np.asarray(overlay).astype(int)
    assert (pixels[19, 20:50] == predict.COLOUR).all()  # the outline
    assert (pixels[15, 30] == np.round(0.7 * 220 + 0.3 * predict.COLOUR)).all()
    assert (pixels[30:] == 40).all()  # beside the mask, and below the source, as it was
    assert (pixels[:10] != 40).any()  # a stand-in is named in the picture itself


def test_a_picture_of_a_real_network_has_no_text(tmp_path):
    path = write_image(tmp_path / "frame.png", 64, 64)
    assert segment({"frame": path}, tmp_path / "out", "colour", 64, "trained on PolypGen") == []
    with Image.open(tmp_path / "out" / "frame_overlay.png") as overlay:
        assert (np.asarray(overlay)[:10] == 40).all()


@pytest.mark.parametrize("model", ["utnet", "sd-utnet"])
def test_images_through_the_command_line(tmp_path, capsys, model):
    checkpoint = save_checkpoint(tmp_path / "best.pt", model=model)
    folder = tmp_path / "frames"
    folder.mkdir()
    sizes = {"wide": (90, 20), "tall": (31, 90), "grey": (50, 40)}
    write_image(folder / "wide.JPG", 20, 90)
    write_image(folder / "tall.png", 90, 31)
    grey = tmp_path / "grey.tif"
    Image.new("L", (50, 40)).save(grey)

    assert main(checkpoint, tmp_path / "out", folder, grey) == 0
    assert names_in(tmp_path / "out") == results_of(*sizes)
    for name, size in sizes.items():
        for kind in ("mask", "overlay"):
            with Image.open(tmp_path / "out" / f"{name}_{kind}.png") as image:
                assert image.size == size
                assert "PolypGen stand-in" in image.text["Comment"]
    text = capsys.readouterr().out
    assert f"polypgen-fedgs-{model}-f1-s0, trained on PolypGen stand-in, 32x32" in text
    assert "wide_mask.png" in text


def test_masks_are_the_networks(tmp_path, checkpoint):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert main(checkpoint, tmp_path / "out", tmp_path / "noise.png") == 0

    network, _, _ = open_checkpoint(checkpoint, {})
    pixels = torch.from_numpy(noise).permute(2, 0, 1)[None]
    expected = fedgs.predict(network, pixels)[0, 0].numpy()
    with Image.open(tmp_path / "out" / "noise_mask.png") as mask:
        assert np.array_equal(np.asarray(mask) > 0, expected)


def test_prediction_at_another_size(generator):
    """The scores are resized, not the mask: at the pixels' centres they are nearly the same."""
    torch.manual_seed(0)
    network = UTNet(width=2)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    plain = fedgs.predict(network, images)
    assert torch.equal(fedgs.predict(network, images, (32, 32)), plain)
    assert 0 < plain.float().mean() < 1

    larger = fedgs.predict(network, images, (96, 64))
    assert larger.shape == (3, 1, 96, 64)
    agreement = (larger[:, :, 1::3, ::2] == plain).float().mean()
    assert agreement > 0.9


@pytest.mark.parametrize(
    ("lesions", "expected"),
    [
        ([], "no lesion"),
        ([(10, 20)], "1 component, 0.4% of the image"),
        ([(10, 20), (14, 24)], "1 component, 0.8% of the image"),  # corner to corner
        ([(10, 20), (40, 50)], "2 components, 0.8% of the image"),
    ],
)
def test_what_was_found_is_said(tmp_path, lesions, expected):
    pixels = np.zeros((64, 64, 3), np.uint8)
    for top, left in lesions:
        pixels[top : top + 4, left : left + 4] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    paths = tmp_path / "mask.png", tmp_path / "overlay.png"
    colour = reading("colour", 64)
    found = predict.segment_image(bright, tmp_path / "a.png", *paths, colour, SOURCE)
    assert found == expected


def test_the_network_sees_an_image_as_in_training(tmp_path, generator):
    pixels = torch.randint(0, 256, (41, 67, 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    seen = []

    def network(images, size):
        seen.append(images)
        return bright(images, size)

    assert segment({"a": tmp_path / "a.png"}, tmp_path / "out", "colour", 32, SOURCE, network) == []
    resized = Image.fromarray(pixels.numpy()).resize((32, 32), Image.Resampling.BILINEAR)
    assert torch.equal(seen[0], torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None])


def test_one_bad_file_among_good_ones(tmp_path, capsys, checkpoint):
    good = write_image(tmp_path / "a.png")
    bad = tmp_path / "b.png"
    bad.write_bytes(good.read_bytes()[:100])
    last = write_image(tmp_path / "c.png")
    code = main(checkpoint, tmp_path / "out", good, bad, last)
    refused(capsys, code, "cannot read", "b.png", "2 of 3 files were segmented")
    assert names_in(tmp_path / "out") == results_of("a", "c")


def test_a_photograph_is_segmented_as_it_looks(tmp_path):
    """Its mask and overlay lie where the camera's user saw the lesion."""
    pixels = np.full((32, 64, 3), 40, np.uint8)
    pixels[4:10, 50:60] = 220
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right makes it upright
    turned.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    assert segment({"phone": tmp_path / "phone.jpg"}, tmp_path / "out", "colour", 64) == []
    expected = pixels[..., 0] > 127
    with Image.open(tmp_path / "out" / "phone_mask.png") as mask:
        assert mask.size == (64, 32)
        assert not mask.getexif()
        assert (np.asarray(mask) > 0)[expected].all()
        assert ((np.asarray(mask) > 0) != expected).mean() < 0.01
    with Image.open(tmp_path / "out" / "phone_overlay.png") as overlay:
        assert overlay.size == (64, 32)
        assert not overlay.getexif()


@pytest.mark.parametrize(("window", "threshold"), [((), 2000), ((0.0, 8000.0), 4000)])
def test_a_grey_image_of_more_than_eight_bits(tmp_path, window, threshold):
    """Through a network for grey images, by its percentiles or the window of training."""
    deep = np.linspace(0, 4000, 64 * 64).reshape(64, 64).astype(np.uint16)
    deep[0, :10] = 60000
    Image.fromarray(deep).save(tmp_path / "scan.png")

    def grey_network(images, size):
        assert images.shape == (1, 1, 64, 64)
        return bright(images, size)

    paths = tmp_path / "mask.png", tmp_path / "overlay.png"
    how = reading("grey", 64, window)
    predict.segment_image(grey_network, tmp_path / "scan.png", *paths, how, SOURCE)
    found = np.asarray(Image.open(paths[0])) > 0
    assert (found != (deep > threshold)).mean() < 0.02


# ------------------------------------------------------------------------------------------ volumes

OBLIQUE = np.array(
    [
        [0.0, -0.7, 0.1, 12.0],
        [0.8, 0.0, 0.0, -30.0],
        [0.0, 0.05, 2.5, 7.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)


def write_oblique_volume(path, kind):
    """An oblique, scaled volume of 40 slices, with a comment in its header."""
    hu = np.random.default_rng(0).integers(-300, 300, (24, 20, 40)).astype(np.int16)
    volume = kind(hu, OBLIQUE)
    volume.header.set_slope_inter(2, -10)
    volume.header.set_xyzt_units("mm", "sec")
    comment = nibabel.nifti1.Nifti1Extension("comment", b"a comment that the mask does not need")
    volume.header.extensions.append(comment)
    volume.set_sform(OBLIQUE, 2)
    volume.to_filename(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_mask_of_a_volume(tmp_path, suffix, kind):
    """It lies where its volume lies, voxel by voxel."""
    path = tmp_path / f"scan{suffix}"
    write_oblique_volume(path, kind)
    source = "FedGS, trained on LiTS stand-in"

    def square(images, size):
        """As bright; the slices are seen as squares."""
        assert images.shape[1:] == (1, 24, 24)
        return bright(images, size)

    assert segment({"scan": path}, tmp_path / "out", "slices", 24, source, square) == []

    volume = nibabel.load(path)
    mask = nibabel.load(tmp_path / "out" / "scan_mask.nii.gz")
    assert type(mask) is kind
    assert mask.shape == volume.shape
    assert np.array_equal(mask.affine, volume.affine)
    assert mask.header.get_zooms() == volume.header.get_zooms()
    assert mask.header.get_xyzt_units() == ("mm", "sec")
    for code in ("sform_code", "qform_code"):
        assert mask.header[code] == volume.header[code]

    assert mask.get_data_dtype() == np.uint8
    assert len(mask.header.extensions) == 0
    assert source.encode() in mask.header["descrip"].tobytes()
    assert set(np.unique(np.asarray(mask.dataobj))) == {0, 1}

    # As other programs see it: the volume's scale is not the mask's.
    with gzip.open(tmp_path / "out" / "scan_mask.nii.gz") as file:
        header = type(mask.header).from_fileobj(file)
    assert (header["scl_slope"], header["scl_inter"], header["cal_max"]) == (1, 0, 1)


def turned_affines():
    """Affines of every orientation that an array may have, and of oblique ones."""
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.zeros((4, 4))
            for row, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
                affine[row, axis] = sign * (0.7, 0.9, 2.5)[axis]
            affine[:, 3] = (12, -30, 7, 1)
            yield affine

    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]]
    yield turn @ np.diag([-0.8, -0.8, 3, 1])


def turned_volumes(folder, sform, qform):
    """A volume in each of these orientations, with several scales. -> {name: path}"""
    slopes = itertools.cycle([(1, 0), (2.0, -1024.0), (None, None)])
    stored = np.random.default_rng(0).integers(-500, 1500, (16, 16, 5)).astype(np.int16)
    inputs = {}
    for i, affine in enumerate(turned_affines()):
        volume = nibabel.Nifti1Image(stored, affine)
        volume.set_sform(affine, sform)
        volume.set_qform(affine, qform)
        volume.header.set_slope_inter(*next(slopes))
        inputs[f"scan{i}"] = folder / f"scan{i}.nii.gz"
        volume.to_filename(inputs[f"scan{i}"])
    return inputs


PLACE = (  # all that says where a volume lies: programs differ in which of it they read
    *("sform_code", "srow_x", "srow_y", "srow_z", "qform_code", "pixdim"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
CODES = pytest.mark.parametrize(
    ("sform", "qform"), [(1, 1), (2, 0), (0, 1), (0, 0)], ids=["both", "sform", "qform", "neither"]
)


@CODES
def test_a_mask_lies_where_its_volume_does_in_any_orientation(tmp_path, sform, qform):
    """A voxel of the mask and the voxel of the volume that it is about are at the same place."""
    inputs = turned_volumes(tmp_path, sform, qform)
    assert segment(inputs, tmp_path / "out", "slices", 16) == []
    for name, path in inputs.items():
        volume = nibabel.load(path)
        mask = nibabel.load(tmp_path / "out" / f"{name}_mask.nii.gz")
        assert mask.shape == volume.shape
        assert np.array_equal(mask.affine, volume.affine)
        for field in PLACE:
            assert np.array_equal(mask.header[field], volume.header[field]), field

        grey = np.round((np.clip(np.asarray(volume.dataobj), -200, 200) + 200) / 400 * 255)
        assert 0 < (grey > 127).mean() < 1
        assert np.array_equal(np.asarray(mask.dataobj), grey > 127)


@CODES
def test_a_mask_lies_where_another_program_sees_its_volume(tmp_path, sform, qform):
    """SimpleITK's physical points of the same index, and its voxels of the same place."""
    sitk = pytest.importorskip("SimpleITK")
    inputs = turned_volumes(tmp_path, sform, qform)
    assert segment(inputs, tmp_path / "out", "slices", 16) == []
    for name, path in inputs.items():
        values = np.asarray(nibabel.load(path).dataobj)
        expected = np.round((np.clip(values, -200, 200) + 200) / 400 * 255) > 127

        volume = sitk.ReadImage(str(path))
        mask = sitk.ReadImage(str(tmp_path / "out" / f"{name}_mask.nii.gz"))
        assert mask.GetSize() == volume.GetSize()
        for index in itertools.product((0, 15), (0, 15), (0, 4)):
            place = volume.TransformIndexToPhysicalPoint(index)
            assert mask.TransformIndexToPhysicalPoint(index) == place
        assert np.array_equal(sitk.GetArrayFromImage(mask).transpose(2, 1, 0), expected)


def test_a_volume_of_another_byte_order(tmp_path):
    hu = np.random.default_rng(0).integers(-300, 300, (16, 16, 5)).astype(">i2")
    header = nibabel.Nifti1Header(endianness=">")
    nibabel.Nifti1Image(hu, OBLIQUE, header).to_filename(tmp_path / "a.nii")
    assert segment({"a": tmp_path / "a.nii"}, tmp_path / "out", "slices", 16) == []
    mask = nibabel.load(tmp_path / "out" / "a_mask.nii.gz")
    grey = np.round((np.clip(hu, -200, 200) + 200) / 400 * 255)
    assert np.array_equal(np.asarray(mask.dataobj), grey > 127)
    assert np.allclose(mask.affine, OBLIQUE)


def test_a_volume_without_a_window(tmp_path):
    """Its own percentiles are black and white, as they were in training."""
    values = np.random.default_rng(0).normal(900, 300, (24, 24, 40)).astype(np.float32)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    how = data.Reading("slices", (), 24, 150)
    predict.segment_volume(bright, tmp_path / "a.nii.gz", tmp_path / "m.nii.gz", how, SOURCE)
    low, high = np.percentile(values, [0.5, 99.5])
    found = np.asarray(nibabel.load(tmp_path / "m.nii.gz").dataobj)
    assert (found != (values > (low + high) / 2)).mean() < 0.005


def test_voxels_of_a_mask(tmp_path):
    """Of a square volume, which nothing has to be resized for."""
    hu = np.random.default_rng(0).integers(-300, 300, (24, 24, 33)).astype(np.int16)
    nibabel.Nifti1Image(hu, np.eye(4)).to_filename(tmp_path / "a.nii")
    assert segment({"a": tmp_path / "a.nii"}, tmp_path / "out", "slices", 24) == []
    grey = np.round((np.clip(hu, -200, 200) + 200) / 400 * 255)
    mask = nibabel.load(tmp_path / "out" / "a_mask.nii.gz")
    assert np.array_equal(np.asarray(mask.dataobj), grey > 127)


def test_a_lesion_of_a_volume_stays_in_its_place(tmp_path):
    """Slices are no squares, and the network sees them as such."""
    hu = np.full((32, 20, 3), -200, np.int16)
    hu[4:14, 12:18, 1] = 200
    nibabel.Nifti1Image(hu, np.eye(4)).to_filename(tmp_path / "a.nii")
    assert segment({"a": tmp_path / "a.nii"}, tmp_path / "out", "slices", 64) == []
    mask = np.asarray(nibabel.load(tmp_path / "out" / "a_mask.nii.gz").dataobj)
    assert np.array_equal(mask > 0, hu > 0)


def test_what_was_found_in_a_volume(tmp_path):
    hu = np.full((16, 16, 20), -200, np.int16)
    hu[:10, :10, 3] = 200
    hu[:5, :10, 17] = 200
    nibabel.Nifti1Image(hu, np.diag([2, 2, 5, 1])).to_filename(tmp_path / "a.nii")
    path = tmp_path / "a.nii"
    slices = reading("slices", 16)
    found = predict.segment_volume(bright, path, tmp_path / "mask.nii.gz", slices, SOURCE)
    assert found == "lesion in 2 of 20 slices, 3.0 ml"  # 150 voxels of 20 mm3

    nothing = np.full((16, 16, 2), -200, np.int16)
    nibabel.Nifti1Image(nothing, np.eye(4)).to_filename(path)
    found = predict.segment_volume(bright, path, tmp_path / "mask.nii.gz", slices, SOURCE)
    assert found == "no lesion"


def test_upper_case_suffix(tmp_path):
    path = write_volume(tmp_path / "a.nii.gz").rename(tmp_path / "A.NII.GZ")
    inputs = predict.find_inputs([path], "slices")
    assert segment(inputs, tmp_path / "out", "slices", 16) == []
    assert names_in(tmp_path / "out") == {"A_mask.nii.gz"}


def test_volumes_through_the_command_line(tmp_path, ct_checkpoint, capsys):
    whole = write_volume(tmp_path / "a.nii", (40, 52, 17))
    cut = tmp_path / "b.nii.gz"
    cut.write_bytes(whole.read_bytes()[:3000])
    other = write_volume(tmp_path / "c.nii.gz", (40, 52, 17))
    code = main(ct_checkpoint, tmp_path / "out", whole, cut, other)
    refused(capsys, code, "b.nii.gz", "2 of 3 files were segmented")
    assert names_in(tmp_path / "out") == {"a_mask.nii.gz", "c_mask.nii.gz"}

    masks = []
    for name in ("a", "c"):
        mask = nibabel.load(tmp_path / "out" / f"{name}_mask.nii.gz")
        assert mask.shape == (40, 52, 17)
        assert b"LiTS stand-in" in mask.header["descrip"].tobytes()
        masks.append(np.asarray(mask.dataobj))
    assert np.array_equal(masks[0], masks[1])  # compressed or not


def test_an_interrupted_volume_leaves_nothing(tmp_path):
    path = write_volume(tmp_path / "a.nii", (16, 16, 40))
    calls = []

    def interrupted(images, size):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return bright(images, size)

    with pytest.raises(KeyboardInterrupt):
        segment({"a": path}, tmp_path / "out", "slices", 16, network=interrupted)
    assert calls == [16, 16]  # a block at a time
    assert names_in(tmp_path / "out") == set()


def test_a_volume_that_is_damaged_in_the_middle(tmp_path):
    """It is noticed before a mask is begun that would end where the damage is."""
    path = write_volume(tmp_path / "a.nii.gz", (16, 16, 40))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    [message] = segment({"a": path}, tmp_path / "out", "slices", 16)
    assert "a.nii.gz" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_real_volumes(tmp_path, ct_checkpoint):
    """A real CT volume and its mask: equal shape, affine and spacing."""
    paths = [SHARED / "ct_nifti" / f"volume-{number}.nii.gz" for number in (0, 12)]
    if not all(path.exists() for path in paths):
        pytest.skip("the real CT volumes are not here")

    assert main(ct_checkpoint, tmp_path / "out", *paths) == 0
    for path in paths:
        volume = nibabel.load(path)
        name = path.name.replace(".nii.gz", "_mask.nii.gz")
        mask = nibabel.load(tmp_path / "out" / name)
        assert mask.shape == volume.shape
        assert np.array_equal(mask.affine, volume.affine)
        assert mask.header.get_zooms() == volume.header.get_zooms()
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


# --------------------------------------------------------------------------------- whose batch norm


def test_adapted_to_the_images_that_are_segmented(tmp_path, checkpoint, capsys):
    """Batch norm's statistics are measured on all of them, but for the one that is damaged."""
    generator = np.random.default_rng(1)
    for i in range(20):
        pixels = generator.integers(0, 40 + 10 * i, (48, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    (tmp_path / "30.png").write_bytes(b"no image")
    arguments = [tmp_path, "--checkpoint", checkpoint, "--out", tmp_path / "out", "--adapt"]
    refused(capsys, exit_code(predict.main, arguments), "30.png", "20 of 21 files")

    network, config, _ = open_checkpoint(checkpoint, {})
    paths = [tmp_path / f"{i:02}.png" for i in range(20)]
    images = [predict.as_batch(Image.open(path), config.image_size) for path in paths]
    fedgs.adapt(network, torch.cat(images))
    for path, image in zip(paths, images, strict=True):
        expected = fedgs.predict(network, image, (48, 40))[0, 0].numpy()
        with Image.open(tmp_path / "out" / f"{path.stem}_mask.png") as mask:
            assert np.array_equal(np.asarray(mask) > 0, expected)


def test_what_it_says_of_statistics(tmp_path, checkpoint, capsys):
    image = write_image(tmp_path / "one.png")
    out = tmp_path / "out"
    assert main(checkpoint, out, image, "--adapt") == 0
    assert "statistics are those of 1 of these images, which are few" in capsys.readouterr().out

    local = save_checkpoint(tmp_path / "local.pt", batch_norm="local")
    assert main(local, tmp_path / "again", image) == 0
    assert "chosen with each centre's own statistics: see --adapt" in capsys.readouterr().out

    (tmp_path / "bad.png").write_bytes(b"")
    assert main(checkpoint, tmp_path / "none", tmp_path / "bad.png", "--adapt") == 2
    assert "nothing to adapt to could be read" in capsys.readouterr().out


def test_the_samples_of_volumes_are_spread_over_them(tmp_path, monkeypatch):
    """Slices k of a volume are of value k; every third of 38, whichever blocks they are in."""
    values = np.arange(38) * 4 - 200
    hu = np.broadcast_to(values, (16, 16, 38)).astype(np.int16)
    for name in ("a", "b"):
        nibabel.Nifti1Image(hu, np.eye(4)).to_filename(tmp_path / f"{name}.nii")
    inputs = {name: tmp_path / f"{name}.nii" for name in ("a", "b")}
    whole = predict.samples_of(inputs, reading("slices", 16))
    assert whole.shape == (76, 1, 16, 16)

    monkeypatch.setattr(predict, "ENOUGH", 26)
    some = predict.samples_of(inputs, reading("slices", 16))
    assert torch.equal(some, torch.cat([whole[:38:3], whole[38::3]]))
    monkeypatch.setattr(predict, "ENOUGH", 1)
    assert torch.equal(predict.samples_of(inputs, reading("slices", 16)), whole[:1])


def test_the_samples_of_volumes_are_between_their_own_levels(tmp_path):
    values = np.random.default_rng(0).integers(0, 300, (16, 16, 4))
    for name, factor in (("a", 1), ("b", 10)):
        image = nibabel.Nifti1Image((factor * values).astype(np.int16), np.eye(4))
        image.to_filename(tmp_path / f"{name}.nii")
    inputs = {name: tmp_path / f"{name}.nii" for name in ("a", "b")}
    samples = predict.samples_of(inputs, data.Reading("slices", (), 16, 150))
    assert torch.equal(samples[:4], samples[4:])
    assert (samples.min(), samples.max()) == (0, 255)


def test_the_batch_norm_that_a_client_kept_for_itself(tmp_path, capsys):
    config = fedgs.Config(**TINY, method="fedbn")
    about = runs.describe_weights(config, "PolypGen stand-in", 7, fedgs.__version__)
    flat = fedgs.FlatNetwork(fedgs.build_network(config))
    own = {"C1": torch.full_like(flat.affine, 0.5, dtype=torch.float32)}
    path = tmp_path / "fedbn.pt"
    checkpoints.save(path, checkpoints.with_about(flat.network, about, own))
    image = write_image(tmp_path / "one.png")

    # The same network whose batch norm has these scales and shifts.
    expected = fedgs.build_network(config)
    expected.load_state_dict(flat.network.state_dict())
    for module in expected.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 0.5)
            torch.nn.init.constant_(module.bias, 0.5)

    network, _, about = open_checkpoint(path, {})
    predict.use_batch_norm_of("C1", network, about, path)
    for tensor, found in zip(expected.parameters(), network.parameters(), strict=True):
        assert torch.equal(tensor, found)

    assert main(path, tmp_path / "out", image, "--client", "C1") == 0
    refused(capsys, main(path, tmp_path / "no", image, "--client", "C2"), "C2", "those of C1")
    bare = save_checkpoint(tmp_path / "other.pt")
    refused(capsys, main(bare, tmp_path / "no", image, "--client", "C1"), "other.pt has none")
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------- published checkpoints


def test_a_bare_state_dict_by_option(tmp_path, capsys):
    torch.save(dict(UTNet(width=2).state_dict()), tmp_path / "published.pt")
    frame = write_image(tmp_path / "a.png")
    files = [frame, "--checkpoint", tmp_path / "published.pt", "--out", tmp_path / "out"]
    assert exit_code(predict.main, [*files, *BARE]) == 0
    assert "trained elsewhere" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "a_mask.png") as mask:
        assert mask.text["Comment"] == "FedGS, trained elsewhere"

    refused(capsys, exit_code(predict.main, files), "published.pt does not fit this network")


def test_results_that_cannot_be_written(tmp_path, checkpoint, capsys):
    frame = write_image(tmp_path / "a.png")
    (tmp_path / "out").write_text("a file where a folder is to be")
    refused(capsys, main(checkpoint, tmp_path / "out", frame), "out")


def test_errors_of_one_file_alone_are_collected(tmp_path):
    """A fault of this program is none of them."""
    path = write_image(tmp_path / "a.png")

    def faulty(images, size):
        raise ValueError("a fault")

    def unreadable(images, size):
        raise UserError("cannot read")

    with pytest.raises(ValueError, match="a fault"):
        segment({"a": path}, tmp_path / "out", "colour", 32, network=faulty)
    found = segment({"a": path}, tmp_path / "out", "colour", 32, network=unreadable)
    assert found == ["cannot read"]
