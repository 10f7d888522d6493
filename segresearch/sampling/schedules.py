"""Noise schedules: the sigmas a sampler visits, and how large the first noise is."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.sampling.kdiffusion import k_diffusion

SCHEDULES = ("leading", "linspace", "trailing", "karras", "exponential", "polyexponential", "align-your-steps")

# Align Your Steps (arXiv 2404.14507), the sigmas published for SDXL: ten steps, the last of which ends at zero.
ALIGN_YOUR_STEPS = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
RHO = {"karras": 7.0, "polyexponential": 1.0}  # k-diffusion's defaults


def choose(name: str, choices: Sequence[str], noun: str) -> str:
    """`name` itself where it is one of `choices`, else a ValueError that lists them and names the nearest."""
    if name in choices:
        return name
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown {noun} {name!r}: {hint}choose one of {', '.join(choices)}")


def sigmas(
    denoiser: Any, schedule: str = "leading", steps: int = 25, rho: float | None = None
) -> Float[Tensor, " sigmas"]:
    """The sigmas of `schedule`: `steps` strictly falling ones and a final zero, fp32, on the denoiser's device.

    `denoiser` is anything with `.sigmas` (of training, rising), `.sigma_min`, `.sigma_max`, `.steps_offset`.

    - leading: t = i * (T // steps) + steps_offset, SDXL's own Euler spacing. It never visits the highest sigmas; one
      step starts at t = steps_offset, where nearly no noise is left: use trailing for very few steps.
    - linspace: t equally spaced from T - 1 down to 0 (one step starts at T - 1; diffusers starts it at 0).
    - trailing: t = round(T - i * T / steps) - 1 (arXiv 2305.08891, table 2).
      All three take sigma at t, linearly interpolated in sigma, as diffusers' EulerDiscreteScheduler does.
    - karras: arXiv 2206.00364 eq. (5), `rho` 7; exponential; polyexponential, `rho` 1, where it is the exponential one.
      All three run from the denoiser's sigma_max to its sigma_min: k-diffusion's own functions.
    - align-your-steps: SDXL's published ten-step sigmas (arXiv 2404.14507), log-linear between them for other counts.

    ValueError: unknown schedule, `steps` below 1 or so large that sigmas repeat, `rho` where it has no meaning.
    """
    choose(schedule, SCHEDULES, "schedule")
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a whole number, at least 1, got {steps!r}")
    if rho is not None and (schedule not in RHO or not rho > 0):
        raise InputError(f"rho must be positive and is only for {' and '.join(RHO)}; got rho={rho} for {schedule}")
    positive = positive_sigmas(denoiser, schedule, steps, RHO.get(schedule) if rho is None else rho)
    values = torch.cat([positive, positive.new_zeros(1)]).float()  # (steps,) -> (steps + 1,)
    return checked_sigmas(values, f"schedule {schedule} with {steps} steps").to(denoiser.sigmas.device)


def positive_sigmas(denoiser: Any, schedule: str, steps: int, rho: float | None) -> Float[Tensor, "steps"]:
    """`steps` sigmas above zero, highest first, on the CPU."""
    sampling = k_diffusion().sampling
    low, high = float(denoiser.sigma_min), float(denoiser.sigma_max)
    if schedule == "karras":
        return sampling.get_sigmas_karras(steps, low, high, rho)[:-1]
    if schedule == "exponential":
        return sampling.get_sigmas_exponential(steps, low, high)[:-1]
    if schedule == "polyexponential":
        return sampling.get_sigmas_polyexponential(steps, low, high, rho)[:-1]
    if schedule == "align-your-steps":
        published = torch.tensor(ALIGN_YOUR_STEPS, dtype=torch.float64).log()
        return interpolate(published, torch.linspace(0, len(published) - 1, steps + 1, dtype=torch.float64))[:-1].exp()

    table = denoiser.sigmas.detach().double().cpu()
    total = len(table)
    count = torch.arange(steps, dtype=torch.float64)  # 0, 1, ..., steps - 1
    if schedule == "leading":
        t = count.flip(0) * (total // steps) + denoiser.steps_offset
    elif schedule == "linspace":
        t = torch.linspace(total - 1, 0, steps, dtype=torch.float64)
    else:
        t = (total - count * (total / steps)).round() - 1
    return interpolate(table, t)


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
    """What unit noise is multiplied by to start at `values[0]`.

    leading starts at the standard deviation of data plus noise, sqrt(sigma^2 + 1); every other schedule at sigma, as if
    the data had none. This is EulerDiscreteScheduler.init_noise_sigma for leading, linspace and trailing spacing (its
    karras and exponential variants inherit the spacing they were built on: sigma, on linspace).
    """
    first = float(values[0])
    return math.sqrt(first**2 + 1) if schedule == "leading" else first
