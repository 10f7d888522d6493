"""One .safetensors file in the original layout: its parts, their sizes and facts, and keys that belong to no part.

    model.diffusion_model.*    UNet
    first_stage_model.*        VAE
    conditioner.embedders.0.transformer.*, conditioner.embedders.1.model.*    the two text encoders of SDXL

Where each parameter lies is in `key_maps`, how sizes are read from shapes in `file_sizes`.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTokenizer

from segresearch.checkpoints.declared import file_scheduler
from segresearch.checkpoints.file_sizes import Shapes, clip_config, unet_config, vae_config
from segresearch.checkpoints.folder import REFINER, Checkpoint, build_networks, read_json, read_tokenizer
from segresearch.checkpoints.key_maps import CLIP, OPEN_CLIP, UNET, VAE, clip_map, open_clip_map, unet_map, vae_map
from segresearch.checkpoints.other_files import HINT, other_kind, refuse_other_file, refuse_quantised
from segresearch.checkpoints.tensors import (
    Entry,
    Source,
    Weights,
    listed,
    open_file,
    read_numbers,
    with_scales,
    without_bookkeeping,
)
from segresearch.errors import CheckpointError
from segresearch.models.text import TOKENIZERS

PARTS = {UNET: "UNet", VAE: "VAE", CLIP: "first text encoder", OPEN_CLIP: "second text encoder"}
SETTINGS = {UNET: "unet", VAE: "vae", CLIP: "text_encoder", OPEN_CLIP: "text_encoder"}  # that give a part by itself
FAMILIES = {  # the only text encoder -> the model that has it
    "conditioner.embedders.0.model.": f"the SDXL refiner, not SDXL base: {REFINER}",
    "cond_stage_model.model.": "a Stable Diffusion 2 checkpoint, not SDXL",
    "cond_stage_model.": "a Stable Diffusion 1 checkpoint, not SDXL",
}
OF_PARTS = (  # keys below the prefix of a part that only a network of another shape has
    UNET, f"{VAE}encoder.", f"{VAE}decoder.", f"{CLIP}text_model.encoder.", f"{OPEN_CLIP}transformer.resblocks.",
)  # fmt: skip
LEFTOVERS = ("model_ema.", "first_stage_model.model_ema.")  # copies of the weights, of which the plain ones are taken
FEW = 64  # keys of no part, beside a whole model


def refuse_missing_parts(keys: Iterable[str], path: Path) -> None:
    """CheckpointError for a file without all parts of an SDXL in the original layout, with what it is instead."""
    keys = sorted(keys)
    missing = [prefix for prefix in PARTS if not any(key.startswith(prefix) for key in keys)]
    if not missing:
        return
    if UNET in missing or other_kind(keys):
        refuse_other_file(keys, path)
    for prefix, family in FAMILIES.items():
        if {CLIP, OPEN_CLIP} <= {*missing} and any(key.startswith(prefix) for key in keys):
            raise CheckpointError(f"{path} is {family}; {HINT}")
    if missing == [VAE, CLIP, OPEN_CLIP]:
        refuse_other_file(keys, path)
    hint = f"give one by {SETTINGS[missing[0]]}= (model.{SETTINGS[missing[0]]}), or a whole checkpoint"
    raise CheckpointError(f"{path}: the {PARTS[missing[0]]} is missing (no {missing[0]}* keys): {hint}")


def refuse_strays(stray: Iterable[str], path: Path) -> None:
    """A warning of one line for keys of no part that merging and training leave; CheckpointError where they are those
    of another architecture, or many."""
    stray = without_bookkeeping(stray)
    if not stray:
        return
    if shape := listed((key for key in stray if key.startswith(OF_PARTS)), "unexpected key"):
        raise CheckpointError(f"{path}: {shape}: not the weights of this config")
    if kind := other_kind(stray):
        raise CheckpointError(f"{path}: keys of {kind.partition(',')[0].partition(':')[0]} are beside those of a model")
    copies = {f"{start}* ({sum(key.startswith(start) for key in stray)} keys)" for start in LEFTOVERS
              if any(key.startswith(start) for key in stray)}  # fmt: skip
    rest = [key for key in stray if not key.startswith(LEFTOVERS)]
    what = listed(rest, "key")
    if len(rest) > FEW:
        raise CheckpointError(f"{path}: {what} that belong to no part of the model: it is of another architecture")
    ignored = ", ".join([*sorted(copies), *filter(None, [what])])
    warnings.warn(f"{path}: ignored, for they are no part of the model: {ignored}", stacklevel=2)


def scheduler_of_file(path: Path) -> dict[str, Any]:
    """What the file itself declares of its training, see `file_scheduler`; no weights are read."""
    return file_scheduler(path, *open_file(path))


def open_model_file(path: Path, config: Path | None, tokenizer: Path | None) -> Checkpoint:
    """An SDXL in the original layout. config, tokenizer: as in `load_model`. CheckpointError for anything else."""
    entries, metadata = open_file(path)
    refuse_quantised(entries, path)
    refuse_missing_parts(entries, path)
    if config is not None and not config.is_dir():
        raise CheckpointError(f"config={str(config)!r}: no such folder")
    shapes = {prefix: shapes_below(prefix, entries) for prefix in PARTS}

    def override(name: str) -> dict[str, Any]:
        return {} if config is None else read_json(config / name, optional=True)

    def sizes(prefix: str, folder: str, infer: Callable[[Shapes], dict[str, Any]]) -> dict[str, Any]:
        return override(f"{folder}/config.json") or read_sizes(path, prefix, shapes[prefix], infer)

    vae = sizes(VAE, "vae", vae_config) | latent_statistics(entries)
    first, second = sizes(CLIP, "text_encoder", clip_config), sizes(OPEN_CLIP, "text_encoder_2", clip_config)
    unet = sizes(UNET, "unet", lambda shapes: unet_config(shapes, second["projection_dim"]))
    networks = build_networks((unet, vae, first, second), path)
    levels = len(networks[1].config.block_out_channels)
    maps: list[Callable[[str], Source]] = [unet_map(networks[0].config), vae_map(levels), clip_map]
    maps.append(partial(open_clip_map, keys=entries))
    weights = [own_weights(entries, prefix, net, source) for prefix, net, source in zip(PARTS, networks, maps)]
    if not any(missing_keys(net, one) for net, one in zip(networks, weights)):
        refuse_strays(set(entries).difference(*(one.entries for one in weights)), path)
    return Checkpoint(
        networks,
        tuple(weights),
        _tokenizers(tokenizer, config),
        override("scheduler/scheduler_config.json") or file_scheduler(path, entries, metadata),
        bool(override("model_index.json").get("force_zeros_for_empty_prompt", True)),
        bool(vae.get("force_upcast", True)),
    )


def shapes_below(prefix: str, entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """The shapes of a part, without its prefix."""
    return {key.removeprefix(prefix): entry.shape for key, entry in entries.items() if key.startswith(prefix)}


def read_sizes(path: Path, prefix: str, shapes: Shapes, infer: Callable[[Shapes], dict[str, Any]]) -> dict[str, Any]:
    """A config from shapes. CheckpointError where keys are missing that every model of the kind has."""
    try:
        return infer(shapes)
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        problem = f"cannot tell the sizes of {prefix}* ({reason}): keys are missing, or it is another network"
        raise CheckpointError(f"{path}: {problem}") from error


def own_weights(entries: Mapping[str, Entry], prefix: str, net: Any, source: Callable[[str], Source]) -> Weights:
    """The entries that a network reads, with the scales beside them; all below its prefix if some are missing."""
    keys = {source(key).key for key in net.state_dict()}
    below = {key: entry for key, entry in entries.items() if key.startswith(prefix)}
    own = {key: below[key] for key in set().union(*map(with_scales, keys)) & below.keys()}
    return Weights(f"{prefix}*", own if keys <= own.keys() else below, source)


def missing_keys(net: Any, weights: Weights) -> set[str]:
    """The stored tensors that a network needs and that are not there."""
    return {weights.source(key).key for key in net.state_dict()} - weights.entries.keys()


def latent_statistics(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Of Playground v2.5: mean and standard deviation of each channel of its latents, as its vae/config.json says."""
    if not {"edm_mean", "edm_std"} <= entries.keys():
        return {}
    mean, std = (list(read_numbers(entries[key])) for key in ("edm_mean", "edm_std"))
    return {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}


def _tokenizers(folder: Path | None, config: Path | None) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """From a folder, or the local transformers cache; the second pads with token 0, as OpenCLIP does."""
    both = folder or config
    if both is not None and (both / "tokenizer").is_dir():
        return read_tokenizer(both / "tokenizer"), read_tokenizer(both / "tokenizer_2")
    cached = [try_to_load_from_cache(name, "vocab.json") for name in TOKENIZERS]
    folders = [folder] if folder else [Path(file).parent for file in cached if isinstance(file, str)]
    if not folders:
        hint = f'fetch it once with: hf download {TOKENIZERS[0]} --include "*.json" "*.txt"'
        problem = "a single file brings no tokenizer and none is in the local cache"
        raise CheckpointError(f"{problem}: pass tokenizer=<folder with vocab.json and merges.txt>, or {hint}")
    first, second = read_tokenizer(folders[0]), read_tokenizer(folders[-1])  # their vocabulary is the same
    second.pad_token = second.convert_ids_to_tokens(0)
    return first, second
