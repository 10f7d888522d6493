"""The ControlNets and control images that a config names: checked before anything is loaded, identified by content."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segresearch.checkpoints.resolve import resolve_controlnet
from segresearch.config import ControlConfig
from segresearch.config.expand import SCENE
from segresearch.errors import CheckpointError, ConfigError, InputError
from segresearch.image_files import open_image
from segresearch.runs import fingerprint, plain


@dataclass(frozen=True)
class IdentifiedControl:
    """A control and the digests of what it names. images: digests of its control images by their names."""

    control: ControlConfig
    net: str
    images: Mapping[str, str]
    depth_model: str | None

    def contents(self, image: str) -> dict[str, str]:
        """What the names stand for, for one control image."""
        depth = {} if self.depth_model is None or image.startswith(SCENE) else {"depth_model": self.depth_model}
        return {"net": self.net, "image": self.images[image], **depth}

    def identity(self, images: Sequence[str]) -> dict[str, Any]:
        """What images under these control images depend on: not what things are called or where they lie."""
        thresholds = self.control.preprocess == "canny" and not all(image.startswith(SCENE) for image in images)
        keys = ("scale", "start", "end", "guess", "preprocess", *(("low", "high") if thresholds else ()))
        keys += () if self.control.kind is None else ("kind",)
        settings = {key: getattr(self.control, key) for key in keys}
        return {**settings, "contents": [self.contents(image) for image in images]}


def identify_control(control: ControlConfig, images: Sequence[str], model: Path, key: str) -> IdentifiedControl:
    """`control` and its images, checked; no network is loaded. key: of the config, for messages. CheckpointError for a
    ControlNet or a depth estimator that is missing, ConfigError for a file that is no image."""
    files = list(dict.fromkeys(image for image in images if not image.startswith(SCENE)))
    scenes = list(dict.fromkeys(image for image in images if image.startswith(SCENE)))
    digests, depth_model = {}, None
    with _naming(f"{key}.net"):
        net = fingerprint(resolve_controlnet(control.net, model))
    with _naming(f"{key}.image"):
        for file in files:
            open_image(file)
            digests[file] = hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()[:12]
    if files and control.preprocess == "depth":
        from segresearch.control_images.prepare import located_depth

        with _naming(f"{key}.depth_model"):
            depth_model = fingerprint(located_depth(str(control.depth_model)))
    if scenes:
        from segresearch.control_images.prepare import scene_maps

        maps = scene_maps(scenes, control.preprocess, (64, 64)).mul(255).round().byte().cpu().numpy()
        digests |= {scene: hashlib.sha256(one.tobytes()).hexdigest()[:12] for scene, one in zip(scenes, maps)}
    return IdentifiedControl(control, net, digests, depth_model)


def identify_controls(
    controls: Mapping[str, ControlConfig], images: Sequence[Sequence[str]], model: Path
) -> dict[str, IdentifiedControl]:
    """`identify_control` of each control. images: of each row its control images, one for each control."""
    return {
        name: identify_control(control, [row[k] for row in images], model, f"controls.{name}")
        for k, (name, control) in enumerate(controls.items())
    }


def control_records(controls: Mapping[str, IdentifiedControl], images: Sequence[str]) -> dict[str, Any]:
    """The part of an image's record about its controls: as a config has them, and what their names stand for.
    images: one control image for each control. {} without controls."""
    settings, contents = {}, {}
    for (name, identified), image in zip(controls.items(), images, strict=True):
        settings[name] = plain(dataclasses.replace(identified.control, image=image))
        contents[name] = identified.contents(image)
    return {"controls": settings, "contents": contents} if settings else {}


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Puts the full key in front of an error's message."""
    try:
        yield
    except InputError as error:
        kind = CheckpointError if isinstance(error, CheckpointError) else ConfigError
        raise kind(f"{key}: {error}") from error
