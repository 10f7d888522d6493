"""Noise schedules: the sigmas a sampler visits, and how large the first noise is."""

import difflib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.sampling.kdiffusion import k_diffusion

SPACINGS = ("leading", "linspace", "trailing")
SCHEDULES = ("auto", *SPACINGS, "karras", "exponential", "polyexponential", "align-your-steps", "lcm")
# what `auto` may stand for beside these: a curve between the ends of a spacing, or of the range of an EDM model
CURVES = ("karras", "exponential", "beta")
DECLARED = (*(f"{spacing}-{curve}" for spacing in SPACINGS for curve in CURVES), "edm-karras", "edm-exponential")

# Align Your Steps (arXiv 2404.14507), the sigmas published for SDXL: ten steps, the last of which ends at zero.
ALIGN_YOUR_STEPS = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
RHO = {"karras": 7.0, "polyexponential": 1.0}  # k-diffusion's defaults
BETA = 0.6  # both parameters of the beta distribution in arXiv 2407.12173
LCM_STEPS = 50  # of the distillation of published models
LOW = 0.75  # of the first sigma of the model's own schedule: one that starts below this is warned of


def choose(name: str, choices: Sequence[str], noun: str) -> str:
    """`name` itself where it is one of `choices`, else a ValueError that lists them and names the nearest."""
    if name in choices:
        return name
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown {noun} {name!r}: {hint}choose one of {', '.join(choices)}")


def named(denoiser: Any, schedule: str) -> str:
    """`schedule`; for `auto` the name of the model's own, `leading` for a denoiser that has none.

    InputError for an unknown name, and for one that needs timesteps with an EDM model, which has none.
    """
    choose(schedule, SCHEDULES if schedule not in DECLARED else DECLARED, "schedule")
    own = getattr(denoiser, "schedule", None)
    if schedule == "auto":
        return "leading" if own is None else str(own.name)
    curves = ("karras", "exponential", "polyexponential", "edm-karras", "edm-exponential")
    if getattr(denoiser, "timesteps", 1) is None and schedule not in curves and schedule != getattr(own, "name", None):
        hint = "take auto, karras or exponential"
        raise InputError(f"schedule {schedule} needs timesteps, and an EDM model has none: {hint}")
    return schedule


def sigmas(
    denoiser: Any, schedule: str = "auto", steps: int = 25, rho: float | None = None
) -> Float[Tensor, " sigmas"]:
    """The sigmas of `schedule`: `steps` strictly falling ones and a final zero, fp32, on the denoiser's device.

    `denoiser` is anything with `.sigmas` (of training, rising), `.sigma_min`, `.sigma_max`, `.steps_offset`.

    - auto: the one that the model's own scheduler declares (`denoiser.schedule`), `leading` where it has none.
    - leading: t = i * (T // steps) + steps_offset, SDXL's own Euler spacing. It never visits the highest sigmas; one
      step starts at t = steps_offset, where nearly no noise is left: use trailing for very few steps.
    - linspace: t equally spaced from T - 1 down to 0 (one step starts at T - 1; diffusers starts it at 0).
    - trailing: t = round(T - i * T / steps) - 1 (arXiv 2305.08891, table 2).
      All three take sigma at t, linearly interpolated in sigma, as diffusers' EulerDiscreteScheduler does.
    - karras: arXiv 2206.00364 eq. (5), `rho` 7; exponential; polyexponential, `rho` 1, where it is the exponential one.
      All three run from the denoiser's sigma_max to its sigma_min: k-diffusion's own functions.
    - align-your-steps: SDXL's published ten-step sigmas (arXiv 2404.14507), log-linear between them for other counts.
    - lcm: `steps` of the timesteps that the model was distilled at, T/50 apart (arXiv 2310.04378).
    - <spacing>-<curve>, what `auto` may be: karras, exponential or beta (arXiv 2407.12173) from the first sigma of a
      spacing to its last, or between the ends that the model declares. edm-karras, edm-exponential: between an EDM
      model's ends, with its rho.

    InputError: unknown schedule, `steps` below 1 or so large that sigmas repeat, `rho` where it has no meaning, a
    schedule of timesteps for an EDM model. A warning for a schedule that starts far below the model's own.
    """
    name = named(denoiser, schedule)
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a whole number, at least 1, got {steps!r}")
    if rho is not None and (schedule not in RHO or not rho > 0):
        raise InputError(f"rho must be positive and is only for {' and '.join(RHO)}; got rho={rho} for {schedule}")
    table = denoiser.sigmas.detach().double().cpu()
    positive = positive_sigmas(denoiser, table, name, steps, rho)
    values = torch.cat([positive, positive.new_zeros(1)]).float()  # (steps,) -> (steps + 1,)
    values = checked_sigmas(values, f"schedule {name} with {steps} steps")
    warn_of_low_start(denoiser, table, name, steps, float(values[0]))
    return values.to(denoiser.sigmas.device)


def warn_of_low_start(denoiser: Any, table: Float[Tensor, "levels"], name: str, steps: int, first: float) -> None:
    """A warning where the model's own schedule starts much higher than `first`: the picture would be made from noise
    of a level that the network takes for a picture."""
    own = getattr(denoiser, "schedule", None)
    if own is None or own.name == name or (own.name == "lcm" and steps > own.lcm_steps):
        return
    spacing, _, curve = own.name.partition("-")
    if spacing in (*SPACINGS, "lcm") and (not curve or own.sigma_max is None):
        t = timesteps(spacing, steps, len(table), denoiser.steps_offset, own.lcm_steps)
        start = float(interpolate(table, t)[0])
    else:
        start = float(table[-1]) if own.sigma_max is None else own.sigma_max
    if first < LOW * start:
        text = f"schedule {name} with {steps} steps starts at sigma {first:.4g}"
        warnings.warn(f"{text}, the model's own (auto, {own.name}) at {start:.4g}", stacklevel=2)


def positive_sigmas(
    denoiser: Any, table: Float[Tensor, "levels"], schedule: str, steps: int, rho: float | None
) -> Float[Tensor, "steps"]:
    """`steps` sigmas above zero, highest first, on the CPU. table: the denoiser's sigmas there."""
    own = getattr(denoiser, "schedule", None)
    if schedule in (*RHO, "exponential") or schedule.startswith("edm-"):
        low, high = float(denoiser.sigma_min), float(denoiser.sigma_max)
        curve, rho = schedule.removeprefix("edm-"), rho if schedule in RHO else getattr(own, "rho", None)
        return curved(curve, steps, low, high, rho)
    if schedule == "align-your-steps":
        published = torch.tensor(ALIGN_YOUR_STEPS, dtype=torch.float64).log()
        return interpolate(published, torch.linspace(0, len(published) - 1, steps + 1, dtype=torch.float64))[:-1].exp()

    spacing, _, curve = schedule.partition("-")
    t = timesteps(spacing, steps, len(table), denoiser.steps_offset, getattr(own, "lcm_steps", LCM_STEPS))
    spaced = interpolate(table, t)
    if not curve:
        return spaced
    ends = (getattr(own, "sigma_min", None), getattr(own, "sigma_max", None))
    low, high = (float(spaced[i]) if end is None else end for i, end in zip((-1, 0), ends, strict=True))
    return curved(curve, steps, low, high, None)


def timesteps(spacing: str, steps: int, total: int, offset: int, lcm_steps: int) -> Float[Tensor, "steps"]:
    """Timesteps of a spacing of `total` ones, highest first. lcm: as of diffusers' LCMScheduler. InputError there for
    more steps than the model was distilled at."""
    count = torch.arange(steps, dtype=torch.float64)  # 0, 1, ..., steps - 1
    if spacing == "leading":
        return count.flip(0) * (total // steps) + offset
    if spacing == "linspace":
        return torch.linspace(total - 1, 0, steps, dtype=torch.float64)
    if spacing == "trailing":
        return (total - count * (total / steps)).round() - 1
    if not steps <= lcm_steps <= total:
        raise InputError(f"schedule lcm has {lcm_steps} timesteps of {total}: {steps} steps are too many")
    index = (count * (lcm_steps / steps)).floor()
    return (lcm_steps - index) * (total // lcm_steps) - 1


def curved(curve: str, steps: int, low: float, high: float, rho: float | None) -> Float[Tensor, "steps"]:
    """Sigmas from `high` to `low`: k-diffusion's functions, and the quantiles of a beta distribution."""
    sampling, rho = k_diffusion().sampling, RHO.get(curve) if rho is None else rho
    if curve == "karras":
        return sampling.get_sigmas_karras(steps, low, high, rho)[:-1]
    if curve == "exponential":
        return sampling.get_sigmas_exponential(steps, low, high)[:-1]
    if curve == "polyexponential":
        return sampling.get_sigmas_polyexponential(steps, low, high, rho)[:-1]
    from scipy.stats import beta

    quantiles = torch.from_numpy(beta.ppf(1 - torch.linspace(0, 1, steps, dtype=torch.float64).numpy(), BETA, BETA))
    return low + quantiles * (high - low)


def interpolate(table: Float[Tensor, "entries"], at: Float[Tensor, "points"]) -> Float[Tensor, "points"]:
    """`table` read at real-valued positions, linear between entries and constant beyond them."""
    low = at.floor().clamp(0, len(table) - 1).long()
    high = (low + 1).clamp(max=len(table) - 1)
    return table[low].lerp(table[high], (at - low).clamp(0, 1))


def checked_sigmas(values: Float[Tensor, " sigmas"], name: str) -> Float[Tensor, " sigmas"]:
    """`values` where they are what every sampler relies on: finite, strictly falling, at least one step, zero last."""
    if values.ndim != 1 or len(values) < 2 or not values.isfinite().all() or values[-1] != 0:
        raise InputError(f"{name}: sigmas must be finite, at least two, and end at 0; got {values.tolist()[:8]}")
    repeated = (values.diff() >= 0).nonzero()
    if len(repeated):
        i = int(repeated[0])
        raise InputError(
            f"{name}: sigmas must strictly fall, but number {i} is {float(values[i]):.6g} and the next "
            f"{float(values[i + 1]):.6g}; take fewer steps"
        )
    return values


def start_scale(values: Float[Tensor, " sigmas"], schedule: str) -> float:
    """What unit noise is multiplied by to start at `values[0]`. schedule: a name; `auto` is to be `named` first.

    Those of diffusers with the standard deviation of data plus noise, sqrt(sigma^2 + 1): leading and curves on it, LCM
    and EDM. Every other schedule starts at sigma, as if the data had none. This is the init_noise_sigma of diffusers'
    EulerDiscreteScheduler, of its EDM schedulers and, in units of sigma, of LCMScheduler.
    """
    if schedule == "auto":
        raise InputError("the scale of schedule 'auto' depends on the model: give the name that `named` returns")
    first, spacing = float(values[0]), schedule.partition("-")[0]
    return math.sqrt(first**2 + 1) if spacing in ("leading", "lcm", "edm") else first
