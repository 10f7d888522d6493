"""HTML pages from one template, page.html.j2: all in one file, the same bytes for the same content. Light: no torch."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


class Image(NamedTuple):
    """An image inside a cell. src: its data URI (`embedded`). width, height: pixels on the page."""

    src: str
    alt: str
    width: int
    height: int


class Cell(NamedTuple):
    """strong: a bold line above `text`. kind: CSS classes ("first" in a row's first cell draws a line above the row).
    rows: how many rows it spans."""

    text: str = ""
    kind: str = ""
    strong: str = ""
    href: str = ""
    rows: int = 1
    style: str = ""
    image: Image | None = None


@dataclass(frozen=True)
class Table:
    """summary: the line under which the table is folded; "" shows it at once."""

    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    kind: str = ""
    summary: str = ""


@dataclass(frozen=True)
class Section:
    """In this order on the page. html: markup written in this package, not escaped. plots: PNG files."""

    title: str = ""
    html: str = ""
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()
    plots: Sequence[Path] = ()


def embedded(png: Path | bytes) -> str:
    """A PNG as a data URI."""
    data = png.read_bytes() if isinstance(png, Path) else png
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["embedded"] = embedded
    return environment.get_template("page.html.j2")


def render(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The page. lead: lines below the title."""
    return _template().render(title=title, lead=lead, sections=sections)
