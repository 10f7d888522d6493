"""One evaluation: methods of guidance on the same noise and prompts, measured, as a table next to the paper's numbers.

    <out>/shards/<method>-<digest>/<rows>.safetensors    images, features and scores; there whole or not at all
    <out>/<name>/<id>/  index.html                 the page, which holds its figures and images and works offline
                        table.md, table.tex        metrics.csv, metrics.jsonl: a row a number
                        figures/*.png  config.yaml
                        results.json               written last: which shards the results are of
    <out>/reference/    features of real images

Three stages: shards (any number of workers, each its part), verify (every byte), reduce (whoever finds all shards
whole). The same command resumes where it was stopped, and ends in the same files.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from segresearch import runs
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import EvaluateConfig
from segresearch.config.build import load_model, resolved, usable_device
from segresearch.config.compose import written_config
from segresearch.errors import ConfigError, Ended
from segresearch.evaluation import plots, shards
from segresearch.evaluation.aggregate import Result, aggregate
from segresearch.evaluation.frame import Frame
from segresearch.evaluation.image_metrics import ImageMetric, image_metrics
from segresearch.evaluation.page import examples, page
from segresearch.evaluation.reference import Reference, features, reference
from segresearch.evaluation.sample_shards import (
    Progress,
    Worker,
    missing_arrays,
    required_arrays,
    sample_shards,
    worker,
)  # fmt: skip
from segresearch.evaluation.spec import EvaluationSpec, evaluation_spec, run_identity, with_folders
from segresearch.evaluation.table import latex, markdown, table, to_jsonl
from segresearch.pages import to_csv
from segresearch.plot_style import save
from segresearch.records import figure_record
from segresearch.threads import threads
from segresearch.wandb_log import log_evaluation

if TYPE_CHECKING:
    from segresearch.models import SDXL

VERSION = 3  # of the results
RESULTS, PAGE = "results.json", "index.html"
OF_A_CALL = {"out": "runs", "device": "auto", "stage": "all", "wandb": {"mode": "off"}}  # not of the run


@dataclass(frozen=True)
class Evaluation:
    """What a run left: how many images it sampled in how many seconds, and how many existed.

    result: None where other workers have shards to write, or only one stage was run; `message` says which.
    """

    folder: Path
    sampled: int = 0
    existing: int = 0
    seconds: float = 0.0
    result: Result | None = None
    message: str = ""

    def __str__(self) -> str:
        rate = f" ({self.sampled / self.seconds:.2f} images/s)" if self.sampled and self.seconds else ""
        existing = f", {self.existing} existed already" if self.existing else ""
        counts = f"{self.sampled} images sampled{rate}{existing}" if self.sampled or self.existing else ""
        page_line = "" if self.result is None else f"page: {self.folder / PAGE}"
        return "\n".join(filter(None, [counts, self.message, page_line]))


def evaluate(config: EvaluateConfig, model: "SDXL | None" = None, part: Worker | None = None) -> Evaluation:
    """Sample the missing shards of this worker's part; where all are whole, aggregate them and write the results.

    model: already loaded. part: among several workers; None asks the environment. Raises ConfigError for settings that
    do not fit, CheckpointError for weights that are missing, Ended(4) for shards that are missing or damaged.
    """
    config = resolved(config, model)
    with threads(config.threads):
        spec, part = evaluation_spec(config), part or worker()
        spec = with_folders(spec, resolve_model(config.model.path))
        real = reference(config.reference)
        folder = runs.run_folder(config.out, config.name, run_identity(spec, real.identity()))
        if config.stage == "verify":
            return Evaluation(folder, message=_verified(spec.shards()))
        device = str(usable_device(part.device(config.device)))
        metrics = image_metrics(spec, device)
        _check_counts(config, metrics, len(real))

        def load() -> "SDXL":
            nets = list({control.net: None for control in config.controls.values()})
            return load_model(config.model, device, nets, config.compute) if model is None else model

        start = time.perf_counter()
        try:
            progress = Progress() if config.stage == "reduce" else sample_shards(spec, metrics, part, load)
        except KeyboardInterrupt:
            print("stopped: whole shards are kept; the same command resumes", file=sys.stderr)
            raise
        done = Evaluation(folder, progress.sampled, progress.existing, time.perf_counter() - start)
        if message := _incomplete(spec, metrics, progress, part):
            return dataclasses.replace(done, message=message)
        if config.stage == "shards":
            return dataclasses.replace(done, message=f"all {len(spec.shards())} shards exist")
        result = _results(spec, metrics, real, folder)
        log_evaluation(spec, result, lambda: examples(spec, folder.name), folder)
        return dataclasses.replace(done, result=result)


def _check_counts(config: EvaluateConfig, metrics: Sequence[ImageMetric], real: int) -> None:
    """ConfigError for fewer images than features on either side, before anything is sampled."""
    sides = {f"images: {config.images}": config.images, f"reference: {config.reference}: {real} images": real}
    for extractor in (metric.extractor for metric in metrics if metric.extractor is not None and not config.force):
        if few := next((side for side, count in sides.items() if count <= extractor.dim), None):
            raise ConfigError(f"{few} are too few for {extractor.dim} features ({extractor.name}), whose covariance "
                              f"needs {extractor.dim + 1}; take more, or force=true for biased distances")  # fmt: skip


def _verified(paths: Sequence[Path]) -> str:
    """Read every byte of every shard. Ended(4) for the first that is missing or damaged."""
    if damaged := list(filter(None, map(shards.verify, paths))):
        raise Ended(4, f"{len(damaged)} of {len(paths)} shards are not whole: {damaged[0]}")
    return f"all {len(paths)} shards are whole"


def _incomplete(spec: EvaluationSpec, metrics: Sequence[ImageMetric], progress: Progress, part: Worker) -> str:
    """Which shards are left to other workers, "" for none. Ended(4) where no worker is left to write them."""
    missing = sum(len(missing_arrays(spec, metrics, rows)) for rows in spec.ranges)
    failed = ""
    if progress.failures:
        hint = "try model.dtype=float32 or lower scales"
        failed = f"{missing} shards could not be written: {progress.failures[0]}; {hint}"
        if part.world == 1 or missing == len(progress.failures):
            raise Ended(4, failed)
    if not missing:
        return ""
    message = f"{missing} of {len(spec.shards())} shards are missing"
    if part.world == 1:
        raise Ended(4, f"{message}; the same command without stage= writes them")
    return f"{part} has written its part; {message}, which others write" + (f"; {failed}" if failed else "")


def _results(spec: EvaluationSpec, metrics: Sequence[ImageMetric], real: Reference, folder: Path) -> Result:
    """The results and all files that show them; read where they are of just these shards and settings."""
    config, path = spec.config, folder / RESULTS
    for swept in [*spec.folders.values(), Path(config.out) / "reference", folder, folder / "figures"]:
        shards.sweep(swept)
    sums = []
    for method, rows in ((method, rows) for method in spec.methods for rows in spec.ranges):
        arrays = shards.header(spec.shard(method, rows))["arrays"]
        sums.append([arrays[name]["sha256"] for name in required_arrays(spec, metrics, method, rows)])
    named = [folder.name, config.name, config.model.name, config.n_examples]  # the folder's name is the run's identity
    inputs = runs.digest([VERSION, runs.code_version(), named, [metric.producer for metric in metrics], sums])
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(path.read_text())
        if stored["inputs"] == inputs and all((folder / name).is_file() for name in stored["files"]):
            norms = {method: tuple(steps) for method, steps in stored["norms"].items()}
            return Result(Frame.of(stored["metrics"]), norms, stored["reference_images"])
    result = aggregate(spec, metrics, lambda extractor: features(real, extractor, config.out))
    content = {
        "inputs": inputs, "files": _write(spec, metrics, folder, result), "metrics": result.frame.plain(),
        "norms": result.norms, "reference_images": result.reference_images,
    }  # fmt: skip
    runs.write(path, json.dumps(content, indent=1) + "\n")
    return result


def _write(spec: EvaluationSpec, metrics: Sequence[ImageMetric], folder: Path, result: Result) -> list[str]:
    """Tables, figures and the page; their names in the folder."""
    config, frame = spec.config, result.frame
    texts = {
        "config.yaml": written_config(config, OF_A_CALL), "table.md": markdown(*table(frame)),
        "table.tex": latex(*table(frame)), "metrics.csv": to_csv(frame.plain()),
        "metrics.jsonl": to_jsonl(frame, spec.facts(folder.name, result.reference_images)),
    }  # fmt: skip
    for name, text in texts.items():
        runs.write(folder / name, text)
    figures = plots.draw(spec, result)
    paths = {name: folder / "figures" / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        save(figure, paths[name], figure_record(name, "evaluate", config, OF_A_CALL))
    runs.write(folder / PAGE, page(spec, result, metrics, list(paths.values()), folder.name))
    return [*texts, *(str(path.relative_to(folder)) for path in paths.values()), PAGE]
