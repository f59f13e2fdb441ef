"""Image files as pixels, as a viewer shows them: photographs, grey exports of scanners, masks.

The usual formats are read: PNG, JPEG, TIFF, BMP, WebP and a few more. A photograph is turned as its
camera has noted (EXIF), and what is transparent is black. Values of more than 8 bits become grey
values as those of volumes do: by a window, or by their own percentiles.
"""

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from support.errors import UserError
from support.files import check_regular

# Pillow tells a format by content, and knows others: for PostScript it would start an interpreter.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
LOSSY = ("JPEG", "MPO", "WEBP")  # of them, those that may not keep values exactly
MOST_PIXELS = 100_000_000  # of an image: a small file may decompress to any size
LARGEST = 1e30  # value of a pixel or voxel: products of larger ones are no numbers in float32
ORIENTATION = "orientation"  # an image's info: how it was turned by EXIF, 1 for not

PERCENTILES = (0.5, 99.5)  # what lies outside is black or white where no window is given
COLOUR_SPREAD = 16  # grey levels between channels: more of them is a colour, not a compression's
MASK_SPREAD = 64  # the same for a mask, whose edges a compression tints more


# ---------------------------------------------------------------------------------------- reading


def open_image(path: Path, mode: str, window: Sequence[float] = ()) -> Image.Image:
    """A fully decoded image of 8 bits a channel. Raises UserError naming the file.

    mode: "RGB" or "L"; window: the values that become black and white, where there are more than 8
    bits; empty for the image's own percentiles. The image's info says under ORIENTATION how it was
    turned.
    """
    image = open_file(path)
    opened = image.convert(mode) if is_plain(image) else flattened(image, path, window, mode)
    opened.info[ORIENTATION] = image.info[ORIENTATION]
    return opened


def is_plain(image: Image.Image) -> bool:
    """Whether an image has 8 bits a channel, and nothing in it is transparent."""
    transparent = "A" in image.getbands() or "transparency" in image.info
    return not (transparent or is_deep(image))


def flattened(image: Image.Image, path: Path, window: Sequence[float], mode: str) -> Image.Image:
    """An image whose deep values have become grey ones, or what is transparent black."""
    if is_deep(image):
        values = np.asarray(image).astype(np.float32)
        low, high = window or percentiles(values, path)
        return Image.fromarray(to_grey(values, low, high)).convert(mode)

    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image.convert("RGBA")).convert(mode)


def open_mask(path: Path) -> np.ndarray:
    """The values of a mask (H, W), uint8 or uint16. Raises UserError naming the file."""
    return mask_values(open_file(path), path)


def mask_values(image: Image.Image, path: Path) -> np.ndarray:
    """The values of a mask that was read from path, as `open_mask` returns them.

    Of an image with a palette of colours these are the indices.
    """
    if is_deep(image):
        return whole_numbers(np.asarray(image), path)
    if image.mode == "P" and not has_grey_palette(image):
        return np.asarray(image)
    grey = np.asarray(image.convert("L"))

    # The lesion may be in the alpha channel, or in the colours below it: nobody can tell.
    if "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255):
        raise UserError(f"{path} has transparent pixels: save the mask without an alpha channel")
    if colour_spread(image).max() > MASK_SPREAD:
        raise UserError(
            f"{path} is coloured: save the mask in grey, or with a palette (one value a class)"
        )

    # One of the darkest colours, or values of a palette that are all black.
    if image.mode != "L" and not grey.any() and np.asarray(image).any():
        raise UserError(f"{path} is black, but not all of it has the same value: save it in grey")
    return grey


def open_file(path: Path) -> Image.Image:
    """A decoded image, turned as it is to be looked at. Raises UserError naming the file."""
    with open_header(path) as image:
        check_size(image, path)
        kind = image.format
        if kind == "PNG":
            check_checksums(path)
        with QUIET if kind == "TIFF" else contextlib.nullcontext():
            frames = getattr(image, "n_frames", 1)
            turned = image.getexif().get(ExifTags.Base.Orientation)
            upright = ImageOps.exif_transpose(image)

    # A camera's MPO file holds a preview beside the photograph; others hold a stack.
    if frames > 1 and kind != "MPO":
        raise UserError(f"{path} holds {frames} images: save each of them as a file of its own")
    upright.format = kind
    upright.info[ORIENTATION] = turned if turned in range(2, 9) else 1
    return upright


@contextlib.contextmanager
def open_header(path: Path) -> Iterator[Image.Image]:
    """An image of which only the header is read yet, to be decoded inside the block.

    Raises UserError naming the file for all that Pillow stumbles over, then and there.
    """
    check_regular(path)
    # Pillow warns of what is an error here, and of notes of a camera that nobody reads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read {path}: it is no image, or of a kind not known") from error
    except UserError:
        raise
    except Exception as error:
        # What a decoder stumbles over in damaged bytes may be of any kind.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"cannot read {path}: {reason}") from error


def check_size(image: Image.Image, path: Path) -> None:
    """Raise UserError for an image that is too large, of which only the header is read yet."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{path} is {width}x{height}: more than {MOST_PIXELS:,} pixels are not read"
        )


def check_checksums(path: Path) -> None:
    """Raise UserError for a PNG file that is not what was written, by its own checksums."""
    # In decoding it does not look at those of the pixels.
    with open_header(path) as image:
        image.verify()


class Quiet:
    """While any thread is inside, nothing arrives on stderr.

    libtiff prints there, past Python, what it also tells Pillow.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.inside = 0
        self.stderr = None  # a copy of it; None where there is none

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                self.stderr = os.dup(2)
                os.dup2(nowhere.fileno(), 2)

    def __exit__(self, *problem: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.stderr is not None:
                os.dup2(self.stderr, 2)
                os.close(self.stderr)
                self.stderr = None


QUIET = Quiet()


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
    check_values(values, path)
    low, high = np.percentile(values, PERCENTILES).tolist()

    # Little may stand out from a plain background: then it is what there is to see.
    if low == high:
        low, high = float(values.min()), float(values.max())
    if 0 < high - low <= 1 / LARGEST:
        raise UserError(f"{path} holds values that differ by {high - low:g}: too little to be seen")
    return low, high


def check_values(values: np.ndarray, path: Path) -> None:
    """Raise UserError naming the file for values that are no numbers, or too large to be any."""
    # A comparison with NaN is false.
    if not (np.abs(values) <= LARGEST).all():
        raise UserError(f"{path} holds values that are no numbers, or beyond {LARGEST:g}")


def to_grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """float32 values as grey values, uint8: low to high become 0 to 255."""
    scale = np.float32(255 / (high - low)) if high > low else np.float32(0)
    return np.round((np.clip(values, low, high) - low) * scale).astype(np.uint8)


# ---------------------------------------------------------------------------------------- colours


def is_saved_in_colour(path: Path) -> bool:
    """Whether an image's file has room for colours. Its pixels are not read."""
    try:
        with open_header(path) as image:
            if image.mode == "P":
                return not has_grey_palette(image)
            return not (is_deep(image) or image.mode in ("1", "L", "LA", "La"))
    except UserError:
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
