"""The notebooks: each runs from top to bottom, and what is stored in it is fit to be read.

They run at tiny settings, with the solutions of their exercises; FEDGS_NOTEBOOKS=full runs them as
they are stored.
"""

import base64
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
pytest.importorskip("ipywidgets")

FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))

# A path of some machine, a warning, or what a progress bar leaves.
UNWANTED = r"/(home|root|tmp|usr|work|Users|opt)/|Warning|it/s\]|\r"

WIDGET = "application/vnd.jupyter.widget-view+json"


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


def folded(text: str, summary: str) -> list[str]:
    """What is folded away under a summary, each time that it is."""
    pattern = rf"<details><summary>{summary}</summary>\n\n(.*?)\n\n</details>"
    return re.findall(pattern, text, re.DOTALL)


def code_of(solution: str) -> list[str]:
    """The Python code in a text of markdown, block by block."""
    return re.findall(r"^```python\n(.*?)^```", solution, re.DOTALL | re.MULTILINE)


def with_solutions(notebook):
    """The notebook with the code of each solution as cells behind the text that it stands in."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            for solution in folded(cell.source, "Solution"):
                cells.extend(map(nbformat.v4.new_code_cell, code_of(solution)))
    notebook.cells = cells
    return notebook


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
    """Run a notebook and its solutions from top to bottom. -> the notebook with its outputs

    folder: for the kernel's sockets. Raises where a cell does.
    """
    # Sockets in files, where there are such: kernels that start at the same time may otherwise
    # choose the same port.
    how = {}
    if os.name == "posix":
        how = {"transport": "ipc", "ip": str(folder / "socket")}
    kernel = manager.KernelManager(kernel_name="python3", **how)

    notebook = with_solutions(read(name))
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
    assert [name[:2] for name in NAMES] == ["00", "01", "02", "03", "04", "05", "06", "07"]


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
        if "image/png" in data:
            pictures += 1
            check_picture(output)
    assert pictures >= 3


def check_picture(output) -> None:
    """A picture has a text for who cannot see it, and its letters are as large as in the code."""
    assert len(output.metadata.get("image/png", {}).get("alt", "")) > 20
    assert WIDGET not in output.data, "store the notebook with FEDGS_STATIC=1"
    start = base64.b64decode(output.data["image/png"])[:24]
    assert int.from_bytes(start[16:20]) <= 1000  # pixels: GitHub would shrink what is wider


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


# --------------------------------------------------------------------- questions and exercises


@pytest.mark.parametrize("name", NAMES)
def test_two_predictions(name):
    """A reader predicts twice, before the cell that answers; the answer is folded away."""
    cells = read(name).cells
    asked = [i for i, cell in enumerate(cells) if "**Predict first.**" in cell.source]
    assert len(asked) == 2
    for i in asked:
        assert cells[i].source.count("**Predict first.**") == 1
        assert len(folded(cells[i].source, "Answer")) == 1
        assert cells[i + 1].cell_type == "code"


@pytest.mark.parametrize("name", NAMES)
def test_two_exercises(name):
    """Each has a solution with code, which `test_notebook_runs` runs, and that shows something."""
    prose = prose_of(read(name))
    _, exercises = prose.split("## Exercises")
    solutions = folded(exercises, "Solution")
    assert len(solutions) == 2 == prose.count("Solution</summary>")
    for solution in solutions:
        assert re.search(r"\b(assert|print|show)\b", code_of(solution)[-1])


# ----------------------------------------------------------------------------- numbers in the text

# As a reader sees a number: 1,156 or 0.25 or -3e-05, with its sign where it has one.
NUMBER = r"(?<![\w.,])[-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


class Number:
    """A number of a text, and how exactly it is said."""

    def __init__(self, text: str, percent: bool) -> None:
        text = text.replace("−", "-").replace(",", "")
        mantissa, _, exponent = text.partition("e")
        _, _, digits = mantissa.partition(".")
        unit = 0.01 if percent else 1.0
        self.signed = text[0] in "+-"
        self.value = float(text) * unit
        self.error = 0.5 * 10.0 ** (int(exponent or 0) - len(digits)) * unit

    def is_among(self, printed: list["Number"]) -> bool:
        """Is one of them this number, rounded to its digits? A sign counts where it is said."""
        for other in printed:
            value = other.value if self.signed else abs(other.value)
            if abs(value - self.value) <= self.error * 1.0001:
                return True
        return False


def printed_numbers(text: str) -> list[Number]:
    numbers = []
    for match in re.finditer(NUMBER, text):
        percent = re.match(r" ?%", text[match.end() :])
        numbers.append(Number(match.group(), bool(percent)))
    return numbers


def measured_numbers(prose: str) -> list[str]:
    """Numbers that have to come from somewhere: with a decimal point, or followed by % or ×.

    Formulas, code and addresses are none of prose.
    """
    prose = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$]+\$|`[^`]*`", " ", prose, flags=re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)|https?://\S+", " ", prose)
    found = []
    for match in re.finditer(NUMBER, prose):
        number = match.group().rstrip(",")
        after = re.match(r" ?%| ?×(?! ?\d)", prose[match.end() :])
        if "." in number or after:
            found.append(number + (after.group().strip() if after else ""))
    return found


def without_source(prose: str, outputs: str, constants: dict) -> list[str]:
    """The measured numbers of a text that its outputs do not have, and that are no constants."""
    printed = printed_numbers(outputs)
    missing = []
    for text in measured_numbers(prose):
        number = Number(text.rstrip("%×"), text.endswith("%"))
        if text not in constants and not number.is_among(printed):
            missing.append(text)
    return missing


def printed_by(cell) -> str:
    """What a cell printed. The text that stands for a picture is not measured."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" not in data:
            texts.append(output.get("text") or data.get("text/plain", ""))
    return "\n".join(texts)


def sections_of(notebook) -> list[list[tuple[str, str]]]:
    """The notebook's sections, each its pieces in order: ("prose" or "printed", text)."""
    sections = [[]]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            sections[-1].append(("printed", printed_by(cell)))
            continue
        for piece in re.split(r"^(?=## )", cell.source, flags=re.MULTILINE):
            if piece.startswith("## "):
                sections.append([])
            sections[-1].append(("prose", piece))
    return sections


@pytest.mark.parametrize("name", NAMES)
def test_numbers_in_the_text_are_printed_above_it(name):
    """A measured number is printed above it in its section; a folded one anywhere in it."""
    notebook = read(name)
    constants = notebook.metadata.get("constants", {})
    for section in sections_of(notebook):
        of_section = "\n".join(text for kind, text in section if kind == "printed")
        above = ""
        for kind, text in section:
            if kind == "printed":
                above += "\n" + text
                continue

            # A solution's numbers stand in what it printed, which is part of it.
            for hidden in re.findall(r"<details>.*?</details>", text, re.DOTALL):
                own = "\n".join(re.findall(r"```text\n(.*?)```", hidden, re.DOTALL))
                assert not without_source(hidden, of_section + own, constants), text
            open_text = re.sub(r"<details>.*?</details>", " ", text, flags=re.DOTALL)
            assert not without_source(open_text, above, constants), text


def test_a_wrong_number_is_noticed():
    outputs = "mean η 1.083, difference -0.009, missed 40.2%, 28500 steps"
    fine = "η is 1.08, −0.01 or 0.009 less; 40 % are missed ($0.7$, `0.8`, 64×64, [x](y1.5.html))."
    assert without_source(fine, outputs, {}) == []
    wrong = "η is 1.09, +0.009, 41 %, 3× as much, 0.1"
    assert without_source(wrong, outputs, {"0.1": "a"}) == ["1.09", "+0.009", "41%", "3×"]


# ------------------------------------------------------------------------------------- drawings


def test_a_slider_draws_anew(monkeypatch):
    """The picture that is stored is that of the middle; a slider that is moved changes it."""
    monkeypatch.syspath_prepend(ROOT)
    drawings = pytest.importorskip("notebooks.drawings")
    drawn = []

    def draw(tau, base):
        drawn.append((tau, base))
        return drawings.new_figure(f"{tau}, {base}", height=1)

    shown = []
    monkeypatch.setattr(drawings, "display", lambda *forms, **_: shown.extend(forms))
    drawings.show_with_sliders(draw, "a picture of numbers", tau=(50, 150, 500), base=(10, 100))
    assert drawn == [(150, 100)]
    assert base64.b64decode(shown[0]["image/png"]).startswith(b"\x89PNG")
    assert WIDGET in shown[0]

    choices = {"tau": (50, 150, 500), "base": (10, 100)}
    box = drawings.make_sliders(draw, b"", choices, {"tau": 150, "base": 100})
    tau, base, picture = box.children
    tau.value = 500
    base.value = 10
    assert drawn[1:] == [(500, 100), (500, 10)]
    assert bytes(picture.value).startswith(b"\x89PNG")

    monkeypatch.setenv("FEDGS_STATIC", "1")
    drawings.show_with_sliders(draw, "a picture of numbers", tau=(50, 150, 500), base=(10, 100))
    assert WIDGET not in shown[-1]
