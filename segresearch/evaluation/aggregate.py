"""From the shards of a run and features of real images to a tidy frame, in fp64, in a fixed order: the same bytes each
time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.analysis.branch_diagnostics import Number
from segresearch.evaluation import paper_numbers, shards
from segresearch.evaluation.frame import METRICS, Frame, Value
from segresearch.evaluation.reference_images import Reference, features
from segresearch.evaluation.sample_shards import COST, NORMS
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.metrics.frechet import Frechet, frechet_distance, gaussian
from segresearch.metrics.inception_score import inception_scores
from segresearch.metrics.nonparametric import cmmd, density_coverage, kid, precision_recall

MOST = 10_000  # images on either side for precision and recall, whose work grows with their product
TENTHS, IS = 10, ("", "_to_baseline", "_spread")


@dataclass(frozen=True)
class Result:
    """norms: by method, the mean norm of its guidance at each evaluation. reference_images: how many. diagnostics: of
    the weak branches, () where they were not asked for."""

    frame: Frame
    norms: Mapping[str, tuple[float, ...]]
    reference_images: int
    diagnostics: tuple[Number, ...] = ()


def aggregate(spec: EvaluationSpec, images: Reference) -> Result:
    """Every metric of every method; images: the real ones. Raises ConfigError, Damaged, OSError."""
    config, rows, norms = spec.config, [], {}
    extractors = {metric.name: metric.extractor for metric in spec.metrics if metric.extractor is not None}
    real = {name: features(images, extractor, config.out) for name, extractor in extractors.items()}
    fitted = {name: gaussian(x, config.force) for name, x in real.items()}
    distances: dict[str, dict[str, Frechet]] = {metric.name: {} for metric in spec.metrics if metric.extractor}
    costs = {method: float(shards.load(spec.shard(method, spec.ranges[0]), COST)[0]) for method in spec.methods}
    for method, guidance in spec.methods.items():
        rows += [Value(method, "n", config.images), Value(method, "operations", costs[method])]
        numbers: dict[str, tuple[float, ...]] = {"cost": (costs[method] / costs[spec.baseline],)}
        for metric in spec.metrics:
            if metric.baseline and method == spec.baseline:
                rows.append(Value(method, metric.name, None))
                continue
            values = _joined(spec, method, metric.array)
            if metric.extractor is not None:
                x = torch.from_numpy(values)
                distance = frechet_distance(x, fitted[metric.name], config.n_bootstrap, force=config.force)
                baseline, net = distances[metric.name].get(spec.baseline, distance), metric.extractor.name
                distances[metric.name][method] = distance
                kinds = set_numbers(x, real[metric.name], distance, baseline, config.n_subsets, net == "clip")
                numbers |= {f"{kind}-{net}": number for kind, number in kinds.items()}
                if metric.extractor.classes is not None:
                    first = None if method == spec.baseline else _joined(spec, spec.baseline, metric.array)
                    numbers |= inception_numbers(values, first, metric.extractor.classes)
            elif metric.columns:
                means = values.mean(0, dtype=np.float64)  # (n, columns) -> (columns,)
                numbers |= {column: (float(mean),) for column, mean in zip(metric.columns, means, strict=True)}
            else:
                numbers[metric.name] = mean_and_error(values)
                if (difference := METRICS[metric.name].to_baseline) in METRICS and method != spec.baseline:
                    first = _joined(spec, spec.baseline, metric.array)
                    numbers[difference] = mean_and_error(values.astype(np.float64) - first)
        for name, number in numbers.items():
            rows.append(Value(method, name, *(None if math.isnan(x) else float(f"{x:.7g}") for x in number)))
        rows += [Value(method, f"paper-{c}", v) for c, v in paper_numbers.numbers(spec.paper, guidance).items()]
        if NORMS in shards.producers(spec.shard(method, spec.ranges[0])):
            norms[method] = tuple(float(f"{step:.7g}") for step in _joined(spec, method, NORMS).mean(0, np.float64))
    for metric in (metric for metric in spec.metrics if metric.extractor is not None and spec.sweep):
        rows += to_the_best(spec, distances[metric.name], metric.extractor.name)  # type: ignore[union-attr]
    return Result(Frame(tuple(rows)), norms, len(images) if real else 0)


def to_the_best(spec: EvaluationSpec, distances: Mapping[str, Frechet], net: str) -> list[Value]:
    """Of each method of a sweep the difference of its distance to the lowest of all, and to the lowest at any scale of
    the same method, on the same resampled images."""
    best = min(distances, key=lambda method: distances[method].distance)
    rows = []
    for method, distance in distances.items():
        same = [other for other in distances if spec.sweep[other].of == spec.sweep[method].of]
        own = min(same, key=lambda other: distances[other].distance)
        for kind, other in (("fd_to_best", best), ("fd_to_own_best", own)):
            value, error = paired(distance, distances[other])
            numbers = (None if math.isnan(x) else float(f"{x:.7g}") for x in (value, error))
            rows.append(Value(method, f"{kind}-{net}", *numbers))
    return rows


def paired(distance: Frechet, other: Frechet) -> tuple[float, float]:
    """The difference of two Fréchet distances, and its error on the same resampled images; nan without resamples."""
    differences = np.subtract(distance.resamples, other.resamples)
    error = float(differences.std(ddof=1)) if len(differences) > 1 else math.nan
    return distance.distance - other.distance, error


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of (n,) numbers and its standard error, nan of one number."""
    deviation = values.std(ddof=1, dtype=np.float64) if len(values) > 1 else math.nan
    return float(values.mean(dtype=np.float64)), float(deviation / math.sqrt(len(values)))


def inception_numbers(
    x: np.ndarray, baseline: np.ndarray | None, classes: Float[Tensor, "c dim"]
) -> dict[str, tuple[float, ...]]:
    """The inception score of features (n, dim) by name: its mean over tenths of the images with the standard error,
    their deviation, and the difference to the baseline's on the same tenths; nan for fewer images than tenths."""
    numbers: dict[str, tuple[float, ...]] = dict.fromkeys((f"is{kind}-inception" for kind in IS), (math.nan,))
    if len(x) < TENTHS:
        return numbers
    scores = inception_scores(torch.from_numpy(x), classes.cpu(), TENTHS).numpy()
    numbers |= {"is-inception": mean_and_error(scores), "is_spread-inception": (float(scores.std()),)}
    if baseline is not None:
        first = inception_scores(torch.from_numpy(baseline), classes.cpu(), TENTHS).numpy()
        numbers["is_to_baseline-inception"] = mean_and_error(scores - first)
    return numbers


def set_numbers(
    x: Float[Tensor, "n dim"], reference: Float[Tensor, "m dim"], distance: Frechet, baseline: Frechet, subsets: int,
    gaussian_kernel: bool,
) -> dict[str, tuple[float, ...]]:  # fmt: skip
    """What is measured of a set of images by their features, by kind of metric: a number and its error, if it has one;
    nan where there are too few.

    distance, baseline: the Fréchet distances of the method and of the baseline. Their difference is taken on the same
    resampled images, so its error is smaller than those of the two. gaussian_kernel: CMMD in place of KID.
    """
    numbers: dict[str, tuple[float, ...]] = {
        "fd": (distance.distance, distance.error), "fd_to_baseline": (math.nan,),
        "fd_extrapolated": (distance.extrapolated,), "fd_means": (distance.mean_part,),
    } | dict.fromkeys(
        ("variance", "kd", "kd_spread", "precision", "recall", "density", "coverage"), (math.nan,)
    )  # fmt: skip
    if baseline is not distance:
        numbers["fd_to_baseline"] = paired(distance, baseline)
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
    if m > 5:
        density, coverage = density_coverage(x[:n], reference[:m])
        numbers |= {"density": (density,), "coverage": (coverage,)}
    return numbers


def _joined(spec: EvaluationSpec, method: str, name: str) -> np.ndarray:
    """One array of all images of a method, in their order. Raises Damaged, OSError."""
    return np.concatenate([shards.load(spec.shard(method, rows), name) for rows in spec.ranges])
