"""The record of an image: what decides it, as JSON in the text chunk "segresearch" of its PNG. Light: no torch."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from segresearch import runs
from segresearch.checkpoints.additions import fingerprinted, identified, identified_additions
from segresearch.checkpoints.resolve import part_paths, resolve_network
from segresearch.config.build import device_kind
from segresearch.config.inputs import IPAdapterConfig
from segresearch.config.method import GuidanceConfig
from segresearch.config.schema import ModelConfig, RunConfig
from segresearch.errors import CheckpointError, ConfigError, InputError
from segresearch.image_files import open_image

KEY = "segresearch"
PARTS = ("unet", "vae", "text_encoder")  # settings of a model that replace a network of it
END = b"IEND\xaeB`\x82"  # of a whole PNG


def sampling_identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What the images of a run depend on beside their methods, prompts, seeds and controls.

    fingerprint: of the model's weights. Not among it: names and folders, the device, how many are sampled together.
    """
    of_model = config.model
    model: dict[str, Any] = {"fingerprint": fingerprint, "dtype": of_model.dtype, "vae_dtype": of_model.vae_dtype}
    if of_model.prediction is not None:
        model["prediction"] = of_model.prediction
    if parts := part_fingerprints(config.model):
        model["parts"] = parts
    for key, files in identified_additions(of_model).items():
        model[key] = [file.identity() for file in files]
    settings = {key: getattr(config, key) for key in ("sampler", "schedule", "steps", "size")}
    if text := config.text.given():
        settings["text"] = text
    return {"model": model, **settings, **config.compute.identity(device_kind(config.device))}


def part_fingerprints(model: ModelConfig) -> dict[str, Any]:
    """Of each part of a model that is not its own the fingerprints of its weights, and of the configs of a single file;
    {} for a model as it is."""
    parts: dict[str, Any] = {}
    for kind in PARTS:
        names = getattr(model, kind) or ()
        paths = [path for name in ([names] if isinstance(names, str) else names) for path in part_paths(name, kind)]
        if paths:
            parts[kind] = [runs.fingerprint(path) for path in paths]
    if model.config is not None:
        folder = Path(model.config)
        parts["config"] = runs.digest(
            {file.relative_to(folder).as_posix(): file.read_text(errors="replace") for file in folder.rglob("*.json")}
        )
    return parts


def with_networks(guidance: GuidanceConfig, model: Path) -> GuidanceConfig:
    """`guidance` with the fingerprints of its further networks and its IP-Adapter, on which images depend. model: its
    folder or file.
    ConfigError for weights other than those that a fingerprint names."""
    networks = {}
    for key, network in guidance.networks.items():
        try:
            path = model if network.path is None else resolve_network(network.path, model)
        except CheckpointError as error:
            raise CheckpointError(f"guidance.networks.{key}.path: {error}") from error
        at = f"guidance.networks.{key}"
        network = fingerprinted(network, runs.fingerprint(path), at, f"{path} has the weights")
        networks[key] = dataclasses.replace(network, loras=identified(network.loras, f"{at}.loras"))
    if (adapter := guidance.ip_adapter) is not None:
        subject = "its weights and its image are"
        adapter = fingerprinted(adapter, adapter_fingerprint(adapter), "guidance.ip_adapter", subject)
        guidance = dataclasses.replace(guidance, ip_adapter=adapter)
    return dataclasses.replace(guidance, networks=networks) if networks else guidance


def adapter_fingerprint(adapter: IPAdapterConfig) -> str:
    """Of an IP-Adapter's file, its vision tower and its image. ConfigError where one of them is missing."""
    parts = []
    for key in ("path", "image_encoder"):
        try:
            parts.append(runs.fingerprint(Path(getattr(adapter, key)).expanduser()))
        except FileNotFoundError as error:
            raise ConfigError(f"guidance.ip_adapter.{key}: {getattr(adapter, key)}: no safetensors weights") from error
    try:
        open_image(adapter.image)
    except InputError as error:
        raise ConfigError(f"guidance.ip_adapter.image: {error}") from error
    return runs.digest([*parts, hashlib.sha256(Path(adapter.image).expanduser().read_bytes()).hexdigest()])


def run_record(config: RunConfig, fingerprint: str, run: str) -> dict[str, Any]:
    """The part of a record that all images of a run share. run: the name of its folder."""
    identity = sampling_identity(config, fingerprint)
    loaded = {key: getattr(config.model, key) for key in ("name", "path", "variant", "config", "tokenizer")}
    loaded |= {key: value for key in PARTS if (value := getattr(config.model, key)) is not None}
    compute = config.compute.record(device_kind(config.device))
    model = loaded | identity["model"] | identified_additions(config.model)
    own = {"model": model, "compute": compute, "run": run, **runs.versions()}
    return runs.plain({**identity, **own})


def image_record(shared: Mapping[str, Any], method: str, guidance: GuidanceConfig, **image: Any) -> dict[str, Any]:
    """The record of one image. shared: of `run_record`; image: its prompt, negative, seed, and `control_records`."""
    return {**shared, "method": method, "guidance": runs.plain(guidance), **image}


def config_record(config: RunConfig, of_a_call: Iterable[str]) -> dict[str, Any]:
    """All settings of a run as a grid or a figure records them: `compute` as it acts, without the keys `of_a_call`."""
    kept = {key: value for key, value in runs.plain(config).items() if key not in of_a_call}
    return kept | {"compute": runs.plain(config.compute.resolved(device_kind(config.device)))}


def figure_record(figure: str, script: str, config: RunConfig, of_a_call: Iterable[str]) -> dict[str, Any]:
    """The record of a figure. script: "evaluate" or "analyze", whose settings `config` holds."""
    settings, compute = config_record(config, of_a_call), config.compute.record(device_kind(config.device))
    return {"figure": figure, "code": runs.code_version(), script: settings, "compute": compute}


def encoded(record: Mapping[str, Any]) -> str:
    """The text of a record, in the chunk KEY."""
    return json.dumps(runs.plain(record), ensure_ascii=False, sort_keys=True)


def png(image: Image.Image, record: Mapping[str, Any]) -> bytes:
    """`image` as a PNG that carries `record`; the same input gives the same bytes."""
    info, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt(KEY, encoded(record))
    image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def save_png(image: Image.Image, path: Path, record: Mapping[str, Any]) -> None:
    """Write `image` to `path` atomically, as `png` encodes it."""
    runs.write(path, png(image, record))


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a PNG, or None where there is no such file, it is damaged, is a bomb, or carries none."""
    try:
        data = path.read_bytes()
        if not data.endswith(END):  # Pillow reads a cut file as far as it goes
            return None
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            record = json.loads(image.info.get(KEY, "null"))
            return record if isinstance(record, dict) else None
    except (OSError, SyntaxError, ValueError, RecursionError, Image.DecompressionBombError):
        return None
