"""What a single file declares of its training, as a diffusers scheduler_config: in keys without weights, in a yaml
beside it, in its metadata. Keys count before the yaml, and that before the metadata, which merges often copy."""

import re
import statistics
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segresearch.checkpoints.tensors import Entry, read_numbers

V, EPSILON = ("v", "v_prediction", "v-prediction", "velocity", "v_pred"), ("eps", "epsilon", "noise")
METADATA = ("prediction_type", "modelspec.prediction_type", "modelspec.predict_key")
OF_SD2 = (
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "input_blocks.0.0.weight",
)
YAML_LETTERS = 1 << 16
EDM_V = {"edm_vpred.sigma_min": 0.002, "edm_vpred.sigma_max": 120.0}  # keys -> CosXL's values
SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}  # of the generative-models code
SD_TEXT = ("cond_stage_model.transformer.", "cond_stage_model.model.")  # of Stable Diffusion 1 and 2
SDXL_SIZES = "model.diffusion_model.label_emb.0.0.weight"
TRUE = ("1", "true", "yes")


def file_scheduler(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The scheduler facts of a single file; prediction_type is left out where nothing declares it, and is the file's
    own word where it is neither epsilon nor v. A warning of one line names the sides of a contradiction."""
    if "edm_mean" in entries or "edm_std" in entries:
        return edm("EDMDPMSolverMultistepScheduler", "epsilon", 0.5, (0.002, 80.0))  # Playground v2.5
    if EDM_V.keys() & entries.keys():
        stored = [read_numbers(entries[key]) if key in entries else () for key in EDM_V]
        low, high = ([*values, usual][0] for values, usual in zip(stored, EDM_V.values(), strict=True))
        return edm("EDMEulerScheduler", "v_prediction", 1.0, (low, high)) | {"sigma_schedule": "exponential"}
    predictions = {"its key v_pred": "v_prediction"} if "v_pred" in entries else {}
    predictions |= _yaml(path.with_suffix(".yaml")) | _metadata(metadata)
    if len(set(predictions.values())) > 1:
        sides = ", ".join(f"{place} says {prediction}" for place, prediction in predictions.items())
        taken = f"{next(iter(predictions.values()))} is taken; prediction= (model.prediction) decides otherwise"
        warnings.warn(f"{path}: {sides}: {taken}", stacklevel=2)
    prediction = next(iter(predictions.values()), None) or _guessed(path, entries)
    zero = "ztsnr" in entries or metadata.get("ss_zero_terminal_snr", "").lower() in TRUE
    facts: dict[str, Any] = {} if prediction is None else {"prediction_type": prediction}
    if zero:
        return facts | {"rescale_betas_zero_snr": True}
    older = any(key.startswith(SD_TEXT) for key in entries) and SDXL_SIZES not in entries
    return facts | ({"timestep_spacing": "linspace"} if older else {})  # as Euler has it with the configs of these


def _guessed(path: Path, entries: Mapping[str, Entry]) -> str | None:
    """The prediction of a Stable Diffusion 2 that declares none, with a warning: the biases of one layer are wider
    spread in those that predict v, a rule of ComfyUI's. None for other families."""
    context, bias, first = (entries.get(f"model.diffusion_model.{name}") for name in OF_SD2)
    if not (context and bias and first) or context.shape[-1:] != (1024,) or first.shape[1:2] != (4,):
        return None
    values = read_numbers(bias, most=4096)
    prediction = "v_prediction" if len(values) > 1 and statistics.pstdev(values) > 0.09 else "epsilon"
    text = f"does not say what it predicts; {prediction} is taken, as its weights look"
    warnings.warn(f"{path}: {text}; prediction= (model.prediction) decides otherwise", stacklevel=3)
    return prediction


def edm(kind: str, prediction: str, data: float, ends: tuple[float, float]) -> dict[str, Any]:
    """A scheduler of the EDM formulation (arXiv 2206.00364), by the class that diffusers has for it."""
    sigmas = {"sigma_min": ends[0], "sigma_max": ends[1], "sigma_data": data}
    return {"_class_name": kind, "prediction_type": prediction, **sigmas}


def _metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Place of a declaration -> the prediction."""
    words = {key: metadata.get(key, "").strip().lower() for key in METADATA}
    if metadata.get("ss_v_parameterization", "").strip().lower() in TRUE:
        words["ss_v_parameterization"] = "v"
    return {f"its metadata {key}": _prediction(word) for key, word in words.items() if word}


def _prediction(word: str) -> str:
    """A word for the prediction as diffusers calls it, or as it is."""
    return "v_prediction" if word in V else "epsilon" if word in EPSILON else word[:80]


def _yaml(path: Path) -> dict[str, str]:
    """As `_metadata`, of a model's yaml in the original code's form, which is searched line by line and not parsed."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(YAML_LETTERS)
    word = re.search(r"""^[ \t]*["']?parameterization["']?[ \t]*:[ \t]*["']?(\w+)""", text, re.MULTILINE)
    scaling = re.search(r"^[^#\n]*\bdenoiser_scaling\.(\w+)", text, re.MULTILINE)
    if word is None and scaling is None:
        return {}
    prediction = _prediction(word[1].lower()) if word else SCALINGS.get(scaling[1], scaling[1]) if scaling else ""
    return {f"{path.name} beside it": prediction}
