"""Random LoRAs, their exact merge, and files of them in every style of keys."""

import torch
from safetensors.torch import save_file

from segresearch.checkpoints.additions import as_loras
from segresearch.checkpoints.key_maps import UNET
from segresearch.checkpoints.lora_merge import merges

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
