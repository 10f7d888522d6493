"""What decides an image, and the record that its PNG carries. Light: no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from segresearch import runs
from segresearch.config import AnalyzeConfig, EvaluateConfig, GenerateConfig, GuidanceConfig
from segresearch.config.build import device_kind


def sampling_identity(config: GenerateConfig | EvaluateConfig | AnalyzeConfig, fingerprint: str) -> dict[str, Any]:
    """What the images of a run depend on beside their methods, prompts, seeds and controls.

    fingerprint: of the model's weights. Not among it: names and folders, the device, how many are sampled together.
    """
    model = {"fingerprint": fingerprint, "dtype": config.model.dtype, "vae_dtype": config.model.vae_dtype}
    settings = {key: getattr(config, key) for key in ("sampler", "schedule", "steps", "size")}
    return {"model": model, **settings, **config.compute.identity(device_kind(config.device))}


def run_record(config: GenerateConfig | EvaluateConfig, fingerprint: str, run: str) -> dict[str, Any]:
    """The part of a record that all images of a run share. run: the name of its folder."""
    identity = sampling_identity(config, fingerprint)
    loaded = {key: getattr(config.model, key) for key in ("name", "path", "variant", "config", "tokenizer")}
    compute = config.compute.record(device_kind(config.device))
    own = {"model": {**loaded, **identity["model"]}, "compute": compute, "run": run, **runs.versions()}
    return runs.plain({**identity, **own})


def image_record(
    shared: Mapping[str, Any],
    method: str,
    guidance: GuidanceConfig,
    prompt: str,
    negative: str | None,
    seed: int,
    controls: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of one image. shared: of `run_record`; controls: of `control_images.identify.control_records`."""
    return {
        **shared, "method": method, "guidance": runs.plain(guidance), "prompt": prompt, "negative": negative,
        "seed": seed, **controls,
    }  # fmt: skip


def config_record(config: Any, of_a_call: Iterable[str], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All settings of a run (of `config`, or as `settings` has them) as a grid or a figure records them: `compute` as
    it acts, without the keys `of_a_call`."""
    kept = {key: value for key, value in (settings or runs.plain(config)).items() if key not in of_a_call}
    return {**kept, "compute": runs.plain(config.compute.resolved(device_kind(config.device)))}


def figure_record(figure: str, script: str, config: Any, of_a_call: Iterable[str]) -> dict[str, Any]:
    """The record of a figure. script: "evaluate" or "analyze", whose settings `config` holds."""
    compute = config.compute.record(device_kind(config.device))
    settings = config_record(config, of_a_call)
    return {"figure": figure, "code": runs.code_version(), script: settings, "compute": compute}
