"""The record that an image or a figure of an evaluation carries, by which `segresearch.reproduce` makes it again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segresearch import runs
from segresearch.build import device_kind
from segresearch.config import EvaluateConfig, GenerateConfig
from segresearch.control_images.identify import Sources
from segresearch.evaluation import shards
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.generate import cut, semantics
from segresearch.models.locate import located
from segresearch.plan import Panel, Row

OF_A_CALL = {"out": "runs", "device": "auto", "stage": "all", "wandb": {"mode": "off"}}  # not of the run


def records(spec: EvaluationSpec, images: range, run: str) -> dict[str, list[dict[str, Any]]]:
    """The records of some images of every method, as `generate` writes them, with the versions of the code that sampled
    their shards. run: the name of the run's folder."""
    config, plan = spec.config, spec
    shown = plan.controls or [()] * images.stop
    rows = tuple(Row(text, i, tuple(shown[i])) for i, text in zip(images, plan.texts(images), strict=True))
    panel = Panel("", config.negative, rows, dict(plan.methods), dict(config.controls))
    place = located(config.model.path)
    sources = Sources([panel], place)
    alike = GenerateConfig(
        config.model, config.sampler, config.schedule, controls=config.controls, steps=config.steps, size=config.size,
        batch_size=max(1, len(images)), device=config.device, compute=config.compute,
    )  # fmt: skip
    semantic = semantics(alike, (panel,), runs.fingerprint(place), sources)
    batches = cut(alike, (panel,), semantic, Path(), sources)
    return {
        (name := str(batch.pictures[0].settings["method"])): [
            {**p.settings, "run": run, **_versions(spec, name, i)} for i, p in zip(images, batch.pictures, strict=True)
        ]
        for batch in batches
    }


def _versions(spec: EvaluationSpec, method: str, i: int) -> dict[str, str]:
    rows = next(rows for rows in spec.ranges if i in rows)
    return shards.versions(spec.shard(method, rows))


def figure_record(config: EvaluateConfig, figure: str) -> Mapping[str, Any]:
    """The record of a figure: all settings of its run."""
    asked = {key: value for key, value in runs.plain(config).items() if key not in OF_A_CALL}
    kind = device_kind(config.device)
    asked["compute"] = runs.plain(config.compute.resolved(kind))
    return {"figure": figure, "code": runs.code_version(), "evaluate": asked, "compute": config.compute.record(kind)}
