"""The drawn data sets: their statistics, and the folders that they are written into."""

import hashlib

import nibabel
import numpy as np
import pytest
from conftest import shrink_stand_ins
from PIL import Image
from scipy import ndimage
from scipy.signal import fftconvolve

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


# How hard the frames are, and how much centres differ. The figures that tests expect are summary
# statistics of PolypGen's frames at 80 x 80, measured as the drawn ones are here.

RANGES = (0, 10, 30, 100)  # where ranges of image pixels / lesion pixels begin


@pytest.fixture(scope="module")
def frames():
    """{centre: images (40, 80, 80, 3), masks (40, 80, 80)}"""
    return {centre: standin.polypgen_frames(centre, 40, 80) for centre in standin.POLYPGEN}


def of_lone_polyps(frames, measure):
    """For each of RANGES the mean of measure(image, mask, view), over frames with one polyp."""
    found = {low: [] for low in RANGES}
    for centre, (images, masks) in frames.items():
        view = standin.view_of(standin.CAMERAS[centre], *standin.coordinates(80))
        for image, mask in zip(images, masks, strict=True):
            if ndimage.label(mask)[1] == 1:
                low = RANGES[np.searchsorted(RANGES, data.inverse_area(mask), side="right") - 1]
                found[low].append(measure(image.astype(float), mask, view))
    return [np.nanmean(found[low]) for low in RANGES]


def contrast_to_ring(image, mask, view):
    """Of the mean colours in a polyp and in the ring of three pixels around it."""
    ring = ndimage.binary_dilation(mask, iterations=3) & ~mask & view
    return abs(image[mask].mean(axis=0) - image[ring].mean(axis=0)).mean()


def step_at_outline(image, mask, view):
    """Between the pixels on either side of a polyp's outline, as a length in RGB."""
    inner = mask & ~ndimage.binary_erosion(mask)
    outer = ndimage.binary_dilation(mask) & ~mask & view
    return np.linalg.norm(image[inner].mean(axis=0) - image[outer].mean(axis=0))


def conspicuous_spots(image, mask, view):
    """The share of places in a frame that differ from their surroundings as much as the polyp.

    A place is a spot of the polyp's shape with the ring around it, in the view and apart from the
    polyp. NaN where there are hardly any.
    """
    ring = ndimage.binary_dilation(mask, iterations=3) & ~mask & view
    box = ndimage.find_objects((mask | ring).astype(int))[0]
    spot = mask[box][::-1, ::-1]
    around = ring[box][::-1, ::-1]

    # Mean within minus mean around, at all places at once.
    weights = spot / spot.sum() - around / around.sum()
    channels = [fftconvolve(image[..., i], weights, "valid") for i in range(3)]
    contrast = np.linalg.norm(channels, axis=0)
    blocked = fftconvolve(mask | ~view, (spot | around).astype(float), "valid") > 0.5
    others = contrast[~blocked]
    if len(others) < 50:
        return np.nan
    return (others >= contrast[box[0].start, box[1].start]).mean()


def test_small_polyps_hide_among_spots_of_the_wall(frames):
    """In PolypGen: 0.04, 0.05, 0.11 and 0.16. With polyps of equal contrast all would be 0."""
    largest, large, medium, small = of_lone_polyps(frames, conspicuous_spots)
    assert largest < 0.06
    assert large < 0.08
    assert 0.025 < medium < 0.14
    assert 0.1 < small < 0.25


def test_contrast_falls_with_a_polyps_size(frames):
    contrast = of_lone_polyps(frames, contrast_to_ring)
    assert contrast == pytest.approx([46, 38, 24, 17], rel=0.4)
    assert contrast[3] < 0.37 * contrast[0]  # PolypGen's share


def test_outlines_of_small_polyps_are_soft(frames):
    """In PolypGen: 31, 26, 21 and 20."""
    largest, _, medium, small = of_lone_polyps(frames, step_at_outline)
    assert largest > 25
    assert medium < 30
    assert small < 20


def test_frames_have_folds_of_a_polyps_looks_and_sizes(monkeypatch):
    radii = []
    widths = []

    def noticed(relief, colour, reach, radius, rng):
        rows, columns = np.nonzero(reach < 1)
        if len(rows) > 10:
            deviations = np.linalg.eigvalsh(np.cov(rows, columns))
            widths.append(np.sqrt(deviations[0] / deviations[1]))
        radii.append(radius)
        return add_dome(relief, colour, reach, radius, rng)

    add_dome = standin.add_dome
    monkeypatch.setattr(standin, "add_dome", noticed)
    for i in range(60):
        rng = np.random.default_rng(i)
        standin.paint_frame([], standin.CAMERAS["C1"], 64, rng)
    assert 1.5 < len(radii) / 60 < 2.5
    assert min(radii) < 0.07
    assert max(radii) > 0.35
    assert np.median(widths) < 0.5


def test_what_lies_beside_the_view_is_black_but_for_a_box(frames):
    for centre, (images, masks) in frames.items():
        view = standin.view_of(standin.CAMERAS[centre], *standin.coordinates(80))
        assert not (masks & ~view).any()
        beside = images[:, ~view]
        assert (beside == beside[0]).all()
        coloured = beside[0].any(axis=1).sum() / 80**2
        assert coloured == pytest.approx(0.09 if centre in ("C4", "C5") else 0), centre


def test_centres_differ_as_polypgens_do(frames):
    expected = {  # mean red, green and blue; deviation of red in a frame; of its mean, over frames
        "C1": (158, 99, 68, 64, 15),
        "C2": (113, 76, 58, 76, 29),
        "C3": (132, 86, 69, 71, 21),
        "C4": (111, 87, 71, 77, 14),
        "C5": (95, 70, 53, 74, 12),
        "C6": (107, 73, 45, 87, 24),
    }
    for centre, (*colour, within, between) in expected.items():
        images, _ = frames[centre]
        means = images.mean(axis=(1, 2))
        assert means.mean(axis=0) == pytest.approx(colour, abs=10), centre
        assert images[..., 0].std(axis=(1, 2)).mean() == pytest.approx(within, rel=0.15), centre
        assert means[:, 0].std() == pytest.approx(between, abs=6), centre


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
    monkeypatch.setattr(standin, "VERSION", "(version 0)")
    with pytest.raises(UserError, match=r"another version of FedGS has drawn: delete it"):
        draw(tmp_path, "C4")


@pytest.mark.parametrize("draw", [draw_frames, draw_volumes])
def test_a_folder_that_cannot_be_written(tmp_path, draw):
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"cannot write the stand-in into .*file.* --cache"):
        draw(tmp_path / "file" / "folder", "C5")
