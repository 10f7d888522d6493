"""One evaluation: settings of guidance on the same noise and prompts, measured, as a table beside the paper's figures.

    <out>/shards/<setting>-<digest>/<rows>/        pictures, features and scores; whole or not there
    <out>/<name>/<id>/  index.html                 the page, which holds its figures and pictures and works offline
                        table.md, .csv, .tex       metrics.jsonl: the record
                        figures/*.png  config.yaml
                        results.json               written last: which shards and settings the results are of
    <out>/reference/    features of real pictures

Three steps: shards (any number of workers, each its part), verify (every byte), reduce (whoever finds all shards
whole). The same command goes on where it was stopped, and ends in the same files.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from segresearch import runs
from segresearch.analysis.figures import save
from segresearch.checkpoints.resolve import resolve_model
from segresearch.cli import exit_code, line
from segresearch.config import EvaluateConfig
from segresearch.config.build import device_kind, load_model, of_model, with_batch_size
from segresearch.config.compose import hydra_settings
from segresearch.errors import CheckpointError, ConfigError, Ended
from segresearch.evaluation import plots, reference, sample_shards, shards, table
from segresearch.evaluation.aggregate import Result, reduce
from segresearch.evaluation.image_metrics import Judge, judges
from segresearch.evaluation.page import page, where
from segresearch.evaluation.provenance import figure_record, records
from segresearch.evaluation.spec import Study, placed, run_identity, study
from segresearch.evaluation.wandb_log import mirror_study
from segresearch.evaluation.workers import Worker, worker
from segresearch.models.compute import arithmetic
from segresearch.threads import threads

if TYPE_CHECKING:
    from segresearch.models import SDXL

VERSION = 2  # of the results
RESULTS, PAGE = "results.json", "index.html"
OF_A_CALL = {"out": "runs", "device": "auto", "stage": "all", "wandb": {"mode": "off"}}


@dataclass(frozen=True)
class Evaluation:
    """What a run left. result: None where other workers are still to make shards, or only one step was asked for."""

    folder: Path
    made: int
    found: int
    seconds: float
    result: Result | None = None
    said: str = ""

    def __str__(self) -> str:
        rate = f" ({self.made / self.seconds:.2f} images/s)" if self.made and self.seconds else ""
        counted = f"{self.made} images made{rate}" + (f", {self.found} were there already" if self.found else "")
        lines = [counted] if self.made or self.found else []
        lines += [self.said] if self.said else []
        lines += [f"page: {self.folder / PAGE}"] if self.result is not None else []
        return "\n".join(lines)


def evaluate(config: EvaluateConfig, model: "SDXL | None" = None, place: Worker | None = None) -> Evaluation:
    """Make what is missing of this worker's part; where all is whole, verify nothing more and reduce.

    model: already loaded. place: among several workers; None asks the environment. ValueError for settings that do not
    fit, `Ended` with a code of its own for weights, room and what is not complete.
    """
    config = with_batch_size(of_model(config, model))
    kind = device_kind(config.device)
    with _ending(), threads(config.threads), arithmetic(config.compute.resolved(kind).precision, kind):
        plan, place = study(config), place or worker()
        plan = placed(config, plan, resolve_model(config.model.path))
        real = reference.sources(config)
        folder = runs.run_folder(config.out, config.name, run_identity(config, plan, reference.identity(config, real)))
        if config.stage == "verify":
            return _verified(plan, folder)
        device = place.device(config.device)
        found = judges(config, plan, _usable(device))
        _enough(config, found, len(real))
        start = time.perf_counter()
        made = sample_shards.Made()
        if config.stage != "reduce":

            def load() -> "SDXL":
                nets = list({control.net: None for control in config.controls.values()})
                return load_model(config.model, device, nets, config.compute) if model is None else model

            made = sample_shards.make(config, plan, found, place, load)
        seconds = time.perf_counter() - start
        done = Evaluation(folder, made.made, made.found, seconds)
        missing = sum(len(sample_shards.lacking(config, plan, found, rows)) for rows in plan.ranges)
        if made.failed and (place.world == 1 or missing == len(made.failed)):  # others may still make theirs
            raise Ended(4, _failed(made, missing))
        if missing:
            said = f"{missing} of {len(plan.shards())} shards are missing"
            if place.world == 1:
                raise Ended(4, f"{said}; the same command without stage= makes them")
            failed = f"; {_failed(made, missing)}" if made.failed else ""
            return dataclasses.replace(done, said=f"{place} has made its part; {said}, which others make{failed}")
        if config.stage == "shards":
            return dataclasses.replace(done, said=f"all {len(plan.shards())} shards are there")
        result = _reduced(config, plan, found, folder)
        mirror_study(config.wandb, config, plan, result, lambda: _shown(config, plan), folder)
        return dataclasses.replace(done, result=result)


def _failed(made: sample_shards.Made, missing: int) -> str:
    return f"{missing} shards could not be made: {made.failed[0]}; try model.dtype=float32 or lower scales"


def _usable(device: str) -> str:
    there = torch.cuda.is_available()
    if device.startswith("cuda") and not there:
        raise ConfigError(f"device: {device}: torch finds no CUDA device here; take auto or cpu")
    return ("cuda" if there else "cpu") if device == "auto" else device


def _enough(config: EvaluateConfig, found: Sequence[Judge], real: int) -> None:
    """ConfigError for fewer pictures than features on either side, before anything is sampled."""
    sides = {f"images: {config.images}": config.images, f"reference: {config.reference}: {real} pictures": real}
    for extractor in (judge.extractor for judge in found if judge.extractor is not None and not config.force):
        for side, count in sides.items():
            if count <= extractor.dim:
                raise ConfigError(
                    f"{side} are too few for {extractor.dim} features ({extractor.name}), whose "
                    f"covariance needs {extractor.dim + 1}; take more, or force=true for biased distances"
                )


def _verified(plan: Study, folder: Path) -> Evaluation:
    """Read every byte of every shard. Ended(4) for the first that is missing or damaged."""
    everything = plan.shards()
    wrong = [said for said in map(shards.verify, everything) if said]
    if wrong:
        raise Ended(4, f"{len(wrong)} of {len(everything)} shards are not whole: {wrong[0]}")
    return Evaluation(folder, 0, 0, 0.0, said=f"all {len(everything)} shards are whole")


def _reduced(config: EvaluateConfig, plan: Study, found: Sequence[Judge], folder: Path) -> Result:
    """The results and everything that shows them, unless they are there for just these shards and settings."""
    read = [sample_shards.wanted(config, found, i, rows) for i in range(len(plan.settings)) for rows in plan.ranges]
    sums = [shards.sums(place, keys) for place, keys in zip(plan.shards(), read, strict=True)]
    # the folder is named by the run's identity
    asked = [folder.name, config.name, config.model.name, config.n_examples]
    inputs = runs.digest([VERSION, runs.code_version(), asked, [j.by for j in found], sums])
    for place in plan.places.values():
        shards.sweep(place)
    shards.sweep(Path(config.out) / "reference")
    _sweep(folder)
    path = folder / RESULTS
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(path.read_text())
        if kept["inputs"] == inputs and all((folder / name).is_file() for name in kept["files"]):
            rows = tuple(kept["rows"])
            return Result(rows, {k: tuple(v) for k, v in kept["norms"].items()}, kept["reference"])
    result = reduce(config, plan, found, lambda extractor: reference.features(config, extractor))
    files = _written(config, plan, found, folder, result)
    content = {
        "inputs": inputs,
        "files": files,
        "rows": result.rows,
        "norms": result.norms,
        "reference": result.reference,
    }
    runs.write(path, json.dumps(content, indent=1) + "\n")
    return result


def _written(config: EvaluateConfig, plan: Study, found: Sequence[Judge], folder: Path, result: Result) -> list[str]:
    """Tables, figures and the page; their names in the folder."""
    common = {
        "experiment": config.name, "run": folder.name, "model": config.model.name, "sampler": config.sampler.name,
        "schedule": config.schedule.name, "steps": config.steps, "reference": config.reference,
        "reference_pictures": result.reference,
    }  # fmt: skip
    texts = {
        "config.yaml": written_config(config), "table.md": table.markdown(result.rows),
        "table.csv": table.to_csv(result.rows), "table.tex": table.latex(result.rows),
        "metrics.jsonl": table.to_jsonl(result.rows, common),
    }  # fmt: skip
    for name, text in texts.items():
        runs.write(folder / name, text)
    drawn = plots.draw(plan, result.rows, result.norms, where(config, result))
    paths = {name: folder / "figures" / f"{name}.png" for name in drawn}
    for name, picture in drawn.items():
        save(picture, paths[name], figure_record(config, name))
    pictures = _shown(config, plan)
    facts = {
        "run": folder.name, "code": runs.code_version(), "pictures by": _made(plan), "prompts": _prompts(config, plan),
        "reference": config.reference,
        "measured by": "; ".join(f"{judge.name} ({judge.by[:12]})" for judge in found),
    }  # fmt: skip
    said = records(config, plan, range(min(config.n_examples, config.images)), folder.name)
    runs.write(folder / PAGE, page(config, plan, result, pictures, paths, facts, said))
    return [*texts, *(str(p.relative_to(folder)) for p in paths.values()), PAGE]


def _shown(config: EvaluateConfig, plan: Study) -> dict[str, np.ndarray]:
    """Of every setting the pictures that are shown, uint8 (n, 3, h, w)."""
    some = [rows for rows in plan.ranges if rows.start < config.n_examples]
    return {
        setting: np.concatenate([shards.load(plan.shard(setting, rows), sample_shards.IMAGES) for rows in some])[
            : config.n_examples
        ]
        for setting in plan.settings
    }


def _made(plan: Study) -> str:
    """The versions that made the pictures; a line on stderr where they are not those of now."""
    now = runs.versions()
    found = {tuple(sorted(made.items())) for made in map(shards.made, plan.shards()) if made}
    if found - {tuple(sorted(now.items()))}:
        said = "the pictures are not all of this code and torch; a new `out` makes them all anew"
        print(f"{said}: {_named(found)}", file=sys.stderr)
    return _named(found) or "not known"


def _named(found: set[tuple[tuple[str, str], ...]]) -> str:
    return "; ".join(", ".join(f"{key} {value}" for key, value in one) for one in sorted(found))


def _prompts(config: EvaluateConfig, plan: Study) -> str:
    if not any(plan.prompts):
        return "none (unconditional)"
    return config.prompts if isinstance(config.prompts, str) else f"{len(plan.prompts)} texts"


def written_config(config: EvaluateConfig) -> str:
    """config.yaml: every setting in full, in a form that evaluate.py takes back."""
    from omegaconf import OmegaConf

    parts = (hydra_settings(), runs.plain(config) | OF_A_CALL)
    return "".join(OmegaConf.to_yaml(OmegaConf.create(part)) for part in parts)


def _sweep(folder: Path) -> None:
    """Remove what `runs.replacing` left in a process that was killed."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("figures/.*.tmp")]:
        if runs.abandoned(path):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Errors that have a code of their own, as `Ended`."""
    try:
        yield
    except shards.Damaged as error:
        raise Ended(4, str(error)) from error
    except (CheckpointError, OSError, MemoryError, RuntimeError) as error:
        code = exit_code(error)
        if code not in (3, 5):
            raise
        raise Ended(code, line(error)) from error
    except KeyboardInterrupt:
        print("stopped: whole shards are kept; the same command goes on", file=sys.stderr)
        raise
