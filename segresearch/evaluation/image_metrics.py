"""What is measured of each picture: features, distance to the first setting's picture, agreement with its caption."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import EvaluateConfig
from segresearch.config.names import nearest
from segresearch.config.parse import HELD_OUT, SCENE
from segresearch.errors import ConfigError, InputError
from segresearch.evaluation.shards import Array
from segresearch.metrics.attributes import agreement, classify, load_attribute_classifier, scene_attributes
from segresearch.metrics.edge_agreement import edge_agreement
from segresearch.metrics.features import Extractor, load_extractor
from segresearch.metrics.lpips import load_lpips, lpips_distances
from segresearch.metrics.mini_vision import SIDE, load_vision, perceptual_distances, unit_range
from segresearch.metrics.text_alignment import CLIP, MiniClip, load_clip, text_alignment
from segresearch.models.compute import arithmetic
from segresearch.runs import digest, fingerprint
from segresearch.threads import one_thread

if TYPE_CHECKING:
    from segresearch.evaluation.spec import Study

WEIGHTS = ("inception", "dinov2", "clip", "mini", "vgg", "alex", "vgg_heads", "alex_heads", "text_alignment")
ATTRIBUTES = ("count", "colors", "shapes", "objects", "exact", "objects_chance")
LOOK = ("saturation", "brightness", "contrast", "red", "green", "blue")


class NotFinite(InputError):
    """Pictures, or what is measured of them, that are not numbers: this shard cannot be made."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of one setting, those of the first setting from the same noise, and the caption of each."""

    images: UInt8[Tensor, "b 3 h w"]
    first: UInt8[Tensor, "b 3 h w"]
    texts: list[str]
    rows: range


@dataclass(frozen=True)
class Judge:
    """An array of one row a picture, by name; `by` tells the networks. against: it compares with the first setting,
    whose digest then ends the name, since runs of another first setting may share the shard; `column` lacks it."""

    name: str
    by: str
    measure: Callable[[Pictures], Float[Tensor, "b *values"]]
    against: bool = False
    extractor: Extractor | None = None

    @property
    def column(self) -> str:
        return self.name.rpartition("@")[0] if self.against else self.name


def judges(config: EvaluateConfig, study: "Study", device: str = "cpu") -> tuple[Judge, ...]:
    """Those that `config` names, loaded on `device`; what names attributes is small and stays on the CPU.

    Raises ConfigError for names that are none, CheckpointError for weights that are missing.
    """
    for group, keys in (("weights", config.weights), ("checksums", config.checksums)):
        if unknown := [key for key in keys if key not in WEIGHTS]:
            hint = f"{nearest(unknown[0], WEIGHTS)} ({', '.join(WEIGHTS)})"
            raise ConfigError(f"{group}.{unknown[0]}: no such network{hint}")
    given, sums = config.weights, config.checksums
    found: list[Judge] = []
    for name in config.features:
        extractor = load_extractor(name, given.get(name), sums.get(name), device=device)
        found.append(Judge(f"features-{name}", extractor.weights, _features(extractor), extractor=extractor))
    if len(study.settings) > 1:
        found += [_distance(name, config, study, device) for name in config.distances]
    if any(study.prompts) and config.text_alignment != "none":
        found.append(_caption(config, device))
    if study.scenes and config.text_alignment == "mini":
        found.append(_attributes(study.scenes))
    if study.controls and all(shown[0].startswith(SCENE) for shown in study.controls):
        found.append(_edges([HELD_OUT + int(shown[0].removeprefix(SCENE)) for shown in study.controls]))
    return (*found, Judge("look", "1", lambda p: look(p.images)))


def tried(found: Sequence[Judge], size: tuple[int, int]) -> None:
    """Show them a blank picture of `size`, before any is sampled. ConfigError for one that cannot look at it."""
    blank = torch.full((1, 3, *size), 127, dtype=torch.uint8)
    for judge in found:
        try:
            judge.measure(Pictures(blank, blank, ["blank"], range(1)))
        except InputError as error:
            raise ConfigError(
                f"{judge.name} cannot be measured here: {error}; leave it out, or choose another"
            ) from error


def _features(extractor: Extractor) -> Callable[[Pictures], Tensor]:
    return lambda p: extractor.of(p.images)


def _attributes(scenes: Sequence[int]) -> Judge:
    classifier = load_attribute_classifier()

    def match(p: Pictures) -> Tensor:
        found = classify(classifier, p.images)
        held = [scene_attributes([scenes[(i + k) % len(scenes)] for i in p.rows]) for k in (0, 1)]
        seen, other = (agreement(found, expected) for expected in held)
        return torch.stack([*(seen[key] for key in ATTRIBUTES[:-1]), other["objects"]], dim=1)

    return Judge("attributes", digest([2, fingerprint(resolve_model("mini") / "attributes")]), match)


def _edges(scenes: Sequence[int]) -> Judge:
    """How well contrasts lie on the edges of the scenes that the first control's images are of."""
    from segresearch.scenes.scenes import scenes as rendered

    def match(p: Pictures) -> Tensor:
        held = rendered([scenes[i] for i in p.rows], size=(p.images.shape[2], p.images.shape[3]))
        return edge_agreement(unit_range(p.images), held.edges)

    return Judge("edges", "1", match)


def _distance(name: str, config: EvaluateConfig, study: "Study", device: str) -> Judge:
    given, stored = config.weights, f"distance-{name}@{study.places[study.first].name.rpartition('-')[2]}"
    if name == "mini":
        place = resolve_model(given.get("mini") or "mini")
        vision = load_vision(place).vision.to(device)

        def apart(p: Pictures) -> Tensor:
            h, w = p.images.shape[2:]
            if h % 16 or w % 16:
                raise InputError(f"pictures of {h}×{w}: sides must be multiples of 16")
            return perceptual_distances(vision, p.images.to(device), p.first.to(device))

        return Judge(stored, fingerprint(place / "vision"), apart, True)
    trunk, heads = given.get(name), given.get(f"{name}_heads")
    sums = (config.checksums.get(name), config.checksums.get(f"{name}_heads"))
    net = load_lpips(name, trunk, heads, sums, device=device)
    read = hashlib.sha256()
    for parameter in net.parameters():
        read.update(parameter.cpu().numpy().tobytes())
    by = read.hexdigest()
    return Judge(stored, by, lambda p: lpips_distances(net, p.images, p.first), True)


def _caption(config: EvaluateConfig, device: str) -> Judge:
    if config.text_alignment == "clip":
        path, checksum = (keys.get("text_alignment") for keys in (config.weights, config.checksums))
        clip = load_clip(path or CLIP, checksum, device=device)
        return Judge("caption-clip", clip.weights, lambda p: text_alignment(clip, p.images, p.texts))
    from segresearch.models import load_sdxl

    place = resolve_model(config.weights.get("mini") or "mini")
    tower, text = load_vision(place).to(device), load_sdxl(place, device=device).text
    by = digest([fingerprint(place / part) for part in ("vision", "text_encoder_2")])

    def match(p: Pictures) -> Tensor:
        if p.images.shape[2:] != (SIDE, SIDE):
            raise InputError(f"pictures of {p.images.shape[2]}×{p.images.shape[3]}: mini reads {SIDE}×{SIDE}")
        return text_alignment(MiniClip(tower, text), p.images, p.texts, batch=250)

    return Judge("caption-mini", by, match)


@one_thread
def look(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 6"]:
    """Saturation (HSV) and brightness, means over the picture in [0, 1]; contrast, the deviation of its luminance; mean
    red, green and blue."""
    x = images.float() / 255
    high, low = x.amax(1), x.amin(1)
    saturation = ((high - low) / high.clamp(min=1e-6)).mean((1, 2))  # (b, h, w) -> (b,)
    luminance = 0.2126 * x[:, 0] + 0.7152 * x[:, 1] + 0.0722 * x[:, 2]
    middle = [saturation, luminance.mean((1, 2)), luminance.std((1, 2), correction=0)]
    return torch.cat([torch.stack(middle, 1), x.mean((2, 3))], dim=1)


def names(found: Sequence[Judge], setting: int) -> dict[str, str]:
    """What a shard of the `setting`-th setting must hold of these judges: name -> by."""
    return {j.name: j.by for j in found if not (j.against and setting == 0)}


def measured(found: Sequence[Judge], pictures: Pictures, wanted: Collection[str]) -> dict[str, Array]:
    """What the judges that are wanted say of the pictures. Raises NotFinite."""
    made = {}
    for judge in found:
        if judge.name in wanted:
            with arithmetic("exact", "cuda"):  # whatever samples
                value = judge.measure(pictures).float().cpu()
            if not value.isfinite().all():
                raise NotFinite(f"{judge.name} is not finite")
            made[judge.name] = Array(value.numpy(), judge.by)
    return made
