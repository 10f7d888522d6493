import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils
from make_models import make_pipeline, original_layout, to_original, write_folder, write_single
from safetensors.torch import load_file, save_file

from segresearch.checkpoints import file_sizes, key_maps
from segresearch.checkpoints.tensors import Weights, fill, open_file
from segresearch.errors import CheckpointError
from segresearch.models import load_model
from segresearch.models.unet import UNet, UNetConfig
from segresearch.models.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One random model: (diffusers pipeline, its folder, its single file)."""
    root = tmp_path_factory.mktemp("model")
    pipeline = make_pipeline(root / "folder")
    pipeline.save_pretrained(root / "folder")
    return pipeline, root / "folder", write_single(root / "one.safetensors", pipeline)


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the folder that a test may break."""
    return Path(shutil.copytree(made[1], tmp_path / "folder"))


def networks(sd):
    return {"unet": sd.unet, "vae": sd.vae, "first": sd.text.encoders[0], "second": sd.text.encoders[1]}


def assert_same_weights(a, b, exact=True):
    for name, one in networks(a).items():
        other = networks(b)[name].state_dict()
        assert one.state_dict().keys() == other.keys()
        for key, weight in one.state_dict().items():
            torch.testing.assert_close(
                weight, other[key], **({"rtol": 0, "atol": 0} if exact else {"rtol": 1e-2, "atol": 1e-3})
            )


def refused(match, path, **options):
    """load_model refuses the path with one line that matches."""
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path, **options)
    assert "\n" not in str(caught.value)


# --- what loads -----------------------------------------------------------------------------------


def test_folder_gives_the_outputs_of_diffusers(made):
    pipeline, folder, _ = made
    sd = load_model(folder)
    cond = sd.encode(["a red cube", "a"], size=(16, 24))["cond"]
    x, t = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([961.0, 3.5])
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    with torch.no_grad():
        expected = pipeline.unet(x, t, cond.context, added_cond_kwargs=added).sample
        torch.testing.assert_close(sd.unet(x, t, cond), expected, rtol=1e-5, atol=1e-5)
        pixels = pipeline.vae.decode(x / 0.13025).sample
        torch.testing.assert_close(sd.vae.decode(x), pixels, rtol=1e-5, atol=2e-5)
    assert sd.default_size == (16, 16) and sd.vae.config.latent_channels == 4 and sd.vae.config.factor == 2


def test_loaded_networks_are_frozen_and_whole(made):
    for network in networks(load_model(made[1])).values():
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert not any(t.is_meta for t in [*network.parameters(), *network.buffers()])


def test_file_and_folder_give_equal_tensors(made):
    _, folder, file = made
    one, other = load_model(file, tokenizer=folder), load_model(folder)
    assert_same_weights(one, other)
    for which, prompt in ((0, "a red cube"), (1, "a red cube")):
        assert torch.equal(one.text.tokens([prompt], which), other.text.tokens([prompt], which))
    a, b = (m.encode(["a red cube"], size=(16, 16))["cond"] for m in (one, other))
    assert torch.equal(a.context, b.context) and torch.equal(a.pooled, b.pooled)


def test_the_written_file_is_the_original_layout_to_diffusers(made):
    pipeline, folder, file = made
    read = StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(pipeline, name).state_dict(), getattr(read, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_key_map_at_the_sizes_of_sdxl():
    with torch.device("meta"):
        unet, vae = UNet(UNetConfig()), VAE(VAEConfig())
    source = key_maps.unet_map(unet.config)
    weights = unet.state_dict()
    original = to_original(weights, {k: source(k) for k in weights})
    assert len(original) == len(weights) == 1680
    assert original["model.diffusion_model.output_blocks.2.2.conv.weight"].shape == (1280, 1280, 3, 3)
    assert original["model.diffusion_model.input_blocks.3.0.op.bias"].shape == (320,)
    back = single_file_utils.convert_ldm_unet_checkpoint(
        dict(original), {"layers_per_block": 2, "addition_embed_type": "text_time"}
    )
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in weights.items()}
    shapes = {k.removeprefix(key_maps.UNET): tuple(v.shape) for k, v in original.items()}
    assert UNetConfig.from_dict(file_sizes.unet_config(shapes, pooled=1280)) == UNetConfig()

    source = key_maps.vae_map(4)
    weights = vae.state_dict()
    original = to_original(weights, {k: source(k) for k in weights})
    config = {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
    back = single_file_utils.convert_ldm_vae_checkpoint(dict(original), config)
    assert back.keys() == weights.keys()
    shapes = {k.removeprefix(key_maps.VAE): tuple(v.shape) for k, v in original.items()}
    assert VAEConfig.from_dict(file_sizes.vae_config(shapes)) == VAEConfig()


def test_shards_and_fp16_variant(made, tmp_path):
    plain = load_model(made[1])
    sharded = write_folder(tmp_path / "sharded", shard="400KB")
    assert (sharded / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert_same_weights(plain, load_model(sharded))
    make_pipeline(tmp_path / "half").to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert_same_weights(plain, load_model(tmp_path / "half"), exact=False)
    assert_same_weights(plain, load_model(tmp_path / "half", variant="fp16", dtype=torch.float32), exact=False)
    refused("variant 'bf16'", tmp_path / "half", variant="bf16")


def test_dtype_is_the_callers_and_an_overflowing_vae_stays_fp32(made):
    sd = load_model(made[1], dtype=torch.float16)
    assert sd.unet.conv_in.weight.dtype == torch.float16 and sd.vae.dtype == torch.float32
    assert load_model(made[1], dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert load_model(made[1], dtype=torch.float16, vae_dtype=torch.float16).vae.dtype == torch.float16
    x, t, cond = torch.zeros(1, 4, 8, 8), torch.ones(1), sd.encode(["a"])["cond"]
    assert cond.context.dtype == torch.float16 and sd.unet(x, t, cond).dtype == torch.float16
    with pytest.raises(ValueError, match="int8"):
        load_model(made[1], dtype=torch.int8)


def test_text_encoder_keys_of_either_transformers(made, folder):
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "model.safetensors"
        weights = {k.removeprefix("text_model."): v.clone() for k, v in load_file(path).items()}  # path is written over
        save_file(weights | {"embeddings.position_ids": torch.arange(16)[None]}, path)
    assert_same_weights(load_model(made[1]), load_model(folder))
    save_file(
        {f"text_model.{k}": v for k, v in weights.items() if k != "text_projection.weight"}
        | {"text_projection.weight": weights["text_projection.weight"]},
        path,
    )
    assert_same_weights(load_model(made[1]), load_model(folder))


def test_old_vae_attention_names(made, folder):
    path, old = folder / "vae" / "diffusion_pytorch_model.safetensors", {}
    for key, weight in load_file(path).items():
        for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        old[key] = weight
    save_file(old, path)
    assert_same_weights(load_model(made[1]), load_model(folder))


def test_v_prediction_is_found(made, tmp_path):
    pipeline, folder, file = made
    assert load_model(folder).denoiser.prediction == load_model(file, tokenizer=folder).denoiser.prediction == "epsilon"
    marked = write_single(tmp_path / "v.safetensors", pipeline, v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    denoiser = load_model(marked, tokenizer=folder).denoiser
    assert denoiser.prediction == "v_prediction" and denoiser.sigma_max == 4096 * (1 - 2.0**-24) ** 0.5
    written = write_folder(tmp_path / "folder", prediction_type="v_prediction")
    assert load_model(written).denoiser.prediction == "v_prediction"


def test_config_folder_overrides_the_rule_for_heads(made, tmp_path):
    _, folder, file = made
    config = json.loads((folder / "unet" / "config.json").read_text())
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config | {"attention_head_dim": [1, 2, 4]}))
    assert load_model(file, tokenizer=folder, config=tmp_path).unet.config.heads == (1, 2, 4)
    assert load_model(file, config=folder).unet.config == load_model(folder).unet.config


def test_hub_id_is_looked_up_in_the_local_cache_only(made, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused("hf download someone/tiny-sdxl", "someone/tiny-sdxl")
    cached = tmp_path / "models--someone--tiny-sdxl"
    shutil.copytree(made[1], cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert_same_weights(load_model("someone/tiny-sdxl"), load_model(made[1]))
    refused("brings no tokenizer.*hf download openai", made[2])


# --- what is refused, by name ---------------------------------------------------------------------


def one_file(tmp_path, *keys):
    save_file({k: torch.zeros(1) for k in keys}, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


UNET, AUTOENCODER = "model.diffusion_model.a", "first_stage_model.c"
CLIP, OPEN_CLIP = "conditioner.embedders.0.transformer.b", "conditioner.embedders.1.model.b"


@pytest.mark.parametrize(
    "match, keys",
    [
        ("Flux", ["double_blocks.0.img_attn.norm.key_norm.scale"]),
        ("Stable Diffusion 3", ["model.diffusion_model.joint_blocks.0.a"]),
        ("a LoRA", ["lora_unet_mid_block_attentions_0.lora_up.weight"]),
        ("a ControlNet", ["controlnet_cond_embedding.conv_in.weight"]),
        ("a UNet alone.*unet=", ["down_blocks.0.resnets.0.conv1.weight"]),
        ("unknown layout.*'a.b'", ["a.b"]),
        ("first text encoder is missing", [UNET, OPEN_CLIP, AUTOENCODER]),
        ("second text encoder is missing", [UNET, CLIP, AUTOENCODER]),
        ("VAE is missing", [UNET, CLIP, OPEN_CLIP]),
        ("cannot tell the sizes", [UNET, CLIP,
                                   OPEN_CLIP, AUTOENCODER]),
    ],
)  # fmt: skip
def test_other_models_in_a_file_are_named(tmp_path, match, keys):
    refused(match, one_file(tmp_path, *keys))


@pytest.mark.parametrize(
    "match, content",
    [
        ("is empty", b""),
        ("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6938078334\n"),
        ("holds a pickle", b"PK\x03\x04" + bytes(200)),
        ("web page", b"<!DOCTYPE html><html><body>404</body></html>"),
        ("not a safetensors file", b"\x10\0\0\0\0\0\0\0{not json either}"),
        ("not a safetensors file", b"abc"),
        ("no tensors", b"\x02\0\0\0\0\0\0\0{}"),
    ],
)
def test_files_that_are_no_weights_are_named(tmp_path, match, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(match, tmp_path / "x.safetensors")


def test_truncated_and_longer_files(made, tmp_path):
    for size in (40, 10_000, made[2].stat().st_size - 1):
        (tmp_path / "cut.safetensors").write_bytes(made[2].read_bytes()[:size])
        refused("is truncated", tmp_path / "cut.safetensors")
    (tmp_path / "long.safetensors").write_bytes(made[2].read_bytes() + b"\0")  # safetensors itself refuses it
    refused("longer than its header says", tmp_path / "long.safetensors")


def test_paths_that_do_not_lead_to_a_model(made, tmp_path):
    refused("no such file or folder", tmp_path / "nowhere")
    refused("no such file or folder", "nowhere.safetensors")
    refused("model_index.json", tmp_path)
    refused("one component", made[1] / "unet")
    refused("give that file's path", made[2].parent)
    for name in ("old.ckpt", "folder.bin"):
        (tmp_path / name).write_bytes(b"x")
        refused("pickle checkpoints.*convert it to .safetensors", tmp_path / name)
    refused("pickle", "missing.ckpt")
    with pytest.raises(ValueError, match="is for a single file"):
        load_model(made[1], tokenizer=made[1])
    with pytest.raises(ValueError, match="is for a folder"):
        load_model(made[2], variant="fp16")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_of_other_models_are_named(folder):
    config, index = folder / "unet" / "config.json", folder / "model_index.json"
    original = config.read_text()
    edit(config, addition_embed_type=None)
    refused("text width: 64 in the text encoders, 192 in the UNet", folder)
    config.write_text(original)
    edit(config, out_channels=8)
    refused("4 input channels for 8 of output", folder)
    edit(config, _class_name="UNetSpatioTemporalConditionModel")
    refused("UNetSpatioTemporalConditionModel, not a UNet2DConditionModel", folder)
    config.write_text(original)
    edit(config, act_fn="mish")
    refused("act_fn='mish'", folder)
    config.write_text(original)
    edit(index, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    refused("flow matching .*FlowMatchEulerDiscreteScheduler", folder)
    shutil.rmtree(folder / "text_encoder")
    edit(index, scheduler=["diffusers", "EulerDiscreteScheduler"])
    refused("text_encoder/ is missing: this model needs two text encoders", folder)
    edit(index, text_encoder=[None, None])
    refused("text width: 128 in the text encoders, 192 in the UNet", folder)
    shutil.rmtree(folder / "unet")
    edit(index, _class_name="FluxPipeline")
    refused("FluxPipeline", folder)


def test_broken_folders(made, folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    full = {k: v.clone() for k, v in load_file(weights).items()}  # not the file's own pages: it is written over
    lacking = {k: v for k, v in full.items() if k not in ("conv_in.bias", "conv_in.weight")}
    save_file(lacking | {"extra.weight": torch.zeros(1)}, weights)
    refused(r"2 missing keys \(conv_in.bias, conv_in.weight\) and 1 unexpected key \(extra.weight\)", folder)
    save_file(full | {"conv_in.weight": torch.zeros(32, 5, 3, 3)}, weights)
    refused(r"conv_in.weight has shape \(32, 5, 3, 3\), expected \(32, 4, 3, 3\)", folder)
    save_file(full | {"conv_in.weight": torch.zeros(32, 4, 3, 3, dtype=torch.int8)}, weights)
    refused("stored as I8.*quantised", folder)
    weights.rename(weights.with_suffix(".bin"))
    refused("pickle", folder)
    weights.with_suffix(".bin").unlink()
    refused("no diffusion_pytorch_model.safetensors", folder)
    weights.with_name(weights.name + ".index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    refused(r"1 missing shard \(one.safetensors\)", folder)
    weights.with_name(weights.name + ".index.json").write_text("[]")
    refused("not a mapping", folder)
    weights.with_name(weights.name + ".index.json").write_text('{"weight_map": {"a": 5}}')
    refused("its weight_map names 5, not a", folder)
    weights.with_name(weights.name + ".index.json").unlink()
    save_file(full, weights)
    (folder / "vae" / "config.json").write_text("{")
    refused("not JSON", folder)
    (folder / "vae" / "config.json").unlink()
    refused("config.json is missing", folder)


def test_parts_of_different_models_and_a_missing_tokenizer(folder, tmp_path):
    edit(folder / "text_encoder" / "config.json", hidden_size=128)
    refused("text width: 256 in the text encoders, 192 in the UNet", folder)
    edit(folder / "text_encoder" / "config.json", hidden_size=64)
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    refused("no tokenizer here", folder)


def test_file_with_missing_keys(made, tmp_path):
    weights = original_layout(made[0])
    del weights["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"]
    save_file(weights, tmp_path / "less.safetensors")
    refused(
        r"1 missing key \(conditioner.embedders.1.model.*in_proj_bias\)",
        tmp_path / "less.safetensors",
        tokenizer=made[1],
    )
    weights = original_layout(made[0])
    weights["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"] = torch.zeros(100)
    save_file(weights, tmp_path / "shape.safetensors")
    refused(r"in_proj_bias has shape \(100,\), expected \(128,\)", tmp_path / "shape.safetensors", tokenizer=made[1])


# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, psutil, torch
from segresearch.checkpoints.tensors import Weights, fill, open_file
from pathlib import Path
entries, _ = open_file(Path(sys.argv[1]))
with torch.device("meta"):
    module = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(16)])
rss = lambda: psutil.Process().memory_info().rss
before, seen, done = rss(), [], threading.Event()
def watch():
    while not done.wait(0.002):
        seen.append(rss())
watcher = threading.Thread(target=watch)
watcher.start()
fill(module, Weights("test", entries), getattr(torch, sys.argv[2]), "cpu")
done.set(), watcher.join()
peak = max(seen + [rss()])
assert all(float(layer.weight[-1, -1]) == i for i, layer in enumerate(module))
print((peak - before) / sum(p.nbytes for p in module.parameters()))
"""


def test_peak_memory_while_loading(tmp_path):
    weights = {f"{i}.weight": torch.full((2048, 2048), float(i), dtype=torch.float16) for i in range(16)}
    save_file(weights, tmp_path / "big.safetensors")  # 134 MB
    run = [sys.executable, "-c", MEASURE, str(tmp_path / "big.safetensors"), "bfloat16"]
    ratio = float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert ratio <= 1.2, f"peak is {ratio:.2f} × the weights"


def test_reading_in_pieces_and_from_fp8(tmp_path, monkeypatch):
    monkeypatch.setattr("segresearch.checkpoints.tensors.MAPPED", 64)  # bytes: the file is opened for each tensor
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 37, generator=generator).to(torch.float8_e4m3fn)
    bias = torch.randn(32, generator=generator, dtype=torch.float64)
    save_file({"weight": weight, "bias": bias}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        layer = torch.nn.Linear(37, 32)
    fill(layer, Weights("test", open_file(tmp_path / "x.safetensors")[0]), torch.float32, "cpu")
    assert torch.equal(layer.weight, weight.float()) and torch.equal(layer.bias, bias.float())
