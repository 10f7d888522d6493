"""Textual inversion, arXiv 2208.01618: words of the prompt that stand for learned vectors of the text encoders.

    emb_params (vectors, dim)                        one text encoder
    clip_l, clip_g; text_encoders_0, _1              two text encoders
    <token> (vectors, dim) or (dim,)                 diffusers: the key is the word; for SDXL one file an encoder

A word of several vectors stands for as many tokens: itself, then word_1, word_2, ... as in diffusers.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.checkpoints.additions import Embedding
from segresearch.checkpoints.tensors import DTYPES, mapped, open_file
from segresearch.errors import CheckpointError, InputError
from segresearch.models.text import TextEncoders, tokens_of

BY_NAME = {"clip_l": 0, "text_encoders_0": 0, "clip_g": 1, "text_encoders_1": 1}  # keys -> which text encoder
UNNAMED = ("emb_params", *BY_NAME)  # keys that are not the word itself
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's second text encoder"}

Vectors = Float[Tensor, "_vectors _dim"]


def open_embeddings(embeddings: Sequence[Embedding], text: TextEncoders) -> dict[str, tuple[Vectors, ...]]:
    """The vectors of each word, one tensor a text encoder. CheckpointError for a file of something else or of another
    model, InputError for a word that cannot be one or that a tokenizer knows already."""
    words: dict[str, dict[int, Vectors]] = {}
    for embedding in embeddings:
        path = embedding.resolve()
        entries, _ = open_file(path)
        keys = sorted(entries)
        if not set(keys) <= set(UNNAMED) and len(keys) > 1:
            raise CheckpointError(f"{path} is not a textual inversion (its first key is {keys[0]!r})")
        word = embedding.token or (path.stem if keys[0] in UNNAMED else keys[0])
        Embedding(str(path), word)  # refuses spaces
        file = mapped(path)
        for key in keys:
            shape, dtype = entries[key].shape, entries[key].dtype
            if not 1 <= len(shape) <= 2 or 0 in shape or dtype not in DTYPES:
                raise CheckpointError(f"{path}: {key} is {dtype} {shape}, not vectors of a textual inversion")
            which = encoder_of(key, shape[-1], text)
            if which is None:
                own = " and ".join(str(encoder.config.hidden_size) for encoder in text.encoders)
                family = f" ({WIDTHS[shape[-1]]})" if shape[-1] in WIDTHS else ""
                raise CheckpointError(f"{path}: {key} is {shape[-1]} wide{family}, the model's text encoders {own}")
            if which in words.setdefault(word, {}):
                raise InputError(f"{path}: {word!r} has vectors for text encoder {which + 1} already: name it once")
            vectors = file.get_tensor(key).float().reshape(-1, shape[-1])  # (dim,) -> (1, dim)
            if not vectors.isfinite().all():
                raise CheckpointError(f"{path}: {key} holds values that are not finite: fetch the file again")
            words[word][which] = vectors
    for word, vectors in words.items():
        counts = {which: len(value) for which, value in vectors.items()}
        missing = [str(i + 1) for i in range(len(text.encoders)) if i not in counts]
        if missing:
            hint = "give the file for each encoder, under the same token"
            raise CheckpointError(f"embedding {word!r} has no vectors for text encoder {', '.join(missing)}: {hint}")
        if len(set(counts.values())) > 1:
            different = f"{counts[0]} vectors for one text encoder and {counts[1]} for the other"
            raise CheckpointError(f"embedding {word!r} has {different}: its files are of different embeddings")
    refuse_known({word: len(vectors[0]) for word, vectors in words.items()}, text)
    return {word: tuple(vectors[i] for i in range(len(vectors))) for word, vectors in words.items()}


def encoder_of(key: str, width: int, text: TextEncoders) -> int | None:
    """Which text encoder the vectors of a key are for: by its name, else by their width; None where none fits."""
    widths = [encoder.config.hidden_size for encoder in text.encoders]
    which = BY_NAME[key] if key in BY_NAME and len(widths) > 1 else widths.index(width) if width in widths else None
    return which if which is not None and widths[which] == width else None


def refuse_known(counts: Mapping[str, int], text: TextEncoders) -> None:
    """InputError for a word one of whose tokens a tokenizer, or another word, has already."""
    names = [token.lower() for word, count in counts.items() for token in tokens_of(word, count)]
    known = {token.lower().removesuffix("</w>") for tokenizer in text.tokenizers for token in tokenizer.get_vocab()}
    for name in names:
        if name in known or names.count(name) > 1:
            raise InputError(f"embeddings: {name!r} is a token already: give it another, such as <{name}-1>")


def extended(text: TextEncoders, words: Mapping[str, tuple[Vectors, ...]]) -> TextEncoders:
    """Text encoders that are being loaded, with the words: their matrices of embeddings are enlarged, the tokenizers
    copied. They pool at the end-of-text token then: the highest id, where CLIP looks for it, may be a word's."""
    tokenizers = []
    for i, (tokenizer, encoder) in enumerate(zip(text.tokenizers, text.encoders, strict=True)):
        tokenizer = copy.deepcopy(tokenizer)
        body: Any = getattr(encoder, "text_model", encoder)
        names = [name for word, vectors in words.items() for name in tokens_of(word, len(vectors[i]))]
        tokenizer.add_tokens(names)
        ids = tokenizer.convert_tokens_to_ids(names)
        old = body.embeddings.token_embedding.weight
        weight = old.new_zeros(max(len(tokenizer), len(old)), old.shape[1])
        weight[: len(old)] = old
        weight[ids] = torch.cat([vectors[i] for vectors in words.values()]).to(old)
        body.embeddings.token_embedding = nn.Embedding.from_pretrained(weight, freeze=True)
        encoder.config.vocab_size = len(weight)
        body.eos_token_id = tokenizer.eos_token_id
        tokenizers.append(tokenizer)
    counts = {word: len(vectors[0]) for word, vectors in words.items()}
    return replace(text, tokenizers=tuple(tokenizers), words=counts)  # type: ignore[arg-type]
