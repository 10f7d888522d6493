"""The control images of a run at its size: for the ControlNets, and as files to be looked at."""

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
from segresearch.control_images.depth_estimator import depth
from segresearch.control_images.edges import canny, to_tensor
from segresearch.control_images.read import fit, open_image, open_map
from segresearch.errors import ConfigError, InputError
from segresearch.images import read_settings, save_png
from segresearch.models.controlnet import ActiveControlNet, controlled
from segresearch.plan import HELD_OUT, SCENE
from segresearch.sampling import step_interval
from segresearch.scenes.control_maps import depth_image, edge_image
from segresearch.scenes.scenes import scenes


def scene_maps(images: Sequence[str], preprocess: str, size: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    """Exact edges ("canny"), depth ("depth") or pictures ("none") of the held-out scenes "scene:12", ..., in [0, 1]."""
    made = scenes([HELD_OUT + int(image.removeprefix(SCENE)) for image in images], size=size)
    if preprocess == "canny":
        return edge_image(made.edges)
    return depth_image(made.depth) if preprocess == "depth" else made.images.float() / 255


@functools.lru_cache(maxsize=32)  # the methods of a panel go through the same images
def control_image(control: ControlConfig, image: str, size: tuple[int, int]) -> Float[Tensor, "1 3 h w"]:
    """The control image that `control` makes of a file or a scene at size = (height, width), in [0, 1].

    Pictures are cut to the aspect as `fit` does. ValueError: see `scenes`, `open_image`, `open_map`, `canny`, `depth`.
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
    levels: Float[Tensor, "levels"],
) -> list[ActiveControlNet]:
    """Each control as an active ControlNet. images: for each image of the batch one control image a control.

    levels: the run's noise levels, in which `start` and `end` are places. ConfigError for a ControlNet that `sdxl` was
    loaded without, or that does not fit the size.
    """
    found = []
    for k, (name, control) in enumerate(controls.items()):
        if control.net not in sdxl.controlnets:
            there = ", ".join(sdxl.controlnets) or "none"
            raise ConfigError(f"controls.{name}.net: the model was loaded without {control.net!r} (with {there})")
        shown = torch.cat([control_image(control, own[k], size) for own in images])
        interval = step_interval(levels, control.start, control.end)
        try:
            found.append(controlled(sdxl.controlnets[control.net], shown, control.scale, interval, control.guess))
        except InputError as error:
            raise ConfigError(f"controls.{name}: {error}") from error
    return found


def show(control: ControlConfig, image: str, size: tuple[int, int], path: Path, settings: Mapping[str, Any]) -> None:
    """Write the control image as a PNG that carries `settings`, unless it is there."""
    if read_settings(path) == settings:
        return
    pixels = control_image(control, image, size)[0].permute(1, 2, 0)  # (1, 3, h, w) -> (h, w, 3)
    if pixels.min() == pixels.max():
        print(f"{image}: its {control.preprocess} map is blank, so it steers little", file=sys.stderr)
    elif control.preprocess == "none" and "canny" in control.net and pixels.mean() > 0.5:
        print(f"{image}: mostly white; an edge map is white edges on black", file=sys.stderr)
    save_png(Image.fromarray(np.rint(pixels.numpy() * 255).astype(np.uint8)), path, settings)
