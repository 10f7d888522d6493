"""The page of a study: one HTML file with its table, figures and pictures inside, readable without a network."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segresearch.analysis.report import CSS
from segresearch.config import EvaluateConfig
from segresearch.evaluation.aggregate import Result
from segresearch.evaluation.spec import Study
from segresearch.evaluation.table import PLAIN, Column, Row, columns
from segresearch.png_metadata import png

MOST = 256  # pixels that a picture is shown high
MORE = """
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } th.number { text-align: right }
.paper { background: #f7f4ea }
.grid td, .grid th { padding: 2px 3px; border: 0; text-align: center; white-space: normal }
.grid th { font-size: .8rem; min-width: 5rem } .grid td.text { text-align: left; font-size: .78rem; max-width: 12rem }
.grid img { display: block; margin: auto; image-rendering: pixelated } body { max-width: 84rem }
"""


def page(
    config: EvaluateConfig, plan: Study, result: Result, pictures: Mapping[str, np.ndarray],
    figures: Mapping[str, Path], facts: Mapping[str, str], records: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:  # fmt: skip
    """The whole page. pictures: of each setting, uint8 (n, 3, h, w), and the records that they carry. facts: a name and
    a text each."""
    table = f"{plan.paper} of arXiv 2408.00760, on {config.model.name}" if plan.paper else ""
    title = table if config.name == plan.paper else ": ".join(filter(None, (config.name, table)))
    listed = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in facts.items())
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="quiet">{_text(where(config, result))}</p>',
        "<h2>The table</h2>",
        *_tables(result.rows),
        *notes(config, plan),
        "<h2>What the numbers show</h2>",
        *(_figure(name, path) for name, path in figures.items()),
        "<h2>The same noise, side by side</h2>",
        "<p>Every row starts from one noise (and has one prompt); columns differ in guidance alone.</p>",
        _grid(plan, pictures, records),
        "<h2>How it was made</h2>",
        f'<div class="scroll"><table>{listed}</table></div>',
        "<p><code>table.md</code>, <code>table.csv</code>, <code>table.tex</code> and <code>metrics.jsonl</code> "
        "beside this page hold the same numbers, <code>config.yaml</code> all settings, <code>shards/</code> what "
        "they come from.</p>",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{_text(title)}</title>"
    head += f"<style>{CSS}{MORE}</style>"
    return "\n".join(["<!doctype html>", f'<html lang="en"><head>{head}</head>', "<body>", *body, "</body></html>", ""])


def where(config: EvaluateConfig, result: Result) -> str:
    """The run in one line."""
    real = f", against {result.reference} real ones" if result.reference else ""
    return (
        f"{config.model.name}, {config.sampler.name}, {config.steps} steps, {config.schedule.name} schedule; "
        f"N = {config.images} pictures a setting{real}"
    )


def notes(config: EvaluateConfig, plan: Study) -> list[str]:
    """What has to be known to read the table."""
    said = [
        "± is one standard error; that of Fréchet distances is a bootstrap over pictures, reference as given. They are "
        "biased upwards by about const/N, so they compare only at equal N, within this table.",
        f"“− first” is the difference to “{plan.first}” on the same resampled pictures; distances are to its picture "
        "of the same seed.",
    ]
    if plan.paper is not None:
        other = "" if config.model.name == "sdxl" and "inception" in config.features else (
            " This run is of another model, or in other features: orders and trends compare, values do not."
        )  # fmt: skip
        said.append(
            "The paper's columns are of SDXL at 30,000 pictures, FID against MS-COCO 2014, SAG by DDIM and the others "
            f"by Euler; here all share one sampler.{other}"
        )
    return ["<ul>", *(f"<li>{_text(s)}</li>" for s in said), "</ul>"]


def _tables(rows: Sequence[Row]) -> list[str]:
    """Quality, with the paper's figures beside it; below it what is seen in the pictures."""
    shown = columns(rows)
    quality = [column for column in shown if column.key not in PLAIN]
    seen = [column for column in shown if column.key in PLAIN]
    return [_table(rows, quality), *([_table(rows, [shown[0], *seen])] if seen else [])]


def _table(rows: Sequence[Row], shown: Sequence[Column]) -> str:
    def kind(column: int) -> str:
        words = (["number"] if column else []) + (["paper"] if shown[column].paper else [])
        return f' class="{" ".join(words)}"' if words else ""

    head = "".join(f"<th{kind(i)}>{_text(c.head)}</th>" for i, c in enumerate(shown))
    lines = [f"<tr>{head}</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td{kind(i)}>{_text(c.cell(row))}</td>" for i, c in enumerate(shown)) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _grid(plan: Study, pictures: Mapping[str, np.ndarray], records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    heads = "".join(f"<th>{_text(setting)}</th>" for setting in pictures)
    lines, count = [f"<tr><th></th>{heads}</tr>"], min(map(len, pictures.values()))
    texts = plan.texts(range(count))
    for i in range(count):
        cells = "".join(
            f"<td>{_image(images[i], f'{setting}, seed {i}', records[setting][i])}</td>"
            for setting, images in pictures.items()
        )
        text = f"{i}" + (f": {_text(texts[i])}" if texts[i] else "")
        lines.append(f'<tr><td class="text">{text}</td>{cells}</tr>')
    return f'<div class="scroll"><table class="grid">{"".join(lines)}</table></div>'


def _image(pixels: np.ndarray, said: str, record: Mapping[str, Any]) -> str:
    """A picture inline, with its record; a small one is enlarged by whole factors where it is shown, a large one is
    sent smaller."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if image.height > MOST:
        image = image.resize((max(1, round(image.width * MOST / image.height)), MOST), Image.Resampling.LANCZOS)
    factor = max(1, 96 // image.height) if image.height < 96 else 1
    data = base64.b64encode(png(image, record)).decode()
    size = f'width="{image.width * factor}" height="{image.height * factor}"'
    return f'<img {size} alt="{_text(said)}" src="data:image/png;base64,{data}">'


def _figure(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{_text(name)}" src="data:image/png;base64,{data}"></figure>'


def _text(value: Sequence | str) -> str:
    return html.escape(str(value))
