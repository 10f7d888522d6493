"""Names of points and lines inside a plot, which lie on nothing and on no other name, with a line to what they name."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.patheffects import withStroke

from segresearch.image_grid import INK, QUIET, text_width
from segresearch.plot_style import SMALL, Number, Point, brief

RADII = (6.0, 10.0, 16.0, 24.0, 34.0, 46.0, 60.0, 76.0, 92.0, 110.0, 130.0, 150.0, 175.0, 200.0)  # points, to a name
ANGLES = np.radians([0, 180, 90, 270, *(a for a in range(10, 360, 10) if a % 90)])
DIRECTIONS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)
MARK = 3.5  # points that a mark reaches to each side
SPACE = np.array([2.5, 0.5])  # points that stay free about a name, in x and y
NEAR = 9.0  # points from its mark to a name that needs no line to it
EDGE = 3.0  # points between a name and the frame
CROWD = 4  # marks so near each other that their names stand in a column
FEW = 48  # places of a name that are looked at closely
SWEEPS = 3  # over the names; from the second on each is placed among all others
FULL = 0.3  # of an axis that names may fill
Points = Float[np.ndarray, "n 2"]
Boxes = Float[np.ndarray, "n 4"]  # x0, y0, x1, y1


def name_points(axis: Any, points: Mapping[str, Point], others: Sequence[Point] = (),
                levels: Sequence[Number] = ()) -> None:  # fmt: skip
    """A name for each (x, y). others: further points that names keep off. levels: y of horizontal lines that they keep
    off likewise. The layout of the figure is done before."""
    if not points:
        return
    figure = axis.figure
    figure.draw_without_rendering()
    unit, frame = figure.dpi / 72, axis.get_window_extent()  # unit: pixels a point
    inside = np.array([frame.x0, frame.y0, frame.x1, frame.y1]) / unit
    names, sizes = _fitting([*points], inside[2] - inside[0], inside[3] - inside[1])
    halo = [withStroke(linewidth=2, foreground="white")]
    texts = [
        axis.annotate(name, point, (0, 0), textcoords="offset points", fontsize=SMALL, ha="center", va="center",
                      zorder=6, color=INK, path_effects=halo)
        for name, point in zip(names, points.values(), strict=True)
    ]  # fmt: skip
    for text in texts:
        text.set_in_layout(False)
    at, dots = (axis.transData.transform(np.reshape(some, (-1, 2))) / unit for some in ([*points.values()], [*others]))
    heights = axis.get_yaxis_transform().transform([(0, level) for level in levels] or np.empty((0, 2)))[:, 1] / unit
    centres = _places(at, sizes, inside, dots, heights)
    ends = _nearest(at, centres, sizes)
    for text, point, start, centre, end in zip(texts, points.values(), at, centres, ends, strict=True):
        text.set_position(tuple(centre - start))
        if math.dist(start, end) > NEAR:
            _leader(axis, point, end - start)


def _fitting(names: Sequence[str], width: float, height: float) -> tuple[list[str], Points]:
    """Names as they are written, and their sizes: the more there are, the shorter."""
    for lines, share in ((3, 0.42), (2, 0.42), (1, 0.42), (1, 0.25)):
        texts = brief(names, share * width / 72, lines)
        split = [text.replace("\\$", "$").split("\n") for text in texts]
        wide = [max(text_width(line, round(SMALL)) for line in some) for some in split]
        sizes = np.array([[w, 1.2 * SMALL * len(some)] for w, some in zip(wide, split, strict=True)])
        if sizes.prod(axis=1).sum() < FULL * width * height:
            break
    return texts, sizes


def _leader(axis: Any, point: Point, offset: Float[np.ndarray, "2"]) -> None:
    line = axis.annotate(
        "", point, tuple(offset), textcoords="offset points", zorder=3.5,
        arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2,
                    "path_effects": [withStroke(linewidth=1.7, foreground="white")]},
    )  # fmt: skip
    line.set_in_layout(False)


class _Named(NamedTuple):
    """Names that are placed: boxes, and lines from a mark to its name, NaN where there is none."""

    boxes: Boxes
    starts: Points
    ends: Points


def _named(at: Points, centres: Points, sizes: Points) -> _Named:
    ends = _nearest(at, centres, sizes)
    away = ends - at
    far = np.linalg.norm(away, axis=-1, keepdims=True)
    starts = at + away * (MARK / np.maximum(far, MARK))
    return _Named(_boxes(centres, sizes + 2 * SPACE), *(np.where(far > NEAR, z, np.nan) for z in (starts, ends)))


def _boxes(centres: Points, sizes: Float[np.ndarray, "*of 2"]) -> Boxes:
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=-1)


def _nearest(at: Float[np.ndarray, "*at 2"], centres: Points, sizes: Float[np.ndarray, "*of 2"]) -> Points:
    """The point of each name that is nearest to its mark."""
    return np.clip(at, centres - sizes / 2, centres + sizes / 2)


def _places(at: Points, sizes: Points, inside: Float[np.ndarray, "4"], dots: Float[np.ndarray, "d 2"],
            levels: Float[np.ndarray, "l"]) -> Points:  # fmt: skip
    """The centre of each name, inside the frame: of all places about its mark the one that covers and crosses least,
    the nearer one of equals. Names of a crowd stand in a column beside it."""
    centres = np.full(at.shape, np.nan)
    sizes = np.minimum(sizes, inside[2:] - inside[:2] - 2 * EDGE)

    def costs(i: int, tries: Float[np.ndarray, "t 2"], few: int) -> Float[np.ndarray, "t"]:
        rest = np.arange(len(at)) != i
        others = _named(at[rest], centres[rest], sizes[rest])
        cost = _covering(at[i], tries, sizes[i], others, at[rest], dots, levels)
        likely = np.argsort(cost, kind="stable")[:few]
        total = np.full(len(tries), np.inf)
        total[likely] = cost[likely] + _crossed(at[i], tries[likely], sizes[i], others, at[rest])
        return total

    columns = {tuple(crowd): _columns(at[crowd], sizes[crowd], inside, levels)
               for crowd in _crowds(at, sizes[:, 1], 0.8 * (inside[3] - inside[1]))}  # fmt: skip
    columns = {crowd: some for crowd, some in columns.items() if len(some)}
    near = (np.linalg.norm(at[:, None] - at, axis=-1) < 40).sum(axis=1)
    alone = sorted(set(range(len(at))).difference(*columns), key=lambda i: near[i])
    low, high = inside[:2] + sizes / 2 + EDGE, inside[2:] - sizes / 2 - EDGE
    for _ in range(SWEEPS):
        before = centres.copy()
        for crowd, some in columns.items():
            centres[[*crowd]] = np.nan
            total = sum(costs(i, some[:, place], len(some)) for place, i in enumerate(crowd))
            centres[[*crowd]] = some[np.argmin(total)]
        for i in alone:
            tries = np.concatenate([at[i] + DIRECTIONS * (r + sizes[i] / 2 * np.abs(DIRECTIONS)) for r in RADII])
            tries = tries.clip(low[i], high[i])
            centres[i] = tries[costs(i, tries, FEW).argmin()]
        if np.array_equal(before, centres):
            break
    return centres


def _crowds(at: Points, heights: Float[np.ndarray, "n"], most: Number) -> list[list[int]]:
    """Marks that hang together, the upper first, `CROWD` or more; no more of them than a column of height `most`
    names."""
    reached = np.linalg.norm(at[:, None] - at, axis=-1) < NEAR
    for _ in at:
        reached = reached @ reached
    groups = {tuple(np.flatnonzero(row).tolist()) for row in reached}
    crowds = []
    for group in sorted(group for group in groups if len(group) >= CROWD):
        order = sorted(group, key=lambda i: (-at[i, 1], at[i, 0], i))
        part = max(1, int(most / heights[order].max()))
        crowds += [order[start : start + part] for start in range(0, len(order), part)]
    return crowds


def _columns(at: Points, sizes: Points, inside: Float[np.ndarray, "4"],
             levels: Float[np.ndarray, "l"]) -> Float[np.ndarray, "c n 2"]:  # fmt: skip
    """Places for a crowd's names in a column, the first on top: at each side, near and far, high and low."""
    columns = []
    for top in np.arange(inside[3] - EDGE, inside[1], -8.0):
        middles = []
        for height in sizes[:, 1]:
            struck = [level for level in levels if top - height - 2 < level < top + 2]
            top = min([top, *(level - 2 for level in struck)]) - height - 1
            middles.append(top + 1 + height / 2)
        if top < inside[1] + EDGE:
            break
        for gap in RADII[2:]:
            for side in (-1, 1):
                edge = (at[:, 0] * side).max() * side + side * gap
                x = edge + side * sizes[:, 0] / 2
                if (x - sizes[:, 0] / 2 > inside[0] + EDGE).all() and (x + sizes[:, 0] / 2 < inside[2] - EDGE).all():
                    columns.append(np.stack([x, middles], axis=-1))
    return np.array(columns)


def _covering(
    at: Float[np.ndarray, "2"], tries: Points, size: Float[np.ndarray, "2"], others: _Named,
    marks: Float[np.ndarray, "m 2"], dots: Float[np.ndarray, "d 2"], levels: Float[np.ndarray, "l"],
) -> Float[np.ndarray, "n"]:  # fmt: skip
    """Costs of a name at each of the `tries` by what it covers and how far away it is. marks: those of other names.
    dots: what else is better not covered."""
    boxes, far = _boxes(tries, size), np.linalg.norm(_nearest(at, tries, size) - at, axis=-1)
    cost = np.maximum(far, RADII[0]) + 0.2 * (np.arange(len(tries)) % len(ANGLES))
    for weight, some in ((3000, others.boxes), (500, _squares(at[None])), (500, _squares(marks)), (60, _squares(dots))):
        covered = _overlaps(boxes, some)
        cost += weight * (covered > 0).sum(axis=1) + covered.sum(axis=1)
    cost += 2000 * ((boxes[:, 1, None] < levels + 1.5) & (levels - 1.5 < boxes[:, 3, None])).sum(axis=1)
    gaps = _away(boxes, _apart(at, marks))
    return cost + 150 * (gaps < np.minimum(far + 3, 12)[:, None]).sum(axis=1)  # it would read as the name of that mark


def _crossed(
    at: Float[np.ndarray, "2"], tries: Points, size: Float[np.ndarray, "2"], others: _Named,
    marks: Float[np.ndarray, "m 2"],
) -> Float[np.ndarray, "n"]:  # fmt: skip
    """Costs of a name at each of the `tries` by what its line crosses, and whose line it covers."""
    mine = _named(np.broadcast_to(at, tries.shape), tries, np.broadcast_to(size, tries.shape))
    cost = 400 * _through(mine, others.boxes).sum(axis=1) + 400 * _through(others, mine.boxes).sum(axis=0)
    cost += 120 * _crossing(mine, others).sum(axis=1) + 250 * _along(mine, others).sum(axis=1)
    return (cost + 200 * _through(mine, _squares(_apart(at, marks))).sum(axis=1)).astype(float)


def _squares(marks: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, "m 4"]:
    return np.concatenate([marks - MARK, marks + MARK], axis=1)


def _apart(at: Float[np.ndarray, "2"], marks: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, "o 2"]:
    """The marks but for those that lie on this one, whose names have the same place."""
    return marks[np.linalg.norm(marks - at, axis=1) > 2 * MARK]


def _away(boxes: Boxes, points: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, "n m"]:
    """How far each point is from each box; 0 inside."""
    sides = np.maximum(boxes[:, None, :2] - points, points - boxes[:, None, 2:])
    return np.linalg.norm(np.maximum(sides, 0), axis=-1)


def _overlaps(boxes: Boxes, others: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """The area that each two have in common; 0 with a NaN."""
    wide, high = (np.minimum(boxes[:, i + 2, None], others[:, i + 2]) - np.maximum(boxes[:, i, None], others[:, i])
                  for i in (0, 1))  # fmt: skip
    return np.where((wide > 0) & (high > 0), wide * high, 0.0)


def _through(named: _Named, boxes: Float[np.ndarray, "m 4"]) -> Bool[np.ndarray, "n m"]:
    """Whether the line of each name goes through each box: it is at once between its sides and between top and foot."""
    ways, spans = named.ends - named.starts, []
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in (0, 1):
            one, other = ((boxes[:, side] - named.starts[:, i, None]) / ways[:, i, None] for side in (i, i + 2))
            spans.append((np.minimum(one, other), np.maximum(one, other)))
    (a, b), (c, d) = spans
    return np.maximum(np.maximum(a, c), 0) < np.minimum(np.minimum(b, d), 1)


def _crossing(a: _Named, b: _Named) -> Bool[np.ndarray, "n m"]:
    """Whether the lines of each two names cross."""

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        return (q[..., 0] - p[..., 0]) * (r[..., 1] - p[..., 1]) - (q[..., 1] - p[..., 1]) * (r[..., 0] - p[..., 0])

    p, q, r, s = a.starts[:, None], a.ends[:, None], b.starts[None], b.ends[None]
    return (side(p, q, r) * side(p, q, s) < 0) & (side(r, s, p) * side(r, s, q) < 0)


def _along(a: _Named, b: _Named) -> Bool[np.ndarray, "n m"]:
    """Whether the lines of each two names begin at one place and run so close that they read as one."""
    ways = [named.ends - named.starts for named in (a, b)]
    p, q = (way / np.linalg.norm(way, axis=-1, keepdims=True) for way in ways)
    near = np.linalg.norm(a.starts[:, None] - b.starts, axis=-1) < 3 * MARK
    return near & ((p[:, None] * q).sum(axis=-1) > math.cos(math.radians(8)))


def name_lines(axis: Any, ends: Mapping[str, Point], colors: Mapping[str, str]) -> None:
    """A name for each line in a column right of the axis, in the order of their ends (x, y), with a line to each end.

    The figure needs room there: `axis` ends left of its edge."""
    if not ends:
        return
    figure = axis.figure
    figure.draw_without_rendering()
    unit, frame = figure.dpi / 72, axis.get_window_extent()
    heights = {name: float(axis.transData.transform(end)[1]) / unit for name, end in ends.items()}
    order = sorted(ends, key=lambda name: heights[name])
    low, high = frame.y0 / unit, frame.y1 / unit
    room = (figure.bbox.x1 - frame.x1) / unit - 20
    names = dict(zip(order, brief(order, room / 72), strict=True))
    step = min(SMALL * (0.1 + 1.2 * max(name.count("\n") + 1 for name in names.values())),
               (high - low) / max(1, len(order) - 1))  # fmt: skip
    places = _spread([heights[name] for name in order], step, low, high)
    for name, place in zip(order, places, strict=True):
        x = frame.x1 / unit + 16 - float(axis.transData.transform(ends[name])[0]) / unit
        text = axis.annotate(
            names[name], ends[name], (x, place - heights[name]), textcoords="offset points", fontsize=SMALL,
            va="center", color=INK, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colors[name], "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2,
                        "relpos": (0, 0.5)},
        )  # fmt: skip
        text.set_in_layout(False)


def _spread(wanted: Sequence[Number], step: Number, low: Number, high: Number) -> list[Number]:
    """Rising places near the wanted ones, `step` apart, within [low, high]."""
    places = list(wanted)
    for i in range(len(places)):
        places[i] = max(places[i], low if i == 0 else places[i - 1] + step)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], high if i == len(places) - 1 else places[i + 1] - step)
    return places
