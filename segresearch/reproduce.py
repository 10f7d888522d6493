"""A PNG sampled or drawn again from the record in it, and compared pixel by pixel.

The record's key tells its kind: "guidance" for images of generate and evaluate, "generate" (a whole config) for grids,
"control" for control images, "figure" (with the config of its run) for figures of analyze and evaluate.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segresearch import runs
from segresearch.build import device_kind
from segresearch.config import ControlConfig, EvaluateConfig, GenerateConfig
from segresearch.errors import ConfigError
from segresearch.models.locate import located, located_controlnet
from segresearch.png_metadata import read_record
from segresearch.typed import typed

EXACT = {"precision": "exact"}  # the arithmetic of records without `compute`: they are of a CPU
OF_AN_IMAGE = ("sampler", "schedule", "guidance", "steps", "size", "negative", "model", "prompt", "seed")


@dataclass(frozen=True)
class Reproduction:
    """The new image, its largest difference from the file (of 255), the share of pixels that differ, and notes on what
    differs between the two records."""

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
    record = recorded(path)
    scripts = [key for key in ("generate", "evaluate", "analyze") if isinstance(record.get(key), dict)]
    for holder in (record, *(record[key] for key in scripts)):
        if model is not None and isinstance(holder.get("model"), dict):
            holder["model"]["path"] = model
    if not trust:
        _refuse_foreign_targets(record, path)
    with tempfile.TemporaryDirectory(prefix="segresearch-") as temporary:
        try:
            image, now = _again(record, device, str(out or temporary))
        except ConfigError as error:
            raise ConfigError(f"{path}: its record cannot be followed: {error}") from error
    return compared(path, image, tuple(_differences(_flat(record), _flat(now))))


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
    """The image of a record, and the record that it has now (of figures: what can differ; of control images: {})."""
    if "figure" in record:
        now = {"code": runs.code_version(), "compute": {"device": device_kind(device)}}
        return _opened(_figure(record, device, out)), now
    if "control" in record:
        return _control(record), {}

    from segresearch.generate import generate

    if "generate" in record:
        config = _config(GenerateConfig, record["generate"], device, out, batch_size=_batch_size(record["generate"]))
    else:
        config = _config_of_an_image(record, device, out)
    for controls in (config.controls, *(panel.controls or {} for panel in config.panels)):
        for control in controls.values():
            located_controlnet(control.net, located(config.model.path))  # raises CheckpointError, without a key
    run = generate(config)
    path = run.grid if "generate" in record else next((run.folder / "images").rglob("*.png"))
    return _opened(path), read_record(path) or {}


def _config(kind: Any, settings: Mapping[str, Any], device: str, out: str, **changes: Any) -> Any:
    """Recorded settings as a typed config, to be run here."""
    return typed(kind, {"compute": EXACT, **settings, "device": device, "out": out, **changes})


def _config_of_an_image(record: Mapping[str, Any], device: str, out: str) -> GenerateConfig:
    """The run that samples the one image of a record."""
    for key in OF_AN_IMAGE:
        if key not in record:
            raise ConfigError(f"{key}: missing")
    settings = {key: record[key] for key in OF_AN_IMAGE if key not in ("prompt", "seed")}
    settings["model"] = {key: value for key, value in record["model"].items() if key != "fingerprint"}
    settings["compute"] = {k: v for k, v in record.get("compute", EXACT).items() if k != "device"}
    changes = {"prompts": [record["prompt"]], "seeds": record["seed"], "controls": record.get("controls") or {}}
    config: GenerateConfig = _config(GenerateConfig, settings, device, out, name="again", batch_size=1, **changes)
    return config


def _batch_size(settings: Mapping[str, Any]) -> int:
    return int((settings.get("model") or {}).get("batch_size", 8))


def _figure(record: Mapping[str, Any], device: str, out: str) -> Path:
    """A figure of a run; the run is made, unless it is in `out` already."""
    if "evaluate" in record:
        from segresearch.evaluation.evaluate import evaluate

        config = _config(EvaluateConfig, record["evaluate"], device, out)
        folder = evaluate(dataclasses.replace(config, stage="all")).folder
    elif "analyze" in record:
        from segresearch.analysis.analyze import analyze
        from segresearch.analysis.settings import AnalyzeConfig

        folder = analyze(_config(AnalyzeConfig, record["analyze"], device, out)).folder
    else:
        raise ConfigError("figure: the config of its run is missing")
    path = folder / "figures" / f"{Path(str(record['figure'])).name}.png"
    if not path.is_file():
        raise ConfigError(f"figure: the run has none called {record['figure']!r} here")
    return path


def _control(record: Mapping[str, Any]) -> Image.Image:
    if "settings" not in record:
        raise ConfigError("settings: missing")
    control: ControlConfig = typed(ControlConfig, record["settings"], "control")
    height, width = typed(tuple[int, int], record["size"], "size")
    assert isinstance(control.image, str)

    from segresearch.control_images.prepare import control_png

    return control_png(control, control.image, (height, width))


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _flat(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A grid's record with model and control contents where an image's record has them; others as they are."""
    if "generate" not in record:
        return record
    settings = record["settings"]
    contents = {f"panel {i}": panel["controls"] for i, panel in enumerate(settings["panels"], 1) if "controls" in panel}
    return {"model": settings["model"], "contents": contents, "compute": record.get("compute", {})}


def _differences(record: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line for each difference between the recorded environment and this one."""
    old_contents, new_contents = record.get("contents") or {}, now.get("contents") or {}
    pairs = [("weights", record.get("model", {}).get("fingerprint"), now.get("model", {}).get("fingerprint"))]
    pairs += [(f"contents of control {name}", old_contents[name], new_contents[name])
              for name in old_contents.keys() & new_contents.keys()]  # fmt: skip
    pairs += [("device", record.get("compute", {}).get("device"), now.get("compute", {}).get("device"))]
    pairs += [(f"version of {name}", record.get(key), now.get(key))
              for key, name in (("code", "segresearch"), ("torch", "torch"))]  # fmt: skip
    for name, old, new in pairs:
        if None not in (old, new) and old != new:
            yield f"other {name}: {old} when it was made, {new} here"


def _refuse_foreign_targets(record: Any, path: Path) -> None:
    """ConfigError for a record that would import a function from outside segresearch: PNGs come from anywhere."""
    if isinstance(record, Mapping) and record.get("kind") == "custom":
        target = str(record.get("target"))
        if not target.startswith("segresearch."):
            raise ConfigError(f"{path}: its record calls {target}; look at that function, then add --trust")
    children = record.values() if isinstance(record, Mapping) else record if isinstance(record, list) else ()
    for child in children:
        _refuse_foreign_targets(child, path)
