"""Depth of an image by an estimator of transformers, for depth ControlNets. Nothing is fetched from a network."""

import functools
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
from segresearch.pretrained import load_model, model_folder, reading

NEAREST = 0.01  # m: metric estimates below it are taken for it
METRIC = ("glpn", "zoedepth", "depth_pro", "prompt_depth_anything")  # these predict distances, others their inverse


def located_depth(model: str | Path) -> Path:
    """The folder of a depth estimator: a path, or a hub id in the local cache. CheckpointError if there is none."""
    try:
        return model_folder(model, ["config.json", "preprocessor_config.json"], ["*.safetensors"])
    except CheckpointError as error:
        raise CheckpointError(f"depth model {error}; or give a depth map with preprocess=none") from error


def depth(image: Image.Image, model: str | Path, size: tuple[int, int] | None = None) -> Float[Tensor, "1 3 h w"]:
    """Inverse depth, scaled for each image to 0 (farthest) ... 1 (nearest); 0 throughout where it is flat.

    model: a folder or a cached hub id of transformers' AutoModelForDepthEstimation. The estimate is of the whole
    image; then it is cut and resized as `fit` does to size = (height, width), None: the image's own. Estimators of
    metric depth are inverted. Runs on the CPU. Raises CheckpointError: no such model, or one that cannot be loaded.
    """
    processor, network, metric = _loaded(located_depth(model))
    with torch.no_grad():
        inputs = processor(images=image.convert("RGB"), return_tensors="pt")
        estimate = network(**inputs).predicted_depth[0].float()  # (h', w')
    if metric:
        estimate = estimate.clamp(min=NEAREST).reciprocal()
    if not estimate.isfinite().all():
        raise InputError(f"depth model {model}: its estimate is not finite")
    low, high = estimate.min(), estimate.max()
    whole = Image.fromarray(((estimate - low) / (high - low).clamp(min=1e-12)).numpy().astype(np.float32))
    values = np.asarray(fit(whole, size or (image.height, image.width), aspect=image.width / image.height))
    span = values.max() - values.min()  # of the part that is left
    flat = not span > 1e-6 or not high > low
    return to_tensor(Image.fromarray(np.zeros_like(values) if flat else (values - values.min()) / span))


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[Any, Any, bool]:
    """The image processor, the network, and whether it predicts distances."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    with reading(folder, "not a depth estimator of transformers"):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    network = load_model(AutoModelForDepthEstimation, folder, "depth estimator", use_safetensors=True)
    kind = getattr(network.config, "depth_estimation_type", "relative")
    return processor, network, kind == "metric" or network.config.model_type in METRIC
