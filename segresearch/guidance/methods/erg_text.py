"""The text side of entropy rectifying guidance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn
from torch.func import functional_call

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.models.conditioning import Cond
from segresearch.models.stable_diffusion import StableDiffusion
from segresearch.models.text import TextEncoders
from segresearch.models.text_settings import AS_IT_IS, TextSettings


@dataclass(frozen=True)
class ERGText:
    """Entropy Rectifying Guidance, arXiv 2504.13987, its text side C-ERG: softmax(τ·QKᵀ/√d) in the text encoders.

    D = D[c] + (w − 1)·(D[c] − D[c_τ~p]), in place of CFG; the same in every space. c_τ is the prompt under temperature
    in every self-attention of both text encoders, and p the image side (ERG) or nothing. τ below 1 flattens the maps, 1
    is c itself. As q enters linearly, the weight and the bias of q_proj are taken times τ, in a copy for the call. The
    paper searched τ on a grid, for transformers with other text encoders; there is no value for SDXL. What it does with
    the pooled vector was not checked: here it is of the tempered encoder too.

    tau: the factor on the logits.
    """

    kind: Literal["erg_text"] = field(default="erg_text", kw_only=True, repr=False)
    tau: NonNegative = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.tau < math.inf:
            raise InputError(f"ERGText tau must be a finite number >= 0, got {self.tau!r}")

    def encode(
        self, sd: StableDiffusion, prompts: Sequence[str], negative: Any = None, size: Any = None,
        settings: TextSettings = AS_IT_IS,
    ) -> Cond:  # fmt: skip
        """The prompts under temperature."""
        text = TemperedEncoders(sd.text.tokenizers, sd.text.encoders, self.tau)
        return replace(sd, text=text).encode(prompts, None, size, settings)["cond"]


@dataclass(frozen=True)
class TemperedEncoders(TextEncoders):
    """Text encoders under temperature."""

    tau: float | int = 1.0

    def network(self, which: int) -> nn.Module:
        """Encoder 0 or 1 with τ times the logits."""
        return Tempered(self.encoders[which], self.tau)


class Tempered(nn.Module):
    """A text encoder that computes with τ times the queries. It owns nothing: the weights are the encoder's."""

    def __init__(self, encoder: nn.Module, tau: float | int):
        super().__init__()
        self.encoder, self.tau = encoder, tau

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's output."""
        weights = self.encoder.named_parameters()
        return functional_call(self.encoder, {n: p * self.tau for n, p in weights if ".q_proj." in n}, args, kwargs)
