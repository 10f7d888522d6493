"""StableDiffusion: the networks of one loaded model together, from prompts to conditionings, from images to latents and
back."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.models.calls import on_device
from segresearch.models.compute import PLAIN, Compute, arithmetic
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import ControlNet
from segresearch.models.denoiser import Denoiser
from segresearch.models.text import TextEncoders
from segresearch.models.unet import UNet
from segresearch.models.vae import VAE

LCM_GUIDANCE = 8.0  # that latent consistency models were published with


@dataclass(frozen=True)
class StableDiffusion:
    """One loaded model. Frozen: an experiment that wants another behaviour passes another argument."""

    unet: UNet
    vae: VAE
    text: TextEncoders
    denoiser: Denoiser = field(repr=False)
    name: str = "sdxl"  # the path or name it was loaded by
    zero_negative: bool = True  # no negative prompt means zeros (SDXL), else the encoding of "" (SD 1.5, the refiner)
    controlnets: Mapping[str, ControlNet] = field(default_factory=dict)  # by the names passed to `load_model`, in order
    compute: Compute = PLAIN  # of the denoiser and of the methods here; `vae.decode` itself computes as the VAE is

    @property
    def device(self) -> torch.device:
        """Of the UNet, where everything is computed."""
        return self.unet.conv_in.weight.device

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        side = self.unet.config.sample_size * self.vae.config.factor
        return (side, side)

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(channels, h, w) of the latents of an image of `size` = (height, width) in pixels, default the model's own.
        InputError for a side that is not a positive multiple of the VAE's factor."""
        if size is not None and not (isinstance(size, tuple | list) and len(size) == 2):
            raise InputError(f"size={size!r}: give (height, width) in pixels")
        (height, width), factor = size or self.default_size, self.vae.config.factor
        if height < factor or width < factor or height % factor or width % factor:
            raise InputError(f"size={(height, width)}: height and width must be positive multiples of {factor} pixels")
        return (self.vae.config.latent_channels, height // factor, width // factor)

    def encode(
        self, prompts: Sequence[str], negative: str | Sequence[str] | None = None,
        size: tuple[int, int] | None = None, clip_skip: int | None = None,
        aesthetic_score: float | int = 6.0, negative_aesthetic_score: float | int = 2.5,
        guidance: float | int | None = None,
    ) -> dict[str, Cond]:  # fmt: skip
        """{"cond": ..., "uncond": ...}, one row a prompt, in the UNet's dtype and on its device.
        negative: one text for all rows or one a row; None: see `zero_negative`. size: (height, width) in pixels, both
        the original and the target size of the image, uncropped; None: `default_size`. clip_skip: as in diffusers, for
        the prompts only. aesthetic_score, negative_aesthetic_score: of SDXL's refiner, which reads them in place of the
        target size. guidance: the weight that an LCM UNet embeds, as diffusers' guidance_scale; None: 8. InputError for
        an empty list, a bare string, unequal lengths, a size that does not fit, or guidance of a model that reads
        none."""
        if isinstance(prompts, str):
            raise InputError(f"prompts must be a list of strings, not the string {prompts!r}: write [{prompts!r}]")
        if not prompts:
            raise InputError('prompts is empty: give at least one, [""] for an unconditional image')
        for text in (*prompts, *(negative if isinstance(negative, list | tuple) else ())):
            if not isinstance(text, str):
                raise InputError(f"{text!r} among the prompts is not a string")
        if negative is not None and not isinstance(negative, str) and len(negative) != len(prompts):
            raise InputError(f"negative has {len(negative)} texts for {len(prompts)} prompts: give one text or as many")
        self.latent_shape(size)  # refuses a size that does not fit
        device, rows, embedded = self.device, len(prompts), self.unet.config.time_cond_proj_dim is not None
        if guidance is not None and not embedded:
            raise InputError(f"guidance={guidance!r}: this model embeds no guidance weight (LCM's do): leave it out")
        weight = torch.full((rows,), LCM_GUIDANCE if guidance is None else float(guidance), device=device)

        def cond(texts: Sequence[str], score: float | int, clip_skip: int | None = None) -> Cond:
            with self.arithmetic():
                context, pooled = self.text.encode(texts, clip_skip, device if self.compute.offload else None)
            context, pooled = context.expand(rows, -1, -1), pooled.expand(rows, -1)  # (1, ...) -> (rows, ...)
            ids = self.time_ids(size, score).expand(rows, -1)
            whole = Cond(context, pooled, ids, guidance=weight if embedded else None)
            return whole.to(device, self.unet.conv_in.weight.dtype)

        positive = cond(prompts, aesthetic_score, clip_skip)
        if negative is None and self.zero_negative:
            context, pooled = (torch.zeros_like(z) for z in (positive.context, positive.pooled))
            return {"cond": positive, "uncond": replace(positive, context=context, pooled=pooled)}
        texts = [negative or ""] if isinstance(negative, str | None) else negative
        return {"cond": positive, "uncond": cond(texts, negative_aesthetic_score)}

    def time_ids(self, size: tuple[int, int] | None = None, score: float | int = 6.0) -> Float[Tensor, "1 ids"]:
        """The numbers that the model reads beside the text: see `Cond.time_ids`. score: of SDXL's refiner."""
        height, width = size or self.default_size
        ids = {0: [], 5: [height, width, 0, 0, score], 6: [height, width, 0, 0, height, width]}
        return torch.tensor([ids[self.unet.config.size_ids]], dtype=torch.float32, device=self.device)

    def decode(self, latents: Float[Tensor, "b l h w"]) -> Float[Tensor, "b c H W"]:
        """Images from scaled latents, not clamped: `vae.decode` on the UNet's device, as `compute` says."""
        return self._vae("decode", latents)

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "b c H W"], noise: Float[Tensor, "b l h w"] | None = None
    ) -> Float[Tensor, "b l h w"]:
        """Scaled latents of images in [−1, 1]: `vae.encode` on the UNet's device, as `compute` says. The mean of the
        VAE's Gaussian, the same for every seed; with unit Gaussian `noise` a draw, as in diffusers."""
        return self._vae("encode", images, noise=noise)

    def latent_mask(self, mask: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 1 h w"]:
        """A mask of pixels in [0, 1], white what is made anew, as a mask of latents: 1 from 0.5 on, else 0, at the
        upper left pixel of each latent (diffusers' nearest). InputError for colours, or a size that does not fit."""
        if mask.shape[1] != 1:
            raise InputError(f"mask of shape {tuple(mask.shape)}: give (images, 1, height, width)")
        self.latent_shape((mask.shape[2], mask.shape[3]))
        factor = self.vae.config.factor
        return (mask.to(self.device) >= 0.5).float()[..., ::factor, ::factor]

    def _vae(self, method: str, x: Tensor, **more: Any) -> Tensor:
        run = on_device(self.vae, self.device, method) if self.compute.offload else getattr(self.vae, method)
        with self.arithmetic():
            return run(x.to(self.device), tile=self.compute.vae_tile, **more)

    def arithmetic(self) -> AbstractContextManager[None]:
        """fp32 products within its block as `compute.precision` says, of networks that are called directly too."""
        return arithmetic(self.compute.resolved(self.device).precision, self.device)
