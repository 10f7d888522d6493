"""From the shards of a run to one row of numbers a setting, in fp64, in a fixed order: the same bytes every time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segresearch.config import EvaluateConfig
from segresearch.evaluation import paper_numbers, shards
from segresearch.evaluation.image_metrics import ATTRIBUTES, LOOK, Judge
from segresearch.evaluation.sample_shards import COST, NORMS
from segresearch.evaluation.spec import Study
from segresearch.metrics.features import Extractor
from segresearch.metrics.frechet import Frechet, Gaussian, frechet_distance, gaussian
from segresearch.metrics.mmd import cmmd, kid
from segresearch.metrics.precision import precision_recall

Row = dict[str, Any]  # column -> text, a number, or None where there is none
MOST = 10_000  # pictures on either side for precision and recall, whose work grows with their product


@dataclass(frozen=True)
class Result:
    """A row for each setting, in order; norms: the mean size of its guidance, by evaluation; reference: pictures."""

    rows: tuple[Row, ...]
    norms: Mapping[str, tuple[float, ...]]
    reference: int


@dataclass(frozen=True)
class _Real:
    """The reference in the features of one extractor."""

    all: Tensor
    fitted: Gaussian


def rounded(value: float) -> float | None:
    """To 7 digits; None for what is not a number."""
    return None if math.isnan(value) else float(f"{value:.7g}")


def joined(plan: Study, setting: str, key: str) -> np.ndarray:
    """One array of all pictures of a setting, in their order, checksums compared. Raises Damaged, OSError."""
    return np.concatenate([shards.load(plan.shard(setting, rows), key) for rows in plan.ranges])


def mean_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    x = values.astype(np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def reduce(config: EvaluateConfig, plan: Study, judges: Sequence[Judge], real: Callable[[Extractor], Tensor]) -> Result:
    """Every metric of every setting. real: features of the reference by an extractor."""
    references = {}
    for judge in judges:
        if judge.extractor is not None:
            features = real(judge.extractor)
            references[judge.name] = _Real(features, gaussian(features, config.force))
    rows: list[Row] = []
    norms = {}
    plain: dict[str, Frechet] = {}
    for setting, guidance in plan.settings.items():
        operations = float(shards.load(plan.shard(setting, plan.ranges[0]), COST)[0])
        cost = operations / rows[0]["operations"] if rows else 1.0
        row: Row = {"setting": setting, "n": config.images, "operations": operations, "cost": rounded(cost)}
        for judge in judges:
            if judge.against and setting == plan.first:
                row |= dict.fromkeys((judge.column, f"{judge.column}-error"))
                continue
            values = joined(plan, setting, judge.name)
            if judge.extractor is not None:
                row |= _features(config, judge.extractor.name, values, references[judge.name], plain)
            elif judge.name in ("attributes", "look"):
                columns = ATTRIBUTES if judge.name == "attributes" else LOOK
                row |= {c: rounded(float(v)) for c, v in zip(columns, values.mean(0, dtype=np.float64), strict=True)}
            else:
                mean, error = mean_error(values)
                row |= {judge.column: rounded(mean), f"{judge.column}-error": rounded(error)}
        said = paper_numbers.figures(plan.paper, guidance)
        row |= {f"paper-{column}": said.get(column) for column in paper_numbers.columns(plan.paper)}
        rows.append(row)
        if NORMS in shards.held(plan.shard(setting, plan.ranges[0])):
            steps = joined(plan, setting, NORMS).mean(0, dtype=np.float64)
            norms[setting] = tuple(float(f"{v:.7g}") for v in steps)
    return Result(tuple(rows), norms, min((len(r.all) for r in references.values()), default=0))


def _features(config: EvaluateConfig, name: str, values: np.ndarray, real: _Real, plain: dict[str, Frechet]) -> Row:
    x = torch.from_numpy(values)
    d = frechet_distance(x, real.fitted, config.n_bootstrap, force=config.force)
    first = plain.setdefault(name, d)
    apart = spread = math.nan
    if first is not d:
        apart = d.distance - first.distance
        spread = float(np.std(np.subtract(d.resamples, first.resamples), ddof=1)) if len(d.resamples) > 1 else math.nan
    n, m = min(len(x), MOST), min(len(real.all), len(x), MOST)
    size = min(1000, len(x) // 2, len(real.all) // 2)
    near = precision_recall(x[:n], real.all[:m]) if min(n, m) > 3 else None
    kernel = kid(x, real.all, config.n_subsets, size) if size > 1 and name != "clip" else None
    kernels = {
        f"kd-{name}": kernel.distance if kernel else math.nan,
        f"kd-{name}-spread": kernel.spread if kernel else math.nan,
    } if name != "clip" else {"kd-clip": cmmd(x, real.all).biased}  # fmt: skip
    found = {
        f"fd-{name}": d.distance, f"fd-{name}-error": d.error, f"fd-{name}-first": apart,
        f"fd-{name}-first-error": spread, f"fd-{name}-extrapolated": d.extrapolated,
        f"fd-{name}-mean": d.mean_part,
        f"variance-{name}": float(x.double().var(0).sum() / real.fitted.cov.trace()) if len(x) > 1 else math.nan,
        **kernels,
        f"precision-{name}": near.precision if near else math.nan, f"recall-{name}": near.recall if near else math.nan,
    }  # fmt: skip
    return {key: rounded(value) for key, value in found.items()}
