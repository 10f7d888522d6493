"""LoRA files that are not supported, do not fit or are damaged are named in one line."""

import json
import math

import pytest
import torch
from lora_files import TEXT_LAYERS, UNET_LAYERS, added, dotted, kohya, random_lora, write

from segresearch.checkpoints.key_maps import unet_map
from segresearch.errors import CheckpointError, InputError
from segresearch.models import load_model


@pytest.fixture(scope="module")
def lora(model):
    return random_lora(model, UNET_LAYERS + TEXT_LAYERS)


@pytest.mark.parametrize(
    "end, kind",
    [
        ("hada_w1_a", "a LoHa"), ("lokr_w1", "a LoKr"), ("dora_scale", "a DoRA"), ("lora_magnitude_vector", "a DoRA"),
        ("on_input", "an IA3"), ("oft_blocks", "an OFT or BOFT"), ("a1.weight", "a GLoRA"),
        ("lora_B.bias", "a LoRA with biases"),
    ],
)  # fmt: skip
def test_other_kinds_are_named(model, lora, tmp_path, end, kind):
    keys = kohya(lora) | {f"lora_unet_mid_block_attentions_0_proj_in.{end}": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=f"a.safetensors is {kind}.*not supported: lora_unet_mid_block.*{end}"):
        added(model, [write(tmp_path / "a.safetensors", keys)])


CROSS = "transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({f"lora_unet_down_blocks_1_attentions_0_{CROSS}": (768, 64)},
         r"is a LoRA of Stable Diffusion 1, the model here is a model with text 192 wide: lora_unet_down_blocks_1_"
         r"attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight \(64, 4\) and .*lora_down.weight \(4, 768\) for "
         r"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight \(64, 192\)$"),
        ({f"lora_unet_input_blocks_4_1_{CROSS}": (2048, 640)}, "is a LoRA of SDXL"),
        ({f"lora_unet_down_blocks_3_attentions_0_{CROSS}": (192, 640)},
         "is a LoRA of another model.*1 layer .lora_unet_down_blocks_3.* match nothing"),
        ({"lora_unet_single_blocks_0_linear1": (64, 64)}, "is a LoRA of Flux.* match nothing in it"),
        ({"transformer.single_transformer_blocks.0.attn.to_q": (64, 64)}, "is a LoRA of Flux"),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv": (64, 64)}, "is a LoRA of Stable Diffusion 3"),
        ({"diffusion_model.blocks.0.cross_attn.k": (64, 64)}, "is a LoRA of a diffusion transformer .Wan"),
        ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj": (64, 64)}, "1 layer .lora_te_text.* match nothing"),
        ({"lora_te2_text_model_encoder_layers_9_self_attn_q_proj": (64, 64)}, "is a LoRA of SDXL.* match nothing"),
    ],
)  # fmt: skip
def test_of_another_model(model, tmp_path, keys, message):
    layers = {
        name: {"lora_down": torch.zeros(4, inner), "lora_up": torch.zeros(outer, 4)}
        for name, (inner, outer) in keys.items()
    }
    keys = {f"{name}.{role}.weight": tensor for name, layer in layers.items() for role, tensor in layer.items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        added(model, [write(tmp_path / "a.safetensors", keys)])
    assert "\n" not in str(caught.value)


def damaged(keys, layer, **changes):
    """Keys with those of a layer changed: None leaves one out."""
    for role, value in changes.items():
        key = f"{layer}.{role}.weight" if role.startswith("lora") else f"{layer}.{role}"
        keys = {k: v for k, v in keys.items() if k != key} | ({} if value is None else {key: value})
    return keys


LAYER = "lora_unet_down_blocks_1_attentions_0_proj_in"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_up": None}, f"{LAYER} has no up weights"),
        ({"lora_down": None, "lora_up": None}, f"{LAYER} has an alpha and no weights"),
        ({"lora_up": torch.zeros(64, 9)}, r"weights that do not fit each other \(down \(4, 64\), up \(64, 9\)\)"),
        ({"lora_up": torch.zeros(64, 4, dtype=torch.int8)}, "is stored as I8: quantised weights"),
        ({"lora_up": torch.full((64, 4), math.nan)}, "lora_up.weight holds values that are not finite"),
        ({"alpha": torch.ones(3)}, f"{LAYER}.alpha is not a number"),
        ({"alpha": torch.tensor(math.inf)}, f"{LAYER}.alpha is not a number"),
        ({"scale_of_mine": torch.ones(3)}, "1 unexpected key .*scale_of_mine.*not supported"),
    ],
)
def test_damaged_files(model, lora, tmp_path, changes, message):
    assert lora["unet"]["down_blocks.1.attentions.0.proj_in"][0].shape == (4, 64)
    file = write(tmp_path / "a.safetensors", damaged(kohya(lora), LAYER, **changes))
    with pytest.raises(CheckpointError, match=message):
        added(model, [file])


def test_metadata_that_ask_for_another_sum(model, lora, tmp_path):
    keys = dotted({"unet": lora["unet"]}, ".lora_A.weight", ".lora_B.weight", alphas=False)
    for settings, message in (({"unet.use_dora": True}, "made by DoRA"),
                              ({"unet.init_lora_weights": "pissa"}, "made by pissa"),
                              ({"unet.lora_alpha": "x"}, "alpha of .* cannot be read"), ([], "not a mapping"),
                              ({"unet.alpha_pattern": {"(": 1}}, "cannot be read")):  # fmt: skip
        file = write(tmp_path / "a.safetensors", keys, {"lora_adapter_metadata": json.dumps(settings)})
        with pytest.raises(CheckpointError, match=message):
            added(model, [file])


def test_a_layer_twice(model, lora, tmp_path):
    keys = kohya(lora) | kohya({"unet": lora["unet"]}, unet_map(model.unet.config))
    with pytest.raises(CheckpointError, match="are both .*: give a file with one of them"):
        added(model, [write(tmp_path / "a.safetensors", keys)])


def test_what_is_no_lora(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no such file; give the LoRA's .safetensors file"):
        load_model(folder, loras=["x.safetensors"])
    with pytest.raises(CheckpointError, match="pickle checkpoints can run code"):
        load_model(folder, loras=[tmp_path / "x.pt"])
    with pytest.raises(CheckpointError, match="is not a LoRA"):
        load_model(folder, loras=[write(tmp_path / "a.safetensors", {"conv.weight": torch.zeros(2)})])
    with pytest.raises(InputError, match="is not a file, .file, scale."):
        load_model(folder, loras=[(1, 2)])
    with pytest.raises(CheckpointError, match="no .safetensors file there"):
        (tmp_path / "empty").mkdir()
        load_model(folder, loras=[tmp_path / "empty"])
    with pytest.raises(CheckpointError, match="and this as one of loras="):
        load_model(write(tmp_path / "b.safetensors", {"lora_unet_a.lora_down.weight": torch.zeros(2)}))
