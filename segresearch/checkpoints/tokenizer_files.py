"""The files of a CLIP tokenizer, checked before transformers reads them, and the tokenizer once more afterwards.

    vocab.json, merges.txt, added_tokens.json       or all of these in tokenizer.json
    tokenizer_config.json, special_tokens_map.json  optional: the longest text, and which tokens begin, end and pad it
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from segresearch.checkpoints.json_files import read_json, refuse_large, refuse_pointer
from segresearch.errors import CheckpointError, one_line, shown
from segresearch.models.text import LEAST, load_tokenizer

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")  # tokens that every CLIP tokenizer has
MOST = 10**7  # tokens
REASON = 160  # letters of another package's message
AGAIN = "fetch the model's tokenizers again"
OF_OBJECTS = ("vocab", "merges", "tokenizer_object", "init_inputs", "gguf_file", "post_processor")  # not of a config


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder. Raises CheckpointError where it is missing or cannot be read."""
    names = sorted(path.name for path in folder.glob("*") if path.is_file())
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= set(names):
        raise CheckpointError(f"{folder}: no tokenizer here (vocab.json and merges.txt): fetch the model's tokenizers")
    for name in names:
        refuse_pointer(folder / name)
    if "merges.txt" in names:
        refuse_large(folder / "merges.txt")
    known = check_files(folder)
    try:
        tokenizer = load_tokenizer(folder)
        check_texts(tokenizer, known, folder)
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers' own errors have no common class, a panic of theirs is no Exception
        reason = one_line(error)
        reason = reason if len(reason) <= REASON else f"{reason[:REASON]} ..."
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({reason}): {AGAIN}") from error
    return tokenizer


def check_files(folder: Path) -> set[str]:
    """The tokens that the files list. CheckpointError, with file, field and value, for what no tokenizer has."""
    config, special, added, whole, vocabulary = (
        read_json(folder / name, optional=True)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
                     "vocab.json")
    )  # fmt: skip
    for name, fields in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        for key in NAMED:
            if fields.get(key) is not None:
                token_text(fields[key], f"{folder / name}: {key}")
    if given := [key for key in OF_OBJECTS if config.get(key) is not None]:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: {given[0]} is not a setting: {AGAIN}")
    length = config.get("model_max_length")
    if length is not None and not (whole_number(length) and length >= LEAST):
        place = f"{folder / 'tokenizer_config.json'}: model_max_length={shown(length)}"
        raise CheckpointError(f"{place} must be a whole number, {LEAST} or more")
    known = check_ids(vocabulary, str(folder / "vocab.json")) | check_ids(added, str(folder / "added_tokens.json"))
    later = config.get("added_tokens_decoder", {})
    if not isinstance(later, dict):
        place = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder={shown(later)}"
        raise CheckpointError(f"{place} must be a mapping from ids to tokens")
    known |= {token_text(token, f"{folder / 'tokenizer_config.json'}: token {shown(i)}") for i, token in later.items()}
    return known | (check_whole(whole, f"{folder / 'tokenizer.json'}") if whole else set())


def check_whole(whole: Mapping[str, Any], place: str) -> set[str]:
    """The tokens of a tokenizer.json. CheckpointError for one of another kind than CLIP's."""
    model, added = whole.get("model"), whole.get("added_tokens", [])
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{place}: not the tokenizer of a CLIP (BPE, with a vocab): {AGAIN}")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise CheckpointError(f"{place}: added_tokens={shown(added)} must be a list of tokens with ids")
    further = {token_text(token, f"{place}: added token"): token.get("id") for token in added}
    return check_ids(model["vocab"], place) | check_ids(further, place)


def check_ids(vocabulary: Mapping[str, Any], place: str) -> set[str]:
    """The tokens of a mapping to ids. CheckpointError for ids that are no such numbers, or one that two tokens have."""
    tokens: dict[int, str] = {}
    for token, i in vocabulary.items():
        if not (whole_number(i) and 0 <= i < MOST):
            raise CheckpointError(f"{place}: {shown(token)} has the id {shown(i)}, not a whole number from 0: {AGAIN}")
        if i in tokens:
            raise CheckpointError(f"{place}: {shown(tokens[i])} and {shown(token)} have one id, {i}: {AGAIN}")
        tokens[i] = token
    return set(vocabulary)


def token_text(token: Any, place: str) -> str:
    """The text of a token, which is a text or a mapping with its content. Raises CheckpointError."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise CheckpointError(f"{place}={shown(token)} must be a text, or a mapping with its content: {AGAIN}")
    return text


def whole_number(value: Any) -> bool:
    """Whether this is a whole number of a JSON file."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_texts(tokenizer: Any, known: set[str], folder: Path) -> None:
    """CheckpointError for tokens that the files do not list, or where texts are not begun, ended, cut and padded."""
    for key in NAMED:
        if (token := getattr(tokenizer, key)) not in known:
            raise CheckpointError(f"{folder}: {key}={shown(token)} is not among its tokens: {AGAIN}")
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    shape: Any = {"padding": "max_length", "max_length": 4, "truncation": True}
    empty, cut = tokenizer(["", "a red cube, " * 9], **shape).input_ids
    if begin == end or empty != [begin, end, pad, pad] or len(cut) != 4 or (cut[0], cut[-1]) != (begin, end):
        ends = f"{shown(tokenizer.bos_token)} and {shown(tokenizer.eos_token)}"
        raise CheckpointError(f"{folder}: its texts do not stand between {ends}, padded behind these: {AGAIN}")
