"""What a picture of a study carries, so that `segresearch.reproduce` makes it again: the record of generate's."""

from collections.abc import Mapping
from typing import Any

from segresearch import records as image_records
from segresearch import runs
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import EvaluateConfig
from segresearch.control_images.identify import control_records, identify_control
from segresearch.evaluation import shards
from segresearch.evaluation.spec import Study

OF_A_CALL = ("out", "device", "stage", "wandb")


def records(config: EvaluateConfig, plan: Study, images: range, run: str = "") -> dict[str, list[dict[str, Any]]]:
    """Of every setting the records of some pictures, with the versions that their shards were made with, where these
    say so. run: the name of the run's folder."""
    weights = resolve_model(config.model.path)
    controls = {
        name: identify_control(control, [plan.controls[i][k] for i in images], weights, f"controls.{name}")
        for k, (name, control) in enumerate(config.controls.items())
    }
    shared = image_records.run_record(config, runs.fingerprint(weights), run)
    prompts = dict(zip(images, plan.texts(images), strict=True))
    shown = {i: control_records(controls, plan.controls[i] if controls else ()) for i in images}
    return {
        name: [
            image_records.image_record(shared, name, guidance, prompts[i], config.negative, i, shown[i])
            | _versions(plan, name, i)
            for i in images
        ]
        for name, guidance in plan.settings.items()
    }


def _versions(plan: Study, setting: str, i: int) -> dict[str, str]:
    rows = next(rows for rows in plan.ranges if i in rows)
    place = plan.shard(setting, rows) if plan.places else None
    return shards.made(place) if place is not None and place.is_dir() else {}


def figure_record(config: EvaluateConfig, figure: str) -> Mapping[str, Any]:
    """What a figure of a study carries."""
    return image_records.figure_record(figure, "evaluate", config, OF_A_CALL)
