"""A VAE, a UNet or text encoders from files and folders of their own, or out of another model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from segresearch.checkpoints.declared import file_scheduler
from segresearch.checkpoints.folder import STEM, folder_part
from segresearch.checkpoints.json_files import read_json
from segresearch.checkpoints.other_files import refuse_other_file, refuse_quantised
from segresearch.checkpoints.parts import Given, Part
from segresearch.checkpoints.resolve import part_paths
from segresearch.checkpoints.tensors import Entry, open_file
from segresearch.errors import CheckpointError

Paths = str | Path | Sequence[str | Path] | None
NOUNS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}
MARKS = {  # kind -> keys that each such network has, as (key, whether in the original layout)
    "unet": (("input_blocks.0.0.weight", True), ("time_embedding.linear_1.weight", False)),
    "vae": (("decoder.mid.block_1.norm1.weight", True), ("decoder.mid_block.resnets.0.norm1.weight", False)),
    "text_encoder": (("positional_embedding", True), ("embeddings.position_embedding.weight", True)),
}
COPIES = re.compile(r"(^|\.)(model_ema|control_model|visual|vision_model)\.")  # not the network itself


def open_parts(unet: str | Path | None, vae: str | Path | None, text_encoder: Paths, variant: str | None) -> Given:
    """The given parts; the arguments of `load_model`. CheckpointError where a path holds no such network."""
    texts = [text_encoder] if isinstance(text_encoder, str | Path) else text_encoder or ()
    parts = [part for name in texts for part in open_part("text_encoder", name, variant)]
    one = [None if name is None else open_part(kind, name, variant)[0] for kind, name in (("unet", unet), ("vae", vae))]
    return Given(one[0], one[1], tuple(parts))


def open_part(kind: str, name: str | Path, variant: str | None = None) -> list[Part]:
    """The networks of a kind at a path or a hub id in the local cache: one, or several text encoders."""
    paths = part_paths(name, kind)
    if paths[0].is_file():
        return open_part_file(kind, paths[0])
    return [open_part_folder(kind, folder, variant) for folder in paths]


def is_whole(path: Path) -> bool:
    """Whether this is a whole model and not a component alone."""
    if path.is_dir():
        return (path / "model_index.json").is_file()
    entries, _ = open_file(path)
    return bool(prefixes("vae", entries) and prefixes("text_encoder", entries))


def open_part_folder(kind: str, folder: Path, variant: str | None) -> Part:
    """The network of a component's folder in the diffusers layout."""
    config, known = read_json(folder / "config.json"), {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    network = str(config.get("_class_name") or config.get("architectures") or "folder of no known network")
    if network != known[kind] if kind in known else "CLIP" not in network:
        raise CheckpointError(f"{folder} is a {network}, not a {NOUNS[kind]}")
    has_variant = variant is not None and any(folder.glob(f"*.{variant}.*"))
    part = folder_part(folder, kind, variant if has_variant else None)
    beside = folder.parent / "scheduler" / "scheduler_config.json"
    return replace(part, scheduler=read_json(beside, optional=True)) if kind == "unet" else part


def open_part_file(kind: str, path: Path) -> list[Part]:
    """The networks of a kind in one file: a whole checkpoint, or a part alone with or without its prefix. The config
    beside a component's own file counts."""
    entries, metadata = open_file(path)
    refuse_quantised(entries, path)
    networks = prefixes(kind, entries)
    if not networks:
        refuse_other_file(entries, path, f"a {NOUNS[kind]}")
    if len(networks) > 1 and kind != "text_encoder":
        places = " and ".join(f"{prefix}*" for prefix, _ in networks)
        raise CheckpointError(f"{path}: several {NOUNS[kind]}s ({places}): give a file with one")
    component = path.name.startswith((STEM, "model.")) and (path.parent / "config.json").is_file()
    config = read_json(path.parent / "config.json") if component else {}
    scheduler = file_scheduler(path, entries, metadata) if kind == "unet" else {}
    return [
        Part(kind, path, {k: e for k, e in entries.items() if k.startswith(prefix) and not COPIES.search(k)}, prefix,
             original, config, scheduler)
        for prefix, original in networks
    ]  # fmt: skip


def prefixes(kind: str, entries: Mapping[str, Entry]) -> list[tuple[str, bool]]:
    """What the names of each network of a kind begin with, and whether they are of the original layout."""
    starts = set()
    for mark, original in MARKS[kind]:
        for key in entries:
            if (key == mark or key.endswith(f".{mark}")) and not COPIES.search(key):
                starts.add((key.removesuffix(mark).removesuffix("text_model."), original))
    return sorted(starts)
