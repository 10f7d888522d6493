"""Figures: names lie on nothing, every method is there, a page has the axes alone and the texts as text."""

import io
import itertools
import math

import numpy as np
from matplotlib.text import Annotation
from PIL import Image

from segresearch.plot_names import _spread, name_lines, name_points
from segresearch.plot_style import canvas, dot, rows, save, shown, window


def boxes(axis) -> dict[str, np.ndarray]:
    texts = [text for text in axis.texts if isinstance(text, Annotation) and text.get_text()]
    extents = {text.get_text(): text.get_window_extent() for text in texts}
    return {name: np.array([e.x0, e.y0, e.x1, e.y1]) for name, e in extents.items()}


def crossing(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) > 0.5).all())


def test_names_of_crowded_points_lie_apart_inside_and_are_led_to():
    draws = np.random.default_rng(0)
    points = {f"method {i}": tuple(draws.normal(size=2) * (0.08 if i % 2 else 1)) for i in range(22)}
    figure = canvas(4.0, "Crowd", "A caption.")
    axis = figure.subplots()
    axis.plot(*zip(*points.values()), "o", markersize=5)
    name_points(axis, points)
    found, frame = boxes(axis), axis.get_window_extent()
    assert set(found) == set(points)
    assert not [pair for pair in itertools.combinations(found, 2) if crossing(found[pair[0]], found[pair[1]])]
    for box in found.values():
        assert frame.x0 - 1 <= box[0] and box[2] <= frame.x1 + 1 and frame.y0 - 1 <= box[1] and box[3] <= frame.y1 + 1
    far = [n for n, (x0, y0, x1, y1) in found.items() if math.dist(
        np.clip(axis.transData.transform(points[n]), (x0, y0), (x1, y1)), axis.transData.transform(points[n])
    ) > 12 * figure.dpi / 72]  # fmt: skip
    leaders = [text for text in axis.texts if isinstance(text, Annotation) and text.arrow_patch is not None]
    assert 0 < len(far) <= len(leaders)


def test_one_name_lies_beside_its_point_without_a_line():
    axis = canvas(3.0, "One", "A caption.").subplots()
    axis.plot([0, 1], [0, 1], "o")
    name_points(axis, {"here": (0.5, 0.5)})
    assert list(boxes(axis)) == ["here"] and all(text.arrow_patch is None for text in axis.texts)


def test_names_of_lines_stand_in_the_order_of_their_ends():
    assert _spread([1, 1.1, 1.2, 9], 1, 0, 10) == [1, 2, 3, 9]
    places = _spread([9.9, 9.95, 10], 1, 0, 10)
    assert places == [8, 9, 10] and _spread([], 1, 0, 10) == []
    axis = canvas(3.0, "Lines", "A caption.").subplots(1, 2)[0]
    ends = {name: (1.0, value) for name, value in zip("abcd", (0.5, 0.52, 0.1, 0.51), strict=True)}
    axis.plot([0, 1], [0, 1])
    name_lines(axis, ends, dict.fromkeys(ends, "#000000"))
    heights = {name: box[1] for name, box in boxes(axis).items()}
    assert sorted(heights, key=heights.get) == ["c", "a", "d", "b"]


def test_a_page_has_the_axes_alone_and_the_figure_stays(tmp_path):
    caption = "N = 8 images. A caption with a-hyphen and more words than a line has."
    figure = canvas(2.0, "A title of quality", f"{caption} {caption}")
    figure.subplots().plot([1, 2])
    save(figure, tmp_path / "before.png", vector=["svg"])
    one = shown("quality", figure, "N = 8 images")
    save(figure, tmp_path / "after.png", vector=["svg"])
    assert (tmp_path / "before.png").read_bytes() == (tmp_path / "after.png").read_bytes()
    assert one[:3] == ("quality", "A title of quality", f"{caption} {caption}".removeprefix("N = 8 images. "))
    alone, whole = (Image.open(data) for data in (io.BytesIO(one.png), tmp_path / "after.png"))
    assert alone.width == whole.width and alone.height == round(2.0 * figure.dpi) < whole.height


def test_an_axis_leaves_out_what_lies_far_out_but_not_what_is_asked_for():
    low, high = window([1, 2, 3, 4, 5, 1000, math.nan])
    assert low < 1 and 5 < high < 20
    low, high = window([1, 2, 3, 4, 5, 1000], keep=[-50])
    assert low < -50 and high < 20
    assert window([]) == (-1, 1) and window([2.0, 2.0])[0] < 2 < window([2.0, 2.0])[1]


def test_rows_have_every_name_the_first_on_top_and_dots_their_errors():
    axis = canvas(3.0, "Rows", "A caption.").subplots()
    dot(axis, (1.0, 0), 0.5, {"color": "#000000", "marker": "o"})
    dot(axis, (2.0, 1), math.nan, {"color": "#000000", "marker": "o"})  # no error, no bar
    rows(axis, ["first", "second"], bold=["first"])
    assert [text.get_text() for text in axis.get_yticklabels()] == ["first", "second"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]
    spans = sorted(tuple(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2)
    assert spans == [(0.0, 2.0), (0.5, 1.5)]
