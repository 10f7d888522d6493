"""How every plot looks: a title, axes with units, and a caption in the image. pyplot's global state is not touched.

A figure is as wide as a column of a page, and its text is 12 CSS pixels high where it fills a telephone's 390; a page
shows it without title and caption, which it has as text.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from segresearch.image_grid import INK, QUIET, RULE
from segresearch.records import KEY, encoded
from segresearch.runs import replacing

WIDTH = 4.4  # inches
DPI = 180
TEXT, SMALL = 10.5, 10.0  # points: of names of axes and panels; of ticks, legends and names in a plot, the smallest
PIXELS = 105  # of a page, an inch
CHARACTERS = 13.2  # of a caption's line, an inch
TITLE = 8.6  # characters of a title's line, an inch
Number = float | int
Point = tuple[Number, Number]


class Drawing(Figure):
    """A figure that a notebook shows as a picture, although pyplot, which would ask for that, is not loaded."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=130)
        return data.getvalue()


class Shown(NamedTuple):
    """A figure on a page: PNG bytes of its axes alone, and its texts. width: in pixels of the page."""

    name: str
    title: str
    caption: str
    png: bytes
    width: int


def canvas(height: float, title: str, caption: str, width: float = WIDTH) -> Figure:
    """An empty figure (inches) with its title above and its caption below, and room for axes between."""
    lines = textwrap.wrap(caption, int((width - 0.4) * CHARACTERS), break_on_hyphens=False)
    heads = textwrap.wrap(title, int((width - 0.4) * TITLE), break_on_hyphens=False)
    top, foot = 0.2 + 0.22 * len(heads), 0.2 + 0.195 * len(lines)
    total = top + height + foot
    figure = Drawing(figsize=(width, total), dpi=DPI, layout="constrained", facecolor="white")
    at = 0.2 / width
    figure.text(at, 1 - 0.12 / total, "\n".join(heads), ha="left", va="top", fontsize=12, weight="bold", color=INK)
    figure.text(at, 0.1 / total, "\n".join(lines), ha="left", va="bottom", fontsize=SMALL, color=QUIET)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, foot / total, 1, height / total))
    return figure


def shown(name: str, figure: Figure, where: str = "") -> Shown:
    """`figure`, made by `canvas`, as a page shows it. The figure stays as it is. where: the start of its caption that
    the page says already."""
    title, caption = figure.texts[:2]
    width, total = map(float, figure.get_size_inches())
    engine: Any = figure.get_layout_engine()
    rect = engine.get()["rect"]
    png = io.BytesIO()
    try:
        title.set_visible(False)
        caption.set_visible(False)
        figure.set_size_inches(width, total * rect[3])
        engine.set(rect=(0, 0, 1, 1))
        figure.savefig(png, format="png", metadata={"Software": "segresearch"}, pil_kwargs={"optimize": True})
    finally:
        title.set_visible(True)
        caption.set_visible(True)
        figure.set_size_inches(width, total)
        engine.set(rect=rect)
    head, text = (text.get_text().replace("\n", " ") for text in (title, caption))
    if where and text.startswith(f"{where}. "):
        text = text.removeprefix(f"{where}. ")
    return Shown(name, head, text, png.getvalue(), round(width * PIXELS))


def label(axis: Any, title: str = "", x: str = "", y: str = "", grid: str = "") -> None:
    """Title and axis names in the plots' sizes and colours, no upper and right border. grid: "x", "y" or "both"."""
    axis.set_title(title, fontsize=TEXT, color=INK, loc="left")
    axis.set_xlabel(x, fontsize=TEXT)
    axis.set_ylabel(y, fontsize=TEXT)
    axis.tick_params(labelsize=SMALL, colors=QUIET)
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(axis=grid, color=RULE, linewidth=0.6)
        axis.set_axisbelow(True)


def rows(axis: Any, names: Sequence[str], bold: Sequence[str] = ()) -> None:
    """A row a name, the first on top, with a thin line to each; as many rows as names, so that none is left out."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="y", color=RULE, linewidth=0.4)
    axis.tick_params(axis="y", length=0)
    for text in axis.get_yticklabels():
        text.set_color(INK)
        text.set_weight("bold" if text.get_text() in bold else "normal")


def thin_ticks(figure: Figure) -> None:
    """Fewer ticks on the x axes whose labels would touch."""

    def touches(axis: Any) -> bool:
        spans = sorted((e.x0, e.x1) for t in axis.get_xticklabels() if (e := t.get_window_extent()).width > 1)
        return any(left < right + 5 for (_, right), (left, _) in pairwise(spans))

    for most in (3, 2, 1):
        figure.draw_without_rendering()
        crowded = [axis for axis in figure.axes if touches(axis)]
        if not crowded:
            return
        for axis in crowded:
            axis.xaxis.set_major_locator(MaxNLocator(most, min_n_ticks=1))


def dot(
    axis: Any, at: Point, error: Number, style: Mapping[str, Any], size: float = 6.5, ends: Point | None = None
) -> None:
    """A mark at (x, y) with one error to both sides of x (dark) and two (light). ends: of the axis; a mark beyond them
    is an arrow at the edge with its value."""
    (x, y), color = at, style["color"]
    if ends is not None and not ends[0] <= x <= ends[1]:
        beyond(axis, x, y, ends, color, True)
        return
    if error > 0 and math.isfinite(error):
        axis.plot([x - 2 * error, x + 2 * error], [y, y], color=color, alpha=0.35, linewidth=1.2, zorder=2.5)
        axis.plot([x - error, x + error], [y, y], color=color, linewidth=2.2, zorder=2.6)
    axis.plot([x], [y], style["marker"], color=color, markersize=size, markeredgecolor="white", markeredgewidth=0.5,
              zorder=3)  # fmt: skip


def beyond(axis: Any, x: Number, y: Number, ends: Point, color: str, named: bool) -> None:
    """An arrow at the edge for a mark that lies beyond the ends of the axis. named: with its value."""
    right = x > ends[1]
    edge = ends[1] if right else ends[0]
    axis.plot(edge, y, ">" if right else "<", markersize=4, color=color, clip_on=False, zorder=3,
              markerfacecolor=color if named else "white")  # fmt: skip
    if named:
        value = f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"
        text = axis.annotate(value.replace("-", "−"), (edge, y), (-7 if right else 7, 0), fontsize=SMALL,
                             textcoords="offset points", ha="right" if right else "left", va="center")  # fmt: skip
        text.set_in_layout(False)


def window(values: Sequence[Number], keep: Sequence[Number] = (), fences: float = 3.0) -> tuple[float, float]:
    """The range of an axis that shows `values` but for those far out (Tukey's fences, in ranges of the middle half),
    and `keep` in any case."""
    ordered = sorted(v for v in values if math.isfinite(v))
    if not ordered:
        return (-1.0, 1.0)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.25, 0.75))
    reach = fences * (high - low) if high > low else math.inf
    inside = [v for v in ordered if low - reach <= v <= high + reach] + [v for v in keep if math.isfinite(v)]
    space = 0.06 * (max(inside) - min(inside)) or 0.5
    return float(min(inside) - space), float(max(inside) + space)


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
