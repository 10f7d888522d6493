"""HTML pages from the templates: all in one file, the same bytes for the same content. Light: no torch."""

import base64
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined


class Cell(NamedTuple):
    """Of a table. kind: CSS classes ("first" in a row's first cell draws a line above the row). strong: a bold line
    above `text`. rows: how many it spans. image: a PNG, shown at width × height pixels; `text` describes it."""

    text: str = ""
    kind: str = ""
    strong: str = ""
    href: str = ""
    rows: int = 1
    style: str = ""
    image: bytes | None = None
    width: int = 0
    height: int = 0


def embedded(png: Path | bytes) -> str:
    """A PNG as a data URI."""
    data = png.read_bytes() if isinstance(png, Path) else png
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["embedded"] = embedded
    return environment


def render(title: str, lead: list[str], template: str = "page", **content: Any) -> str:
    """A page. lead: lines below the title. content: what the template asks for; page.html.j2: a table's head, rows."""
    return _environment().get_template(f"{template}.html.j2").render(title=title, lead=lead, **content)
