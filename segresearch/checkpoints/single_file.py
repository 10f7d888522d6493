"""One .safetensors file in the original layout: its parts, their sizes and facts, and keys that belong to no part.

    model.diffusion_model.*                   UNet
    first_stage_model.*, or vae.*             VAE
    conditioner.embedders.0.transformer.*, conditioner.embedders.1.model.*    the two text encoders of SDXL
    conditioner.embedders.0.model.*           the one of SDXL's refiner, or of Stable Diffusion 2 in newer files
    cond_stage_model.transformer.*            that of Stable Diffusion 1
    cond_stage_model.model.*                  that of Stable Diffusion 2

Where each parameter lies is in `key_maps`, how sizes are read from shapes in `file_sizes`.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTokenizer

from segresearch.checkpoints.declared import file_scheduler
from segresearch.checkpoints.folder import Checkpoint, build_networks, tokenizer_of
from segresearch.checkpoints.json_files import read_json
from segresearch.checkpoints.key_maps import CLIP, OPEN_CLIP, UNET, VAE
from segresearch.checkpoints.other_files import HINT, other_kind, refuse_other_file, refuse_quantised
from segresearch.checkpoints.parts import (
    NONE,
    Given,
    Part,
    arranged,
    missing_keys,
    part_weights,
    reads_sizes,
    unused,
    used_keys,
    with_unet_scheduler,
)
from segresearch.checkpoints.resolve import fetching
from segresearch.checkpoints.tensors import Entry, listed, open_file, read_numbers, without_bookkeeping
from segresearch.checkpoints.tokenizer_files import read_tokenizer
from segresearch.errors import CheckpointError
from segresearch.models.text import TOKENIZERS

VAES = (VAE, "vae.")
CONTEXTS = ("conditioner.embedders.0.model.", "cond_stage_model.transformer.", "cond_stage_model.model.")
OF_PARTS = (  # keys of no part that only a network of another shape has
    UNET, f"{VAE}encoder.", f"{VAE}decoder.", f"{CLIP}text_model.encoder.", f"{OPEN_CLIP}transformer.resblocks.",
    f"{CONTEXTS[0]}transformer.resblocks.", f"{CONTEXTS[1]}text_model.encoder.", f"{CONTEXTS[2]}transformer.resblocks.",
)  # fmt: skip
COPIES = ("model_ema.", "first_stage_model.model_ema.")  # of the weights; the plain ones are taken
FEW = 64  # keys of no part, beside a whole model


def text_prefixes(keys: Iterable[str]) -> tuple[str, ...]:
    """Where the text encoders of a file lie; those of SDXL where there are none."""
    keys = [key for key in keys if key.startswith(("conditioner.", "cond_stage_model."))]
    if any(key.startswith((CLIP, OPEN_CLIP)) for key in keys):
        return (CLIP, OPEN_CLIP)
    return next(((prefix,) for prefix in CONTEXTS if any(key.startswith(prefix) for key in keys)), (CLIP, OPEN_CLIP))


def find_parts(entries: Mapping[str, Entry], path: Path, given: Given) -> dict[str, Part | None]:
    """The UNet, the VAE and the text encoders of a file by their prefixes; None for one that is missing and `given`.
    CheckpointError for a file without all of them, with what it is instead."""
    vae = next((prefix for prefix in VAES if any(key.startswith(prefix) for key in entries)), VAE)
    prefixes = {UNET: "unet", vae: "vae", **dict.fromkeys(text_prefixes(entries), "text_encoder")}
    parts = {
        prefix: Part(kind, path, below, prefix, original=True)
        if (below := {key: entry for key, entry in entries.items() if key.startswith(prefix)})
        else None
        for prefix, kind in prefixes.items()
    }
    missing = [prefix for prefix, part in parts.items() if part is None and not given.replaces(prefixes[prefix])]
    if missing:
        refuse_missing(missing, entries, path, prefixes)
    return parts


def refuse_missing(missing: list[str], entries: Iterable[str], path: Path, kinds: Mapping[str, str]) -> None:
    """CheckpointError for a file that lacks these parts."""
    if UNET in missing or other_kind(entries) or len(missing) == len(kinds) - 1:
        refuse_other_file(entries, path)
    kind = kinds[missing[0]]
    order = "" if len(kinds) == 3 else "first " if missing[0] == CLIP else "second "
    noun = "VAE" if kind == "vae" else f"{order}text encoder"
    hint = f"give one by {kind}= (model.{kind}), or a whole checkpoint"
    raise CheckpointError(f"{path}: the {noun} is missing (no {missing[0]}* keys): {hint}")


def refuse_strays(stray: Iterable[str], path: Path) -> None:
    """A warning of one line for keys of no part that merging and training leave; CheckpointError where they are those
    of another architecture, or many."""
    stray = without_bookkeeping(stray)
    if shape := listed((key for key in stray if key.startswith(OF_PARTS)), "unexpected key"):
        raise CheckpointError(f"{path}: {shape}: not the weights of this config")
    if kind := other_kind(stray):
        raise CheckpointError(f"{path}: keys of {kind.partition(',')[0].partition(':')[0]} are beside those of a model")
    counts = {start: sum(key.startswith(start) for key in stray) for start in COPIES}
    copies = [f"{start}* ({count} keys)" for start, count in counts.items() if count]
    rest = [key for key in stray if not key.startswith(COPIES)]
    if len(rest) > FEW:
        fault = f"{listed(rest, 'key')} that belong to no part of the model"
        raise CheckpointError(f"{path}: {fault}: it is of another architecture; {HINT}")
    if ignored := ", ".join([*copies, *filter(None, [listed(rest, "key")])]):
        warnings.warn(f"{path}: ignored, for they are no part of the model: {ignored}", stacklevel=2)


def open_model_file(path: Path, config: Path | None, tokenizer: Path | None, given: Given = NONE) -> Checkpoint:
    """A model in the original layout. config, tokenizer: as in `load_model`. CheckpointError for anything else."""
    entries, metadata = open_file(path)
    refuse_quantised(entries, path)
    own = find_parts(entries, path, given)
    if config is not None and not config.is_dir():
        raise CheckpointError(f"config={str(config)!r}: no such folder")

    def override(name: str) -> dict[str, Any]:
        return {} if config is None else read_json(config / name, optional=True)

    names = text_names(own, reads_sizes(given.unet or own[UNET]))
    configs = dict(zip(own, ("unet", "vae", *names), strict=True))
    whole = [part and replace(part, config=override(f"{configs[prefix]}/config.json")) for prefix, part in own.items()]
    parts, sizes = arranged(whole, given, path, latent_statistics(entries))
    networks = build_networks(sizes, path)
    weights = [part_weights(part, net) for part, net in zip(parts, networks, strict=True)]
    if not any(missing_keys(net, one) for net, one in zip(networks, weights)):
        known = {key for part, net in zip(parts, networks, strict=True) for key in unused(part, net)}
        known |= {key for net, one in zip(networks, weights) for key in used_keys(net, one)}
        known |= {key for part in own.values() if part and part not in parts for key in part.entries}
        refuse_strays(entries.keys() - known, path)
    return Checkpoint(
        networks,
        tuple(weights),
        _tokenizers(tokenizer, config, names, [part.open_clip for part in parts[2:]]),
        with_unet_scheduler(
            override("scheduler/scheduler_config.json") or file_scheduler(path, entries, metadata), given
        ),
        bool(override("model_index.json").get("force_zeros_for_empty_prompt", len(names) == 2)),
        bool(sizes[1].get("force_upcast", True)),
    )


def text_names(prefixes: Iterable[str], sized: bool) -> tuple[str, ...]:
    """The folders that the text encoders at these prefixes have in the diffusers layout. sized: in a model that reads
    image sizes, SDXL's or its refiner's."""
    if CLIP in prefixes:
        return ("text_encoder", "text_encoder_2")
    return ("text_encoder_2",) if sized else ("text_encoder",)


def latent_statistics(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Of Playground v2.5: mean and standard deviation of each channel of its latents, as its vae/config.json says."""
    if not {"edm_mean", "edm_std"} <= entries.keys():
        return {}
    mean, std = (list(read_numbers(entries[key])) for key in ("edm_mean", "edm_std"))
    return {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}


def _tokenizers(
    folder: Path | None, config: Path | None, names: Sequence[str], open_clip: Sequence[bool]
) -> tuple[CLIPTokenizer, ...]:
    """One for each text encoder, from a folder or the local transformers cache; those of OpenCLIP pad with token 0."""
    both = folder or config
    own = [both / tokenizer_of(name) for name in names] if both else []
    if own and all(path.is_dir() for path in own):
        return tuple(map(read_tokenizer, own))
    if both is not None and (both / "tokenizer").is_dir():
        folder = both / "tokenizer"
    cached = [try_to_load_from_cache(name, "vocab.json") for name in TOKENIZERS]
    folders = [folder] if folder else [Path(file).parent for file in cached if isinstance(file, str)]
    if not folders:
        hint = f"fetch it once with: {fetching(TOKENIZERS[0], '*.json', '*.txt')}"
        problem = "a single file brings no tokenizer and none is in the local cache"
        raise CheckpointError(f"{problem}: pass tokenizer=<folder with vocab.json and merges.txt>, or {hint}")
    tokenizers = [read_tokenizer(folders[-1 if zero else 0]) for zero in open_clip]  # their vocabulary is the same
    for tokenizer, zero in zip(tokenizers, open_clip, strict=True):
        if zero:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tuple(tokenizers)
