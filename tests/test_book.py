"""tools.book: the notebooks as pages that need nothing from a network."""

import base64
import re

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbconvert")
pytest.importorskip("latex2mathml")

from tools import book  # noqa: E402 - it needs what may be missing

FORMULA = r"A formula $\theta_k \leftarrow \theta_k - s$ and $$ w_k = \frac{T_k}{\sum_j T_j} $$"
FOLDED = "<details><summary>Answer</summary>\n\nIt is **half**.\n\n</details>"
PIXEL = base64.b64encode(b"not looked at here").decode()


@pytest.fixture
def pages(tmp_path):
    """{name: text} of a book of two small notebooks."""
    markdown = nbformat.v4.new_markdown_cell
    table = "| a | b |\n|---|---|\n| 1 | 2 |"
    link = "On to [the second](01_second.ipynb)."
    cells = [markdown(text) for text in ("# 0. First & best", FORMULA, FOLDED, table, link)]
    picture = nbformat.v4.new_output(
        "display_data",
        data={"image/png": PIXEL, "text/plain": "a pixel"},
        metadata={"image/png": {"alt": "One pixel."}},
    )
    cells.append(nbformat.v4.new_code_cell("print('seen')", outputs=[picture]))

    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "00_first.ipynb")
    second = nbformat.v4.new_notebook(cells=[markdown("# 1. Second")])
    nbformat.write(second, folder / "01_second.ipynb")
    written = book.write_book(folder, tmp_path / "book")
    return {path.name: path.read_text(encoding="utf-8") for path in written}


def check_offline(page: str) -> None:
    """A page asks no network for anything, and leaves no formula to a script."""
    assert "<script" not in page
    assert "<link" not in page
    assert not re.search(r"(src|@import|url)\W{0,3}https?:", page)
    assert "$" not in re.sub(r"<pre.*?</pre>|<code.*?</code>", "", page, flags=re.DOTALL)


def test_a_page_needs_no_network(pages):
    assert set(pages) == {"index.html", "00_first.html", "01_second.html"}
    for page in pages.values():
        check_offline(page)
    assert pages["00_first.html"].count("<math") == 2
    assert "<mfrac>" in pages["00_first.html"]


def test_what_a_page_shows(pages):
    page = pages["00_first.html"]
    assert "<title>0. First &amp; best</title>" in page
    assert '<a href="01_second.html">the second</a>' in page
    assert re.search(r"<details><summary>Answer</summary>\s*<p>It is <strong>half", page)
    assert '<div class="wide"><table>' in page
    assert 'alt="One pixel."' in page
    assert "seen" in page


def test_every_page_leads_to_the_others(pages):
    for page in pages.values():
        for name in pages:
            assert f'href="{name}"' in page


def test_a_folder_without_notebooks_is_refused(tmp_path):
    with pytest.raises(book.UserError, match="no notebooks in"):
        book.write_book(tmp_path, tmp_path / "book")


def test_the_text_of_the_notebooks_themselves():
    notebooks = book.read_notebooks(ROOT / "notebooks")
    for notebook in notebooks:
        for cell in notebook.content.cells:
            if cell.cell_type == "markdown":
                check_offline(book.to_html(cell.source))
