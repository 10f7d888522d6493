"""Mutated files and folders load or end in one of the package's errors: no traceback, no hang, no memory beyond theirs.

The long form is benchmarks/fuzz.py.
"""

import json
import random
import sys
import time
from pathlib import Path

import pytest
import torch

from segresearch.checkpoints.folder import build_networks, building
from segresearch.checkpoints.json_files import read_json
from segresearch.checkpoints.parts import NONE
from segresearch.checkpoints.single_file import find_parts
from segresearch.checkpoints.tensors import open_file, open_folder
from segresearch.errors import CheckpointError, InputError
from segresearch.models.network_configs import ControlNetConfig, UNetConfig
from segresearch.models.vae import VAEConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from fuzz import KINDS, Fuzz  # noqa: E402
from mutants import (  # noqa: E402
    CONFIGS,
    TEXT,
    TEXT_2,
    TOKENIZER,
    UNET,
    VAE,
    broken_header,
    mutated_json,
    packed,
    renamed_keys,
)


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for layer in (torch.nn.Linear, torch.nn.Conv2d):  # Fuzz sets them; undone afterwards
            patch.setattr(layer, "reset_parameters", layer.reset_parameters)
        yield Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_loads(fuzz, kind):
    outcomes = [fuzz.run(kind, seed) for seed in range(2)]
    assert not [outcome.failure for outcome in outcomes if outcome.failure]


@pytest.mark.parametrize("names", [[name] for name in TOKENIZER] + [list(TOKENIZER)])
def test_the_files_of_tokenizers_are_whole_before_they_are_mutated(fuzz, names):
    try:
        for name in names:
            (fuzz.folder / name).write_text(json.dumps(TOKENIZER[name]))
        fuzz._load(fuzz.folder)
    finally:
        fuzz._restore()


def built(reader, path):
    with building(path):
        reader(json.loads(path.read_text(errors="replace")))


def refused(call, *arguments):
    """Whether the package refused the call; any other exception is raised."""
    try:
        call(*arguments)
    except InputError as error:
        assert "\n" not in str(error)
        return True
    return False


def test_headers(fuzz):
    results = set()
    for seed in range(50):
        fuzz.scratch.write_bytes(broken_header(random.Random(seed), fuzz.header, fuzz.data))
        results.add(refused(open_file, fuzz.scratch))
    assert results == {True, False}


def test_configs(fuzz, tmp_path):
    unets = [UNetConfig.from_dict, ControlNetConfig.from_dict]
    readers = {"unet/config.json": unets, "vae/config.json": [VAEConfig.from_dict]}
    results = set()
    for seed in range(120):
        draw = random.Random(seed)
        name = draw.choice(list(CONFIGS))
        path = tmp_path / "config.json"
        path.write_text(mutated_json(draw, CONFIGS[name]), encoding="utf-8", errors="surrogatepass")
        if not refused(read_json, path):
            for reader in readers.get(name, []):
                results.add(refused(built, reader, path))
    assert results == {True, False}


def test_shards(tmp_path):
    for seed in range(60):
        text = mutated_json(random.Random(seed), {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
        (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        assert refused(open_folder, tmp_path, "model")


def test_names_of_tensors(fuzz):
    """Names with huge numbers, none of which may make a loop as long."""
    start = time.monotonic()
    for seed in range(30):
        fuzz.scratch.write_bytes(packed(renamed_keys(random.Random(seed), fuzz.header), fuzz.data))
        refused(lambda: find_parts(open_file(fuzz.scratch)[0], fuzz.scratch, NONE))
    assert time.monotonic() - start < 20


HUGE = 10**9


@pytest.mark.parametrize("part, changes", [
    (0, {"layers_per_block": HUGE}), (0, {"transformer_layers_per_block": HUGE}), (0, {"layers_per_block": [HUGE, 1]}),
    (0, {"transformer_layers_per_block": [1, [HUGE]]}), (0, {"reverse_transformer_layers_per_block": [[HUGE], [1]]}),
    (0, {"block_out_channels": [32] * 3000, "down_block_types": ["DownBlock2D"] * 3000,
         "up_block_types": ["UpBlock2D"] * 3000}),
    (1, {"layers_per_block": HUGE}), (1, {"layers_per_block": 10**30}),
    (1, {"block_out_channels": [32] * 100_000}), (2, {"num_hidden_layers": HUGE}), (2, {"vocab_size": 10**30}),
    (3, {"hidden_size": 10**30}), (3, {"num_hidden_layers": [1] * 10**6}),
])  # fmt: skip
def test_giant_networks_are_not_built(fuzz, part, changes):
    configs = [dict(config) for config in (UNET, VAE, TEXT, TEXT_2)]
    configs[part] |= changes
    start = time.monotonic()
    with pytest.raises(CheckpointError):
        build_networks(configs, fuzz.folder)
    assert time.monotonic() - start < 5
