"""The record that an image of an evaluation carries, by which `segresearch.reproduce` samples it again."""

from typing import Any

from segresearch import runs
from segresearch.checkpoints.resolve import resolve_model
from segresearch.control_images.identify import control_records, identify_controls
from segresearch.evaluation import shards
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.records import image_record, run_record


def records(spec: EvaluationSpec, images: range, run: str) -> dict[str, list[dict[str, Any]]]:
    """By method, the records of the images of these seeds, with the versions of the code that sampled their shards.

    run: the name of the run's folder.
    """
    config, model = spec.config, resolve_model(spec.config.model.path)
    shared = run_record(config, runs.fingerprint(model), run)
    control_images = [spec.controls[i] if spec.controls else () for i in images]
    identified = identify_controls(config.controls, control_images, model)
    by_control = [control_records(identified, row) for row in control_images]
    ranges = [next(rows for rows in spec.ranges if i in rows) for i in images]
    return {
        method: [
            image_record({**shared, **shards.versions(spec.shard(method, rows))}, method, guidance, prompt=prompt,
                         negative=config.negative, seed=i, **controls)
            for i, rows, prompt, controls in zip(images, ranges, spec.texts(images), by_control, strict=True)
        ]
        for method, guidance in spec.methods.items()
    }  # fmt: skip
