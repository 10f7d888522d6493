"""What is measured of each image: features, distance to the baseline's image, text alignment, contents, colours."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from segresearch.checkpoints.resolve import resolve_model
from segresearch.config.expand import HELD_OUT, SCENE
from segresearch.config.validate import nearest
from segresearch.errors import ConfigError, InputError, NotFinite
from segresearch.evaluation.shards import Array
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.init_images import pixels as init_pixels
from segresearch.metrics.agreement import AttributeClassifier, agreement, classify, edge_agreement, scene_attributes
from segresearch.metrics.features import Extractor, load_extractor
from segresearch.metrics.lpips import load_lpips, lpips_distances
from segresearch.metrics.mini_vision import load_part, load_vision, perceptual_distances, unit_range
from segresearch.metrics.scores import BESIDE, SCORERS, load_scorer
from segresearch.metrics.text_alignment import CLIP, MiniClip, load_clip, text_alignment
from segresearch.models import load_model
from segresearch.models.compute import arithmetic
from segresearch.runs import digest, fingerprint
from segresearch.scenes.scenes import scenes
from segresearch.threads import one_thread

WEIGHTS = ("inception", "dinov2", "clip", "mini", "vgg", "alex", "vgg_heads", "alex_heads", "text_alignment", *SCORERS,
           *dict.fromkeys(BESIDE.values()))  # fmt: skip
ATTRIBUTES = ("count", "colors", "shapes", "objects", "exact", "objects_chance")
HELD = ("objects_held", "pairs_held")
LOOK = ("saturation", "brightness", "contrast", "red", "green", "blue", "sharpness")


@dataclass(frozen=True)
class Samples:
    """Images of one method, the baseline's images from the same noise, the prompt and the index of each."""

    images: UInt8[Tensor, "b 3 h w"]
    baseline: UInt8[Tensor, "b 3 h w"]
    prompts: list[str]
    rows: range


@dataclass(frozen=True)
class ImageMetric:
    """A number or several of each image. To add one, build it in `image_metrics` and list its names in frame.METRICS.

    name: in the frame. producer: identifies its networks by their weights. columns: names in the frame of its several
    numbers. baseline: digest of the baseline's images, for a metric that compares with them: its array's name ends in
    that digest, since a shard may serve runs with other baselines. extractor: of features, from which `aggregate`
    computes distances between sets of images.
    """

    name: str
    producer: str
    measure: Callable[[Samples], Float[Tensor, "b *values"]]
    columns: tuple[str, ...] = ()
    baseline: str = ""
    extractor: Extractor | None = None

    @property
    def array(self) -> str:
        """The name of its array in a shard."""
        return f"{self.name}@{self.baseline}" if self.baseline else self.name


def image_metrics(spec: EvaluationSpec, device: str = "cpu") -> tuple[ImageMetric, ...]:
    """The metrics of the config, their networks on `device`.

    Raises ConfigError for an unknown network, CheckpointError for weights that are missing.
    """
    config = spec.config
    for name in (*(f"weights.{key}" for key in config.weights), *(f"checksums.{key}" for key in config.checksums)):
        if (key := name.partition(".")[2]) not in WEIGHTS:
            raise ConfigError(f"{name}: no such network{nearest(key, WEIGHTS)} ({', '.join(WEIGHTS)})")
    metrics = [_features(name, spec, device) for name in config.features]
    if len(spec.methods) > 1:
        metrics += [_distance(name, spec, device) for name in config.distances]
    if any(spec.prompts) and config.text_alignment != "none":
        metrics.append(_text_alignment(spec, device))
    metrics += [_score(name, spec, device) for name in config.scores]
    if spec.scenes and config.text_alignment == "mini":
        metrics.append(_attributes(spec.scenes))
    if "mini" in config.features:
        metrics.append(_held())
    if spec.controls and all(images[0].startswith(SCENE) for images in spec.controls):
        metrics.append(_edges([HELD_OUT + int(images[0].removeprefix(SCENE)) for images in spec.controls]))
    if spec.inits:
        metrics += _truths(spec, device)
    return (*metrics, ImageMetric("look", "2", lambda samples: look(samples.images), LOOK))


def check_size(metrics: Sequence[ImageMetric], size: tuple[int, int]) -> None:
    """Measure a blank image, before any is sampled. ConfigError for a metric that cannot take images of this size."""
    blank = torch.full((1, 3, *size), 127, dtype=torch.uint8)
    for metric in metrics:
        try:
            metric.measure(Samples(blank, blank, ["blank"], range(1)))
        except InputError as error:
            message = f"{metric.name} cannot be measured here: {error}; leave it out, or choose another"
            raise ConfigError(message) from error


def measure(metrics: Sequence[ImageMetric], samples: Samples, names: Collection[str]) -> dict[str, Array]:
    """The arrays of these names, measured in fp32 products whatever sampling uses. Raises NotFinite."""
    arrays = {}
    for metric in (metric for metric in metrics if metric.array in names):
        with arithmetic("exact", "cuda"):
            values = metric.measure(samples).float().cpu()
        if not values.isfinite().all():
            raise NotFinite(f"{metric.name} is not finite")
        arrays[metric.array] = Array(values.numpy(), metric.producer)
    return arrays


def _features(name: str, spec: EvaluationSpec, device: str) -> ImageMetric:
    net = load_extractor(name, spec.config.weights.get(name), spec.config.checksums.get(name), device=device)
    return ImageMetric(f"features-{name}", net.weights, lambda s: net.of(s.images), extractor=net)


def _truths(spec: EvaluationSpec, device: str) -> list[ImageMetric]:
    """How close images are to those that they start from, before these are reduced: PSNR, where a mask has them made
    anew if there is one, and each of the config's distances."""

    def truth(samples: Samples, k: int = 0) -> Tensor:
        size = (samples.images.shape[2], samples.images.shape[3])
        return init_pixels([spec.inits[i][k] for i in samples.rows], size, masks=k == 1)

    def of_pixels(samples: Samples) -> Tensor:
        anew = truth(samples, 1) >= 128 if spec.config.init.mask is not None else None
        return psnr(samples.images, truth(samples), anew)

    def distance(name: str) -> ImageMetric:
        net, compare, producer = _perceptual(name, spec, device)
        return ImageMetric(f"distance_to_truth-{name}", producer, lambda s: compare(net, s.images, truth(s)))

    return [ImageMetric("psnr", "1", of_pixels), *map(distance, spec.config.distances)]


def psnr(
    images: UInt8[Tensor, "b 3 h w"], truth: UInt8[Tensor, "b 3 h w"], where: Bool[Tensor, "b 1 h w"] | None = None
) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of each image, over the pixels of `where` if it is given; at most 68, which is a
    mean squared error of 0.01 (of 255²)."""
    difference = images.cpu().float() - truth.cpu().float()
    squares = difference.square().mean(1, keepdim=True)  # (b, 3, h, w) -> (b, 1, h, w)
    weights = torch.ones_like(squares) if where is None else where.cpu().float()
    error = (squares * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3)).clamp(min=1)
    return 10 * (255**2 / error.clamp(min=0.01)).log10()


def _distance(name: str, spec: EvaluationSpec, device: str) -> ImageMetric:
    net, compare, producer = _perceptual(name, spec, device)
    baseline = spec.folders[spec.baseline].name.rpartition("-")[2]
    return ImageMetric(f"distance-{name}", producer, lambda s: compare(net, s.images, s.baseline), baseline=baseline)


def _perceptual(name: str, spec: EvaluationSpec, device: str) -> tuple[Any, Callable[..., Tensor], str]:
    """A network, the distance that it measures between images, and what identifies it."""
    weights, checksums = spec.config.weights, spec.config.checksums
    net: Any
    if name == "mini":
        folder = resolve_model(weights.get("mini") or "mini")
        net, compare = load_vision(folder).vision.to(device), perceptual_distances
        producer = fingerprint(folder / "vision")
    else:
        heads = f"{name}_heads"
        sha256 = checksums.get(name), checksums.get(heads)
        net, compare = load_lpips(name, weights.get(name), weights.get(heads), sha256, device=device), lpips_distances
        producer = hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in net.parameters())).hexdigest()
    return net, compare, producer


def _text_alignment(spec: EvaluationSpec, device: str) -> ImageMetric:
    weights, checksums = spec.config.weights, spec.config.checksums
    if spec.config.text_alignment == "clip":
        clip = load_clip(weights.get("text_alignment") or CLIP, checksums.get("text_alignment"), device=device)
        return ImageMetric("text_alignment-clip", clip.weights, lambda s: text_alignment(clip, s.images, s.prompts))
    folder = resolve_model(weights.get("mini") or "mini")
    mini = MiniClip(load_vision(folder).to(device), load_model(folder, device=device).text)
    producer = digest([fingerprint(folder / part) for part in ("vision", "text_encoder_2")])
    return ImageMetric("text_alignment-mini", producer, lambda s: text_alignment(mini, s.images, s.prompts, batch=250))


def _score(name: str, spec: EvaluationSpec, device: str) -> ImageMetric:
    weights, checksums = spec.config.weights, spec.config.checksums
    scorer = load_scorer(name, weights.get(name), weights.get(BESIDE[name]), checksums.get(name), device)
    if scorer.reads_prompts and not any(spec.prompts):
        raise ConfigError(f"scores: {name} compares images with prompts, and there are none; leave it out")
    return ImageMetric(name, scorer.weights, lambda s: scorer.of(s.images, s.prompts))


def _attributes(indices: Sequence[int]) -> ImageMetric:
    """Agreement with the scene of the prompt, and by chance, with that of the next prompt. On the CPU: it is small."""
    classifier = load_part("mini", "attributes", AttributeClassifier)

    def match(samples: Samples) -> Tensor:
        predicted = classify(classifier, samples.images)
        expected = [scene_attributes([indices[(i + shift) % len(indices)] for i in samples.rows]) for shift in (0, 1)]
        prompt, next_prompt = (agreement(predicted, attributes) for attributes in expected)
        return torch.stack([*(prompt[key] for key in ATTRIBUTES[:-1]), next_prompt["objects"]], dim=1)  # -> (b, 6)

    producer = digest([2, fingerprint(resolve_model("mini") / "attributes")])
    return ImageMetric("attributes", producer, match, ATTRIBUTES)


def _held() -> ImageMetric:
    """The number of objects in an image, and of different (shape, colour) among them, whatever its prompt."""
    classifier = load_part("mini", "attributes", AttributeClassifier)

    def count(samples: Samples) -> Tensor:
        content = classify(classifier, samples.images)
        return torch.stack([content.count, content.pairs.sum((1, 2))], dim=1).float()  # -> (b, 2)

    return ImageMetric("held", digest([1, fingerprint(resolve_model("mini") / "attributes")]), count, HELD)


def _edges(indices: Sequence[int]) -> ImageMetric:
    """How well contrasts lie on the edges of the scenes that the first control's images are of."""

    def match(samples: Samples) -> Tensor:
        edges = scenes([indices[i] for i in samples.rows], size=tuple(samples.images.shape[2:])).edges
        return edge_agreement(unit_range(samples.images), edges)

    return ImageMetric("edges", "1", match)


@one_thread
def look(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 7"]:
    """Saturation (HSV) and brightness, means over the image in [0, 1]; contrast, the deviation of its luminance; mean
    red, green and blue; sharpness, the mean |∇²| of the luminance (5 points, inside the border)."""
    x = images.float() / 255
    high, low = x.amax(1), x.amin(1)
    saturation = ((high - low) / high.clamp(min=1e-6)).mean((1, 2))  # (b, h, w) -> (b,)
    luminance = 0.2126 * x[:, 0] + 0.7152 * x[:, 1] + 0.0722 * x[:, 2]
    middle = [saturation, luminance.mean((1, 2)), luminance.std((1, 2), correction=0)]
    inner = luminance[:, 1:-1, 1:-1]
    around = luminance[:, :-2, 1:-1] + luminance[:, 2:, 1:-1] + luminance[:, 1:-1, :-2] + luminance[:, 1:-1, 2:]
    sharpness = (around - 4 * inner).abs().mean((1, 2))
    return torch.cat([torch.stack(middle, 1), x.mean((2, 3)), sharpness[:, None]], dim=1)
