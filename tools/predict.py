"""Masks for images and volumes of your own.

    python -m tools.predict --checkpoint best.pt --out masks scan.jpg frames/
    python -m tools.predict --checkpoint lits.pt --out masks volume-*.nii.gz
    python -m tools.predict --checkpoint best.pt --out masks --adapt hospital/    # see below
    python -m tools.predict --checkpoint published.pt --dataset polypgen --model sd-utnet --out …

An image leaves NAME_mask.png (0 or 255) and NAME_overlay.png at its own size, turned as a viewer
shows it; a volume NAME_mask.nii.gz with its own shape, affine and spacing. Of a folder, all images
or volumes directly in it are taken, except masks. Nothing is overwritten, and a file that cannot be
read does not keep the others from being segmented.

--adapt first measures batch norm's statistics on these very files, without labels. That makes sense
for many images of one hospital: means over a handful of them are noise. --client NAME takes the
scales and shifts that this client of a FedBN run kept for itself, in place of their mean.
"""

import contextlib
import functools
import gzip
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, PngImagePlugin
from scipy import ndimage
from tqdm import tqdm

import data
from fedgs import ENOUGH, Config, FlatNetwork, adapt, predict, state_of
from support import checkpoints, options, pictures, runs, volumes
from support.errors import UserError, readable_errors
from support.files import replacing
from support.pixels import open_image
from tools.common import DESCRIBES, describe_origin, open_checkpoint

# What a network for images, and one for slices, reads and leaves: suffixes.
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
VOLUMES = (".nii", ".nii.gz")
IMAGE_RESULTS = ("_mask.png", "_overlay.png")
VOLUME_RESULTS = ("_mask.nii.gz",)
MASKS = re.compile(r"segmentation-.*|.*_(mask|overlay)\..*")  # truths and earlier results
COLOUR = np.array(ImageColor.getrgb(pictures.SKY))  # of predictions, as in the other pictures

Predict = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]
FEW = 16  # images: one batch of `adapt`


def find_inputs(paths: Sequence[str], kind: str) -> dict[str, Path]:
    """Files to segment, and in place of a folder those in it. -> {name of the results: path}

    kind: of images that a network is for, as in Config. Raises UserError for what is not there, is
    of a kind that it does not read, or would have the same results as another file.
    """
    known = suffixes(kind)
    reads = f"a network for {'volumes' if kind == 'slices' else 'images'} reads {', '.join(known)}"
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = files_in(path, known)
            if not inside:
                raise UserError(f"{path} holds nothing to segment: {reads}")
            files.extend(inside)
        elif not path.exists():
            raise UserError(f"{path}: no such file")
        elif not suffix(path, known):
            raise UserError(f"{path}: {reads}")
        else:
            files.append(path)

    named = {}
    for path in files:
        name = path.name.removesuffix(suffix(path, known))
        if named.get(name, path) != path:
            raise UserError(
                f"{named[name]} and {path} would have the same results: give them other names, or "
                "predict them apart"
            )
        named[name] = path
    return named


def suffixes(kind: str) -> tuple[str, ...]:
    """Those of files that a network for this kind of images reads."""
    return VOLUMES if kind == "slices" else IMAGES


def files_in(folder: Path, known: Sequence[str]) -> list[Path]:
    """Files with one of these suffixes directly in a folder, but for masks."""
    files = [item for item in sorted(folder.iterdir()) if item.is_file()]
    readable = [item for item in files if suffix(item, known)]
    return [item for item in readable if not MASKS.fullmatch(item.name)]


def suffix(path: Path, known: Sequence[str]) -> str:
    """Which of these suffixes a file has, as it is spelt there; empty for another file."""
    for ending in known:
        if path.name.lower().endswith(ending):
            return path.name[-len(ending) :]
    return ""


def segment_files(
    predict: Predict, inputs: dict[str, Path], folder: Path, reading: data.Reading, source: str
) -> list[str]:
    """Segment one file after another. -> messages of those that could not be read

    predict: images (N, C, size, size) uint8 and (height, width) -> masks (N, 1, height, width)
    bool; inputs: see `find_inputs`; reading: how the network's images are read; source: what it was
    trained on, which is written into every file. Raises UserError, before anything is written,
    where results are there already.
    """
    of_volumes = reading.kind == "slices"
    targets = {}
    for name in inputs:
        endings = VOLUME_RESULTS if of_volumes else IMAGE_RESULTS
        targets[name] = [folder / f"{name}{ending}" for ending in endings]
        for path in targets[name]:
            if path.exists():
                raise UserError(f"{path} is there already: choose another --out")

    failures = []
    with tqdm(inputs.items(), unit="file", leave=False, disable=None) as bar:
        for name, path in bar:
            bar.set_description(name)
            try:
                if of_volumes:
                    [mask_path] = targets[name]
                    found = segment_volume(predict, path, mask_path, reading, source)
                else:
                    mask_path, overlay_path = targets[name]
                    found = segment_image(predict, path, mask_path, overlay_path, reading, source)
            except UserError as error:
                failures.append(str(error))
                continue
            bar.write(f"{path}: {found} -> {', '.join(map(str, targets[name]))}")
    return failures


# ---------------------------------------------------------------------------------------- an image


def segment_image(
    predict: Predict,
    path: Path,
    mask_path: Path,
    overlay_path: Path,
    reading: data.Reading,
    source: str,
) -> str:
    """One image: its mask, 0 or 255, and the mask drawn over it. -> what was found"""
    image = open_image(path, reading.mode, reading.window)
    batch = as_batch(image, reading.size)
    mask = predict(batch, (image.height, image.width))[0, 0].numpy()

    save_png(mask_path, Image.fromarray(mask).convert("L"), source)
    save_png(overlay_path, overlay(image.convert("RGB"), mask, source), source)

    count = ndimage.label(mask, np.ones((3, 3)))[1]
    if not count:
        return "no lesion"
    return f"{count} component{'s' if count > 1 else ''}, {mask.mean():.1%} of the image"


def as_batch(image: Image.Image, size: int) -> torch.Tensor:
    """An image as a network sees it, alone in its batch. -> (1, C, size, size) uint8"""
    pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1)[None]


def save_png(path: Path, picture: Image.Image, source: str) -> None:
    """A PNG file that says what the network was trained on."""
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", source)
    with replacing(path) as new:
        picture.save(new, "PNG", pnginfo=about)


def overlay(image: Image.Image, mask: np.ndarray, source: str) -> Image.Image:
    """An image with a mask (H, W) bool as a tint, and its outline as a line."""
    pixels = np.asarray(image).astype(np.float32)
    pixels[mask] = 0.7 * pixels[mask] + 0.3 * COLOUR
    width = max(1, round(min(mask.shape) / 250))
    pixels[mask & ~ndimage.binary_erosion(mask, iterations=width)] = COLOUR

    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    if "stand-in" in source:
        ImageDraw.Draw(drawn).text(
            (4, 4), source, fill="white", stroke_width=1, stroke_fill="black"
        )
    return drawn


# --------------------------------------------------------------------------------------- a volume


def segment_volume(
    predict: Predict, path: Path, mask_path: Path, reading: data.Reading, source: str
) -> str:
    """One volume: a mask, 0 or 1, with its shape, affine and spacing. -> what was found

    Slices run along the third axis, as in LiTS. Sixteen of them are in memory at a time: the mask
    is written as it grows.
    """
    volume = volumes.open_volume(path)
    volumes.check_whole(path, volume)
    levels = reading.window or volumes.own_levels(volume, path)
    height, width, depth = volume.shape
    pixels = 0
    with_lesion = 0

    with replacing(mask_path) as new, gzip.open(new, "wb", compresslevel=6) as file:
        mask_header(volume.header, source).write_to(file)
        blocks = range(0, depth, volumes.BLOCK)
        for start in tqdm(blocks, desc=path.name, unit="block", leave=False, disable=None):
            batch = block_as_batch(volume, path, start, levels, reading.size)
            masks = predict(batch, (height, width))[:, 0].numpy()

            # NIfTI's first axis runs fastest.
            block = masks.transpose(1, 2, 0).astype(np.uint8)
            file.write(block.tobytes(order="F"))
            pixels += int(masks.sum())
            with_lesion += int(masks.any((1, 2)).sum())

    if not pixels:
        return "no lesion"
    voxel = float(np.prod(volume.header.get_zooms()[:3])) / 1000
    return f"lesion in {with_lesion} of {depth} slices, {pixels * voxel:.1f} ml"


def block_as_batch(
    volume: nibabel.spatialimages.SpatialImage,
    path: Path,
    start: int,
    levels: Sequence[float],
    size: int,
) -> torch.Tensor:
    """Slices of a volume, from this one on, as a network sees them. -> (N, 1, size, size) uint8"""
    values = volumes.read_block(volume, path, start)
    greys = volumes.window(values, path, levels)
    slices = [volumes.to_size(grey, size) for grey in greys]
    return torch.from_numpy(np.stack(slices)).permute(0, 3, 1, 2)


def mask_header(header: nibabel.Nifti1Header, source: str) -> nibabel.Nifti1Header:
    """The header of a mask: its volume's shape, spacing and orientation, other values."""
    header = header.copy()
    header.extensions.clear()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["vox_offset"] = 0  # the values follow directly
    header["cal_min"] = 0
    header["cal_max"] = 1
    header["descrip"] = f"lesion mask, {source}".encode()[:79]
    return header


# ----------------------------------------------------------------------------- batch norm's own


def samples_of(inputs: dict[str, Path], reading: data.Reading) -> torch.Tensor:
    """Images to measure batch norm's statistics on, evenly spaced. -> (N, C, size, size) uint8

    A file that cannot be read is left out: its segmentation will say why.
    """
    paths = list(inputs.values())
    paths = paths[:: -(-len(paths) // ENOUGH)]
    of_each = -(-ENOUGH // len(paths))  # slices of a volume
    samples = []
    for path in tqdm(paths, desc="adapting", unit="file", leave=False, disable=None):
        with contextlib.suppress(UserError):
            if reading.kind == "slices":
                samples.append(slices_of(path, of_each, reading))
            else:
                image = open_image(path, reading.mode, reading.window)
                samples.append(as_batch(image, reading.size))
    return torch.cat(samples) if samples else torch.empty(0)


def slices_of(path: Path, count: int, reading: data.Reading) -> torch.Tensor:
    """About `count` slices, evenly spaced over a volume. -> (N, 1, size, size) uint8"""
    volume = volumes.open_volume(path)
    volumes.check_whole(path, volume)
    levels = reading.window or volumes.own_levels(volume, path)
    step = -(-volume.shape[2] // count)
    chosen = []
    for start in range(0, volume.shape[2], volumes.BLOCK):
        # A block begins wherever the last one ended, and the steps go on across it.
        batch = block_as_batch(volume, path, start, levels, reading.size)
        chosen.append(batch[-start % step :: step])
    return torch.cat(chosen)


def adapt_to(network: torch.nn.Module, inputs: dict[str, Path], reading: data.Reading) -> str:
    """Give a network batch norm's statistics of these files. -> what to say of that"""
    samples = samples_of(inputs, reading)
    if not len(samples):
        return "nothing to adapt to could be read"
    adapt(network, samples)
    few = ", which are few: compare with and without --adapt" if len(samples) < FEW else ""
    return f"batch norm's statistics are those of {len(samples)} of these images{few}"


def use_batch_norm_of(client: str, network: torch.nn.Module, about: dict, path: Path) -> None:
    """Give a network the scales and shifts that a client of FedBN kept for itself.

    about: what the checkpoint at `path` says. Raises UserError where it has none of this client.
    """
    flat = FlatNetwork(network)
    own = checkpoints.own_of(about, flat, path)
    if client not in own:
        has = f"those of {', '.join(own)}" if own else "none: its run was not FedBN"
        raise UserError(f"--client {client}: of clients' own batch norm {path} has {has}")
    flat.load(state_of(flat.state(own), client, flat.affine))


# ------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exits with 2 where a file could not be read; the others are segmented."""
    with readable_errors("tools.predict"):
        parser = options.new_parser(__doc__, "python -m tools.predict")
        parser.add_argument("paths", nargs="+", metavar="PATH", help="images, volumes, folders")
        parser.add_argument("--checkpoint", type=Path, required=True, help="a network's .pt file")
        parser.add_argument("--out", type=Path, required=True, help="folder for the results")
        help_ = "measure batch norm's statistics on these files"
        parser.add_argument("--adapt", action="store_true", help=help_)
        help_ = "whose own batch norm to use, of a FedBN run"
        parser.add_argument("--client", metavar="NAME", help=help_)
        options.add_options(parser, Config, DESCRIBES)
        given = vars(parser.parse_args(arguments))

        paths = given.pop("paths")
        checkpoint = given.pop("checkpoint")
        out = given.pop("out")
        wants_adapting = given.pop("adapt", False)
        client = given.pop("client", None)
        network, config, about = open_checkpoint(checkpoint, given)
        if client is not None:
            use_batch_norm_of(client, network, about, checkpoint)
        inputs = find_inputs(paths, config.images)

        origin = describe_origin(about)
        size = config.image_size
        reading = data.Reading(config.images, config.window, size, config.tau)
        print(f"{checkpoint}: {runs.run_name(config)}, {origin}, {size}x{size}", flush=True)
        if wants_adapting:
            print(adapt_to(network, inputs, reading), flush=True)
        elif config.batch_norm == "local":
            print(f"{checkpoint} was chosen with each centre's own statistics: see --adapt")
        of_network = functools.partial(predict, network)
        source = f"FedGS, {origin}"
        failures = segment_files(of_network, inputs, out, reading, source)
        if failures:
            done = len(inputs) - len(failures)
            message = "; ".join(failures)
            raise UserError(f"{message} ({done} of {len(inputs)} files were segmented)")


if __name__ == "__main__":
    main()
