"""How every plot looks: a title, axes with units, and a caption in the image. pyplot's global state is not touched."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from segresearch.image_grid import INK, QUIET, RULE
from segresearch.records import KEY, encoded
from segresearch.runs import replacing

CHARACTERS = 15.5  # of a caption's line, an inch


class Drawing(Figure):
    """A figure that a notebook shows as a picture, although pyplot, which would ask for that, is not loaded."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=100)
        return data.getvalue()


def canvas(width: float, height: float, title: str, caption: str) -> Figure:
    """An empty figure (inches) with its title above and its caption below, and room for axes between."""
    lines = textwrap.wrap(caption, int((width - 0.4) * CHARACTERS))
    foot = 0.2 + 0.165 * len(lines)
    total = 0.42 + height + foot
    figure = Drawing(figsize=(width, total), dpi=130, layout="constrained", facecolor="white")
    figure.text(0.2 / width, 1 - 0.14 / total, title, ha="left", va="top", fontsize=12, weight="bold", color=INK)
    figure.text(0.2 / width, 0.1 / total, "\n".join(lines), ha="left", va="bottom", fontsize=8.5, color=QUIET)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, foot / total, 1, height / total))
    return figure


def label(axis: Any, title: str = "", x: str = "", y: str = "", grid: str = "") -> None:
    """Title and axis names in the plots' sizes and colours, no upper and right border. grid: "x", "y" or "both"."""
    axis.set_title(title, fontsize=9.5, color=INK, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8, colors=QUIET)
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(axis=grid, color=RULE, linewidth=0.6)


def save(
    figure: Figure, path: Path, settings: Mapping[str, Any] | None = None, vector: Sequence[str] = ()
) -> None:
    """Write `figure` to `path` as PNG, atomically, with `settings` in its text chunk as images have theirs. vector: of
    "pdf" and "svg", which formats are written beside it; the same figure gives the same bytes."""
    record = {} if settings is None else {KEY: encoded(settings)}
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": "segresearch", **record})
    for kind in vector:
        import matplotlib

        undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
        with replacing(path.with_suffix(f".{kind}")) as temporary, matplotlib.rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(temporary, format=kind, metadata=undated)


def name_sigma(sigma: float) -> str:
    """A blur sigma as it is written: "1", "0.5", "∞"."""
    return "∞" if math.isinf(sigma) else f"{sigma:g}"
