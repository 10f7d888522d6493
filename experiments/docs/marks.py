"""Measured numbers in a page stand between marks, so that a command can write them and compare them.

    <!-- name: begin -->                 lines of their own: a table
    <!-- name: end -->
    holds for <!-- =name -->93 %<!-- = --> of the columns        within a line, never at its beginning (Markdown)
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

BLOCK = re.compile(r"<!-- (?P<name>[\w.-]+): begin -->\n(?P<text>.*?)\n?<!-- (?P=name): end -->", re.DOTALL)
VALUE = re.compile(r"<!-- =(?P<name>[\w.-]+) -->(?P<text>(?:(?!<!--).)*)<!-- = -->", re.DOTALL)
NUMBER = re.compile(r"(?:[<>] )?[−-]?\d[\d,]*(?:\.\d+)?(?:e[−-]?\d+)?")
WITHIN = 0.005  # relative; or 1.5 units of a number's last printed digit, whichever is more


class Difference(NamedTuple):
    """A text of a page that the measurement does not give."""

    name: str
    page: str
    measured: str

    def __str__(self) -> str:
        return f"{self.name}: the page has {self.page!r}, measured is {self.measured!r}"


def texts(page: str) -> dict[str, str]:
    """What stands between the marks of a page, by name. ValueError where a name has two different texts."""
    found: dict[str, str] = {}
    for match in (*BLOCK.finditer(page), *VALUE.finditer(page)):
        name, text = match["name"], match["text"]
        if " ".join(found.setdefault(name, text).split()) != " ".join(text.split()):
            raise ValueError(f"two texts of {name}: {found[name]!r} and {text!r}")
    return found


def block(name: str, text: str) -> str:
    """Lines of their own between their marks."""
    return f"<!-- {name}: begin -->\n{text}\n<!-- {name}: end -->"


def written(page: str, measured: Mapping[str, str]) -> str:
    """The page with the measured texts between its marks; marks of other names stay as they are."""
    page = BLOCK.sub(lambda m: block(m["name"], measured[m["name"]]) if m["name"] in measured else m[0], page)
    return VALUE.sub(lambda m: f"<!-- ={m['name']} -->{measured.get(m['name'], m['text'])}<!-- = -->", page)


def differences(page: str, measured: Mapping[str, str], within: float = WITHIN) -> list[Difference]:
    """Where the page and the measurement differ in words, or in a number by more than `within` allows."""
    there = texts(page)
    missing = [Difference(name, "no such mark", text) for name, text in measured.items() if name not in there]
    return missing + [
        Difference(name, a, b)
        for name, text in there.items() if name in measured
        for a, b in _lines(text, measured[name]) if not same(a, b, within)
    ]  # fmt: skip


def _lines(page: str, measured: str) -> list[tuple[str, str]]:
    """Line by line where both have as many (tables), else as one."""
    a, b = page.splitlines(), measured.splitlines()
    return list(zip(a, b)) if len(a) == len(b) else [(page, measured)]


def same(a: str, b: str, within: float = WITHIN) -> bool:
    """Whether two texts have the same words, and numbers that differ by no more than `within` times the first, or 1.5
    units of its last printed digit. "> 99.9" counts as 99.9."""
    a, b = (" ".join(text.split()) for text in (a, b))
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=True)
    return all(abs(value(x) - value(y)) <= max(1.5 * unit(x), within * abs(value(x))) for x, y in pairs)


def value(text: str) -> float:
    return float(re.sub("[<>, ]", "", text).replace("−", "-"))


def unit(text: str) -> float:
    """Of the last printed digit: 0.01 of "3.14"; 1e-7 of "3.8e−06"; 0 of a number without a point, maybe a count."""
    digits, _, exponent = text.replace("−", "-").partition("e")
    fraction = len(digits.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - fraction) if fraction else 0.0
