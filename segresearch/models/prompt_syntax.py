"""Weights and chunks in prompts, as written for AUTOMATIC1111's web UI.

    (word) 1.1 times, ((word)) 1.21 times, (word:1.5) 1.5 times, [word] 1/1.1 times; a backslash before a bracket or a
    backslash stands for the character itself; BREAK: the rest goes into the next chunk

Brackets nest and multiply; one that is never closed reaches to the end. A weight multiplies the hidden states of its
tokens, of each encoder. Then all states of the chunk are scaled by one number, so that their mean is what it was before
(the web UI's "Original" emphasis). Without a weight nothing is scaled. The pooled text is that of the first chunk,
without weights.

A chunk is what the encoders read at once, 75 tokens between begin and end; a longer part goes on in the next chunk. The
chunks of a text lie one after another along the text axis. Of texts in a batch that have fewer chunks, the chunks are
repeated: a softmax over keys that all occur k times is the softmax over one of each, so attention reads the same and an
image does not depend on what it is sampled with. (PLADIS, whose attention is no softmax, does not keep this.)
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from segresearch.errors import InputError
from segresearch.models.conditioning import Cond
from segresearch.models.text import TextEncoders, expanded

SYNTAXES = ("plain", "weighted")
ROUND, SQUARE = 1.1, 1 / 1.1
WEIGHT = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")
BREAK = re.compile(r"\bBREAK\b")
SEEN = {  # what a prompt may hold, and how it is told
    "(word:1.5)": re.compile(r"(?<!\\)\([^()]*:\s*[+-]?[\d.]+\s*\)"), "(word)": re.compile(r"(?<!\\)\([^():]+\)"),
    "[word]": re.compile(r"(?<!\\)\[[^\[\]]+\]"), "BREAK": BREAK,
    "<lora:name:1>": re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>"), "embedding:name": re.compile(r"\bembedding:\S"),
}  # fmt: skip
REFUSED = (  # of a weighted prompt
    (re.compile(r"<(?:lora|lyco):[^<>]*>"), "a LoRA is a setting of the model: model.loras, or load_model(loras=...)"),
    (re.compile(r"<hypernet:[^<>]*>"), "hypernetworks are not supported; take it out"),
    (
        re.compile(r"\bembedding:[^\s,()\[\]]+"),
        "load the embedding by model.embeddings, or load_model(embeddings=...), and write its token alone",
    ),
    (re.compile(r"\[[^\[\]()]*:\s*[\d.]+\s*\]"), "prompts that change between steps are not supported; choose one"),
    (re.compile(r"\[[^\[\]]*\|[^\[\]]*\]"), "words that alternate between steps are not supported; choose one"),
    (
        re.compile(r"(?:^|\s)AND\s"),
        "prompts joined by AND are terms of the guidance here (guidance=composed); write `and` for the word",
    ),
)
Fragment = tuple[str, float]  # a piece of text and its weight


def foreign_syntax(texts: Sequence[str]) -> list[str]:
    """What of other programs' syntax the texts hold, by its form: "(word:1.5)", "BREAK", ..."""
    return [form for form, pattern in SEEN.items() if any(pattern.search(text) for text in texts)]


def parsed(text: str) -> list[list[Fragment]]:
    """The parts of a prompt between its BREAKs, each as fragments with their weights; neighbours differ in weight.
    InputError for what is a setting elsewhere (a LoRA, an embedding), or changes between steps."""
    for pattern, hint in REFUSED:
        if found := pattern.search(text):
            raise InputError(f"prompt {text!r}: {found[0].strip()!r} has no meaning in a weighted prompt: {hint}")
    texts, weights = [""], [1.0]  # of fragments, which begin at every bracket
    opened: dict[str, list[int]] = {"(": [], "[": []}  # fragments at which brackets were opened

    def scale(begin: int, weight: float) -> None:
        weights[begin:] = [w * weight for w in weights[begin:]]
        texts.append("")
        weights.append(1.0)

    i = 0
    while i < len(text):
        sign, closing = text[i], WEIGHT.match(text, i)
        if sign == "\\" and text[i + 1 : i + 2] in tuple("()[]\\"):
            texts[-1] += text[i + 1]
            i += 2
        elif closing and opened["("]:
            scale(opened["("].pop(), float(closing[1]))
            i = closing.end()
        elif sign in opened:
            texts.append("")
            weights.append(1.0)
            opened[sign].append(len(texts) - 1)
            i += 1
        elif sign in ")]" and opened["(" if sign == ")" else "["]:
            scale(opened["(" if sign == ")" else "["].pop(), ROUND if sign == ")" else SQUARE)
            i += 1
        else:
            texts[-1] += sign
            i += 1
    for sign, weight in (("(", ROUND), ("[", SQUARE)):
        for begin in opened[sign]:
            weights[begin:] = [w * weight for w in weights[begin:]]

    parts: list[list[Fragment]] = [[]]
    for piece, weight in zip(texts, weights):
        for k, words in enumerate(BREAK.split(piece)):
            if k:
                parts.append([])
            if words and parts[-1] and parts[-1][-1][1] == weight:
                words = parts[-1].pop()[0] + words
            if words:
                parts[-1].append((words, weight))
    return parts


def chunks(tokenizer: Any, text: str, length: int) -> list[tuple[list[int], list[float]]]:
    """Token ids and weights of the chunks of a prompt, each of `length` tokens with begin, end and padding."""
    whole: list[tuple[list[int], list[float]]] = []
    for part in parsed(text):
        ids: list[int] = []
        weights: list[float] = []
        for words, weight in part:
            tokens = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
            ids += tokens
            weights += [weight] * len(tokens)
        for start in range(0, max(1, len(ids)), length - 2):
            some = ids[start : start + length - 2]
            pad = length - 2 - len(some)
            row = [tokenizer.bos_token_id, *some, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * pad]
            whole.append((row, [1.0, *weights[start : start + length - 2], 1.0, *[1.0] * pad]))
    return whole


@dataclass(frozen=True)
class GivenTokens(TextEncoders):
    """Text encoders that read these tokens, whatever the texts; the networks are those of `of`."""

    ids: tuple[Int[Tensor, "parts text"], ...] = ()
    of: TextEncoders | None = None

    def tokens(self, texts: Sequence[str], which: int) -> Int[Tensor, "parts text"]:
        """The given ones."""
        return self.ids[which]

    def network(self, which: int) -> nn.Module:
        """That of the encoders, perhaps perturbed."""
        return super().network(which) if self.of is None else self.of.network(which)


@torch.no_grad()
def encode_weighted(
    text: TextEncoders, texts: Sequence[str], clip_skip: int | None = None, device: torch.device | str | None = None
) -> tuple[Float[Tensor, "rows text dim"], Float[Tensor, "rows pooled"]]:
    """As `TextEncoders.encode`, of prompts with weights and chunks. InputError: see `parsed`."""
    texts = [expanded(one, text.words) for one in texts]
    each = [[chunks(tokenizer, one, text.length) for one in texts] for tokenizer in text.tokenizers]
    counts = [max(len(of[row]) for of in each) for row in range(len(texts))]
    for tokenizer, of in zip(text.tokenizers, each):
        for row, count in enumerate(counts):  # where the tokenizers count differently
            of[row] += chunks(tokenizer, "", text.length) * (count - len(of[row]))
    ids: list[Int[Tensor, "parts text"]] = [torch.tensor([c[0] for row in of for c in row]) for of in each]
    given = GivenTokens(text.tokenizers, text.encoders, tuple(ids), text)
    context, pooled = given.encode([""] * sum(counts), clip_skip, device)  # (parts, text, d1 + d2)
    widths, states = [encoder.config.hidden_size for encoder in text.encoders], []
    for z, of in zip(context.split(widths, dim=-1), each):
        weights = torch.tensor([c[1] for row in of for c in row], device=z.device)[..., None]  # (parts, text, 1)
        states.append(weighted(z, weights))
    rows = torch.cat(states, dim=-1).split(counts)  # -> (chunks, text, d) of each text
    longest = math.lcm(*counts)
    repeated = [row.flatten(0, 1).repeat(longest // count, 1) for row, count in zip(rows, counts)]
    firsts = [sum(counts[:row]) for row in range(len(counts))]
    return torch.stack(repeated), pooled[firsts]


def weighted(
    z: Float[Tensor, "parts text dim"], weights: Float[Tensor, "parts text 1"]
) -> Float[Tensor, "parts text dim"]:
    """The states times their weights, with the mean of each part restored; a part without weights as it is."""
    wide = z.float()
    scaled = wide * weights
    before, after = (x.mean((1, 2), keepdim=True) for x in (wide, scaled))
    scaled = scaled * torch.where(after == 0, 1.0, before / after)
    return torch.where((weights == 1).all(1, keepdim=True), wide, scaled).to(z.dtype)


def equal_lengths(conds: Mapping[str, Cond]) -> dict[str, Cond]:
    """Conditionings with contexts of one length: the shorter ones repeated, which attention does not see."""
    longest = math.lcm(*(cond.context.shape[1] for cond in conds.values()))
    return {
        name: cond
        if cond.context.shape[1] == longest
        else replace(cond, context=cond.context.repeat(1, longest // cond.context.shape[1], 1), projections={})
        for name, cond in conds.items()
    }
