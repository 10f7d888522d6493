"""The page of an evaluation: its tables, plots and images in one HTML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segresearch.evaluation.aggregate import Result
from segresearch.evaluation.frame import Frame, Metric
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.evaluation.table import cells, columns
from segresearch.pages import Cell, render
from segresearch.records import png

TALLEST = 256  # pixels that an image of the page is high
SMALLEST = 96  # a smaller one is shown larger


def page(
    spec: EvaluationSpec, result: Result, images: Mapping[str, np.ndarray], plots: Mapping[str, Path],
    facts: Mapping[str, str], records: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:  # fmt: skip
    """The whole page. images: of each method, uint8 (n, 3, h, w), and the records that they carry. facts: a name and a
    text each."""
    name, frame = spec.config.name, result.frame
    paper = f"{spec.paper} of arXiv 2408.00760, on {spec.config.model.name}" if spec.paper else ""
    title = paper if name == spec.paper else ": ".join(filter(None, (name, paper)))
    metrics = columns(frame)
    content = [metric for metric in metrics if metric.group == "content"]
    texts = spec.texts(range(min(map(len, images.values()))))
    rows = [
        [Cell(f"{i}: {text}" if text else f"{i}", "text"),
         *(_image(images[method][i], f"{method}, seed {i}", records[method][i]) for method in images)]
        for i, text in enumerate(texts)
    ]  # fmt: skip
    return render(
        title, [where(spec, result)], "evaluation", plots=list(plots.values()), spec=spec,
        quality=table(frame, [metric for metric in metrics if metric.group != "content"]),
        content=table(frame, content) if content else None, facts=[[Cell(k), Cell(v)] for k, v in facts.items()],
        samples=([Cell(), *map(Cell, images)], rows),
    )  # fmt: skip


def where(spec: EvaluationSpec, result: Result) -> str:
    """The run in one line."""
    config = spec.config
    real = f", against {result.reference_images} real ones" if result.reference_images else ""
    return (
        f"{config.model.name}, {config.sampler.name}, {config.steps} steps, {config.schedule.name} schedule; "
        f"N = {config.images} images a method{real}"
    )


def table(frame: Frame, metrics: list[Metric]) -> tuple[list[Cell], list[list[Cell]]]:
    """Head and rows: a row a method, a column a metric."""
    kinds = [f"number {metric.group}" for metric in metrics]
    head = [Cell("method"), *(Cell(metric.head, kind) for metric, kind in zip(metrics, kinds))]
    return head, [[Cell(m), *map(Cell, cells(frame, m, metrics), kinds)] for m in frame.methods]


def _image(pixels: np.ndarray, description: str, record: Mapping[str, Any]) -> Cell:
    """An image with its record: a small one is enlarged by a whole factor on the page, a large one is sent smaller."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if image.height > TALLEST:
        size = max(1, round(image.width * TALLEST / image.height)), TALLEST
        image = image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, SMALLEST // image.height)
    width, height = image.width * factor, image.height * factor
    return Cell(description, image=png(image, record), width=width, height=height)
