"""Angle Domain Guidance: a rotation away from D[neg] in place of an extrapolation."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.guidance.step import Latents, Step, along, dot, norm


@dataclass(frozen=True)
class ADG:
    """ADG, arXiv 2506.11039, in denoised space: D = cos θ′·D[pos] + (sin θ′/sin θ)·e, each image one vector.

    θ is the angle between D[pos] and D[neg], θ′ = s·θ within ±max_angle (s = w − 1), and e the part of D[pos] that is
    orthogonal to D[neg]. The norm of D is at most √2·‖D[pos]‖. Written for D[pos] as base. Published: max_angle 60°,
    w 2 to 15, on SD3.

    max_angle: in degrees, up to 90.

    The official code works for one image at a time; here each image has its own angle. Below sin θ = 0.001 the ratio of
    sines is its limit s, as there. θ is taken as an arctangent, exact for small angles in fp32.

    Raises InputError for a max_angle outside [0, 90].
    """

    kind: Literal["adg"] = field(default="adg", kw_only=True, repr=False)
    max_angle: NonNegative = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.max_angle <= 90:
            raise InputError(f"ADG max_angle must be in [0, 90] degrees, got {self.max_angle!r}")

    def __call__(self, pos: Latents, neg: Latents, step: Step) -> Latents:
        """(D − D[base])/s."""
        across = pos - along(pos, neg)
        sine = norm(across)  # ‖D[pos]‖·sin θ
        angle = torch.atan2(sine, dot(pos, neg) / norm(neg).clamp_min(1e-30))
        limit = math.radians(self.max_angle)
        turned = (step.scale * angle).clamp(-limit, limit)
        ratio = turned.sin() * norm(pos) / sine.clamp_min(1e-30)
        ratio = torch.where(sine > 1e-3 * norm(pos), ratio, step.scale)
        return step.reaching(turned.cos() * pos + ratio * across, pos)
