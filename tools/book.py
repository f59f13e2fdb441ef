"""The notebooks as pages, for reading without Jupyter.

    python -m tools.book                    # into build/book; open its index.html
    python -m tools.book --out pages

Pages show the notebooks as they are stored: nothing is run. They need no network, formulas
included, and no script. Needs pip install -e ".[book]".
"""

import html
import re
from pathlib import Path
from typing import NamedTuple

from support.errors import UserError, readable_errors
from support.files import write_text
from support.options import new_parser

try:
    import nbformat
    from latex2mathml.converter import convert as to_mathml
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from pygments.formatters import HtmlFormatter
except ImportError as error:
    raise SystemExit(f'tools.book: error: {error}: pip install -e ".[book]" first') from error

FOLDER = Path(__file__).parent.parent / "notebooks"

STYLE = """
body { margin: 0 auto; max-width: 58rem; padding: 0 1rem 4rem; color: #222;
       font: 1.05rem/1.6 system-ui, sans-serif; overflow-wrap: break-word; }
h1, h2 { line-height: 1.25; }
h2 { margin-top: 2.5rem; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; font-size: 0.85rem; line-height: 1.4; margin: 0; padding: 0.6rem 0.8rem; }
code { font-size: 0.88em; }
pre code { font-size: inherit; }
.highlight { background: #f6f6f3; border-left: 3px solid #0072B2; }
.jp-OutputArea-output pre, .output_area pre { background: white; border-left: 3px solid #ccc; }
.prompt, .jp-InputPrompt, .jp-OutputPrompt, .anchor-link { display: none; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #ddd; padding: 0.3rem 0.7rem; text-align: left;
         vertical-align: top; }
blockquote { margin-left: 0; padding-left: 1rem; border-left: 3px solid #ccc; }
details { margin: 1rem 0; padding: 0.5rem 1rem; background: #eef5fa; border-radius: 0.4rem; }
summary { cursor: pointer; font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; padding: 0.8rem 0; font-size: 0.95rem; }
a { color: #005a8c; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<nav>{links}</nav>
<main>
{body}
</main>
<nav>{links}</nav>
</body>
</html>
"""


class Notebook(NamedTuple):
    """A notebook and its page."""

    content: nbformat.NotebookNode
    title: str
    page: str  # name of its file


class Renderer(IPythonRenderer):
    """Markdown to HTML, with formulas as MathML, which browsers draw by themselves."""

    def block_math(self, body: str) -> str:
        return f'<div class="wide">{to_mathml(body.strip(), display="block")}</div>'

    def inline_math(self, body: str) -> str:
        return to_mathml(body)


class Exporter(HTMLExporter):
    """nbconvert's, with our renderer, and without a page of its own around the notebook."""

    def __init__(self) -> None:
        super().__init__(template_name="basic")

    def default_filters(self) -> object:
        yield from super().default_filters()
        yield "markdown2html", to_html


def to_html(source: str) -> str:
    """A cell of markdown as HTML."""
    text = MarkdownWithMath(renderer=Renderer(escape=False)).render(source)

    # A table that is wider than a phone is moved, not the page.
    text = text.replace("<table>", '<div class="wide"><table>')
    return text.replace("</table>", "</table></div>")


def read_notebooks(folder: Path) -> list[Notebook]:
    """All notebooks of a folder, in the order of their numbers. Raises UserError for none."""
    notebooks = []
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        content = nbformat.read(path, as_version=4)
        heading = re.search(r"^# (.*)$", content.cells[0].source, re.MULTILINE)
        notebooks.append(Notebook(content, heading.group(1), f"{path.stem}.html"))
    if not notebooks:
        raise UserError(f"no notebooks in {folder}")
    return notebooks


def page_of(title: str, body: str, notebooks: list[Notebook]) -> str:
    """A whole page: a way to all the others above and below."""
    links = ['<a href="index.html">Contents</a>']
    for notebook in notebooks:
        number = notebook.title.partition(".")[0]
        hint = html.escape(notebook.title, quote=True)
        links.append(f'<a href="{notebook.page}" title="{hint}">{number}</a>')

    colours = HtmlFormatter().get_style_defs(".highlight")
    return PAGE.format(
        title=html.escape(title), style=colours + STYLE, links="\n".join(links), body=body
    )


def contents(notebooks: list[Notebook]) -> str:
    """The body of the first page."""
    lines = ["<h1>FedGS: the notebooks</h1>"]
    for notebook in notebooks:
        title = html.escape(notebook.title)
        lines.append(f'<p><a href="{notebook.page}">{title}</a></p>')
    return "\n".join(lines)


def write_book(folder: Path, out: Path) -> list[Path]:
    """Make a page of each notebook, and one that leads to them. -> the pages"""
    notebooks = read_notebooks(folder)
    exporter = Exporter()
    pages = {"index.html": page_of("FedGS", contents(notebooks), notebooks)}
    for notebook in notebooks:
        body, _ = exporter.from_notebook_node(notebook.content)

        # Notebooks point at each other.
        body = re.sub(r'(href="[0-9]{2}_\w+)\.ipynb', r"\1.html", body)
        pages[notebook.page] = page_of(notebook.title, body, notebooks)

    for name, text in pages.items():
        write_text(out / name, text)
    return [out / name for name in pages]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = new_parser(__doc__, "python -m tools.book")
    parser.set_defaults(out=Path("build/book"))
    parser.add_argument("--out", type=Path, help="folder; default: build/book")
    with readable_errors("tools.book"):
        pages = write_book(FOLDER, parser.parse_args(arguments).out)
        print(f"{len(pages)} pages; open {pages[0]}")


if __name__ == "__main__":
    main()
