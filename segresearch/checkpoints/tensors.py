"""Reading safetensors into modules that were built on the meta device: strictly, and with little memory.

A file is read with plain reads at the offsets that its header names, not memory-mapped: mapped pages count as the
process's memory beside the copy. Each tensor is read straight into its place, or through a small buffer where the dtype
or the device differs, so the peak while loading is the weights themselves and one buffer.
"""

import json
import re
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segresearch.errors import CheckpointError, InputError
from segresearch.models.locate import refuse_pickle

BUFFER = 16 * 2**20  # bytes
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Bookkeeping that training code leaves in checkpoints; the networks do not need it.
_IGNORED = re.compile(
    r"(^|\.)(position_ids|attn_mask|logit_scale|edm_mean|edm_std|v_pred|ztsnr)$|"
    r"^(model_ema|denoiser|loss|first_stage_model\.loss)\.|"
    r"^conditioner\.embedders\.0\.transformer\.text_projection\.weight$|"  # of CLIP; SDXL pools the second encoder
    r"^(global_step|logvar|alphas_cumprod.*|betas|log_one_minus_.*|posterior_.*|sqrt_.*|__.*)$"
)


class Entry(NamedTuple):
    """Where one stored tensor lies."""

    file: Path
    key: str
    dtype: str  # as the header writes it: F16, BF16, ...
    shape: tuple[int, ...]
    start: int  # byte offset in the file


class Source(NamedTuple):
    """How one parameter is made from a stored tensor: all of it, or the given third of its rows; perhaps transposed."""

    key: str
    third: int | None = None
    transpose: bool = False


def _not_safetensors(path: Path, start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return (
            "is a git-lfs pointer, not the weights: run `git lfs pull` in its repository, or download the file itself"
        )
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "holds a pickle under a .safetensors name: pickles are refused, convert it to safetensors"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not the weights: the download went wrong, fetch it again"
    return "is not a safetensors file (its header cannot be read): fetch it again"


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of one safetensors file, and its metadata; no weights are read.

    Raises CheckpointError for a file that is missing, empty, a pickle, a git-lfs pointer, truncated or something else.
    """
    refuse_pickle(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): fetch it again")
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or start[8:9] != b"{" or length > 2**28:
            raise CheckpointError(f"{path} {_not_safetensors(path, start)}")
        if 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated: its header needs {8 + length:,} bytes, found {size:,}: fetch it again"
            )
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            ends = [h["data_offsets"][1] for h in header.values()]
            for key, h in header.items():
                begin, end = h["data_offsets"]
                bytes_needed = torch.Size(h["shape"]).numel() * getattr(_DTYPES.get(h["dtype"]), "itemsize", 0)
                if begin < 0 or (bytes_needed and end - begin != bytes_needed):
                    raise InputError(f"{key} spans bytes {begin} to {end}, its shape needs {bytes_needed}")
            entries = {
                key: Entry(path, key, h["dtype"], tuple(h["shape"]), 8 + length + h["data_offsets"][0])
                for key, h in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} {_not_safetensors(path, start)}") from error
    needed = 8 + length + max(ends, default=0)
    if size < needed:
        raise CheckpointError(f"{path} is truncated: {needed:,} bytes expected, {size:,} found: fetch it again")
    if not entries:
        raise CheckpointError(f"{path} holds no tensors: fetch it again")
    return entries, metadata


def open_weights(folder: Path, stem: str, variant: str | None = None) -> dict[str, Entry]:
    """The tensors of one component's folder: `stem`.safetensors, its shards, or their variant (fp16, ...).

    variant None takes the plain files, else the fp16 variant where only that is there. Raises CheckpointError.
    """
    found = None
    for v in (variant,) if variant else (None, "fp16"):
        single = folder / (f"{stem}.{v}.safetensors" if v else f"{stem}.safetensors")
        indices = [f"{stem}.safetensors.index.{v}.json", f"{stem}.{v}.safetensors.index.json"] if v else []
        indices = indices or [f"{stem}.safetensors.index.json"]
        found = next((p for p in (single, *(folder / name for name in indices)) if p.is_file()), None)
        if found:
            break
    if found is None:
        for pickle in sorted(folder.glob("*")) if folder.is_dir() else ():
            refuse_pickle(pickle)
        kind = f"{stem}.{variant}.safetensors (variant {variant!r})" if variant else f"{stem}.safetensors"
        raise CheckpointError(f"{folder}: no {kind} here: fetch the model's weights again")
    if found.suffix == ".safetensors":
        return read_header(found)[0]
    try:
        names = set(json.loads(found.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{found}: not an index of shards ({error}): fetch it again") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise CheckpointError(f"{folder}: {_few(missing, 'missing shard')}: fetch the model's weights again")
    return {key: entry for name in sorted(names) for key, entry in read_header(folder / name)[0].items()}


def _few(names: Iterable[str], what: str) -> str:
    names = list(names)
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{more})"


def unexpected(keys: Iterable[str]) -> str:
    """What to say of keys that nothing uses: "" if all of them are known bookkeeping."""
    stray = sorted(k for k in keys if not _IGNORED.search(k))
    return _few(stray, "unexpected key") if stray else ""


def _placed(entry: Entry, source: Source) -> tuple[Entry, tuple[int, ...]]:
    """The part of the stored tensor that is meant, and the shape that it gives."""
    if source.third is not None and entry.shape and entry.shape[0] % 3 == 0 and entry.dtype in _DTYPES:
        shape = (entry.shape[0] // 3, *entry.shape[1:])
        size = torch.Size(shape).numel() * _DTYPES[entry.dtype].itemsize
        entry = entry._replace(shape=shape, start=entry.start + source.third * size)
    return entry, entry.shape[::-1] if source.transpose else entry.shape


def fill(
    module: nn.Module,
    entries: Mapping[str, Entry],
    sources: Mapping[str, Source] | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    what: str,
) -> None:
    """Fills a module that lies on the meta device with stored weights, frozen and in eval mode.

    sources names the stored tensor of each parameter; without it the names are equal. Every parameter must be found and
    every tensor used, except bookkeeping such as position_ids; 1×1 convolutions and linear layers may stand for each
    other. Raises CheckpointError, naming the first few keys; nothing is read before all keys and shapes are known to
    fit.
    """
    wanted = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    sources = {k: Source(k) for k in wanted} if sources is None else sources
    used = {s.key for s in sources.values()}
    missing = sorted({sources[k].key for k in wanted} - set(entries))
    stray = unexpected(set(entries) - used)
    faults = [_few(missing, "missing key")] if missing else []
    faults += [stray] if stray else []
    where = next((str(e.file) for e in entries.values()), "nothing")
    if faults:
        raise CheckpointError(f"{what}: {' and '.join(faults)} in {where}: not the weights of this config")
    placed: dict[str, Entry] = {}
    for key, shape in wanted.items():
        entry, found = _placed(entries[sources[key].key], sources[key])
        if _squeezed(found) != _squeezed(shape):
            raise CheckpointError(
                f"{what}: {entry.key} has shape {entries[entry.key].shape}, expected {shape} for {key} by the config "
                f"(in {where}): config and weights are of different models"
            )
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{what}: {entry.key} is stored as {entry.dtype} (in {where}): quantised weights are not supported, "
                "use the fp16 or fp32 checkpoint"
            )
        placed[key] = entry
    module.requires_grad_(False)
    buffer = torch.empty(BUFFER, dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    for key, entry in placed.items():
        with entry.file.open("rb", buffering=0) as file:
            tensor = _read(file, entry, dtype, torch.device(device), buffer)
        tensors[key] = (tensor.T.contiguous() if sources[key].transpose else tensor).view(wanted[key])
    module.load_state_dict(tensors, strict=True, assign=True)
    module.eval()


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1×1 convolution's weight as the linear layer that it equals."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _read(file: FileIO, entry: Entry, dtype: torch.dtype, device: torch.device, buffer: Tensor) -> Tensor:
    """One tensor in the wanted dtype on the wanted device; bytes go through the buffer where either differs."""
    stored = _DTYPES[entry.dtype]
    out = torch.empty(entry.shape, dtype=dtype, device=device)
    flat = out.view(-1)
    file.seek(entry.start)
    if stored == dtype and device.type == "cpu":
        _fill_bytes(file, flat.view(torch.uint8), entry)
        return out
    step = len(buffer) // stored.itemsize
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        raw = buffer[: part.numel() * stored.itemsize]
        _fill_bytes(file, raw, entry)
        part.copy_(raw.view(stored))
    return out


def _fill_bytes(file: FileIO, raw: Tensor, entry: Entry) -> None:
    view = memoryview(raw.numpy().data)
    while len(view):
        count = file.readinto(view)
        if count == 0:
            raise CheckpointError(f"{entry.file} ended inside {entry.key}: the file changed while it was read")
        view = view[count:]
