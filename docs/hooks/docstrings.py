"""Docstrings of this project for mkdocstrings: lines `name: meaning` become a list, and `<name>` stays text."""

import re
from typing import Any

import griffe

ITEM = re.compile(r"( *)([\w*]+(?:, [\w*]+)*): (\S.*)")
STARTS = ("- ", "  ")  # of a list and its further lines


def listed(text: str, names: set[str]) -> str:
    """The docstring with its lines `name: meaning`, of names that are parameters or fields, as a Markdown list. A list
    that follows a paragraph gets the empty line that Markdown wants."""
    lines: list[str] = []
    items: list[int] = []  # where in `lines`
    item = False
    for line in text.splitlines():
        found = ITEM.fullmatch(line)
        named = found and names.issuperset(name.strip("*") for name in found[2].split(", "))
        if lines and lines[-1].strip() and not item and (named or re.match("- ", line) and lines[-1][:2] not in STARTS):
            lines.append("")
        if found and named:
            item = True
            items.append(len(lines))
            lines.append(f"- **`{found[2]}`**: {found[3]}")
        elif item and line.strip():
            lines[-1] = f"{lines[-1]} {line.strip()}"
        else:
            item = False
            lines.append(line)
    within = re.compile(rf"(?<=[.;]) ({'|'.join(map(re.escape, sorted(names))) or '$'}): ")  # further ones in a line
    for place in items:
        lines[place] = within.sub(r"\n- **`\1`**: ", lines[place])
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
