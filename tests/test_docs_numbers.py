"""Numbers between marks: they are written, compared within a tolerance, complete, and of the weights that are there."""

import math
import re

import pytest

from experiments.docs import marks, plan, theory
from experiments.docs.numbers import DOCS, PARTS, WEIGHTS, weights
from segresearch.evaluation.sample_shards import Worker

PAGE = """a <!-- =x -->< 0.1 %<!-- = --> b <!-- =y -->93.1 % to
99.6 %<!-- = -->
<!-- t: begin -->
| σ = 1 | σ_t = 11.7 |
|---|---|
| −7.36 | 1,357 |
<!-- t: end -->
<!-- other: begin -->
kept
<!-- other: end -->
"""


def test_what_stands_between_marks_is_read_and_written_and_nothing_else():
    there = marks.texts(PAGE)
    assert there == {"t": "| σ = 1 | σ_t = 11.7 |\n|---|---|\n| −7.36 | 1,357 |", "other": "kept", "x": "< 0.1 %",
                     "y": "93.1 % to\n99.6 %"}  # fmt: skip
    assert marks.written(PAGE, there) == PAGE
    page = marks.written(PAGE, {"x": r"\1", "t": "2"})
    assert marks.texts(page) == {**there, "x": r"\1", "t": "2"} and page.startswith("a <!-- =x -->\\1<!-- = --> b")
    with pytest.raises(ValueError, match="two texts of x"):
        marks.texts(PAGE + "<!-- =x -->0.2 %<!-- = -->")


@pytest.mark.parametrize(
    "page, measured, equal",
    [
        ("0.72", "0.73", True),  # a unit of the last digit
        ("0.72", "0.74", False),
        ("93.1 % to\n99.6 %", "93.2 % to 99.5 %", True),
        ("93.1 %", "94.1 %", False),
        ("> 99.9 %", "100 %", True),
        ("1,357", "1,361", True),  # half a percent
        ("1,357", "1,370", False),
        ("−7.36", "-7.37", True),
        ("−7.36", "7.36", False),
        ("key=43 step=18", "key=44 step=18", False),  # counts are exact
        ("∞", "300", False),
        ("0 %", "0.1 %", False),
        ("reflect 1", "exact 1", False),
        ("below 1e−05", "below 1e−06", False),
        ("3.8e−06", "3.9e−06", True),
    ],
)
def test_numbers_are_equal_within_half_a_percent_or_the_last_digit(page, measured, equal):
    assert marks.same(page, measured) is equal


def test_a_difference_names_the_mark_and_the_line():
    (one,) = marks.differences(PAGE, {"t": "| σ = 1 | σ_t = 11.7 |\n|---|---|\n| −7.36 | 1,400 |", "x": "< 0.1 %"})
    assert str(one) == "t: the page has '| −7.36 | 1,357 |', measured is '| −7.36 | 1,400 |'"
    (lost,) = marks.differences(PAGE, {"z": "1"})
    assert lost.name == "z" and "no such mark" in lost.page


@pytest.mark.parametrize("number, digits, text", [
    (0.97412, 2, "0.97"), (5502.4, 3, "5,502"), (-380.44, 4, "−380.4"), (300.6, 3, "301"), (1e-9, 2, "0"),
    (math.inf, 3, "∞"), (0.00093, 2, "0.00093"), (-283.5, 3, "−284"),
])  # fmt: skip
def test_numbers_are_written_with_their_digits(number, digits, text):
    assert theory.number(number, digits) == text


def test_shares_are_100_percent_only_where_all_hold():
    assert [theory.percent(x) for x in (0, 1e-9, 0.5, 1 - 1e-9, 1)] == ["0 %", "< 0.1 %", "50.0 %", "> 99.9 %", "100 %"]
    assert theory.span([1, 0.5], theory.percent) == "50.0 % to 100 %" and theory.span([1, 1], theory.percent) == "100 %"


@pytest.fixture
def run(tmp_path):
    """The tables of a run of one head: each number tells its column and blur."""
    blurs = [(b, s) for b in theory.BOUNDARIES for s in theory.SIGMAS]
    names = ("mean_kept", "variance_falls", "lse_falls", "product_falls", "diagonal_shrinks", "theorem_paper",
             "theorem_chain", "trace_falls", "blur_commutes", "mean_kept_weighted", "variance_falls_weighted",
             "lse_falls_weighted")  # fmt: skip
    claims = ["claim,axis,boundary,blur_sigma,columns,share_holding,median_margin,smallest_margin,smallest_at"]
    claims += [f"{name},{axis},{b},{s},1000,{0.5 if name == 'theorem_paper' and b == 'exact' else 1},{i},-0.{i:03},at"
               for axis in ("queries", "keys") for name in names for i, (b, s) in enumerate(blurs)]  # fmt: skip
    columns = ("spread", "mean_shift", "variance_ratio", "variance_ratio_max", "lse_fall", "taylor_fall", "eq20_holds",
               "chain_holds", "trace_before", "chain_trace_after")  # fmt: skip
    rows = [",".join(("boundary", "blur_sigma", "sigma_t", *columns))]
    rows += [",".join(map(str, (b, s, 11.7, *(i / 100 for _ in columns)))) for i, (b, s) in enumerate(blurs)]
    (tmp_path / "verdicts.csv").write_text("\n".join(claims))
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return tmp_path


def test_the_page_of_the_theory_has_a_mark_for_each_number_of_a_run_and_no_other(run):
    measured = theory.analysis(run)
    assert measured["theorem"] == "50.0 % to 100 %" and measured["chain"] == "100 %"
    assert measured["theorem.shares"].splitlines()[-1] == "| exact | 50.0 % | 50.0 % | 50.0 % | 50.0 % | 50.0 % |"
    assert measured["lse.fall"].splitlines()[2:4] == ["| reflect | 0 | 0.01 | 0.02 | 0.03 | 0.04 |",
                                                      "| symmetric | 0.05 | 0.06 | 0.07 | 0.08 | 0.09 |"]  # fmt: skip
    assert measured["worst"].splitlines()[2].endswith("| −0.019 | `at`, blur σ = ∞ |")
    assert measured["columns"] == "1,000"
    there = marks.texts((DOCS / "theory.md").read_text(encoding="utf-8"))
    assert set(there) == {*measured, WEIGHTS, "eq19"}
    for name, text in measured.items():  # the same tables, of the same blurs
        assert len(there[name].splitlines()) == len(text.splitlines()) or "\n" not in text, name
        assert there[name].splitlines()[0] == text.splitlines()[0] or "\n" not in text or name == "noise", name


@pytest.mark.parametrize("page", sorted({part.page for part in PARTS.values()}))
def test_a_page_of_numbers_is_of_the_weights_that_are_there(page):
    """Else: python -m experiments.docs.numbers."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert marks.texts(text).get(WEIGHTS, weights()[WEIGHTS]) == weights()[WEIGHTS]
    assert not re.search("^<!-- =", text, re.M)  # Markdown would take it for a paragraph of its own


def test_the_plan_is_the_arithmetic_of_its_steps():
    part = PARTS["plan"]
    text = (DOCS / part.page).read_text(encoding="utf-8")
    measured = part.measure()
    assert marks.differences(text, measured, within=0) == [] and set(marks.texts(text)) == set(measured)
    assert [plan.step(x) for x in (1.0, 1.67, 2.67)] == list(plan.STEP.values()) and 0.059 < plan.step(3) < 0.07
    assert plan.picture(0.059) == pytest.approx(plan.WHOLE + plan.DECODE + plan.METRICS)


@pytest.mark.parametrize("gpus", plan.GPUS)
@pytest.mark.parametrize("shard", plan.SHARDS)
def test_the_busiest_worker_of_the_plan_is_that_of_an_evaluation(gpus, shard):
    ranges = [range(i, i + shard) for i in range(0, plan.IMAGES, shard)]
    parts = [len(Worker(rank, gpus).part(ranges)) for rank in range(gpus)]
    shared = plan.share(gpus, shard, seconds=1.0)
    assert shared.ranges == max(parts) and shared.hours * 3600 == pytest.approx(max(parts) * shard * plan.METHODS)
    assert shared.idle == pytest.approx(1 - sum(parts) / (gpus * max(parts)))
