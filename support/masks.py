"""What in a mask is lesion: one rule for all the masks of a centre.

Masks are saved as 0 and 1, as 0 and 255, with edges that JPEG has softened, or with one value for
each class. A single file cannot tell: an empty one says nothing, and a bright one may be one of
several classes. So the values of all masks of a centre are counted first, and then

1. where a person has said which values are lesion (--lesion), those are;
2. where there are 0 and one other value, that one is;
3. where values are many, as JPEG leaves them, and nearly all are black or white, what is brighter
   than 128 is;
4. else a person has to say.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from support.errors import UserError
from support.options import shown
from support.pixels import LOSSY, mask_values, open_file

BRIGHT = 128  # what is brighter is lesion where edges are soft
FEW = 16  # up to so many values are classes, more are soft edges
NOISE = 32  # what JPEG may leave of black
DARK, LIGHT = 64, 192  # beyond these a pixel counts as black or white
BLACK_AND_WHITE = 0.95  # share of pixels that are, in masks with soft edges


@dataclass
class Values:
    """What the masks of a centre hold."""

    lossy: bool  # whether any of them may be soft by its format
    pixels: dict[int, int] = field(default_factory=dict)  # value -> its pixels, of all masks
    first: dict[int, Path] = field(default_factory=dict)  # value -> the first mask that holds it
    dim: Path | None = None  # the first mask that shows something, but nothing bright

    @property
    def listed(self) -> str:
        """The values, for people."""
        values = sorted(self.pixels)
        if len(values) <= FEW:
            return ", ".join(map(str, values))
        return f"{len(values)} values from {values[0]} to {values[-1]}"


def count_values(paths: Sequence[Path]) -> Values:
    """The values of these masks. Raises UserError naming a file that cannot be read."""
    found = Values(lossy=False)

    # Several rows may share an empty mask.
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        for path, (values, counts, lossy) in zip(paths, pool.map(values_of, paths), strict=True):
            found.lossy |= lossy
            for value, count in zip(values, counts, strict=True):
                found.pixels[value] = found.pixels.get(value, 0) + count
                found.first.setdefault(value, path)
            if found.dim is None and is_dim(values, lossy):
                found.dim = path
    return found


def is_dim(values: Sequence[int], lossy: bool) -> bool:
    """Whether a mask of these values shows something, but nothing bright.

    values: in order, or the lowest and the highest; lossy: whether the format may not keep them
    """
    # JPEG may make a black image one of a single dark grey, and spoils black around edges a little.
    faint = NOISE if lossy else 0
    return values[0] < values[-1] and faint < values[-1] <= BRIGHT


def values_of(path: Path) -> tuple[list[int], list[int], bool]:
    """The values of a mask in order, how many pixels have each, and whether it may be soft."""
    mask = open_file(path)
    counts = np.bincount(mask_values(mask, path).ravel())
    values = np.flatnonzero(counts)
    return values.tolist(), counts[values].tolist(), mask.format in LOSSY


def lesion_values(centre: str, found: Values, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """The values that are lesion in the masks of a centre; none where those are that are bright.

    wanted: as a person says. Raises UserError where that cannot be told, or where no pixel would be
    lesion, with a file and the likely reason.
    """
    masks = f"the masks of centre {centre}"
    present = sorted(found.pixels)
    if wanted:
        if not set(wanted) & set(present):
            raise UserError(f"--lesion {shown(wanted)}: {masks} hold {found.listed}")
        return tuple(wanted)

    highest = present[-1]
    example = found.first[highest]
    if highest == 0:
        raise UserError(f"{masks} are all empty, as {example}: leave it out with --centres")
    if len(present) == 1:
        raise UserError(f"{masks} hold nothing but {highest}, as {example}: what is no lesion?")
    if len(present) == 2 and present[0] == 0 and not (found.lossy and highest < LIGHT):
        return (highest,)

    if not found.lossy and len(present) <= FEW:
        advice = f"say which of them are lesion, as in --lesion {highest}"
        if present == [0, 1, 255]:
            advice = "if some are written with 0 and 1, and others with 0 and 255: --lesion 1 255"
        raise UserError(
            f"{masks} hold the values {found.listed} ({highest} in {example}): {advice}"
        )
    check_soft(masks, found)
    return ()


def check_soft(masks: str, found: Values) -> None:
    """Raise UserError where many values are no black and white with soft edges."""
    highest = max(found.pixels)
    example = found.first[highest]
    if not LIGHT <= highest <= 255:
        raise UserError(
            f"{masks} hold {found.listed} ({highest} in {example}): are these classes, saved with "
            "loss or one for each lesion? Save them as PNG with 0 and 1"
        )

    between = [value for value in found.pixels if DARK < value < LIGHT]
    grey = sum(found.pixels[value] for value in between) / sum(found.pixels.values())
    if grey > 1 - BLACK_AND_WHITE:
        example = found.first[between[0]]
        raise UserError(
            f"{masks} are grey, as {example} ({grey:.0%} of their pixels are neither dark nor "
            "bright): are they photographs, or probabilities?"
        )

    # Read like the others it would be empty.
    if found.dim:
        raise UserError(
            f"{found.dim} has no pixel brighter than {BRIGHT}, unlike others of {masks}: save all "
            "of them with 0 and 255"
        )


def check_bright(values: np.ndarray, kind: str, path: Path) -> None:
    """Raise UserError for a mask that shows something, but nothing bright: it would be empty.

    values: of a mask of which what is bright is lesion; kind: its format, as Pillow calls it. What
    JPEG makes of a grey lesion is bright here and there.
    """
    lossy = kind in LOSSY
    highest = int(values.max())
    half_bright = lossy and BRIGHT < highest < LIGHT
    if half_bright or is_dim([int(values.min()), highest], lossy):
        raise UserError(
            f"{path} has values up to {highest}, while lesions are what is brighter than {BRIGHT}: "
            "save it with 0 and 255"
        )


def is_lesion(mask: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Where a mask (H, W) is lesion, bool. values: as from `lesion_values`"""
    if not values:
        return mask > BRIGHT
    if len(values) == 1:
        return mask == values[0]
    return np.isin(mask, values)


def describe_reading(values: Sequence[int]) -> str:
    """How masks are read, for people."""
    if not values:
        return f"lesion is what is brighter than {BRIGHT} in a mask"
    return f"lesion is {' or '.join(map(str, values))} in a mask"
