"""Samplers of distilled models that k-diffusion lacks, in its form: function(model, x, sigmas, ...) -> x0."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError

Latents = Float[Tensor, "images c h w"]
Sigmas = Float[Tensor, " sigmas"]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def sample_lcm(
    model: Any,
    x: Latents,
    sigmas: Sigmas,
    noise_sampler: NoiseSampler,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> Latents:
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3): x = D + σ′·n, σ′ the next sigma, n new noise."""
    for i, (sigma, lower) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = model(x, sigma.expand(len(x)), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        last = i == len(sigmas) - 2
        x = denoised if last else denoised + lower * noise_sampler(sigma, lower)
    return x


def sample_tcd(
    model: Any,
    x: Latents,
    sigmas: Sigmas,
    noise_sampler: NoiseSampler,
    table: Float[Tensor, " levels"],
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    eta: float | int = 0.3,
) -> Latents:
    """Strategic stochastic sampling of TCD (arXiv 2402.19159, algorithm 4): down to the timestep ⌊(1 − eta)·t′⌋, then
    noise up to t′, the next one. eta 0 is DDIM, eta 1 nearly LCM. The last step ends at D, where diffusers leaves the
    noise of timestep 0. table: σ of each timestep. InputError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise InputError(f"sampler tcd: eta must be in [0, 1], got {eta!r}")
    t = torch.searchsorted(table.to(sigmas), sigmas[1:-1]).clamp(max=len(table) - 1)  # of each next sigma
    down = table.to(sigmas)[((1 - eta) * t).floor().long()]
    for i, sigma in enumerate(sigmas[:-1]):
        denoised = model(x, sigma.expand(len(x)), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        if i == len(sigmas) - 2:
            return denoised
        lower, low = sigmas[i + 1], torch.minimum(down[i], sigmas[i + 1])
        x = denoised + low / sigma * (x - denoised) + (lower**2 - low**2).sqrt() * noise_sampler(sigma, lower)
    return x
