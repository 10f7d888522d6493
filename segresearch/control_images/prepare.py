"""Control images as ControlNets take them: exact maps of a scene, or what is read of a file (its edges by OpenCV's
Canny detector, its depth by an estimator of transformers, or a ready-made map), at a run's size, and as files."""

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from segresearch.config import ControlConfig
from segresearch.config.expand import HELD_OUT, SCENE
from segresearch.errors import CheckpointError, ConfigError, InputError
from segresearch.image_files import fit, open_image, open_map
from segresearch.models.controlnet import ActiveControlNet, controlled
from segresearch.pretrained import load_pretrained, model_folder, reading
from segresearch.records import read_record, save_png
from segresearch.sampling import step_interval
from segresearch.scenes.scenes import depth_image, edge_image, scenes

METRIC = ("glpn", "zoedepth", "depth_pro", "prompt_depth_anything")  # these predict distances, others their inverse


def to_tensor(image: Image.Image) -> Float[Tensor, "1 3 h w"]:
    """An RGB image, or a map of mode "F", as a control image in [0, 1]."""
    if image.mode == "F":
        return torch.from_numpy(np.array(image)).clamp(0, 1).repeat(1, 3, 1, 1)  # (h, w) -> (1, 3, h, w)
    values = torch.from_numpy(np.array(image.convert("RGB")))
    return values.permute(2, 0, 1)[None].float() / 255  # (h, w, 3) -> (1, 3, h, w)


def canny(image: Image.Image, low: float | int = 100, high: float | int = 200) -> Float[Tensor, "1 3 h w"]:
    """Edges of the colour image, white on black. low, high: hysteresis thresholds on the gradient (3×3 Sobel, the
    strongest colour); 100 and 200 are common with SDXL's canny ControlNets. InputError unless 0 <= low <= high."""
    if not 0 <= low <= high:
        raise InputError(f"canny thresholds must be 0 <= low <= high, got low={low:g}, high={high:g}")
    import cv2

    edges = cv2.Canny(np.ascontiguousarray(image.convert("RGB")), low, high)
    return torch.from_numpy(edges).float().div(255).repeat(1, 3, 1, 1)  # (h, w) -> (1, 3, h, w)


def located_depth(model: str | Path) -> Path:
    """The folder of a depth estimator: a path, or a hub id in the local cache. CheckpointError if there is none."""
    try:
        return model_folder(model, ["config.json", "preprocessor_config.json"], ["*.safetensors"])
    except CheckpointError as error:
        raise CheckpointError(f"depth model {error}; or give a depth map with preprocess=none") from error


@functools.lru_cache(maxsize=1)
def _depth_estimator(folder: Path) -> tuple[Any, Any, bool]:
    """The image processor, the network, and whether it predicts distances."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    with reading(folder, "not a depth estimator of transformers"):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    network = load_pretrained(AutoModelForDepthEstimation, folder, kind="depth estimator", use_safetensors=True)
    kind = getattr(network.config, "depth_estimation_type", "relative")
    return processor, network, kind == "metric" or network.config.model_type in METRIC


def depth(image: Image.Image, model: str | Path, size: tuple[int, int] | None = None) -> Float[Tensor, "1 3 h w"]:
    """Inverse depth, scaled for each image to 0 (farthest) ... 1 (nearest); 0 throughout where it is flat. Estimated of
    the whole image on the CPU, then cut as `fit` does to size = (height, width), None: the image's own. model: a folder
    or a cached hub id of AutoModelForDepthEstimation. CheckpointError for no such model, or one that does not load."""
    processor, network, metric = _depth_estimator(located_depth(model))
    with torch.no_grad():
        inputs = processor(images=image.convert("RGB"), return_tensors="pt")
        estimate = network(**inputs).predicted_depth[0].float()  # (h', w')
    if metric:
        estimate = estimate.clamp(min=0.01).reciprocal()  # m; nearer estimates are taken for 1 cm
    if not estimate.isfinite().all():
        raise InputError(f"depth model {model}: its estimate is not finite")
    low, high = estimate.min(), estimate.max()
    whole = Image.fromarray(((estimate - low) / (high - low).clamp(min=1e-12)).numpy().astype(np.float32))
    values = np.asarray(fit(whole, size or (image.height, image.width), aspect=image.width / image.height))
    span = values.max() - values.min()  # of the part that is left
    flat = not span > 1e-6 or not high > low
    return to_tensor(Image.fromarray(np.zeros_like(values) if flat else (values - values.min()) / span))


def scene_maps(images: Sequence[str], preprocess: str, size: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    """Exact edges ("canny"), depth ("depth") or images ("none") of the held-out scenes "scene:12", ..., in [0, 1]."""
    batch = scenes([HELD_OUT + int(image.removeprefix(SCENE)) for image in images], size=size)
    if preprocess == "canny":
        return edge_image(batch.edges)
    return depth_image(batch.depth) if preprocess == "depth" else batch.images.float() / 255


@functools.lru_cache(maxsize=32)  # the methods of a panel go through the same images
def control_image(control: ControlConfig, image: str, size: tuple[int, int]) -> Float[Tensor, "1 3 h w"]:
    """The control image that `control` reads of a file or a scene, cut as `fit` does to size = (height, width), in
    [0, 1]. InputError: see `scenes`, `open_image`, `open_map`, `canny`, `depth`."""
    if image.startswith(SCENE):
        return scene_maps([image], control.preprocess, size)
    if control.preprocess == "none":
        return to_tensor(fit(open_map(image), size))
    if control.preprocess == "canny":
        return canny(fit(open_image(image), size), control.low, control.high)
    return depth(open_image(image), str(control.depth_model), size)


def controlled_batch(
    sd: Any, controls: Mapping[str, ControlConfig], images: Sequence[tuple[str, ...]],
    size: tuple[int, int], sigmas: Float[Tensor, "sigmas"],
) -> list[ActiveControlNet]:  # fmt: skip
    """The active ControlNets of a batch. images: of each row, one for each control. sigmas: of the run's schedule, as
    `start` and `end` are fractions of its steps. ConfigError for a ControlNet that is not loaded or does not fit."""
    active = []
    for k, (name, control) in enumerate(controls.items()):
        if control.net not in sd.controlnets:
            loaded = ", ".join(sd.controlnets) or "none"
            raise ConfigError(f"controls.{name}.net: the model was loaded without {control.net!r} (with {loaded})")
        net = sd.controlnets[control.net]
        if control.kind is not None and not hasattr(net, "of_kind"):
            hint = f"and {control.net} is a ControlNet of one kind: leave it out"
            raise ConfigError(f"controls.{name}.kind: {control.kind!r} is for a union of ControlNets, {hint}")
        batch = torch.cat([control_image(control, row[k], size) for row in images])
        interval = step_interval(sigmas, control.start, control.end)
        try:
            net = net if control.kind is None else net.of_kind(control.kind)
            with sd.arithmetic():
                active.append(controlled(net, batch, control.scale, interval, control.guess))
        except InputError as error:
            raise ConfigError(f"controls.{name}: {error}") from error
    return active


def control_png(control: ControlConfig, image: str, size: tuple[int, int]) -> Image.Image:
    """The control image in 8 bits."""
    pixels = control_image(control, image, size)[0].permute(1, 2, 0)  # (1, 3, h, w) -> (h, w, 3)
    return Image.fromarray(np.rint(pixels.numpy() * 255).astype(np.uint8))


def save_control_image(
    control: ControlConfig, image: str, size: tuple[int, int], path: Path, record: Mapping[str, Any]
) -> None:
    """Write the control image as a PNG that carries `record`, unless it exists. Warns of a blank or inverted one."""
    if read_record(path) == record:
        return
    pixels = control_image(control, image, size)
    if pixels.min() == pixels.max():
        print(f"{image}: its {control.preprocess} map is blank, so it steers little", file=sys.stderr)
    elif control.preprocess == "none" and "canny" in control.net and pixels.mean() > 0.5:
        print(f"{image}: mostly white; an edge map is white edges on black", file=sys.stderr)
    save_png(control_png(control, image, size), path, record)
