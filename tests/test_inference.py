"""--predict and --evaluate: masks of one's own images and volumes, and tables of a checkpoint that is here already."""

import csv
import json
import os

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import data
import fedgs
import inference
import metrics
import runs
from conftest import SHARED, refused
from models import SDUTNet, UTNet

PUBLISHED = ["--image-size", "32", "--width", "2"]  # what the bare state dicts of these tests are, other than published ones


def save_checkpoint(path, **options):
    """A checkpoint of an untrained network, as a run would leave it. -> path"""
    config = fedgs.Config(**{"image_size": 32, "width": 2, "centres": (4, 6), **options})
    runs.write(path, fedgs.checkpoint(fedgs.build_network(config), config, "PolypGen stand-in", 7))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "best.pt")


@pytest.fixture
def ct_checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "ct.pt", dataset="lits", centres=(1, 5), out_centre=5, split="centre")


def main(*arguments):
    """-> exit code"""
    try:
        return fedgs.main(list(map(str, arguments)))
    except SystemExit as stop:  # how argparse ends
        return stop.code


def write_image(path, height=41, width=67):
    """A dark frame with a bright rectangle in rows 10 to 19 and columns 20 to 49."""
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[10:20, 20:50] = 220
    Image.fromarray(pixels).save(path)
    return path


def bright(images, size):
    """In place of a network: lesion is where the first channel is above 127."""
    masks = torch.nn.functional.interpolate((images[:, :1] > 127).float(), size, mode="nearest-exact")
    return masks > 0.5


# ------------------------------------------------------------------------------------------------ images


def test_mask_and_overlay_of_an_image(tmp_path):
    path = write_image(tmp_path / "frame.png", 64, 64)
    [] = inference.segment_files(bright, {"frame": path}, tmp_path / "out", "polypgen", 64, "FedGS, trained on PolypGen stand-in")
    with Image.open(tmp_path / "out" / "frame_mask.png") as mask:
        assert mask.mode == "L" and "stand-in" in mask.text["Comment"]
        expected = np.zeros((64, 64), np.uint8)
        expected[10:20, 20:50] = 255
        assert np.array_equal(np.asarray(mask), expected)
    with Image.open(tmp_path / "out" / "frame_overlay.png") as overlay:
        pixels = np.asarray(overlay).astype(int)
    assert (pixels[30:, :] == 40).all()  # beside the mask the image is as it was, below the stand-in's name
    assert (pixels[19, 20:50] == inference.COLOUR).all() and (pixels[15, 30] == np.round(0.7 * 220 + 0.3 * inference.COLOUR)).all()


@pytest.mark.parametrize("model", ["utnet", "sd-utnet"])
def test_images_through_the_command_line(tmp_path, capsys, model):
    checkpoint = save_checkpoint(tmp_path / "best.pt", model=model)
    folder = tmp_path / "frames"
    folder.mkdir()
    for name, size in (("wide.JPG", (20, 90)), ("tall.png", (90, 31))):
        write_image(folder / name, *size)
    (folder / "notes.txt").write_text("")
    write_image(folder / "wide_mask.png")
    grey = tmp_path / "grey.tif"
    Image.new("L", (50, 40)).save(grey)
    assert main("--predict", folder, grey, "--checkpoint", checkpoint, "--out", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}_{kind}.png" for name in ("wide", "tall", "grey") for kind in ("mask", "overlay")}
    for name, size in (("wide", (90, 20)), ("tall", (31, 90)), ("grey", (50, 40))):
        for kind in ("mask", "overlay"):
            with Image.open(tmp_path / "out" / f"{name}_{kind}.png") as image:
                assert image.size == size
    assert "trained on PolypGen stand-in" in capsys.readouterr().out
    network, _, _ = fedgs.open_checkpoint(checkpoint, {})
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "noise.png")  # of the network's size
    assert main("--predict", folder / "noise.png", "--checkpoint", checkpoint, "--out", tmp_path / "out") == 0
    pixels = torch.from_numpy(np.array(Image.open(folder / "noise.png"))).permute(2, 0, 1)[None]
    expected = fedgs.predict(network, pixels)[0, 0].numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "noise_mask.png")) > 0, expected)


def test_prediction_at_the_networks_size_is_that_of_the_test(generator):
    network = UTNet(width=2)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    plain = fedgs.predict(network, images)
    assert torch.equal(fedgs.predict(network, images, (32, 32)), plain) and 0 < plain.float().mean() < 1
    larger = fedgs.predict(network, images, (96, 64))
    assert larger.shape == (3, 1, 96, 64)
    agreement = (larger[:, :, 1::3, ::2] == plain).float().mean()  # at the pixels' centres, nearly
    assert agreement > 0.9


def test_one_bad_file_among_good_ones(tmp_path, capsys, checkpoint):
    good, bad, last = write_image(tmp_path / "a.png"), tmp_path / "b.png", write_image(tmp_path / "c.png")
    bad.write_bytes(good.read_bytes()[:100])
    code = main("--predict", good, bad, last, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    refused(capsys, code, "cannot read", "b.png", "2 of 3 files")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}_{kind}.png" for name in "ac" for kind in ("mask", "overlay")}


def test_pixels_that_would_be_cut_off_are_refused(tmp_path, capsys, checkpoint):
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(tmp_path / "deep.png")
    code = main("--predict", tmp_path / "deep.png", "--checkpoint", checkpoint, "--out", tmp_path / "out")
    refused(capsys, code, "deep.png", "I;16", "8 bits")


def test_what_cannot_be_predicted(tmp_path, capsys, checkpoint, ct_checkpoint):
    frame, out = write_image(tmp_path / "a.png"), ("--out", tmp_path / "out")
    refused(capsys, main("--predict", frame, "--checkpoint", checkpoint), "--predict needs --out")
    refused(capsys, main("--predict", frame, *out), "need --checkpoint")
    refused(capsys, main("--checkpoint", checkpoint), "needs one of them")
    refused(capsys, main("--predict", tmp_path / "none.png", "--checkpoint", checkpoint, *out), "none.png: no such file")
    refused(capsys, main("--predict", frame, "--checkpoint", ct_checkpoint, *out), "a.png", "lits reads .nii")
    refused(capsys, main("--predict", checkpoint, "--checkpoint", checkpoint, *out), "best.pt", ".png")
    (tmp_path / "empty").mkdir()
    refused(capsys, main("--predict", tmp_path / "empty", "--checkpoint", checkpoint, *out), "empty holds no")
    twin = write_image(tmp_path / "empty" / "a.bmp")
    refused(capsys, main("--predict", frame, twin, "--checkpoint", checkpoint, *out), "a.png", "a.bmp", "same results")
    assert not (tmp_path / "out").exists()
    assert main("--predict", frame, "--checkpoint", checkpoint, *out) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    refused(capsys, main("--predict", frame, "--checkpoint", checkpoint, *out), "there already", "--out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# ----------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_mask_of_a_volume(tmp_path, suffix, kind):
    """Values, shape, affine, spacing and codes, of a volume that is oblique, scaled, and 40 slices deep."""
    affine = np.array([[0.0, -0.7, 0.1, 12], [0.8, 0, 0, -30], [0, 0.05, 2.5, 7], [0, 0, 0, 1]])
    hu = np.random.default_rng(0).integers(-300, 300, (24, 24, 40)).astype(np.int16)
    volume = kind(hu, affine)
    volume.header.set_slope_inter(2, -10)
    volume.header.set_xyzt_units("mm", "sec")
    volume.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"a comment that the mask does not need"))
    volume.set_sform(affine, 2)
    path = tmp_path / f"scan{suffix}"
    volume.to_filename(path)
    [] = inference.segment_files(bright, {"scan": path}, tmp_path / "out", "lits", 24, "FedGS, trained on LiTS stand-in")
    volume, mask = nibabel.load(path), nibabel.load(tmp_path / "out" / "scan_mask.nii.gz")
    assert type(mask) is kind and mask.shape == volume.shape and np.array_equal(mask.affine, volume.affine)
    assert mask.header.get_zooms() == volume.header.get_zooms() and mask.header.get_xyzt_units() == ("mm", "sec")
    assert (mask.header["sform_code"], mask.header["qform_code"]) == (volume.header["sform_code"], volume.header["qform_code"])
    assert mask.get_data_dtype() == np.uint8 and b"LiTS stand-in" in mask.header["descrip"].tobytes()
    grey = np.round((np.clip(volume.get_fdata(), -200, 200) + 200) / 400 * 255)
    assert np.array_equal(np.asarray(mask.dataobj), grey > 127)


def test_a_folder_of_volumes(tmp_path):
    """LiTS's own folders hold the truth beside the volumes."""
    for name in ("volume-3.nii", "segmentation-3.nii", "volume-4.nii.gz", "volume-4_mask.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    assert list(inference.find_inputs([tmp_path], "lits")) == ["volume-3", "volume-4"]


def test_upper_case_suffix(tmp_path):
    nibabel.Nifti1Image(np.zeros((16, 16, 3), np.int16), np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    inputs = inference.find_inputs([(tmp_path / "a.nii.gz").rename(tmp_path / "A.NII.GZ")], "lits")
    assert inference.segment_files(bright, inputs, tmp_path / "out", "lits", 16, "") == []
    assert (tmp_path / "out" / "A_mask.nii.gz").exists()


def test_volumes_through_the_command_line(tmp_path, ct_checkpoint, capsys):
    hu = np.random.default_rng(0).integers(-300, 300, (40, 52, 17)).astype(np.float32)
    nibabel.Nifti1Image(hu, np.diag([-0.9, -0.9, 3, 1])).to_filename(tmp_path / "a.nii")
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "a.nii").read_bytes()[:3000])
    code = main("--predict", tmp_path / "a.nii", tmp_path / "b.nii.gz", "--checkpoint", ct_checkpoint, "--out", tmp_path / "out")
    refused(capsys, code, "b.nii.gz", "1 of 2 files")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_mask.nii.gz"]
    assert nibabel.load(tmp_path / "out" / "a_mask.nii.gz").shape == (40, 52, 17)


def test_an_interrupted_volume_leaves_nothing(tmp_path):
    nibabel.Nifti1Image(np.zeros((16, 16, 40), np.int16), np.eye(4)).to_filename(tmp_path / "a.nii")
    calls = []

    def interrupted(images, size):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return bright(images, size)

    with pytest.raises(KeyboardInterrupt):
        inference.segment_files(interrupted, {"a": tmp_path / "a.nii"}, tmp_path / "out", "lits", 16, "")
    assert calls == [16, 16] and list((tmp_path / "out").iterdir()) == []


def test_real_volumes(tmp_path, ct_checkpoint):
    """A real CT volume and its mask: equal shape, affine and spacing."""
    paths = [SHARED / "ct_nifti" / f"volume-{number}.nii.gz" for number in (0, 12)]
    if not all(path.exists() for path in paths):
        pytest.skip("the real CT volumes are not here")
    assert main("--predict", *paths, "--checkpoint", ct_checkpoint, "--out", tmp_path / "out") == 0
    for path in paths:
        volume, mask = nibabel.load(path), nibabel.load(tmp_path / "out" / path.name.replace(".nii.gz", "_mask.nii.gz"))
        assert mask.shape == volume.shape and np.array_equal(mask.affine, volume.affine)
        assert mask.header.get_zooms() == volume.header.get_zooms()
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


# -------------------------------------------------------------------------------------------- checkpoints


def test_published_checkpoints(tmp_path, capsys):
    """Bare state dicts: options say the network and the data set, the rest is the paper's."""
    torch.save(dict(UTNet(width=2).state_dict()), tmp_path / "published.pt")
    _, config, trained = fedgs.open_checkpoint(tmp_path / "published.pt", {"width": 2})
    assert (config.image_size, config.dataset, config.model, trained) == (512, "polypgen", "utnet", None)
    frame, use = write_image(tmp_path / "a.png"), ("--checkpoint", tmp_path / "published.pt", "--out", tmp_path / "out")
    assert main("--predict", frame, *use, *PUBLISHED) == 0
    assert "trained elsewhere" in capsys.readouterr().out
    refused(capsys, main("--predict", frame, *use), "published.pt does not fit")
    torch.save(SDUTNet(1, width=2, size=32).state_dict(), tmp_path / "sd.pt")
    _, config, _ = fedgs.open_checkpoint(tmp_path / "sd.pt", {"width": 2, "image_size": 32, "model": "sd-utnet", "dataset": "lits"})
    assert config.tau == 1000


def test_options_that_contradict_a_checkpoint(tmp_path, capsys, checkpoint):
    for options, words in ((["--width", 4], ["--width 4", "trained with 2"]), (["--model", "sd-utnet"], ["trained with utnet"]),
                           (["--folds", 1, 2], ["one method, fold and seed"]), (["--fold", 2], ["--fold 2", "trained with 1"])):
        refused(capsys, main("--evaluate", "--checkpoint", checkpoint, *options), *words)
    assert main("--evaluate", "--checkpoint", checkpoint, "--width", 2, "--kernels", "torch") == 0


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_files_that_are_no_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Malicious()}, tmp_path / "code.pt")
    refused(capsys, main("--evaluate", "--checkpoint", "code.pt"), "code.pt", "no checkpoint")
    assert not (tmp_path / "executed").exists()
    torch.save({"state": (torch.ones(2),)}, tmp_path / "resume.pt")
    refused(capsys, main("--evaluate", "--checkpoint", "resume.pt"), "resume.pt is no network's state dict", "best.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    refused(capsys, main("--evaluate", "--checkpoint", "tensor.pt"), "tensor.pt is no network's state dict")
    refused(capsys, main("--evaluate", "--checkpoint", "none.pt"), "none.pt is missing")
    torch.save({name: x * torch.nan for name, x in UTNet(width=2).state_dict().items()}, tmp_path / "nan.pt")
    refused(capsys, main("--evaluate", "--checkpoint", "nan.pt", *PUBLISHED), "nan.pt", "not finite")


@pytest.mark.parametrize("damage", ["text", {"config": 3}, {"data": "PolypGen"}, {"width": "wide"}, {"width": [2]}, {"model": "vit"},
                                    {"dataset": "kvasir"}, {"centres": [[4], 6]}, {"fold": 9}])
def test_damaged_configuration(tmp_path, capsys, checkpoint, damage):
    state = torch.load(checkpoint, weights_only=True)
    if isinstance(damage, dict) and not {"config", "data"} & damage.keys():
        state._metadata["fedgs"]["config"].update(damage)
    else:
        state._metadata["fedgs"] = damage
    torch.save(state, checkpoint)
    refused(capsys, main("--evaluate", "--checkpoint", checkpoint), "best.pt", "configuration is damaged")


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate(tmp_path, capsys, checkpoint):
    """The tables of the network's own predictions, and files like those of a run."""
    out = tmp_path / "out"
    assert main("--evaluate", "--checkpoint", checkpoint, "--out", out, "--nsd-tolerance", 1.5, "--data-root", "stand-in") == 0
    text = capsys.readouterr().out
    assert "best (round 7)" in text and "on PolypGen stand-in" in text and "NSD: within 1.5 pixels" in text
    assert {path.name for path in out.iterdir()} == {"results.json", "scores.csv", "lesions.csv", "predictions.png"}
    results = json.loads((out / "results.json").read_text())
    network, config, _ = fedgs.open_checkpoint(checkpoint, {})
    federation = fedgs.load_data(config, None)
    expected = fedgs.evaluate(network, federation.out_test)
    assert results["checkpoints"]["best"]["out_test"]["dice_n"]["mean"] == pytest.approx(expected.dice[federation.out_test.inverse_area.isfinite()].mean().item())
    with (out / "scores.csv").open(newline="") as file:
        [first, *_] = [row for row in csv.DictReader(file) if row["split"] == "out_test"]
    pair = expected.predicted[0, 0].numpy(), federation.out_test.masks[0, 0].bool().numpy()
    assert (float(first["nsd"]), float(first["hd95"])) == pytest.approx(metrics.surface_measures(*pair, (1, 1), 1.5))
    refused(capsys, main("--evaluate", "--checkpoint", checkpoint, "--out", out), "not empty: choose another --out")
    assert main("--evaluate", "--checkpoint", checkpoint) == 0  # no files without --out


def test_surfaces_are_measured_in_the_images_spacing(generator):
    network = UTNet(in_channels=1, width=2)
    pixels = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    masks[:, :, 8:20, 5:17] = 1
    spacing = torch.tensor([[0.5, 2.0], [3.0, 0.25]], dtype=torch.float64)
    images = data.Images(1, ["a", "b"], pixels, masks, torch.full((2,), 1024 / 144), torch.tensor([False, False]), spacing)
    found = fedgs.evaluate(network, images, nsd_tolerance=1.2)
    for i in range(2):
        pair = found.predicted[i, 0].numpy(), masks[i, 0].bool().numpy()
        assert found.surfaces[i].tolist() == pytest.approx(metrics.surface_measures(*pair, spacing[i].tolist(), 1.2))
    assert fedgs.evaluate(network, images).surfaces.isnan().all()  # only where asked for
    assert "mm" in metrics.surface_note({"dataset": "lits", "nsd_tolerance": 1.2})
    assert metrics.surface_note({"dataset": "lits", "nsd_tolerance": 0.0}) == metrics.surface_note({"dataset": "lits"}) == ""


def test_evaluate_on_other_data_says_so(tmp_path, capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(fedgs.data, "polypgen", lambda *how, polypgen=data.polypgen: renamed(polypgen(*how)))
    assert main("--evaluate", "--checkpoint", checkpoint) == 0
    assert "on PolypGen (trained on PolypGen stand-in)" in capsys.readouterr().out


def renamed(federation):
    federation.source = "PolypGen"
    return federation
