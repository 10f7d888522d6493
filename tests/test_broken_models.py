"""Folders with one broken file: each ends in one line that names the place."""

import json

import pytest
import torch

from segresearch.errors import CheckpointError
from segresearch.models import load_model

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def change(folder, part, name, **values):
    path = folder / part / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["unet/config.json", "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer.json"])
def test_pointers_among_the_configs(copied_folder, name):
    (copied_folder / name).write_text(LFS)
    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer") as caught:
        load_model(copied_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "name", "values"),
    [
        ("unet", "config.json", {"norm_num_groups": 0}),
        ("unet", "config.json", {"norm_num_groups": None}),
        ("unet", "config.json", {"norm_num_groups": True}),
        ("vae", "config.json", {"norm_num_groups": True}),
        ("tokenizer", "tokenizer_config.json", {"model_max_length": -1}),
        ("tokenizer", "tokenizer_config.json", {"model_max_length": 2}),
        ("unet", "config.json", {"block_out_channels": None}),
        ("unet", "config.json", {"cross_attention_dim": [8, 16, 24]}),
        ("unet", "config.json", {"sample_size": [8, 16]}),
        ("text_encoder", "config.json", {"num_attention_heads": 5}),
        ("text_encoder", "config.json", {"hidden_act": "nope"}),
        ("text_encoder", "config.json", {"model_type": "t5"}),
        ("scheduler", "scheduler_config.json", {"steps_offset": None}),
        ("scheduler", "scheduler_config.json", {"beta_start": "x"}),
        ("scheduler", "scheduler_config.json", {"num_train_timesteps": 0}),
        ("scheduler", "scheduler_config.json", {"num_train_timesteps": 10**9}),
        ("scheduler", "scheduler_config.json", {"num_train_timesteps": 10**18}),
        ("scheduler", "scheduler_config.json", {"steps_offset": 10**30}),
        ("scheduler", "scheduler_config.json", {"steps_offset": -1}),
        ("scheduler", "scheduler_config.json", {"beta_end": True}),
        ("scheduler", "scheduler_config.json", {"use_karras_sigmas": True, "sigma_max": float("inf")}),
        ("scheduler", "scheduler_config.json", {"_class_name": "\x1b[31m" * 500}),
        ("scheduler", "scheduler_config.json", {"prediction_type": "flow"}),
    ],
)
def test_values_that_no_model_has(copied_folder, part, name, values):
    change(copied_folder, part, name, **values)
    with pytest.raises(CheckpointError, match=str(copied_folder)) as caught:
        load_model(copied_folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("eos_token_id", None, "a whole number from 0"),
        ("eos_token_id", [], "a whole number from 0"),
        ("eos_token_id", [0, 0], "a whole number from 0"),
        ("layer_norm_eps", None, "a number from 0 to 1"),
        ("layer_norm_eps", float("nan"), "a number from 0 to 1"),
        ("num_attention_heads", -1, "a whole number from 1"),
        ("num_attention_heads", 0, "a whole number from 1"),
        ("num_attention_heads", True, "a whole number from 1"),
        ("hidden_size", "x" * 5000, "a whole number from 1"),
        ("vocab_size", 10**400, "a whole number from 1"),
        ("max_position_embeddings", 1.5, "a whole number from 1"),
        ("hidden_act", ["gelu"], "an activation"),
    ],
)
def test_fields_of_a_text_encoder(copied_folder, field, value, expected):
    change(copied_folder, "text_encoder", "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=f"text_encoder/config.json: {field}=.* must be {expected}") as caught:
        load_model(copied_folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    with pytest.raises(CheckpointError, match=f"text_encoder/config.json: {field}="):
        load_model(copied_folder, text_encoder=copied_folder / "text_encoder")


def test_fields_that_a_text_encoder_does_not_read(copied_folder):
    """Those that transformers writes, and those that change how it returns its results."""
    expected = load_model(copied_folder).encode(["a red cube"])["cond"]
    usual = {"architectures": ["CLIPTextModel"], "torch_dtype": "float16", "attention_dropout": 0, "dropout": 0.0,
             "pad_token_id": 1, "bos_token_id": 0, "initializer_factor": 1}  # fmt: skip
    strange = {"return_dict": False, "output_hidden_states": 5, "pad_token_id": "x", "pruned_heads": [1]}
    change(copied_folder, "text_encoder", "config.json", layer_norm_eps=1e-5, **usual | strange)
    cond = load_model(copied_folder).encode(["a red cube"])["cond"]
    assert torch.equal(cond.context, expected.context) and torch.equal(cond.pooled, expected.pooled)


@pytest.mark.parametrize("entry", [5, True, {"a": [1]}, "x", ["transformers", "CLIPTextModel"]])
def test_an_entry_of_the_index_that_is_no_pair(copied_folder, entry):
    index = json.loads((copied_folder / "model_index.json").read_text())
    (copied_folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": entry}))
    assert len(load_model(copied_folder).text.encoders) == 2


def test_one_text_width_may_be_given_for_each_block(copied_folder):
    width = json.loads((copied_folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    levels = len(json.loads((copied_folder / "unet" / "config.json").read_text())["block_out_channels"])
    change(copied_folder, "unet", "config.json", cross_attention_dim=[width] * levels)
    assert load_model(copied_folder).unet.config.cross_attention_dim == width


def test_arguments_that_no_machine_takes(folder):
    with pytest.raises(ValueError, match="dtype=torch.int8"):
        load_model(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="device='meta'"):
        load_model(folder, device="meta")


def test_prompts_and_sizes_that_are_none(folder):
    sd = load_model(folder)
    with pytest.raises(ValueError, match=r"size=\(9, 8\)"):
        sd.encode(["a"], size=(9, 8))
    with pytest.raises(ValueError, match="channels"):
        sd.vae.decode(torch.zeros(1, sd.vae.config.latent_channels + 1, 8, 8))


def broken_header(path, change):
    """Rewrite the header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def float_offsets(header):
    entry = next(value for key, value in header.items() if key != "__metadata__")
    entry["data_offsets"] = [0.5, 1e300]


def hostile(folder, kind):
    unet = next((folder / "unet").glob("*.safetensors"))
    if kind == "deep config":
        (folder / "unet" / "config.json").write_text('{"a": ' + "[" * 100_000)
    elif kind == "deep tokenizer":
        (folder / "tokenizer" / "tokenizer_config.json").write_text("[" * 100_000)
    elif kind == "float offsets":
        broken_header(unet, float_offsets)
    elif kind == "weight map":
        (folder / "unet" / f"{unet.name}.index.json").write_text('{"weight_map": {"a": 5}}')
        unet.unlink()
    elif kind == "weight map elsewhere":
        (folder / "unet" / f"{unet.name}.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
        unet.unlink()
    elif kind == "weight map without names":
        (folder / "unet" / f"{unet.name}.index.json").write_text('{"weight_map": []}')
        unet.unlink()
    elif kind == "weight list":
        (folder / "unet" / f"{unet.name}.index.json").write_text("[5]")
        unet.unlink()
    elif kind == "a number":
        (folder / "scheduler" / "scheduler_config.json").write_text("5")


KINDS = {
    "deep config": "is not JSON", "deep tokenizer": "tokenizer_config.json is not JSON",
    "float offsets": "not a safetensors file",
    "weight map": "index.json: its weight_map names 5, not a .safetensors file",
    "weight map elsewhere": "names '../../x.safetensors', a file outside of its folder",
    "weight map without names": "no weight_map", "weight list": "not a mapping", "a number": "not a mapping",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_stranger_may_have_written_is_one_line(copied_folder, kind):
    hostile(copied_folder, kind)
    with pytest.raises(CheckpointError, match=KINDS[kind]) as caught:
        load_model(copied_folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
