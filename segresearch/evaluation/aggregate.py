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
                x = torch.from_numpy(values)
                distance = frechet_distance(x, fitted[metric.name], config.n_bootstrap, force=config.force)
                pair, net = (distance, baselines.setdefault(metric.name, distance)), metric.extractor.name
                kinds = set_numbers(x, reference[metric.name], *pair, config.n_subsets, net == "clip")
                numbers |= {f"{kind}-{net}": number for kind, number in kinds.items()}
            elif metric.columns:
                means = values.mean(0, dtype=np.float64)  # (n, columns) -> (columns,)
                numbers |= {column: (float(mean),) for column, mean in zip(metric.columns, means, strict=True)}
            else:
                deviation = values.std(ddof=1, dtype=np.float64) if len(values) > 1 else math.nan
                numbers[metric.name] = float(values.mean(dtype=np.float64)), float(deviation / math.sqrt(len(values)))
        rows += [Value(method, name, *map(rounded, number)) for name, number in numbers.items()]
        rows += [Value(method, f"paper-{c}", v) for c, v in paper_numbers.numbers(spec.paper, guidance).items()]
        if NORMS in shards.producers(spec.shard(method, spec.ranges[0])):
            norms[method] = tuple(float(f"{step:.7g}") for step in _joined(spec, method, NORMS).mean(0, np.float64))
    return Result(Frame(tuple(rows)), norms, min(map(len, reference.values()), default=0))


def set_numbers(
    x: Float[Tensor, "n dim"], reference: Float[Tensor, "m dim"], distance: Frechet, baseline: Frechet, subsets: int,
    gaussian_kernel: bool,
) -> dict[str, tuple[float, ...]]:  # fmt: skip
    """What is measured of a set of images by their features, by kind of metric: a number and its error, if it has one;
    nan where there are too few.

    distance, baseline: the Fréchet distances of the method and of the baseline. Their difference is taken on the same
    resampled images, so its error is smaller than those of the two. gaussian_kernel: CMMD in place of KID.
    """
    kinds = ("variance", "kd", "kd_spread", "precision", "recall")
    numbers: dict[str, tuple[float, ...]] = {
        "fd": (distance.distance, distance.error), "fd_to_baseline": (math.nan,),
        "fd_extrapolated": (distance.extrapolated,), "fd_means": (distance.mean_part,),
        **dict.fromkeys(kinds, (math.nan,)),
    }  # fmt: skip
    if baseline is not distance:
        differences = np.subtract(distance.resamples, baseline.resamples)
        error = float(differences.std(ddof=1)) if len(differences) > 1 else math.nan
        numbers["fd_to_baseline"] = (distance.distance - baseline.distance, error)
    if len(x) > 1:
        numbers["variance"] = (float(x.double().var(0).sum() / reference.double().var(0).sum()),)
    size = min(1000, len(x) // 2, len(reference) // 2)
    if gaussian_kernel:
        numbers["kd"] = cmmd(x, reference)[:1]  # the biased one, as published
    elif size > 1:
        kernel, spread = kid(x, reference, subsets, size)
        numbers |= {"kd": (kernel,), "kd_spread": (spread,)}
    n, m = min(len(x), MOST), min(len(reference), len(x), MOST)
    if min(n, m) > 3:
        precision, recall = precision_recall(x[:n], reference[:m])
        numbers |= {"precision": (precision,), "recall": (recall,)}
    return numbers


def _joined(spec: EvaluationSpec, method: str, name: str) -> np.ndarray:
    """One array of all images of a method, in their order. Raises Damaged, OSError."""
    return np.concatenate([shards.load(spec.shard(method, rows), name) for rows in spec.ranges])
