"""Sample the missing shards of an evaluation and measure them."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from segresearch import runs
from segresearch.build import build_guidance
from segresearch.control_images.prepare import controlled_batch
from segresearch.errors import NotFinite
from segresearch.evaluation import shards
from segresearch.evaluation.image_metrics import ImageMetric, Samples, check_size, measure
from segresearch.evaluation.shards import Array
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.evaluation.workers import Worker
from segresearch.sample_images import decode_images, run_sigmas, sample_latents

if TYPE_CHECKING:
    from segresearch.models import SDXL

DECODED = 10  # latents that are decoded together on a CPU, in whose cache small parts stay
PIXELS = 2**23  # of images decoded together on a GPU, at least one image
IMAGES, NORMS, COST = "images", "norms", "cost"  # arrays that sampling produces
SAMPLED = "sampled"  # their producer


@dataclass
class Progress:
    """How many images were sampled and how many existed, and a message for each shard that could not be written."""

    sampled: int = 0
    existing: int = 0
    failures: list[str] = field(default_factory=list)


def required_arrays(
    spec: EvaluationSpec, metrics: Sequence[ImageMetric], method: str, rows: range
) -> dict[str, str]:
    """What the shard of a method and a range must hold: the producer of each array.

    images: uint8 (n, 3, h, w), of the shards up to `keep`. norms: (n, evaluations), root mean square of what guidance
    adds, for samplers that evaluate all images equally often. cost: (1,), floating-point operations of the sampling of
    one image, in the first shard. Then an array for each metric; those that compare with the baseline not for itself.
    """
    config, baseline = spec.config, method == spec.baseline
    names = [IMAGES] if config.keep is None or rows.start < config.keep else []
    if config.sampler.name != "dpm_adaptive" and not config.sampler.options.get("s_churn"):
        names.append(NORMS)
    names += [COST] if rows.start == 0 else []
    measured = {metric.array: metric.producer for metric in metrics if not (metric.baseline and baseline)}
    return dict.fromkeys(names, SAMPLED) | measured


def missing_arrays(spec: EvaluationSpec, metrics: Sequence[ImageMetric], rows: range) -> dict[str, set[str]]:
    """The arrays that the shards of a range lack, by method; methods that lack none are left out."""
    missing = {}
    for method in spec.methods:
        present = shards.producers(spec.shard(method, rows))
        required = required_arrays(spec, metrics, method, rows)
        missing[method] = {name for name, producer in required.items() if present.get(name) != producer}
    return {method: names for method, names in missing.items() if names}


class Sampler:
    """Images of any method and range. The model is loaded at the first call; every method is built and every metric
    tried on a blank image then, so that what cannot work fails early."""

    def __init__(self, spec: EvaluationSpec, metrics: Sequence[ImageMetric], load: Callable[[], "SDXL"]):
        self.spec, self.metrics, self.load = spec, metrics, load
        self.norms: list[Float[Tensor, " b"]] = []  # one for each evaluation of the batch in hand
        self.controls: tuple[range, list[Any]] = (range(0), [])  # of the range in hand, a list for each batch

    @cached_property
    def sdxl(self) -> "SDXL":
        sdxl, size = self.load(), self.spec.config.size
        sdxl.latent_shape(size)
        check_size(self.metrics, size or sdxl.default_size)
        return sdxl

    @cached_property
    def guided(self) -> dict[str, Any]:
        """Every method around the denoiser, with `note_norm` as its last post-processor."""
        methods = self.spec.methods.items()
        return {name: build_guidance(guidance, self.sdxl.denoiser, [self.note_norm]) for name, guidance in methods}

    def note_norm(self, guided: Tensor, unguided: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Notes the root mean square of what guidance adds, and changes nothing."""
        self.norms.append((guided - unguided).square().mean((1, 2, 3)).sqrt())  # (b, c, h, w) -> (b,)
        return guided

    def controls_of(self, rows: range, batches: Sequence[range]) -> list[Any]:
        """The ControlNets of each batch with its control images; the methods of a range share them."""
        if self.controls[0] != rows:
            config, sdxl = self.spec.config, self.sdxl
            size, sigmas = config.size or sdxl.default_size, run_sigmas(sdxl, config)
            images = [[self.spec.controls[i] for i in batch] for batch in batches]
            self.controls = rows, [controlled_batch(sdxl, config.controls, some, size, sigmas) for some in images]
        return self.controls[1]

    def __call__(
        self, method: str, rows: range, advance: Callable[[int], object]
    ) -> tuple[UInt8[Tensor, "b 3 h w"], dict[str, np.ndarray]]:
        """Images of `rows`, in batches that start with the range, and the arrays NORMS and COST (see
        `required_arrays`). Raises NotFinite."""
        sdxl, model, config = self.sdxl, self.guided[method], self.spec.config
        images, norms, arrays = [], [], {}
        step = int(config.batch_size)
        batches = [rows[i : i + step] for i in range(0, len(rows), step)]
        controls = self.controls_of(rows, batches) if config.controls else [()] * len(batches)
        pixels = math.prod(config.size or sdxl.default_size)
        for batch, control in zip(batches, controls, strict=True):
            conds = sdxl.encode(self.spec.texts(batch), negative=config.negative, size=config.size)
            self.norms = []
            counter = FlopCounterMode(display=False) if batch.start == 0 else None
            with counter or contextlib.nullcontext():
                latents = sample_latents(sdxl, model, batch, conds, config, control)
            if counter is not None:
                arrays[COST] = np.array([counter.get_total_flops() / len(batch)])
            decoded = DECODED if latents.device.type == "cpu" else max(1, PIXELS // pixels)
            images.append(decode_images(sdxl, latents, decoded).cpu())
            if self.norms and all(len(norm) == len(batch) for norm in self.norms):
                norms.append(torch.stack(self.norms, dim=1).float().cpu())  # evaluations of (b,) -> (b, evaluations)
            advance(len(batch))
        if len(norms) == len(images):
            arrays[NORMS] = torch.cat(norms).numpy()
        return torch.cat(images), arrays


def sample_shards(
    spec: EvaluationSpec, metrics: Sequence[ImageMetric], worker: Worker, load: Callable[[], "SDXL"]
) -> Progress:
    """Write every shard of this worker's ranges that lacks an array. A range is done method by method, the baseline
    first, so that its images are at hand for the distances; images that exist are not sampled again."""
    own = worker.part(spec.ranges)
    todo = [(rows, missing) for rows in own if (missing := missing_arrays(spec, metrics, rows))]
    count = sum(len(rows) * len(missing) for rows, missing in todo)
    progress = Progress(existing=sum(map(len, own)) * len(spec.methods) - count)
    sampler = Sampler(spec, metrics, load)
    with tqdm(total=count, unit="image", disable=None, leave=False, smoothing=0.05) as bar:
        for rows, _ in todo:
            if missing_arrays(spec, metrics, rows):  # another worker may have written some by now
                _sample_range(spec, metrics, rows, sampler, bar, progress)
    return progress


def _sample_range(
    spec: EvaluationSpec, metrics: Sequence[ImageMetric], rows: range, sampler: Sampler, bar: Any, progress: Progress
) -> None:
    missing, baseline = missing_arrays(spec, metrics, rows), None
    relative = {metric.array for metric in metrics if metric.baseline}
    for method, names in missing.items():
        path = spec.shard(method, rows)
        bar.set_description(method)
        try:
            if baseline is None and method != spec.baseline and names & relative:
                baseline, _ = _images(spec, spec.baseline, rows, set(), sampler, lambda _: None)
            images, sampled = _images(spec, method, rows, names, sampler, bar.update)
            baseline = images if method == spec.baseline else baseline
            samples = Samples(images, images if baseline is None else baseline, spec.texts(rows), rows)
            measured = measure(metrics, samples, names)
        except NotFinite as error:
            progress.failures.append(f"{method}, {path.stem}: {error}")
            if method == spec.baseline:
                return
            continue
        sampled[IMAGES] = images.numpy()
        absent = np.zeros((len(rows), 0), np.float32)  # norms of a sampler that evaluates images unequally often
        present = shards.producers(path)
        arrays = {name: Array(shards.load(path, name), present[name]) for name in present.keys() - names} | measured
        arrays |= {name: Array(sampled.get(name, absent), SAMPLED) for name in names & {IMAGES, NORMS, COST}}
        kept = IMAGES in present.keys() - names
        shards.write(path, arrays, shards.versions(path) if kept else runs.versions())
        progress.sampled += len(rows)


def _images(
    spec: EvaluationSpec, method: str, rows: range, names: set[str], sampler: Sampler, advance: Callable[[int], object]
) -> tuple[UInt8[Tensor, "b 3 h w"], dict[str, np.ndarray]]:
    """From the shard where it holds them and lacks nothing of sampling, else sampled, to the same bits."""
    path = spec.shard(method, rows)
    if shards.producers(path).get(IMAGES) == SAMPLED and not names & {IMAGES, NORMS, COST}:
        advance(len(rows))
        return torch.from_numpy(shards.load(path, IMAGES)), {}
    return sampler(method, rows, advance)
