"""Independent condition guidance by a random text."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from segresearch.fields import Whole
from segresearch.models.conditioning import Cond
from segresearch.models.stable_diffusion import StableDiffusion
from segresearch.models.text import TextEncoders
from segresearch.models.text_settings import AS_IT_IS, TextSettings
from segresearch.sampling.draws import bits, place


@dataclass(frozen=True)
class ICGText:
    """ICG with a random text as ŷ: random tokens between begin and end, through the text encoders.

    The tokens are of equal probability, special ones left out, the same for all encoders. The text encoders run once,
    before the images have their keys. So ŷ is keyed by `seed` and the prompt, and the same at all evaluations, where
    the paper draws it anew; the paper's own comparison code (of CDG) has one a prompt too. An image does not depend on
    its batch, but two images of one prompt share ŷ. Formula and w as of `ICG`.
    """

    kind: Literal["icg_text"] = field(default="icg_text", kw_only=True, repr=False)
    seed: Whole = 0

    def encode(
        self, sd: StableDiffusion, prompts: Sequence[str], negative: Any = None, size: Any = None,
        settings: TextSettings = AS_IT_IS,
    ) -> Cond:  # fmt: skip
        """The conditioning of a random text for each prompt."""
        text = RandomTokens(sd.text.tokenizers, sd.text.encoders, self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the prompts are keys here, nobody reads their syntax
            return replace(sd, text=text).encode(prompts, None, size, replace(settings, syntax="plain"))["cond"]


@dataclass(frozen=True)
class RandomTokens(TextEncoders):
    """Text encoders that read random tokens instead of each text."""

    seed: int = 0

    def tokens(self, texts: Sequence[str], which: int) -> Int[Tensor, "rows text"]:
        """Random ids of either tokenizer, keyed by the seed and the text."""
        tokenizer, smallest = self.tokenizers[which], min(self.tokenizers, key=len)
        special = torch.tensor(smallest.all_special_ids)
        words = torch.arange(len(smallest))
        words = words[~torch.isin(words, special)]
        keys = torch.tensor([place(f"{self.seed} {text}") for text in texts])
        drawn = bits(keys, torch.zeros(len(texts)), "icg/text", self.length) >> 1 & (1 << 62) - 1
        ids = words[drawn % len(words)]  # (rows, text)
        ids[:, 0], ids[:, -1] = tokenizer.bos_token_id, tokenizer.eos_token_id
        return ids
