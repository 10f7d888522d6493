"""The two layouts on disk, a folder and a single file: told apart from what is not SDXL, and laid out for loading."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segresearch.errors import CheckpointError
from segresearch.models import singlefile
from segresearch.models.checkpoint import (
    Entry,
    Source,
    open_weights,
    read_header,
    unexpected,
)
from segresearch.models.locate import refuse_pickle
from segresearch.models.text import TOKENIZERS, load_tokenizer
from segresearch.models.unet import UNet, UNetConfig
from segresearch.models.vae import VAE, VAEConfig

_LFS = "version https://git-lfs"
_POINTER = "is a git-lfs pointer: run `git lfs pull` in its repository, or download the file itself"


@dataclass(frozen=True)
class Weights:
    """Where the weights of one network lie; sources as in `checkpoint.fill`."""

    entries: Mapping[str, Entry]
    sources: Mapping[str, Source] | None
    what: str


@dataclass(frozen=True)
class Parts:
    """The networks, still on the meta device, their weights (unet, vae, encoders), and the facts beside them."""

    unet: UNet
    vae: VAE
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    weights: tuple[Weights, Weights, Weights, Weights]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    scheduler: Mapping[str, Any]
    zero_negative: bool
    force_upcast: bool


def read_json(path: Path) -> dict[str, Any]:
    """A config. Raises CheckpointError for a file that is missing, a git-lfs pointer or not a JSON object."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: fetch the model again, with its configs")
    text = path.read_text(errors="replace")
    if text.startswith(_LFS):
        raise CheckpointError(f"{path} {_POINTER}")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a config: fetch it again")
    return value


def _tokenizer(folder: Path) -> CLIPTokenizer:
    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        raise CheckpointError(f"{folder}: no tokenizer here (vocab.json and merges.txt): fetch the model's tokenizers")
    for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    merges = folder / "merges.txt"
    if merges.is_file() and merges.read_text(errors="replace").startswith(_LFS):
        raise CheckpointError(f"{merges} {_POINTER}")
    try:
        return load_tokenizer(folder)
    except Exception as error:  # the tokenizers' own errors have no common class
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read ({' '.join(str(error).split())}): fetch its files again"
        ) from error


def _on_meta(
    unet: Mapping[str, Any], vae: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any], where: str
) -> tuple[UNet, VAE, tuple[CLIPTextModel, CLIPTextModelWithProjection]]:
    """The networks of the configs, without weights; a config that is not supported becomes one line with its place."""
    try:
        with torch.device("meta"):
            texts = (
                CLIPTextModel(CLIPTextConfig.from_dict(dict(first))),
                CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(second))),
            )
            return UNet(UNetConfig.from_dict(unet)), VAE(VAEConfig.from_dict(vae)), texts
    except Exception as error:  # transformers checks its configs with errors of its own classes
        kind = (
            ""
            if isinstance(error, ValueError)
            else f"a config that no model can be built from, {type(error).__name__}: "
        )
        raise CheckpointError(f"{where}: {kind}{' '.join(str(error).split())}") from error


# --- the folder layout ----------------------------------------------------------------------------


def from_folder(folder: Path, variant: str | None) -> Parts:
    index = _pipeline_index(folder)
    configs = [read_json(folder / name / "config.json") for name in ("unet", "vae", "text_encoder", "text_encoder_2")]
    unet, vae, encoders = _on_meta(configs[0], configs[1], configs[2], configs[3], str(folder))
    texts = []
    for module, name in zip(encoders, ("text_encoder", "text_encoder_2"), strict=True):
        entries = open_weights(folder / name, "model", variant)
        texts.append(Weights(entries, _covering(module, entries), name))
    vae_entries = {_modern(k): e for k, e in open_weights(folder / "vae", "diffusion_pytorch_model", variant).items()}
    weights = (
        Weights(open_weights(folder / "unet", "diffusion_pytorch_model", variant), None, "unet"),
        Weights(vae_entries, None, "vae"),
        texts[0],
        texts[1],
    )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return Parts(
        unet,
        vae,
        encoders,
        weights,
        (_tokenizer(folder / "tokenizer"), _tokenizer(folder / "tokenizer_2")),
        read_json(scheduler) if scheduler.is_file() else {},
        bool(index.get("force_zeros_for_empty_prompt", True)),
        bool(configs[1].get("force_upcast", True)),
    )


def _pipeline_index(folder: Path) -> dict[str, Any]:
    """model_index.json of an SDXL pipeline folder. Raises CheckpointError, naming what the folder is instead."""
    hint = "give a folder in the diffusers layout of SDXL (with model_index.json)"
    if not (folder / "model_index.json").is_file():
        if (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is one component, not a whole model: give the folder above it (with model_index.json)"
            )
        files = sorted(folder.glob("*.safetensors"))
        if files:
            raise CheckpointError(
                f"{folder} has no model_index.json but {files[0].name}: give that file's path, if it is the checkpoint"
            )
        for path in sorted(folder.glob("*")):
            refuse_pickle(path)
        raise CheckpointError(f"{folder}: no model_index.json here: {hint}")
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name", ""))
    unet = read_json(folder / "unet" / "config.json") if (folder / "unet" / "config.json").is_file() else None
    if unet is None:
        raise CheckpointError(f"{folder} is a {kind or 'pipeline'} without unet/config.json, not SDXL; {hint}")
    width = unet.get("cross_attention_dim")
    if unet.get("addition_embed_type") != "text_time":
        name = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}.get(
            width if isinstance(width, int) else 0, kind or "another model"
        )
        raise CheckpointError(
            f"{folder} is {name} (cross_attention_dim {width}, no size conditioning), not SDXL; {hint}"
        )
    if unet.get("in_channels", 4) != unet.get("out_channels", 4):
        raise CheckpointError(
            f"{folder} is an inpainting or editing model ({unet['in_channels']} input channels), not supported; {hint}"
        )
    encoders = [name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()]
    if encoders == ["text_encoder_2"] and index.get("requires_aesthetics_score"):
        raise CheckpointError(
            f"{folder} is the SDXL refiner: it has one text encoder and cannot start from noise; give SDXL base"
        )
    for name in ("text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2"):
        if not (folder / name).is_dir():
            raise CheckpointError(
                f"{folder}: {name}/ is missing: SDXL needs two text encoders with tokenizers and a VAE; fetch it too"
            )
    if str(index.get("scheduler", [""])[-1]).startswith("EDM"):
        raise CheckpointError(
            f"{folder} uses the EDM formulation ({index['scheduler'][-1]}), which is not supported; {hint}"
        )
    return index


def _covering(module: nn.Module, entries: Mapping[str, Entry]) -> dict[str, Source]:
    """Text encoder keys as the file writes them: transformers 5.6 dropped `text_model.` from CLIPTextModel's names."""
    keys = list(module.state_dict())
    prefix = "text_model."
    layouts = (lambda k: k, lambda k: prefix + k, lambda k: k.removeprefix(prefix))
    best = max(layouts, key=lambda layout: sum(layout(k) in entries for k in keys))
    return {k: Source(best(k)) for k in keys}


def _modern(key: str) -> str:
    """VAE attention names of old diffusers folders as they are called today."""
    old = re.fullmatch(r"(.+\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return f"{old[1]}.{names[old[2]]}.{old[3]}" if old else key


# --- the single file ------------------------------------------------------------------------------


def from_file(path: Path, config: Path | None, tokenizer: Path | None) -> Parts:
    entries, metadata = read_header(path)
    singlefile.refuse_others(entries, str(path))
    if config is not None and not config.is_dir():
        raise CheckpointError(f"config={str(config)!r}: no such folder")

    def sized(prefix: str, part: str, infer: Callable[[singlefile.Shapes], dict[str, Any]]) -> dict[str, Any]:
        given = config / part / "config.json" if config else None
        if given is not None and given.is_file():
            return read_json(given)
        try:
            return infer({k.removeprefix(prefix): e.shape for k, e in entries.items() if k.startswith(prefix)})
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot tell the sizes of {prefix}* ({error}): keys are missing, fetch it again"
            ) from error

    prefixes = (singlefile.UNET, singlefile.CLIP, singlefile.OPEN_CLIP, singlefile.VAE)
    stray = unexpected(k for k in entries if not k.startswith(prefixes))
    if stray:
        raise CheckpointError(f"{path}: {stray} that belong to no part of SDXL")
    first = sized(singlefile.CLIP, "text_encoder", singlefile.clip_config)
    second = sized(singlefile.OPEN_CLIP, "text_encoder_2", singlefile.open_clip_config)
    pooled = second["projection_dim"]
    unet_config = sized(singlefile.UNET, "unet", lambda shapes: singlefile.unet_config(shapes, pooled))
    vae_config = sized(singlefile.VAE, "vae", singlefile.vae_config)
    unet, vae, encoders = _on_meta(unet_config, vae_config, first, second, where=str(path))

    def weights(module: nn.Module, source: Callable[[str], Source], prefix: str) -> Weights:
        part = {k: e for k, e in entries.items() if k.startswith(prefix)}
        return Weights(part, {k: source(k) for k in module.state_dict()}, prefix + "*")

    index = config / "model_index.json" if config else None
    return Parts(
        unet,
        vae,
        encoders,
        (
            weights(unet, singlefile.unet_map(unet.config), singlefile.UNET),
            weights(vae, singlefile.vae_map(len(vae.config.block_out_channels)), singlefile.VAE),
            weights(encoders[0], singlefile.clip_map, singlefile.CLIP),
            weights(encoders[1], singlefile.open_clip_map, singlefile.OPEN_CLIP),
        ),
        _file_tokenizers(tokenizer, config),
        _file_scheduler(entries, metadata, config),
        bool((read_json(index) if index and index.is_file() else {}).get("force_zeros_for_empty_prompt", True)),
        bool(vae_config.get("force_upcast", True)),
    )


def _file_scheduler(entries: Mapping[str, Entry], metadata: Mapping[str, str], config: Path | None) -> dict[str, Any]:
    """The noise schedule: of the config folder, else SDXL's and what the file says (keys v_pred and ztsnr)."""
    given = config / "scheduler" / "scheduler_config.json" if config else None
    if given is not None and given.is_file():
        return read_json(given)
    said = str(metadata.get("modelspec.prediction_type", "")).lower()
    v = "v_pred" in entries or said in ("v", "v_prediction", "velocity")
    return {"prediction_type": "v_prediction" if v else "epsilon", "rescale_betas_zero_snr": "ztsnr" in entries}


def _file_tokenizers(tokenizer: Path | None, config: Path | None) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """From a folder, or the local transformers cache; the second pads with token 0, as OpenCLIP does."""
    if tokenizer is None and config is not None and (config / "tokenizer").is_dir():
        tokenizer = config
    if tokenizer is not None and (tokenizer / "tokenizer").is_dir():
        return _tokenizer(tokenizer / "tokenizer"), _tokenizer(tokenizer / "tokenizer_2")
    if tokenizer is not None:
        first, second = _tokenizer(tokenizer), _tokenizer(tokenizer)
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = [try_to_load_from_cache(name, "vocab.json") for name in TOKENIZERS]
        # both encoders share one vocabulary, so either tokenizer will do for the other
        found = [Path(c).parent for c in cached if isinstance(c, str)]
        if not found:
            raise CheckpointError(
                "a single file brings no tokenizer and none is in the local cache: pass "
                "tokenizer=<folder with vocab.json and merges.txt>, "
                f'or fetch it once with: hf download {TOKENIZERS[0]} --include "*.json" "*.txt"'
            )
        first, second = _tokenizer(found[0]), _tokenizer(found[-1])
    second.pad_token = second.convert_ids_to_tokens(0)
    return first, second
