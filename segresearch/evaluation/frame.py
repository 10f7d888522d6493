"""The numbers of an evaluation as one tidy frame: a row (method, metric, value, error) for each number.

    method    the name of a guidance configuration; the first method of the frame is the baseline
    metric    a key of METRICS, such as "fd-mini"; METRICS says what it is and how a table shows it
    value     None where there is no number: the baseline's distance to itself, the precision of three images
    error     one standard error; None where there is none

On disk: metrics.csv and metrics.jsonl (one row a line), and "metrics" of results.json. Light: no torch.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from segresearch.evaluation.paper_numbers import HEADS


@dataclass(frozen=True)
class Metric:
    """What a number of the frame is, and how a table shows it.

    kind: the statistic ("fd", "precision", "count"). features: the network it is computed with, "" for none.
    head: of its column; "" for a number that no table shows. digits: after the point.
    group: quality; content (what is in the images); paper (a number of arXiv 2408.00760).
    """

    kind: str
    features: str = ""
    head: str = ""
    digits: int = 3
    group: Literal["quality", "content", "paper"] = "quality"

    @property
    def name(self) -> str:
        """Its key in METRICS and in the frame."""
        return f"{self.kind}-{self.features}" if self.features else self.kind


@dataclass(frozen=True)
class Value:
    """A row of the frame."""

    method: str
    metric: str
    value: float | int | None
    error: float | None = None

    def __str__(self) -> str:
        """As a table shows it: "7.25 ± 0.25"; "–" where there is no number."""
        if self.value is None:
            return "–"
        digits = METRICS[self.metric].digits
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.value:.{digits}f}".replace("-", "−") + error


@dataclass(frozen=True)
class Frame:
    """All numbers of a run. `frame[method, metric]` is a row; one that is not there has the value None."""

    rows: tuple[Value, ...]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> "Frame":
        """From the rows of a file. Raises KeyError or TypeError for other rows."""
        values = tuple(Value(**row) for row in rows)
        return cls(tuple(value for value in values if METRICS[value.metric]))

    def plain(self) -> list[dict[str, Any]]:
        """Rows as JSON and CSV take them."""
        return [asdict(row) for row in self.rows]

    def __getitem__(self, key: tuple[str, str]) -> Value:
        return next((row for row in self.rows if (row.method, row.metric) == key), Value(*key, None))

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order of the run: the first is the baseline."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    def metrics(self, *kinds: str) -> tuple[Metric, ...]:
        """Those of any row, in the order of METRICS; of these kinds alone, such as "fd", where some are named."""
        names = {row.metric for row in self.rows}
        return tuple(m for name, m in METRICS.items() if name in names and (not kinds or m.kind in kinds))


def _metrics() -> Iterator[Metric]:
    yield Metric("n", head="N", digits=0)
    yield Metric("operations")  # floating-point operations of the sampling of one image
    frechet = {"mini": "FD (mini)", "inception": "FID", "dinov2": "FD (DINOv2)", "clip": "FD (CLIP)"}
    kernel = {"mini": "KD (mini)", "inception": "KID", "dinov2": "KD (DINOv2)", "clip": "CMMD"}
    for features in frechet:
        yield Metric("fd", features, frechet[features], 2)
        yield Metric("fd_to_baseline", features, "− baseline", 2)  # on the same resampled images
        yield Metric("kd", features, kernel[features], 1 if features == "mini" else 4)
        yield Metric("precision", features, "precision")
        yield Metric("recall", features, "recall")
        yield Metric("fd_extrapolated", features)  # with its first order in 1/N removed
        yield Metric("fd_means", features)  # its part from the means of the features
        yield Metric("variance", features)  # of the features, summed, over that of the reference
        yield Metric("kd_spread", features)  # standard deviation between the subsets
    for features, head in (("mini", "distance (mini)"), ("vgg", "LPIPS vgg"), ("alex", "LPIPS alex")):
        yield Metric("distance", features, head)
    yield Metric("text_alignment", "mini", "cosine (mini)")
    yield Metric("text_alignment", "clip", "CLIP cosine")
    heads = {"count": "count", "colors": "colours", "shapes": "shapes", "objects": "objects", "exact": "exact",
             "objects_chance": "(chance)", "edges": "edges", "saturation": "saturation", "brightness": "",
             "contrast": "contrast", "red": "", "green": "", "blue": ""}  # fmt: skip
    yield from (Metric(kind, head=head, group="content") for kind, head in heads.items())
    yield Metric("cost", head="cost", digits=2)  # operations over those of the baseline
    yield from (Metric("paper", column, f"paper: {head}", group="paper") for column, head in HEADS.items())


METRICS = {metric.name: metric for metric in _metrics()}  # in the order of a table's columns
