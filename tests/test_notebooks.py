"""The notebooks show their figures: one cell alone, whole ones as a user executes them, and the pages of docs."""

import re

import pytest
import torch

from experiments.docs.notebooks import NOTEBOOKS, ROOT, executed, html, made_of, outputs
from segresearch.analysis import energy_plots
from segresearch.analysis.recorder import Entry

FIGURE = re.compile(r"^energy_plots\.\w+\(.*\)$", re.M)  # the last line of a cell that shows a figure
PICTURE = "data:image/png;base64,"


def figures(path) -> list[str]:
    """The calls whose pictures a notebook shows."""
    return [call for call in FIGURE.findall(path.read_text(encoding="utf-8")) if "example" not in call]


def test_a_figure_cell_gives_a_picture():
    formatters = pytest.importorskip("IPython.core.formatters")
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 12, 8, generator=generator)
    entry = Entry("mid.0", (3, 4), ("cond",), 0, (1.0,), ({"seed": 0},), (0, 1), lambda: {"q": q, "k": k})
    (cell,) = [call for path in NOTEBOOKS for call in figures(path) if ".limits(" in call]
    shown, _ = formatters.DisplayFormatter().format(eval(cell, {"energy_plots": energy_plots, "entry": entry}))
    assert shown["image/png"].startswith(b"\x89PNG") and len(shown["image/png"]) > 10_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_in_docs_is_of_this_notebook_and_these_weights(path):
    """`make notebooks` makes it again."""
    page = (ROOT / "docs" / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
    assert made_of(path) in page
    assert page.count(PICTURE) == len(figures(path)) > 0
    assert len(page) < 1e6 and "sigma_t" in page and "nan" not in page.split(PICTURE)[0]
    assert "Warning:" not in page and "IProgress" not in page
    assert page.count('class="plot zoom" alt="') == len(figures(path)) and "No description" not in page


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_its_figures_and_no_warning(path):
    for module in ("jupytext", "nbclient", "ipykernel", "ipywidgets"):
        pytest.importorskip(module)
    notebook = executed(path)
    found = outputs(notebook)
    assert not [output for output in found if output.output_type == "error"]
    errors = "".join(output.text for output in found if output.get("name") == "stderr")  # lines of progress alone
    assert "Warn" not in errors and "IProgress" not in errors and "Traceback" not in errors
    assert sum("image/png" in output.get("data", {}) for output in found) == len(figures(path)) > 0
    printed = "".join(output.text for output in found if output.output_type == "stream")
    assert "sigma_t" in printed and "nan" not in printed
    assert html(path, notebook).count(PICTURE) == len(figures(path))
