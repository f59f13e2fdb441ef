"""Small CT volumes, as the tests of data.py and support/volumes.py need them."""

from pathlib import Path

import nibabel
import numpy as np


def write_volume(
    folder: Path,
    number: int,
    labels: np.ndarray,
    hu: np.ndarray | None = None,
    suffix: str = ".nii.gz",
    dtype: type = np.int16,
) -> tuple[Path, Path]:
    """A volume and its segmentation, both (H, W, slices), as NIfTI files. -> their paths"""
    folder.mkdir(parents=True, exist_ok=True)
    if hu is None:
        hu = np.where(labels == 2, 60, 100)
    volume = folder / f"volume-{number}{suffix}"
    segmentation = folder / f"segmentation-{number}{suffix}"
    nibabel.Nifti1Image(hu.astype(dtype), np.eye(4)).to_filename(volume)
    nibabel.Nifti1Image(labels.astype(np.uint8), np.eye(4)).to_filename(segmentation)
    return volume, segmentation


def labels_of(*areas: int, height: int = 16, width: int = 20) -> np.ndarray:
    """Slices with so many pixels of tumour each, the rest liver."""
    labels = np.ones((height * width, len(areas)), np.uint8)
    for k, area in enumerate(areas):
        labels[:area, k] = 2
    return labels.reshape(height, width, len(areas))
