"""What the controls of a run name: checked before anything is loaded, and identified by content, not by place."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from segresearch.config import ControlConfig
from segresearch.control_images.read import open_image
from segresearch.errors import CheckpointError, ConfigError, InputError
from segresearch.plan import SCENE, Panel, Row
from segresearch.runs import fingerprint, plain

SEEN = (64, 64)  # the size at which a scene's map is identified


class Sources:
    """The ControlNets and control images that `plan` asks for, checked and identified; no network is loaded for it.

    nets: the folder of each ControlNet by what a config calls it. Raises ConfigError, naming the setting, for a
    ControlNet that is not there, a depth estimator that is not there, or a file that is no image.
    """

    def __init__(self, plan: Sequence[Panel], model: Path):
        self.nets: dict[str, Path] = {}
        self._nets: dict[str, str] = {}  # fingerprints
        self._images: dict[tuple[str, str], str] = {}  # by (image, preprocess)
        for panel in plan:
            for k, (name, control) in enumerate(panel.controls.items()):
                self._add(control, list(dict.fromkeys(row.images[k] for row in panel.rows)), f"controls.{name}", model)

    def _add(self, control: ControlConfig, images: Sequence[str], at: str, model: Path) -> None:
        if control.net not in self.nets:
            from segresearch.checkpoints.resolve import resolve_controlnet

            folder = _said(f"{at}.net", lambda net: resolve_controlnet(net, model), control.net)
            self.nets[control.net], self._nets[control.net] = folder, fingerprint(folder)
        scenes, files = _split([i for i in images if (i, control.preprocess) not in self._images])
        for image in files:
            _said(f"{at}.image", open_image, image)
            data = Path(image).expanduser().read_bytes()
            self._images[image, control.preprocess] = hashlib.sha256(data).hexdigest()[:12]
        if files and control.preprocess == "depth":
            _said(f"{at}.depth_model", depth_fingerprint, str(control.depth_model))
        if scenes:
            from segresearch.control_images.prepare import scene_maps

            maps = scene_maps(scenes, control.preprocess, SEEN)
            for image, one in zip(scenes, maps.mul(255).round().byte().cpu(), strict=True):
                self._images[image, control.preprocess] = hashlib.sha256(one.numpy().tobytes()).hexdigest()[:12]

    def identity(self, panel: Panel) -> dict[str, Any]:
        """What the panel's pictures depend on: not what things are called or where they lie."""
        controls = []
        for k, control in enumerate(panel.controls.values()):
            images = [row.images[k] for row in panel.rows]
            _, files = _split(images)
            read = ["low", "high"] if files and control.preprocess == "canny" else []
            settings = {key: getattr(control, key) for key in ("scale", "start", "end", "guess", "preprocess", *read)}
            controls.append({**settings, "contents": [self._contents(control, image) for image in images]})
        return {"controls": controls} if controls else {}

    def settings(self, panel: Panel, row: Row) -> dict[str, Any]:
        """The part of a picture's settings about its controls: as a config has them, and what these names stood for."""
        pairs = list(zip(panel.controls.items(), row.images, strict=True))
        said = {name: plain(dataclasses.replace(control, image=image)) for (name, control), image in pairs}
        contents = {name: self._contents(control, image) for (name, control), image in pairs}
        return {"controls": said, "contents": contents} if pairs else {}

    def _contents(self, control: ControlConfig, image: str) -> dict[str, str]:
        found = {"net": self._nets[control.net], "image": self._images[image, control.preprocess]}
        if control.preprocess == "depth" and not image.startswith(SCENE):
            found["depth_model"] = depth_fingerprint(str(control.depth_model))
        return found


def _split(images: Sequence[str]) -> tuple[list[str], list[str]]:
    """Scenes and files."""
    scenes = [image for image in images if image.startswith(SCENE)]
    return scenes, [image for image in images if not image.startswith(SCENE)]


def _said(at: str, call: Callable[[str], Any], value: str) -> Any:
    """`call(value)`, its ValueError under the name of the setting."""
    try:
        return call(value)
    except CheckpointError as error:
        raise CheckpointError(f"{at}: {error}") from error
    except InputError as error:
        raise ConfigError(f"{at}: {error}") from error


@functools.cache
def depth_fingerprint(model: str) -> str:
    from segresearch.control_images.depth_estimator import located_depth

    return fingerprint(located_depth(model))
