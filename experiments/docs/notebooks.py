"""The notebooks of experiments/notebooks, executed as a user does (jupytext, nbclient), as HTML in docs/notebooks.

    python -m experiments.docs.notebooks          # make notebooks: both, in a minute; needs the extra `notebooks`

A page names what it was made of, so that a test sees one that is older than its notebook or than the weights of `mini`.
"""

import argparse
import hashlib
import re
from html import escape
from pathlib import Path
from typing import Any

from segresearch import runs
from segresearch.analysis import energy_plots
from segresearch.checkpoints.resolve import MINI
from segresearch.pages import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = tuple(sorted((ROOT / "experiments" / "notebooks").glob("*.py")))
# the last line of a cell that shows a figure
FIGURE = re.compile(r"^energy_plots\.(?!example)(\w+)\(.*\)$", re.M)
PAGE = """{% extends "page.html.j2" %}
{% block body %}
<!-- made of {{ made_of }} -->
<p><a href="../index.html">All of the docs</a></p>
<style>
{{ colors | safe }}
@media (prefers-color-scheme: dark) {
{{ dark | safe }}
}
.highlight, .output_area pre { font-size: .85rem; overflow-x: auto; border-radius: 4px; padding: .5rem .8rem }
.highlight { background: var(--soft); color: var(--ink) } .highlight pre { margin: 0 }
.output_prompt, .input_prompt { display: none }
.text_cell a.anchor-link { display: none }
</style>
{{ cells | safe }}
{% endblock %}
"""


def executed(path: Path) -> Any:
    """The notebook of a script in the percent format, with the outputs of its cells. Raises CellExecutionError."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(path)
    for number, cell in enumerate(notebook.cells):  # so that the same outputs are the same page
        cell["id"] = f"cell-{number}"
    place = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=600, resources=place, coalesce_streams=True).execute()
    return notebook


def outputs(notebook: Any) -> list[Any]:
    """Of all cells, in order."""
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def made_of(path: Path) -> str:
    """What the outputs depend on: the notebook and mini's weights. (The code of the package is left out.)"""
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}, mini {runs.fingerprint(MINI)}"


def html(path: Path, notebook: Any) -> str:
    """One file that holds its pictures; the notebook's first heading is the page's."""
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    first = notebook.cells[0]
    head, _, first.source = first.source.partition("\n")
    cells, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    content = {"title": head.removeprefix("# "), "lead": [f"experiments/notebooks/{path.name}, executed"]}
    colors, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("xcode", "monokai"))
    content |= {"cells": with_zoom(cells, path), "colors": colors, "dark": dark, "made_of": made_of(path)}
    return TEMPLATES.from_string(PAGE).render(**content)


def with_zoom(cells: str, path: Path) -> str:
    """The cells with pictures that open, each described by what its function in `energy_plots` draws."""
    names = iter(FIGURE.findall(path.read_text(encoding="utf-8")))

    def picture(match: re.Match[str]) -> str:
        about = (getattr(energy_plots, next(names)).__doc__ or "").split("\n")[0]
        return f'<img class="plot zoom" alt="{escape(about)}" src="{match[1]}">'

    return re.sub(r'<img\b[^>]*?\bsrc="(data:image/png[^"]*)"[^>]*>', picture, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "notebooks")
    to = parser.parse_args().to
    for path in NOTEBOOKS:
        page = to / f"{path.stem}.html"
        runs.write(page, html(path, executed(path)))
        print(f"{page}: {page.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
