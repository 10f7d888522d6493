"""How every plot looks: a title, axes with units, and a caption in the image. pyplot's global state is not touched.

A figure is as wide as a column of a page, and its text is 12 CSS pixels high where it fills a telephone's 390; a page
shows it without title and caption, which it has as text.
"""

import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.path import Path as Path2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import AutoLocator

from segresearch.image_grid import INK, QUIET, RULE, text_width, wrap
from segresearch.records import KEY, encoded
from segresearch.runs import replacing

WIDTH = 4.4  # inches
DPI = 180
TEXT, SMALL = 10.5, 10.0  # points: of names of axes and panels; of ticks, legends and names in a plot, the smallest
PIXELS = 105  # of a page, an inch
CHARACTERS = 13.2  # of a caption's line, an inch
TITLE = 8.6  # characters of a title's line, an inch
QUOTED = 16  # characters of a name in the name of an axis
EVEN, ANY = (1, 2, 2.5, 5, 10), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)  # steps between ticks
APART = 6  # points between the numbers of an axis
LINES = 3  # that a name in a figure may have; the table beside it has the whole
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
    plain: dict[str, Any] = {"ha": "left", "parse_math": False}
    figure.text(at, 1 - 0.12 / total, "\n".join(heads), va="top", fontsize=12, weight="bold", color=INK, **plain)
    figure.text(at, 0.1 / total, "\n".join(lines), va="bottom", fontsize=SMALL, color=QUIET, **plain)
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


def brief(names: Sequence[str], width: Number, lines: int = LINES) -> list[str]:
    """Names as figures write them: wrapped to `width` inches, shortened after `lines`. Two that would then read the
    same begin where they differ."""

    def short(text: str) -> str:
        return "\n".join(wrap(text, round(SMALL), int(72 * width), lines)).replace("$", r"\$")

    texts = [short(name) for name in names]
    distinct = [*texts]
    for i, name in enumerate(names):
        alike = [other for other, text in zip(names, texts) if text == texts[i] and other != name]
        if alike:
            same = max(len(os.path.commonprefix([name, other])) for other in alike)
            distinct[i] = short(f"…{name[max(0, same - 6) :]}")
    return distinct


def quoted(name: str) -> str:
    """A method as the name of an axis says it, where there is no room for a long one."""
    return f"“{name}”" if len(name) <= QUOTED else "the baseline"


class Ticks(AutoLocator):
    """Ticks of an x axis whose numbers do not touch, however long they are."""

    def __call__(self) -> Any:
        axis: Any = self.axis
        low, high = sorted(axis.get_view_interval())
        room = axis.axes.bbox.width / axis.axes.figure.dpi * 72 / (high - low or 1)  # points a unit
        even = [(most, EVEN) for most in range(max(2, min(9, int(room * (high - low) / 30))), 1, -1)]
        for most, steps in [*even, (2, ANY), (1, ANY)]:
            self.set_params(nbins=most, steps=steps, min_n_ticks=1)
            ticks = [tick for tick in self.tick_values(low, high) if low <= tick <= high]
            widths = [text_width(text, round(SMALL)) for text in axis.get_major_formatter().format_ticks(ticks)]
            apart = (room * (b - a) > (v + w) / 2 + APART for a, b, v, w in zip(ticks, ticks[1:], widths, widths[1:]))
            if len(ticks) > 1 and all(apart):
                break
        return ticks


def label(axis: Any, title: str = "", x: str = "", y: str = "", grid: str = "") -> None:
    """Title and axis names in the plots' sizes and colours, no upper and right border. grid: "x", "y" or "both"."""
    axis.set_title(title, fontsize=TEXT, color=INK, loc="left")
    axis.set_xlabel(x, fontsize=TEXT)
    axis.set_ylabel(y, fontsize=TEXT)
    axis.tick_params(labelsize=SMALL, colors=QUIET)
    if isinstance(axis.xaxis.get_major_locator(), AutoLocator):
        axis.xaxis.set_major_locator(Ticks())
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(axis=grid, color=RULE, linewidth=0.6)
        axis.set_axisbelow(True)


def row_height(texts: Sequence[str]) -> Number:
    """Inches of a row of `rows`."""
    return 0.24 + 0.16 * max(text.count("\n") for text in texts)


def rows(axis: Any, names: Sequence[str], bold: Sequence[str] = ()) -> None:
    """A row a name, the first on top, with a thin line to each; as many rows as names, so that none is left out."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="y", color=RULE, linewidth=0.4)
    axis.tick_params(axis="y", length=0)
    for text in axis.get_yticklabels():
        text.set_color(INK)
        text.set_weight("bold" if text.get_text() in bold else "normal")


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


def letter(text: str) -> Path2D:
    """A letter as a mark."""
    path = TextPath((0, 0), text, size=1)
    box = path.get_extents()
    return Path2D(path.vertices - [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2], path.codes)


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
