"""A PNG sampled or drawn again from the record in it, and compared pixel by pixel.

The record's key tells its kind: "guidance" for images of generate and evaluate, "generate" (a whole config) for grids,
"control" for control images, "figure" (with the config of its run) for figures of analyze and evaluate.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segresearch import runs
from segresearch.checkpoints.resolve import resolve_controlnet, resolve_model
from segresearch.config import AnalyzeConfig, ControlConfig, EvaluateConfig, GenerateConfig, typed
from segresearch.config.build import device_kind, refuse_foreign
from segresearch.config.validate import modern
from segresearch.errors import ConfigError
from segresearch.png_metadata import read_record

EXACT = {"precision": "exact"}  # the arithmetic of records without `compute`: they are of a CPU
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

    model: a folder or file in place of the recorded one. out: the folder of runs, where a figure's run may exist
    already; None: a temporary one. trust: import functions outside segresearch that the record names. ConfigError for a
    file without a usable record, CheckpointError for weights that are missing.
    """
    record = modern(recorded(path))
    for holder in (record, *(record.get(script) for script in ("generate", "evaluate", "analyze"))):
        if model is not None and isinstance(holder, dict) and isinstance(holder.get("model"), dict):
            holder["model"]["path"] = model
    _refuse_foreign_targets(record, path, trust)
    with tempfile.TemporaryDirectory(prefix="segresearch-") as temporary:
        try:
            image, now = _again(record, device, str(out or temporary))
        except ConfigError as error:
            raise ConfigError(f"{path}: its record cannot be followed: {error}") from error
    old, new = _environment(record), _environment(now)
    names = [name for name in old if None not in (old[name], new.get(name)) and old[name] != new[name]]
    return compared(path, image, tuple(f"other {n}: {old[n]} when it was made, {new[n]} here" for n in names))


def recorded(path: Path) -> dict[str, Any]:
    """The record in a PNG. ConfigError where there is none that could be followed."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    record = read_record(path)
    if not isinstance(record, dict):
        raise ConfigError(
            f"{path}: no record in it; it is not a PNG of segresearch, was cut, or was saved again by another program"
        )
    if not any(key in record for key in ("guidance", "generate", "figure")) and "size" not in record:
        raise ConfigError(f"{path}: its record is not complete; an older version wrote it")
    return record


def compared(path: Path, image: Image.Image, notes: tuple[str, ...] = ()) -> Reproduction:
    """`image` against the one in `path`, at the size of the file where that was reduced."""
    old, new = _opened(path), image.convert("RGB")
    if new.size != old.size:
        if new.width * old.height != new.height * old.width or new.width < old.width:
            sizes = f"{old.width}×{old.height} pixels, but its record makes {new.width}×{new.height}"
            raise ConfigError(f"{path}: {sizes}; it was changed")
        new = new.resize(old.size, Image.Resampling.LANCZOS)
        notes = (*notes, f"the file is reduced from {image.width}×{image.height}; compared at its own size")
    difference = np.abs(np.asarray(new).astype(int) - np.asarray(old).astype(int)).max(axis=2)  # (h, w, 3) -> (h, w)
    return Reproduction(image, int(difference.max()), float((difference > 0).mean()), notes)


def _again(record: Mapping[str, Any], device: str, out: str) -> tuple[Image.Image, Mapping[str, Any]]:
    """The image of a record, and the record that it has now (of a figure what can differ; of a control image {})."""
    if "figure" in record:
        now = {"code": runs.code_version(), "compute": {"device": device_kind(device)}}
        return _opened(_figure(record, device, out)), now
    if "control" in record:
        if "settings" not in record:
            raise ConfigError("settings: missing")
        control: ControlConfig = typed(ControlConfig, record["settings"], "control")

        from segresearch.control_images.prepare import control_png

        return control_png(control, str(control.image), typed(tuple[int, int], record["size"], "size")), {}

    from segresearch.generate import generate

    settings = record["generate"] if "generate" in record else _settings_of_an_image(record)
    config: GenerateConfig = _config(GenerateConfig, settings, device, out)
    for controls in (config.controls, *(panel.controls or {} for panel in config.panels)):
        for control in controls.values():
            resolve_controlnet(control.net, resolve_model(config.model.path))  # CheckpointError where it is missing
    run = generate(config)
    path = run.grid if "generate" in record else next((run.folder / "images").rglob("*.png"))
    return _opened(path), read_record(path) or {}


def _config(kind: Any, settings: Mapping[str, Any], device: str, out: str) -> Any:
    """Recorded settings as a typed config, to be run here."""
    batch_size = {"batch_size": "auto"} if kind is GenerateConfig else {}
    return typed(kind, {"compute": EXACT, **batch_size, **settings, "device": device, "out": out})


def _settings_of_an_image(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that samples the one image of a record."""
    for key in (*OF_AN_IMAGE, "model", "prompt", "seed"):
        if key not in record:
            raise ConfigError(f"{key}: missing")
    return {key: record[key] for key in OF_AN_IMAGE} | {
        "model": {key: value for key, value in record["model"].items() if key != "fingerprint"},
        "compute": {key: value for key, value in record.get("compute", EXACT).items() if key != "device"},
        "prompts": [record["prompt"]], "seeds": record["seed"], "controls": record.get("controls") or {},
        "name": "again",
    }  # fmt: skip


def _figure(record: Mapping[str, Any], device: str, out: str) -> Path:
    """A figure of a run, which is run first unless it is in `out` already."""
    if "evaluate" in record:
        from segresearch.evaluation.evaluate import evaluate

        config = _config(EvaluateConfig, record["evaluate"], device, out)
        folder = evaluate(dataclasses.replace(config, stage="all")).folder
    elif "analyze" in record:
        from segresearch.analysis.analyze import analyze

        folder = analyze(_config(AnalyzeConfig, record["analyze"], device, out)).folder
    else:
        raise ConfigError("figure: the config of its run is missing")
    path = folder / "figures" / f"{Path(str(record['figure'])).name}.png"
    if not path.is_file():
        raise ConfigError(f"figure: the run has none called {record['figure']!r} here")
    return path


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _environment(record: Mapping[str, Any]) -> dict[str, Any]:
    """What an image depends on beside its settings, by its name in a note; None where the record lacks it."""
    run = record["settings"] if "generate" in record else record
    panels = {f"panel {i}": panel.get("controls") for i, panel in enumerate(run.get("panels", ()), 1)}
    contents = {f"contents of control {name}": value for name, value in (run.get("contents") or panels).items()}
    return {
        "weights": run.get("model", {}).get("fingerprint"), **contents,
        "device": record.get("compute", {}).get("device"),
        "version of segresearch": record.get("code"), "version of torch": record.get("torch"),
    }  # fmt: skip


def _refuse_foreign_targets(record: Any, path: Path, trust: bool) -> None:
    """ConfigError for a record that would import a function from outside segresearch: PNGs come from anywhere."""
    if isinstance(record, Mapping) and record.get("kind") == "custom":
        target = str(record.get("target"))
        if not trust and not target.startswith("segresearch."):
            raise ConfigError(f"{path}: its record calls {target}; look at that function, then add --trust")
        refuse_foreign(target, f"{path}: its record")
    children = record.values() if isinstance(record, Mapping) else record if isinstance(record, list) else ()
    for child in children:
        _refuse_foreign_targets(child, path, trust)
