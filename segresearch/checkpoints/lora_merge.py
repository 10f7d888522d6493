"""The exact merge of LoRAs into weights that are being read: W + scale · (alpha / rank) · up · down, layer by layer."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from segresearch.checkpoints.additions import Lora
from segresearch.checkpoints.key_maps import UNET, unet_map
from segresearch.checkpoints.lora import WIDTHS, Layer, LoraFile, made_for, open_lora, product_shape, rate
from segresearch.checkpoints.tensors import Shape, listed, mapped
from segresearch.errors import CheckpointError
from segresearch.models.unet import UNet

CLIP = r"(text_encoders\.)?clip_{}\.(transformer\.)?"  # what layers' names in files begin with
FIRST = rf"lora_te1_|(base_model\.model\.)?text_encoder\.|{CLIP.format('l')}"
SECOND = rf"lora_te2_|(base_model\.model\.)?text_encoder_2\.|{CLIP.format('g')}"
ONLY = r"lora_te_"  # of models with one text encoder
IMAGE = r"lora_unet_|lycoris_|base_model\.model\.(unet\.)?|unet\.|(model\.)?diffusion_model\.|"


class Delta(NamedTuple):
    """What one file adds to one parameter: rate · up · down, with `mid` between them, or rate · difference."""

    path: Path
    file: Any  # the same, opened
    keys: tuple[str, ...]  # (up, down), (up, mid, down) or (difference,)
    rate: float


@dataclass(frozen=True)
class Merge:
    """The deltas to the parameters of one network by their names. Called with a name and the stored tensor: the merged
    one in fp32 at least, or that tensor itself where nothing is added."""

    deltas: Mapping[str, tuple[Delta, ...]]

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        for delta in self.deltas.get(name, ()):
            weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
            weight = weight + delta.rate * difference(delta).reshape(weight.shape).to(weight.device)
        return weight


def difference(delta: Delta) -> Tensor:
    """The tensor of a delta, without its rate, in fp32: (out, in) or (out, in, kh, kw). CheckpointError: not finite."""
    tensors = [delta.file.get_tensor(key).float() for key in delta.keys]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise CheckpointError(f"{delta.path}: {delta.keys[0]} holds values that are not finite: fetch the file again")
    if len(tensors) == 1:
        return tensors[0]
    up, *between, down = tensors
    if between:  # (out, a), (a, b, kh, kw), (b, in) -> (out, in, kh, kw)
        return torch.einsum("oa,abhw,bi->oihw", up.flatten(1), between[0], down.flatten(1))
    product = up.flatten(1) @ down.flatten(1)  # (out, r), (r, in · kh · kw)
    return product.reshape(len(up), *down.shape[1:])


class Network(NamedTuple):
    """A network that layers of a file may be of. prefix: a pattern, of what their names begin with there. part: its
    name in peft's metadata. names: from the rest, dots as underscores, to a layer's name. shapes: of parameters."""

    prefix: str
    part: str
    names: Mapping[str, str]
    shapes: Mapping[str, Shape]


class Addend(NamedTuple):
    """A part of a file in its place: what is added to a parameter of network 0 (UNet), 1 or 2 (text encoders)."""

    network: int
    parameter: str
    keys: tuple[str, ...]  # as of a Delta
    rate: float


def merges(loras: Sequence[Lora], unet: UNet, encoders: Sequence[nn.Module]) -> list[Merge]:
    """What the LoRAs add to the UNet and to each text encoder. No encoders: of a UNet alone; what a LoRA has for text
    encoders is then left out, with a warning unless its scale there is 0.

    CheckpointError for a LoRA of another kind or model, for keys that match nothing, and for shapes that do not fit.
    """
    deltas: list[dict[str, tuple[Delta, ...]]] = [{} for _ in (unet, *encoders)]
    networks = [image_network(unet), *text_networks(encoders)] if loras else []
    for lora in loras:
        file = open_lora(lora.resolve())
        stored = mapped(file.path)
        addends, unused = placed(file, networks, unet.config.cross_attention_dim)
        if unused and lora.scales[1]:
            text = f"{listed(unused, 'layer')} of text encoders are left out: only its UNet part acts here"
            warnings.warn(f"{file.path}: {text}", stacklevel=4)
        for i, parameter, keys, own in addends:
            if scale := lora.scales[i > 0] * own:
                delta = Delta(file.path, stored, keys, scale)
                deltas[i][parameter] = (*deltas[i].get(parameter, ()), delta)
    return [Merge(of_network) for of_network in deltas]


def with_loras(unet: UNet, loras: Sequence[Lora]) -> UNet:
    """A loaded UNet with the LoRAs added to its weights; it shares those that none of them changes."""
    [merge] = merges(loras, unet, ())
    with torch.device("meta"):
        other = UNet(unet.config)
    tensors = {key: merge(key, weight).to(weight.dtype) for key, weight in unet.state_dict().items()}
    other.load_state_dict(tensors, strict=True, assign=True)
    return other.eval().requires_grad_(False)


def image_network(unet: UNet) -> Network:
    """The UNet, with the names of both layouts; old files have to_out for to_out.0."""
    names, original = {}, unet_map(unet.config)
    for key in unet.state_dict():
        layer = key.rpartition(".")[0]
        names[flat(original(key).key.removeprefix(UNET).rpartition(".")[0])] = layer
        names[re.sub("to_out_0$", "to_out", flat(layer))] = names[flat(layer)] = layer
    return Network(IMAGE, "unet", names, shapes_of(unet))


def text_networks(encoders: Sequence[nn.Module]) -> list[Network]:
    """The text encoders, one or two; old files have to_q for q_proj."""
    networks = []
    for i, encoder in enumerate(encoders):
        names = {}
        for key in encoder.state_dict():
            layer = key.rpartition(".")[0]
            name = flat(layer.removeprefix("text_model."))
            names[re.sub("self_attn_(q|k|v|out)_proj$", r"self_attn_to_\1", name)] = names[name] = layer
        prefix, part = (FIRST, SECOND)[i], ("text_encoder", "text_encoder_2")[i]
        if len(encoders) == 1:
            prefix = f"{ONLY}|{FIRST}"
            if isinstance(encoder, CLIPTextModelWithProjection):  # of the SDXL refiner
                prefix, part = f"{prefix}|{SECOND}", "text_encoder_2"
        networks.append(Network(prefix, part, names, shapes_of(encoder)))
    return networks


def flat(name: str) -> str:
    """A dotted name as sd-scripts write it."""
    return name.replace(".", "_")


def shapes_of(network: nn.Module) -> dict[str, Shape]:
    """Of the parameters by name."""
    return {key: tuple(parameter.shape) for key, parameter in network.state_dict().items()}


def placed(file: LoraFile, networks: Sequence[Network], width: int) -> tuple[list[Addend], list[str]]:
    """What a file adds, and its layers of text encoders where the networks are the UNet alone. width: of the text that
    the UNet reads. CheckpointError for a layer that no network has, or that does not fit the network's."""
    addends: list[Addend] = []
    unused, unknown, misfits, owners = [], [], [], dict[tuple[int, str, str], str]()
    for layer, roles in file.layers.items():
        name = layer.replace(".processor.", ".")
        text = bool(re.match(f"{ONLY}|{FIRST}|{SECOND}", name))
        if text and len(networks) == 1:
            unused.append(layer)
            continue
        matches = [re.match(network.prefix, name) if text == bool(i) else None for i, network in enumerate(networks)]
        i, match = next(((i, match) for i, match in enumerate(matches) if match), (0, None))
        network, rest = networks[i], name[match.end() :] if match else ""
        target = network.names.get(flat(rest).removeprefix("text_model_"), "") if match else ""
        for role, keys in parts(roles).items():
            parameter = f"{target}.{'bias' if role == 'bias' else 'weight'}"
            if parameter not in network.shapes:
                unknown.append(layer)
                continue
            stored = product_shape(file, roles) if role == "product" else file.entries[keys[0]].shape
            if not alike(stored, network.shapes[parameter]):
                own = " and ".join(f"{key} {file.entries[key].shape}" for key in keys)
                misfits.append(f"{own} for {parameter} {network.shapes[parameter]}")
                continue
            if (other := owners.setdefault((i, parameter, role), layer)) != layer:
                raise CheckpointError(
                    f"{file.path}: {other} and {layer} are both {target}: give a file with one of them"
                )
            own_rate = rate(file, layer, network.part, rest) if role == "product" else 1.0
            addends.append(Addend(i, parameter, keys, own_rate))
    if unknown or misfits:
        refuse_other_model(file, unknown, misfits, width)
    return addends, unused


def parts(roles: Layer) -> dict[str, tuple[str, ...]]:
    """The keys of what a layer adds: "product", "weight" and "bias", as far as it has them."""
    factors = tuple(roles[role] for role in ("up", "mid", "down") if role in roles)
    return ({"product": factors} if factors else {}) | {r: (roles[r],) for r in ("weight", "bias") if r in roles}


def alike(stored: Shape | None, shape: Shape) -> bool:
    """Whether they are equal, 1×1 convolutions and linear layers standing for each other."""
    return stored is not None and (stored == shape or stored + (1, 1) == shape or stored == shape + (1, 1))


def refuse_other_model(file: LoraFile, unknown: Sequence[str], misfits: Sequence[str], width: int) -> None:
    """CheckpointError with the family that the file is made for, and the first of each kind of fault."""
    nothing = f"{listed(set(unknown), 'layer')} match nothing in it" if unknown else ""
    fault = " and ".join(filter(None, [misfits[0] if misfits else "", nothing]))
    family, own = made_for(file), WIDTHS.get(width, f"a model with text {width} wide")
    other = family if family and family != own else "another model"
    raise CheckpointError(f"{file.path} is a LoRA of {other}, the model here is {own}: {fault}")
