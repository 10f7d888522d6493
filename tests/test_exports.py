"""Tables and figures that leave a run: nothing of a label acts in them, they fit, they are rounded by the error."""

import csv
import io
import re

import pytest
from matplotlib.figure import Figure

from segresearch.evaluation import outputs
from segresearch.evaluation.compare_runs import Overview, Run
from segresearch.evaluation.frame import LATEX_LINES, Frame, Value, latex, latex_tables, markdown, table
from segresearch.method_looks import look
from segresearch.pages import render, to_csv
from segresearch.plot_style import save
from segresearch.run_index import caption

HOSTILE = '<img src=x onerror="alert(1)"> [a](javascript:b) | `c`\n# d'


def test_a_label_is_text_in_markdown_and_no_formula_in_csv():
    frame = Frame((Value(HOSTILE, "n", 3), Value("=HYPERLINK(1)", "n", 3)))
    lines = markdown(*table(frame)).splitlines()
    assert len(lines) == 4 and "<img" not in lines[2] and r"\[a\](" in lines[2] and "&lt;img" in lines[2]
    assert lines[2].replace(r"\|", "").count("|") == 3 and r"\`c\`" in lines[2]
    texts = ["=1+1", "+1", "-1+2", "@x", "\t=1", "plain", "-inf"]
    rows = list(csv.DictReader(io.StringIO(to_csv([{"label": text, "value": -1.5} for text in texts]))))
    assert [row["label"] for row in rows] == ["'=1+1", "'+1", "'-1+2", "'@x", "'\t=1", "plain", "-inf"]
    assert {row["value"] for row in rows} == {"-1.5"}


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(7.2468, 0.25, "7.25 ± 0.25"), (123.456, 13.2, "123 ± 13"), (123.456, 0.0132, "123.456 ± 0.013"),
     (-2.0, 0.0000001, "−2.000000 ± 0.000000"), (5.0, 0.0, "5.00 ± 0.00"), (5.0, None, "5.00"),
     (5.0, float("nan"), "5.00 ± nan")],
)  # fmt: skip
def test_numbers_are_rounded_to_two_digits_of_the_error(value, error, text):
    assert str(Value("a", "fd-mini", value, error)) == text


def test_a_latex_table_is_no_wider_than_the_text():
    made = latex(*table(Frame((Value("a", "n", 3),))))
    assert r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%" in made
    assert made.count("{") - made.count(r"\{") == made.count("}") - made.count(r"\}")


def test_a_label_is_text_in_latex():
    signs = "<b>&=1|$x_y\\ ~^ {#} %"
    line = latex(*table(Frame((Value(signs, "n", 3),)))).splitlines()[6]
    assert line.startswith(r"\textless{}b\textgreater{}\&=1\textbar{}\$x\_y\textbackslash{} \textasciitilde{}")
    assert r"\textasciicircum{} \{\#\} \% &" in line


def test_many_methods_are_several_latex_tables_of_a_page():
    frame = Frame(tuple(Value(f"m{i}", metric, 1.0) for i in range(85) for metric in ("fd-mini", "saturation")))
    made = latex_tables(frame)
    tables = made.split(r"\begin{tabular}")[1:]
    assert len(tables) == 6 and made.count(r"\end{tabular}}") == 6 and made.count(r"\bigskip") == 5
    assert max(text.count(r"\\") for text in tables) == 1 + LATEX_LINES and made.count("m84 &") == 2
    assert sum(text.count(r"\\") - 1 for text in tables) == 2 * 85
    assert [("saturation" in text, "FD (mini)" in text) for text in tables] == [(False, True)] * 3 + [(True, False)] * 3
    assert latex_tables(Frame((Value("a", "n", 3),))).count("tabular") == 2


def test_pages_made_with_force_say_so():
    (text,) = outputs.forced(True)
    assert outputs.forced(False) == []
    page = render("title", ["quiet", text], head=[], rows=[])
    assert f'<p class="warning">{text}</p>' in page and '<p class="quiet">quiet</p>' in page
    config = {"model": {"name": "m"}, "sampler": {"name": "s"}, "steps": 1, "prompts": [""]}
    assert "force" not in caption(config) and caption({**config, "force": True}).endswith("; made with force=true")
    runs = [Run("x" * 12, {"force": True}, Frame((Value("a", "n", 3),)))]
    assert text in Overview("t", tuple(runs), (), ()).page() and text in Overview("t", tuple(runs), (), ()).markdown()
    assert text not in Overview("t", (Run("x", {}, runs[0].frame),), (), ()).page()


def test_figures_in_other_formats_are_the_same_bytes_again(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    made = []
    for name in ("a", "b"):
        save(figure, tmp_path / name / "quality.png", vector=("pdf", "svg"))
        made.append([(tmp_path / name / f"quality.{kind}").read_bytes() for kind in ("pdf", "svg")])
    assert made[0] == made[1] and made[0][0].startswith(b"%PDF") and b"<svg" in made[0][1]
    save(figure, tmp_path / "c" / "quality.png")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["quality.png"]


def test_an_overview_marks_each_method_as_its_own_run_has_it():
    frame = Frame((Value("a", "n", 3), Value("b", "n", 3)))
    runs = (Run("x", {}, frame, {"a": "none", "b": "pag"}), Run("y", {}, frame, {"a": "seg"}), Run("old", {}, frame))
    page = Overview("mine", runs, (), ()).page()
    marks = re.findall(r'style="color:(#\w+)" aria-hidden="true">(.)</span>([ab])<', page)
    looks = [(look(key), name) for key, name in (("none", "a"), ("pag", "b"), ("seg", "a"))]
    assert marks == [(one.color, one.sign, name) for one, name in looks]
    assert "<h1>mine: 3 runs</h1>" in page
    assert "<h1>mine: 1 run</h1>" in Overview("mine", runs[:1], (), ()).page()
