"""Parts of the sampling in σ: where a term or a ControlNet acts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError

Interval = tuple[float | int, float | int]  # (low, high) in σ, both included
ALWAYS: Interval = (0.0, math.inf)
NEVER: Interval = (math.inf, math.inf)
INTO = 0.25  # of the way, in log σ, from a sigma towards the next higher one


def check_interval(interval: Sequence[float | int], owner: str) -> None:
    """ValueError unless `interval` is (low, high) with 0 ≤ low ≤ high."""
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1]:
        raise InputError(
            f"the interval of {owner} must be (low, high) in sigma, 0 <= low <= high, got {tuple(interval)}"
        )


def check_reach(interval: Interval, denoiser: Any, owner: str) -> None:
    """InputError for an interval that lies outside of all noise levels of the model, in timesteps for instance.

    NEVER is meant as it is. A denoiser without a schedule is not checked.
    """
    if interval in (ALWAYS, NEVER):  # nothing to read from the device
        return
    low, high = (getattr(denoiser, name, None) for name in ("sigma_min", "sigma_max"))
    if low is None or high is None:
        return
    if interval[0] > float(high) or interval[1] < float(low):
        text = f"the interval of {owner} is {tuple(interval)}, and the model's sigmas are {low:.4g} to {high:.4g}"
        raise InputError(f"{text}: it would never act. Give it in sigma, not in timesteps")


def step_interval(sigmas: Float[Tensor, " sigmas"] | Sequence[float], start: float | int, end: float | int) -> Interval:
    """The interval in σ that switches on the steps i of n with i/n ≥ start and (i+1)/n ≤ end, and no other step.

    These are the steps of diffusers' control_guidance_start and _end. `sigmas` are a schedule's n + 1, the last
    of which is 0. The bounds lie a quarter of the way (in log σ) above the first sigma that is in and above the sigma
    that the last step ends at, so evaluations between sigmas, as dpm_2's, count to the step that makes them; heun's
    at a step's end counts to the next step. (0, 1) is ALWAYS; where no step fits the interval is empty.

    ValueError unless 0 ≤ start < end ≤ 1 and there is a step.
    """
    if not 0 <= start < end <= 1:
        raise InputError(f"start and end are fractions of the steps, 0 <= start < end <= 1, got {start!r} and {end!r}")
    values = torch.as_tensor(sigmas).tolist()
    n = len(values) - 1
    if n < 1:
        raise InputError(f"a schedule has at least two sigmas, got {values}")
    on = [i for i in range(n) if i / n >= start and (i + 1) / n <= end]
    if not on:
        return NEVER

    def above(i: int) -> float:
        return math.exp((1 - INTO) * math.log(values[i]) + INTO * math.log(values[i - 1]))

    return (0.0 if on[-1] == n - 1 else above(on[-1] + 1), math.inf if on[0] == 0 else above(on[0]))
