"""The drawn data sets: their statistics, and the folders that they are written into."""

import hashlib

import nibabel
import numpy as np
import pytest
from conftest import shrink_stand_ins
from PIL import Image

import data
from support import standin
from support.errors import UserError


def digest(*arrays):
    together = hashlib.blake2b(digest_size=8)
    for array in arrays:
        together.update(array.tobytes())
    return together.hexdigest()


# ---------------------------------------------------------------------------------------- PolypGen


def test_frames_are_drawn_from_a_seed():
    first = standin.polypgen_frames("C2", 3, 48)
    again = standin.polypgen_frames("C2", 3, 48)
    other = standin.polypgen_frames("C2", 3, 48, seed=1)
    elsewhere = standin.polypgen_frames("C3", 3, 48)
    assert digest(*first) == digest(*again)
    assert len({digest(*frames) for frames in (first, other, elsewhere)}) == 3


def test_centres_differ_in_more_than_their_polyps(monkeypatch):
    def no_polyps(of, count, rng):
        return [[]] * count

    monkeypatch.setattr(standin, "plan_polyps", no_polyps)
    monkeypatch.setitem(standin.CAMERAS, "C3", standin.CAMERAS["C2"])
    one, _ = standin.polypgen_frames("C2", 2, 48)
    other, _ = standin.polypgen_frames("C3", 2, 48)
    assert len({digest(frame) for frame in (*one, *other)}) == 4


def test_frames_show_the_same_scene_at_every_size():
    fine, fine_masks = standin.polypgen_frames("C3", 6, 128)
    coarse, coarse_masks = standin.polypgen_frames("C3", 6, 64)
    shrunk = fine.reshape(6, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(shrunk - coarse).mean() < 6  # of 255
    areas = fine_masks.mean((1, 2))
    assert np.abs(areas - coarse_masks.mean((1, 2))).max() < 0.002


@pytest.mark.parametrize("centre", data.CENTRES["polypgen"])
@pytest.mark.slow
def test_frames_have_the_published_statistics(centre):
    known = standin.POLYPGEN[centre]
    _, masks = standin.polypgen_frames(centre, 200, 128)
    areas = np.array([data.inverse_area(mask) for mask in masks])
    assert np.isinf(areas).sum() == round(200 * known.empty / known.frames)
    plan = standin.plan_polyps(known, 200, np.random.default_rng(0))
    several = sum(len(polyps) > 1 for polyps in plan)
    assert several == round(200 * known.several / known.frames)
    realised = np.quantile(areas[np.isfinite(areas)], [0.05, 0.25, 0.5, 0.75, 0.95])
    assert realised == pytest.approx(known.quantiles, rel=0.12)


# -------------------------------------------------------------------------------------------- LiTS


@pytest.mark.parametrize("centre", ["C1", "C5"])
@pytest.mark.slow
def test_volumes_have_the_published_share_of_small_slices(centre):
    known = standin.LITS[centre]
    areas = []
    for hu, labels in standin.lits_volumes(centre):
        assert hu.shape == labels.shape
        assert hu.dtype == np.int16
        assert np.unique(labels).tolist() == [0, 1, 2]
        assert hu.min() <= -1000
        assert 100 < hu[labels == 1].mean() < 130
        assert hu[labels == 2].mean() < 75
        counts = (labels == 2).sum((0, 1))
        areas.extend(counts[counts > 0].tolist())

    assert len(areas) == known.slices
    assert min(areas) > 50
    pixels = labels.shape[0] * labels.shape[1]
    small = sum(pixels >= 1000 * area for area in areas)
    assert small / known.slices == pytest.approx(known.small, abs=1 / known.slices)


def test_a_tumour_lies_in_the_liver_and_leaves_the_ends_free():
    _, labels = standin.paint_volume([0.01, 0.02, 0.005], np.random.default_rng(0))
    areas = (labels == 2).sum((0, 1))
    assert areas.tolist() == [0, 0, *(round(a * 320**2) for a in (0.01, 0.02, 0.005)), 0, 0]
    assert (labels == 1).any()


# -------------------------------------------------------------------------------- folders of files


@pytest.fixture
def few(monkeypatch):
    """Stand-ins that are drawn in a second."""
    shrink_stand_ins(monkeypatch, frames=20, volumes=2, slices=6)


def draw_frames(cache, *centres, size=32, is_small=np.any):
    return standin.draw_polypgen(str(cache), centres, size, is_small)


def draw_volumes(cache, *centres):
    return standin.draw_lits(str(cache), {centre: data.LITS_VOLUMES[centre] for centre in centres})


def contents(folder):
    """{path in the folder: (bytes, when they were written)}"""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            about = path.read_bytes(), path.stat().st_mtime_ns
            found[path.relative_to(folder).as_posix()] = about
    return found


def test_frames_are_lossless_files_in_polypgens_layout(few, tmp_path):
    folder = draw_frames(tmp_path, "C5", "C6")
    assert folder == tmp_path / "32px"
    assert sorted(path.name for path in folder.iterdir()) == [
        "STAND-IN.txt",
        "data_C5",
        "data_C6",
        "metadata",
    ]
    images, masks = standin.polypgen_frames("C6", 8, 32)
    for i in range(8):
        name = f"stand-in_C6_{i:04d}"
        image = Image.open(folder / "data_C6" / "images_C6" / f"{name}.png")
        mask = Image.open(folder / "data_C6" / "masks_C6" / f"{name}_mask.png")
        assert np.array_equal(np.asarray(image), images[i])
        assert np.array_equal(np.asarray(mask), 255 * masks[i].astype(np.uint8))


def test_size_flags_are_made_at_512(few, tmp_path):
    seen = []

    def is_small(mask):
        seen.append(mask)
        return len(seen) == 2

    folder = draw_frames(tmp_path, "C6", size=48, is_small=is_small)
    text = (folder / "metadata" / "my_dataDetails_C6.csv").read_text().splitlines()
    assert text[0] == "img_name,small_polyp"
    assert text[1:4] == [
        "stand-in_C6_0000.png,False",
        "stand-in_C6_0001.png,True",
        "stand-in_C6_0002.png,False",
    ]
    _, masks = standin.polypgen_frames("C6", 8, 48)
    expected = masks[:, np.arange(512) * 48 // 512][:, :, np.arange(512) * 48 // 512]
    assert np.array_equal(np.stack(seen), expected)


def test_volumes_are_files_with_lits_names(few, tmp_path):
    folder = draw_volumes(tmp_path, "C1", "C5")
    names = sorted(path.name for path in folder.iterdir())
    numbers = (0, 1, 120, 121)
    volumes = [f"volume-{number}.nii.gz" for number in numbers]
    segmentations = [f"segmentation-{number}.nii.gz" for number in numbers]
    assert names == sorted(["STAND-IN.txt", *volumes, *segmentations])

    hu, labels = list(standin.lits_volumes("C5"))[1]
    volume = nibabel.load(folder / "volume-121.nii.gz")
    segmentation = nibabel.load(folder / "segmentation-121.nii.gz")
    assert np.array_equal(np.asarray(volume.dataobj), hu)
    assert np.array_equal(np.asarray(segmentation.dataobj), labels)
    assert volume.header.get_zooms() == pytest.approx((0.8 * 512 / 320, 0.8 * 512 / 320, 5))


@pytest.mark.parametrize("draw", [draw_frames, draw_volumes])
def test_a_centre_is_drawn_when_it_is_wanted_and_once(few, tmp_path, draw):
    folder = draw(tmp_path, "C5")
    first = contents(folder)
    assert not any("C4" in name or "-90" in name for name in first)
    draw(tmp_path, "C4", "C5")
    both = contents(folder)
    assert first.items() <= both.items()
    draw(tmp_path, "C4", "C5")
    assert contents(folder) == both


@pytest.mark.parametrize(("draw", "kind"), [(draw_frames, "images"), (draw_volumes, "volumes")])
def test_a_folder_says_what_it_holds(few, tmp_path, draw, kind):
    folder = draw(tmp_path, "C6" if kind == "images" else "C5")
    assert standin.is_marked(folder)
    text = (folder / "STAND-IN.txt").read_text()
    assert text.startswith("Drawn by FedGS")
    assert f"these {kind} are not" in text


@pytest.mark.parametrize("draw", [draw_frames, draw_volumes])
def test_drawing_that_was_interrupted_goes_on(few, tmp_path, draw):
    folder = draw(tmp_path, "C5")
    whole = contents(folder)
    for start in range(3):
        for name in list(whole)[start::3]:
            if name != "STAND-IN.txt":
                (folder / name).unlink()
        draw(tmp_path, "C5")
        assert {name: text for name, (text, _) in contents(folder).items()} == {
            name: text for name, (text, _) in whole.items()
        }


def test_the_mark_comes_first(few, tmp_path, monkeypatch):
    """Whatever has been drawn when it is interrupted, nobody takes it for real."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(standin, "save_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_frames(tmp_path, "C6")
    assert standin.is_marked(tmp_path / "32px")


def real_frames(folder):
    (folder / "32px" / "data_C1").mkdir(parents=True)
    (folder / "32px" / "data_C1" / "image.jpg").write_text("an image")


def real_volumes(folder):
    (folder / "part1").mkdir()
    (folder / "part1" / "volume-0.nii").write_text("a volume")


@pytest.mark.parametrize(
    ("draw", "put", "kind"),
    [(draw_frames, real_frames, "images"), (draw_volumes, real_volumes, "volumes")],
)
def test_a_stand_in_never_takes_the_place_of_real_data(tmp_path, draw, put, kind):
    put(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"holds {kind} that are not the stand-in's: .*--cache"):
        draw(tmp_path, "C5")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("draw", [draw_frames, draw_volumes])
def test_what_another_version_has_drawn_is_not_mixed_in(few, tmp_path, monkeypatch, draw):
    draw(tmp_path, "C5")
    monkeypatch.setattr(standin, "VERSION", "(version 2)")
    with pytest.raises(UserError, match=r"another version of FedGS has drawn: delete it"):
        draw(tmp_path, "C4")


@pytest.mark.parametrize("draw", [draw_frames, draw_volumes])
def test_a_folder_that_cannot_be_written(tmp_path, draw):
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"cannot write the stand-in into .*file.* --cache"):
        draw(tmp_path / "file" / "folder", "C5")
