"""Docstrings of this project for mkdocstrings: lines `name: meaning` become a list, and `<name>` stays text."""

import re
from typing import Any

import griffe

ITEM = re.compile(r"( *)([\w*]+(?:, [\w*]+)*): (\S.*)")


def listed(text: str, names: set[str]) -> str:
    """The docstring with its lines `name: meaning`, of names that are parameters or fields, as a Markdown list."""
    lines: list[str] = []
    item: str | None = None
    for line in text.splitlines():
        found = ITEM.fullmatch(line)
        if found and names.issuperset(name.strip("*") for name in found[2].split(", ")):
            if item is None and lines and lines[-1]:
                lines.append("")
            lines.append(item := f"- **`{found[2]}`**: {found[3]}")
        elif item is not None and line.strip():
            lines[-1] = item = f"{item} {line.strip()}"
        else:
            item = None
            lines.append(line)
    return "\n".join(lines)


def plain(text: str) -> str:
    """Angle brackets and square ones as text, outside of code."""

    def escaped(part: str) -> str:
        return re.sub(r"\](?=\[|\((?!http))", r"\]", part.replace("<", "&lt;"))

    parts = re.split(r"(`[^`]*`|^    .*$)", text, flags=re.M)
    return "".join(part if i % 2 else escaped(part) for i, part in enumerate(parts))


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None or isinstance(obj, griffe.Alias):
            return
        names = {p.name for p in obj.parameters} if isinstance(obj, (griffe.Function, griffe.Class)) else set()
        if isinstance(obj, griffe.Class):
            names |= set(obj.attributes)
        text = plain(obj.docstring.value)
        obj.docstring.value = text if "Args:" in text else listed(text, names)
