"""The text conditioning: one or two CLIP text encoders, each with its tokenizer."""

import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segresearch.errors import InputError, shown
from segresearch.models.calls import on_device

QUOTED = 300  # letters of a text in a warning
ANY_END = 2  # the eos_token_id of configs whose encoders pool at the highest id of a text
LEAST = 3  # tokens of a text: its begin, one word, its end
TOKENIZERS = ("openai/clip-vit-large-patch14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k")  # of SDXL, on the hub


@dataclass(frozen=True)
class TextEncoders:
    """One or two encoders and their tokenizers. Texts are padded and cut to `length` tokens, begin and end included.

    SDXL has two, the second with a projection; its refiner the second alone; SD 1.5 and 2.1 one without a projection.
    words: of textual inversions, and how many vectors each stands for.
    """

    tokenizers: tuple[CLIPTokenizer, ...]
    encoders: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    words: Mapping[str, int] = field(default_factory=dict, hash=False, kw_only=True)

    def __post_init__(self) -> None:
        for i, (tokenizer, encoder) in enumerate(zip(self.tokenizers, self.encoders, strict=True), 1):
            if len(tokenizer) > encoder.config.vocab_size:
                raise InputError(
                    f"tokenizer {i} knows {len(tokenizer)} tokens, text encoder {i} has {encoder.config.vocab_size}: "
                    "they are of different models, give the tokenizer of this checkpoint"
                )
            length = tokenizer.model_max_length
            if not isinstance(length, int) or length < LEAST:
                limit = f"model_max_length={shown(length)}"
                raise InputError(f"tokenizer {i}: {limit} leaves no room for a text; it must be {LEAST} or more")

    @property
    def length(self) -> int:
        """Tokens of every encoded text (77 of the published models)."""
        limits = [t.model_max_length for t in self.tokenizers]
        return min(limits + [e.config.max_position_embeddings for e in self.encoders])

    @property
    def layers(self) -> int:
        """Layers of the shallower encoder."""
        return min(e.config.num_hidden_layers for e in self.encoders)

    @property
    def widths(self) -> list[int]:
        """Of the states of each encoder."""
        return [e.config.hidden_size for e in self.encoders]

    @property
    def pooled(self) -> bool:
        """Whether there is a pooled text vector: the last encoder has a projection."""
        return hasattr(self.encoders[-1], "text_projection")

    def tokens(self, texts: Sequence[str], which: int) -> Int[Tensor, "rows text"]:
        """Token ids by tokenizer 0 or 1, padded and cut to `length`; warns of a text that is cut, naming the loss."""
        tokenizer, texts = self.tokenizers[which], [expanded(text, self.words) for text in texts]
        for ids in tokenizer(texts, verbose=False).input_ids:
            if len(ids) > self.length:
                lost = textwrap.shorten(str(tokenizer.decode(ids[self.length - 1 : -1])), QUOTED, placeholder=" ...")
                warnings.warn(
                    f"text encoder {which + 1} reads {self.length} tokens, cut off: {lost!r} (of {len(ids)} tokens)",
                    stacklevel=6,  # of whoever calls StableDiffusion.encode
                )
        pad = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(texts, **pad).input_ids

    def network(self, which: int) -> nn.Module:
        """What reads the tokens of tokenizer 0 or 1: encoder 0 or 1, or in a subclass something of its kind."""
        return self.encoders[which]

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], clip_skip: int | None = None, device: torch.device | str | None = None
    ) -> tuple[Float[Tensor, "rows text dim"], Float[Tensor, "rows pooled"]]:
        """Hidden states of the encoders, side by side, and the pooled text: `states` of `tokens`."""
        return self.states([self.tokens(texts, i) for i in range(len(self.encoders))], clip_skip, device)

    @torch.no_grad()
    def states(
        self, ids: Sequence[Int[Tensor, "rows text"]], clip_skip: int | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Float[Tensor, "rows text dim"], Float[Tensor, "rows pooled"]]:  # fmt: skip
        """Hidden states of the encoders, side by side, and the pooled text, 0 wide where there is none. ids: for each
        encoder.

        With a pooled text (SDXL) these are the states before the last layer of each encoder, and the projected
        end-of-text state of the last. Without (SD 1.5, 2.1) they are those after the last layer and the final norm.
        clip_skip leaves out that many more layers, as diffusers counts; the final norm stays, and the pooled vector
        does not depend on it. Computed in the encoders' dtype and where they lie, or on `device` with copies of
        their weights, one encoder after the other (`on_device`). InputError for a clip_skip out of range.
        """
        skip, most = clip_skip or 0, self.layers - self.pooled
        if not 0 <= skip <= most:
            limit = f"{most} for encoders of {self.layers} layers"
            raise InputError(f"clip_skip={clip_skip}: must lie between 0 and {limit}")
        states = []
        for which, encoder in enumerate(self.encoders):
            network = self.network(which)
            run = network if device is None else on_device(network, device)
            out = run(ids[which].to(device or encoder.device), output_hidden_states=True)
            if self.pooled:
                states.append(out.hidden_states[-(skip + 2)])
                continue
            if not skip:
                states.append(out.last_hidden_state)
                continue
            norm: Any = getattr(encoder, "text_model", encoder).final_layer_norm
            states.append((norm if device is None else on_device(norm, device))(out.hidden_states[-(skip + 1)]))
        context = torch.cat(states, dim=-1)  # (rows, text, d1 + d2)
        return context, out.text_embeds if self.pooled else context.new_zeros(len(context), 0)


def check_tokens(text: TextEncoders) -> None:
    """InputError where a tokenizer gives ids that its encoder has no embedding of, or another end of the text than the
    one at which its encoder pools."""
    for i, (tokenizer, encoder) in enumerate(zip(text.tokenizers, text.encoders, strict=True), 1):
        size, ids = encoder.config.vocab_size, tokenizer.get_vocab().values()
        if outside := [one for one in ids if not 0 <= one < size]:
            known = f"tokenizer {i} has the id {max(outside)}, text encoder {i} those below {size}"
            raise InputError(f"{known}: they are of different models, give the tokenizer of this checkpoint")
        if tokenizer.pad_token_id is None:
            raise InputError(f"tokenizer {i} has no token to pad texts with: give the tokenizer of this checkpoint")
    own, end = encoder.config.eos_token_id, tokenizer.eos_token_id
    if text.pooled and own not in (ANY_END, end):
        fault = f"text encoder {i} config: eos_token_id={shown(own)}, where its tokenizer ends a text with {end}"
        raise InputError(f"{fault}: they are of different models, give the tokenizer of this checkpoint")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a local folder (vocab.json and merges.txt, or tokenizer.json)."""
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def tokens_of(word: str, count: int) -> list[str]:
    """The tokens that a word of so many vectors stands for."""
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def expanded(prompt: str, words: Mapping[str, int]) -> str:
    """The prompt with the further tokens of words of several vectors: "a cat" is "a cat cat_1 cat_2"."""
    pattern = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    if not pattern:
        return prompt
    by_case = {word.lower(): word for word in words}

    def tokens(match: re.Match[str]) -> str:
        word = by_case[match[0].lower()]
        return " ".join(tokens_of(word, words[word]))

    return re.sub(pattern, tokens, prompt, flags=re.IGNORECASE)
