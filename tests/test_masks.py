"""What in the masks of a centre is lesion."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from support import masks
from support.errors import UserError
from support.pixels import open_mask


def shape_of(size=64):
    """A disc, bool."""
    rows, columns = np.mgrid[:size, :size]
    return (rows - 30) ** 2 + (columns - 25) ** 2 < 150


def write(folder, *arrays, suffix=".png", **how):
    """Arrays as mask files. -> their paths"""
    paths = []
    for i, array in enumerate(arrays):
        image = array if isinstance(array, Image.Image) else Image.fromarray(array)
        paths.append(folder / f"mask{i}{suffix}")
        image.save(paths[-1], **how)
    return paths


def read(paths, wanted=()):
    """How these masks are read -> values, the masks as bool"""
    values = masks.lesion_values("A", masks.count_values(paths), wanted)
    return values, [masks.is_lesion(open_mask(path), values) for path in paths]


def palette_image():
    image = Image.fromarray(shape_of().astype(np.uint8))
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def soft(image):
    return image.convert("L").filter(ImageFilter.GaussianBlur(0.8))


DISC = shape_of()
WHITE = Image.fromarray(np.where(DISC, 255, 0).astype(np.uint8))


@pytest.mark.parametrize(
    ("mask", "how", "values"),
    [
        (DISC.astype(np.uint8), {}, (1,)),
        (WHITE, {}, (255,)),
        (WHITE.convert("1"), {}, (255,)),
        (WHITE.convert("RGB"), {}, (255,)),
        (DISC.astype(np.uint8) * 7, {}, (7,)),
        (DISC.astype(np.uint16) * 65535, {}, (65535,)),
        (palette_image(), {}, (1,)),
        (DISC.astype(np.float32), {"suffix": ".tif"}, (1,)),
        (WHITE, {"suffix": ".bmp"}, (255,)),
        (WHITE, {"suffix": ".jpg", "quality": 70}, ()),
        (WHITE.convert("RGB"), {"suffix": ".jpg", "quality": 70}, ()),
        (WHITE, {"suffix": ".webp", "quality": 70}, ()),
        (soft(WHITE), {}, ()),
    ],
)
def test_ways_of_writing_a_mask(tmp_path, mask, how, values):
    """An empty mask beside it says nothing, and is empty."""
    empty = Image.new("L", (64, 64))
    paths = write(tmp_path, mask, empty, **how)
    found, (first, second) = read(paths)
    assert found == values
    assert (first != DISC).mean() < (0.01 if values == () else 1e-9)
    assert not second.any()


def test_classes_by_their_values(tmp_path):
    classes = np.where(DISC, 2, 0).astype(np.uint8)
    classes[50:, 50:] = 1
    classes[:5, :5] = 3
    paths = write(tmp_path, classes)
    assert read(paths, [2]) == ((2,), [pytest.approx(DISC)])
    _, [both] = read(paths, [1, 3])
    assert np.array_equal(both, (classes == 1) | (classes == 3))
    with pytest.raises(UserError, match=r"centre A hold the values 0, 1, 2, 3 \(3 in .*mask0"):
        read(paths)
    with pytest.raises(UserError, match="--lesion 4 5: the masks of centre A hold 0, 1, 2, 3"):
        read(paths, [4, 5])


def test_all_masks_of_a_centre_tell_together(tmp_path):
    """One with two of three classes could be read as 0 and lesion."""
    one = DISC.astype(np.uint8)
    two = np.where(DISC, 1, 2).astype(np.uint8)
    two[:20] = 0
    assert read(write(tmp_path, one))[0] == (1,)
    with pytest.raises(UserError, match=r"0, 1, 2 \(2 in .*mask1"):
        read(write(tmp_path, one, two))


def test_a_label_among_bright_ones_is_none_of_them(tmp_path):
    """0 and 1 as PNG among JPEGs of 0 and 255 would be read as empty."""
    jpeg = write(tmp_path, WHITE, suffix=".jpg")
    png = write(tmp_path, DISC.astype(np.uint8))
    with pytest.raises(UserError, match=r"mask0\.png has no pixel brighter than 128"):
        read(jpeg + png)


def test_a_photograph_is_no_mask(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    with pytest.raises(UserError, match=r"are grey, as .*mask0\.png .* photographs"):
        read(write(tmp_path, grey))


def test_a_mask_that_rows_share_counts_once(tmp_path):
    [path] = write(tmp_path, DISC.astype(np.uint8))
    assert sum(masks.count_values([path] * 5).pixels.values()) == 64 * 64


def test_what_is_said_of_it():
    assert masks.describe_reading((1,)) == "lesion is 1 in a mask"
    assert masks.describe_reading((1, 2)) == "lesion is 1 or 2 in a mask"
    assert masks.describe_reading(()) == "lesion is what is brighter than 128 in a mask"


@pytest.mark.parametrize(
    ("values", "kind", "is_fine"),
    [
        ((0, 255), "PNG", True),
        ((0, 129), "PNG", True),
        ((0, 0), "PNG", True),  # an empty mask
        ((7, 7), "JPEG", True),  # and one that JPEG has made dark grey
        ((0, 32), "JPEG", True),  # noise around black
        ((0, 1), "PNG", False),
        ((0, 128), "PNG", False),
        ((0, 33), "JPEG", False),
        ((0, 135), "JPEG", False),  # 127 and what JPEG makes of it
        ((0, 191), "JPEG", False),
        ((0, 192), "JPEG", True),
        ((255, 255), "JPEG", True),
    ],
)
def test_a_mask_of_which_the_bright_is_lesion(values, kind, is_fine):
    mask = np.array([values], np.uint16)
    if is_fine:
        masks.check_bright(mask, kind, "mask.png")
        return
    with pytest.raises(UserError, match=rf"mask.png has values up to {values[1]}, while lesions"):
        masks.check_bright(mask, kind, "mask.png")


def test_labels_that_jpeg_has_kept_here_and_lost_there(tmp_path):
    paths = write(tmp_path, DISC.astype(np.uint8), suffix=".jpg", quality=100)
    with pytest.raises(UserError, match=r"Save them as PNG"):
        read(paths)


def test_a_png_file_that_is_called_jpg_is_one(tmp_path):
    """What a format keeps counts, not what a file is called."""
    white = write(tmp_path, WHITE, suffix=".jpg")
    ones = tmp_path / "ones.jpg"
    Image.fromarray(DISC.astype(np.uint8)).save(ones, "PNG")
    with pytest.raises(UserError, match=r"ones\.jpg has no pixel brighter than 128"):
        read([*white, ones])
