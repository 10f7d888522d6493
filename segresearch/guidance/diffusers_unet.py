"""to_diffusers: a guided denoiser in the place of the UNet of a diffusers pipeline, whatever its scheduler.

    pipe.unet = to_diffusers(GuidedDenoiser(sd.denoiser, {"seg": perturbed("seg", SEG(), 3.0)}))
    pipe("a red cube", guidance_scale=5.0)        # CFG by the pipeline, SEG by the guided denoiser

z (the pipeline's input at t) ─► x = z/c_in, σ = σ_t ─► D = guided(x, σ) ─► eps or v, as the scheduler expects it.
diffusers itself is not imported.
"""

import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.errors import InputError
from segresearch.guidance.controlnet_residuals import active
from segresearch.guidance.guided_denoiser import Control, GuidedDenoiser
from segresearch.guidance.sag import SelfAttentionGuidance
from segresearch.guidance.step import Latents
from segresearch.guidance.terms import Branch
from segresearch.models.conditioning import Cond
from segresearch.models.denoiser import Denoiser
from segresearch.sampling.memory import Run

COND, UNCOND = Branch("cond"), Branch("uncond")
REFUSED = {  # arguments of diffusers' UNet -> why they are refused
    "timestep_cond": "an embedded guidance scale",
    "cross_attention_kwargs": "a LoRA scale and the like",
    "down_block_additional_residuals": "residuals of a ControlNet: give control=[controlled(...)] to to_diffusers",
    "down_intrablock_additional_residuals": "residuals of a T2I-Adapter",
    "class_labels": "class labels",
    "encoder_attention_mask": "a mask of the text",
}


class Prediction(NamedTuple):
    """What diffusers' UNet returns, with `return_dict` or without: `.sample` or `[0]`."""

    sample: Latents


class GuidedUNet(nn.Module):
    """The object of `to_diffusers`. It owns no weights: moving the pipeline does not move them."""

    def __init__(self, guided: Any, control: Control = None, negative: bool = True):
        super().__init__()
        inner = guided.inner if isinstance(guided, SelfAttentionGuidance) else guided
        if not isinstance(inner, GuidedDenoiser):
            raise InputError(f"to_diffusers takes a GuidedDenoiser or a SelfAttentionGuidance, got {guided!r}")
        self.guided, self.control, self.negative = guided, active(control), negative
        self.joint = any(term.mixes_conditionings for term in inner.terms.values())
        if guided is not inner and negative and not self.joint:
            raise InputError("to_diffusers: SAG needs the CFG term within it: GuidedDenoiser(..., {'cfg': cfg(5.0)})")
        if self.joint and not negative:
            raise InputError("to_diffusers: the CFG term needs the negative prompt's rows: leave negative=True")
        self.denoiser: Denoiser = inner.denoiser  # type: ignore[assignment]
        if self.denoiser.preconditioning.timestep_scaling is not None:
            raise InputError("to_diffusers: latent consistency models (LCM) are not supported: sample them here")
        sizes = {"time_cond_proj_dim": None, "attention_head_dim": self.denoiser.unet.config.heads}
        self.config = SimpleNamespace(**sizes | vars(self.denoiser.unet.config))

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # no submodule: `pipe.to(float16)` would round the table of sigmas

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.denoiser.unet.conv_in.weight.device

    @property
    def add_embedding(self) -> nn.Module | None:
        """Which pipelines look at to check their text encoders."""
        return self.denoiser.unet.add_embedding

    @torch.no_grad()
    def forward(
        self,
        sample: Float[Tensor, "rows c h w"],
        timestep: Any,
        encoder_hidden_states: Float[Tensor, "rows text dim"],
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Prediction:
        """eps or v of the guided denoised image, for each row. With `negative` the rows are those of the negative
        prompt, then those of the prompt, at equal latents.

        InputError for arguments that have no meaning here, and for rows that are not such halves.
        """
        for name, value in others.items():
            if value is not None and value != {}:
                raise InputError(f"to_diffusers: {name} ({REFUSED.get(name, 'unknown here')}) is not supported")
        z = sample.to(torch.promote_types(sample.dtype, torch.float32))
        added = added_cond_kwargs or {}
        blank = z.new_zeros(len(z), 0)
        latents = self.denoiser.unet.config.out_channels  # further channels are of inpainting and the like
        z, image = z[:, :latents], z[:, latents:] if z.shape[1] > latents else None
        cond = Cond(encoder_hidden_states, added.get("text_embeds", blank), added.get("time_ids", blank), image)
        t = torch.as_tensor(timestep, device=z.device).to(z.dtype).expand(len(z))
        halves = z.chunk(2) if len(z) % 2 == 0 else ()
        equal = bool(halves) and torch.equal(*halves)
        conds = {"cond": cond}
        if self.negative:
            if not equal:
                hint = "set guidance_scale above 1, or give negative=False to to_diffusers"
                raise InputError(f"to_diffusers: {len(z)} rows without a negative prompt's: {hint}")
            b = len(z) // 2
            z, t, conds = z[b:], t[b:], {"cond": cond[b:], "uncond": cond[:b]}  # (2b, ...) -> (b, ...) each
        elif equal:
            text = "two equal halves: with guidance_scale above 1 give negative=True"
            warnings.warn(f"to_diffusers: {text}", stacklevel=2)
        sigma = self.denoiser.t_to_sigma(t)
        x = self.denoiser.preconditioning.unscaled(z, sigma[:, None, None, None])
        denoised = self.denoised(x, sigma, conds)
        parts = [self.prediction(x, sigma, d).to(sample.dtype) for d in denoised]
        return Prediction(torch.cat(parts))

    def denoised(self, x: Latents, sigma: Float[Tensor, " b"], conds: Mapping[str, Cond]) -> tuple[Latents, ...]:
        """D for the negative's rows and for the prompt's, so that u + w·(c − u) of the pipeline is what was asked for:
        with a CFG term of our own twice the guided D, else both plain ones, each with the terms added."""
        run = Run(torch.ones_like(sigma, dtype=torch.int64).cumsum(0), "a loop of diffusers")
        if self.joint or not self.negative:
            guided = self.guided(x, sigma, conds, self.control, run=run)
            return (guided,) * (2 if self.negative else 1)
        values, inner = sigma.tolist(), self.guided
        branches = dict.fromkeys([*(b for s in sorted(set(values)) for b in inner.branches(s, run)), COND, UNCOND])
        plain = inner.evaluate(x, sigma, list(branches), conds, self.control, None, values, run)
        delta = inner.combine(x, sigma, plain, values=values, run=run) - plain[inner.base]
        return plain[UNCOND] + delta, plain[COND] + delta

    def prediction(self, x: Latents, sigma: Float[Tensor, " b"], denoised: Latents) -> Latents:
        """The network's own quantity at D: the inverse of `Denoiser`."""
        s, t = sigma[:, None, None, None], self.denoiser.sigma_to_t(sigma)[:, None, None, None]
        return self.denoiser.preconditioning.output(denoised, x, s, t)


def to_diffusers(guided: Any, control: Control = None, negative: bool = True) -> GuidedUNet:
    """The `unet` of a diffusers pipeline that computes with a guided denoiser of the pipeline's model.

    guided: a GuidedDenoiser, a SelfAttentionGuidance, or a plain denoiser. Without a CFG term of its own the pipeline's
        guidance_scale acts as ever, and the terms are added to its result. With one it decides, and guidance_scale only
        has to be above 1, so that the pipeline encodes the negative prompt.
    control: active ControlNets, for all rows. negative: whether guidance_scale is above 1.

    InputError for guidance that needs another loop (Z-sampling), and, when it is called, for what remembers (momentum).
    """
    plain = isinstance(guided, Denoiser)
    return GuidedUNet(GuidedDenoiser(guided, {}) if plain else guided, control, negative)
