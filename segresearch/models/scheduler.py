"""What a model's own scheduler says (diffusers' `scheduler_config.json`), checked. Light: no torch.

Read from it: the noise that the network was trained at, what its output stands for, and where the model is meant to be
sampled. Options of the scheduler's own solver (skip_prk_steps, solver_order, clip_sample, set_alpha_to_one,
final_sigmas_type, ...) are not read, for k-diffusion's samplers take its place and every schedule ends at 0.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segresearch.errors import InputError, shown

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
CURVES = ("karras", "exponential", "beta")
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
CONSISTENCY = ("LCMScheduler", "TCDScheduler")  # sampled at the timesteps of their distillation
TABLES = (  # classes whose noise is a table of betas; beside these CONSISTENCY
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler",
)  # fmt: skip
REFUSED = {  # options that make another noise, with what they are
    "use_flow_sigmas": "flow matching",
    "use_dynamic_shifting": "flow matching",
    "trained_betas": "a table of its own",
}
SDXL = (0.00085, 0.012, "scaled_linear")  # betas of a config without a class: SDXL's, as of all Stable Diffusion
BETAS = {  # of classes whose defaults are not diffusers' usual ones
    **dict.fromkeys(("", *CONSISTENCY), SDXL),
    **dict.fromkeys(
        ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
        (0.00085, 0.012, "linear"),
    ),
}


MOST_STEPS = 100_000  # of the training; all published models have 1000


@dataclass(frozen=True)
class OwnSchedule:
    """The schedule that `auto` stands for: a name for `sampling.sigmas`, with the numbers that are the model's.

    sigma_min, sigma_max: ends of a curve on a spacing, where the config declares them. rho: of an EDM model's karras.
    lcm_steps: of the distillation.
    """

    name: str = "leading"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    lcm_steps: int = 50


def scheduler_class(config: Mapping[str, Any]) -> str:
    """The class of the config, "" where it has none. InputError, by name, for another formulation of the noise."""
    kind = str(config.get("_class_name") or "")
    if kind and kind not in (*TABLES, *CONSISTENCY, *EDM):
        family = "flow matching (" if "Flow" in kind else "("
        known = "supported are schedulers on betas (Euler, DDIM, DPMSolver, PNDM, LCM, ...) and EDM's"
        raise InputError(f"scheduler config: {family}_class_name={shown(kind)}) is not supported; {known}")
    for key, value in config.items():
        if (key.startswith("use_") or key == "rescale_betas_zero_snr") and not isinstance(value, bool | None):
            raise InputError(f"scheduler config: {key}={shown(value)} must be true or false")
    for option, family in REFUSED.items():
        if config.get(option):
            raise InputError(f"scheduler config: {option} ({family}) is not supported")
    interpolation = config.get("interpolation_type", "linear")
    if interpolation != "linear" and kind not in EDM:
        raise InputError(f"scheduler config: interpolation_type={shown(interpolation)} is not supported, only linear")
    return kind


def folder_scheduler(index: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a folder's scheduler with its class: that of the model_index.json, which diffusers follows, else
    the config's own. A folder without a config has SDXL's, unless the class says more (EDM, LCM). InputError where one
    of the two is of EDM and the other is not, or either is not supported."""
    entry = index.get("scheduler")
    named = entry[-1] if isinstance(entry, list) and entry else None
    classes = [kind for kind in (named, config.get("_class_name")) if kind]
    families = {scheduler_class({"_class_name": kind}) in EDM for kind in classes}
    if len(families) > 1:
        raise InputError(f"scheduler: model_index.json says {classes[0]}, scheduler_config.json {classes[1]}")
    if not classes or (not config and classes[0] in TABLES):
        return dict(config)
    return {**config, "_class_name": classes[0]}


def overridden(config: Mapping[str, Any], prediction: str | None) -> Mapping[str, Any]:
    """The config with another prediction_type, and a warning where it declares one that differs; None: as it is."""
    declared = config.get("prediction_type")
    if prediction is None or prediction == declared:
        return config
    changed = {**config, "prediction_type": prediction}
    prediction_of(changed)
    if declared is not None:
        warnings.warn(f"prediction={prediction} is used, though the model declares {declared}", stacklevel=3)
    return changed


def prediction_of(config: Mapping[str, Any]) -> str:
    """What the network's output stands for. InputError for what is not in PREDICTIONS, or has no meaning here."""
    prediction, edm = config.get("prediction_type", "epsilon"), is_edm(config)
    known = PREDICTIONS[:2] if edm else PREDICTIONS
    if prediction not in known:
        where = " for EDM" if edm else ""
        raise InputError(f"prediction {shown(prediction)} is not supported{where}, only {' and '.join(known)}")
    return str(prediction)


def is_edm(config: Mapping[str, Any]) -> bool:
    """Whether the network is preconditioned as in arXiv 2206.00364, and given ln(σ)/4. EulerDiscreteScheduler says so
    by timestep_type."""
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return scheduler_class(config) in EDM or continuous


def edm_numbers(config: Mapping[str, Any]) -> tuple[float, float, float]:
    """sigma_min, sigma_max and sigma_data of an EDM model; what is missing is diffusers' default."""
    default = (0.002, 80.0, 0.5) if scheduler_class(config) in EDM else (None, None, 1.0)
    names = ("sigma_min", "sigma_max", "sigma_data")
    low, high, data = (config.get(name, value) for name, value in zip(names, default, strict=True))
    if not all(map(positive, (low, high, data))) or low >= high:
        given = f"sigma_min={shown(low)}, sigma_max={shown(high)}, sigma_data={shown(data)}"
        raise InputError(f"scheduler config: {given}: an EDM model needs positive numbers, sigma_min < sigma_max")
    return float(low), float(high), float(data)


def positive(value: Any) -> bool:
    """Whether this is a number above 0 that fp32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 < value < 1e30


def whole(value: Any) -> bool:
    """Whether this is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def own_schedule(config: Mapping[str, Any]) -> OwnSchedule:
    """Where the model is meant to be sampled: the sigmas of diffusers' EulerDiscreteScheduler with this config, those
    of EDM and of LCM with their own.

    A config without a class is of a file that brings none: `leading`, SDXL's, or with zero terminal SNR `trailing`,
    which starts at the largest sigma. InputError for a spacing or a curve that is not supported.
    """
    kind = scheduler_class(config)
    if kind in EDM:
        curve, rho = config.get("sigma_schedule", "karras"), config.get("rho", 7.0)
        if curve not in CURVES[:2] or not positive(rho):
            given = f"sigma_schedule={shown(curve)}, rho={shown(rho)}"
            raise InputError(f"scheduler config: {given}: karras or exponential, above 0")
        return OwnSchedule(f"edm-{curve}", rho=float(rho))
    if kind in CONSISTENCY:
        steps = config.get("original_inference_steps", 50)
        if not whole(steps) or not 1 <= steps <= MOST_STEPS:
            given = f"original_inference_steps={shown(steps)}"
            raise InputError(f"scheduler config: {given} must be a whole number from 1 to {MOST_STEPS}")
        return OwnSchedule("lcm", lcm_steps=steps)
    missing = "linspace" if kind else "trailing" if config.get("rescale_betas_zero_snr") else "leading"
    spacing = config.get("timestep_spacing", missing)
    if spacing not in SPACINGS:
        raise InputError(f"scheduler config: timestep_spacing={shown(spacing)} is not one of {', '.join(SPACINGS)}")
    curves = [curve for curve in CURVES if config.get(f"use_{curve}_sigmas")]
    if len(curves) > 1:
        raise InputError(f"scheduler config: use_{curves[0]}_sigmas and use_{curves[1]}_sigmas cannot both be true")
    if not curves:
        return OwnSchedule(spacing)
    low, high = (config.get(name) for name in ("sigma_min", "sigma_max"))
    if not all(end is None or positive(end) for end in (low, high)):
        given = f"sigma_min={shown(low)}, sigma_max={shown(high)}"
        raise InputError(f"scheduler config: {given} must be positive numbers, or null")
    plain = spacing == "linspace" and (low, high) == (None, None) and curves[0] != "beta"
    return OwnSchedule(curves[0] if plain else f"{spacing}-{curves[0]}", low, high)


def beta_numbers(config: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """beta_start, beta_end and beta_schedule; what is missing is the default of the config's class."""
    default = BETAS.get(scheduler_class(config), (0.0001, 0.02, "linear"))
    names = ("beta_start", "beta_end", "beta_schedule")
    start, end, schedule = (config.get(name, value) for name, value in zip(names, default, strict=True))
    return start, end, schedule


def steps_offset(config: Mapping[str, Any]) -> Any:
    """The first timestep of `leading`; where it is missing 0 as in diffusers, or SDXL's 1 in a config without class."""
    return config.get("steps_offset", 0 if config.get("_class_name") else 1)
