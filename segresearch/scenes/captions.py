"""Captions of procedural scenes: varied wording over a closed lower-case vocabulary, always true of the image.

A caption mentions every object of its scene, and sometimes sizes, floor and sky. It has at most 44 words and marks.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

SHAPES = ("sphere", "cube", "cone", "ring", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
SIZES = ("small", "medium", "large")
FLOORS = ("grey", "brown", "green", "blue", "purple", "beige", "pink", "teal")
SKIES = ("blue", "purple", "pink", "grey", "teal", "orange", "beige", "dark")
DRAWS = 32
"""Uniform numbers that one caption may use."""

_SYNONYMS = {"sphere": "ball", "cube": "box", "ring": "hoop", "cone": "cone", "star": "star"}
_SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "medium"), "large": ("large", "big")}
_PLURALS = {noun: noun + ("es" if noun == "box" else "s") for noun in (*SHAPES, *_SYNONYMS.values())}
_NUMBERS = ("no", "one", "two", "three", "four")
_RELATIONS = {"left": ("left of", "left of", "to the left of", "on the left of"),
              "right": ("right of", "right of", "to the right of", "on the right of"),
              "behind": ("behind", "behind", "further away than"),
              "front": ("in front of", "in front of", "closer than"),
              "beside": ("next to", "beside")}
_OPENINGS = ("a scene with", "a picture of", "an image of", "a render of", "there is")
_OTHER = ("a above an and are at away behind beside big checkered closer far floor four from front further ground "
          "image in is it large left little medium near next objects of on one picture render right scene shapes sky "
          "small than the there things three tiled to two under with , :").split()
VOCABULARY: tuple[str, ...] = tuple(sorted({*SHAPES, *COLORS, *FLOORS, *SKIES, *_SYNONYMS.values(),
                                            *_PLURALS.values(), *_OTHER}))
"""Every word and punctuation mark that a caption can hold, and a few more that people may write."""


class Thing(NamedTuple):
    """One object as a caption sees it. x: position in the image, -1 left to 1 right; distance from the camera in world
    units; radius: half its width in the units of x."""

    shape: str
    color: str
    size: str
    x: float
    distance: float
    radius: float


class _Name(NamedTuple):
    thing: Thing
    adjective: str
    noun: str


def relations(a: Thing, b: Thing) -> list[str]:
    """Which of left, right, behind, front, beside hold of `a` towards `b`, by a margin that is plain to see."""
    true = []
    dx, dz = b.x - a.x, b.distance - a.distance
    margin = 0.6 * max(a.radius, b.radius) + 0.05
    if abs(dx) > margin:
        true.append("left" if dx > 0 else "right")
    if abs(dz) > 0.8:
        true.append("front" if dz > 0 else "behind")
    elif abs(dz) < 0.5 and margin < abs(dx) < 1.5 * (a.radius + b.radius) + 0.1:
        true.append("beside")
    return true


def _pick(options: Sequence[str], draw: float) -> str:
    return options[int(draw * len(options))]


def _one(named: _Name) -> str:
    text = f"{named.adjective} {named.noun}".strip()
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _list(names: Sequence[_Name]) -> str:
    """An enumeration that counts things of one name."""
    counts: dict[tuple[str, str], list[_Name]] = {}
    for named in names:
        counts.setdefault((named.adjective, named.noun), []).append(named)
    parts = [_one(same[0]) if len(same) == 1 else f"{_NUMBERS[len(same)]} {f'{adjective} {_PLURALS[noun]}'.strip()}"
             for (adjective, noun), same in counts.items()]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _relation(a: _Name, b: _Name, rest: Sequence[_Name], numbers: Iterator[float]) -> str:
    """A relation of `a` to `b`, then the rest; empty if no relation is plain to see."""
    true = relations(a.thing, b.thing)
    if not true:
        return ""
    sideways = [name for name in true if name in ("left", "right")]
    if sideways and next(numbers) < 0.6:
        true = sideways
    relation = _pick(_RELATIONS[_pick(true, next(numbers))], next(numbers))
    text = f"{_one(a)} {'is ' if next(numbers) < 0.12 else ''}{relation} {_one(b)}"
    return text + _pick((", with ", ", and ", " and "), next(numbers)) + _list(rest) if rest else text


def _order(order: Sequence[_Name]) -> str:
    """All from left to right; empty if two neighbours are not plainly apart."""
    by_x = sorted(order, key=lambda named: named.thing.x)
    if not all("left" in relations(a.thing, b.thing) for a, b in pairwise(by_x)):
        return ""
    return "from left to right: " + ", ".join(map(_one, by_x[:-1])) + " and " + _one(by_x[-1])


def caption(things: Sequence[Thing], floor: str, sky: str, draws: Sequence[float]) -> str:
    """One true description of the scene; `draws` (`DRAWS` uniform numbers) alone decides the wording."""
    numbers = iter(draws)
    sized, synonyms, colored = next(numbers) < 0.25, next(numbers) < 0.2, next(numbers) >= 0.04
    order = []
    for thing in things:
        parts = [_pick(_SIZE_WORDS[thing.size], next(numbers))] if sized and thing.size != "medium" else []
        parts += [thing.color] if colored else []
        order.append(_Name(thing, " ".join(parts), _SYNONYMS[thing.shape] if synonyms else thing.shape))
    for i in range(len(order) - 1, 0, -1):
        j = int(next(numbers) * (i + 1))
        order[i], order[j] = order[j], order[i]
    style = next(numbers)
    text = ""
    if len(order) == 1:
        text = (_pick(_OPENINGS, next(numbers)) + " " if style < 0.15 else "") + _one(order[0])
    elif style < 0.6:
        text = _relation(order[0], order[1], order[2:], numbers)
    elif style < 0.7:
        text = _order(order)
    elif style < 0.78:
        text = f"{_NUMBERS[len(order)]} {_pick(('objects', 'shapes', 'things'), next(numbers))}: {_list(order)}"
    elif style < 0.84:
        text = _pick(_OPENINGS[:4], next(numbers)) + " " + _list(order)
    text = text or _list(order)
    ground = (f"a {floor} checkered floor", f"a {floor} floor", f"a {floor} tiled floor", f"{floor} ground")
    below, above = _pick(ground, next(numbers)), f"{'an' if sky[0] in 'aeiou' else 'a'} {sky} sky"
    ending = int(next(numbers) * 20)
    if ending < 4:
        return f"{text} on {below} under {above}"
    if ending < 6:
        return f"{text} on {below}"
    if ending < 8:
        return f"{text} under {above}"
    return f"{text}, the floor is {floor} and the sky is {sky}" if ending == 8 else text
