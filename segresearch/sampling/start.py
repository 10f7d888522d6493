"""An image to start from: img2img, and inpainting with models that know no masks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.sampling.schedules import start_scale


def last_steps(sigmas: Float[Tensor, " sigmas"], strength: float) -> Float[Tensor, " left"]:
    """The last min(⌊strength·n⌋, n) of n steps. InputError where no step is left."""
    steps = len(sigmas) - 1
    count = min(int(steps * strength), steps)  # in floating point, as diffusers counts
    if not count:
        least = f"{1 / steps:.3g} is one step, and without one the image stays as it is"
        raise InputError(f"strength={strength:g} of {steps} steps leaves no step to sample: {least}")
    return sigmas[steps - count :]


@dataclass(frozen=True, eq=False)
class ImageStart:
    """The image that `sample` starts from, and which part of it is kept.

    latents: scaled (`StableDiffusion.encode_images`), one row an image or one for all.
    strength: s of n steps keeps the last min(⌊s·n⌋, n) of them, as diffusers counts. They start at latents + σ·noise,
        with the σ of the first that is left; `leading` has no scale of its own here.
    mask: 1 where the image is made anew, 0 where it is kept, at the size of the latents
        (`StableDiffusion.latent_mask`); None: it is made anew everywhere.

    With a mask each evaluation sees the kept part at its own noise level, latents + σ·noise with the one noise of the
    start, and its result is the latents there. Under Euler these are the steps of diffusers' inpainting pipelines with
    models of 4 channels, which put the noised image there after every step: outside of the mask x is the noised image,
    and inside nothing else is read. A sampler that evaluates several times a step (heun, dpm_2) sees the kept part at
    each of its noise levels, and the result has the latents there to the bit. At strength 1 such a mask starts from
    noise alone, times the schedule's scale, and the kept part is there from the second evaluation on, as in diffusers.
    """

    latents: Float[Tensor, "rows channels h w"]
    strength: float = 0.6
    mask: Float[Tensor, "mask_rows 1 _h _w"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.strength, bool) or not 0 <= self.strength <= 1:
            raise InputError(f"strength={self.strength!r}: the share of the steps that is sampled, from 0 to 1")
        if self.mask is None:
            return
        shape = tuple(self.mask.shape)
        if len(shape) != 4 or shape[1] != 1 or shape[2:] != self.latents.shape[2:]:
            size = tuple(self.latents.shape[2:])
            raise InputError(f"mask of shape {shape}: give (rows, 1, h, w) of the latents' size {size} (`latent_mask`)")
        if not ((self.mask == 0) | (self.mask == 1)).all():
            raise InputError("mask: must hold 0 (kept) and 1 (made anew) alone; `latent_mask` makes one of an image")

    def left(self, sigmas: Float[Tensor, " sigmas"]) -> Float[Tensor, " left"]:
        """The end of a schedule that is sampled; see `last_steps`."""
        return last_steps(sigmas, self.strength)

    def noised(
        self, noise: Float[Tensor, "images channels h w"], sigmas: Float[Tensor, " left"], schedule: str
    ) -> Float[Tensor, "images channels h w"]:
        """x at the first of the sigmas that are left. noise: unit Gaussian, on the model's device."""
        if self.mask is not None and self.strength == 1:
            return noise * start_scale(sigmas, schedule)
        return self.latents.to(noise) + float(sigmas[0]) * noise

    def check(self, noise: Float[Tensor, "images channels h w"]) -> None:
        """InputError for latents or a mask that do not fit the noise."""
        images, shape = len(noise), tuple(self.latents.shape)
        if shape[1:] != noise.shape[1:] or shape[0] not in (1, images):
            raise InputError(f"start.latents of shape {shape} do not fit noise of shape {tuple(noise.shape)}")
        if self.mask is not None and len(self.mask) not in (1, images):
            raise InputError(f"start.mask has {len(self.mask)} rows for {images} images; give one for each, or one")

    def around(self, model: Any, noise: Float[Tensor, "images channels h w"], first: float) -> Callable[..., Tensor]:
        """`model` for a sampler from sigma `first` on, with the kept part in what it sees and returns."""
        if self.mask is None:
            return model
        latents, anew = self.latents.to(noise), self.mask.to(noise.device).bool()

        def call(x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
            below = (sigma < first * (1 - 1e-5))[:, None, None, None]  # at the start x is what it shall be
            x = torch.where(anew | ~below, x, latents + sigma[:, None, None, None] * noise)
            return torch.where(anew, model(x, sigma, **arguments), latents)

        return call

    def kept(self, x: Float[Tensor, "images channels h w"]) -> Float[Tensor, "images channels h w"]:
        """x with the latents of the kept part, without noise."""
        return x if self.mask is None else torch.where(self.mask.to(x.device).bool(), x, self.latents.to(x))
