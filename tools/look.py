"""A first look at data, before any training.

    python -m tools.look --dataset hospitals             # your own, see docs/data.md
    python -m tools.look --data-root /data/polypgen
    python -m tools.look --dataset hospitals --tau 300 --log-base 200 --out look

Reads every file, and names those that cannot be used. Of the others it prints what each centre has,
what tau and l (--tau, --log-base) would do to the steps of its training, and a suggestion for both.
With --out also writes look.png, with the images whose lesions are smallest, and look.csv, a row for
each image. Nothing is overwritten.

1/a is an image's size over that of its lesions together. Real images are looked at as --preset
paper trains on them, drawn ones as --preset quick does.
"""

import argparse
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

import data
import fedgs
from support import options, pictures, runs, tables
from support.errors import UserError, readable_errors
from support.files import to_csv, write_text
from tools.checks import File, check_files
from tools.effects import LITS, POLYPGEN, Effect, predict, suggest

# Options of a run that say which data, and what FedGS does with them.
WHICH = (
    *("dataset", "data_root", "cache", "images", "lesion", "window", "centres", "out_centre"),
    *("split", "fold", "image_size", "batch_size", "tau", "log_base"),
)

QUANTILES = (5, 25, 50, 75, 95)  # per cent
LISTED = 10  # files that are listed by name; look.csv has all of them
SHOWN = 12  # images in the picture
FILLED = 0.9  # share of its image beyond which a lesion is suspicious


# --------------------------------------------------------------------- centres, one after another


def load_usable(
    config: fedgs.Config, files: Sequence[File], bad: Sequence[File]
) -> tuple[data.Federation, dict[str, str]]:
    """Load all centres but for bad files. -> what there is, {centre that is left out: why}

    Raises UserError where no centre is left.
    """
    skip = {file.path for file in bad}
    checked = count_by_centre(files)
    unusable = count_by_centre(bad)
    problems = {file.centre: file.problem for file in bad}

    # What is wrong with one centre's masks says nothing of the others.
    loaded = []
    left_out = {}
    for centre in config.centres:
        if centre in problems and checked[centre] == unusable[centre]:
            left_out[centre] = f"no file of {checked[centre]} can be used: {problems[centre]}"
            continue
        try:
            loaded.append(fedgs.load_data(config, [centre], skip))
        except UserError as error:
            left_out[centre] = str(error)

    if not loaded:
        centre, why = next(iter(left_out.items()))
        raise UserError(f"no centre can be used, as {centre}: {why}")
    return joined(loaded), left_out


def count_by_centre(things: Sequence) -> Counter:
    """{centre: how many of these are its}"""
    return Counter(thing.centre for thing in things)


def joined(federations: Sequence[data.Federation]) -> data.Federation:
    """Federations with a centre each as one."""
    # All but what is of one centre is the same in all of them.
    first, *others = federations
    for other in others:
        first.facts.update(other.facts)
        first.train.update(other.train)
        first.validation.update(other.validation)
        first.in_test.update(other.in_test)
        if other.out_test is not None:
            first.out_test = other.out_test
    return first


def without(config: fedgs.Config, left_out: Collection[str]) -> fedgs.Config:
    """The configuration without centres that cannot be used."""
    centres = tuple(centre for centre in config.centres if centre not in left_out)
    return replace(config, centres=centres)


def parts_of(federation: data.Federation, centre: str) -> dict[str, data.Images]:
    """{split: images} of a centre."""
    if centre == federation.out_centre:
        return {"out_test": federation.out_test}
    return {
        "train": federation.train[centre],
        "validation": federation.validation[centre],
        "in_test": federation.in_test[centre],
    }


# ---------------------------------------------------------------------- images, one after another


class Seen(NamedTuple):
    """One image, and what was measured of it."""

    centre: str
    split: str  # train, validation, in_test or out_test
    name: str
    lesions: int  # 8-connected components
    inverse_area: float  # of all of them together; inf without one
    smallest: float  # inverse area of what tau is compared with
    small: bool
    suspicion: str  # what may be wrong with it; empty: nothing
    images: data.Images  # it is image i of these
    i: int


def see_all(federation: data.Federation, kind: str) -> list[Seen]:
    """Measure all images of a federation, which are of a kind as in Config."""
    # In the order in which all tables, and look.csv, have them: by centre, and there by split.
    seen = []
    for centre in federation.facts:
        for split, images in parts_of(federation, centre).items():
            seen.extend(see(images, i, split, kind) for i in range(len(images)))
    return seen


def see(images: data.Images, i: int, split: str, kind: str) -> Seen:
    """Measure image i of these."""
    lesions, smallest = measure_lesions(images.masks[i, 0].numpy())
    inverse_area = float(images.inverse_area[i])

    # All lesions of a slice count together.
    if kind == "slices":
        smallest = inverse_area

    return Seen(
        centre=images.centre,
        split=split,
        name=images.names[i],
        lesions=lesions,
        inverse_area=inverse_area,
        smallest=smallest,
        small=bool(images.small[i]),
        suspicion=suspect(images.images[i], inverse_area),
        images=images,
        i=i,
    )


def measure_lesions(mask: np.ndarray) -> tuple[int, float]:
    """Of a mask (H, W): its 8-connected components, and the inverse area of the smallest."""
    # As data.is_small counts them: pixels that touch at a corner belong together.
    components, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return 0, math.inf
    areas = np.bincount(components.ravel())[1:]  # the first is that of the background
    return count, float(mask.size / areas.min())


def suspect(pixels: Tensor, inverse_area: float) -> str:
    """What may be wrong with an image (C, S, S), though it can be read; empty: nothing."""
    # A camera that was covered, or a file that was exported wrongly.
    channels = pixels.flatten(1)
    if torch.equal(channels.amin(dim=1), channels.amax(dim=1)):
        return "shows nothing, all of its pixels are equal"

    # Lesions that fill an image are rare, and masks with black and white exchanged are not.
    if inverse_area < 1 / FILLED:
        return f"its lesion covers {1 / inverse_area:.0%} of it: is the mask inverted?"
    return ""


# --------------------------------------------------------------------------------- near-duplicates


class Alike(NamedTuple):
    """How many images of each centre look like another one."""

    anywhere: Counter
    across_splits: Counter  # like one of their centre that is in another split
    across_centres: Counter


def number_by_looks(federation: data.Federation) -> list[int]:
    """A number for each image, in the order of `see_all`: the same for those that look alike."""
    # All centres at once: the worst duplicates are those of a held-out centre.
    thumbnails = []
    for centre in federation.facts:
        parts = parts_of(federation, centre).values()
        thumbnails.extend(map(data.thumbnails, parts))
    return data.groups_by_looks(torch.cat(thumbnails))


def count_alike(seen: Sequence[Seen], numbers: Sequence[int]) -> Alike:
    """Count near-duplicates. numbers: as from `number_by_looks`"""
    groups = {}
    for one, number in zip(seen, numbers, strict=True):
        groups.setdefault(number, []).append(one)

    alike = Alike(Counter(), Counter(), Counter())
    for group in groups.values():
        # Where the images of this group are: a centre's name is there once for each split.
        places = {(one.centre, one.split) for one in group}
        splits_of = Counter(centre for centre, _ in places)

        for one in group:
            alike.anywhere[one.centre] += len(group) > 1
            alike.across_splits[one.centre] += splits_of[one.centre] > 1
            alike.across_centres[one.centre] += len(splits_of) > 1
    return alike


# -------------------------------------------------------------------------------------- the tables


def files_table(
    files: Sequence[File], bad: Sequence[File], seen: Sequence[Seen], alike: Alike | None
) -> str:
    """A row for each centre: its files, what is wrong with them, and which look alike."""
    suspicious = [one for one in seen if one.suspicion]

    # Of different sizes the smallest and the largest are shown.
    sizes = {}
    for file in files:
        sizes.setdefault(file.centre, set()).add(file.size)

    # Drawn images were not checked, but are files all the same.
    held = count_by_centre(files or seen)
    columns = {
        "all": held,
        "unusable": count_by_centre(bad),
        "suspicious": count_by_centre(suspicious),
    }
    if alike:
        columns["alike"] = alike.anywhere
        columns["across splits"] = alike.across_splits
        columns["across centres"] = alike.across_centres

    rows = [["files of", *columns, "sizes"]]
    for centre in held:
        cells = [str(column[centre]) for column in columns.values()]
        rows.append([centre, *cells, describe_sizes(sizes.get(centre, set()))])
    return tables.aligned(rows)


def describe_sizes(sizes: Collection[tuple[int, int]]) -> str:
    """{(64, 48)} -> "64x48"; the smallest and the largest of several."""
    known = sorted(sizes - {(0, 0)}, key=math.prod)
    if not known:
        return "–"
    width, height = known[0]
    text = f"{width}x{height}"
    if len(known) > 1:
        width, height = known[-1]
        text += f" to {width}x{height}"
    return text


def lesions_table(seen: Sequence[Seen], out_centre: str) -> str:
    """A row for each centre: its images, and how large their lesions are."""
    # "small" is what a run counts as such: flags that somebody has written down, else the rule.
    images = count_by_centre(seen)
    small = count_by_centre([one for one in seen if one.small])

    # How many lesions, and how large, is a question to images that have one.
    areas = {}
    lesions = Counter()
    for one in seen:
        if one.lesions:
            areas.setdefault(one.centre, []).append(one.inverse_area)
            lesions[one.centre] += one.lesions

    first, *others = [f"{percent} %" for percent in QUANTILES]
    quantiles = [f"1/a: {first}", *others]
    rows = [["lesions of", "images", "with one", "each", "small", *quantiles]]
    for centre in images:
        # "–" where there is nothing to average.
        known = areas.get(centre, [])
        each = f"{lesions[centre] / len(known):.2f}" if known else "–"
        name = f"{centre} (held out)" if centre == out_centre else centre
        counts = [str(images[centre]), str(len(known)), each, str(small[centre])]
        rows.append([name, *counts, *quantile_cells(known)])
    return tables.aligned(rows)


def quantile_cells(areas: Sequence[float]) -> list[str]:
    """Quantiles of 1/a."""
    if not areas:
        return ["–"] * len(QUANTILES)
    return [f"{value:.1f}" for value in np.percentile(areas, QUANTILES)]


def effects_table(effects: Mapping[str, Effect]) -> str:
    """A row for each client, and one for all of them."""
    rows = [["training images of", "small", "scaled steps", "mean η"]]
    for name, effect in effects.items():
        cells = [f"{effect.small:.1%}", f"{effect.scaled:.1%}", f"{effect.eta:.3f}"]
        rows.append([name, *cells])
    return tables.aligned(rows)


def csv_rows(
    seen: Sequence[Seen], bad: Sequence[File], numbers: Sequence[int], source: str
) -> list[dict]:
    """The rows of look.csv: the images, and below them the files that cannot be used."""
    # As in scores.csv of a run, so that the two can be joined by centre and name.
    rows = []
    for i, one in enumerate(seen):
        row = {
            "centre": one.centre,
            "split": one.split,
            "name": one.name,
            "lesions": one.lesions,
            "inverse_area": one.inverse_area,
            "smallest": one.smallest,
            "small": int(one.small),
            "alike": numbers[i] if numbers else "",
            "remark": one.suspicion,
            "data": source,
        }
        rows.append(row)

    # Nothing is known of these but that they are there.
    nothing = dict.fromkeys(rows[0], "")
    for file in bad:
        known = {"centre": file.centre, "name": file.name, "remark": file.problem, "data": source}
        rows.append({**nothing, **known})
    return rows


# --------------------------------------------------------------------------------- what to know


def remarks(
    seen: Sequence[Seen],
    bad: Sequence[File],
    left_out: Mapping[str, str],
    alike: Alike | None,
) -> list[str]:
    """What is wrong with the data, or may be, by name: lines to print."""
    # Files first, as they are what somebody can mend.
    lines = first_of("cannot be used, and would end a run", [file.problem for file in bad])
    for centre, why in left_out.items():
        lines.append(f"{centre} is left out here, and would end a run: {why}")

    suspicions = [f"{one.centre}, {one.name}: {one.suspicion}" for one in seen if one.suspicion]
    lines += first_of("suspicious, but used", suspicions)

    # A network that has seen nearly the same image passes its test by memory.
    if alike and any(alike.across_splits.values()):
        centres = ", ".join(+alike.across_splits)
        lines.append(
            f"near-duplicates are in several splits of {centres}: a group, or --split grouped, "
            "keeps them together"
        )
    if alike and any(alike.across_centres.values()):
        centres = ", ".join(+alike.across_centres)
        lines.append(
            f"near-duplicates are in several centres, of {centres}: keep each in one of them, or "
            "a test is of what was trained on"
        )
    return lines


def first_of(heading: str, lines: Sequence[str]) -> list[str]:
    """The first of these lines below a heading; nothing without any."""
    if not lines:
        return []
    shown = [f"{heading}:", *[f"  {line}" for line in lines[:LISTED]]]
    if len(lines) > LISTED:
        shown.append(f"  … and {len(lines) - LISTED} more: --out lists all in look.csv")
    return shown


def remarks_on_size(config: fedgs.Config, federation: data.Federation) -> list[str]:
    """Whether there is enough to train on, and lesions are as large here as for the rule."""
    lines = []
    try:
        options.check_sizes(config, federation.facts)
    except UserError as error:
        lines.append(f"too little to train on: {error}")

    # A lesion of a few pixels has another share of the image at another size.
    rule = data.RULE_SIZE
    if config.images != "slices" and config.image_size != rule:
        lines.append(f"small is what is small at {rule}x{rule}: a suggestion is best made there")
    return lines


def training_sizes(federation: data.Federation, seen: Sequence[Seen]) -> dict[str, Tensor]:
    """{client: what tau is compared with, of each of its N training images (N,)}; inf for none"""
    sizes = {client: [] for client in federation.train}
    for one in seen:
        if one.split == "train":
            sizes[one.centre].append(one.smallest)
    return {client: torch.tensor(x, dtype=torch.float64) for client, x in sizes.items()}


def small_by(sizes: Mapping[str, Tensor], tau: float) -> dict[str, Tensor]:
    """{client: which of its training images tau marks as small (N,)}

    sizes: as from `training_sizes`
    """
    # Whatever flags somebody has written down, they were made with another tau.
    return {client: x.isfinite() & (x >= tau) for client, x in sizes.items()}


def describe_suggestion(
    config: fedgs.Config, federation: data.Federation, seen: Sequence[Seen]
) -> str:
    """The suggestion of tau and l, its reason, and what it would do."""
    # From training images alone: nothing may be chosen by those that are tested on.
    sizes = training_sizes(federation, seen)
    known = torch.cat(list(sizes.values()))
    known = known[known.isfinite()]
    if not len(known):
        return "no suggestion: no training image has a lesion"

    paper = LITS if config.images == "slices" else POLYPGEN
    tau, log_base = suggest(known.tolist(), paper)
    small = small_by(sizes, tau)
    effects = predict(replace(config, log_base=log_base), federation, small)
    if not effects:
        return f"no suggestion: no centre has {config.batch_size} training images for a batch"

    effect = effects["all"]
    return (
        f"suggestion, to start from: --tau {tau:g} --log-base {log_base:g}\n"
        f"  tau: {effect.small:.1%} of the training images with a lesion are small, as about "
        f"{paper.small:.0%} of\n"
        f"    {paper.name}'s with the paper's {paper.tau:g}\n"
        f"  l: an image whose 1/a is tau has difficulty {paper.difficulty:.2f}, as in the paper\n"
        f"  they would scale {effect.scaled:.1%} of the steps; mean η {effect.eta:.3f}\n"
        "  Which lesions are missed for being small, only training tells: try others, too."
    )


# ------------------------------------------------------------------------------------ a whole look


def choose_config(given: Mapping) -> fedgs.Config:
    """The configuration of a run on these data. given: options by name"""
    config, _ = fedgs.configure({**given, "preset": "paper"})
    if data.find(config.dataset, config.data_root) is None:
        # Drawn images are small ones by default, since drawing takes its time.
        config, _ = fedgs.configure({**given, "preset": "quick"})
    return fedgs.settle(config)


def look(given: Mapping, out: Path | None = None) -> tuple[list[Seen], dict[str, Effect]]:
    """Print what there is, and what tau and l would do. -> all images, {client or "all": effect}

    given: options by name; out: folder for look.png and look.csv. Raises UserError for data of
    which no centre can be used, and for a folder that is not empty.
    """
    # Reading takes its time: what can be refused before it is.
    if out:
        runs.check_empty(out)
    config = choose_config(given)

    # Drawn images need no check.
    root = data.find(config.dataset, config.data_root)
    files = check_files(config, root) if root else []
    bad = [file for file in files if file.problem]
    federation, left_out = load_usable(config, files, bad)
    config = without(config, left_out)

    # Neighbours in a volume always look alike.
    seen = see_all(federation, config.images)
    numbers = []
    alike = None
    if config.images != "slices":
        numbers = number_by_looks(federation)
        alike = count_alike(seen, numbers)

    # What there is.
    size = f"{config.image_size}x{config.image_size}"
    print(f"{federation.source}, {federation.place}; looked at with {size} pixels")
    notes = [*federation.notes, *remarks_on_size(config, federation)]
    for line in [*notes, *remarks(seen, bad, left_out, alike)]:
        print(f"  {line}")
    print("\n" + files_table(files, bad, seen, alike))
    print("\n" + lesions_table(seen, config.out_centre))

    # What a training would make of it.
    small = {client: images.small for client, images in federation.train.items()}
    effects = predict(config, federation, small)
    chosen = f"--tau {config.tau:g} --log-base {config.log_base:g}"
    print(f"\nthe effect of {chosen}, before augmentation:")
    print(effects_table(effects))
    print("\n" + describe_suggestion(config, federation, seen))

    # Files last: where a picture cannot be drawn, the tables have been read already.
    if out:
        write_text(out / "look.csv", to_csv(csv_rows(seen, bad, numbers, federation.source)))
        print(f"\nin {out}: look.csv, a row for each image")
    if out and any(one.lesions for one in seen):
        title = f"A first look at {federation.source}"
        figure = pictures.draw_look(seen, config.tau, config.log_base, title, SHOWN)
        pictures.save_figure(out / "look.png", figure)
        print(f"in {out}: look.png, with the smallest lesions")
    return seen, effects


# ----------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line: options of a run are attributes only where they were given."""
    parser = options.new_parser(__doc__, "python -m tools.look")
    parser.add_argument("--out", type=Path, help="folder for look.png and look.csv")
    options.add_options(parser, fedgs.Config, WHICH, fedgs.SHOWN_DEFAULTS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with readable_errors("tools.look"):
        given = vars(parse(arguments))
        out = given.pop("out", None)
        look(given, out)


if __name__ == "__main__":
    main()
