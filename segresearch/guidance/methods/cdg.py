"""Condition-degradation guidance."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from segresearch.errors import InputError
from segresearch.models.conditioning import Cond
from segresearch.models.stable_diffusion import StableDiffusion
from segresearch.models.text import TextEncoders
from segresearch.models.text_settings import AS_IT_IS, TextSettings


@dataclass(frozen=True)
class CDG:
    """Condition-Degradation Guidance, arXiv 2603.10780: the words of the prompt become those of "", the padding stays.

    D = D[c] + (w − 1)·(D[c] − D[c_deg]), in place of CFG and with its w; the same in every space. Content tokens
    (begin, words, first end) of c_deg are those of "" at the same places. The padding, which the causal encoders fill
    with the whole prompt, and the pooled vector are those of c. This is the paper's R_deg = 1; its ranking of tokens
    for other R_deg is not here. As in the official code a negative prompt takes the place of "". Published for SD3,
    SD3.5, FLUX and Qwen, none of them a UNet; w is the model's own. A prompt without padding is degraded wholly, which
    is CFG.
    """

    kind: Literal["cdg"] = field(default="cdg", kw_only=True, repr=False)

    def encode(
        self,
        sd: StableDiffusion,
        prompts: Sequence[str],
        negative: str | Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        settings: TextSettings = AS_IT_IS,
    ) -> Cond:
        """The degraded conditioning of the prompts. InputError for another syntax than plain."""
        if settings.syntax != "plain":
            raise InputError(f"CDG finds the tokens of plain texts: text.syntax={settings.syntax} is not supported")
        conds = sd.encode(prompts, negative or "", size, settings)
        cond, empty = conds["cond"], conds["uncond"]
        widths = [encoder.config.hidden_size for encoder in sd.text.encoders]
        content = [content_tokens(sd.text, prompts, i).to(cond.context.device) for i in range(len(widths))]
        parts = zip(cond.context.split(widths, dim=2), empty.context.split(widths, dim=2), content, strict=True)
        context = torch.cat([torch.where(mask[:, :, None], e, c) for c, e, mask in parts], dim=2)
        return replace(cond, context=context)


def content_tokens(text: TextEncoders, prompts: Sequence[str], which: int) -> Bool[Tensor, "rows text"]:
    """Whether each token of tokenizer 0 or 1 is the begin, a word or the first end, and no padding."""
    ends = text.tokens(prompts, which) == text.tokenizers[which].eos_token_id
    return ends.cumsum(dim=1) - ends.long() == 0  # no end before it
