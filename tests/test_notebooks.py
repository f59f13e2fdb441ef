"""The notebooks: each runs from top to bottom, and what is stored in it is fit to be read.

They run at tiny settings; FEDGS_NOTEBOOKS=full runs them as they are stored.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
manager = pytest.importorskip("jupyter_client.manager")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """{name: the notebook's future}: two run at a time, each with one thread, which tiny networks are quickest with."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        if os.environ.get("FEDGS_NOTEBOOKS") != "full":
            patch.setenv("FEDGS_TINY", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield {name: pool.submit(execute, name, tmp_path_factory.mktemp("kernel")) for name in NOTEBOOKS}
        pool.shutdown(cancel_futures=True)


def execute(name, folder):
    """Run a notebook from top to bottom. -> the notebook with its outputs; raises where a cell does"""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    # by files where there are such sockets: kernels that start at the same time may choose the same port
    how = {"transport": "ipc", "ip": str(folder / "socket")} if os.name == "posix" else {}
    kernel = manager.KernelManager(kernel_name="python3", **how)
    try:
        nbclient.NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()
    finally:
        kernel.shutdown_kernel(now=True)
    return notebook


def test_all_are_here():
    assert [name[:2] for name in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, executed):
    outputs = [output for cell in executed[name].result().cells for output in cell.get("outputs", [])]
    assert outputs and not [output for output in outputs if output.get("name") == "stderr"]


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
