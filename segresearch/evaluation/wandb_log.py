"""A finished study in Weights & Biases: one group an experiment; in it a W&B run for every setting, and one for all."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segresearch import runs
from segresearch.config import CFGTerm, EvaluateConfig, GuidanceConfig, PerturbedTerm
from segresearch.config.expand import slug
from segresearch.evaluation.aggregate import Result
from segresearch.evaluation.provenance import records
from segresearch.evaluation.spec import Study
from segresearch.guidance import SEG
from segresearch.png_metadata import save_png
from segresearch.tracking import (
    GUIDANCE,
    PICTURES,
    SIDE_BY_SIDE,
    TABLE,
    Mirror,
    WandbConfig,
    numbered,
    once,
    refused,
)


def mirror_study(
    wandb: WandbConfig, config: EvaluateConfig, plan: Study, result: Result,
    pictures: Callable[[], Mapping[str, np.ndarray]], folder: Path,
) -> bool:  # fmt: skip
    """Mirror the results in `folder` below <out>/wandb, once; whether it was done now. Never raises but for an
    interrupt. pictures: of each setting those of the first seeds, uint8 (n, 3, h, w)."""
    if wandb.mode == "off":
        return False
    try:
        with tempfile.TemporaryDirectory(prefix="segresearch-") as place:
            made = mirrors(config, plan, result, pictures(), folder, Path(place))
            return once(wandb, Path(config.out), made)
    except Exception as error:
        refused(error, folder)
        return False


def mirrors(
    config: EvaluateConfig, plan: Study, result: Result, pictures: Mapping[str, np.ndarray], folder: Path, place: Path
) -> list[Mirror]:
    """The W&B runs of a study. place: where their pictures are written."""
    count = min(map(len, pictures.values()))
    texts, files = plan.texts(range(count)), _files(config, plan, pictures, count, folder, place)
    common = {
        "experiment": config.name, "run": folder.name, "model": config.model.name, "sampler": config.sampler.name,
        "schedule": config.schedule.name, "steps": config.steps, "images": config.images, "code": runs.code_version(),
        "reference": config.reference, "reference_pictures": result.reference,
    }  # fmt: skip
    found = []
    for row in result.rows:
        setting = row["setting"]
        shown = [
            {"seed": i, "prompt": text, "picture": path}
            for i, (text, path) in enumerate(zip(texts, files[setting], strict=True))
        ]
        captions = [(path, f"seed {i}" + (f": {text}" if text else ""))
                    for i, (text, path) in enumerate(zip(texts, files[setting], strict=True))]  # fmt: skip
        norms = result.norms.get(setting, ())
        found.append(Mirror(
            setting, config.name, "setting", settings={**common, **facts(setting, plan.settings[setting])},
            metrics={key: value for key, value in row.items() if isinstance(value, int | float)},
            series={GUIDANCE: norms} if norms else {}, tables={"picture table": shown}, images={PICTURES: captions},
        ))  # fmt: skip
    together = [
        {"seed": i, "prompt": texts[i], **{setting: files[setting][i] for setting in files}} for i in range(count)
    ]
    figures = {path.stem: path for path in sorted((folder / "figures").glob("*.png"))}
    whole = Mirror(
        f"{config.name} {folder.name}", config.name, "evaluation", settings={**common, "all": runs.plain(config)},
        tables={TABLE: list(result.rows), SIDE_BY_SIDE: together}, images=dict(figures),
    )  # fmt: skip
    return numbered([*found, whole], [folder.name, common, result.rows])


def facts(setting: str, guidance: GuidanceConfig) -> dict[str, Any]:
    """What plots and filters of W&B are about. blur: σ/(1 + σ), which puts σ from 0 to ∞ on an axis from 0 to 1."""
    from segresearch.evaluation.plots import method

    said: dict[str, Any] = {"setting": setting, "method": method(guidance), "guidance": runs.plain(guidance)}
    for term in guidance.terms.values():
        if isinstance(term, CFGTerm):
            said["cfg"] = runs.plain(term.weight)
        elif isinstance(term, PerturbedTerm):
            said["scale"] = runs.plain(term.scale)
            if isinstance(term.perturbation, SEG):
                sigma = term.perturbation.sigma
                said |= {"sigma": runs.plain(sigma), "blur": 1.0 if sigma == float("inf") else sigma / (1 + sigma)}
    if guidance.sag is not None:
        said["scale"] = runs.plain(guidance.sag.scale)
    return said


def _files(
    config: EvaluateConfig, plan: Study, pictures: Mapping[str, np.ndarray], count: int, folder: Path, place: Path
) -> dict[str, list[Path]]:
    said = records(config, plan, range(count), folder.name)
    found: dict[str, list[Path]] = {}
    for setting, images in pictures.items():
        found[setting] = [place / slug(setting) / f"seed{i}.png" for i in range(count)]
        for i, path in enumerate(found[setting]):
            save_png(Image.fromarray(np.ascontiguousarray(images[i].transpose(1, 2, 0))), path, said[setting][i])
    return found
