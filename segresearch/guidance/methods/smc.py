"""SMC-CFG: guidance as sliding mode control of the difference."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative, one_of
from segresearch.guidance.step import Latents, Step, norm


@dataclass(frozen=True)
class SMC:
    """SMC-CFG, arXiv 2603.03281: e = v_pos − v_neg is held to a sliding surface, v = v_neg + w·ê.

    ê = e − k·sign((e − ê₋) + λ·ê₋), where ê₋ is that of the σ before (e at the first). v is the velocity of the
    sampling ODE, here ε = (x − D)/σ. Written for D[pos] as base.

    surface: λ. gain: k, in units of ε. switch: "sign", of each value (the paper), or "unit", s/‖s‖ over an image.
    Published: λ 5, k 0.2, flow models only. k moves D by σ·w·k in each value, so it must be far smaller for an eps
    model; conf/guidance/smc.yaml takes 0.01, a third party's value for SDXL [not in the paper].

    pamparamm's node takes the unit form (a misprint of the paper's first version) in denoised space, keeps e in place
    of ê, and has λ 6, k 0.1: `switch="unit"` has its direction, but no value of k converts at all σ.

    Raises InputError for a negative or infinite surface or gain, or an unknown switch.
    """

    kind: Literal["smc"] = field(default="smc", kw_only=True, repr=False)
    surface: NonNegative = 5.0
    gain: NonNegative = 0.2
    switch: Annotated[str, one_of("sign", "unit")] = "sign"

    def __post_init__(self) -> None:
        if not (0 <= self.surface < math.inf and 0 <= self.gain < math.inf) or self.switch not in ("sign", "unit"):
            raise InputError(f'SMC needs finite surface and gain >= 0 and switch="sign" or "unit", got {self}')

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """(D − D[base])/s."""
        error = (neg - pos) / step.noise_level
        previous = step.past.read()
        previous = error if previous is None else previous
        distance = (error - previous) + self.surface * previous
        direction = distance.sign() if self.switch == "sign" else distance / norm(distance).clamp_min(1e-30)
        error = error - self.gain * direction
        step.past.write(error)
        return step.reaching(neg - (step.scale + 1) * step.noise_level * error, pos)
