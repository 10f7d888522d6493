"""A PNG sampled or drawn again from the record in it, and compared pixel by pixel.

A record's key tells its kind: "guidance" of an image, "generate" (a whole config) of a grid, "control" of a control
image, "figure" (with the config of its run) of a figure of analyze or evaluate.
"""

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segresearch.config import AnalyzeConfig, ControlConfig, EvaluateConfig, GenerateConfig, typed
from segresearch.config.build import device_kind
from segresearch.config.validate import modern
from segresearch.errors import ConfigError
from segresearch.fields import Count
from segresearch.foreign import check_shape, refuse_foreign_files, refuse_foreign_targets
from segresearch.records import read_record
from segresearch.runs import code_version

CONFIGS: dict[str, Any] = {"generate": GenerateConfig, "evaluate": EvaluateConfig, "analyze": AnalyzeConfig}
EXACT = {"precision": "exact"}  # the arithmetic of records without `compute`: they are of a CPU
GROWTH = 16  # how much smaller than the image of its record, by the side, a file may be
OF_AN_IMAGE = ("sampler", "schedule", "guidance", "steps", "size", "negative")


@dataclass(frozen=True)
class Reproduction:
    """The new image, its largest difference from the file (of 255), the share of pixels that differ, and notes."""

    image: Image.Image
    largest: int
    share: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        same = "the same in every pixel" if not self.largest else f"{self.share:.2%} of the pixels differ"
        return "\n".join([*self.notes, f"largest pixel difference: {self.largest} of 255 ({same})"])


def reproduce(
    path: Path, model: str | None = None, device: str = "auto", out: Path | None = None, trust: bool = False
) -> Reproduction:
    """Sample or draw the image in `path` again.

    model: in place of the recorded path. out: where a figure's run may exist already; None: a temporary folder. trust:
    open files of this machine and import functions that the record names. ConfigError for a file without a usable
    record, CheckpointError for weights that are missing. Nothing is logged, whatever the record says.
    """
    record = modern(recorded(path))
    for holder in (record, *map(record.get, CONFIGS)):
        if model is not None and isinstance(holder, dict) and isinstance(holder.get("model"), dict):
            holder["model"]["path"] = model
    refuse_foreign_targets(record, path, trust)
    if not trust:
        refuse_foreign_files(record, path, model)
    _refuse_growth(record, path)
    with tempfile.TemporaryDirectory(prefix="segresearch-") as temporary:
        try:
            image, now = _again(record, device, str(out or temporary))
        except ConfigError as error:
            raise ConfigError(f"{path}: its record cannot be followed: {error}") from error
    before, here = _environment(record), _environment(now)
    changed = [name for name in before if None not in (before[name], here.get(name)) and before[name] != here[name]]
    notes = [f"other {name}: {before[name]} when it was made, {here[name]} here" for name in changed]
    old, new = Image.open(path).convert("RGB"), image.convert("RGB")
    if new.size != old.size:
        if new.width * old.height != new.height * old.width or new.width < old.width:
            sizes = f"{old.width}×{old.height} pixels, but its record makes {new.width}×{new.height}"
            raise ConfigError(f"{path}: {sizes}; it was changed")
        new = new.resize(old.size, Image.Resampling.LANCZOS)
        notes.append(f"the file is reduced from {image.width}×{image.height}; compared at its own size")
    difference = np.abs(np.asarray(new).astype(int) - np.asarray(old).astype(int)).max(axis=2)  # (h, w, 3) -> (h, w)
    return Reproduction(image, int(difference.max()), float((difference > 0).mean()), tuple(notes))


def recorded(path: Path) -> dict[str, Any]:
    """The record in a PNG. ConfigError where there is none that could be followed."""
    if not path.is_file():
        raise ConfigError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    _refuse_bomb(path)
    record = read_record(path)
    if not isinstance(record, dict):
        hint = "it is not a PNG of segresearch, was cut, or was saved again by another program"
        raise ConfigError(f"{path}: no record in it; {hint}")
    if not record.keys() & {"guidance", "generate", "figure", "size"}:
        raise ConfigError(f"{path}: its record is not complete; an older version wrote it")
    try:
        check_shape(record)
    except ConfigError as error:
        raise ConfigError(f"{path}: its record cannot be followed: {error}") from error
    return record


def _refuse_bomb(path: Path) -> None:
    """ConfigError for an image that says it has more pixels than Pillow's limit; nothing is decoded."""
    try:
        with warnings.catch_warnings(action="error"):
            Image.open(path, formats=["PNG"]).close()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ConfigError(f"{path}: more pixels than the limit of {Image.MAX_IMAGE_PIXELS:,}") from error
    except (OSError, SyntaxError, ValueError):
        pass  # `read_record` has a word for it


def _refuse_growth(record: Mapping[str, Any], path: Path) -> None:
    """ConfigError for a record that would make an image far larger than the file. Sizes of wrong types are refused
    where the settings are read."""
    with Image.open(path) as image:
        most = GROWTH * max(image.size)
    configs = [config for config in (record, *map(record.get, CONFIGS)) if isinstance(config, Mapping)]
    lists = [sizes for config in configs if isinstance(sizes := config.get("sizes"), list)]
    for size in (*(config.get("size") for config in configs), *(size for sizes in lists for size in sizes)):
        if isinstance(size, list) and any(isinstance(side, int) and side > most for side in size):
            new, old = (" × ".join(str(side)[:20] for side in sides[:2]) for sides in (size, image.size[::-1]))
            raise ConfigError(f"{path}: its record makes images of {new} pixels, the file has {old}")


def _again(record: Mapping[str, Any], device: str, out: str) -> tuple[Image.Image, Mapping[str, Any]]:
    """The image of a record, and the record that it has now (of a figure what can differ; of a control image {})."""
    if "control" in record:
        from segresearch.control_images.prepare import control_png

        control: ControlConfig = typed(ControlConfig, record.get("settings"), "settings")
        return control_png(control, str(control.image), typed(tuple[Count, Count], record.get("size"), "size")), {}

    script = next((script for script in CONFIGS if script in record), "")
    settings = record[script] if script else _settings_of_an_image(record)
    defaults: dict[str, Any] = {"compute": EXACT, "batch_size": "auto"}
    here: dict[str, Any] = {"device": device, "out": out, "wandb": {"mode": "off"}}
    config = typed(CONFIGS[script or "generate"], {**defaults, **settings, **here})
    if "figure" in record:
        from segresearch.analysis.analyze import analyze
        from segresearch.evaluation.evaluate import evaluate

        folder = evaluate(config).folder if script == "evaluate" else analyze(config).folder
        path = folder / "figures" / f"{Path(str(record['figure'])).name}.png"
        if not path.is_file():
            raise ConfigError(f"figure: the run has none called {record['figure']!r} here")
        return Image.open(path).convert("RGB"), {"code": code_version(), "compute": {"device": device_kind(device)}}

    from segresearch.generate import generate

    run = generate(config)
    path = run.grid if script else next((run.folder / "images").rglob("*.png"))
    return Image.open(path).convert("RGB"), read_record(path) or {}


def _settings_of_an_image(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that samples the one image of a record."""
    if missing := [key for key in (*OF_AN_IMAGE, "model", "prompt", "seed") if key not in record]:
        raise ConfigError(f"{missing[0]}: missing")
    model = {key: value for key, value in record["model"].items() if key not in ("fingerprint", "parts")}
    compute = {key: value for key, value in record.get("compute", EXACT).items() if key != "device"}
    image = {"prompts": [record["prompt"]], "seeds": record["seed"], "controls": record.get("controls") or {}}
    image |= {key: record[key] for key in ("init", "text") if key in record}
    if isinstance(record["negative"], str):  # in a list it is no name of a file
        image["negative"] = [record["negative"]]
    return {**{key: record[key] for key in OF_AN_IMAGE}, **image, "model": model, "compute": compute, "name": "again"}


def _environment(record: Mapping[str, Any]) -> dict[str, Any]:
    """What an image depends on beside its settings, by its name in a note; None where the record lacks it."""
    run = record["settings"] if "generate" in record else record  # of a grid
    panels = {f"panel {i}": panel.get("controls") for i, panel in enumerate(run.get("panels", ()), 1)}
    contents = {f"contents of control {name}": value for name, value in (run.get("contents") or panels).items()}
    inits = {f"contents of init {name}": value for name, value in run.get("init_contents", {}).items()}
    inits |= {f"init of panel {i}": panel.get("init") for i, panel in enumerate(run.get("panels", ()), 1)}
    return {
        "weights": run.get("model", {}).get("fingerprint"), "parts of the model": run.get("model", {}).get("parts"),
        **contents, **inits,
        "device": record.get("compute", {}).get("device"),
        "version of segresearch": record.get("code"), "version of torch": record.get("torch"),
    }  # fmt: skip

