"""Image files as a viewer shows them: orientation, transparency, palettes, more than 8 bits."""

import contextlib
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from test_files import flipped

from support import pixels
from support.errors import UserError


def ramp(height=30, width=40):
    """Grey values that differ in every row and column."""
    rows, columns = np.mgrid[:height, :width]
    return (5 * rows + columns).astype(np.uint8)


def save(image, path, **how):
    image.save(path, **how)
    return path


def read(path, mode="L", window=()):
    return np.asarray(pixels.open_image(path, mode, window))


# ------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp", ".gif"])
def test_formats_without_loss(tmp_path, suffix):
    how = {"lossless": True} if suffix == ".webp" else {}
    path = save(Image.fromarray(ramp()), tmp_path / f"a{suffix}", **how)
    assert np.array_equal(read(path), ramp())
    assert np.array_equal(read(path, "RGB"), np.dstack([ramp()] * 3))


def test_as_a_camera_was_held(tmp_path):
    """Each of the eight orientations shows the same scene."""
    scene = Image.fromarray(ramp())
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, transposed in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = scene if transposed is None else scene.transpose(transposed)
        path = save(image, tmp_path / f"{orientation}.png", exif=exif)
        assert np.array_equal(read(path), ramp()), orientation
        assert np.array_equal(pixels.open_mask(path), ramp()), orientation


def test_what_is_transparent_is_black(tmp_path):
    alpha = np.full((30, 40), 255, np.uint8)
    alpha[:10] = 0
    seen = np.where(alpha > 0, ramp(), 0)
    for mode in ("RGBA", "LA"):
        image = Image.fromarray(ramp()).convert(mode)
        image.putalpha(Image.fromarray(alpha))
        path = save(image, tmp_path / f"{mode}.png")
        assert np.array_equal(read(path), seen)
        assert np.array_equal(read(path, "RGB")[..., 2], seen)


def test_palettes_are_colours_of_images_and_indices_of_masks(tmp_path):
    image = Image.fromarray(ramp() % 3)
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 100, 0])
    path = save(image, tmp_path / "a.png")
    assert sorted(set(read(path, "RGB")[..., 0].ravel().tolist())) == [0, 200]
    assert np.array_equal(pixels.open_mask(path), ramp() % 3)

    # A palette of grey values is no palette of classes: white may be its first colour.
    image.putpalette([255, 255, 255, 0, 0, 0, 90, 90, 90])
    path = save(image, tmp_path / "b.png")
    assert np.array_equal(pixels.open_mask(path), np.array([255, 0, 90])[ramp() % 3])


def test_a_cameras_preview_is_no_stack(tmp_path):
    large, small = Image.new("RGB", (40, 30), "white"), Image.new("RGB", (4, 3))
    path = save(large, tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[small])
    assert read(path).shape == (30, 40)
    assert read(path).min() > 250


# ---------------------------------------------------------------------------- more than eight bits


@pytest.mark.parametrize(("dtype", "suffix"), [("u2", ".png"), ("u2", ".tif"), ("f4", ".tif")])
def test_deep_values_become_grey_by_percentiles(tmp_path, dtype, suffix):
    """12 bits of 16, with an outlier that would darken everything else."""
    deep = np.linspace(1000, 3000, 1200).reshape(30, 40).astype(dtype)
    deep[0, 0] = 40000
    path = save(Image.fromarray(deep), tmp_path / f"a{suffix}")
    low, high = np.percentile(deep, [0.5, 99.5])
    expected = np.round((np.clip(deep.astype(float), low, high) - low) / (high - low) * 255)
    assert np.abs(read(path) - expected).max() <= 1
    assert (read(path).min(), read(path).max()) == (0, 255)
    assert np.array_equal(read(path, "RGB")[..., 1], read(path))


def test_a_window_is_stronger_than_percentiles(tmp_path):
    deep = np.array([[0, 1000, 1500, 2000, 9000]], np.uint16)
    path = save(Image.fromarray(deep), tmp_path / "a.png")
    assert read(path, window=(1000, 2000)).tolist() == [[0, 0, 128, 255, 255]]


def test_plain_deep_images(tmp_path):
    """Nothing is divided by zero, and the little that there is is seen."""
    deep = np.full((30, 40), 700, np.uint16)
    assert read(save(Image.fromarray(deep), tmp_path / "a.png")).max() == 0
    deep[3, 3] = 900
    grey = read(save(Image.fromarray(deep), tmp_path / "b.png"))
    assert grey[3, 3] == 255
    assert grey.sum() == 255


# ----------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "P"])
def test_what_is_saved_in_grey(tmp_path, mode):
    image = Image.fromarray(ramp()).convert("L" if mode == "P" else mode)
    if mode == "P":
        image = image.quantize(16)
    assert not pixels.is_saved_in_colour(save(image, tmp_path / "a.png"))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_what_shows_colour(tmp_path, suffix):
    grey = np.dstack([ramp()] * 3)
    path = save(Image.fromarray(grey), tmp_path / f"grey{suffix}")
    assert pixels.is_saved_in_colour(path)
    assert not pixels.shows_colour(path)

    tinted = grey.copy()
    tinted[10:20, 10:20, 0] += 60
    path = save(Image.fromarray(tinted), tmp_path / f"tinted{suffix}")
    assert pixels.shows_colour(path)


# ------------------------------------------------------------------------------------------- masks


def test_deep_masks_keep_their_values(tmp_path):
    deep = np.array([[0, 1, 300, 65535]], np.uint16)
    assert np.array_equal(pixels.open_mask(save(Image.fromarray(deep), tmp_path / "a.png")), deep)
    whole = np.array([[0, 1, 2]], np.float32)
    found = pixels.open_mask(save(Image.fromarray(whole), tmp_path / "a.tif"))
    assert found.tolist() == [[0, 1, 2]]


def test_masks_in_grey_colours(tmp_path):
    mask = np.where(ramp() > 90, 255, 0).astype(np.uint8)
    opaque = np.dstack([mask] * 3 + [np.full_like(mask, 255)])
    path = save(Image.fromarray(opaque), tmp_path / "a.png")
    assert np.array_equal(pixels.open_mask(path), mask)
    soft = pixels.open_mask(save(Image.fromarray(opaque[..., :3]), tmp_path / "a.jpg"))
    assert np.array_equal(soft > 128, mask > 128)


def test_an_error_is_one_line(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(UserError) as error:
        pixels.open_image(path, "RGB")
    assert str(error.value).startswith(f"cannot read {path}")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------- damage, and what is no image


@pytest.fixture(autouse=True)
def no_line_beside_ours(capfd):
    """No library prints what is an error here."""
    yield
    assert capfd.readouterr().err == ""


def test_a_flipped_bit_of_a_png_file_is_noticed(tmp_path):
    """Pillow does not look at the checksum of the pixels: a bit there may be seen, or not."""
    path = save(Image.fromarray(ramp() // 200 * 255), tmp_path / "a.png")
    # The last chunk has nothing in it but its name.
    content = path.read_bytes()
    for damaged in flipped(content[:-12], places=range(-20, 0), count=60):
        path.write_bytes(damaged + content[-12:])
        with pytest.raises(UserError, match=r"cannot read .*a\.png"):
            pixels.open_image(path, "L")


def test_postscript_is_not_interpreted(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", never)
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match=r"a\.png: it is no image, or of a kind not known"):
        pixels.open_image(path, "L")


@pytest.mark.parametrize("size", [(10_001, 10_000), (30_000, 30_000)])
def test_an_image_that_is_too_large_is_not_decoded(tmp_path, size):
    """Its header is enough; Pillow would warn of the first, and refuse the second."""
    path = save(Image.new("1", (8, 8)), tmp_path / "a.png")
    header = b"IHDR" + struct.pack(">II", *size) + bytes([1, 0, 0, 0, 0])
    content = path.read_bytes()
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    with pytest.raises(UserError, match=r"a\.png"):
        pixels.open_image(path, "L")


def test_the_largest_image_that_is_decoded(monkeypatch, tmp_path):
    path = save(Image.new("1", (8, 8)), tmp_path / "a.png")
    monkeypatch.setattr(pixels, "MOST_PIXELS", 64)
    assert read(path).shape == (8, 8)
    monkeypatch.setattr(pixels, "MOST_PIXELS", 63)
    with pytest.raises(UserError, match=r"a\.png is 8x8: more than 63 pixels"):
        read(path)


def test_libtiff_prints_nothing(tmp_path):
    path = save(Image.fromarray(ramp()), tmp_path / "a.tif", compression="tiff_lzw")
    content = path.read_bytes()
    for place in range(8, 200, 3):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        with contextlib.suppress(UserError):
            pixels.open_image(path, "L")


def test_stderr_comes_back_when_the_last_thread_is_done(capfd):
    with pixels.QUIET:
        with pixels.QUIET:
            os.write(2, b"a")
        os.write(2, b"b")
    os.write(2, b"c")
    assert capfd.readouterr().err == "c"


def test_damaged_notes_of_a_camera(tmp_path):
    junk = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\0" * 30
    path = save(Image.fromarray(ramp()), tmp_path / "a.png", exif=junk)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert np.array_equal(read(path), ramp())
    assert not caught


@pytest.mark.parametrize("orientation", [1, 3, 6, 9])
@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
def test_how_an_image_was_turned(tmp_path, orientation, mode):
    note = Image.Exif()
    note[0x112] = orientation
    image = Image.fromarray(ramp().astype(np.uint16)) if mode == "I;16" else Image.new(mode, (9, 8))
    path = save(image, tmp_path / "a.png", exif=note)
    noted = orientation if orientation in (3, 6) else 1
    assert pixels.open_image(path, "L").info[pixels.ORIENTATION] == noted


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e30, -2e30])
def test_values_that_are_no_grey(tmp_path, value):
    values = np.ones((8, 8), np.float32)
    values[3, 4] = value
    path = save(Image.fromarray(values), tmp_path / "a.tif")
    with pytest.raises(
        UserError, match=r"a\.tif holds values that are no numbers, or beyond 1e\+30"
    ):
        read(path)


def test_differences_too_small_to_be_seen(tmp_path):
    values = np.linspace(0, 1e-31, 64, dtype=np.float32).reshape(8, 8)
    with pytest.raises(UserError, match=r"a\.tif holds values that differ by"):
        read(save(Image.fromarray(values), tmp_path / "a.tif"))


def test_a_mask_that_is_black_to_look_at(tmp_path):
    """In one of the darkest colours, and in a palette of two blacks: a lesion would be lost."""
    dark = np.zeros((8, 8, 3), np.uint8)
    dark[:4, :, 0] = 1
    palette = Image.frombytes("P", (8, 8), bytes(range(2)) * 32)
    palette.putpalette([0] * 768)
    for image in (Image.fromarray(dark), palette):
        with pytest.raises(UserError, match=r"a\.png is black, but not all of it"):
            pixels.open_mask(save(image, tmp_path / "a.png"))
    empty = save(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    assert not pixels.open_mask(empty).any()
