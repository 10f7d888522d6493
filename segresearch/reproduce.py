"""A PNG made again from the record in it, and compared pixel by pixel.

What there is: pictures of generate and evaluate (key "guidance"), grids ("generate": a whole config), control images
("control"), figures of analyze and evaluate ("figure", with the config of their run).
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
from segresearch.checkpoints.resolve import resolve_controlnet, resolve_model
from segresearch.config import ControlConfig, EvaluateConfig, GenerateConfig
from segresearch.errors import ConfigError
from segresearch.images import read_settings
from segresearch.typed import typed

EXACT = {"precision": "exact"}  # of records without a word on it, which are of a CPU
OF_A_PICTURE = ("sampler", "schedule", "guidance", "steps", "size", "negative")


@dataclass(frozen=True)
class Reproduction:
    """The picture that was made, how far it is from the one that was given, and what differs between their records."""

    image: Image.Image
    largest: int
    share: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        same = "the same in every pixel" if not self.largest else f"{self.share:.2%} of the pixels differ"
        return "\n".join([*self.notes, f"largest pixel difference: {self.largest} of 255 ({same})"])


def reproduce(path: Path, model: str | None = None, device: str = "auto", out: Path | None = None,
              trust: bool = False) -> Reproduction:  # fmt: skip
    """Make the picture in `path` again.

    model: a folder or file in place of the one that is recorded. out: where runs are made and found, for figures of
    runs that are there already; None: a temporary folder. trust: import functions outside segresearch that the record
    names. ConfigError for a file without a record that can be used, CheckpointError for weights that are missing.
    """
    record = recorded(path)
    if model is not None:
        _moved(record, model)
    if not trust:
        _refuse_strangers(record, path)
    with tempfile.TemporaryDirectory(prefix="segresearch-") as temporary:
        try:
            made, notes = _made(record, device, str(out or temporary))
        except ConfigError as error:
            raise ConfigError(f"{path}: its record cannot be followed: {error}") from error
    return compared(path, made, notes)


def recorded(path: Path) -> dict[str, Any]:
    """The record in a PNG. ConfigError where there is none that could be followed."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    record = read_settings(path)
    if not isinstance(record, dict):
        raise ConfigError(
            f"{path}: no record in it; it is not a PNG of segresearch, was cut, or was saved again by another program"
        )
    if not any(key in record for key in ("guidance", "generate", "figure")) and "size" not in record:
        raise ConfigError(f"{path}: its record does not say all that it needs; an older version wrote it")
    return record


def compared(path: Path, made: Image.Image, notes: tuple[str, ...] = ()) -> Reproduction:
    """`made` against the picture in `path`; at its size, where that was reduced."""
    with Image.open(path) as image:
        given = image.convert("RGB")
    shown = made.convert("RGB")
    if shown.size != given.size:
        if shown.width * given.height != shown.height * given.width or shown.width < given.width:
            raise ConfigError(f"{path}: {given.width}×{given.height} pixels, but its record makes "
                              f"{shown.width}×{shown.height}; it was changed")  # fmt: skip
        shown = shown.resize(given.size, Image.Resampling.LANCZOS)
        notes = (*notes, f"the file is reduced from {made.width}×{made.height}; compared at its own size")
    apart = np.abs(np.asarray(shown).astype(int) - np.asarray(given).astype(int)).max(axis=2)  # (h, w, 3) -> (h, w)
    return Reproduction(made, int(apart.max()), float((apart > 0).mean()), notes)


def _made(record: Mapping[str, Any], device: str, out: str) -> tuple[Image.Image, tuple[str, ...]]:
    if "figure" in record:
        here = {"code": runs.code_version(), "compute": {"device": device_kind(device)}}
        return _opened(_figure(record, device, out)), tuple(_differences(record, here))
    if "control" in record:
        return _control(record), ()
    config = _config(record, device, out)
    _check_assets(config)

    from segresearch.generate import generate

    done = generate(config)
    if "generate" in record:
        made = done.grid
    else:
        (made,) = (done.folder / "images").rglob("*.png")
    now = read_settings(made)
    assert now is not None
    return _opened(made), tuple(_differences(_flat_grid(record), _flat_grid(now)))


def _config(record: Mapping[str, Any], device: str, out: str) -> GenerateConfig:
    """The run that makes the picture of a record, or the grid."""
    if "generate" in record:
        given = {**record["generate"], "device": device, "out": out}
        given["batch_size"] = (given.get("model") or {}).get("batch_size", 8)
        given.setdefault("compute", EXACT)
        made: GenerateConfig = typed(GenerateConfig, given)
        return made
    missing = [key for key in (*OF_A_PICTURE, "model", "prompt", "seed") if key not in record]
    if missing:
        raise ConfigError(f"{missing[0]}: missing")
    model = {key: value for key, value in record["model"].items() if key != "fingerprint"}
    given = {key: record[key] for key in OF_A_PICTURE} | {
        "model": model, "prompts": [record["prompt"]], "seeds": record["seed"], "device": device, "out": out,
        "controls": record.get("controls") or {}, "name": "again", "batch_size": 1,
        "compute": {key: value for key, value in record.get("compute", EXACT).items() if key != "device"},
    }  # fmt: skip
    made = typed(GenerateConfig, given)
    return made


def _check_assets(config: GenerateConfig) -> None:
    """CheckpointError for a model or a ControlNet that is missing."""
    place = resolve_model(config.model.path)
    panels = [p.controls for p in config.panels if p.controls]
    for controls in [config.controls, *panels]:
        for control in controls.values():
            resolve_controlnet(control.net, place)


def _figure(record: Mapping[str, Any], device: str, out: str) -> Path:
    """A figure of a run; the run is made, unless it is in `out` already."""
    name = str(record["figure"])
    if "evaluate" in record:
        from segresearch.evaluation.evaluate import evaluate

        given = {"compute": EXACT, **record["evaluate"], "device": device, "out": out}
        config: EvaluateConfig = typed(EvaluateConfig, given)
        folder = evaluate(dataclasses.replace(config, stage="all")).folder
    elif "analyze" in record:
        from segresearch.analysis.analyze import analyze
        from segresearch.analysis.settings import AnalyzeConfig

        given = {"compute": EXACT, **record["analyze"], "device": device, "out": out}
        folder = analyze(typed(AnalyzeConfig, given)).folder
    else:
        raise ConfigError("figure: of what run is missing")
    path = folder / "figures" / f"{Path(name).name}.png"
    if not path.is_file():
        raise ConfigError(f"figure: the run has none called {name!r} here")
    return path


def _control(record: Mapping[str, Any]) -> Image.Image:
    if "settings" not in record:
        raise ConfigError("settings: missing")
    control: ControlConfig = typed(ControlConfig, record["settings"], "control")
    height, width = typed(tuple[int, int], record["size"], "size")
    assert isinstance(control.image, str)

    from segresearch.control_images.prepare import control_image

    pixels = control_image(control, control.image, (height, width))[0].permute(1, 2, 0)  # (1, 3, h, w) -> (h, w, 3)
    return Image.fromarray(np.rint(pixels.numpy() * 255).astype(np.uint8))


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _flat_grid(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a grid says of its model and controls, where a picture says it."""
    if "generate" not in record:
        return record
    settings = record["settings"]
    contents = {f"panel {i}": panel["controls"] for i, panel in enumerate(settings["panels"], 1) if "controls" in panel}
    return {"model": settings["model"], "contents": contents, "compute": record.get("compute", {})}


def _differences(given: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What was otherwise when the picture was made, in words."""
    was, here = (record.get("model", {}).get("fingerprint") for record in (given, now))
    if was != here and here is not None:
        yield f"other weights: {was} when it was made, {here} here"
    for net in (given.get("contents") or {}).keys() & (now.get("contents") or {}).keys():
        was, here = given["contents"][net], now["contents"][net]
        if was != here:
            yield f"other contents of control {net}: {was} when it was made, {here} here"
    was, here = (record.get("compute", {}).get("device") for record in (given, now))
    if was != here and None not in (was, here):
        yield f"other device: {was} when it was made, {here} here"
    for key, word in (("code", "version of segresearch"), ("torch", "version of torch")):
        if key in given and key in now and given[key] != now[key]:
            yield f"other {word}: {given[key]} when it was made, {now[key]} here"


def _moved(record: dict[str, Any], model: str) -> None:
    for holder in (record, record.get("generate"), record.get("evaluate"), record.get("analyze")):
        if isinstance(holder, dict) and isinstance(holder.get("model"), dict):
            holder["model"]["path"] = model


def _refuse_strangers(record: Any, path: Path) -> None:
    """ConfigError for a record that would import a function from outside segresearch: pictures come from anywhere."""
    if isinstance(record, Mapping):
        target = record.get("target")
        if record.get("kind") == "custom" and not str(target).startswith("segresearch."):
            raise ConfigError(f"{path}: its record calls {target}; look at that function, then add --trust")
        for value in record.values():
            _refuse_strangers(value, path)
    elif isinstance(record, list):
        for value in record:
            _refuse_strangers(value, path)
