"""Captions of procedural scenes: varied wording over a closed lower-case vocabulary, always true of the picture.

A caption mentions every object of its scene, and sometimes sizes, floor and sky. It has at most 44 `words`.
"""

import re
from collections.abc import Sequence
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
_PLURALS = {"sphere": "spheres", "cube": "cubes", "cone": "cones", "ring": "rings", "star": "stars", "ball": "balls",
            "box": "boxes", "hoop": "hoops"}
_NUMBERS = ("no", "one", "two", "three", "four")
_LEFT = ("left of", "left of", "to the left of", "on the left of")
_RIGHT = ("right of", "right of", "to the right of", "on the right of")
_BEHIND = ("behind", "behind", "further away than")
_FRONT = ("in front of", "in front of", "closer than")
_OPENINGS = ("a scene with", "a picture of", "an image of", "a render of", "there is")
_OTHER = ("a above an and are at away behind beside big checkered closer far floor four from front further ground "
          "image in is it large left little medium near next objects of on one picture render right scene shapes sky small "
          "than the there things three tiled to two under with , :").split()
VOCABULARY: tuple[str, ...] = tuple(sorted({*SHAPES, *COLORS, *FLOORS, *SKIES, *_SYNONYMS.values(),
                                            *_PLURALS.values(), *_OTHER}))
"""Every word and punctuation mark that a caption can hold, and a few more that people may write."""


class Thing(NamedTuple):
    """What a caption needs to know of an object. x: picture position, -1 left to 1 right; distance from the camera in
    world units; radius: half its width in the units of x."""

    shape: str
    color: str
    size: str
    x: float
    distance: float
    radius: float


def words(caption: str) -> list[str]:
    """The caption's words and punctuation marks in order."""
    return re.findall(r"[a-z]+|[^\sa-z]", caption)


def relations(a: Thing, b: Thing) -> list[str]:
    """Which of left, right, behind, front, beside hold of `a` towards `b`, by a margin that makes them plain to see."""
    found = []
    dx, dz = b.x - a.x, b.distance - a.distance
    margin = 0.6 * max(a.radius, b.radius) + 0.05
    if abs(dx) > margin:
        found.append("left" if dx > 0 else "right")
    if abs(dz) > 0.8:
        found.append("front" if dz > 0 else "behind")
    elif abs(dz) < 0.5 and margin < abs(dx) < 1.5 * (a.radius + b.radius) + 0.1:
        found.append("beside")
    return found


_WORDING = {"left": _LEFT, "right": _RIGHT, "behind": _BEHIND, "front": _FRONT, "beside": ("next to", "beside")}


def caption(things: Sequence[Thing], floor: str, sky: str, draws: Sequence[float]) -> str:
    """One true description of the scene; `draws` (`DRAWS` uniform numbers) alone decides the wording."""
    numbers = iter(draws)

    def chance(p: float) -> bool:
        return next(numbers) < p

    def pick(options: Sequence[str]) -> str:
        return options[int(next(numbers) * len(options))]

    sized, synonyms, colored = chance(0.25), chance(0.2), not chance(0.04)

    def noun(thing: Thing) -> tuple[str, str]:
        parts = [pick(_SIZE_WORDS[thing.size])] if sized and thing.size != "medium" else []
        parts += [thing.color] if colored else []
        return " ".join(parts), _SYNONYMS[thing.shape] if synonyms else thing.shape

    nouns = {id(thing): noun(thing) for thing in things}

    def one(thing: Thing) -> str:
        text = " ".join(nouns[id(thing)]).strip()
        return ("an " if text[0] in "aeiou" else "a ") + text

    def listed(some: Sequence[Thing]) -> str:
        counts: dict[tuple[str, str], list[Thing]] = {}
        for thing in some:
            counts.setdefault(nouns[id(thing)], []).append(thing)
        parts = [one(same[0]) if len(same) == 1 else f"{_NUMBERS[len(same)]} {adjective} {_PLURALS[shape]}"
                 for (adjective, shape), same in counts.items()]
        parts = [part.replace("  ", " ") for part in parts]  # no adjective
        return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]

    order = list(things)
    for i in range(len(order) - 1, 0, -1):
        j = int(next(numbers) * (i + 1))
        order[i], order[j] = order[j], order[i]
    style = next(numbers)
    text = ""
    if len(order) == 1:
        text = (pick(_OPENINGS) + " " if style < 0.15 else "") + one(order[0])
    elif style < 0.6:
        a, b, rest = order[0], order[1], order[2:]
        true = relations(a, b)
        if true:
            lateral = [name for name in true if name in ("left", "right")]
            relation = pick(_WORDING[pick(lateral if lateral and chance(0.6) else true)])
            joint = " is " if chance(0.12) else " "
            text = one(a) + joint + relation + " " + one(b)
            if rest:
                text += pick((", with ", ", and ", " and ")) + listed(rest)
    elif style < 0.7:
        by_x = sorted(order, key=lambda thing: thing.x)
        if all("left" in relations(a, b) for a, b in zip(by_x, by_x[1:])):
            text = "from left to right : " + ", ".join(map(one, by_x[:-1])) + " and " + one(by_x[-1])
    elif style < 0.78:
        text = f"{_NUMBERS[len(order)]} {pick(('objects', 'shapes', 'things'))} : {listed(order)}"
    elif style < 0.84:
        text = pick(_OPENINGS[:4]) + " " + listed(order)
    text = (text or listed(order)).replace(" :", ":")
    ground = pick((f"a {floor} checkered floor", f"a {floor} floor", f"a {floor} tiled floor", f"{floor} ground"))
    above = f"{'an' if sky[0] in 'aeiou' else 'a'} {sky} sky"
    match int(next(numbers) * 20):
        case 0 | 1 | 2 | 3:
            return f"{text} on {ground} under {above}"
        case 4 | 5:
            return f"{text} on {ground}"
        case 6 | 7:
            return f"{text} under {above}"
        case 8:
            return f"{text}, the floor is {floor} and the sky is {sky}"
        case _:
            return text
