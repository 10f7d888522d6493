"""Pages: text is escaped, everything is inside, the same content gives the same bytes."""

import base64
import re

from segresearch.pages import Cell, embedded, render


def test_a_page_escapes_text_embeds_images_and_is_the_same_each_time():
    rows = [[Cell("a<b", "first", href="run/index.html")], [Cell("x & y", strong="<s>", rows=2)]]
    page = render("T<i>", ["5 < 6"], head=[Cell("head", "number")], rows=rows)
    assert page == render("T<i>", ["5 < 6"], head=[Cell("head", "number")], rows=rows)
    assert page.startswith("<!doctype html>\n") and "<title>T&lt;i&gt;</title>" in page and "5 &lt; 6</p>" in page
    assert '<tr class="first"><td class="first"><a href="run/index.html">a&lt;b</a></td>' in page
    assert '<td rowspan="2"><b>&lt;s&gt;</b><br>x &amp; y</td>' in page and '<th class="number">head</th>' in page
    assert embedded(b"png") == f"data:image/png;base64,{base64.b64encode(b'png').decode()}"
    assert not re.search(r"https?://|<script|<link|@import", page)
