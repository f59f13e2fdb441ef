"""Where the real data is, if it is here: in datasets/polypgen, or in a folder `shared` beside the checkout."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("FEDGS_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def polypgen_root():
    """A folder with the real PolypGen single frames, its published size flags and fold lists."""
    for root in (ROOT / "datasets" / "polypgen", SHARED / "polypgen256"):
        if (root / "data_C1").is_dir():
            return root
    pytest.skip("the real PolypGen is not here")


@pytest.fixture(scope="session")
def published():
    """A folder with the names and shapes of the published checkpoints."""
    if not (SHARED / "published").is_dir():
        pytest.skip("the lists of published names are not here")
    return SHARED / "published"


def refused(capsys, code, *words):
    """Exit code 2, one line on stderr, no traceback, and these words in it."""
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("fedgs.py: error: ") and error.count("\n") == 1
    for word in words:
        assert word in error, error


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
