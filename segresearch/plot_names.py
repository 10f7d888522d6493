"""Names of points and lines inside a plot, which lie on nothing and on no other name, with a line to what they name."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath

from segresearch.image_grid import INK, QUIET
from segresearch.plot_style import SMALL, Number, Point

RADII = (6.0, 10.0, 16.0, 24.0, 34.0, 46.0, 60.0, 78.0, 100.0)  # of a name about its point, in points
ANGLES = [math.radians(a) for a in (0, 180, 90, 270, 45, 135, 315, 225, 20, 160, 340, 200, 65, 115, 245, 295)]
MARK = 3.5  # points that a mark reaches to each side
SPACE = np.array([5.0, 0.0])  # points between a name and the next, in x and y


def name_points(axis: Any, points: Mapping[str, Point], colors: Mapping[str, str] | None = None,
                others: Sequence[Point] = (), levels: Sequence[Number] = ()) -> None:  # fmt: skip
    """A name for each (x, y). others: further points that names keep off. levels: y of horizontal lines that they keep
    off likewise. The layout of the figure is done before."""
    if not points:
        return
    figure = axis.figure
    texts = {
        name: axis.annotate(
            name, point, (0, 0), textcoords="offset points", fontsize=SMALL, ha="center", va="center", zorder=5,
            color=(colors or {}).get(name, INK), path_effects=[withStroke(linewidth=2, foreground="white")],
        )
        for name, point in points.items()
    }  # fmt: skip
    for text in texts.values():
        text.set_in_layout(False)
    figure.draw_without_rendering()
    unit = figure.dpi / 72  # pixels a point
    at = {name: axis.transData.transform(point) / unit for name, point in points.items()}
    sizes = {name: _size(text, unit) for name, text in texts.items()}
    frame = axis.get_window_extent()
    inside = np.array([frame.x0, frame.y0, frame.x1, frame.y1]) / unit
    marks = [*at.values(), *(axis.transData.transform(other) / unit for other in others)]
    boxes = [np.array([x - MARK, y - MARK, x + MARK, y + MARK]) for x, y in marks]
    for level in levels:
        y = axis.get_yaxis_transform().transform((0, level))[1] / unit
        boxes += [np.array([x, y - 1, x + 2 * MARK, y + 1]) for x in np.arange(inside[0], inside[2], 2 * MARK)]
    placed: list[np.ndarray] = []
    paths: list[np.ndarray] = []
    crowd = {name: sum(math.dist(p, q) < 40 for q in at.values()) for name, p in at.items()}
    for name in sorted(points, key=lambda n: (crowd[n], n)):
        best = _place(at[name], sizes[name], inside, boxes, placed, paths)
        offset = best - at[name]
        texts[name].set_position(tuple(offset))
        box = _box(best, sizes[name])
        placed.append(_box(best, sizes[name] + 2 * SPACE))
        end = np.clip(at[name], box[:2], box[2:])  # the nearest point of the name
        if math.dist(end, at[name]) > 9:
            paths.append(_path(at[name], end))
            _leader(axis, points[name], end - at[name])


def _leader(axis: Any, point: Point, offset: np.ndarray) -> None:
    line = axis.annotate(
        "", point, tuple(offset), textcoords="offset points", zorder=2.2,
        arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2},
    )  # fmt: skip
    line.set_in_layout(False)


def _size(text: Any, unit: float) -> np.ndarray:
    extent = text.get_window_extent()
    return np.array([extent.width, extent.height]) / unit


def _box(centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    return np.concatenate([centre - size / 2, centre + size / 2])


def _path(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    return start + np.linspace(0.15, 1, 12)[:, None] * (end - start)


def _place(point: np.ndarray, size: np.ndarray, inside: np.ndarray, marks: Sequence[np.ndarray],
           placed: Sequence[np.ndarray], paths: Sequence[np.ndarray]) -> np.ndarray:  # fmt: skip
    """The centre of a name: of all places about its point the one that covers least, the nearer one of equals."""
    cheapest, best = math.inf, point
    names, dots, ways = np.reshape(placed, (-1, 4)), np.reshape(marks, (-1, 4)), np.reshape(paths, (-1, 2))
    for radius in RADII:
        for order, angle in enumerate(ANGLES):
            direction = np.array([math.cos(angle), math.sin(angle)])
            centre = point + direction * (radius + size / 2 * np.abs(direction))
            box = _box(centre, size)
            cost = radius + 0.2 * order
            cost += 60 * float(np.maximum(inside[:2] - box[:2], 0).sum() + np.maximum(box[2:] - inside[2:], 0).sum())
            for weight, others in ((400, names), (60, dots)):
                covered = _overlaps(box, others)
                cost += weight * np.count_nonzero(covered) + float(covered.sum())
            way = _path(point, np.clip(point, box[:2], box[2:]))
            crossed = ((way[:, None] > names[:, :2]) & (way[:, None] < names[:, 2:])).all(axis=2).any(axis=0)
            cost += 150 * np.count_nonzero(crossed)
            cost += 20 * np.count_nonzero(((ways > box[:2]) & (ways < box[2:])).all(axis=1))
            if cost < cheapest:
                cheapest, best = cost, centre
        if cheapest < radius + 20:  # nothing is covered, and farther places are no better
            break
    return best


def _overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return np.maximum(sides, 0).prod(axis=1)


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
    widths = {name: TextPath((0, 0), name, SMALL).get_extents().width for name in order}
    names = {name: textwrap.fill(name, max(8, int(len(name) * min(1, room / widths[name])))) for name in order}
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
