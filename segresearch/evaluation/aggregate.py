"""From the shards of a run to a tidy frame, in fp64, in a fixed order: the same bytes every time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.evaluation import paper_numbers, shards
from segresearch.evaluation.frame import Frame, Value
from segresearch.evaluation.image_metrics import ImageMetric
from segresearch.evaluation.sample_shards import COST, NORMS
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.metrics.features import Extractor
from segresearch.metrics.frechet import Frechet, frechet_distance, gaussian
from segresearch.metrics.nonparametric import cmmd, kid, precision_recall

MOST = 10_000  # images on either side for precision and recall, whose work grows with their product


@dataclass(frozen=True)
class Result:
    """norms: by method, the mean norm of its guidance at each evaluation. reference_images: how many."""

    frame: Frame
    norms: Mapping[str, tuple[float, ...]]
    reference_images: int


def rounded(value: float) -> float | None:
    """To 7 digits; None for what is not a number."""
    return None if math.isnan(value) else float(f"{value:.7g}")


def mean_error(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Mean and its standard error."""
    x = values.astype(np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def aggregate(spec: EvaluationSpec, metrics: Sequence[ImageMetric], features: Callable[[Extractor], Tensor]) -> Result:
    """Every metric of every method. features: of the real images. Raises Damaged, OSError."""
    config, rows, norms = spec.config, [], {}
    reference = {metric.name: features(metric.extractor) for metric in metrics if metric.extractor is not None}
    fitted = {name: gaussian(real, config.force) for name, real in reference.items()}
    baselines: dict[str, Frechet] = {}
    costs = {method: float(shards.load(spec.shard(method, spec.ranges[0]), COST)[0]) for method in spec.methods}
    for method, guidance in spec.methods.items():
        rows += [Value(method, "n", config.images), Value(method, "operations", costs[method])]
        numbers: dict[str, tuple[float, ...]] = {"cost": (costs[method] / costs[spec.baseline],)}
        for metric in metrics:
            if metric.baseline and method == spec.baseline:
                rows.append(Value(method, metric.name, None))
                continue
            values = _joined(spec, method, metric.array)
            if metric.extractor is not None:
                x, real = torch.from_numpy(values), reference[metric.name]
                distance = frechet_distance(x, fitted[metric.name], config.n_bootstrap, force=config.force)
                kinds = frechet_numbers(distance, baselines.setdefault(metric.name, distance))
                kinds |= set_numbers(x, real, config.n_subsets, metric.extractor.name == "clip")
                numbers |= {f"{kind}-{metric.extractor.name}": number for kind, number in kinds.items()}
            elif metric.columns:
                means = values.mean(0, dtype=np.float64)  # (n, columns) -> (columns,)
                numbers |= {column: (float(mean),) for column, mean in zip(metric.columns, means, strict=True)}
            else:
                numbers[metric.name] = mean_error(values)
        rows += [Value(method, name, *map(rounded, number)) for name, number in numbers.items()]
        rows += [Value(method, f"paper-{c}", v) for c, v in paper_numbers.numbers(spec.paper, guidance).items()]
        if NORMS in shards.producers(spec.shard(method, spec.ranges[0])):
            steps = _joined(spec, method, NORMS).mean(0, dtype=np.float64)
            norms[method] = tuple(float(f"{step:.7g}") for step in steps)
    return Result(Frame(tuple(rows)), norms, min(map(len, reference.values()), default=0))


def frechet_numbers(distance: Frechet, baseline: Frechet) -> dict[str, tuple[float, ...]]:
    """The Fréchet distance of a method and its difference to the baseline's, each with its error: by kind of metric.

    The difference is taken on the same resampled images, so its error is smaller than those of the two.
    """
    difference = error = math.nan
    if baseline is not distance:
        difference = distance.distance - baseline.distance
        if len(distance.resamples) > 1:
            error = float(np.std(np.subtract(distance.resamples, baseline.resamples), ddof=1))
    return {
        "fd": (distance.distance, distance.error), "fd_to_baseline": (difference, error),
        "fd_extrapolated": (distance.extrapolated,), "fd_means": (distance.mean_part,),
    }  # fmt: skip


def set_numbers(
    x: Float[Tensor, "n dim"], reference: Float[Tensor, "m dim"], subsets: int, gaussian_kernel: bool
) -> dict[str, tuple[float, ...]]:
    """Variance, kernel distance, precision and recall of features against the reference, by kind of metric; nan where
    there are too few. gaussian_kernel: CMMD in place of the kernel distance of subsets."""
    kinds = ("variance", "kd", "kd_spread", "precision", "recall")
    numbers: dict[str, tuple[float, ...]] = dict.fromkeys(kinds, (math.nan,))
    if len(x) > 1:
        numbers["variance"] = (float(x.double().var(0).sum() / reference.double().var(0).sum()),)
    size = min(1000, len(x) // 2, len(reference) // 2)
    if gaussian_kernel:
        numbers["kd"] = cmmd(x, reference)[:1]  # the biased one, as published
    elif size > 1:
        distance, spread = kid(x, reference, subsets, size)
        numbers |= {"kd": (distance,), "kd_spread": (spread,)}
    n, m = min(len(x), MOST), min(len(reference), len(x), MOST)
    if min(n, m) > 3:
        precision, recall = precision_recall(x[:n], reference[:m])
        numbers |= {"precision": (precision,), "recall": (recall,)}
    return numbers


def _joined(spec: EvaluationSpec, method: str, name: str) -> np.ndarray:
    """One array of all images of a method, in their order. Raises Damaged, OSError."""
    return np.concatenate([shards.load(spec.shard(method, rows), name) for rows in spec.ranges])
