"""What the shape of a term and a post-processor are handed: one evaluation of the guided model, in denoised space."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.errors import InputError
from segresearch.sampling.memory import NOTHING, Past

Latents = Float[Tensor, "rows c h w"]
Sigma = Float[Tensor, " rows"]


@dataclass(frozen=True)
class Step:
    """One evaluation at x and sigma.

    denoised: D of every branch that is evaluated, by its printed name ("cond", "uncond", "cond~seg").
    base: the name of the branch that the terms are added to.
    scale: s of the term whose shape is called, a number or (rows, 1, 1, 1); 1 for a post-processor.
    past: what this shape or post-processor remembers of earlier levels. keys: of the images, for `sampling.draws`.
    """

    x: Latents
    sigma: Sigma
    denoised: Mapping[str, Latents]
    base: str = "cond"
    scale: float | Float[Tensor, "rows 1 1 1"] = 1.0
    past: Past = NOTHING
    keys: Int[Tensor, " rows"] | None = None

    @property
    def plain(self) -> Latents:
        """D[base]."""
        return self.denoised[self.base]

    @property
    def noise_level(self) -> Float[Tensor, "rows 1 1 1"]:
        """σ, to multiply images with."""
        return self.sigma[:, None, None, None]

    def eps(self, denoised: Latents) -> Latents:
        """ε = (x − D)/σ: what an eps-prediction would be. The inverse is D = x − σ·ε."""
        return (self.x - denoised) / self.noise_level

    def reaching(self, guided: Latents, pos: Latents) -> Latents:
        """The Δ with D[base] + s·Δ = `guided`, for a shape that is defined by its result; 0 where s is 0.

        InputError unless `pos` is D[base].
        """
        if pos is not self.plain:
            raise InputError(f"a shape that is defined by its result needs pos={self.base!r}, the base, in its term")
        delta = guided - self.plain
        if isinstance(self.scale, Tensor):
            return torch.where(self.scale == 0, 0.0, delta / self.scale)
        return delta / self.scale if self.scale else torch.zeros_like(delta)


Shape = Callable[[Tensor, Tensor, Step], Tensor]  # (D[pos], D[neg], step) -> Δ′ in place of D[pos] − D[neg]
Post = Callable[[Tensor, Step], Tensor]  # (guided, step) -> guided


def wide(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`z` in fp32, or in fp64 where it is that."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def dot(a: Latents, b: Latents) -> Float[Tensor, "rows 1 1 1"]:
    """⟨a, b⟩ of each image; half precisions are multiplied and summed in fp32."""
    return (wide(a) * wide(b)).sum(dim=(1, 2, 3), keepdim=True)


def norm(a: Latents) -> Float[Tensor, "rows 1 1 1"]:
    """The L2 norm of each image."""
    return dot(a, a).sqrt()


def along(a: Latents, direction: Latents) -> Latents:
    """The part of a along `direction`, ⟨a, d⟩d/⟨d, d⟩ of each image; 0 where d is 0."""
    return dot(a, direction) / dot(direction, direction).clamp_min(1e-30) * direction
