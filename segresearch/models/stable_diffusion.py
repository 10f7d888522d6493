"""StableDiffusion: the networks of one loaded model together, from prompts to conditionings, from images to latents and
back."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
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
from segresearch.models.prompt_syntax import SYNTAXES, encode_weighted, equal_lengths, foreign_syntax
from segresearch.models.text import TextEncoders
from segresearch.models.text_settings import AS_IT_IS, TextSettings
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
        size: tuple[int, int] | None = None, settings: TextSettings = AS_IT_IS, *,
        image: Float[Tensor, "b 3 H W"] | None = None, mask: Float[Tensor, "m c H W"] | None = None,
    ) -> dict[str, Cond]:  # fmt: skip
        """{"cond": ..., "uncond": ...}, one row a prompt, in the UNet's dtype and on its device.

        negative: one text for all rows or one a row; None: see `zero_negative`. size: (height, width) in pixels of the
        image; None: `default_size`. settings: how the prompts are read, and what the model reads beside them. image,
        mask: for a UNet that reads them, see `with_image`.

        InputError for an empty list, a bare string, unequal lengths, a size that does not fit, a weighted prompt that
        has no meaning, or what this model does not read."""
        if isinstance(prompts, str):
            raise InputError(f"prompts must be a list of strings, not the string {prompts!r}: write [{prompts!r}]")
        if not prompts:
            raise InputError('prompts is empty: give at least one, [""] for an unconditional image')
        for text in (*prompts, *(negative if isinstance(negative, list | tuple) else ())):
            if not isinstance(text, str):
                raise InputError(f"{text!r} among the prompts is not a string")
        if negative is not None and not isinstance(negative, str) and len(negative) != len(prompts):
            raise InputError(f"negative has {len(negative)} texts for {len(prompts)} prompts: give one text or as many")
        shape = self.latent_shape(size)  # refuses a size that does not fit
        latent = shape[1:] if self.unet.config.size_ids else None
        negatives = [negative or ""] if isinstance(negative, str | None) else negative
        read = self._reader(settings.syntax, (*prompts, *negatives))
        device, rows, embedded = self.device, len(prompts), self.unet.config.time_cond_proj_dim is not None
        guidance = settings.guidance
        if guidance is not None and not embedded:
            raise InputError(f"guidance={guidance!r}: this model embeds no guidance weight (LCM's do): leave it out")
        weight = torch.full((rows,), LCM_GUIDANCE if guidance is None else float(guidance), device=device)

        def cond(texts: Sequence[str], score: float | int, clip_skip: int | None = None) -> Cond:
            with self.arithmetic():
                context, pooled = read(texts, clip_skip, device if self.compute.offload else None)
            context, pooled = context.expand(rows, -1, -1), pooled.expand(rows, -1)  # (1, ...) -> (rows, ...)
            ids = self.time_ids(size, settings, score).expand(rows, -1)
            whole = Cond(context, pooled, ids, guidance=weight if embedded else None, latent=latent)
            return whole.to(device, self.unet.conv_in.weight.dtype)

        positive = cond(prompts, settings.aesthetic_score, settings.clip_skip)
        if negative is None and self.zero_negative:
            context, pooled = (torch.zeros_like(z) for z in (positive.context, positive.pooled))
            conds = {"cond": positive, "uncond": replace(positive, context=context, pooled=pooled)}
        else:
            conds = equal_lengths({"cond": positive, "uncond": cond(negatives, settings.negative_aesthetic_score)})
        return conds if image is None and mask is None else self.with_image(conds, image, mask)

    def _reader(self, syntax: str, texts: Sequence[str]) -> Callable[..., tuple[Tensor, Tensor]]:
        """What encodes texts of this syntax; a warning where plain ones hold that of other programs."""
        if syntax not in SYNTAXES:
            raise InputError(f"syntax={syntax!r}: choose {' or '.join(SYNTAXES)}")
        if syntax == "weighted":
            return partial(encode_weighted, self.text)
        if forms := foreign_syntax(texts):
            what = f"prompts hold {', '.join(forms)}, read as plain text"
            hint = 'text.syntax=weighted (TextSettings(syntax="weighted")) reads weights and BREAK'
            warnings.warn(f"{what}; {hint}", stacklevel=3)
        return self.text.encode

    def time_ids(
        self, size: tuple[int, int] | None = None, settings: TextSettings = AS_IT_IS, score: float | int = 6.0
    ) -> Float[Tensor, "1 ids"]:
        """The numbers that the model reads beside the text: see `Cond.time_ids`. score: of SDXL's refiner. InputError
        for sizes that the model does not read."""
        size, known = size or self.default_size, self.unet.config.size_ids
        original_size, crop, target_size = settings.original_size, settings.crop, settings.target_size
        sizes = {"original_size": original_size, "target_size": target_size}
        for name, value in sizes.items():
            if value is not None and (not known or known == 5 and name == "target_size"):
                raise InputError(f"{name}={value}: this model reads no {name.replace('_', ' ')}; leave it out")
        if tuple(crop) != (0, 0) and not known:
            raise InputError(f"crop={tuple(crop)}: this model reads no crop; leave it out")
        first = [*(original_size or size), *crop]
        ids = {0: [], 5: [*first, score], 6: [*first, *(target_size or size)]}
        return torch.tensor([ids[known]], dtype=torch.float32, device=self.device)

    @property
    def extra_channels(self) -> int:
        """Channels of the UNet's input beside the latents: 0; 5 of an inpainting model, 4 of instruct-pix2pix."""
        return self.unet.config.in_channels - self.vae.config.latent_channels

    def image_channels(
        self, image: Float[Tensor, "b 3 H W"], mask: Float[Tensor, "m c H W"] | None = None
    ) -> Float[Tensor, "b extra h w"]:
        """What a UNet with further channels reads of an image in [−1, 1], as diffusers' pipelines make it.

        Inpainting (5): the mask of latents, and the latents of the image with what is made anew in grey (0). Instruct-
        pix2pix (4): the latents in the VAE's own units, without its scale; with it in CosXL's, which is an EDM model.
        mask: of pixels in [0, 1], white what is made anew. InputError for a model that reads none of these.
        """
        extra, latents = self.extra_channels, self.vae.config.latent_channels
        if extra == latents + 1:
            if mask is None:
                raise InputError("this inpainting model reads a mask beside the image: give mask= too")
            small = self.latent_mask(mask).expand(len(image), -1, -1, -1)
            return torch.cat([small, self.encode_images(image * (mask < 0.5))], dim=1)  # (b, 1 + l, h, w)
        if extra == latents:
            if mask is not None:
                raise InputError("instruct-pix2pix reads an image and no mask: leave mask out")
            scaled = self.encode_images(image)
            return scaled if self.denoiser.preconditioning.sigma_data is not None else self.vae.unscaled(scaled)
        hint = "sample(start=ImageStart(sd.encode_images(image), strength, sd.latent_mask(mask)))"
        raise InputError(f"this model's UNet reads no image beside the latents; start from the image: {hint}")

    def with_image(
        self, conds: Mapping[str, Cond], image: Float[Tensor, "b 3 H W"] | None,
        mask: Float[Tensor, "m c H W"] | None = None,
    ) -> dict[str, Cond]:  # fmt: skip
        """Conditionings that a UNet with further channels reads: each with the image, see `image_channels`. Of
        instruct-pix2pix uncond has zeros, and there is a further one, "image": uncond with the image. Its guidance is
        cfg(text weight, pos="cond", neg="image") and cfg(image weight, pos="image", neg="uncond"). image: one row an
        image, or one for all."""
        if image is None:
            raise InputError("mask without an image: give image= too")
        channels, rows = self.image_channels(image, mask), max(cond.rows for cond in conds.values())
        if len(channels) not in (1, rows):
            raise InputError(f"image has {len(channels)} rows for {rows} prompts; give one for each, or one for all")
        channels = channels.expand(rows, -1, -1, -1)
        whole = {name: cond if cond.rows == rows else cond.expand(rows) for name, cond in conds.items()}
        pictured = {name: replace(cond, image=channels, projections={}) for name, cond in whole.items()}
        if self.extra_channels != self.vae.config.latent_channels:
            return pictured
        uncond = replace(pictured["uncond"], image=torch.zeros_like(channels))
        return pictured | {"image": pictured["uncond"], "uncond": uncond}

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
