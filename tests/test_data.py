"""Reading, splits, sizes of lesions, augmentation and the stand-in."""

import colorsys
import csv
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import standin
from data import DataError, augment, is_small, polypgen, shuffled_split, split_units

# ------------------------------------------------------------------------------------ a folder of PolypGen


@pytest.fixture
def root(tmp_path):
    """Two centres of five images each, 40 x 30, with a mask of 10 x 6 pixels."""
    rng = np.random.default_rng(0)
    for centre in (1, 2):
        folder = tmp_path / f"data_C{centre}"
        (folder / f"images_C{centre}").mkdir(parents=True)
        (folder / f"masks_C{centre}").mkdir()
        for i in range(5):
            pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            mask = np.zeros((30, 40), np.uint8)
            mask[8:16, 8:24] = 255
            Image.fromarray(pixels).save(folder / f"images_C{centre}" / f"frame{i}.jpg", quality=95)
            Image.fromarray(mask).save(folder / f"masks_C{centre}" / f"frame{i}_mask.jpg", quality=95)
    return tmp_path


def read(root, **options):
    return polypgen(root, centres=(1, 2), out_centre=2, **{"size": 32, **options})


def test_what_is_read(root):
    held = read(root).out_test
    assert held.names == [f"frame{i}" for i in range(5)] and held.centre == 2
    assert held.images.shape == (5, 3, 32, 32) and held.images.dtype == torch.uint8
    assert held.masks.unique().tolist() == [0, 1]
    assert held.inverse_area.tolist() == pytest.approx([1200 / 128] * 5, rel=0.01)
    assert not held.small.any()


def test_size_flags_beside_the_data_are_used(root):
    (root / "metadata").mkdir()
    with (root / "metadata" / "my_dataDetails_C2.csv").open("w") as file:
        file.write("img_name,small_polyp,inv_area\nany/where/frame3.jpg,True,7.5\nany/where/frame0.jpg,False,7.5\n")
    assert read(root).out_test.small.tolist() == [False, False, False, True, False]
    assert "for 2 of 10" in read(root).notes[0]
    assert not read(root, tau=100).out_test.small.any()  # the flags were made with tau = 150


def test_size_flags_as_spreadsheets_write_them(root):
    (root / "metadata").mkdir()
    text = "img_name,small_polyp,inv_area\r\ndata\\images_C2\\frame1.jpg,TRUE,7.5\r\nframe2.jpg,0,7.5\r\n"
    (root / "metadata" / "my_dataDetails_C2.csv").write_text(text, encoding="utf-8-sig")
    assert read(root).out_test.small.tolist() == [False, True, False, False, False]


def test_mask_threshold_and_resizing(root):
    """Lesion is brighter than 128; masks are resized by nearest neighbour, images with interpolation."""
    mask = np.full((64, 64), 128, np.uint8)
    mask[20:40, 20:40] = 129
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 1::2] = 255  # stripes, which interpolation turns grey
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(pixels).save(root / "image.png")
    image, found, inverse_area, small = data.read_pair(root / "image.png", root / "mask.png", 32, 150)
    assert found.sum() == 100 and found[10:20, 10:20].all() and inverse_area == 64 * 64 / 400 and not small
    assert 100 < image[4:-4, 4:-4].min() and image[4:-4, 4:-4].max() < 155


def test_a_lesion_lost_in_resizing_counts_as_none(root):
    path = root / "data_C2" / "masks_C2" / "frame4_mask.jpg"
    mask = np.zeros((300, 400), np.uint8)
    mask[100:104, 100:104] = 255
    Image.fromarray(mask).save(path, quality=100)
    held = read(root, size=16).out_test
    assert not held.masks[4].any() and not held.small[4] and held.inverse_area[4] == math.inf
    assert "1 lesions vanish at 16x16" in read(root, size=16).notes[-1]
    assert read(root, size=512).out_test.small.tolist() == [False, False, False, False, True]


def test_fingerprint_tells_other_data(root):
    before = data.fingerprint(read(root))
    assert data.fingerprint(read(root)) == before
    path = root / "data_C1" / "images_C1" / "frame3.jpg"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert data.fingerprint(read(root)) != before


def test_mask_of_another_size_but_equal_shape(root):
    path = root / "data_C2" / "masks_C2" / "frame1_mask.jpg"
    Image.open(path).resize((80, 60), Image.Resampling.NEAREST).save(path, quality=95)
    assert torch.equal(read(root).out_test.masks[1], read(root).out_test.masks[0])


def image_without_mask(root):
    (root / "data_C1" / "masks_C1" / "frame2_mask.jpg").unlink()


def mask_without_image(root):
    (root / "data_C1" / "images_C1" / "frame2.jpg").unlink()


def truncated(root):
    path = root / "data_C1" / "images_C1" / "frame2.jpg"
    path.write_bytes(path.read_bytes()[:700])


def not_an_image(root):
    (root / "data_C1" / "masks_C1" / "frame2_mask.jpg").write_text("no image")


def mask_of_another_shape(root):
    Image.new("L", (40, 40)).save(root / "data_C1" / "masks_C1" / "frame2_mask.jpg")


def centre_without_images(root):
    shutil.rmtree(root / "data_C1")


def damaged_flags(root):
    (root / "metadata").mkdir()
    (root / "metadata" / "my_dataDetails_C1.csv").write_text("img_name,small_polyp\nframe0.jpg,maybe\n")


def flags_without_column(root):
    (root / "metadata").mkdir()
    (root / "metadata" / "my_dataDetails_C1.csv").write_text("name,small_polyp\nframe0.jpg,True\n")


def flags_of_another_encoding(root):
    (root / "metadata").mkdir()
    (root / "metadata" / "my_dataDetails_C1.csv").write_bytes("img_name,small_polyp\nétude.jpg,True\n".encode("latin-1"))


def image_too_large(root):
    path = root / "data_C1" / "images_C1" / "frame2.jpg"
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xc0")  # the frame header: marker, length, precision, height, width
    content[start + 5 : start + 9] = bytes([0x75, 0x30, 0x75, 0x30])  # 30,000 x 30,000
    path.write_bytes(content)


@pytest.mark.parametrize("spoil, message", [
    (image_without_mask, r"frame2\.jpg has no mask.*frame2_mask\.jpg is missing"),
    (mask_without_image, r"frame2_mask\.jpg has no image"),
    (truncated, r"cannot read .*frame2\.jpg"),
    (not_an_image, r"cannot read .*frame2_mask\.jpg"),
    (mask_of_another_shape, r"frame2_mask\.jpg is 40x40, its image 40x30"),
    (centre_without_images, r"centre 1 has no data.*--centres"),
    (damaged_flags, r"my_dataDetails_C1\.csv.*maybe"),
    (flags_without_column, r"my_dataDetails_C1\.csv.*img_name"),
    (flags_of_another_encoding, r"cannot read .*my_dataDetails_C1\.csv"),
    (image_too_large, r"cannot read .*frame2\.jpg"),
])
def test_bad_files_are_named(root, spoil, message):
    spoil(root)
    with pytest.raises(DataError, match=message):
        read(root)


# --------------------------------------------------------------------------------------- size of lesions


def test_small_by_the_smallest_polyp():
    mask = np.zeros((150, 100), bool)
    mask[10:60, 10:60] = True
    assert not is_small(mask, 150)
    mask[100:110, 80:90] = True  # 100 of 15,000 pixels: exactly 1/150
    assert is_small(mask, 150)
    mask[110, 90] = True  # touches at a corner: one polyp of 101 pixels
    assert not is_small(mask, 150)
    assert not is_small(np.zeros((150, 100), bool), 150)


# ------------------------------------------------------------------------------------------------ splits


def test_published_split_of_thirty_volumes():
    """The published split of LiTS's first client, known from outside: scikit-learn's permutation, halved twice."""
    volumes = sorted(range(30), key=lambda i: f"image{i}_")
    train, held = shuffled_split(volumes, 0.8)
    assert shuffled_split(held, 0.5) == ([19, 11, 6], [4, 21, 8]) and len(train) == 24


@pytest.mark.parametrize("split", ["fold", "centre"])
@pytest.mark.parametrize("count", [10, 88, 301])
def test_splits_agree_with_scikit_learn(split, count):
    selection = pytest.importorskip("sklearn.model_selection")
    for fold in range(1, 6):
        if split == "fold":
            train, held = list(selection.KFold(5).split(range(count)))[fold - 1]
        else:
            train, held = selection.train_test_split(range(count), train_size=0.8, random_state=0)
        expected = train, *selection.train_test_split(held, train_size=0.5, random_state=0)
        assert [list(part) for part in expected] == list(split_units([[i] for i in range(count)], split, fold))


@pytest.mark.parametrize("split", ["fold", "centre"])
@pytest.mark.parametrize("fold", [1, 2, 3, 4, 5])
def test_groups_stay_together(split, fold):
    units = [[0, 5, 9], [1], [2, 3], [4], [6, 7, 8], [10], [11], [12, 13]]
    parts = split_units(units, split, fold)
    assert sorted(sum(parts, [])) == list(range(14))
    assert all(sum(bool(set(unit) & set(part)) for part in parts) == 1 for unit in units)


def test_near_duplicates_are_linked_by_their_looks():
    images = data.stand_in_images(6, 64, 150).subset([0, 1, 0, 2, 1, 3])
    assert data.near_duplicates(None, images) == [[0, 2], [1, 4], [3], [5]]


# ------------------------------------------------------------------------------------------ augmentation

STILL = [0.9, 0.9, 0.9, 0.5, 0.9, 0.5, 0.5, 0.5, 0.5]  # no flip, no rotation, no jitter


def scene(generator):
    """Images whose red channel is 0.8 inside the mask and 0.2 outside."""
    masks = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    masks[:, :, 5:12, 8:25] = 1
    images = torch.rand(2, 3, 32, 32, generator=generator)
    images[:, :1] = torch.where(masks > 0, 0.8, 0.2)
    return images, masks


@pytest.mark.parametrize("draw, expected", [
    ({}, lambda x: x),
    ({0: 0.1}, lambda x: x.flip(3)),
    ({1: 0.1}, lambda x: x.flip(2)),
    ({0: 0.1, 1: 0.1}, lambda x: x.flip(2, 3)),
    ({2: 0.1, 3: 1.0}, lambda x: x.rot90(1, (2, 3))),  # +90 degrees
    ({2: 0.1, 3: 0.0}, lambda x: x.rot90(-1, (2, 3))),
    ({0: 0.1, 2: 0.1, 3: 1.0}, lambda x: x.flip(3).rot90(1, (2, 3))),
    ({0: 0.49, 1: 0.49, 2: 0.49, 3: 1.0}, lambda x: x.flip(2, 3).rot90(1, (2, 3))),  # each with probability 1/2
    ({0: 0.51, 1: 0.51, 2: 0.51, 3: 1.0}, lambda x: x),
])
def test_flips_and_quarter_turns_are_exact(generator, draw, expected):
    images, masks = scene(generator)
    draws = torch.tensor(STILL)
    draws[list(draw)] = torch.tensor(list(draw.values()))
    turned, turned_masks = augment(images, masks, draws.expand(2, 9))
    torch.testing.assert_close(turned, expected(images), rtol=0, atol=1e-4)
    assert torch.equal(turned_masks, expected(masks))


def test_mask_follows_its_image(generator):
    images, masks = scene(generator)
    draws = torch.rand(2, 9, generator=generator)
    draws[:, 2], draws[:, 4] = 0.1, 0.9  # rotated, colours as they are
    turned, turned_masks = augment(images, masks, draws)
    assert turned_masks.unique().tolist() == [0, 1] and turned_masks.dtype == torch.uint8
    inside = turned[:, :1] > 0.5
    assert (inside != turned_masks.bool()).float().mean() < 0.01  # the rim, where the image is interpolated


def test_each_image_has_its_own_draws(generator):
    images, masks = scene(generator)
    draws = torch.rand(2, 9, generator=generator)
    together = augment(images, masks, draws)[0]
    alone = torch.cat([augment(images[i : i + 1], masks[i : i + 1], draws[i : i + 1])[0] for i in range(2)])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together[0], together[1])


def test_share_of_each_augmentation(generator):
    draws = torch.rand(4000, 9, generator=generator)
    image = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    draws[:, :4] = torch.tensor(STILL[:4])
    changed = (augment(image.expand(4000, -1, -1, -1), mask.expand(4000, -1, -1, -1), draws)[0] - image).abs().amax((1, 2, 3)) > 1e-3
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("turns", [-0.2, 0.0, 0.13])
def test_hue_is_that_of_hsv(generator, turns):
    images = torch.rand(2, 3, 4, 4, generator=generator)
    images[0, :, 0, 0] = 0.5  # a grey pixel has no hue
    shifted = data.shift_hue(images, torch.full((2, 1, 1), turns))
    for before, after in zip(images.permute(0, 2, 3, 1).reshape(-1, 3), shifted.permute(0, 2, 3, 1).reshape(-1, 3)):
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        assert after.tolist() == pytest.approx(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value), abs=1e-5)


def test_borders_are_reflected(generator):
    draws = torch.tensor([0.9, 0.9, 0.1, 0.75, 0.9, 0.5, 0.5, 0.5, 0.5])  # turned by 45 degrees: the corners come from outside
    images, masks = data.augment(torch.full((1, 3, 32, 32), 0.7), torch.ones(1, 1, 32, 32, dtype=torch.uint8), draws[None])
    assert (images - 0.7).abs().max() < 1e-5 and (masks == 1).all()


def test_range_of_the_jitter():
    grey, red = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1

    def jitter(images, **draws):
        neutral = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.5}
        return data.jitter_colours(images, torch.tensor([list((neutral | draws).values())]))

    assert jitter(grey, brightness=1.0).unique().tolist() == pytest.approx([0.6])
    assert jitter(grey, brightness=0.0).unique().tolist() == pytest.approx([0.4])
    halves = torch.cat([grey - 0.2, grey + 0.2], dim=3)  # mean 0.5, 0.2 to either side
    assert jitter(halves, contrast=1.0).unique().tolist() == pytest.approx([0.26, 0.74], abs=1e-6)
    assert jitter(red, saturation=0.0)[0, :, 0, 0].tolist() == pytest.approx([0.8 + 0.2 * 0.299, 0.2 * 0.299, 0.2 * 0.299], abs=1e-6)
    assert jitter(red, hue=1.0)[0, :, 0, 0].tolist() == pytest.approx(colorsys.hsv_to_rgb(0.2, 1, 1), abs=1e-5)
    assert jitter(red, hue=0.0)[0, :, 0, 0].tolist() == pytest.approx(colorsys.hsv_to_rgb(0.8, 1, 1), abs=1e-5)


def test_neutral_jitter_changes_nothing(generator):
    images = torch.rand(2, 3, 8, 8, generator=generator)
    torch.testing.assert_close(data.jitter_colours(images, torch.full((2, 4), 0.5)), images, rtol=0, atol=1e-5)


def test_normalise():
    white = data.normalise(torch.ones(1, 3, 1, 1)).flatten().tolist()
    assert white == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


# ------------------------------------------------------------------------------------------ the stand-in


def test_stand_in_is_deterministic():
    first, again = (standin.polypgen_frames(2, 3, 48) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], standin.polypgen_frames(2, 3, 48, seed=1)[0])


def test_stand_in_shows_the_same_scene_at_every_size():
    (fine, fine_masks), (coarse, coarse_masks) = (standin.polypgen_frames(3, 6, size) for size in (128, 64))
    shrunk = fine.reshape(6, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(shrunk - coarse).mean() < 6  # of 255
    assert np.abs(fine_masks.mean((1, 2)) - coarse_masks.mean((1, 2))).max() < 0.002


@pytest.mark.parametrize("centre", data.POLYPGEN_CENTRES)
def test_stand_in_has_the_published_statistics(centre):
    frames, empty, several, quantiles = standin.POLYPGEN[centre]
    _, masks = standin.polypgen_frames(centre, 200, 128)
    areas = np.array([data.inverse_area(mask) for mask in masks])
    assert np.isinf(areas).sum() == round(200 * empty / frames)
    realised = np.quantile(areas[np.isfinite(areas)], [0.05, 0.25, 0.5, 0.75, 0.95])
    assert realised == pytest.approx(quantiles, rel=0.12)


def test_stand_in_says_so():
    federation = polypgen(None, centres=(5, 6), size=32)
    assert "stand-in" in federation.source
    assert all(name.startswith("stand-in") for name in federation.out_test.names + federation.train[5].names)


# --------------------------------------------------------------------------------------------- real images


@pytest.fixture(scope="module")
def by_rule(polypgen_root):
    """Every real image, its size flag by the rule (a threshold beside 150 sets the published ones aside)."""
    return data.read_polypgen(polypgen_root, data.POLYPGEN_CENTRES, 64, data.POLYPGEN_TAU + 1e-9)[0]


def needs(path):
    """Skip a test for want of a file that the data set itself does not bring."""
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the real data")
    return path


def test_real_numbers_of_images(by_rule):
    assert [len(images) for images in by_rule] == [256, 301, 457, 227, 208, 88]


def test_rule_agrees_with_the_published_flags(by_rule, polypgen_root):
    needs(polypgen_root / "metadata")
    published = {centre: data.read_size_flags(polypgen_root, centre) for centre in data.POLYPGEN_CENTRES}
    assert [sum(flags.values()) for flags in published.values()] == [19, 15, 39, 17, 47, 13]
    agree = sum(published[images.centre][f"{name}.jpg"] == small for images in by_rule
                for name, small in zip(images.names, images.small.tolist(), strict=True))
    assert agree >= 0.98 * 1537


def test_published_flags_are_the_ones_used(polypgen_root):
    needs(polypgen_root / "metadata")
    federation = polypgen(polypgen_root, centres=(5, 6), size=64)
    published = data.read_size_flags(polypgen_root, 5) | data.read_size_flags(polypgen_root, 6)
    parts = [federation.out_test, *(part[5] for part in (federation.train, federation.validation, federation.in_test))]
    assert all(published[f"{name}.jpg"] == small for part in parts for name, small in zip(part.names, part.small.tolist()))
    assert sum(int(part.small.sum()) for part in parts) == 47 + 13


def test_published_folds_name_for_name(by_rule, polypgen_root):
    for images in by_rule[:5]:  # the sixth centre is held out whole
        for fold in range(1, 6):
            parts = split_units([[i] for i in range(len(images))], "fold", fold)
            for part, indices in zip(("train", "val", "in_test"), parts, strict=True):
                listed = needs(polypgen_root / "published_folds") / f"C{images.centre}_fold{fold}_{part}.txt"
                assert [images.names[i] for i in indices] == listed.read_text().split(), listed.name


def test_grouped_split_keeps_the_published_groups_together(by_rule, polypgen_root):
    with needs(polypgen_root / "index.csv").open(newline="") as file:
        group = {(int(row["centre"]), row["name"]): row["near_dup_group"] for row in csv.DictReader(file)}
    crossing = {"fold": 0, "grouped": 0}
    for images in by_rule:
        units = {"fold": [[i] for i in range(len(images))], "grouped": data.near_duplicates(polypgen_root, images)}
        for split, chosen in units.items():
            parts = [{group[images.centre, images.names[i]] for i in part} for part in split_units(chosen, split, 1)]
            crossing[split] += sum(len(a & b) for i, a in enumerate(parts) for b in parts[:i])
    assert crossing["fold"] > 0 and crossing["grouped"] == 0


def test_real_lesion_sizes(by_rule, polypgen_root):
    """The inverse areas measured here against those of the original files, on record beside the data."""
    with needs(polypgen_root / "index.csv").open(newline="") as file:
        native = {(int(row["centre"]), row["name"]): float(row["inv_area_native"] or math.inf) for row in csv.DictReader(file)}
    pairs = [(a, native[images.centre, name]) for images in by_rule for name, a in zip(images.names, images.inverse_area.tolist())]
    known = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    assert len(known) > 1400 and np.median([abs(a / b - 1) for a, b in known]) < 0.01
