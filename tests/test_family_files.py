"""Every family as one file in the original layout: parity with its folder and with diffusers, sizes from shapes."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from make_families import FAMILIES, write_family
from make_models import to_original
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from segresearch.checkpoints.declared import file_scheduler
from segresearch.checkpoints.file_sizes import clip_config, unet_config
from segresearch.checkpoints.key_maps import clip_map, open_clip_map, unet_map, vae_map
from segresearch.checkpoints.tensors import open_file
from segresearch.errors import CheckpointError
from segresearch.models import load_model
from segresearch.models.network_configs import UNetConfig
from segresearch.models.unet import UNet

PREFIXES = {  # of the text encoders, by how many there are and whether the UNet reads sizes
    (1, False): ("cond_stage_model.transformer.",), (1, True): ("conditioner.embedders.0.model.",),
    (2, True): ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}  # fmt: skip


def original_file(name, pipeline, loaded):
    """The pipeline's weights as the family's own files have them. loaded: the same model, for its sizes."""
    family = FAMILIES[name]
    open_clip = "sd21" in name
    prefixes = ("cond_stage_model.model.",) if open_clip else PREFIXES[len(family.texts), family.sized]
    out = to_original(pipeline.unet.state_dict(), sources(pipeline.unet, unet_map(loaded.unet.config)))
    out |= to_original(pipeline.vae.state_dict(), sources(pipeline.vae, vae_map(2)))
    for part, prefix in zip(family.texts, prefixes, strict=True):
        encoder, clip = getattr(pipeline, part), prefix.endswith("transformer.")
        source = (lambda key, p=prefix: clip_map(key, p)) if clip else (lambda key, p=prefix: open_clip_map(key, p))
        out |= to_original(encoder.state_dict(), sources(encoder, source))
    if open_clip:  # the full file has a projection and one more layer, which is not used
        layers, prefix = loaded.text.encoders[0].config.num_hidden_layers, prefixes[0]
        last = f"{prefix}transformer.resblocks.{layers - 1}."
        out |= {key.replace(last, f"{prefix}transformer.resblocks.{layers}."): torch.zeros_like(value)
                for key, value in out.items() if key.startswith(last)}  # fmt: skip
        out |= {f"{prefix}text_projection": torch.zeros(96, 96), f"{prefix}logit_scale": torch.ones(1)}
    if name == "playground":
        statistics = (family.vae["latents_mean"], family.vae["latents_std"])
        out |= {key: torch.tensor(v).reshape(1, 4, 1, 1) for key, v in zip(("edm_mean", "edm_std"), statistics)}
    return {key: value.clone() for key, value in out.items()}


def sources(module, source):
    return {key: source(key) for key in module.state_dict()}


def assert_equal(one, other):
    nets = [(sd.unet, sd.vae, *sd.text.encoders) for sd in (one, other)]
    for a, b in zip(*nets, strict=True):
        weights, others = a.state_dict(), b.state_dict()
        assert weights.keys() == others.keys()
        assert all(torch.equal(value, others[key]) for key, value in weights.items())
    assert one.unet.config == other.unet.config and one.vae.config == other.vae.config
    assert one.zero_negative == other.zero_negative


@pytest.mark.parametrize("name", FAMILIES)
def test_file_and_folder_are_one_model(name, tmp_path):
    pipeline = write_family(name, tmp_path / "folder")
    folder = load_model(tmp_path / "folder")
    weights = original_file(name, pipeline, folder)
    save_file(weights, tmp_path / "one.safetensors")
    if name == "sd21":
        copies = {f"model_ema.{key}": value.clone() for key, value in weights.items()}
        save_file(copies | weights, tmp_path / "one.safetensors")
        with pytest.warns(UserWarning, match=r"ignored, .* model_ema.\* \(\d+ keys\)$"):
            file = load_model(tmp_path / "one.safetensors", config=tmp_path / "folder")
    else:
        file = load_model(tmp_path / "one.safetensors", config=tmp_path / "folder")
    assert_equal(file, folder)
    a, b = (sd.encode(["a red cube"], size=(16, 24))["cond"] for sd in (file, folder))
    assert a.equals(b)
    assert file.denoiser.prediction == folder.denoiser.prediction


def test_a_file_without_configs_has_its_familys_facts(tmp_path):
    for name in ("sd15", "refiner"):
        pipeline = write_family(name, tmp_path / name)
        folder = load_model(tmp_path / name)
        weights = original_file(name, pipeline, folder)
        save_file(weights, tmp_path / "one.safetensors")
        # 16 groups and heads narrower than 64 are these small models' own
        (tmp_path / "configs" / "unet").mkdir(parents=True, exist_ok=True)
        config = (tmp_path / name / "unet" / "config.json").read_text()
        (tmp_path / "configs" / "unet" / "config.json").write_text(config)
        file = load_model(tmp_path / "one.safetensors", config=tmp_path / "configs", tokenizer=tmp_path / name)
        assert_equal(file, folder)
        acts = [encoder.config.hidden_act for encoder in file.text.encoders]
        assert acts == [encoder.config.hidden_act for encoder in folder.text.encoders]


@pytest.mark.parametrize("spread, prediction", [(0.05, "epsilon"), (0.15, "v_prediction")])
def test_what_sd2_predicts_is_seen_in_its_weights(tmp_path, spread, prediction):
    start = "model.diffusion_model."
    weights = {
        f"{start}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 1024),
        f"{start}input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
        f"{start}output_blocks.11.1.transformer_blocks.0.norm1.bias": spread * torch.tensor([-1.0, 1.0] * 160),
    }
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match=f"{prediction} is taken, as its weights look"):
        facts = file_scheduler(tmp_path / "x.safetensors", *open_file(tmp_path / "x.safetensors"))
    assert facts == {"prediction_type": prediction}
    save_file(weights | {"v_pred": torch.zeros(0)}, tmp_path / "y.safetensors")
    assert file_scheduler(tmp_path / "y.safetensors", *open_file(tmp_path / "y.safetensors")) == {
        "prediction_type": "v_prediction"
    }


def test_old_files_leave_text_model_out(tmp_path):
    pipeline = write_family("sd15", tmp_path / "folder")
    folder = load_model(tmp_path / "folder")
    weights = original_file("sd15", pipeline, folder)
    save_file({key.replace("transformer.text_model.", "transformer."): v for key, v in weights.items()},
              tmp_path / "one.safetensors")  # fmt: skip
    assert_equal(load_model(tmp_path / "one.safetensors", config=tmp_path / "folder"), folder)


def test_diffusers_reads_the_sd15_file(tmp_path):
    pipeline = write_family("sd15", tmp_path / "folder")
    save_file(original_file("sd15", pipeline, load_model(tmp_path / "folder")), tmp_path / "one.safetensors")
    read = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "folder"), local_files_only=True, safety_checker=None
    )
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(read, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_unet_of_another_family_is_refused(tmp_path):
    write_family("sd15", tmp_path / "sd15")
    write_family("sdxl", tmp_path / "sdxl")
    with pytest.raises(CheckpointError, match="mixed|missing|width"):
        load_model(tmp_path / "sd15", unet=tmp_path / "sdxl")
    with pytest.raises(CheckpointError, match="a VAE of another family"):
        load_model(tmp_path / "sdxl", vae=tmp_path / "sd15")


DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
SD = {
    "block_out_channels": [320, 640, 1280, 1280], "down_block_types": [CROSS_DOWN] * 3 + [DOWN],
    "up_block_types": [UP] + [CROSS_UP] * 3, "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "sample_size": 64,
}  # fmt: skip
XL = {
    "block_out_channels": [320, 640, 1280], "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN], "layers_per_block": 2,
    "up_block_types": [CROSS_UP, CROSS_UP, UP], "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
}  # fmt: skip
PUBLISHED = {  # the unet/config.json of published models, and their parameters where these are published
    "sd15": (SD, 859_520_964),
    "sd21": (SD | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
                   "upcast_attention": True}, 865_910_724),
    "sd15 inpainting": (SD | {"in_channels": 9}, None), "instruct-pix2pix": (SD | {"in_channels": 8}, None),
    "LCM": (SD | {"time_cond_proj_dim": 256}, None),
    "sdxl": (XL, 2_567_463_684), "sdxl inpainting": (XL | {"in_channels": 9}, None),
    "SSD-1B": (XL | {"transformer_layers_per_block": [1, 2, 4], "mid_block_type": "UNetMidBlock2D",
                     "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}, None),
    "Vega": (XL | {"transformer_layers_per_block": [1, 1, 2], "mid_block_type": "UNetMidBlock2D"}, None),
    "KOALA-700M": (XL | {"transformer_layers_per_block": [1, 2, 5], "layers_per_block": 1, "mid_block_type": None},
                   None),
    "KOALA-1B": (XL | {"transformer_layers_per_block": [1, 2, 6], "layers_per_block": 1}, None),
    "refiner": (XL | {
        "block_out_channels": [384, 768, 1536, 1536], "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
        "up_block_types": [UP, CROSS_UP, CROSS_UP, UP], "transformer_layers_per_block": [4, 4, 4, 4],
        "attention_head_dim": [6, 12, 24, 24], "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560, "size_ids": 5}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_models_are_read_from_their_shapes(name):
    published, parameters = PUBLISHED[name]
    config = UNetConfig.from_dict(published)
    with torch.device("meta"):
        weights = UNet(config).state_dict()
    if parameters is not None:
        assert sum(weight.numel() for weight in weights.values()) == parameters
    source = unet_map(config, "")
    shapes = {key: tuple(value.shape) for key, value in to_original(weights, {k: source(k) for k in weights}).items()}
    ids = published.get("size_ids", 6)
    pooled = 1280 if "addition_embed_type" in published else None
    read = UNetConfig.from_dict(unet_config(shapes, pooled, ids) | ({"size_ids": 5} if ids == 5 else {}))
    assert {**vars(read), "transformer_layers_per_block": 0} == {**vars(config), "transformer_layers_per_block": 0}
    with torch.device("meta"):
        again = UNet(read).state_dict()
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in weights.items()}


def test_sizes_of_the_text_encoder_of_sd15():
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(**config))
    shapes = {clip_map(key, "").key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    read = clip_config(shapes)
    assert {key: read[key] for key in config} == config and read["hidden_act"] == "quick_gelu"
