"""What a picture of a study carries, so that `segresearch.reproduce` makes it again: the record of generate's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segresearch import runs
from segresearch.build import device_kind
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import EvaluateConfig, GenerateConfig
from segresearch.control_images.identify import Sources
from segresearch.evaluation import shards
from segresearch.evaluation.spec import Study
from segresearch.generate import cut, semantics
from segresearch.plan import Panel, Row


def records(config: EvaluateConfig, plan: Study, images: range, run: str = "") -> dict[str, list[dict[str, Any]]]:
    """Of every setting the records of some pictures, with the versions that their shards were made with, where these
    say so. run: the name of the run's folder."""
    shown = plan.controls or [()] * images.stop
    rows = tuple(Row(text, i, tuple(shown[i])) for i, text in zip(images, plan.texts(images), strict=True))
    panel = Panel("", config.negative, rows, dict(plan.settings), dict(config.controls))
    place = resolve_model(config.model.path)
    sources = Sources([panel], place)
    alike = GenerateConfig(
        config.model, config.sampler, config.schedule, controls=config.controls, steps=config.steps, size=config.size,
        batch_size=max(1, len(images)), device=config.device, compute=config.compute,
    )  # fmt: skip
    semantic = semantics(alike, (panel,), runs.fingerprint(place), sources)
    batches = cut(alike, (panel,), semantic, Path(), sources)
    return {
        (name := str(batch.pictures[0].settings["method"])): [
            {**p.settings, "run": run, **_versions(plan, name, i)} for i, p in zip(images, batch.pictures, strict=True)
        ]
        for batch in batches
    }


def _versions(plan: Study, setting: str, i: int) -> dict[str, str]:
    rows = next(rows for rows in plan.ranges if i in rows)
    place = plan.shard(setting, rows) if plan.places else None
    return shards.made(place) if place is not None and place.is_dir() else {}


def figure_record(config: EvaluateConfig, figure: str) -> Mapping[str, Any]:
    """What a figure of a study carries."""
    of_a_call = ("out", "device", "stage", "wandb")
    asked = {key: value for key, value in runs.plain(config).items() if key not in of_a_call}
    kind = device_kind(config.device)
    asked["compute"] = runs.plain(config.compute.resolved(kind))
    compute = config.compute.record(kind)
    return {"figure": figure, "code": runs.code_version(), "evaluate": asked, "compute": compute}
