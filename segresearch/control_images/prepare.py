"""The control images of a run at its size: as ControlNets take them, and as files."""

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
from segresearch.config.parse import HELD_OUT, SCENE
from segresearch.control_images.depth_estimator import depth
from segresearch.control_images.edges import canny, to_tensor
from segresearch.control_images.read import fit, open_image, open_map
from segresearch.errors import ConfigError, InputError
from segresearch.models.controlnet import ActiveControlNet, controlled
from segresearch.records import read_record, save_png
from segresearch.sampling import step_interval
from segresearch.scenes.control_maps import depth_image, edge_image
from segresearch.scenes.scenes import scenes


def scene_maps(images: Sequence[str], preprocess: str, size: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    """Exact edges ("canny"), depth ("depth") or images ("none") of the held-out scenes "scene:12", ..., in [0, 1]."""
    batch = scenes([HELD_OUT + int(image.removeprefix(SCENE)) for image in images], size=size)
    if preprocess == "canny":
        return edge_image(batch.edges)
    return depth_image(batch.depth) if preprocess == "depth" else batch.images.float() / 255


@functools.lru_cache(maxsize=32)  # the methods of a panel go through the same images
def control_image(control: ControlConfig, image: str, size: tuple[int, int]) -> Float[Tensor, "1 3 h w"]:
    """The control image that `control` reads of a file or a scene, at size = (height, width), in [0, 1].

    Images are cut to the aspect as `fit` does. ValueError: see `scenes`, `open_image`, `open_map`, `canny`, `depth`.
    """
    if image.startswith(SCENE):
        return scene_maps([image], control.preprocess, size)
    if control.preprocess == "none":
        return to_tensor(fit(open_map(image), size))
    if control.preprocess == "canny":
        return canny(fit(open_image(image), size), control.low, control.high)
    return depth(open_image(image), str(control.depth_model), size)


def controlled_batch(
    sdxl: Any,
    controls: Mapping[str, ControlConfig],
    images: Sequence[tuple[str, ...]],
    size: tuple[int, int],
    sigmas: Float[Tensor, "sigmas"],
) -> list[ActiveControlNet]:
    """The active ControlNets of a batch. images: the control images of each row, one for each control.

    sigmas: of the run's schedule; `start` and `end` are fractions of its steps. ConfigError for a ControlNet that
    `sdxl` was loaded without, or that does not fit the size.
    """
    active = []
    for k, (name, control) in enumerate(controls.items()):
        if control.net not in sdxl.controlnets:
            loaded = ", ".join(sdxl.controlnets) or "none"
            raise ConfigError(f"controls.{name}.net: the model was loaded without {control.net!r} (with {loaded})")
        batch = torch.cat([control_image(control, row[k], size) for row in images])
        interval = step_interval(sigmas, control.start, control.end)
        try:
            active.append(controlled(sdxl.controlnets[control.net], batch, control.scale, interval, control.guess))
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
    """Write the control image as a PNG that carries `record`, unless it exists. Warns of one that is blank or inverted.
    """
    if read_record(path) == record:
        return
    pixels = control_image(control, image, size)
    if pixels.min() == pixels.max():
        print(f"{image}: its {control.preprocess} map is blank, so it steers little", file=sys.stderr)
    elif control.preprocess == "none" and "canny" in control.net and pixels.mean() > 0.5:
        print(f"{image}: mostly white; an edge map is white edges on black", file=sys.stderr)
    save_png(control_png(control, image, size), path, record)
