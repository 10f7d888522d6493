"""A sweep: every method at several of its own scales, ranked by what the frame says of them."""

import dataclasses
import math
import re

import pytest
from helpers import composed

from segresearch.config import EvaluateConfig, GuidanceConfig, conf_dir, typed
from segresearch.config.sweep import at_scale, swept
from segresearch.errors import ConfigError
from segresearch.evaluation import ranking, ranking_plots
from segresearch.evaluation.aggregate import to_the_best
from segresearch.evaluation.frame import Frame, Value
from segresearch.evaluation.spec import evaluation_spec, run_identity
from segresearch.method_looks import look
from segresearch.metrics.frechet import Frechet

SEG = {"kind": "perturbed", "scale": 2, "perturbation": {"kind": "seg", "sigma": "inf"}}
CFG = {"kind": "cfg", "weight": 5}


def guidance(**settings) -> GuidanceConfig:
    return typed(GuidanceConfig, settings)


def test_the_scale_of_a_method_is_that_of_its_own_difference():
    seg = at_scale(guidance(terms={"cfg": CFG, "seg": SEG}), 0.5)
    assert (seg.terms["cfg"].weight, seg.terms["seg"].scale) == (5, 1)  # CFG beside it stays
    assert at_scale(guidance(terms={"cfg": CFG}), 0.5).terms["cfg"].weight == 3  # 1 + 0.5·(5 − 1)
    assert at_scale(guidance(sag={"scale": 0.75}), 2).sag.scale == 1.5
    shaped = guidance(terms={"cfg": {**CFG, "shape": {"kind": "apg"}}}, post={"tag": {"kind": "tag"}})
    assert at_scale(shaped, 2).terms["cfg"].weight == 9
    pladis = guidance(every={"pladis": {"perturbation": {"kind": "pladis", "scale": 2}}})
    assert at_scale(pladis, 2).every["pladis"].perturbation.scale == 4
    assert at_scale(guidance(), 2) is None


def test_a_schedule_of_a_scale_is_scaled_as_a_whole():
    ramp = {"kind": "ramp", "start": 4, "stop": 1}
    scaled = at_scale(guidance(terms={"seg": {**SEG, "scale": ramp}}), 0.5).terms["seg"].scale
    assert (scaled.start, scaled.stop) == (2, 0.5)
    schedule = {"kind": "schedule", "low": 1, "high": 9}
    weight = at_scale(guidance(terms={"cfg": {**CFG, "weight": schedule}}), 0.5).terms["cfg"].weight
    assert (weight.low, weight.high) == (1, 5)  # a weight of 1 is no guidance
    plus = at_scale(guidance(terms={"seg": {**SEG, "scale": {"kind": "cfg++", "strength": 0.6}}}), 0.5)
    assert plus.terms["seg"].scale.strength == 0.3


def test_the_baseline_stays_and_every_other_method_has_every_factor():
    named = {"none": guidance(), "CFG": guidance(terms={"cfg": CFG}), "look": guidance(post={"t": {"kind": "tag"}})}
    found = swept(named, (2.0, 0.5, 1.0))
    assert list(found) == ["none", "CFG ×0.5", "CFG", "CFG ×2", "look"]
    assert [(one.of, one.factor) for one in found.values()][1:4] == [("CFG", 0.5), ("CFG", 1.0), ("CFG", 2.0)]
    assert found["CFG"].guidance == dataclasses.replace(named["CFG"], label="CFG")
    with pytest.raises(ConfigError, match="two methods would be called 'CFG ×2'"):
        swept({**named, "CFG ×2": guidance(post={"tsr": {"kind": "tsr"}})}, (1.0, 2.0))


@pytest.mark.parametrize("scales", ["[1]", "[1,1]", "[0,1]", "[-1,1]", "[]"])
def test_factors_that_make_no_sweep_are_refused(scales):
    with pytest.raises(ConfigError, match="sweep.scales"):
        composed(f"sweep.scales={scales}", "experiment=methods", name="evaluate", kind=EvaluateConfig)


def test_a_named_method_has_its_one_factor():
    named = {"none": guidance(), "SEG": guidance(terms={"seg": SEG}), "CFG": guidance(terms={"cfg": CFG})}
    found = swept(named, (0.5, 1.0), {"SEG": 0.5})
    assert list(found) == ["none", "SEG ×0.5", "CFG ×0.5", "CFG"]
    assert found["SEG ×0.5"].guidance.terms["seg"].scale == 1 and found["SEG ×0.5"].factor == 0.5
    with pytest.raises(ConfigError, match=r"sweep\.at: 'SEGG' is no method here; did you mean SEG\? \(SEG, CFG\)"):
        swept(named, (1.0, 2.0), {"SEGG": 0.5})
    with pytest.raises(ConfigError, match="first: -1 is out of range"):
        composed("first=-1", name="evaluate", kind=EvaluateConfig)
    with pytest.raises(ConfigError, match="at: .*none of the factors can be 0"):
        composed("sweep={scales:[1,2],at:{SEG:0}}", name="evaluate", kind=EvaluateConfig)


def test_chosen_scales_are_those_of_the_page_and_are_measured_on_other_images(spec, frame):
    config = composed("experiment=methods_again", "images=9", name="evaluate", kind=EvaluateConfig)
    again = evaluation_spec(config)
    page = (conf_dir().parent / "docs" / "effects.md").read_text()
    (best,) = re.findall(r"<!-- methods: begin -->(.*?)<!-- methods: end -->", page, re.S)
    assert set(again.methods) == {line.split(" | ")[0][2:] for line in best.strip().splitlines()[4:]}
    assert again.ranges[0].start >= 300  # images that did not choose
    chosen = {name: one for name, one in spec.sweep.items() if name in ("vanilla", "PAG 1", "SAG 0.75")}
    alone = dataclasses.replace(spec, sweep=chosen, methods={name: spec.methods[name] for name in chosen})
    ranked = ranking.ranking(alone, frame)
    assert ranking.one_scale(ranked) and not ranking.one_scale(ranking.ranking(spec, frame))
    assert "at their one scale: PAG 1 (1 of 2)" in ranking.headline(alone, frame, ranked)[1]
    figures = ranking_plots.draw_ranking(alone, frame, ranked, "here")
    assert "scales" not in figures and "one scale" in figures["ranking"].texts[0].get_text()


EXPERIMENTS = [("methods", 64), ("methods_text", 85), ("methods_cfg", 98), ("methods_control", 64)]


@pytest.mark.parametrize(("name", "count"), EXPERIMENTS)
@pytest.mark.parametrize("model", ["mini", "sdxl"])
def test_the_comparisons_hold_every_method_at_three_scales(name, count, model):
    more = ["model.networks.weak=weak", "reference=scene:0-9"] if model == "sdxl" else []
    config = composed(f"experiment={name}", f"model={model}", "images=9", *more, name="evaluate", kind=EvaluateConfig)
    spec = evaluation_spec(config)
    assert len(spec.methods) == count and bool(spec.controls) == (name == "methods_control")
    assert bool(spec.scenes) == (name in ("methods_text", "methods_cfg"))
    assert set(spec.methods[spec.baseline].terms) == ({"cfg"} if name == "methods_cfg" else set())
    assert run_identity(spec, "x")["sweep"] == config.sweep


# --- the ranking ----------------------------------------------------------------------------------


def frechet(distance: float, *resamples: float) -> Frechet:
    return Frechet(float(distance), 0.0, 9, 9, 2, math.nan, 1.0, tuple(map(float, resamples)))


@pytest.fixture(scope="module")
def spec():
    given = ("compare=[none,pag,sag]", "guidance=none", "sweep={scales:[0.5,1,2]}")
    config = composed(*given, name="evaluate", kind=EvaluateConfig)
    return evaluation_spec(config)


DISTANCES = {
    "vanilla": frechet(100, 98, 102, 100), "PAG 1 ×0.5": frechet(90, 89, 91, 90), "PAG 1": frechet(80, 79, 81, 80),
    "PAG 1 ×2": frechet(80.5, 78, 82, 83), "SAG 0.75 ×0.5": frechet(99, 97, 101, 99),
    "SAG 0.75": frechet(98, 95, 97, 99), "SAG 0.75 ×2": frechet(130, 125, 128, 133),
}  # fmt: skip


@pytest.fixture(scope="module")
def frame(spec):
    rows = to_the_best(spec, DISTANCES, "mini")
    for method, distance in DISTANCES.items():
        difference = None if method == "vanilla" else distance.distance - 100
        rows += [Value(method, "fd-mini", distance.distance, 1.0)]
        rows += [Value(method, "fd_to_baseline-mini", difference, 1.0)]
        rows += [Value(method, "cost", 1.5), Value(method, "distance-mini", None if method == "vanilla" else 0.1)]
        rows += [Value(method, "precision-mini", 0.9), Value(method, "recall-mini", 0.8)]
    return Frame(tuple(rows))


def test_differences_to_the_best_are_paired(spec, frame):
    assert tuple(spec.methods) == tuple(DISTANCES)
    best, other = frame["PAG 1", "fd_to_best-mini"], frame["SAG 0.75", "fd_to_best-mini"]
    assert (best.value, best.error) == (0, 0) and other.value == 18
    assert other.error == pytest.approx(math.sqrt(3), rel=1e-5)  # of 95 − 79, 97 − 81, 99 − 80
    assert [frame[m, "fd_to_own_best-mini"].value for m in ("SAG 0.75", "SAG 0.75 ×2")] == [0, 32]


def test_methods_are_ranked_at_their_best_scale_with_the_range_that_is_as_good(spec, frame):
    first, second = ranking.ranking(spec, frame)
    assert (first.name, first.best, first.at_best, first.own) == ("PAG 1", 1.0, "PAG 1", "PAG 1")
    assert first.robust == (1.0, 2.0)  # 0.5 more is within its paired error, 10 more is not
    assert (second.name, second.best, second.robust) == ("SAG 0.75", 1.0, (0.5, 1.0))
    assert ranking.ranking(dataclasses.replace(spec, sweep={}), frame) == []
    head, baseline, *lines = ranking.ranking_table(spec, frame, [first, second])
    texts = [[cell.text for cell in line] for line in lines]
    assert [text[1] for text in texts] == ["PAG 1", "SAG 0.75"]
    assert texts[0][2:5] == ["1 (×1)", "×1 to ×2", "−20.0 ± 1.0"]
    assert baseline[1].text == "vanilla" and len(head) == len(baseline) == len(lines[0])


def test_the_protocol_says_what_is_the_same_for_all(spec):
    words = dict(ranking.protocol(spec))
    assert words["sampler"].startswith("euler (") and words["sampler"].endswith(", 25 steps, schedule auto")
    assert words["prompts"] == "none"
    assert "w becomes 1 + f·(w − 1)" in words["scales"]
    lines = [[cell.text for cell in line] for line in ranking.settings_table(spec)]
    assert [line[0] for line in lines[1:]] == ["vanilla", "PAG 1", "SAG 0.75"] and lines[2][2:] == ["mid", "all"]


def test_figures_name_every_method_and_place_its_scales(spec, frame):
    ranked = ranking.ranking(spec, frame)
    found = ranking_plots.draw_ranking(spec, frame, ranked, "here")
    (axis,) = found["ranking"].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1  PAG 1", "2  SAG 0.75"]
    colors = {mark.get_color() for mark in axis.lines if mark.get_marker() not in ("None", ">", "<")}
    assert colors == {look("pag").color, look("sag").color}
    marks = [mark for mark in axis.lines if mark.get_marker() != "None"]
    assert len(marks) == 6 and sum(mark.get_markerfacecolor() == "none" for mark in marks) >= 3  # two methods, 3 scales
    assert [panel.get_title(loc="left") for panel in found["scales"].axes if panel.axison] == ["PAG 1", "SAG 0.75"]
    assert set(found) == {"ranking", "scales", "tradeoff_distance", "tradeoff_cost", "tradeoff_recall"}
    for name in list(found)[2:]:
        assert {text.get_text() for text in found[name].axes[0].texts} >= {"PAG 1", "SAG 0.75"}


def test_the_headline_tells_apart_by_two_errors(spec, frame):
    ranked = ranking.ranking(spec, frame)
    first, second, *others = ranking.headline(spec, frame, ranked)
    assert first == ("The lowest distance has PAG 1 at scale 1: FD (mini) −20.0 ± 1.0 relative to “vanilla”. No other "
                     "method is within two errors of it.")  # fmt: skip
    assert "at their best scale: PAG 1 (1 of 2)" in second and second.endswith("at every scale tried: none (0).")
    assert others == [] == ranking.headline(spec, frame, [])
