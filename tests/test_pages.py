"""Pages: text is escaped, everything is inside, the same content gives the same bytes."""

import base64
import re
from pathlib import Path

import pytest

from segresearch.method_looks import FAMILIES
from segresearch.pages import TEMPLATES, Cell, counted, embedded, render, title_of
from segresearch.plot_style import SMALL, WIDTH, Shown

HOSTILE = '"><script>alert(1)</script>'


def test_a_page_escapes_text_embeds_images_and_is_the_same_each_time():
    rows = [[Cell("a<b", "first", href="run/index.html")], [Cell("x & y", strong="<s>", rows=2)]]
    page = render("T<i>", ["5 < 6"], head=[Cell("head", "number")], rows=rows)
    assert page == render("T<i>", ["5 < 6"], head=[Cell("head", "number")], rows=rows)
    assert page.startswith("<!doctype html>\n") and "<title>T&lt;i&gt;</title>" in page and "5 &lt; 6</p>" in page
    assert '<tr class="first"><td class="first"><a href="run/index.html">a&lt;b</a></td>' in page
    assert '<td rowspan="2"><b>&lt;s&gt;</b><br>x &amp; y</td>' in page and '<th class="number">head</th>' in page
    assert embedded(b"png") == f"data:image/png;base64,{base64.b64encode(b'png').decode()}"
    assert not re.search(r"https?://|<script|<link|@import", page)


def test_marks_stand_before_names_in_their_colour():
    page = render("T", [], head=[], rows=[[Cell("PAG", "method", mark="●", color="#d55e00")]])
    assert '<span class="mark" style="color:#d55e00" aria-hidden="true">●</span>PAG</td>' in page


@pytest.mark.parametrize("template", ["images", "evaluation"])
def test_nothing_of_a_prompt_or_a_label_acts_on_a_page(template):
    image = {"src": "images/a.png", "width": 1, "height": 1, "small": True, "alt": HOSTILE, "seed": HOSTILE,
             "prompt": HOSTILE}  # fmt: skip
    cell = Cell(HOSTILE, "method", mark="●", color="#000000")
    if template == "images":
        panels = [{"title": HOSTILE, "heads": [cell], "alone": alone, "rows": [(image, [image])]} for alone in (0, 1)]
        page = render(HOSTILE, [HOSTILE], template, panels=panels, facts={HOSTILE: HOSTILE})
    else:
        figure = Shown(HOSTILE, HOSTILE, HOSTILE, b"png", 10)
        lines = [[cell], [cell]]
        spec = {"paper": None, "baseline": HOSTILE, "prompts": [HOSTILE], "metrics": [],
                "config": {"prompts": HOSTILE, "reference": HOSTILE}}  # fmt: skip
        page = render(
            HOSTILE, [HOSTILE], template, spec=spec, run=HOSTILE, code=HOSTILE, quality=lines, content=lines,
            plots=[figure] * 3, methods=[cell], rows=[[image]], sampled_by=HOSTILE, ranking=lines,
            headline=[HOSTILE], single=False,
            protocol=[(HOSTILE, HOSTILE)], settings=lines,
            branches=[{"title": HOSTILE, "text": HOSTILE, "table": lines, "plots": [figure]}],
        )  # fmt: skip
    assert page.count("<script") == 1 and HOSTILE not in page and page.count("&#34;&gt;&lt;script&gt;") > 8
    assert not re.search(r"https?://|<link|@import", page)


def test_images_zoom_by_the_page_itself_and_a_page_without_images_has_no_script():
    image = {"src": "images/a.png", "width": 96, "height": 96, "small": True, "alt": "PAG, seed 3"}
    row = {"seed": 3, "prompt": "a cube"}
    panel = {"title": "", "heads": [Cell("PAG")], "alone": True, "rows": [(row, [image])]}
    page = render("T", [], "images", panels=[panel], facts={})
    assert page.count("<script>") == 1 == page.count("<dialog") and 'loading="lazy" alt="PAG, seed 3"' in page
    assert "<figcaption>seed 3: a cube</figcaption>" in page
    assert "prefers-color-scheme: dark" in page and "<dialog" not in render("T", [], head=[], rows=[])


def test_a_run_without_a_name_is_called_by_its_methods():
    assert title_of("table1", "evaluate", ["a", "b"]) == "table1"
    assert title_of("evaluate", "evaluate", ["a", "b"]) == "a, b"
    assert title_of("evaluate", "evaluate", [*"abcde"]) == "a and 4 more methods"


def test_no_text_of_a_page_is_smaller_than_12_pixels():
    """On a telephone too, where tables are smaller; figures fill its width (`plot_style`)."""
    style = TEMPLATES.loader.get_source(TEMPLATES, "page.html.j2")[0]
    sizes = [float(size) * 16 for size in re.findall(r"font-size: ([\d.]+)rem", style)]
    assert len(sizes) > 5 and min(sizes) >= 12
    assert (390 - 6) / WIDTH / 72 * SMALL >= 12


def contrast(one: str, other: str) -> float:
    """Of two colours "#rrggbb" (WCAG 2), from 1 to 21."""

    def light(color: str) -> float:
        srgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in srgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    dark, bright = sorted((light(one), light(other)))
    return bright / dark


def test_marks_have_an_edge_that_stands_out_where_their_colours_are_light():
    style = TEMPLATES.loader.get_source(TEMPLATES, "page.html.j2")[0]
    light, dark, _ = re.findall(r"--edge: ([^ ;}]+)", style)
    assert contrast(light, "#ffffff") >= 3 and dark == "transparent" and "text-stroke: 1.6px var(--edge)" in style
    (factor,) = re.findall(r"\.mark { filter: brightness\(([\d.]+)\)", style)
    bright = [[min(255, round(int(color[i : i + 2], 16) * float(factor))) for i in (1, 3, 5)] for color in FAMILIES]
    assert min(contrast("#" + bytes(color).hex(), "#15171c") for color in bright) >= 3


def test_numbers_in_code_of_the_docs_are_legible_in_the_dark():
    style = (Path(__file__).parents[1] / "docs/site.css").read_text()
    (number,) = re.findall(r"--md-code-hl-number-color: (#\w+)", style)
    assert contrast(number, "#272935") >= 5  # the theme's background of code: hsl(225, 15%, 18%)


def test_one_is_not_plural():
    assert [counted(number, "run") for number in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
