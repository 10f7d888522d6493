"""Long labels, many methods and long numbers fit into every figure of an evaluation."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from helpers import composed, outside

from segresearch.analysis import energy_plots
from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.recorder import Entry
from segresearch.config import EvaluateConfig, GuidanceConfig
from segresearch.evaluation import plots, ranking_plots
from segresearch.evaluation.aggregate import Result
from segresearch.evaluation.frame import Frame, Value
from segresearch.evaluation.ranking import Ranked
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.plot_names import name_points
from segresearch.plot_style import brief, canvas, label, quoted

LONG = "<i>the label {} of eighty characters & more</i> with $σ$ and text to reach eighty"


def spec_and_result(names: list[str], size: float) -> tuple[EvaluationSpec, Result]:
    draws = np.random.default_rng(0)
    metrics = ("fd-mini", "fd_to_baseline-mini", "distance-mini", "recall-mini", "cost", "saturation", "contrast",
               "red", "green", "blue")  # fmt: skip
    scale = {"fd-mini": size, "fd_to_baseline-mini": size}
    rows = [Value(name, metric, float(draws.normal()) * scale.get(metric, 0.1) * (name != names[0]), 0.1 * size)
            for name in names for metric in metrics]  # fmt: skip
    norms = {name: (0.1, 0.1 + float(draws.random())) for name in names[1:]}
    config = composed(name="evaluate", kind=EvaluateConfig)
    spec = EvaluationSpec(config, {name: GuidanceConfig() for name in names}, ("",))
    return spec, Result(Frame(tuple(rows)), norms, 20)


@pytest.mark.parametrize(("count", "text"), [(3, LONG), (40, LONG), (40, "method {}")])
def test_every_name_is_inside_its_figure_and_axes_keep_their_room(count, text):
    names = [text.format(i) for i in range(count)]
    spec, result = spec_and_result(names, 4000)
    ranked = [Ranked(name, {1.0: name}, 1.0, (1.0, 1.0)) for name in names[1:]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if count == 40:
            distance = result.frame.metrics("distance")[0]
            figures = {"tradeoff": plots._tradeoff(spec, result.frame, distance, "N = 8")}
        else:
            figures = plots.draw(spec, result) | ranking_plots.draw_ranking(spec, result.frame, ranked, "N = 8")
            assert figures.keys() > {"quality", "tradeoff", "colour", "norms", "ranking", "tradeoff_cost"}
        for name, figure in figures.items():
            figure.draw_without_rendering()
            assert not outside(figure), name
            for axis in figure.axes:
                assert axis.get_window_extent().width > 0.6 * figure.dpi or not axis.axison, name
                ticks = sorted((e.x0, e.x1) for tick in axis.get_xticklabels()
                               if (e := tick.get_window_extent()).width > 1)  # fmt: skip
                assert all(left > right + 3 for (_, right), (left, _) in itertools.pairwise(ticks)), name
            if name.startswith("tradeoff"):
                boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
                assert len(boxes) > 0.8 * len(ranked)
                for a, b in itertools.combinations(boxes, 2):
                    over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
                    assert min(over) < 1, name


def test_numbers_of_an_axis_stay_apart_however_long_they_are():
    for low, high, width in [(-4900, 1300, 3), (-4.9e7, 1.3e7, 3), (0.0751, 0.0753, 3), (0, 1, 1), (3, 3.0001, 4)]:
        figure = canvas(2.0, "T", "A caption.")
        axis = figure.subplots(1, width)[0] if width > 1 else figure.subplots()
        axis.plot([low, high], [0, 1])
        label(axis, x="FD")
        figure.draw_without_rendering()
        boxes = sorted((e.x0, e.x1) for tick in axis.get_xticklabels() if (e := tick.get_window_extent()).width > 1)
        assert boxes and all(left > right + 3 for (_, right), (left, _) in itertools.pairwise(boxes))


def test_names_that_would_read_the_same_begin_where_they_differ():
    long = "a name that goes on for more than three lines of its place in the figure and ends with "
    texts = brief([f"{long}a", f"{long}b", "short"], 1.2)
    assert texts[0] != texts[1] and texts[2] == "short" and texts[0].replace("\n", " ").endswith("with a")
    assert max(text.count("\n") for text in texts) <= 2
    assert brief(["cost $5 of $6"], 2) == [r"cost \$5 of \$6"]
    assert quoted("vanilla") == "“vanilla”" and quoted(long) == "the baseline"


def test_names_of_marks_at_one_place_stand_in_a_column_with_a_line_to_each():
    figure = canvas(4.0, "Crowd", "A caption.")
    axis = figure.subplots()
    points = {f"method {i}": (0.001 * i, 0.002 * i) for i in range(9)} | {"far": (1.0, 1.0)}
    axis.plot(*zip(*points.values(), strict=True), "o")
    axis.axhline(0.05)
    name_points(axis, points, levels=[0.05])
    texts = {text.get_text(): text.get_window_extent() for text in axis.texts if text.get_text()}
    column = [texts[f"method {i}"] for i in range(9)]
    assert len({round(box.x0) for box in column}) == 1
    assert all(above.y0 > below.y1 for below, above in itertools.pairwise(column))  # the upper mark's name on top
    level = axis.transData.transform((0, 0.05))[1]
    assert not any(box.y0 < level < box.y1 for box in texts.values())
    assert sum(text.arrow_patch is not None for text in axis.texts) == 9


def test_a_name_is_not_nearer_to_the_mark_of_another():
    figure = canvas(4.0, "Pairs", "A caption.")
    axis = figure.subplots()
    points = {"A of many letters": (0.5, 0.5), "B of many letters": (0.5, 0.53), "C of many letters": (0.53, 0.51)}
    axis.plot([0, 1], [0, 1], alpha=0)
    name_points(axis, points)
    at = {name: axis.transData.transform(point) for name, point in points.items()}
    for text in axis.texts:
        if name := text.get_text():
            box = text.get_window_extent()
            away = {n: math.dist(np.clip(p, (box.x0, box.y0), (box.x1, box.y1)), p) for n, p in at.items()}
            assert min(away, key=away.get) == name


def test_names_of_the_axes_of_a_surface_keep_off_the_titles_below():
    q, k = torch.randn(2, 1, 1, 16, 4, generator=torch.Generator().manual_seed(0))
    entry = Entry("mid.0", (4, 4), ("cond",), 0, (1.0,), ({"seed": 0, "prompt": ""},), (0,), lambda: {"q": q, "k": k})
    blurs = [BlurOperator((4, 4), sigma, "reflect") for sigma in (1.0, 2.0, math.inf)]
    figure = energy_plots.landscape(entry, 0, 0, blurs)
    figure.draw_without_rendering()
    upper, lower = figure.axes[:2], figure.axes[2:4]
    foot = min(text.get_window_extent().y0 for axis in upper for text in (axis.xaxis.label, axis.yaxis.label))
    assert foot > max(axis.title.get_window_extent().y1 for axis in lower) + 5
    caption = figure.texts[1].get_text().replace("\n", " ")
    first = [caption.index(text) for text in ("H is", "pdet H is", "determinant d of", "slope g is", "curvature K =")]
    assert first == sorted(first) and "e-" not in caption


def test_the_factors_of_a_sweep_stay_apart_however_many_they_are():
    names = [f"m{i}" for i in range(7)]
    spec, result = spec_and_result(names, 10)
    scales = dict(zip((0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0), names, strict=True))
    figure = ranking_plots._scales(spec, result.frame, [Ranked(n, scales, 1.0, (1.0, 1.0)) for n in "abc"], "N = 8")
    figure.draw_without_rendering()
    boxes = [tick.get_window_extent() for tick in figure.axes[0].get_xticklabels() if tick.get_text()]
    assert len(boxes) > 1 and all(right.x0 > left.x1 + 3 for left, right in itertools.pairwise(boxes))
