"""Named schedules of a weight over the noise level."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative, Number, one_of

SHARES: dict[str, Callable[[float, float], float]] = {  # of the way from low to high, at progress p
    "constant": lambda p, exponent: 1.0,
    "linear": lambda p, exponent: p,
    "invlinear": lambda p, exponent: 1 - p,
    "cosine": lambda p, exponent: (1 - math.cos(math.pi * p)) / 2,
    "sine": lambda p, exponent: (1 + math.cos(math.pi * p)) / 2,
    "power": lambda p, exponent: p**exponent,
    "beta": lambda p, exponent: 4 * p * (1 - p),
    "triangle": lambda p, exponent: 1 - abs(2 * p - 1),
}
SHAPES = (*SHARES, "exponential")


@dataclass(frozen=True)
class Schedule:
    """A weight between `low` and `high` that is a function of σ alone: with p = 0 at sigma_max and 1 at sigma_min.

    The progress p is linear in log σ. The papers take steps or t; their curves over steps agree with these only where a
    schedule spaces its sigmas evenly in log σ. Outside of the range p is 0 or 1.

    linear, invlinear, cosine, sine: arXiv 2404.13040, which keeps the mean at w: low 1, high 2w − 1 (low 0, high 2w in
    another reading); its clamp at 4 for SDXL is not here. exponential, low·(high/low)^p: C²FG, arXiv 2603.08155,
    ω·e^(λ(1−t)) with low = ω, high = ω·e^λ. beta: β-CFG (arXiv 2502.10574) with Beta(2, 2) over its peak, without its
    norm. triangle: TV-CFG (arXiv 2509.22007), low 1, high 2w − 1. [Formulas by third parties.]

    Values are in the unit of their place: a weight w in `cfg`, a scale s elsewhere.

    Raises InputError for an unknown shape, a range that is not 0 < sigma_min < sigma_max < ∞, weights that are not
    finite, a negative exponent, and for "exponential" weights that are not positive.
    """

    kind: Literal["schedule"] = field(default="schedule", kw_only=True, repr=False)
    shape: Annotated[str, one_of(*SHAPES)] = "linear"
    high: Number = 5.0
    low: Number = 1.0
    exponent: NonNegative = 1.0
    sigma_max: NonNegative = 14.614642
    sigma_min: NonNegative = 0.029167

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise InputError(f"unknown schedule {self.shape!r}: choose one of {', '.join(SHAPES)}")
        if not (0 < self.sigma_min < self.sigma_max < math.inf and math.isfinite(self.high + self.low)):
            raise InputError(f"a schedule needs 0 < sigma_min < sigma_max and finite weights, got {self!r}")
        if not 0 <= self.exponent < math.inf or (self.shape == "exponential" and not min(self.low, self.high) > 0):
            raise InputError(f"a schedule needs an exponent >= 0, an exponential one positive weights, got {self!r}")

    def __call__(self, sigma: float) -> float:
        """The weight at σ."""
        held = min(max(sigma, self.sigma_min), self.sigma_max)
        p = math.log(self.sigma_max / held) / math.log(self.sigma_max / self.sigma_min)
        if self.shape == "exponential":
            return self.low * (self.high / self.low) ** p
        return self.low + (self.high - self.low) * SHARES[self.shape](p, self.exponent)

    def __str__(self) -> str:
        return f"({self.shape} {self.low:g} … {self.high:g})"
