"""Reading safetensors into modules that were built on the meta device: strictly, and with little memory. Pages of a
mapped file count as the process's memory, so a file is opened anew after every MAPPED bytes."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from segresearch.checkpoints.json_files import read_json, refuse_pointer
from segresearch.checkpoints.resolve import UNQUANTISED, refuse_pickle
from segresearch.errors import CheckpointError, shown

MAPPED = 16 * 2**20  # bytes
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # that a weight may be stored in
# Bookkeeping that training and merging leave in checkpoints; the networks do not need it.
_BOOKKEEPING = re.compile(
    r"(^|\.)(position_ids|attn_mask|logit_scale|edm_mean|edm_std|edm_vpred\.sigma_(min|max)|v_pred|ztsnr|scaled_fp8)$|"
    r"(^|\.)model_ema\.(decay|num_updates)$|^(denoiser|loss|first_stage_model\.loss)\.|"
    r"^conditioner\.embedders\.0\.(transformer\.)?text_projection(\.weight)?$|"  # of CLIP; SDXL pools OpenCLIP
    r"^(global_step|logvar|scale_factor|alphas_cumprod.*|betas|log_one_minus_.*|posterior_.*|sqrt_.*|ddim_.*|__.*)$"
)
SCALES = ("scale_weight", "weight_scale")  # of ComfyUI's scaled fp8, beside the weight: its older and its newer name
SCALE_NOTES = ("scale_input", "input_scale", "comfy_quant")  # beside these: of computing in fp8, which is not done here
Shape = tuple[int, ...]


class Entry(NamedTuple):
    """A stored tensor; dtype as safetensors writes it (F16, BF16, ...)."""

    file: Path
    key: str
    dtype: str
    shape: Shape


class Source(NamedTuple):
    """How a parameter is made from a stored tensor: from all of it or the given third of its rows; transposed."""

    key: str
    third: int | None = None
    transpose: bool = False


@dataclass(frozen=True)
class Weights:
    """The stored tensors of one network. name: for messages. source: of a parameter by its name, by default its own."""

    name: str
    entries: Mapping[str, Entry]
    source: Callable[[str], Source] = Source


def mapped(path: Path) -> Any:
    """The file as safetensors' safe_open. CheckpointError, with what the file is instead."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        refuse_pointer(path)
        with path.open("rb") as file:
            start = file.read(64)
        reason, header = " ".join(str(error).split()), start[8:9] == b"{"
        fault = f"is not a safetensors file ({reason}): fetch it again"
        if start.startswith(b"GGUF"):
            fault = f"holds GGUF weights, which are quantised and not supported: {UNQUANTISED}"
        elif not start:
            fault = "is empty (0 bytes): fetch it again"
        elif header and re.search("incomplete|header ?length", reason, re.IGNORECASE):
            fault = f"is truncated, or longer than its header says ({path.stat().st_size:,} bytes): fetch it again"
        elif not header and start.startswith((b"PK\x03\x04", b"\x80")):
            fault = "holds a pickle under a .safetensors name: pickles are refused, convert it to safetensors"
        elif not header and start.lstrip()[:1] == b"<":
            fault = "is a web page, not the weights: the download went wrong, fetch it again"
        raise CheckpointError(f"{path} {fault}") from error


def open_file(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of one safetensors file, and its metadata; no weights are read. CheckpointError for a file that is
    empty, a pickle, a git-lfs pointer, truncated or something else."""
    refuse_pickle(path)
    file = mapped(path)
    slices = {key: file.get_slice(key) for key in file.keys()}
    if not slices:
        raise CheckpointError(f"{path} holds no tensors: fetch it again")
    entries = {key: Entry(path, key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    return entries, file.metadata() or {}


def open_folder(folder: Path, stem: str, variant: str | None = None) -> dict[str, Entry]:
    """The tensors of one component's folder: `stem`.safetensors, its shards, or their variant (fp16, ...); None takes
    the plain files, else the fp16 variant where only that is there. Raises CheckpointError."""
    v = variant or "fp16"
    plain = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    special = [f"{stem}.{v}.safetensors", f"{stem}.safetensors.index.{v}.json", f"{stem}.{v}.safetensors.index.json"]
    candidates = special if variant else plain + special
    path = next((folder / name for name in candidates if (folder / name).is_file()), None)
    if path is None:
        there = variants(folder.glob(f"{stem}*.safetensors*"))
        if there:
            raise CheckpointError(f"{folder}: no {candidates[0]} here, but variants: give variant= one of {there}")
        for other in sorted(folder.glob("*")):
            refuse_pickle(other)
        raise CheckpointError(f"{folder}: no {candidates[0]} here: fetch the model's weights again")
    if path.suffix == ".safetensors":
        return open_file(path)[0]
    shards = shard_names(path)
    if missing := listed((name for name in shards if not (folder / name).is_file()), "missing shard"):
        raise CheckpointError(f"{folder}: {missing}: fetch the model's weights again")
    return {key: entry for name in shards for key, entry in open_file(folder / name)[0].items()}


def shard_names(index: Path) -> list[str]:
    """The files that an index names. CheckpointError for an index of something else, or of files elsewhere."""
    of_tensors = read_json(index).get("weight_map")
    if not isinstance(of_tensors, dict) or not of_tensors:
        raise CheckpointError(f"{index}: no weight_map from tensors to files: fetch it again")
    for name in of_tensors.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            outside = isinstance(name, str) and ("/" in name or "\\" in name)
            fault = "a file outside of its folder" if outside else "not a .safetensors file"
            raise CheckpointError(f"{index}: its weight_map names {shown(name)}, {fault}: fetch it again")
    return sorted(set(of_tensors.values()))


def variants(files: Iterable[Path]) -> str:
    """The variants of weights among these files, for a message; "" for none."""
    names = {part for file in files for part in file.name.split(".")[1:-1] if part not in ("safetensors", "index")}
    return ", ".join(sorted({re.sub(r"-\d+-of-\d+$", "", name) for name in names}))


def listed(names: Iterable[str], noun: str) -> str:
    """Their number and the first three, for a message; "" for none."""
    names = [name if name.isprintable() else repr(name) for name in sorted(names)]
    more = ", ..." if len(names) > 3 else ""
    first = ", ".join(name[:200] for name in names[:3])
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({first}{more})" if names else ""


def without_bookkeeping(keys: Iterable[str]) -> set[str]:
    """The keys that are not among those which training and merging leave, and no network needs."""
    return {key for key in keys if not _BOOKKEEPING.search(key)}


def read_numbers(entry: Entry, most: int = 64) -> tuple[float, ...]:
    """The values of a stored tensor. CheckpointError for one of more than `most`, or of another type than numbers."""
    if math.prod(entry.shape) > most or entry.dtype not in DTYPES:
        raise CheckpointError(f"{entry.file}: {entry.key} has shape {entry.shape}, {entry.dtype}: not a few numbers")
    return tuple(mapped(entry.file).get_tensor(entry.key).double().flatten().tolist())


def as_stored(name: str, weight: Tensor) -> Tensor:
    """The `merge` of `fill` that changes nothing."""
    return weight


def fill(
    module: nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device | str,
    merge: Callable[[str, Tensor], Tensor] = as_stored,
) -> None:
    """Fill a module that lies on the meta device with stored weights, frozen and in eval mode. CheckpointError, before
    anything is read, unless every parameter has its tensor and every tensor its use, except bookkeeping such as
    position_ids; 1×1 convolutions and linear layers may stand for each other. A weight with a scale beside it (scaled
    fp8) is multiplied by it. merge: from the name of a parameter and the tensor that was read to the one that is taken,
    of the same shape."""
    shapes = {key: tuple(parameter.shape) for key, parameter in module.state_dict().items()}
    sources = {key: weights.source(key) for key in shapes}
    scales = {source.key: scale for source in sources.values() if (scale := scale_of(source.key, weights.entries))}
    _refuse_misfit(shapes, sources, scales, weights)
    tensors: dict[str, Tensor] = {}
    path, left = Path(), 0
    for key, source in sources.items():
        entry = weights.entries[source.key]
        if left <= 0 or entry.file != path:
            path, left, file = entry.file, MAPPED, mapped(entry.file)
        stored = file.get_tensor(entry.key)  # a view of the file
        left -= stored.nbytes
        if scale := scales.get(source.key):
            numbers = mapped(scale.file).get_tensor(scale.key).float().reshape(-1, *(1,) * (stored.ndim - 1))
            stored = stored.float() * numbers  # one number, or one a row
        if source.third is not None:
            stored = stored.chunk(3)[source.third]
        stored = merge(key, (stored.T if source.transpose else stored).reshape(shapes[key]))
        tensors[key] = torch.empty(shapes[key], dtype=dtype, device=device).copy_(stored)
    module.load_state_dict(tensors, strict=True, assign=True)
    module.eval().requires_grad_(False)


def scale_of(key: str, entries: Mapping[str, Entry]) -> Entry | None:
    """What a stored weight is multiplied by, one number or one a row: "scale_weight" or "weight_scale" beside it."""
    module = key.removesuffix("weight")
    beside = (entries.get(module + name) for name in SCALES) if key.endswith(".weight") else ()
    return next(filter(None, beside), None)


def with_scales(key: str) -> set[str]:
    """The names of a stored tensor and of all that scaled fp8 may have beside it."""
    beside = (*SCALES, *SCALE_NOTES) if key.endswith(".weight") else ()
    return {key, *(key.removesuffix("weight") + name for name in beside)}


def _refuse_misfit(
    shapes: Mapping[str, Shape], sources: Mapping[str, Source], scales: Mapping[str, Entry], weights: Weights
) -> None:
    entries, keys = weights.entries, {source.key for source in sources.values()}
    used = set().union(*map(with_scales, keys))
    unexpected = listed(without_bookkeeping(set(entries) - used), "unexpected key")
    if fault := " and ".join(filter(None, (listed(keys - set(entries), "missing key"), unexpected))):
        file = next((entry.file for entry in entries.values()), "nothing")
        raise CheckpointError(f"{weights.name}: {fault} in {file}: not the weights of this config")
    for key, shape in shapes.items():
        source, fault = sources[key], ""
        entry = entries[source.key]
        stored = entry.shape[::-1] if source.transpose else entry.shape
        if source.third is not None and stored and stored[0] % 3 == 0:
            stored = (stored[0] // 3, *stored[1:])
        if stored != shape and stored + (1, 1) != shape and stored != shape + (1, 1):
            fault = f"has shape {entry.shape}, expected {shape} for {key}: config and weights are of different models"
        elif entry.dtype not in DTYPES:
            fault = f"is stored as {entry.dtype}: quantised weights are not supported, use fp16 or fp32 ones"
        if fault:
            raise CheckpointError(f"{weights.name}: {entry.key} {fault} (in {entry.file})")
    for key, scale in scales.items():
        if math.prod(scale.shape) not in (1, entries[key].shape[0]) or scale.dtype not in DTYPES:
            fault = f"scale of shape {scale.shape}, {scale.dtype}, for a weight of {entries[key].shape}"
            raise CheckpointError(f"{weights.name}: {scale.key}: {fault}: quantised in a way that is not supported")
