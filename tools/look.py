"""A first look at data, before any training.

    python -m tools.look --dataset hospitals             # your own, see docs/data.md
    python -m tools.look --data-root /data/polypgen
    python -m tools.look --dataset hospitals --tau 300 --log-base 200 --out look

Prints a table of the centres, what tau and l (--tau, --log-base) would do to a client's steps, and
a suggestion for both. With --out also writes look.png, with the images whose lesions are smallest,
and look.csv, a row for each image. Nothing is overwritten.

1/a is an image's size over that of its lesions together. Real images are looked at as --preset
paper trains on them, drawn ones as --preset quick does.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

import data
import fedgs
from support import manifest, options, pictures, runs, tables
from support.errors import UserError, readable_errors
from support.files import to_csv, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Options of a run that say which data, and what FedGS does with them.
WHICH = (
    *("dataset", "data_root", "cache", "images", "lesion", "window", "centres", "out_centre"),
    *("split", "fold", "image_size", "batch_size", "tau", "log_base"),
)

QUANTILES = (5, 25, 50, 75, 95)  # per cent


# -------------------------------------------------------------------------------- closed forms


def expected_eta(difficulty: Tensor) -> float:
    """Mean eta of a client's steps, from the difficulties (N,) of its N training images.

    eta of a batch is 1 + 2 x the mean of its difficulties, and every image is as likely to be in it
    as any other, whatever the size of batches is.
    """
    return 1 + 2 * float(difficulty.double().mean())


def expected_scaled(count: int, difficult: int, batch_size: int) -> float:
    """Share of a client's steps with eta > 1, where so many of its images are difficult.

    A batch is drawn without replacement: the chance that it has none of them is hypergeometric.
    """
    without = math.comb(count - difficult, batch_size) / math.comb(count, batch_size)
    return 1 - without


class Effect(NamedTuple):
    """What a choice of tau and l would do."""

    small: float  # share of the training images with a lesion
    scaled: float  # share of the steps
    eta: float  # mean over the steps


def effect_on(images: data.Images, small: Tensor, log_base: float, batch_size: int) -> Effect:
    """Of a client's training images, of which some count as small (N,) bool."""
    _, difficulty, _ = fedgs.mask_difficulty(images.masks, small, log_base)
    difficult = int((difficulty > 0).sum())
    with_lesion = int(images.inverse_area.isfinite().sum())
    return Effect(
        int(small.sum()) / max(with_lesion, 1),
        expected_scaled(len(images), difficult, batch_size),
        expected_eta(difficulty),
    )


def mean_effect(effects: Mapping[str, Effect], weights: Mapping[str, int]) -> Effect:
    """The mean over clients, {client: weight}."""
    of_clients = np.array([effects[client] for client in effects])
    shares = np.array([weights[client] for client in effects])
    return Effect(*np.average(of_clients, axis=0, weights=shares).tolist())


# ---------------------------------------------------------------------------------- the suggestion


class Paper(NamedTuple):
    """The paper's choice for a data set."""

    name: str
    small: float  # share of the images with a lesion that it marks
    tau: float
    log_base: float

    @property
    def difficulty(self) -> float:
        """Of an image whose 1/a is tau."""
        return math.tanh(math.log(self.tau, self.log_base) ** 2)


POLYPGEN = Paper("PolypGen", 0.11, tau=150, log_base=100)
LITS = Paper("LiTS", 0.20, tau=1000, log_base=1000)


def suggest(smallest: np.ndarray, paper: Paper) -> tuple[float, float]:
    """tau that marks as many images as the paper's, and l for which tau is as difficult.

    smallest: what tau is compared with, of every training image with a lesion (n,).
    """
    # The k images with the smallest lesions. More than two digits would claim too much.
    k = max(1, round(paper.small * len(smallest)))
    # Rounded down, the threshold still marks all of them.
    tau = max(2.0, rounded_down(np.sort(smallest)[-k]))

    # log_l(tau) has to be what it is in the paper.
    log_base = tau ** (math.log(paper.log_base) / math.log(paper.tau))
    return tau, max(1.5, float(f"{log_base:.2g}"))


def rounded_down(x: float) -> float:
    """To two digits: 156.2 -> 150."""
    unit = 10.0 ** (math.floor(math.log10(x)) - 1)
    return float(f"{math.floor(x / unit) * unit:.2g}")


# --------------------------------------------------------------------------- what a centre is like


class Centre(NamedTuple):
    """What was measured of the N images of a centre."""

    name: str
    parts: dict[str, data.Images]  # by split, in whose order everything below is
    splits: list[str]  # the split of each image
    inverse_area: np.ndarray  # (N,) of its lesions together; inf without one
    smallest: np.ndarray  # (N,) of what tau is compared with; inf without a lesion
    lesions: np.ndarray  # (N,) 8-connected components
    small: np.ndarray  # (N,) bool
    alike: list[int]  # images with the same number are near-duplicates; empty: not looked for


def parts_of(federation: data.Federation, centre: str) -> dict[str, data.Images]:
    """{split: images} of a centre."""
    if centre == federation.out_centre:
        return {"out_test": federation.out_test}
    return {
        "train": federation.train[centre],
        "validation": federation.validation[centre],
        "in_test": federation.in_test[centre],
    }


def measure(parts: Mapping[str, data.Images], kind: str) -> Centre:
    """Measure a centre's images, {split: images} of a kind as in Config."""
    splits = []
    lesions = []
    smallest = []

    # In the masks as the network sees them.
    for split, images in parts.items():
        splits.extend([split] * len(images))
        for mask in images.masks[:, 0].numpy():
            count, area = measure_lesions(mask)
            lesions.append(count)
            smallest.append(area)

    inverse_area = torch.cat([images.inverse_area for images in parts.values()]).numpy()
    small = torch.cat([images.small for images in parts.values()]).numpy()

    # A slice's lesions count together, and neighbours in a volume always look alike.
    measured = np.array(smallest)
    alike = []
    if kind == "slices":
        measured = inverse_area
    else:
        alike = near_duplicates(list(parts.values()))

    name = next(iter(parts.values())).centre
    return Centre(
        name, dict(parts), splits, inverse_area, measured, np.array(lesions), small, alike
    )


def measure_lesions(mask: np.ndarray) -> tuple[int, float]:
    """Of a mask (H, W): its 8-connected components, and the inverse area of the smallest."""
    components, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return 0, math.inf
    areas = np.bincount(components.ravel())[1:]  # the first is that of the background
    return count, float(mask.size / areas.min())


def near_duplicates(parts: Sequence[data.Images]) -> list[int]:
    """A number for each image of a centre, the same for those that look alike."""
    # Thumbnails as data.groups_by_looks makes them: of all images at once they fit in memory.
    thumbnails = []
    for images in parts:
        some = images.images.split(64)
        thumbnails.extend(F.adaptive_avg_pool2d(pixels.float(), 32) for pixels in some)
    first = parts[0].subset([])
    first.images = torch.cat(thumbnails)
    return data.groups_by_looks(first)


def count_alike(centre: Centre) -> tuple[int, int]:
    """How many images look like another one of the centre; of these, like one in another split.

    None, where nobody has looked for them.
    """
    if not centre.alike:
        return 0, 0
    splits_of = {}
    for number, split in zip(centre.alike, centre.splits, strict=True):
        splits_of.setdefault(number, []).append(split)

    alike = 0
    across = 0
    for splits in splits_of.values():
        if len(splits) > 1:
            alike += len(splits)
        if len(set(splits)) > 1:
            across += len(splits)
    return alike, across


# -------------------------------------------------------------------------------------- the tables


def native_sizes(config: fedgs.Config, root: Path | None) -> dict[str, set[tuple[int, int]]]:
    """{centre: {(width, height), …}} as files say it; empty for volumes and drawn images."""
    if root is None or config.images == "slices":
        return {}

    paths = []
    if config.dataset == "polypgen":
        for centre in config.centres:
            paths.extend((centre, image) for image, _ in data.list_pairs(root, centre))
    else:
        paths.extend((row.centre, row.image) for row in manifest.read(root))

    sizes = {}
    for centre, path in paths:
        with Image.open(path) as image:
            sizes.setdefault(centre, set()).add(image.size)
    return sizes


def describe_sizes(sizes: set[tuple[int, int]]) -> str:
    """{(64, 48)} -> "64x48"; the smallest and the largest of several."""
    ordered = sorted(sizes, key=math.prod)
    texts = [f"{width}x{height}" for width, height in ordered]
    if len(texts) > 1:
        return f"{len(texts)}: {texts[0]} to {texts[-1]}"
    return "".join(texts) or "–"


def centres_table(
    centres: Sequence[Centre], sizes: Mapping[str, set[tuple[int, int]]], out_centre: str
) -> str:
    """A row for each centre."""
    header = ["centre", "images", "with lesion", "lesions each", "small"]
    header += [f"1/a {percent} %" for percent in QUANTILES]
    header += ["alike", "across splits", "sizes"]

    rows = [header]
    for centre in centres:
        with_lesion = centre.lesions > 0
        row = [centre.name + (" (held out)" if centre.name == out_centre else "")]
        row += [str(len(centre.lesions)), str(with_lesion.sum())]
        row.append(f"{centre.lesions[with_lesion].mean():.2f}" if with_lesion.any() else "–")
        row.append(str(centre.small.sum()))
        row += quantile_cells(centre.inverse_area)
        row += [str(count) for count in count_alike(centre)] if centre.alike else ["–", "–"]
        row.append(describe_sizes(sizes.get(centre.name, set())))
        rows.append(row)
    return tables.aligned(rows)


def quantile_cells(inverse_area: np.ndarray) -> list[str]:
    """Quantiles of the images that have a lesion."""
    finite = inverse_area[np.isfinite(inverse_area)]
    if not len(finite):
        return ["–"] * len(QUANTILES)
    return [f"{value:.1f}" for value in np.percentile(finite, QUANTILES)]


def effects_table(effects: Mapping[str, Effect]) -> str:
    """A row for each client, and one for all of them."""
    rows = [["training images of", "small", "scaled steps", "mean η"]]
    for name, effect in effects.items():
        cells = [f"{effect.small:.1%}", f"{effect.scaled:.1%}", f"{effect.eta:.3f}"]
        rows.append([name, *cells])
    return tables.aligned(rows)


def rows_of(centres: Sequence[Centre], source: str) -> list[dict]:
    """The rows of look.csv, an image each."""
    rows = []
    for centre in centres:
        names = []
        for images in centre.parts.values():
            names.extend(images.names)
        for i, name in enumerate(names):
            rows.append(
                {
                    "centre": centre.name,
                    "split": centre.splits[i],
                    "name": name,
                    "lesions": centre.lesions[i],
                    "inverse_area": centre.inverse_area[i],
                    "smallest": centre.smallest[i],
                    "small": int(centre.small[i]),
                    "alike": centre.alike[i] if centre.alike else "",
                    "data": source,
                }
            )
    return rows


# ------------------------------------------------------------------------------------- the picture


SHOWN = 12  # images, in two rows


def draw(centres: Sequence[Centre], config: fedgs.Config, title: str) -> "Figure":
    """Sizes of lesions by centre, difficulty over size, and the images of the smallest lesions."""
    figure = pictures.new_figure(title, 13, 12)
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    sizes, difficulty = above.subplots(2, 1, sharex=True)
    draw_sizes(sizes, centres, config.tau)
    draw_difficulty(difficulty, centres, config)

    below.suptitle("the smallest lesions first", fontsize=11)
    grid = below.subplots(2, SHOWN // 2)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (centre, i) in zip(grid.flat, smallest_first(centres), strict=False):
        draw_image(axes, centre, i)
    return figure


def draw_sizes(axes: "Axes", centres: Sequence[Centre], tau: float) -> None:
    """A histogram of 1/a for each centre."""
    every = finite_areas(centres)
    edges = np.geomspace(0.999 * every.min(), 1.001 * every.max(), 25)
    for k, centre in enumerate(centres):
        label = centre.name
        if len(centres) > pictures.MOST_NAMED:
            # Their number stands for the names, once: labels that begin with _ are not listed.
            label = "_" if k else f"{len(centres)} centres"
        colour = pictures.COLOURS[k % len(pictures.COLOURS)]
        areas = finite_areas([centre])
        axes.hist(areas, edges, histtype="step", linewidth=1.6, color=colour, label=label)

    axes.axvline(tau, color="0.3", linestyle="dotted", label=f"τ = {tau:g}")
    axes.set(xscale="log", ylabel="images with a lesion")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)


def draw_difficulty(axes: "Axes", centres: Sequence[Centre], config: fedgs.Config) -> None:
    """δ over 1/a, and the images below: those that count as small, and the others."""
    every = finite_areas(centres)
    x = np.geomspace(every.min(), every.max(), 200)
    delta = np.tanh((np.log(x) / math.log(config.log_base)) ** 2)
    name = f"δ of small lesions, l = {config.log_base:g}"
    axes.plot(x, delta, color=pictures.GREEN, label=name)
    axes.axvline(config.tau, color="0.3", linestyle="dotted")

    small = np.concatenate([centre.small for centre in centres])
    areas = np.concatenate([centre.inverse_area for centre in centres])
    known = np.isfinite(areas)
    kinds = (("small", small, pictures.RED, -0.06), ("not small: δ = 0", ~small, "0.5", -0.14))
    for label, chosen, colour, height in kinds:
        found = areas[chosen & known]
        marks = np.full(len(found), height)
        axes.plot(found, marks, "|", color=colour, alpha=0.5, label=f"{label} ({len(found)})")

    axes.set(ylabel="difficulty δ", ylim=(-0.2, 1.05))
    axes.set_xlabel("inverse area 1/a of an image's lesions: image pixels / lesion pixels")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)


def finite_areas(centres: Sequence[Centre]) -> np.ndarray:
    """1/a of all images with a lesion."""
    areas = np.concatenate([centre.inverse_area for centre in centres])
    return areas[np.isfinite(areas)]


def smallest_first(centres: Sequence[Centre]) -> list[tuple[Centre, int]]:
    """The images of the smallest lesions: their centre, and which of it."""
    found = []
    for number, centre in enumerate(centres):
        for i, size in enumerate(centre.smallest.tolist()):
            if math.isfinite(size):
                found.append((-size, number, i))
    found.sort()
    return [(centres[number], i) for _, number, i in found[:SHOWN]]


def draw_image(axes: "Axes", centre: Centre, i: int) -> None:
    """Image i of a centre with the outline of its lesions."""
    position = i
    for images in centre.parts.values():
        if position < len(images):
            break
        position -= len(images)

    pixels = images.images[position].permute(1, 2, 0).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    pictures.outline(axes, images.masks[position, 0].numpy(), pictures.SKY, "solid")
    facts = f"1/a = {centre.inverse_area[i]:.0f}, of the smallest {centre.smallest[i]:.0f}"
    axes.set_title(f"{centre.name}, {images.names[position][:24]}\n{facts}", fontsize=8)


# ------------------------------------------------------------------------------------ a whole look


def choose_config(given: Mapping) -> fedgs.Config:
    """The configuration of a run on these data. given: options by name"""
    config, _ = fedgs.configure({**given, "preset": "paper"})
    if data.find(config.dataset, config.data_root) is None:
        # Drawn images are small ones by default, since drawing takes its time.
        config, _ = fedgs.configure({**given, "preset": "quick"})
    return fedgs.settle(config)


def predict_effects(
    config: fedgs.Config, federation: data.Federation, small: Mapping[str, Tensor]
) -> dict[str, Effect]:
    """What tau and l would do to each client, and to "all" of their steps. small: {client: flags}

    Clients with fewer images than a batch take no step, and are left out. Raises UserError where
    that leaves none.
    """
    steps = fedgs.client_steps(config, federation.facts)
    effects = {}
    for client, images in federation.train.items():
        if steps[client]:
            flags = small[client]
            effects[client] = effect_on(images, flags, config.log_base, config.batch_size)
    if not effects:
        raise UserError(
            f"no centre has enough training images for --batch-size {config.batch_size}"
        )
    return {**effects, "all": mean_effect(effects, steps)}


def predict_chosen(config: fedgs.Config, federation: data.Federation) -> dict[str, Effect]:
    """What the tau and l of a configuration would do."""
    small = {client: images.small for client, images in federation.train.items()}
    return predict_effects(config, federation, small)


def predict_suggested(
    config: fedgs.Config, federation: data.Federation, centres: Sequence[Centre]
) -> str:
    """The suggestion, its reason, and what it would do, as text.

    It is made from training images alone: nothing is chosen by those that are tested on.
    """
    training = {}
    for centre in centres:
        if centre.name != federation.out_centre:
            chosen = np.array(centre.splits) == "train"
            training[centre.name] = centre.smallest[chosen]
    sizes = np.concatenate(list(training.values()))
    sizes = sizes[np.isfinite(sizes)]
    if not len(sizes):
        return "no suggestion: no training image has a lesion"

    paper = LITS if config.images == "slices" else POLYPGEN
    tau, log_base = suggest(sizes, paper)
    small = {}
    for client, smallest in training.items():
        small[client] = torch.from_numpy(np.isfinite(smallest) & (smallest >= tau))
    suggested = replace(config, tau=tau, log_base=log_base)
    effect = predict_effects(suggested, federation, small)["all"]
    return (
        f"suggestion, to start from: --tau {tau:g} --log-base {log_base:g}\n"
        f"  tau: marks {effect.small:.1%} of the training images with a lesion as small, about as "
        f"the paper's {paper.tau:g} does on {paper.name} ({paper.small:.0%})\n"
        f"  l: an image whose 1/a is tau then has difficulty {paper.difficulty:.2f}, as in the "
        "paper\n"
        f"  they would scale {effect.scaled:.1%} of the steps; mean η {effect.eta:.3f}\n"
        "  What is small enough to be missed, only training tells: try smaller and larger ones."
    )


def what_to_know(
    config: fedgs.Config, federation: data.Federation, centres: Sequence[Centre]
) -> list[str]:
    """How the data were read, and what about them is suspicious, a line each."""
    lines = list(federation.notes)
    across = [centre.name for centre in centres if count_alike(centre)[1]]
    if across and config.split != "grouped":
        lines.append(
            f"near-duplicates are in several splits of {', '.join(across)}: --split grouped keeps "
            "them together"
        )
    try:
        options.check_sizes(config, federation.facts)
    except UserError as error:
        lines.append(f"cannot be trained on as it is: {error}")
    return lines


def look(given: Mapping, out: Path | None = None) -> tuple[list[Centre], dict[str, Effect]]:
    """Print what there is, and what tau and l would do. -> the centres, {client or "all": effect}

    given: options by name; out: folder for look.png and look.csv. Raises UserError for data that
    cannot be read, and for a folder that is not empty.
    """
    if out:
        runs.check_empty(out)
    config = choose_config(given)
    federation = fedgs.load_data(config, config.centres)
    parts = [parts_of(federation, name) for name in config.centres]
    centres = [measure(of_centre, config.images) for of_centre in parts]

    size = f"{config.image_size}x{config.image_size}"
    print(f"{federation.source}, {federation.place}; looked at with {size} pixels")
    for line in what_to_know(config, federation, centres):
        print(f"  {line}")
    sizes = native_sizes(config, data.find(config.dataset, config.data_root))
    print("\n" + centres_table(centres, sizes, config.out_centre))

    # The data are described by now: what follows may refuse them.
    effects = predict_chosen(config, federation)
    chosen = f"--tau {config.tau:g} --log-base {config.log_base:g}"
    print(f"\n{chosen} would do, as far as augmentation leaves lesions as they are:")
    print(effects_table(effects))
    print("\n" + predict_suggested(config, federation, centres))

    if out:
        title = f"A first look at {federation.source}"
        write_text(out / "look.csv", to_csv(rows_of(centres, federation.source)))
        pictures.save_figure(out / "look.png", draw(centres, config, title))
        print(f"\nin {out}: look.png, and look.csv with a row for each image")
    return centres, effects


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
