"""Image files as pixels, as a viewer shows them: photographs, grey exports of scanners, masks.

Whatever Pillow reads is read: PNG, JPEG, TIFF, BMP, WebP and more. A photograph is turned as its
camera has noted (EXIF), and what is transparent is black. Values of more than 8 bits become grey
values as those of volumes do: by a window, or by their own percentiles.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from support.errors import UserError

PERCENTILES = (0.5, 99.5)  # what lies outside is black or white where no window is given
COLOUR_SPREAD = 16  # grey levels between channels: more of them is a colour, not a compression's
MASK_SPREAD = 64  # the same for a mask, whose edges a compression tints more


# ---------------------------------------------------------------------------------------- reading


def open_image(path: Path, mode: str, window: Sequence[float] = ()) -> Image.Image:
    """A fully decoded image of 8 bits a channel. Raises UserError naming the file.

    mode: "RGB" or "L"; window: the values that become black and white, where there are more than 8
    bits; empty for the image's own percentiles.
    """
    image = open_file(path)
    if is_deep(image):
        values = np.asarray(image).astype(np.float32)
        low, high = window or percentiles(values, path)
        return Image.fromarray(to_grey(values, low, high)).convert(mode)

    if "A" in image.getbands() or "transparency" in image.info:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image.convert(mode)


def open_mask(path: Path) -> np.ndarray:
    """The values of a mask (H, W), uint8 or uint16. Raises UserError naming the file.

    Of an image with a palette of colours these are the indices.
    """
    image = open_file(path)
    if is_deep(image):
        return whole_numbers(np.asarray(image), path)
    if image.mode == "P" and not has_grey_palette(image):
        return np.asarray(image)

    # The lesion may be in the alpha channel, or in the colours below it: nobody can tell.
    if "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255):
        raise UserError(f"{path} has transparent pixels: save the mask without an alpha channel")
    if colour_spread(image).max() > MASK_SPREAD:
        raise UserError(
            f"{path} is coloured: save the mask in grey, or with a palette (one value a class)"
        )
    return np.asarray(image.convert("L"))


def open_file(path: Path) -> Image.Image:
    """A decoded image, turned as it is to be looked at. Raises UserError naming the file."""
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            kind = image.format
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read {path}: it is no image, or of a kind not known") from error
    # Some decoders call damage a SyntaxError, or a ValueError.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read {path}: {reason}") from error

    # A camera's MPO file holds a preview beside the photograph; others hold a stack.
    if frames > 1 and kind != "MPO":
        raise UserError(f"{path} holds {frames} images: save each of them as a file of its own")
    return upright


def is_deep(image: Image.Image) -> bool:
    """Whether pixels have more than 8 bits: Pillow would cut their values off in converting."""
    return image.mode[0] in "IF"


def whole_numbers(values: np.ndarray, path: Path) -> np.ndarray:
    """Values of a mask as uint16. Raises UserError naming the file for others than 0 to 65535."""
    whole = np.isfinite(values).all() and (values == np.round(values)).all()
    if not (whole and values.min() >= 0 and values.max() <= 65535):
        raise UserError(f"{path} holds values that are no whole numbers from 0 to 65535")
    return values.astype(np.uint16)


# ------------------------------------------------------------------------------------ grey values


def percentiles(values: np.ndarray, path: Path) -> tuple[float, float]:
    """The values that become black and white where no window is given.

    Raises UserError naming the file for values that are no numbers.
    """
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds values that are no numbers")
    low, high = np.percentile(values, PERCENTILES).tolist()

    # Little may stand out from a plain background: then it is what there is to see.
    if low == high:
        low, high = float(values.min()), float(values.max())
    return low, high


def to_grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """float32 values as grey values, uint8: low to high become 0 to 255."""
    scale = np.float32(255 / (high - low)) if high > low else np.float32(0)
    return np.round((np.clip(values, low, high) - low) * scale).astype(np.uint8)


# ---------------------------------------------------------------------------------------- colours


def is_saved_in_colour(path: Path) -> bool:
    """Whether an image's file has room for colours. Its pixels are not read."""
    try:
        with Image.open(path) as image:
            if image.mode == "P":
                return not has_grey_palette(image)
            return not (is_deep(image) or image.mode in ("1", "L", "LA", "La"))
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError):
        return False  # it is named when it is read


def shows_colour(path: Path) -> bool:
    """Whether there are colours in an image."""
    try:
        image = open_image(path, "RGB")
    except UserError:
        return False  # it is named when it is read
    spread = colour_spread(image)
    return bool((spread > COLOUR_SPREAD).mean() > 0.001)


def colour_spread(image: Image.Image) -> np.ndarray:
    """How far the channels of each pixel are apart, (H, W) in grey levels."""
    if len(image.getbands()) < 3 and image.mode != "P":
        return np.zeros((1, 1), np.uint8)
    pixels = np.asarray(image.convert("RGB"))
    return pixels.max(axis=2) - pixels.min(axis=2)


def has_grey_palette(image: Image.Image) -> bool:
    """Whether the palette of an image of mode P holds grey values alone."""
    colours = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())
