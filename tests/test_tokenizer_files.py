"""Tokenizers of unknown origin: each broken file is one line that names it, and usual files load."""

import json

import pytest
from make_models import LENGTH

from segresearch.checkpoints.tokenizer_files import read_tokenizer
from segresearch.errors import CheckpointError
from segresearch.models import load_model

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
ADDED = {"content": END, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
OLD = {  # tokenizer_config.json of Stable Diffusion 1.5
    "add_prefix_space": False, "bos_token": {**ADDED, "__type": "AddedToken", "content": BEGIN}, "do_lower_case": True,
    "eos_token": {**ADDED, "__type": "AddedToken"}, "errors": "replace", "model_max_length": LENGTH,
    "name_or_path": "openai/clip-vit-large-patch14", "pad_token": END, "tokenizer_class": "CLIPTokenizer",
    "special_tokens_map_file": "./special_tokens_map.json", "unk_token": {**ADDED, "__type": "AddedToken"},
}  # fmt: skip
NEW = {  # of SDXL's second tokenizer
    "add_prefix_space": False, "bos_token": BEGIN, "clean_up_tokenization_spaces": True, "do_lower_case": True,
    "eos_token": END, "errors": "replace", "model_max_length": LENGTH, "pad_token": "!", "unk_token": END,
    "tokenizer_class": "CLIPTokenizer", "added_tokens_decoder": {
        "0": {**ADDED, "content": "!", "special": True}, "515": {**ADDED, "content": BEGIN, "special": True},
        "516": {**ADDED, "special": True}},
}  # fmt: skip
SPECIAL = {"bos_token": {**ADDED, "content": BEGIN}, "eos_token": ADDED, "pad_token": END, "unk_token": ADDED}


@pytest.fixture(scope="module")
def tokens(folder):
    """vocab.json and merges.txt of the tiny model, as texts."""
    whole = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    merges = "\n".join(merge if isinstance(merge, str) else " ".join(merge) for merge in whole["merges"])
    return {"vocab.json": json.dumps(whole["vocab"]), "merges.txt": f"#version: 0.2\n{merges}\n"}


def written(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("files", [
    {}, {"tokenizer_config.json": OLD, "special_tokens_map.json": SPECIAL},
    {"tokenizer_config.json": NEW, "special_tokens_map.json": {**SPECIAL, "pad_token": "!"}},
    {"tokenizer_config.json": {**OLD, "model_max_length": 10**30}}, {"added_tokens.json": {END: 516}},
    {"tokenizer_config.json": {**OLD, "pad_token": None}, "special_tokens_map.json": SPECIAL},
])  # fmt: skip
def test_usual_files(tokens, files, tmp_path):
    tokenizer = read_tokenizer(written(tmp_path, tokens | files))
    ids = tokenizer(["", "red"], padding="max_length", max_length=5, truncation=True).input_ids
    pad = 0 if files.get("tokenizer_config.json") == NEW else 516
    assert ids == [[515, 516, pad, pad, pad], [515, 513, 516, pad, pad]]


@pytest.mark.parametrize(("name", "content", "match"), [
    ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length='x' must be a whole number, 3 or more"),
    ("tokenizer_config.json", {"model_max_length": []}, r"model_max_length=\[\] must be a whole number"),
    ("tokenizer_config.json", {"model_max_length": 77.0}, "model_max_length=77.0 must be"),
    ("tokenizer_config.json", {"model_max_length": True}, "model_max_length=True must be"),
    ("tokenizer_config.json", {"eos_token": {}}, r"eos_token=\{\} must be a text"),
    ("tokenizer_config.json", {"bos_token": 5}, "bos_token=5 must be a text"),
    ("tokenizer_config.json", {"pad_token": "zzz"}, "pad_token='zzz' is not among its tokens"),
    ("tokenizer_config.json", {"eos_token": BEGIN}, "do not stand between"),
    ("tokenizer_config.json", {"padding_side": "left"}, "padded behind"),
    ("tokenizer_config.json", {"vocab": "/etc/passwd"}, "vocab is not a setting"),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"added_tokens_decoder=\[1\] must be a mapping"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"0": 5}}, "token '0'=5 must be a text"),
    ("special_tokens_map.json", {"eos_token": 7}, "special_tokens_map.json: eos_token=7 must be a text"),
    ("special_tokens_map.json", {"unk_token": "zzz"}, "unk_token='zzz' is not among its tokens"),
    ("special_tokens_map.json", [1], "special_tokens_map.json is not a mapping"),
    ("added_tokens.json", {"new": "x"}, "added_tokens.json: 'new' has the id 'x'"),
    ("vocab.json", {"a": 5, "b": 5}, "vocab.json: 'a' and 'b' have one id, 5"),
    ("vocab.json", {"a": -1}, "vocab.json: 'a' has the id -1"), ("vocab.json", {"a": 10**30}, "has the id 1000"),
    ("vocab.json", "[" * 100_000, "vocab.json is not JSON"), ("vocab.json", {}, "cannot be read"),
    ("vocab.json", '{"a": ' + "[" * 100 + "]" * 100 + "}", "nested in more than 60 levels"),
    ("merges.txt", "#version: 0.2\na b c\n", "cannot be read"),
    ("tokenizer.json", {"model": 5}, "tokenizer.json: not the tokenizer of a CLIP"),
    ("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}, "tokenizer.json: not the tokenizer of a CLIP"),
    ("tokenizer.json", {"model": {"vocab": {"a": "x"}}}, "tokenizer.json: 'a' has the id 'x'"),
    ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [5]}, "added_tokens=.* must be a list of tokens"),
])  # fmt: skip
def test_broken_files(tokens, name, content, match, tmp_path):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_tokenizer(written(tmp_path / "t", tokens | {name: content}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and str(tmp_path) in str(caught.value)


def test_a_large_file_is_not_read(tokens, tmp_path):
    folder = written(tmp_path, tokens)
    with (folder / "merges.txt").open("r+b") as file:
        file.truncate(1 << 32)
    with pytest.raises(CheckpointError, match=r"merges.txt: 4,294,967,296 bytes"):
        read_tokenizer(folder)


def test_ids_that_the_encoder_does_not_have(copied_folder, tokens):
    own = copied_folder / "tokenizer"
    for path in own.iterdir():
        path.unlink()
    far = {token: i + 10**6 for token, i in json.loads(tokens["vocab.json"]).items()}
    written(own, tokens | {"vocab.json": far, "tokenizer_config.json": OLD})
    with pytest.raises(CheckpointError, match="tokenizer 1 has the id 1000516, text encoder 1 those below 517: "):
        load_model(copied_folder)


def test_an_encoder_that_pools_at_another_token(copied_folder):
    path = copied_folder / "text_encoder_2" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token_id": 516}))
    assert load_model(copied_folder).text.encoders[1].config.eos_token_id == 516
    path.write_text(json.dumps(config | {"eos_token_id": 7}))
    with pytest.raises(CheckpointError, match="eos_token_id=7, where its tokenizer ends a text with 516"):
        load_model(copied_folder)
