"""Masks for images and CT volumes of your own: what `python fedgs.py --predict` does with each file."""

import gzip
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, PngImagePlugin
from scipy import ndimage
from tqdm import tqdm

import data
import plots

READS = {"polypgen": (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"), "lits": (".nii", ".nii.gz")}  # suffixes
MASKS = re.compile(r"segmentation-.*|.*_(mask|overlay)\..*")  # what is left out of a folder: truths and earlier results
COLOUR = np.array(ImageColor.getrgb(plots.SKY))  # of predictions, as in the other pictures


def find_inputs(paths, dataset):
    """Files to segment, and in place of a folder those directly in it, but for masks. -> {name of its results: path}, in order

    Raises DataError for what is not there, is of a kind that a network for this data set does not read, or would be
    written over the results of another file.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(item for item in path.iterdir()
                            if item.is_file() and suffix(item, dataset) and not MASKS.fullmatch(item.name))
            if not inside:
                raise data.DataError(f"{path} holds no {' or '.join(READS[dataset])} files, which a network for {dataset} reads")
            files += inside
        elif not path.exists():
            raise data.DataError(f"{path}: no such file")
        elif not suffix(path, dataset):
            raise data.DataError(f"{path}: a network for {dataset} reads {', '.join(READS[dataset])}")
        else:
            files.append(path)
    named = {}
    for path in files:
        name = path.name[: -len(suffix(path, dataset))]
        if named.get(name, path) != path:
            raise data.DataError(f"{named[name]} and {path} would have the same results: give them other names, or predict them apart")
        named[name] = path
    return named


def suffix(path, dataset):
    """The suffix of a file that a network for this data set reads; empty for another file."""
    return next((path.name[-len(s):] for s in READS[dataset] if path.name.lower().endswith(s)), "")


def segment_files(predict, inputs, folder, dataset, size, source):
    """Segment files one after another, and write and print what was found. -> messages of those that could not be read

    predict: a function of images (N, C, size, size) uint8 and (height, width) -> masks (N, 1, height, width) bool;
    inputs: see find_inputs; source: what the network was trained on, which is written into every file.
    Raises DataError, before anything is written, where results are in the folder already.
    """
    one, results = (segment_volume, ("_mask.nii.gz",)) if dataset == "lits" else (segment_image, ("_mask.png", "_overlay.png"))
    targets = {name: [folder / f"{name}{result}" for result in results] for name in inputs}
    if taken := [path for paths in targets.values() for path in paths if path.exists()]:
        raise data.DataError(f"{taken[0]} is there already: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    with tqdm(inputs.items(), unit="file", leave=False, disable=None) as progress:
        for name, path in progress:
            progress.set_description(name)
            try:
                found = one(predict, path, *targets[name], size, source)
                progress.write(f"{path}: {found} -> {', '.join(map(str, targets[name]))}")
            except data.DataError as error:
                failures.append(str(error))
    return failures


def segment_image(predict, path, mask_path, overlay_path, size, source):
    """One image: its mask, 0 or 255, and the mask drawn over it, both at the image's own size. -> what was found"""
    image = data.open_image(path, "RGB")
    pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    mask = predict(torch.from_numpy(pixels).permute(2, 0, 1)[None], (image.height, image.width))[0, 0].numpy()
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", source)
    for target, picture in ((mask_path, Image.fromarray(mask).convert("L")), (overlay_path, overlay(image, mask, source))):
        with data.replacing(target) as new:
            picture.save(new, "PNG", pnginfo=about)
    count = ndimage.label(mask, np.ones((3, 3)))[1]
    return f"{count} component{'s' if count != 1 else ''}, {mask.mean():.1%} of the image" if count else "no lesion"


def overlay(image, mask, source):
    """An image with a mask as a tint and its outline as a line. -> Pillow image"""
    pixels = np.asarray(image).astype(np.float32)
    pixels[mask] = 0.7 * pixels[mask] + 0.3 * COLOUR
    width = max(1, round(min(mask.shape) / 250))
    pixels[mask & ~ndimage.binary_erosion(mask, iterations=width)] = COLOUR
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    if "stand-in" in source:
        ImageDraw.Draw(drawn).text((4, 4), source, fill="white", stroke_width=1, stroke_fill="black")
    return drawn


def segment_volume(predict, path, mask_path, size, source):
    """One CT volume: a mask, 0 or 1, with its shape, affine and spacing. -> what was found

    Slices run along the third axis, as in LiTS. Sixteen of them are in memory at a time: the mask is written as it grows.
    """
    volume = data.open_nifti(path)
    data.check_whole(path, volume)
    height, width, depth = volume.shape
    pixels = with_lesion = 0
    with data.replacing(mask_path) as new, gzip.open(new, "wb", compresslevel=6) as file:
        mask_header(volume.header, source).write_to(file)
        for start in tqdm(range(0, depth, data.BLOCK), desc=path.name, unit="block", leave=False, disable=None):
            slices = data.window(data.read_block(volume, path, start), path)
            images = torch.from_numpy(np.stack([data.to_size(x, size) for x in slices])).permute(0, 3, 1, 2)
            masks = predict(images, (height, width))[:, 0].numpy()
            file.write(masks.transpose(1, 2, 0).astype(np.uint8).tobytes(order="F"))  # NIfTI's first axis runs fastest
            pixels, with_lesion = pixels + int(masks.sum()), with_lesion + int(masks.any((1, 2)).sum())
    millilitres = pixels * float(np.prod(volume.header.get_zooms()[:3])) / 1000
    return f"lesion in {with_lesion} of {depth} slices, {millilitres:.1f} ml" if pixels else "no lesion"


def mask_header(header, source):
    """The header of a mask from its volume's: the same shape, spacing and orientation, other values."""
    header = header.copy()
    header.extensions.clear()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["vox_offset"], header["cal_min"], header["cal_max"] = 0, 0, 1  # an offset of 0: directly behind the header
    header["descrip"] = f"lesion mask, {source}".encode()[:79]
    return header
