"""Install FedGS: `pip install -e .`, or `pip install -e ".[test]"` with what its tests need."""

import re
from pathlib import Path

from setuptools import setup

setup(
    name="fedgs",
    version=re.search('__version__ = "(.+)"', Path(__file__).with_name("fedgs.py").read_text(encoding="utf-8"))[1],
    description="Federated Gradient Scaling for heterogeneous medical image segmentation",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["fedgs", "models", "data", "metrics"],
    install_requires=[
        "torch>=2.8,<2.14",
        "numpy>=1.26",
        "pillow>=10",  # reads and resizes the frames
        "scipy>=1.11",  # connected components of lesions, correlations of frames
        "matplotlib>=3.8",  # the pictures
        "tqdm>=4.66",  # progress with an estimate of the time left
    ],
    extras_require={"test": ["pytest>=8", "scikit-learn>=1.4"]},  # scikit-learn: the published splits were made with it
)
