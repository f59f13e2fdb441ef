"""The notebooks: each runs from top to bottom, and what is stored in it is fit to be read.

They run at tiny settings; FEDGS_NOTEBOOKS=full runs them as they are stored.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
manager = pytest.importorskip("jupyter_client.manager")
pytest.importorskip("ipykernel")

FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))

# A path of some machine, a warning, or what a progress bar leaves.
UNWANTED = r"/(home|root|tmp|usr|work|Users|opt)/|Warning|it/s\]|\r"


def read(name: str):
    return nbformat.read(FOLDER / name, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook) -> list:
    """The outputs of all cells, one after another."""
    outputs = []
    for cell in code_cells(notebook):
        outputs.extend(cell.outputs)
    return outputs


def prose_of(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


# ------------------------------------------------------------------------------- from top to bottom


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """{name: the notebook's future}. Two run at a time, each with one thread."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        if os.environ.get("FEDGS_NOTEBOOKS") != "full":
            patch.setenv("FEDGS_TINY", "1")
        patch.setenv("OMP_NUM_THREADS", "1")

        futures = {}
        for name in NAMES:
            futures[name] = pool.submit(execute, name, tmp_path_factory.mktemp("kernel"))
        yield futures
        pool.shutdown(cancel_futures=True)


def execute(name: str, folder: Path):
    """Run a notebook from top to bottom. -> the notebook with its outputs

    folder: for the kernel's sockets. Raises where a cell does.
    """
    # Sockets in files, where there are such: kernels that start at the same time may otherwise
    # choose the same port.
    how = {}
    if os.name == "posix":
        how = {"transport": "ipc", "ip": str(folder / "socket")}
    kernel = manager.KernelManager(kernel_name="python3", **how)

    notebook = read(name)
    where = {"metadata": {"path": FOLDER}}
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=300, resources=where)
    try:
        client.execute()
    finally:
        kernel.shutdown_kernel(now=True)
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, executed):
    outputs = outputs_of(executed[name].result())
    assert outputs
    for output in outputs:
        assert output.get("name") != "stderr", output.text


# ---------------------------------------------------------------------------------- what is stored


def test_all_are_here():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs(name):
    """Small, executed in order, without errors, warnings, paths of a machine and progress bars."""
    assert (FOLDER / name).stat().st_size < 1_500_000
    notebook = read(name)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))

    pictures = 0
    for output in outputs_of(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"

        data = output.get("data", {})
        texts = (output.get("text"), data.get("text/plain"), data.get("text/markdown"))
        for text in texts:
            assert not re.search(UNWANTED, text or ""), text
        pictures += "image/png" in data
    assert pictures >= 3


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_fit_to_be_read(name):
    """More prose than a third of the text, exercises, where to go on, and no long lines of code."""
    notebook = read(name)
    prose = prose_of(notebook)
    assert "## Exercises" in prose
    assert "## What to read next in the code" in prose

    cells = code_cells(notebook)
    assert len(prose) > sum(len(cell.source) for cell in cells) / 2
    for cell in cells:
        for line in cell.source.splitlines():
            assert len(line) <= 100, line


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_are_there(name):
    """The prose leads a reader to files of the project: `support/runs.py`, `csrc/kernels.h`."""
    named = re.findall(r"`([\w/]+\.(?:py|md|h|cpp|cu))`", prose_of(read(name)))
    assert named
    for path in named:
        folders = ("", "csrc/")  # sources of kernels are named without their folder
        assert any((ROOT / folder / path).is_file() for folder in folders), path
