"""Depth of a picture by an estimator of transformers, for depth ControlNets. Nothing is fetched from a network."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from segresearch.control_images.edges import to_tensor
from segresearch.control_images.read import fit
from segresearch.errors import CheckpointError, InputError

NEAREST = 0.01  # m: metric estimates below it are taken for it
METRIC = ("glpn", "zoedepth", "depth_pro", "prompt_depth_anything")  # these predict distances, others their inverse


def located_depth(model: str | Path) -> Path:
    """The folder of a depth estimator: a path, or a hub id in the local cache. CheckpointError if there is none."""
    path, name = Path(model).expanduser(), str(model)
    if not path.is_dir():
        hint = "or give a depth map with preprocess=none"
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            raise CheckpointError(
                f"depth model {name!r}: no such folder; give one, a hub id in the local cache, {hint}"
            )
        from huggingface_hub import constants, try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            raise CheckpointError(
                f"depth model {name!r} is neither a folder nor in the local cache ({constants.HF_HUB_CACHE}); fetch it "
                f'once with: hf download {name} --include "*.json" "*.safetensors"; {hint}'
            )
        path = Path(cached).parent
    missing = [name for name in ("config.json", "preprocessor_config.json") if not (path / name).is_file()]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise CheckpointError(f"depth model {path}: no {', '.join(missing)} there; fetch it again with all of these")
    return path


def depth(image: Image.Image, model: str | Path, size: tuple[int, int] | None = None) -> Float[Tensor, "1 3 h w"]:
    """Inverse depth, scaled for each picture to 0 (farthest) ... 1 (nearest); 0 throughout where it is flat.

    model: a folder or a cached hub id of transformers' AutoModelForDepthEstimation. The estimate is of the whole
    picture; then it is cut and resized as `fit` does to size = (height, width), None: the picture's own. Estimators of
    metric depth are inverted. Runs on the CPU. Raises ValueError: no such model, or one that cannot be loaded.
    """
    processor, network, metric = _loaded(located_depth(model))
    with torch.no_grad():
        inputs = processor(images=image.convert("RGB"), return_tensors="pt")
        predicted = network(**inputs).predicted_depth[0].float()  # (h', w')
    if metric:
        predicted = predicted.clamp(min=NEAREST).reciprocal()
    if not predicted.isfinite().all():
        raise InputError(f"depth model {model}: its estimate is not finite")
    low, high = predicted.min(), predicted.max()
    whole = Image.fromarray(((predicted - low) / (high - low).clamp(min=1e-12)).numpy().astype(np.float32))
    values = np.asarray(fit(whole, size or (image.height, image.width), aspect=image.width / image.height))
    span = values.max() - values.min()  # of the part that is left
    flat = not span > 1e-6 or not high > low
    return to_tensor(Image.fromarray(np.zeros_like(values) if flat else (values - values.min()) / span))


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[Any, Any, bool]:
    """The image processor, the network, and whether it predicts distances."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            network, found = AutoModelForDepthEstimation.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:  # whatever transformers raises on a folder that is not what it should be
        reason = " ".join(str(error).split()).split(". ")[0]
        raise InputError(f"depth model {folder}: not a depth estimator of transformers ({reason})") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if found["missing_keys"]:
        raise InputError(f"depth model {folder}: its weights lack {sorted(found['missing_keys'])[0]!r}; fetch it again")
    kind = getattr(network.config, "depth_estimation_type", "relative")
    return processor, network.eval(), kind == "metric" or network.config.model_type in METRIC
