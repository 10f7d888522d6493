"""What a run writes for its readers: HTML pages from the templates, each all in one file, and CSV. Light: no torch."""

import base64
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined


class Cell(NamedTuple):
    """Of a table. kind: CSS classes ("first" in a row's first cell draws a line above the row). strong: a bold line
    above `text`. rows: how many it spans. mark: a character before the text, in `color`."""

    text: str = ""
    kind: str = ""
    strong: str = ""
    href: str = ""
    rows: int = 1
    style: str = ""
    mark: str = ""
    color: str = ""


def percent(share: float | int) -> str:
    """Never 100 % or 0 % unless it is exactly so."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


def span(numbers: Sequence[float | int], text: Callable[[float], str]) -> str:
    """The lowest and the highest as text, once where both are the same."""
    return " to ".join(dict.fromkeys((text(min(numbers)), text(max(numbers)))))


def counted(number: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def title_of(name: str, command: str, methods: Sequence[str]) -> str:
    """The name of a run, or where that is the command's own, the methods."""
    if name != command:
        return name
    return ", ".join(methods) if len(methods) <= 4 else f"{methods[0]} and {len(methods) - 1} more methods"


def embedded(png: Path | bytes) -> str:
    """A PNG as a data URI."""
    data = png.read_bytes() if isinstance(png, Path) else png
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
TEMPLATES.filters["embedded"] = embedded


def render(title: str, lead: list[str], template: str = "page", **content: Any) -> str:
    """A page, the same bytes for the same content. lead: lines below the title. content: what the template asks for;
    page.html.j2: a table's head, rows."""
    return TEMPLATES.get_template(f"{template}.html.j2").render(title=title, lead=lead, **content)


def to_csv(rows: Sequence[Mapping[str, Any]], digits: int | None = None) -> str:
    """A column a key, in the order in which the keys first occur; None is empty, infinities are "inf".

    digits: significant digits of floats; None writes all. Text that a spreadsheet would take for a formula begins with
    an apostrophe.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: f"{v:.{digits}g}" if digits and isinstance(v, float) else _no_formula(v) for k, v in row.items()}
        )
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) and value not in ("-inf", "-"):
        return f"'{value}"
    return value
