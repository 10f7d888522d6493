"""ControlNets on disk: where a name lies, what loads, and what is refused by one line."""

import json
import shutil

import pytest
import torch
from make_families import make_family
from make_models import make_controlnet, make_pipeline, to_original, write_single
from safetensors.torch import load_file, save_file

from segresearch.checkpoints.controlnet_file import original_map
from segresearch.checkpoints.controlnets import open_controlnets
from segresearch.checkpoints.load import check_fit
from segresearch.errors import CheckpointError
from segresearch.models import load_model
from segresearch.models.conditioning import Cond
from segresearch.models.network_configs import ControlNetConfig, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random model with the ControlNet "edges" in its folder; its single file; and the diffusers ControlNet."""
    root = tmp_path_factory.mktemp("model")
    pipeline = make_pipeline(root / "sdxl")
    pipeline.save_pretrained(root / "sdxl")
    net = make_controlnet(pipeline)
    net.save_pretrained(root / "sdxl" / "controlnet" / "edges")
    return root / "sdxl", write_single(root / "one.safetensors", pipeline), net


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the ControlNet's folder that a test may break."""
    return shutil.copytree(made[0] / "controlnet" / "edges", tmp_path / "depth")


def opened(asked, model, variant=None):
    return {name: weights for name, (_, weights) in open_controlnets(asked, model, variant, UNetConfig()).items()}


def refused(match, asked, model):
    with pytest.raises(CheckpointError, match=match) as caught:
        open_controlnets(asked, model, None, UNetConfig())
    assert "\n" not in str(caught.value)


def assert_loaded(net, expected, exact=True):
    theirs = expected.state_dict()
    assert net.state_dict().keys() == theirs.keys()
    assert not net.training and not any(p.requires_grad or p.is_meta for p in net.parameters())
    for key, weight in net.state_dict().items():
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(weight.float(), theirs[key], **tolerance)


def test_by_name_and_by_path_in_the_order_asked(made, folder):
    sd = load_model(made[0], controlnet=[folder, "edges"])
    assert list(sd.controlnets) == [str(folder), "edges"]
    for net in sd.controlnets.values():
        assert_loaded(net, made[2])
    assert not load_model(made[0]).controlnets


def test_beside_a_single_file_and_in_its_dtype(made, folder):
    sd = load_model(made[1], tokenizer=made[0], controlnet=str(folder), dtype=torch.bfloat16)
    (net,) = sd.controlnets.values()
    assert net.conv_in.weight.dtype == torch.bfloat16
    assert net.embed_image(torch.rand(1, 3, 8, 8)).dtype == torch.bfloat16
    assert_loaded(net, made[2], exact=False)


def test_shards_and_variants(made, tmp_path):
    model, _, net = made
    net.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / f"{WEIGHTS}.index.json").is_file()
    net.save_pretrained(tmp_path / "both")
    net.save_pretrained(tmp_path / "both", variant="fp16")
    net.save_pretrained(tmp_path / "half", variant="fp16")
    for name, variant, file in (
        ("half", None, "diffusion_pytorch_model.fp16.safetensors"),
        ("both", "fp16", "diffusion_pytorch_model.fp16.safetensors"),
        ("both", None, WEIGHTS),
        ("both", "ema", WEIGHTS),  # the variant is the model's; a ControlNet without it has its plain weights
    ):
        (weights,) = opened(tmp_path / name, model, variant).values()
        assert {entry.file.name for entry in weights.entries.values()} == {file}
    (weights,) = opened(tmp_path / "sharded", model).values()
    assert weights.entries.keys() == net.state_dict().keys()
    assert len({entry.file for entry in weights.entries.values()}) > 1


def test_hub_id_is_looked_up_in_the_local_cache_only(made, folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused("hf download someone/edges", "someone/edges", made[0])
    cached = tmp_path / "models--someone--edges"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert list(opened("someone/edges", made[0])) == ["someone/edges"]


def test_what_is_not_there(made, folder, tmp_path):
    refused("unknown controlnet 'edgs': the model has edges; or", "edgs", made[0])
    refused("unknown controlnet 'edges': .* has none of its own", "edges", made[1])
    refused("'edges' is named twice", ["edges", "edges"], made[0])
    refused("is a whole model, not a ControlNet", made[0], made[0])
    (tmp_path / "net.pth").write_bytes(b"\x80")
    refused("pickle checkpoints can run code", tmp_path / "net.pth", made[0])
    (tmp_path / "bare").mkdir()
    refused("config.json is missing", tmp_path / "bare", made[0])
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    refused("pickle checkpoints can run code", folder, made[0])
    (folder / "diffusion_pytorch_model.bin").unlink()
    refused(f"no {WEIGHTS} here", folder, made[0])


# --- one file ---------------------------------------------------------------------------------------


def original(net, prefix="control_model."):
    """The weights of a diffusers ControlNet under the original names."""
    hints = list(range(0, 2 * len(net.controlnet_cond_embedding.blocks) + 4, 2))
    source = original_map(ControlNetConfig.from_dict(dict(net.config)), hints, prefix)
    return to_original(net.state_dict(), {key: source(key) for key in net.state_dict()})


def test_one_file_under_diffusers_names(made, tmp_path):
    model, single, net = made
    path = shutil.copy(model / "controlnet" / "edges" / WEIGHTS, tmp_path / "edges.safetensors")
    for base, options in ((model, {}), (single, {"tokenizer": model, "config": model})):
        (loaded,) = load_model(base, controlnet=path, **options).controlnets.values()
        assert_loaded(loaded, net)
        assert loaded.config == ControlNetConfig.from_dict(dict(net.config))


def test_one_file_beside_its_config(made, folder):
    config = json.loads((folder / "config.json").read_text()) | {"controlnet_conditioning_channel_order": "bgr"}
    (folder / "config.json").write_text(json.dumps(config))
    (net,) = load_model(made[0], controlnet=folder / WEIGHTS).controlnets.values()
    assert net.config.controlnet_conditioning_channel_order == "bgr"


@pytest.mark.parametrize("changes", [
    {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"},
    {"transformer_layers_per_block": (1, 2, 1)},
])  # fmt: skip
def test_a_file_of_another_depth_than_its_unet(made, tmp_path, changes):
    """As the small published ones, which have no attention."""
    net = make_controlnet(make_pipeline(tmp_path), **changes)
    save_file(net.state_dict(), tmp_path / "small.safetensors")
    (loaded,) = load_model(made[0], controlnet=tmp_path / "small.safetensors").controlnets.values()
    assert_loaded(loaded, net)
    x, t, hint = torch.randn(1, 4, 4, 6), torch.tensor([500.0]), torch.rand(1, 3, 8, 12)
    context, pooled, ids = torch.randn(1, 3, 192), torch.randn(1, 40), torch.rand(1, 6)
    ours = loaded(x, t, Cond(context, pooled, ids), loaded.embed_image(hint))
    with torch.no_grad():
        theirs = net(x, t, context, hint, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}, return_dict=False)
    for a, b in zip((*ours.down, ours.mid), (*theirs[0], theirs[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_one_file_in_the_original_layout(made, tmp_path, prefix):
    model, _, net = made
    save_file(original(net, prefix), tmp_path / "edges.safetensors")
    (loaded,) = load_model(model, controlnet=tmp_path / "edges.safetensors").controlnets.values()
    assert_loaded(loaded, net)
    assert loaded.config == ControlNetConfig.from_dict(dict(net.config))


def test_original_names_are_those_that_diffusers_converts(tmp_path):
    """Its converter knows images of eight convolutions, the published ones, and no embedding of sizes."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    net = make_controlnet(make_pipeline(tmp_path), conditioning_embedding_out_channels=(4, 6, 8, 10))
    weights = original(net)
    assert "control_model.input_hint_block.14.weight" in weights and "control_model.zero_convs.8.0.bias" in weights
    theirs = convert_controlnet_checkpoint(weights, dict(net.config))
    expected = {key: weight for key, weight in net.state_dict().items() if "add_embedding" not in key}
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[key], weight) for key, weight in expected.items())


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_one_file_of_another_family(name, tmp_path, made):
    """Under diffusers' names and the original ones; not for SDXL, nor SDXL's for it."""
    pipe = make_family(name, tmp_path / "model")
    pipe.save_pretrained(tmp_path / "model")
    net = make_controlnet(pipe)
    files = {}
    for layout, weights in {"diffusers": net.state_dict(), "original": original(net)}.items():
        files[layout] = tmp_path / f"{layout}.safetensors"
        save_file({k: w.contiguous() for k, w in weights.items()}, files[layout])
    sd = load_model(tmp_path / "model", controlnet=list(files.values()))
    for loaded in sd.controlnets.values():
        assert_loaded(loaded, net)
        assert loaded.config == ControlNetConfig.from_dict(dict(net.config))
    x, t, image = torch.randn(1, 4, 4, 8), torch.tensor([321.0]), torch.rand(1, 3, 8, 16)
    context = torch.randn(1, 5, loaded.config.cross_attention_dim)
    ours = loaded(x, t, Cond(context, context.new_zeros(1, 0), context.new_zeros(1, 0)), loaded.embed_image(image))
    with torch.no_grad():
        theirs = net(x, t, context, image, return_dict=False)
    for a, b in zip((*ours.down, ours.mid), (*theirs[0], theirs[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="level widths|text width"):
        load_model(made[0], controlnet=files["diffusers"])
    shutil.copy(made[0] / "controlnet" / "edges" / WEIGHTS, tmp_path / "sdxl.safetensors")
    with pytest.raises(CheckpointError, match="level widths|text width"):
        load_model(tmp_path / "model", controlnet=tmp_path / "sdxl.safetensors")


def test_files_lie_in_the_models_own_folder_too(made, tmp_path):
    model = shutil.copytree(made[0], tmp_path / "sdxl")
    shutil.move(model / "controlnet" / "edges" / WEIGHTS, model / "controlnet" / "lines.safetensors")
    (model / "controlnet" / "edges" / "config.json").unlink()
    (loaded,) = load_model(model, controlnet="lines").controlnets.values()
    assert_loaded(loaded, made[2])


OTHERS = {
    "Control-LoRA": ["lora_controlnet", "input_blocks.0.0.weight", "input_blocks.1.0.emb_layers.1.up"],
    "ControlNet-LLLite": ["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"],
    "a T2I-Adapter, which is not supported: give": ["adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"],
    "is a T2I-Adapter": ["body.0.block1.weight", "body.0.in_conv.weight", "conv_in.weight"],
    "ControlNet-XS": ["control_model.enc_zero_convs_out.0.0.weight", "control_model.input_hint_block.0.weight"],
    "is an IP-Adapter: give a ControlNet": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip"],
    "a LoRA": ["lora_unet_down_blocks_1_attentions_0_proj_in.alpha"],
    "a difference of ControlNets": ["difference", "control_model.input_hint_block.0.weight"],
    "a diffusion transformer": ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"],
    "a whole model": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
    "unknown layout .its first key is 'conv_in.bias'": ["conv_in.weight", "conv_in.bias"],
    "keys are missing": ["controlnet_cond_embedding.conv_in.weight"],
    "sizes cannot be told": ["control_model.input_hint_block.0.bias"],
}


@pytest.mark.parametrize("match", OTHERS)
def test_other_files_are_named(made, tmp_path, match):
    save_file({key: torch.zeros(2, 2) for key in OTHERS[match]}, tmp_path / "net.safetensors")
    refused(match, tmp_path / "net.safetensors", made[0])


def test_a_file_of_another_family_or_damaged(made, tmp_path):
    model, _, net = made
    refused("reference-only is no network but a change of attention", "reference_only", model)
    (tmp_path / "cut.safetensors").write_bytes(bytes(8))
    refused("not a safetensors file|truncated", tmp_path / "cut.safetensors", model)
    other = make_controlnet(make_pipeline(tmp_path), cross_attention_dim=64)
    for weights in (other.state_dict(), original(other)):
        save_file(weights, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match="text width: 64 in the ControlNet, 192 in the UNet"):
            load_model(model, controlnet=tmp_path / "other.safetensors")
    lacking = {k: w for k, w in original(net).items() if "zero_convs.2" not in k}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(CheckpointError, match=r"2 missing keys \(control_model.zero_convs.2.0.bias"):
        load_model(model, controlnet=tmp_path / "lacking.safetensors")


def test_what_is_something_else(made, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"addition_embed_type": "image"}))
    refused(r"depth: controlnet config: addition_embed_type='image' is not supported", folder, made[0])
    (folder / "config.json").write_text(json.dumps(config | {"addition_embed_type": None}))
    with pytest.raises(CheckpointError, match="pooled text width: 0 in the ControlNet, 40 in the UNet"):
        load_model(made[0], controlnet=folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"task_embedding": torch.zeros(6, 32)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"missing keys \(control_add_embedding.linear_1.bias"):
        load_model(made[0], controlnet=folder)
    save_file({k: v for k, v in weights.items() if k != "controlnet_mid_block.bias"}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"controlnet depth: 1 missing key \(controlnet_mid_block.bias\)"):
        load_model(made[0], controlnet=folder)


def test_a_controlnet_of_another_model_is_refused_with_both_values(made, folder):
    unet = load_model(made[0]).unet.config
    config = ControlNetConfig.from_dict(json.loads((folder / "config.json").read_text()))
    check_fit("depth", config, unet, 2)
    for change, match in (
        ({"cross_attention_dim": 64}, "text width: 64 in the ControlNet, 192 in the UNet"),
        ({"layers_per_block": (1, 1, 1)}, r"layers per level: \(1, 1, 1\) in the ControlNet, \(2, 2, 2\) in the UNet"),
        ({"block_out_channels": (32, 64, 64)}, r"level widths: \(32, 64, 64\) in"),
        ({"projection_class_embeddings_input_dim": 98}, "pooled text width: 50 in the ControlNet, 40 in"),
        ({"conditioning_embedding_out_channels": (4, 4, 4)}, "per latent pixel: 4 in the ControlNet, 2 in the VAE"),
    ):
        with pytest.raises(CheckpointError, match=match):
            check_fit("depth", ControlNetConfig(**vars(config) | change), unet, 2)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"cross_attention_dim": 64}))
    with pytest.raises(CheckpointError, match="it was made for another model"):
        load_model(made[0], controlnet=folder)
