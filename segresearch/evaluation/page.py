"""The page of an evaluation: its tables, plots and images in one HTML file; the images carry their records."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from segresearch import runs
from segresearch.checkpoints.resolve import resolve_model
from segresearch.control_images.identify import control_records, identify_controls
from segresearch.evaluation import shards
from segresearch.evaluation.aggregate import Result
from segresearch.evaluation.image_metrics import ImageMetric
from segresearch.evaluation.sample_shards import IMAGES
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.evaluation.table import table
from segresearch.pages import Cell, render
from segresearch.records import image_record, png, run_record

TALLEST = 256  # pixels that an image of the page is high
SMALLEST = 96  # a smaller one is shown larger
Example = tuple[Image.Image, dict[str, Any]]  # an image, and the record by which `segresearch.reproduce` repeats it


def examples(spec: EvaluationSpec, run: str) -> dict[str, list[Example]]:
    """Of each method the images of the first seeds, which the page and W&B show. run: the name of the run's folder."""
    config, model = spec.config, resolve_model(spec.config.model.path)
    shared = run_record(config, runs.fingerprint(model), run)
    seeds = range(min(config.n_examples, config.images))
    control_images = [spec.controls[i] if spec.controls else () for i in seeds]
    identified = identify_controls(config.controls, control_images, model)
    controls, texts = [control_records(identified, row) for row in control_images], spec.texts(seeds)
    shown: dict[str, list[Example]] = {method: [] for method in spec.methods}
    for method, guidance in spec.methods.items():
        for path, rows in ((spec.shard(method, rows), rows) for rows in spec.ranges if rows.start in seeds):
            versions = shards.header(path)["versions"]  # of the code that sampled the shard
            for i, pixels in zip(seeds[rows.start : rows.stop], shards.load(path, IMAGES)):
                sampled = {**shared, **versions}
                image = {"prompt": texts[i], "negative": config.negative, "seed": i, **controls[i]}
                record = image_record(sampled, method, guidance, **image)
                shown[method].append((Image.fromarray(pixels.transpose(1, 2, 0).copy()), record))
    return shown


def page(
    spec: EvaluationSpec, result: Result, metrics: Iterable[ImageMetric], plots: Sequence[Path], run: str
) -> str:  # fmt: skip
    """The whole page. plots: PNG files. run: the name of the run's folder."""
    config = spec.config
    paper = f"{spec.paper} of arXiv 2408.00760, on {config.model.name}" if spec.paper else ""
    title = paper if config.name == spec.paper else ": ".join(filter(None, (config.name, paper)))
    prompts = config.prompts if isinstance(config.prompts, str) else f"{len(spec.prompts)} texts"
    facts = {
        "run": run, "code": runs.code_version(), "images sampled by": sampled_by(spec),
        "prompts": prompts if any(spec.prompts) else "none (unconditional)", "reference": config.reference,
        "measured by": "; ".join(f"{metric.array} ({metric.producer[:12]})" for metric in metrics),
    }  # fmt: skip
    shown = examples(spec, run)
    samples = [
        [Cell(f"{i}: {text}" if (text := row[0][1]["prompt"]) else f"{i}", "text"), *(_cell(*each) for each in row)]
        for i, row in enumerate(zip(*shown.values(), strict=True))
    ]
    return render(
        title, [spec.describe(result.reference_images)], "evaluation", plots=plots, spec=spec,
        quality=table(result.frame, groups=("quality", "paper")), content=table(result.frame, groups=("content",)),
        samples=[[Cell(), *map(Cell, shown)], *samples], facts=[[Cell(k), Cell(v)] for k, v in facts.items()],
    )  # fmt: skip


def sampled_by(spec: EvaluationSpec) -> str:
    """The versions of the code that sampled the images; a line on stderr where they are not the current ones."""

    def text(versions: Mapping[str, str]) -> str:
        return ", ".join(f"{name} {version}" for name, version in versions.items())

    sampled = sorted({text(shards.header(path)["versions"]) for path in spec.shards()})
    if sampled != [text(runs.versions())]:
        hint = "not all images are of this code and torch; a new `out` samples them all again"
        print(f"{hint}: {'; '.join(sampled)}", file=sys.stderr)
    return "; ".join(sampled)


def _cell(image: Image.Image, record: Mapping[str, Any]) -> Cell:
    """A small image is enlarged by a whole factor on the page, a large one is sent smaller."""
    if image.height > TALLEST:
        size = max(1, round(image.width * TALLEST / image.height)), TALLEST
        image = image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, SMALLEST // image.height)
    text = f"{record['method']}, seed {record['seed']}"
    return Cell(text, image=png(image, record), width=image.width * factor, height=image.height * factor)
