"""What is not an SDXL checkpoint, refused by its name: files without weights, other models, incomplete folders.

Each function raises CheckpointError with one line. Light: no torch.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from segresearch.errors import CheckpointError

UNET = "model.diffusion_model."  # prefixes of the parts of a single file
CLIP = "conditioner.embedders.0.transformer."
OPEN_CLIP = "conditioner.embedders.1.model."
VAE = "first_stage_model."

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
FILE_HINT = "give the base checkpoint (as sd_xl_base_1.0.safetensors) or a diffusers folder of SDXL"
FOLDER_HINT = "give a folder in the diffusers layout of SDXL (with model_index.json)"
REFINER = "it has one text encoder and cannot start from noise"

_OTHER_FILES = {  # a pattern of keys -> what the file is; the first that matches
    r"lora_|\.lora\.": "a LoRA, not a checkpoint: merge it into its base model first",
    r"control_model\.|controlnet_cond_embedding": "a ControlNet, not a checkpoint: pass the SDXL that it steers",
    r"double_blocks\.": "Flux, not SDXL",
    r"joint_blocks\.": "Stable Diffusion 3, not SDXL",
    r"clip_txt_(pooled_)?mapper": "Stable Cascade, not SDXL",
    r"cond_stage_model\.model\.": "a Stable Diffusion 2 checkpoint, not SDXL",
    r"cond_stage_model\.": "a Stable Diffusion 1 checkpoint, not SDXL",
    r"conditioner\.embedders\.0\.model\.": f"the SDXL refiner, not SDXL base: {REFINER}",
    r"^edm_mean$": "Playground v2.5 (EDM formulation), which is not supported",
}
_PARTS = {UNET: "UNet", CLIP: "first text encoder", OPEN_CLIP: "second text encoder", VAE: "VAE"}


def _refuse(where: Path | str, faults: Mapping[str, Any]) -> None:
    """Raises the first fault whose condition holds."""
    for fault, holds in faults.items():
        if holds:
            raise CheckpointError(f"{where} {fault}")


def refuse_pickle(path: Path) -> None:
    """A file name of a pickled checkpoint."""
    convert = "where you trust its origin, load it once and save its tensors with safetensors.torch.save_file"
    fault = f"pickle checkpoints can run code when opened and are refused: convert it to .safetensors ({convert})"
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{path}: {fault}")


def refuse_pointer(path: Path) -> None:
    """What git-lfs left in place of the file."""
    with path.open("rb") as file:
        if file.read(64).startswith(b"version https://git-lfs"):
            hint = "run `git lfs pull` in its repository, or download the file itself"
            raise CheckpointError(f"{path} is a git-lfs pointer: {hint}")


def refuse_unreadable(path: Path, reason: str) -> None:
    """A .safetensors file that safetensors cannot open for `reason`."""
    refuse_pointer(path)
    with path.open("rb") as file:
        start = file.read(64)
    has_header = start[8:9] == b"{"
    cut = has_header and re.search("incomplete|header ?length", reason, re.IGNORECASE)
    pickle = not has_header and start.startswith((b"PK\x03\x04", b"\x80"))
    page = not has_header and start.lstrip()[:1] == b"<"
    _refuse(path, {
        "is empty (0 bytes): fetch it again": not start,
        "holds a pickle under a .safetensors name: pickles are refused, convert it to safetensors": pickle,
        "is a web page, not the weights: the download went wrong, fetch it again": page,
        f"is truncated, or longer than its header says ({path.stat().st_size:,} bytes): fetch it again": cut,
        f"is not a safetensors file ({' '.join(reason.split())}): fetch it again": True,
    })  # fmt: skip


def refuse_other_file(keys: Iterable[str], path: Path) -> None:
    """A single file whose keys are not those of an SDXL in the original layout."""
    text = "\n".join(sorted(keys))
    for pattern, kind in _OTHER_FILES.items():
        if re.search(pattern, text, re.MULTILINE):
            raise CheckpointError(f"{path} is {kind}; {FILE_HINT}")
    missing = [prefix for prefix in _PARTS if not re.search(f"^{re.escape(prefix)}", text, re.MULTILINE)]
    component = re.search(r"down_blocks\.|text_model\.", text)
    kind = "one component in the folder layout" if component else "of an unknown layout"
    first = text.partition("\n")[0]
    if len(missing) == len(_PARTS):
        raise CheckpointError(f"{path} is {kind} (its first key is {first!r}); {FILE_HINT}")
    if missing:
        raise CheckpointError(f"{path}: the {_PARTS[missing[0]]} is missing (no {missing[0]}* keys); {FILE_HINT}")


def refuse_other_folder(folder: Path, index: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """Anything but an SDXL pipeline. index: model_index.json; unet: the UNet's config; {} for one that is missing."""
    component = (folder / "config.json").is_file()
    file = min((path.name for path in folder.glob("*.safetensors")), default=None)
    if not index and not component and file is None:
        for path in sorted(folder.glob("*")):
            refuse_pickle(path)
    kind, width = str(index.get("_class_name") or "pipeline"), unet.get("cross_attention_dim")
    model = {"768": "Stable Diffusion 1", "1024": "Stable Diffusion 2"}.get(str(width), kind)
    parts = ("text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2")
    missing = next((part for part in parts if not (folder / part).is_dir()), None)
    refiner = missing == "text_encoder" and index.get("requires_aesthetics_score")
    scheduler = str((index.get("scheduler") or [""])[-1])
    sizes = unet.get("addition_embed_type") == "text_time"
    _refuse(folder, {
        "is one component, not a whole model: give the folder above it, with model_index.json": component and not index,
        f"has no model_index.json but {file}: give that file's path, if it is the checkpoint": file and not index,
        f"has no model_index.json: {FOLDER_HINT}": not index,
        f"is a {kind} without unet/config.json, not SDXL; {FOLDER_HINT}": not unet,
        f"is {model} (cross_attention_dim {width}, no size conditioning), not SDXL; {FOLDER_HINT}": not sizes,
        f"is the SDXL refiner: {REFINER}; give SDXL base": refiner,
        f"is incomplete, {missing}/ is missing: SDXL needs two text encoders with tokenizers, and a VAE": missing,
        f"uses the EDM formulation ({scheduler}), which is not supported; {FOLDER_HINT}": scheduler.startswith("EDM"),
    })  # fmt: skip
