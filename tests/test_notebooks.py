"""The notebooks: each runs from top to bottom, and what is stored in it is fit to be read.

They run at tiny settings; FEDGS_NOTEBOOKS=full runs them as they are stored.
"""

import os
import re

import pytest

from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module", autouse=True)
def settings():
    """Small sizes, and one thread, which tiny networks are quickest with."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("FEDGS_NOTEBOOKS") != "full":
            patch.setenv("FEDGS_TINY", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def test_all_are_here():
    assert [name[:2] for name in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    folder = {"metadata": {"path": ROOT / "notebooks"}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=300, resources=folder).execute()
    assert not [output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_stored(name):
    """Small, executed in order, without errors, warnings, paths of a machine or what progress bars leave."""
    path = ROOT / "notebooks" / name
    assert path.stat().st_size < 1_500_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = "\n".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert not re.search(r"/(home|root|tmp|usr|work|Users|opt)/|Warning|it/s\]|\r", text)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "## Exercises" in prose and "## What to read next in the code" in prose
    assert len(prose) > sum(len(cell.source) for cell in code) / 2  # notebooks are for reading
