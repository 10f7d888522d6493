"""One evaluation: methods of guidance on the same noise and prompts, measured, as a table next to the paper's numbers.

    <out>/shards/<method>-<digest>/<rows>.safetensors    images, features and scores; there whole or not at all
    <out>/<name>/<id>/  index.html                 the page, which holds its figures and images and works offline
                        table.md, table.tex        metrics.csv, metrics.jsonl: a row a number
                        figures/*.png  config.yaml    diagnostics.csv, where they are asked for
                        results.json               written last: which shards the results are of
    <out>/reference/    features of real images

Three stages: shards (any number of workers, each its part), verify (every byte), reduce (whoever finds all shards
whole). The same command resumes where it was stopped, writes damaged files again, and ends in the same files.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segresearch import runs
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import EvaluateConfig
from segresearch.config.build import configured_model, resolved, usable_device
from segresearch.errors import ConfigError, Ended
from segresearch.evaluation import branches, outputs, results, shards
from segresearch.evaluation.aggregate import Result
from segresearch.evaluation.frame import RESULTS
from segresearch.evaluation.image_metrics import image_metrics
from segresearch.evaluation.reference_images import Reference, reference
from segresearch.evaluation.sample_shards import (
    Progress,
    Worker,
    await_late,
    incomplete,
    sample_shards,
    worker,
)
from segresearch.evaluation.spec import EvaluationSpec, evaluation_spec, run_identity, with_folders
from segresearch.threads import threads

if TYPE_CHECKING:
    from segresearch.models import StableDiffusion


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
        page = "" if self.result is None else f"page: {self.folder / outputs.PAGE}"
        return "\n".join(filter(None, [counts, self.message, page]))


def evaluate(config: EvaluateConfig, model: "StableDiffusion | None" = None, part: Worker | None = None) -> Evaluation:
    """Sample the missing shards of this worker's part; where all are whole, aggregate them and write the results.

    model: already loaded. part: among several workers; None asks the environment. Raises ConfigError for settings that
    do not fit, CheckpointError for weights that are missing, Ended(4) for shards that are missing or damaged.
    """
    config = resolved(config, model)
    with threads(config.threads):
        part = part or worker()
        spec = with_folders(evaluation_spec(config), resolve_model(config.model.path))
        count, real = len(spec.shards()), reference(config.reference)
        folder = runs.run_folder(config.out, config.name, run_identity(spec, real.identity()))
        if config.stage == "verify":
            if damaged := list(filter(None, map(shards.verify, spec.shards()))):
                raise Ended(4, f"{len(damaged)} of {count} shards are not whole: {damaged[0]}")
            remark = shards.unplaced(spec.shards())
            return Evaluation(folder, message=f"all {count} shards are whole" + (f"; {remark}" if remark else ""))
        device = str(usable_device(part.device(config.device)))
        spec = dataclasses.replace(spec, metrics=image_metrics(spec, device))
        _check_counts(spec, len(real))
        if not (folder / RESULTS).is_file():  # a finished run is shown where nothing can be written
            runs.create(folder)
        if config.stage != "reduce":
            for path in results.later_shards(part.part(spec.ranges), spec, folder):
                results.drop_unless_whole(path)

        @functools.cache
        def load(dtype: Any = None) -> "StableDiffusion":
            if model is not None and dtype in (None, config.model.dtype):
                return model
            nets = list({control.net: None for control in config.controls.values()})
            settings = config.model if dtype is None else dataclasses.replace(config.model, dtype=dtype)
            return configured_model(settings, device, nets, config.compute)

        start = time.perf_counter()
        try:
            progress = Progress() if config.stage == "reduce" else sample_shards(
                spec, part, load, outputs.mirrored(spec, folder.name, len(real), part)
            )
            diagnosed = None if config.diagnostics is None else branches.file_of(spec, real)
            if diagnosed and config.stage != "reduce" and part.rank == 0 and not branches.read(diagnosed):
                branches.write(spec, real, load, diagnosed)
        except KeyboardInterrupt as stop:
            stop.args = (f"{str(stop) or 'stopped'}: whole shards are kept",)
            raise
        done = Evaluation(folder, progress.sampled, progress.existing, time.perf_counter() - start)
        if not progress.failures:
            await_late(spec, part)
        if message := incomplete(spec, progress, part):
            return dataclasses.replace(done, message=message)
        if diagnosed and not branches.read(diagnosed):
            if part.world == 1:
                raise Ended(4, f"{diagnosed}: the diagnostics are missing; the same command without stage= writes them")
            return dataclasses.replace(done, message="the diagnostics are missing, which the first worker writes")
        if config.stage == "shards":
            return dataclasses.replace(done, message=f"all {count} shards exist")
        with runs.locked(config.out, f"the tables of {folder}", wait=part.world == 1) as held:
            if not held:
                return dataclasses.replace(done, message=f"all {count} shards exist; another worker makes the tables")
            result, more = _results(spec, real, folder, diagnosed, load)
            if part.world == 1:
                results.note_look(spec, folder)
            outputs.log_evaluation(spec, result, folder)
        return dataclasses.replace(done, result=result, sampled=done.sampled + more, existing=done.existing - more)


def _check_counts(spec: EvaluationSpec, real: int) -> None:
    """ConfigError for fewer images than features on either side, before anything is sampled."""
    config = spec.config
    sides = {f"images: {config.images}": config.images, f"reference: {config.reference}: {real} images": real}
    for extractor in (metric.extractor for metric in spec.metrics if metric.extractor is not None and not config.force):
        if few := next((side for side, count in sides.items() if count <= extractor.dim), None):
            raise ConfigError(f"{few} are too few for {extractor.dim} features ({extractor.name}), whose covariance "
                              f"needs {extractor.dim + 1}; take more, or force=true for biased distances")  # fmt: skip


def _results(
    spec: EvaluationSpec, real: Reference, folder: Path, diagnosed: Path | None, load: Callable[[], "StableDiffusion"]
) -> tuple[Result, int]:
    """The results, and how many images were sampled again: those of shards that prove to be damaged as they are read.
    Damaged where the stage does not sample."""
    count = 0
    for _ in spec.shards():
        try:
            return results.results(spec, real, folder, diagnosed), count
        except shards.Damaged as error:
            if spec.config.stage == "reduce":
                raise
            shards.drop(error)
        progress = sample_shards(spec, Worker(), load)
        incomplete(spec, progress, Worker())  # Ended where it cannot be written
        count += progress.sampled
    return results.results(spec, real, folder, diagnosed), count
