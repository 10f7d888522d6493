"""LoRA files: every style of keys gives the same exact merge."""

import json
import math
import re
import warnings

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from lora_files import (
    OTHER_LAYERS,
    PARTS,
    TEXT_LAYERS,
    UNET_LAYERS,
    added,
    assert_same,
    dotted,
    flat,
    kohya,
    merged,
    random_lora,
    states,
    write,
)
from make_families import make_family, write_family
from make_models import make_pipeline, write_single

from segresearch.checkpoints.additions import Lora, as_loras
from segresearch.checkpoints.key_maps import unet_map
from segresearch.checkpoints.load import load_network
from segresearch.checkpoints.lora_merge import image_network, merges, text_networks
from segresearch.errors import CheckpointError, InputError
from segresearch.models import load_model


@pytest.fixture(scope="module")
def lora(model):
    return random_lora(model, UNET_LAYERS + TEXT_LAYERS)


@pytest.fixture(scope="module")
def file(lora, tmp_path_factory):
    """`lora` in the keys of sd-scripts."""
    return write(tmp_path_factory.mktemp("lora") / "kohya.safetensors", kohya(lora))


# --- styles of keys -------------------------------------------------------------------------------


def test_kohya_keys_with_an_alpha_of_each_layer(folder, model, lora, file):
    assert all(lora[part] for part in PARTS)
    loaded = load_model(folder, loras=[file])
    assert_same(loaded, merged(model, (lora, 1.0, 1.0)))
    assert not torch.equal(
        loaded.unet.mid_block.attentions[0].proj_in.weight, model.unet.mid_block.attentions[0].proj_in.weight
    )


def test_kohya_keys_of_the_original_blocks(model, tmp_path):
    whole = random_lora(model, UNET_LAYERS + OTHER_LAYERS + TEXT_LAYERS)
    keys = kohya(whole, unet_map(model.unet.config))
    for name in ("input_blocks_4_1_transformer", "middle_block_1_", "output_blocks_2_2_conv", "input_blocks_3_0_op",
                 "time_embed_0", "label_emb_0_0", "input_blocks_0_0", "out_2", "_in_layers_2", "_emb_layers_1",
                 "_skip_connection"):  # fmt: skip
        assert any(name in key for key in keys), name
    assert_same(added(model, [write(tmp_path / "a.safetensors", keys)]), merged(model, (whole, 1.0, 1.0)))


def test_every_layer_has_a_name_of_its_own(model):
    for network in (image_network(model.unet), *text_networks(model.text.encoders)):
        layers = {key.rpartition(".")[0] for key in network.shapes}
        assert set(network.names.values()) == layers
        assert {network.names[flat(layer).removeprefix("text_model_")] for layer in layers} == layers


def processors(part, layer):
    """diffusers before peft: layers of attention lie in its processor."""
    if part != "unet":
        return layer
    return layer.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_")


def old(part, layer):
    """The first style of diffusers, whose attention is in to_q_lora."""
    if "attn" not in layer:
        return f"{layer}.lora" if part == "unet" else f"{layer}.lora_linear_layer"
    return processors(part, layer).replace("q_proj", "to_q").replace("out_proj", "to_out") + "_lora"


@pytest.mark.parametrize(
    "down, up, rename",
    [
        (".lora_A.weight", ".lora_B.weight", lambda part, layer: layer),
        (".lora_A.default_0.weight", ".lora_B.default_0.weight", lambda part, layer: layer),
        (".down.weight", ".up.weight", old),
        (".lora.down.weight", ".lora.up.weight", lambda part, layer: layer),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", processors),
    ],
)
def test_dotted_keys(model, lora, tmp_path, down, up, rename):
    file = write(tmp_path / "a.safetensors", dotted(lora, down, up, rename))
    assert_same(added(model, [file]), merged(model, (lora, 1.0, 1.0)))


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "base_model.model.", "base_model.model.unet.", "lycoris_"])
def test_prefixes_of_a_unet(model, lora, tmp_path, prefix):
    only = {"unet": lora["unet"]}
    keys = {
        prefix + key.removeprefix("unet."): value
        for key, value in dotted(only, ".lora_A.weight", ".lora_B.weight").items()
    }
    if prefix == "diffusion_model.":
        original = unet_map(model.unet.config)
        keys = {
            original(f"{layer}.weight").key.removeprefix("model.").removesuffix("weight") + end: value
            for layer, (down, up, alpha) in lora["unet"].items()
            for end, value in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor([alpha])))
        }
    elif prefix == "lycoris_":
        keys = {key.replace("lora_unet_", prefix): value for key, value in kohya(only).items()}
    assert_same(added(model, [write(tmp_path / "a.safetensors", keys)]), merged(model, (only, 1.0, 1.0)))


def test_alphas_in_the_header(model, lora, tmp_path):
    settings = {}
    for part, layers in lora.items():
        patterns = {layer: alpha for layer, (_, _, alpha) in layers.items() if alpha != 1.5}
        settings |= {f"{part}.r": 4, f"{part}.lora_alpha": 1.5, f"{part}.alpha_pattern": patterns}
    keys = dotted(lora, ".lora_A.weight", ".lora_B.weight", alphas=False)
    file = write(tmp_path / "a.safetensors", keys, {"lora_adapter_metadata": json.dumps(settings)})
    assert_same(added(model, [file]), merged(model, (lora, 1.0, 1.0)))
    settings |= {f"{part}.use_rslora": True for part in PARTS}
    file = write(tmp_path / "b.safetensors", keys, {"lora_adapter_metadata": json.dumps(settings)})
    roots = {p: {k: (d, u, a * math.sqrt(len(d))) for k, (d, u, a) in layers.items()} for p, layers in lora.items()}
    assert_same(added(model, [file]), merged(model, (roots, 1.0, 1.0)))


def test_no_alpha_anywhere_is_the_rank(model, lora, tmp_path):
    file = write(tmp_path / "a.safetensors", dotted(lora, ".lora_A.weight", ".lora_B.weight", alphas=False))
    ranks = {part: {k: (d, u, len(d)) for k, (d, u, _) in layers.items()} for part, layers in lora.items()}
    assert_same(added(model, [file]), merged(model, (ranks, 1.0, 1.0)))


def test_a_folder_of_peft(model, lora, tmp_path):
    keys = dotted({"unet": lora["unet"]}, ".lora_A.weight", ".lora_B.weight", alphas=False)
    keys = {key.replace("unet.", "base_model.model.", 1): value for key, value in keys.items()}
    file = write(tmp_path / "adapter_model.safetensors", keys)
    with pytest.raises(
        CheckpointError, match=r"a file of peft without alphas .*give the folder with its adapter_config"
    ):
        added(model, [file])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 7}))
    sevens = {"unet": {k: (d, u, 7) for k, (d, u, _) in lora["unet"].items()}}
    assert_same(added(model, [tmp_path]), merged(model, (sevens, 1.0, 1.0)))


def test_convolutions_and_linear_layers_as_such(model, tmp_path):
    whole = random_lora(model, OTHER_LAYERS + UNET_LAYERS)
    keys = {k: v[:, :, None, None] if v.ndim == 2 and ".lora_" in k else v for k, v in kohya(whole).items()}
    assert_same(added(model, [write(tmp_path / "a.safetensors", keys)]), merged(model, (whole, 1.0, 1.0)))


def test_tucker_convolutions(model, tmp_path):
    whole = random_lora(model, ("conv1", "conv_shortcut"), tucker=True)
    down, up, alpha, mid = next(value for key, value in whole["unet"].items() if key.endswith("conv1"))
    x = torch.randn(1, down.shape[1], 5, 6)
    chain = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    product = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    torch.testing.assert_close(torch.conv2d(x, product, padding=1), chain, rtol=1e-4, atol=1e-5)
    file = write(tmp_path / "a.safetensors", kohya(whole))
    assert_same(added(model, [file]), merged(model, (whole, 1.0, 1.0)))


def test_differences_of_whole_weights(model, tmp_path):
    expected, keys = merged(model), {}
    norm = "conv_norm_out"
    for name, layer, role in (("diff", "conv_in", "weight"), ("diff_b", "conv_in", "bias"),
                              ("w_norm", norm, "weight"), ("b_norm", norm, "bias")):  # fmt: skip
        keys[f"lora_unet_{layer}.{name}"] = torch.randn_like(expected["unet"][f"{layer}.{role}"])
        expected["unet"][f"{layer}.{role}"] += 0.5 * keys[f"lora_unet_{layer}.{name}"]
    assert_same(added(model, [(write(tmp_path / "a.safetensors", keys), 0.5)]), expected)


# --- scales ---------------------------------------------------------------------------------------


def test_scales(model, lora, file):
    assert_same(added(model, f"{file}:-0.75"), merged(model, (lora, -0.75, -0.75)))
    assert_same(added(model, [(file, 0.5, 2)]), merged(model, (lora, 0.5, 2)))
    assert_same(added(model, f"{file}:0:1e-1"), merged(model, (lora, 0, 0.1)))


def test_scale_0_is_the_base_bit_for_bit(folder, model, file):
    assert_same(load_model(folder, loras=[(file, 0)]), states(model), exact=True)
    half, loaded = load_model(folder, torch.bfloat16), load_model(folder, torch.bfloat16, loras=[(file, 0.0)])
    assert_same(loaded, states(half), exact=True)


def test_several_in_any_order(folder, model, lora, file, tmp_path):
    second = random_lora(model, OTHER_LAYERS + UNET_LAYERS, seed=1)
    other = write(tmp_path / "b.safetensors", dotted(second, ".lora_A.weight", ".lora_B.weight"))
    expected = merged(model, (lora, 0.8, 0.8), (second, -0.3, -0.3))
    for loras in ([(file, 0.8), (other, -0.3)], [Lora(str(other), -0.3), f"{file}:0.8"]):
        assert_same(load_model(folder, loras=loras), expected)


def test_the_sum_is_rounded_once(folder, model, lora, file):
    """In bf16: the fp32 sum, rounded, not a sum of rounded ones."""
    expected = merged(model, (lora, 1.0, 1.0))
    rounded = {
        part: {key: value.to(torch.bfloat16) for key, value in state.items()} for part, state in expected.items()
    }
    for part, state in states(load_model(folder, torch.bfloat16, loras=[file])).items():
        assert all(value.dtype == torch.bfloat16 for value in state.values())
        same = [torch.equal(value, rounded[part][key]) for key, value in state.items()]
        assert sum(same) >= 0.9 * len(same)  # the dense sum has another order of additions
        for key, value in state.items():
            torch.testing.assert_close(value, rounded[part][key], rtol=2**-7, atol=1e-5)


def test_half_precision_files(model, lora, tmp_path):
    halves = {p: {k: (d.half(), u.half(), a) for k, (d, u, a) in layers.items()} for p, layers in lora.items()}
    file = write(tmp_path / "a.safetensors", kohya(halves))
    exact = {p: {k: (d.float(), u.float(), a) for k, (d, u, a) in layers.items()} for p, layers in halves.items()}
    assert_same(added(model, [file]), merged(model, (exact, 1.0, 1.0)))


def test_a_single_file_model(model, lora, file, folder, tmp_path):
    single = write_single(tmp_path / "m.safetensors", make_pipeline(tmp_path))
    assert_same(load_model(single, tokenizer=folder, loras=[(file, 0.5)]), merged(model, (lora, 0.5, 0.5)))


@pytest.mark.parametrize("scale", [math.nan, math.inf, True])
def test_scales_that_are_none(model, file, scale):
    with pytest.raises(InputError, match="scale of LoRA .* must be a finite number"):
        added(model, [(file, scale)])


# --- against diffusers ----------------------------------------------------------------------------


def fused(pipeline, file, scale):
    """diffusers' own reading of the keys (of fuse_lora it needs peft), fused densely into the pipeline."""
    state, alphas = pipeline.lora_state_dict(str(file), unet_config=pipeline.unet.config)
    found = {}
    for key, alpha in (alphas or {}).items():
        part, _, name = key.partition(".")
        found[f"{part}.{plain_name(part, name)}"] = alpha
    for part in PARTS:
        net = getattr(pipeline, part, None)
        own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
        if net is None or not own:
            continue
        if not any(".lora_A." in key for key in own):
            own = convert_unet_state_dict_to_peft(own) if part == "unet" else convert_state_dict_to_peft(own)
        names = {plain_name(part, name): name for name, _ in net.named_modules()}
        for key, down in own.items():
            if ".lora_A." in key:
                up, name = own[key.replace(".lora_A.", ".lora_B.")], plain_name(part, key)
                alpha = len(down) if not alphas else found[f"{part}.{name}"]
                weight = net.get_submodule(names[name]).weight.data
                weight += scale * alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return pipeline


def plain_name(part, key):
    """The layer of a key in diffusers' words, whatever its style."""
    name = re.sub(r"[._]lora[._].*$|\.alpha$", "", key.replace(".processor", "")).removeprefix("text_model.")
    if part == "unet":
        return re.sub("to_out$", "to_out.0", name)
    return re.sub(r"to_(q|k|v|out)$", r"\1_proj", name)


@pytest.mark.parametrize("style", ["kohya", "original blocks", "peft", "old"])
def test_equal_to_diffusers(folder, model, lora, tmp_path, style):
    layers = UNET_LAYERS + TEXT_LAYERS + (("conv1", "time_emb_proj", "conv_shortcut") if style == "kohya" else ())
    whole = random_lora(model, layers, seed=3)
    peft = dotted(whole, ".lora_A.weight", ".lora_B.weight", alphas=False)
    first = dotted(whole, ".down.weight", ".up.weight", old, alphas=False)
    original = unet_map(model.unet.config) if style == "original blocks" else None
    keys = {"peft": peft, "old": first}.get(style) or kohya(whole, original)
    file = write(tmp_path / "a.safetensors", keys)
    pipeline = fused(make_pipeline(tmp_path), file, 0.7)
    loaded = load_model(folder, loras=[(file, 0.7)])
    assert_same(loaded, {part: {k.removeprefix("text_model."): v for k, v in net.state_dict().items()} for part, net in
                         zip(PARTS, (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2))})  # fmt: skip
    prompts = ["a red cube", ""]
    context, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    cond = loaded.encode(prompts, size=(16, 24))["cond"]
    torch.testing.assert_close(cond.context, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cond.pooled, pooled, rtol=1e-5, atol=1e-5)
    x, t = torch.randn(2, 4, 8, 12), torch.tensor([7.0, 800.0])
    added = {"text_embeds": pooled, "time_ids": cond.time_ids}
    with torch.no_grad():
        expected = pipeline.unet(x, t, context, added_cond_kwargs=added).sample
        torch.testing.assert_close(loaded.unet(x, t, cond), expected, rtol=1e-5, atol=1e-5)
        assert (model.unet(x, t, cond) - expected).abs().max() > 1e-2


def test_weights_in_fp8(model, lora, file):
    """The stored number and the product are added in fp32."""
    [merge, *_] = merges(as_loras(file), model.unet, model.text.encoders)
    layer, (down, up, alpha) = next(iter(lora["unet"].items()))
    stored = model.unet.state_dict()[f"{layer}.weight"].to(torch.float8_e4m3fn)
    expected = stored.float() + alpha / len(down) * (up @ down)
    torch.testing.assert_close(merge(f"{layer}.weight", stored), expected, rtol=1e-5, atol=1e-6)
    assert merge("conv_in.weight", stored) is stored


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_models_with_one_text_encoder(family, tmp_path, lora):
    write_family(family, tmp_path / "model")
    base = load_model(tmp_path / "model")
    whole = random_lora(base, UNET_LAYERS + TEXT_LAYERS + ("conv1", "time_emb_proj"), seed=4)
    keys = {key.replace("lora_te1_", "lora_te_"): value for key, value in kohya(whole).items()}
    file = write(tmp_path / "a.safetensors", keys)
    pipeline, loaded = (
        fused(make_family(family, tmp_path), file, 0.7),
        load_model(tmp_path / "model", loras=[(file, 0.7)]),
    )
    assert_same(loaded, merged(base, (whole, 0.7, 0.7)))
    context = pipeline.encode_prompt(["a red cube"], "cpu", 1, False)[0]
    cond = loaded.encode(["a red cube"], size=(16, 24))["cond"]
    torch.testing.assert_close(cond.context, context, rtol=1e-5, atol=1e-5)
    x, t = torch.randn(1, 4, 8, 16), torch.tensor([500.0])
    with torch.no_grad():
        expected = pipeline.unet(x, t, context).sample
        torch.testing.assert_close(loaded.unet(x, t, cond), expected, rtol=1e-5, atol=1e-5)
    names = kohya({"unet": whole["unet"]}, unet_map(base.unet.config))
    original = merged(base, ({"unet": whole["unet"]}, 1, 1))
    assert_same(added(base, [write(tmp_path / "b.safetensors", names)]), original)
    with pytest.raises(
        CheckpointError, match="a.safetensors is a LoRA of a model with text 192 wide, the model here is"
    ):
        added(base, [write(tmp_path / "a.safetensors", kohya(lora))])


def test_the_refiner(tmp_path):
    write_family("refiner", tmp_path / "model")
    base = load_model(tmp_path / "model")
    whole = random_lora(base, UNET_LAYERS + TEXT_LAYERS)
    for prefix in ("lora_te2_", "lora_te_", "lora_te1_"):
        keys = {key.replace("lora_te1_", prefix): value for key, value in kohya(whole).items()}
        assert_same(added(base, [write(tmp_path / "a.safetensors", keys)]), merged(base, (whole, 1, 1)))


# --- further networks -----------------------------------------------------------------------------


def test_a_network_of_the_model_and_a_lora(model, lora, file):
    """It shares every weight that the LoRA does not change, and its text encoder part is left out, with a warning."""
    args = (model.name, torch.float32, model.device, model.denoiser)
    with pytest.warns(UserWarning, match="18 layers .* of text encoders are left out"):
        other = load_network(None, *args, (Lora(str(file), 0.5),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_network(None, *args, (Lora(str(file), 0.5, 0.0),))
    expected, changed = merged(model, (lora, 0.5, 0))["unet"], set()
    own = model.unet.state_dict()
    for key, weight in other.unet.state_dict().items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-6)
        if weight.data_ptr() != own[key].data_ptr():
            changed.add(key)
    assert changed == {f"{layer}.weight" for layer in lora["unet"]}
    assert other.unet is not model.unet and torch.equal(other.alphas, model.denoiser.alphas)


def test_a_network_of_a_file_and_a_lora(folder, model, lora, file):
    loras, expected = (Lora(str(file), -1.5, 0.0),), merged(model, (lora, -1.5, 0))["unet"]
    for path in ("unet", str(folder)):
        other = load_network(path, str(folder), torch.float32, model.device, model.denoiser, loras)
        for key, weight in other.unet.state_dict().items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-6)
