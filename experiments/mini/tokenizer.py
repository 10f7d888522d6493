"""Build mini's two tokenizers: CLIP's byte-level BPE, with merges learnt until every word of the scenes is one token.

    python -m experiments.mini.tokenizer

Other text is split into bytes and pieces of known words. Both tokenizers have the same vocabulary. They pad as SDXL's
do: <out>/tokenizer with <|endoftext|>, <out>/tokenizer_2 with "!" (id 0).
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from experiments.mini.common import replace_file
from segresearch.scenes.captions import VOCABULARY

LENGTH = 48
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """A printable character for every byte: visible Latin-1 as it is, the others as characters 256, 257, … in order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return [chr(b) for b in visible] + [chr(256 + n) for n in range(len(hidden))]


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (ties in alphabetical order), until every ASCII word is one piece."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while any(len(p) > 1 for p in pieces):
        counts = Counter(pair for p in pieces for pair in zip(p, p[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for p in pieces:
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i : i + 2] = [p[i] + p[i + 1]]
                i += 1
    return merges


def write_tokenizer(folder: Path, pad: str) -> None:
    """vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, as CLIPTokenizer reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(VOCABULARY)
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), BEGIN, END]
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": pad, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **special}
    config |= {"add_prefix_space": False, "errors": "replace"}
    files = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    for name, text in files.items():
        replace_file(folder / name, text.encode())


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (len(texts), 48) by the first tokenizer."""
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def second(ids: Tensor, end: int) -> Tensor:
    """The ids of tokenizer_2 from those of tokenizer: every token after the first end token is "!", id 0."""
    is_end = ids == end
    return ids.masked_fill(is_end & (is_end.cumsum(-1) > 1), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mini/tokenizers"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_tokenizer(args.out / "tokenizer", END)
    write_tokenizer(args.out / "tokenizer_2", "!")
    print(f"{len(load_tokenizer(args.out / 'tokenizer'))} tokens in {args.out}")


if __name__ == "__main__":
    main()
