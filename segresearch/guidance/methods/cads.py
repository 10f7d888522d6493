"""Condition-annealed diffusion sampling."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.fields import Flag, Fraction, NonNegative
from segresearch.guidance.blur import constant
from segresearch.guidance.conditionings import with_rows
from segresearch.guidance.methods.icg import gaussian, spread
from segresearch.guidance.step import wide
from segresearch.models.conditioning import Cond
from segresearch.models.denoiser import alphas_cumprod, interpolated_t


@dataclass(frozen=True)
class CADS:
    """Condition-Annealed Diffusion Sampling, arXiv 2310.17347: noise on the conditioning, which falls over the run.

    y = √γ·c + s·√(1 − γ)·n for the context and the pooled vector, then y becomes ψ·(y rescaled to mean and std of c) +
    (1 − ψ)·y. γ(t) is 1 for t ≤ τ1, (τ2 − t)/(τ2 − τ1) up to τ2, then 0; t = timestep/1000 on SDXL's own schedule, from
    1 to 0 over a run. CFG is then of the noisy cond and uncond. n is new at each evaluation and keyed by the image;
    mean and std are of an image's values. Defaults: τ1 0.6, τ2 0.9, s 0.25, ψ 1, which the port for the WebUI and the
    papers' figures name; the paper has no values for SDXL. The WebUI takes the step's number for t, which is the same
    on evenly spaced timesteps. CDG's comparison code counts t from 0 up, so its noise grows. The paper's text was not
    at hand. With ψ 1 a conditioning of zeros, SDXL's own for no negative prompt, stays zeros.

    of: the conditioning that is made noisy. tau1, tau2, s, psi: as above. shared: one n for all images,
        whatever their seeds.
    """

    kind: Literal["cads"] = field(default="cads", kw_only=True, repr=False)
    of: str = "cond"
    tau1: Fraction = 0.6
    tau2: Fraction = 0.9
    s: NonNegative = 0.25
    psi: Fraction = 1.0
    shared: Flag = False

    def __post_init__(self) -> None:
        if not (0 <= self.tau1 < self.tau2 <= 1 and self.s >= 0 and 0 <= self.psi <= 1):
            raise InputError(f"CADS needs 0 <= tau1 < tau2 <= 1, s >= 0 and psi in [0, 1], got {self}")

    def __call__(self, conds: Mapping[str, Cond], sigma: Tensor, keys: Tensor | None) -> Cond:
        """The noisy conditioning at sigma, one row an image."""
        cond = with_rows(self.of, conds[self.of], len(sigma))
        keys = torch.zeros_like(sigma, dtype=torch.int64) if keys is None or self.shared else keys
        gamma = ((self.tau2 - time(sigma)) / (self.tau2 - self.tau1)).clamp(0, 1)  # (rows,)
        context = self._noisy(cond.context, gamma, sigma, keys, f"cads/{self.of}/context")
        pooled = self._noisy(cond.pooled, gamma, sigma, keys, f"cads/{self.of}/pooled")
        return replace(cond, context=context, pooled=pooled, projections={})

    def _noisy(self, c: Tensor, gamma: Tensor, sigma: Tensor, keys: Tensor, name: str) -> Tensor:
        axes, clean = tuple(range(1, c.ndim)), wide(c)
        gamma = gamma.to(clean.dtype).view(-1, *[1] * len(axes))
        y = gamma.sqrt() * clean + self.s * (1 - gamma).sqrt() * gaussian(c, sigma, keys, name)
        ratio = spread(clean) / spread(y).clamp_min(1e-30)
        rescaled = (y - y.mean(dim=axes, keepdim=True)) * ratio + clean.mean(dim=axes, keepdim=True)
        return torch.where(gamma == 1, c, torch.lerp(y, rescaled, self.psi).to(c.dtype))


@constant
def log_sigmas(device: torch.device) -> Float[Tensor, " steps"]:
    """log σ of SDXL's timesteps."""
    alphas = alphas_cumprod({})
    return ((1 - alphas) / alphas).log().mul(0.5).float().to(device)


def time(sigma: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """timestep/1000 of each sigma on SDXL's schedule, linear in log σ between timesteps."""
    return interpolated_t(log_sigmas(sigma.device), sigma.float().log()) / 1000
