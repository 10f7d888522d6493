"""LoRA files: the tensors of each layer, in every style of keys; kinds that are not supported, by their names.

    lora_unet_down_blocks_1_attentions_0_….lora_down.weight, .lora_up.weight, .alpha    sd-scripts, diffusers' blocks
    lora_unet_input_blocks_4_1_….lora_down.weight                                       sd-scripts, original blocks
    lora_te_text_model_…, lora_te1_…, lora_te2_…                                        its text encoders
    unet.….to_q.lora_A.weight, text_encoder.….lora_B.weight                             peft; alpha in the header
    unet.….processor.to_q_lora.down.weight, ….q_proj.lora_linear_layer.up.weight        diffusers before peft
    ….lora_mid.weight; ….diff, .diff_b; ….w_norm, .b_norm                               LoCon; whole differences
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from segresearch.checkpoints.json_files import mapping, read_json
from segresearch.checkpoints.tensors import DTYPES, Entry, Shape, listed, mapped, open_file
from segresearch.errors import CheckpointError

ROLES = {  # a pattern of the end of a key -> what the tensor is; the rest names the layer
    r"(\.lora_down|\.lora_A(\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight": "down",
    r"(\.lora_up|\.lora_B(\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight": "up",
    r"\.lora_mid\.weight": "mid", r"([._]lora|\.lora_linear_layer)?\.alpha": "alpha",
    r"\.diff|\.w_norm": "weight", r"\.diff_b|\.b_norm": "bias",
}  # fmt: skip
REFUSED = {  # a pattern of a key -> the kind of file
    r"\.hada_": "a LoHa", r"\.lokr_": "a LoKr", r"dora_scale|lora_magnitude_vector": "a DoRA (dora_scale)",
    r"\.on_input|\.ia3_": "an IA3", r"\.oft_|\.boft_|\.oft_R": "an OFT or BOFT", r"\.[ab][12]\.weight": "a GLoRA",
    r"lora_(up|down|A|B)(\.\w+)?\.bias": "a LoRA with biases", r"\.vera_lambda|vera_[AB]": "a VeRA",
    r"^bundle_emb\.": "a LoRA with textual inversions inside",
    r"^lora_controlnet$": "a control-LoRA, which is a ControlNet",
}  # fmt: skip
OTHERS = {  # a pattern of a key -> the family that the file is made for
    r"single_transformer_blocks|double_blocks|single_blocks": "Flux", r"^lora_prior_": "Stable Cascade",
    r"joint_(transformer_)?blocks": "Stable Diffusion 3", r"^(lora_)?transformer[._]": "a diffusion transformer",
    r"motion_modules": "AnimateDiff", r"blocks[._]\d+[._](self|cross)_attn": "a diffusion transformer (Wan)",
}  # fmt: skip
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "the SDXL refiner"}  # of the text
PEFT = "base_model.model."  # the prefix of files whose alpha is in a config beside them

Layer = dict[str, str]  # of a layer the keys by role


class LoraFile(NamedTuple):
    """An opened file. layers: by the names that they have there. alphas: of those that have one. metadata: of peft."""

    path: Path
    entries: Mapping[str, Entry]
    layers: Mapping[str, Layer]
    alphas: Mapping[str, float]
    metadata: Mapping[str, Any]


def open_lora(path: Path) -> LoraFile:
    """A LoRA of any key style, its weights not read. path: the file, or peft's folder, with adapter_config.json.
    CheckpointError for a file of another kind, by its name."""
    config: dict[str, Any] = {}
    if path.is_dir():
        config = read_json(path / "adapter_config.json")
        path = next(path.glob("*.safetensors"))
    entries, header = open_file(path)
    for pattern, kind in REFUSED.items():
        if key := next((key for key in entries if re.search(pattern, key)), None):
            raise CheckpointError(f"{path} is {kind}, not supported: {key}; merge it into a model with its own tools")
    layers: dict[str, Layer] = {}
    unknown = []
    for key in entries:
        for pattern, role in ROLES.items():
            if match := re.fullmatch(rf"(?P<layer>.+?)({pattern})", key):
                layers.setdefault(match["layer"], {})[role] = key
                break
        else:
            unknown.append(key)
    if not any({"down", "weight", "bias"} & roles.keys() for roles in layers.values()):
        raise CheckpointError(f"{path} is not a LoRA (its first key is {min(entries)!r}): give a file of lora_ keys")
    metadata = mapping(header.get("lora_adapter_metadata", "{}"), f"{path}: its metadata") or config
    file = LoraFile(path, entries, layers, {}, metadata)
    if unknown:
        family = made_for(file)
        kind = f"made for {family}" if family in OTHERS.values() else "of a kind of LoRA that is not supported"
        raise CheckpointError(f"{path}: {listed(unknown, 'unexpected key')}: {kind}")
    for name, roles in layers.items():
        _refuse_incomplete(file, name, roles)
    stored = mapped(path)
    alphas = {name: stored.get_tensor(roles["alpha"]) for name, roles in layers.items() if "alpha" in roles}
    for name, alpha in alphas.items():
        if alpha.numel() != 1 or not alpha.isfinite().all():
            raise CheckpointError(f"{path}: {name}.alpha is not a number: fetch the file again")
    if not alphas and not metadata and (key := next((key for key in entries if key.startswith(PEFT)), None)):
        hint = "give the folder with its adapter_config.json"
        raise CheckpointError(f"{path}: a file of peft without alphas ({key}): {hint}")
    return file._replace(alphas={name: float(alpha) for name, alpha in alphas.items()})


def _refuse_incomplete(file: LoraFile, name: str, roles: Layer) -> None:
    """CheckpointError for a layer without one of its tensors, or with tensors that do not fit each other."""
    fault = "" if roles.keys() & {"down", "up", "weight", "bias"} else "has an alpha and no weights"
    if missing := {"down", "up"} - roles.keys() if roles.keys() & {"down", "up", "mid"} else set():
        fault = f"has no {' and no '.join(sorted(missing))} weights"
    elif "down" in roles and product_shape(file, roles) is None:
        shapes = ", ".join(f"{role} {file.entries[key].shape}" for role, key in roles.items() if role != "alpha")
        fault = f"has weights that do not fit each other ({shapes})"
    for role, key in roles.items():
        if role != "alpha" and file.entries[key].dtype not in DTYPES:
            fault = f"is stored as {file.entries[key].dtype}: quantised weights are not supported"
    if fault:
        raise CheckpointError(f"{file.path}: {name} {fault}: fetch the file again")


def product_shape(file: LoraFile, roles: Layer) -> Shape | None:
    """Of the product of a layer: (out, in) or (out, in, kh, kw); None where its factors do not fit each other."""
    down, up = (file.entries[roles[role]].shape for role in ("down", "up"))
    if min(len(down), len(up)) < 2 or set(up[2:]) - {1}:
        return None
    if "mid" not in roles:
        return (up[0], *down[1:]) if up[1] == down[0] > 0 else None
    mid = file.entries[roles["mid"]].shape
    fits = len(mid) == 4 and mid[:2] == (up[1], down[0]) and not set(down[2:]) - {1}
    return (up[0], down[1], *mid[2:]) if fits else None


def rate(file: LoraFile, layer: str, part: str, name: str) -> float:
    """alpha / rank of a layer; 1 where nothing says its alpha. part, name: of its network and of itself in peft's
    metadata. CheckpointError for metadata that ask for another sum."""
    rank = file.entries[file.layers[layer]["down"]].shape[0]
    if layer in file.alphas:
        return file.alphas[layer] / rank
    own = {key.removeprefix(f"{part}."): value for key, value in file.metadata.items() if key.startswith(f"{part}.")}
    settings = own or ({} if any("." in key for key in file.metadata) else file.metadata)
    start = str(settings.get("init_lora_weights", "")).lower()
    if settings.get("use_dora") or start.startswith(("pissa", "olora", "loftq", "corda")):
        kind = "DoRA" if settings.get("use_dora") else start
        raise CheckpointError(f"{file.path} is made by {kind}, which changes the base weights: not supported")
    alpha = settings.get("lora_alpha", rank)
    try:
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{file.path}: the alpha of {layer} in its metadata cannot be read ({error})") from error


def made_for(file: LoraFile) -> str:
    """The family that a file is made for, as far as its keys, its shapes and its header tell; "" for unknown."""
    keys = "\n".join(file.entries)
    for pattern, family in OTHERS.items():
        if re.search(pattern, keys, re.MULTILINE):
            return family
    for name, roles in file.layers.items():
        if re.search(r"attn2[._](processor[._])?to_[kv]$", name) and "down" in roles:
            width = file.entries[roles["down"]].shape[1]
            return WIDTHS.get(width, f"a model with text {width} wide")
    return "SDXL" if re.search(r"^lora_te2_|^text_encoder_2\.", keys, re.MULTILINE) else ""
