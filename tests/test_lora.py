"""LoRA files: every style of keys gives the same exact merge; what is not supported or does not fit is named."""

import json
import math
import re
import warnings

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from make_families import make_family, write_family
from make_models import make_pipeline, write_single
from safetensors.torch import save_file

from segresearch.checkpoints.additions import Lora, as_loras
from segresearch.checkpoints.key_maps import UNET, unet_map
from segresearch.checkpoints.load import load_network
from segresearch.checkpoints.lora_merge import image_network, merges, text_networks
from segresearch.errors import CheckpointError, InputError
from segresearch.models import load_model

PARTS = ("unet", "text_encoder", "text_encoder_2")
UNET_LAYERS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.0.proj", "ff.net.2", "proj_in")
OTHER_LAYERS = (
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "conv_in",
    "linear_1",
    "conv_out",
)
TEXT_LAYERS = ("q_proj", "out_proj", "fc1")


def networks(sd):
    return dict(zip(PARTS, (sd.unet, *sd.text.encoders)))


def states(sd):
    return {
        part: {k.removeprefix("text_model."): v for k, v in net.state_dict().items()}
        for part, net in networks(sd).items()
    }


def random_lora(sd, layers, seed=0, tucker=False):
    """{part: {layer: (down, up, alpha)}} of random factors, each layer with a rank and an alpha of its own; `mid` as a
    fourth of a convolution where `tucker`."""
    made = {part: {} for part in PARTS}
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 0.1 * torch.randn(shape, generator=generator)  # noqa: E731
    for part, state in states(sd).items():
        for i, (key, weight) in enumerate(sorted(state.items())):
            layer = key.removesuffix(".weight")
            if key.endswith(".weight") and weight.ndim > 1 and layer.endswith(layers):
                (rank, alpha), (out, inner, *kernel) = (2 + i % 3, 0.5 + i % 4), weight.shape
                if tucker and kernel:
                    mid = draw(rank, rank, *kernel)
                    made[part][layer] = (draw(rank, inner, 1, 1), draw(out, rank, 1, 1), alpha, mid)
                else:
                    made[part][layer] = (draw(rank, inner, *kernel), draw(out, rank, *[1] * len(kernel)), alpha)
    return made


def merged(sd, *scaled):
    """The weights with LoRAs (random_lora, scale, text_scale) added densely."""
    out = {part: {key: value.clone() for key, value in state.items()} for part, state in states(sd).items()}
    for lora, scale, text_scale in scaled:
        for part, layers in lora.items():
            for layer, (down, up, alpha, *mid) in layers.items():
                weight = out[part][f"{layer}.weight"]
                if mid:
                    delta = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid[0], down[:, :, 0, 0])
                else:
                    delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
                weight += (scale if part == "unet" else text_scale) * alpha / len(down) * delta
    return out


def flat(name):
    return name.replace(".", "_")


def kohya(lora, original=None):
    """Keys of sd-scripts; original: from a UNet key to that of the original layout."""
    keys, prefix = (
        {},
        {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"},
    )
    for part, layers in lora.items():
        for layer, (down, up, alpha, *mid) in layers.items():
            name = layer
            if original and part == "unet":
                name = original(f"{layer}.weight").key.removeprefix(UNET).removesuffix(".weight")
            name = prefix[part] + flat(name)
            keys |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(alpha),
            }
            keys |= {f"{name}.lora_mid.weight": mid[0]} if mid else {}
    return keys


def dotted(lora, down_name, up_name, rename=lambda part, layer: layer, alphas=True):
    keys = {}
    for part, layers in lora.items():
        for layer, (down, up, alpha) in layers.items():
            name = f"{part}.{'' if part == 'unet' else 'text_model.'}{rename(part, layer)}"
            keys |= {name + down_name: down, name + up_name: up}
            keys |= {f"{name}.alpha": torch.tensor(alpha)} if alphas else {}
    return keys


def write(file, keys, metadata=None):
    save_file({key: value.clone().contiguous() for key, value in keys.items()}, file, metadata)
    return file


def added(sd, loras):
    """The weights with LoRAs, as a load gives them, without another load."""
    every = dict(zip(PARTS, merges(as_loras(loras), sd.unet, sd.text.encoders)))
    return {
        part: {key.removeprefix("text_model."): every[part](key, weight) for key, weight in net.state_dict().items()}
        for part, net in networks(sd).items()
    }


def assert_same(weights, expected, exact=False):
    """weights: of `added`, or a loaded model."""
    for part, state in (weights if isinstance(weights, dict) else states(weights)).items():
        for key, value in state.items():
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(value, expected[part][key], **tolerance, msg=f"{part} {key}")


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


# --- what is refused ------------------------------------------------------------------------------


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
