"""Single files as merges, trainings and converters leave them: what loads, what is ignored in a line, what is named."""

import warnings

import pytest
import torch
from make_models import make_pipeline, original_layout
from safetensors.torch import save_file

from segresearch.checkpoints.declared import file_scheduler
from segresearch.checkpoints.single_file import open_model_file
from segresearch.checkpoints.tensors import open_file
from segresearch.errors import CheckpointError
from segresearch.models import load_model

TEXT_PROJECTION = "conditioner.embedders.1.model.text_projection"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One random model: (diffusers pipeline, the folder of its tokenizers, its weights in the original layout)."""
    root = tmp_path_factory.mktemp("model")
    pipeline = make_pipeline(root)
    return pipeline, root, original_layout(pipeline)


@pytest.fixture
def saved(made, tmp_path):
    """Writes the model with other keys beside it, or without some: the path."""

    def save(more=(), without=(), metadata=None):
        weights = {k: v for k, v in made[2].items() if not k.startswith(tuple(without))} | dict(more)
        save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "model.safetensors", metadata)
        return tmp_path / "model.safetensors"

    return save


def opened(path, made):
    return open_model_file(path, None, made[1])


def refused(match, path, made):
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(path, made)
    assert "\n" not in str(caught.value)


def warned(path, made):
    """The warnings of opening the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened(path, made)
    assert all("\n" not in str(one.message) for one in caught)
    return [str(one.message) for one in caught]


def zeros(*keys):
    return {key: torch.zeros(1) for key in keys}


# --- valid files ----------------------------------------------------------------------------------


def test_a_projection_stored_as_a_linear_layer(made, saved):
    linear = {f"{TEXT_PROJECTION}.weight": made[2][TEXT_PROJECTION].T}
    path = saved(linear, without=[TEXT_PROJECTION])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd = load_model(path, tokenizer=made[1])
    assert torch.equal(sd.text.encoders[1].text_projection.weight, made[0].text_encoder_2.text_projection.weight)


@pytest.mark.parametrize("key", [
    "conditioner.embedders.0.text_projection", "conditioner.embedders.0.text_projection.weight",
    "conditioner.embedders.0.transformer.text_projection.weight", "conditioner.embedders.0.logit_scale",
    "conditioner.embedders.1.logit_scale", "conditioner.embedders.1.model.attn_mask",
    "cond_stage_model.clip_l.transformer.text_model.embeddings.position_ids", "cond_stage_model.logit_scale",
    "cond_stage_model.clip_g.transformer.text_model.embeddings.position_ids", "model_ema.decay",
    "model_ema.num_updates",
    "first_stage_model.model_ema.decay", "first_stage_model.model_ema.num_updates", "first_stage_model.loss.logvar",
    "denoiser.sigmas", "global_step", "sqrt_alphas_cumprod", "ddim_sigmas", "scale_factor",
])  # fmt: skip
def test_bookkeeping_is_taken_in_silence(made, saved, key):
    assert not warned(saved(zeros(key)), made)


def test_leftovers_are_listed_in_one_line(made, saved):
    ema = {f"model_ema.diffusion_model{i}": torch.zeros(1) for i in range(100)}
    more = ema | zeros("somewhere.else", "first_stage_model.model_ema.decoder_weight", "embedding_manager.x",
                       "conditioner.embedders.1.model.visual.proj")  # fmt: skip
    (line,) = warned(saved(more), made)
    for word in ("model_ema.* (100 keys)", "first_stage_model.model_ema.* (1 keys)", "3 keys", "somewhere.else"):
        assert word in line


@pytest.mark.parametrize(
    "match, more",
    [
        ("65 keys .* belong to no part", [f"other.{i}" for i in range(65)]),
        ("keys of a ControlNet are beside", ["control_model.input_blocks.0.0.weight"]),
        ("keys of a LoRA are beside", ["lora_unet_mid_block_attentions_0.lora_up.weight"]),
        ("keys of Flux are beside", ["double_blocks.0.img_attn.qkv.weight"]),
        ("unexpected key .*diffusion_model.input_blocks.1.1", ["model.diffusion_model.input_blocks.1.1.norm.weight"]),
        ("unexpected key .*resblocks.0.ln_3", ["conditioner.embedders.1.model.transformer.resblocks.0.ln_3.weight"]),
        ("unexpected key .*decoder", ["first_stage_model.decoder.time_mix.weight"]),
    ],
)
def test_strays_of_another_architecture(made, saved, match, more):
    refused(match, saved(zeros(*more)), made)


# --- what is named --------------------------------------------------------------------------------

UNET, AUTOENCODER = "model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.c"
TEXTS = ("conditioner.embedders.0.transformer.b", "conditioner.embedders.1.model.b")


@pytest.mark.parametrize(
    "match, keys",
    [
        ("a UNet alone.*unet=", [UNET]),
        ("a UNet alone.*unet=", ["input_blocks.0.0.weight", "out.2.weight"]),
        ("a UNet alone.*unet=", ["conv_in.weight", "time_embedding.linear_1.weight"]),
        ("a VAE alone.*vae=", ["encoder.down.0.block.0.norm1.weight"]),
        ("a VAE alone.*vae=", [f"first_stage_model.{half}.conv_in.weight" for half in ("encoder", "decoder")]),
        ("a VAE alone.*vae=", ["encoder.down_blocks.0.resnets.0.norm1.weight"]),
        ("a text encoder alone.*text_encoder=", ["text_model.encoder.layers.0.mlp.fc1.weight"]),
        ("a text encoder alone.*text_encoder=", ["token_embedding.weight", "transformer.resblocks.0.ln_1.weight"]),
        ("VAE is missing.*vae=", [UNET, *TEXTS]),
        ("first text encoder is missing.*text_encoder=", [UNET, AUTOENCODER]),
        ("a LoRA.*loras=", ["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"]),
        ("a LoRA.*loras=", ["unet.down_blocks.1.attentions.0.proj_in.lora_A.weight"]),
        ("a LoRA.*loras=", ["lycoris_down_blocks_0.lokr_w1"]),
        ("a Control-LoRA", ["lora_controlnet", "input_hint_block.0.weight", "input_blocks.1.1.proj_in.up"]),
        ("a ControlNet-LLLite", ["lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q.down.0.weight"]),
        ("a union of ControlNets", ["task_embedding", "controlnet_cond_embedding.conv_in.weight"]),
        ("a ControlNet,.*controlnet=", ["control_model.input_hint_block.0.weight"]),
        ("a ControlNet,.*controlnet=", ["input_hint_block.0.weight", "zero_convs.0.0.weight"]),
        ("a T2I-Adapter", ["body.0.block1.weight", "conv_in.weight"]),
        ("a T2I-Adapter", ["adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"]),
        ("an IP-Adapter", ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]),
        ("a textual inversion.*embeddings=", ["clip_g", "clip_l"]),
        ("a textual inversion.*embeddings=", ["emb_params"]),
        ("AnimateDiff", ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"]),
        ("Stable Video Diffusion", [UNET, "model.diffusion_model.input_blocks.1.0.time_stack.emb_layers.1.bias"]),
        ("Flux, not a model", ["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"]),
        ("Flux 2", ["single_stream_modulation.lin.weight"]),
        ("Chroma", ["distilled_guidance_layer.in_proj.bias", "double_blocks.0.x"]),
        ("Stable Diffusion 3", ["joint_blocks.0.context_block.adaLN_modulation.1.bias"]),
        ("Stable Cascade", ["clip_txt_mapper.weight"]),
        ("Stable Cascade", ["down_blocks.1.0.channelwise.0.weight"]),
        ("PixArt", ["y_embedder.y_embedding", "blocks.0.cross_attn.q_linear.weight"]),
        ("PixArt", ["adaln_single.linear.weight", "transformer_blocks.0.norm1.weight"]),
        ("Sana", ["blocks.0.cross_attn.q_linear.weight", "blocks.0.mlp.inverted_conv.conv.weight"]),
        ("Hunyuan-DiT", ["mlp_t5.0.weight", "blocks.0.attn1.Wqkv.weight"]),
        ("Hunyuan Video", ["txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias", "double_blocks.0.x"]),
        ("Wan", ["head.modulation", "blocks.0.self_attn.q.weight"]),
        ("Lumina or Z-Image", ["cap_embedder.0.weight"]),
        ("AuraFlow", ["double_layers.0.attn.w2q.weight"]),
        ("Kolors", ["encoder_hid_proj.weight", "down_blocks.0.resnets.0.conv1.weight"]),
        ("Qwen-Image", ["txt_norm.weight", "transformer_blocks.0.attn.to_q.weight"]),
        ("a T5 text encoder", ["encoder.block.0.layer.0.SelfAttention.q.weight"]),
        ("CLIP vision", ["vision_model.embeddings.class_embedding"]),
        ("TAESD", ["decoder.layers.1.weight"]),
        ("a VAE of another architecture", ["decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"]),
        ("an upscaler of images", ["model.1.sub.0.RDB1.conv1.0.weight"]),
        ("an upscaler of images", ["body.0.rdb1.conv1.weight", "conv_first.weight"]),
        ("4 bits .nf4", [UNET, "model.diffusion_model.a.weight.quant_state.bitsandbytes__nf4"]),
        ("int8 by bitsandbytes", [UNET, "model.diffusion_model.a.SCB"]),
        ("SVDQuant", ["transformer_blocks.0.attn.qkv.wscales", "transformer_blocks.0.attn.qkv.qweight"]),
        (r"unknown layout.*'a.b\\nc'", ["a.b\nc"]),
    ],
)  # fmt: skip
def test_other_files_are_named(made, tmp_path, match, keys):
    save_file(zeros(*keys), tmp_path / "x.safetensors")
    refused(match, tmp_path / "x.safetensors", made)


def test_gguf_is_named(made, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    refused("GGUF weights are quantised", tmp_path / "x.gguf", made)
    (tmp_path / "x.safetensors").write_bytes(b"GGUF" + bytes(60))
    refused("GGUF weights, which are quantised", tmp_path / "x.safetensors", made)


# --- what a file declares -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["prediction_type", "modelspec.prediction_type", "modelspec.predict_key"])
@pytest.mark.parametrize("word", ["v", "v_prediction", "velocity", "V"])
def test_v_prediction_in_the_metadata(made, saved, key, word):
    path = saved(metadata={key: word})
    assert file_scheduler(path, *open_file(path)) == {"prediction_type": "v_prediction"}


def test_other_declarations(made, saved):
    for more, metadata, expected in (
        ({}, None, {}),
        ({}, {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        ({}, {"ss_v_parameterization": "True"}, {"prediction_type": "v_prediction"}),
        ({}, {"ss_v_parameterization": "False"}, {}),
        ({}, {"prediction_type": "sample"}, {"prediction_type": "sample"}),
        ({"v_pred": torch.zeros(0)}, None, {"prediction_type": "v_prediction"}),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, None,
         {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ({}, {"prediction_type": "v", "ss_zero_terminal_snr": "True"},
         {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ):  # fmt: skip
        path = saved(more, metadata=metadata)
        assert file_scheduler(path, *open_file(path)) == expected


YAML = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    # parameterization: "eps"
    parameterization: "v"
"""


@pytest.mark.parametrize(
    "text, expected",
    [
        (YAML, {"prediction_type": "v_prediction"}),
        ("model:\n  params:\n    parameterization: eps  # said twice\n", {"prediction_type": "epsilon"}),
        ("target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling", {"prediction_type": "v_prediction"}),
        ("target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling", {"prediction_type": "epsilon"}),
        ('model: {params: {}}\n# parameterization: "v"\n', {}),
        ("&a [*a, *a]\n" * 3 + "\0\xff", {}),
        ("", {}),
    ],
)
def test_a_yaml_beside_the_file(made, saved, text, expected):
    path = saved()
    path.with_suffix(".yaml").write_text(text)
    assert file_scheduler(path, *open_file(path)) == expected


def test_a_contradiction_is_one_line_and_keys_count_first(made, saved):
    path = saved({"v_pred": torch.zeros(0)}, metadata={"modelspec.prediction_type": "epsilon"})
    with pytest.warns(UserWarning, match="v_pred says v_prediction, its metadata .* says epsilon: v_pred.* is taken"):
        facts = file_scheduler(path, *open_file(path))
    assert facts == {"prediction_type": "v_prediction"}
    path = saved(metadata={"modelspec.prediction_type": "epsilon"})
    path.with_suffix(".yaml").write_text(YAML)
    with pytest.warns(UserWarning, match="model.yaml beside it says v_prediction"):
        assert file_scheduler(path, *open_file(path)) == {"prediction_type": "v_prediction"}


def test_edm_files_declare_their_sigmas(made, saved):
    ends = {"edm_vpred.sigma_max": torch.tensor(100.0), "edm_vpred.sigma_min": torch.tensor(0.01)}
    path = saved(ends)
    facts = file_scheduler(path, *open_file(path))
    assert facts["_class_name"] == "EDMEulerScheduler" and facts["prediction_type"] == "v_prediction"
    assert facts["sigma_max"] == 100 and facts["sigma_min"] == pytest.approx(0.01) and facts["sigma_data"] == 1
    path = saved({"edm_vpred.sigma_max": torch.zeros(0)})
    assert file_scheduler(path, *open_file(path))["sigma_max"] == 120
    path = saved({"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)})
    assert file_scheduler(path, *open_file(path)) == {
        "_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon", "sigma_min": 0.002,
        "sigma_max": 80.0, "sigma_data": 0.5,
    }  # fmt: skip


# --- fp8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_weights_are_cast(made, saved, kind):
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    fp8 = {k: v.to(kind) for k, v in made[2].items() if k.startswith("model.") and v.ndim == 2}
    sd = load_model(saved(fp8), tokenizer=made[1])
    layer = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert torch.equal(layer.weight, made[2][key].to(kind).float())


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_scaled_fp8_weights_are_multiplied(made, saved, name):
    block = "model.diffusion_model.middle_block.1.transformer_blocks.0."
    one, rows, plain = (made[2][f"{block}{layer}.weight"] for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v"))
    scales = {"attn1.to_q": one.abs().max() / 448, "attn1.to_k": rows.abs().amax(1) / 448}
    quantised = {"attn1.to_q": one / scales["attn1.to_q"], "attn1.to_k": rows / scales["attn1.to_k"][:, None],
                 "attn1.to_v": plain}  # fmt: skip
    more = {f"{block}{layer}.weight": weight.to(torch.float8_e4m3fn) for layer, weight in quantised.items()}
    more |= {f"{block}{layer}.{name}": scale for layer, scale in scales.items()}
    more |= {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), f"{block}attn1.to_q.scale_input": torch.ones(1),
             f"{block}attn1.to_q.comfy_quant": torch.zeros(8, dtype=torch.uint8)}  # fmt: skip
    path = saved(more)
    assert not warned(path, made)
    attention = load_model(path, tokenizer=made[1]).unet.mid_block.attentions[0].transformer_blocks[0].attn1
    for layer, weight in (("to_q", one), ("to_k", rows)):
        loaded = getattr(attention, layer).weight
        expected = more[f"{block}attn1.{layer}.weight"].float()
        scale = scales[f"attn1.{layer}"].float()
        assert torch.equal(loaded, expected * (scale[:, None] if scale.ndim else scale))
        assert (loaded - weight).abs().max() < 0.07 * weight.abs().max()
    assert torch.equal(attention.to_v.weight, plain.to(torch.float8_e4m3fn).float())


def test_scales_of_other_quantisations_are_refused(made, saved):
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q."
    path = saved({f"{key}weight_scale": torch.ones(7)})
    with pytest.raises(CheckpointError, match=r"weight_scale: scale of shape \(7,\).*quantised in a way"):
        load_model(path, tokenizer=made[1])
    path = saved({f"{key}weight": torch.zeros(128, 64, dtype=torch.uint8), f"{key}weight_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match="has shape .* expected|stored as U8"):
        load_model(path, tokenizer=made[1])
