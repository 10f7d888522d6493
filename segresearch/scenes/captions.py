"""Captions of procedural scenes: varied wording over a closed lower-case vocabulary, always true of the image.

A caption mentions every object of its scene, and sometimes sizes, floor and sky. It has at most 44 words and marks.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

SHAPES = ("sphere", "cube", "cone", "ring", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
SIZES = ("small", "medium", "large")
FLOORS = ("grey", "brown", "green", "blue", "purple", "beige", "pink", "teal")
SKIES = ("blue", "purple", "pink", "grey", "teal", "orange", "beige", "dark")
DRAWS = 32  # uniform numbers that one caption may use

_SYNONYMS = {"sphere": "ball", "cube": "box", "ring": "hoop", "cone": "cone", "star": "star"}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
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
_Named = tuple["Thing", str]  # an object, and its adjectives and noun


class Thing(NamedTuple):
    """One object as a caption sees it. x: position in the image, -1 left to 1 right; distance from the camera in world
    units; radius: half its width in the units of x."""

    shape: str
    color: str
    size: str
    x: float
    distance: float
    radius: float


def relations(a: Thing, b: Thing) -> list[str]:
    """Which of left, right, behind, front, beside hold of `a` towards `b`, by a margin that is plain to see."""
    dx, dz = b.x - a.x, b.distance - a.distance
    margin = 0.6 * max(a.radius, b.radius) + 0.05
    true = []
    if abs(dx) > margin:
        true.append("left" if dx > 0 else "right")
    if abs(dz) > 0.8:
        true.append("front" if dz > 0 else "behind")
    elif abs(dz) < 0.5 and margin < abs(dx) < 1.5 * (a.radius + b.radius) + 0.1:
        true.append("beside")
    return true


def _pick(options: Sequence[str], draw: float) -> str:
    return options[int(draw * len(options))]


def _one(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("box") else "s")


def _joined(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _list(objects: Sequence[_Named]) -> str:
    """An enumeration that counts things of one name."""
    counts = Counter(name for _, name in objects)
    return _joined([_one(name) if n == 1 else f"{_NUMBERS[n]} {_plural(name)}" for name, n in counts.items()])


def _relation(objects: Sequence[_Named], numbers: Iterator[float]) -> str:
    """A relation of the first object to the second, then the rest; empty if no relation is plain to see."""
    (a, first), (b, second), *rest = objects
    true = relations(a, b)
    if not true:
        return ""
    sideways = [name for name in true if name in ("left", "right")]
    if sideways and next(numbers) < 0.6:
        true = sideways
    relation = _pick(_RELATIONS[_pick(true, next(numbers))], next(numbers))
    text = f"{_one(first)} {'is ' if next(numbers) < 0.12 else ''}{relation} {_one(second)}"
    return text + _pick((", with ", ", and ", " and "), next(numbers)) + _list(rest) if rest else text


def _order(objects: Sequence[_Named]) -> str:
    """All from left to right; empty if two neighbours are not plainly apart."""
    by_x = sorted(objects, key=lambda named: named[0].x)
    apart = all("left" in relations(a, b) for (a, _), (b, _) in pairwise(by_x))
    return "from left to right: " + _joined([_one(name) for _, name in by_x]) if apart else ""


def caption(things: Sequence[Thing], floor: str, sky: str, draws: Sequence[float]) -> str:
    """One true description of the scene; `draws` (`DRAWS` uniform numbers) alone decides the wording."""
    numbers = iter(draws)
    sized, synonyms, colored = next(numbers) < 0.25, next(numbers) < 0.2, next(numbers) >= 0.04
    order = []
    for thing in things:
        size = [_pick(_SIZE_WORDS[thing.size], next(numbers))] if sized and thing.size in _SIZE_WORDS else []
        noun = _SYNONYMS[thing.shape] if synonyms else thing.shape
        order.append((thing, " ".join([*size, thing.color, noun] if colored else [*size, noun])))
    for i in range(len(order) - 1, 0, -1):
        j = int(next(numbers) * (i + 1))
        order[i], order[j] = order[j], order[i]
    style = next(numbers)
    text = ""
    if len(order) == 1:
        text = (_pick(_OPENINGS, next(numbers)) + " " if style < 0.15 else "") + _list(order)
    elif style < 0.6:
        text = _relation(order, numbers)
    elif style < 0.7:
        text = _order(order)
    elif style < 0.78:
        text = f"{_NUMBERS[len(order)]} {_pick(('objects', 'shapes', 'things'), next(numbers))}: {_list(order)}"
    elif style < 0.84:
        text = _pick(_OPENINGS[:4], next(numbers)) + " " + _list(order)
    text = text or _list(order)
    ground = (f"a {floor} checkered floor", f"a {floor} floor", f"a {floor} tiled floor", f"{floor} ground")
    below, above = f"on {_pick(ground, next(numbers))}", f"under {_one(sky)} sky"
    endings = [*4 * [f" {below} {above}"], *2 * [f" {below}"], *2 * [f" {above}"],
               f", the floor is {floor} and the sky is {sky}", *11 * [""]]  # fmt: skip
    return text + _pick(endings, next(numbers))


VOCABULARY: tuple[str, ...] = tuple(sorted({*SHAPES, *COLORS, *FLOORS, *SKIES, *_SYNONYMS.values(), *_OTHER,
                                            *map(_plural, (*SHAPES, *_SYNONYMS.values()))}))
"""Every word and punctuation mark that a caption can hold, and a few more that people may write."""
