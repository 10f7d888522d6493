"""The numbers of an evaluation as one tidy frame, a row (method, metric, value, error) for each number; its tables.

    method    the name of a guidance configuration; the first method of the frame is the baseline
    metric    a key of METRICS, such as "fd-mini"; METRICS says what it is and how a table shows it
    value     None where there is no number: the baseline's distance to itself, the precision of three images
    error     one standard error; None where there is none

On disk: metrics.csv and metrics.jsonl (one row a line), and "metrics" of results.json. Light: no torch.
"""

import html
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from segresearch.evaluation.paper_numbers import HEADS
from segresearch.method_looks import look
from segresearch.pages import Cell
from segresearch.rounding import rounded

LATEX = str.maketrans({
    "σ": r"$\sigma$", "∞": r"$\infty$", "±": r"$\pm$", "−": r"$-$", "τ": r"$\tau$", "γ": r"$\gamma$", "→": r"$\to$",
    "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
})  # fmt: skip
RESULTS = "results.json"
FORCED = "Warning: made with force=true. Fréchet distances of fewer images than features are biased far upwards."
LATEX_LINES = 40  # of a table, so that it is no higher than a page
GROUPS = ("quality", "content", "paper")
SCORES = {"aesthetic": "aesthetic", "pickscore": "PickScore", "hpsv2": "HPSv2", "hpsv21": "HPSv2.1",
          "imagereward": "ImageReward"}  # heads of `metrics.scores`  # fmt: skip
Lines = list[list[Cell]]


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

    @property
    def to_baseline(self) -> str:
        """The name of its difference to the baseline's on the same images, if METRICS has that."""
        return f"{self.kind}_to_baseline" + (f"-{self.features}" if self.features else "")


@dataclass(frozen=True)
class Value:
    """A row of the frame."""

    method: str
    metric: str
    value: float | int | None
    error: float | None = None

    def __str__(self) -> str:
        """As a table shows it, rounded by the error where there is one: "7.25 ± 0.25"; "–" for no number."""
        if self.value is None:
            return "–"
        return rounded(self.value, self.error, METRICS[self.metric].digits).replace("-", "−")


@dataclass(frozen=True)
class Frame:
    """All numbers of a run. `frame[method, metric]` is a row; one that is not there has the value None."""

    rows: tuple[Value, ...]

    def __post_init__(self) -> None:
        if unlisted := {row.metric for row in self.rows} - METRICS.keys():
            raise KeyError(f"{', '.join(sorted(unlisted))}: not in METRICS")

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> "Frame":
        """From the rows of a file. Raises KeyError or TypeError for other rows."""
        return cls(tuple(Value(**row) for row in rows))

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
    networks = {"mini": ("FD (mini)", "KD (mini)"), "inception": ("FID", "KID"),
                "dinov2": ("FD (DINOv2)", "KD (DINOv2)"), "clip": ("FD (CLIP)", "CMMD")}  # fmt: skip
    for features, (frechet, kernel) in networks.items():
        yield Metric("fd", features, frechet, 2)
        yield Metric("fd_to_baseline", features, "− baseline", 2)  # on the same resampled images
        yield Metric("fd_to_best", features, digits=2)  # to the lowest of all methods and scales, in a sweep
        yield Metric("fd_to_own_best", features, digits=2)  # to the lowest of the scales of the same method
        yield Metric("kd", features, kernel, 1 if features == "mini" else 4)
        yield Metric("precision", features, "precision")
        yield Metric("recall", features, "recall")
        yield Metric("density", features)
        yield Metric("coverage", features)
        if features == "inception":
            yield Metric("is", features, "IS", 2)  # the inception score
            yield Metric("is_to_baseline", features, digits=2)  # on the same tenths of the images
            yield Metric("is_spread", features)  # standard deviation between the tenths, as papers print it
        yield Metric("fd_extrapolated", features)  # with its first order in 1/N removed
        yield Metric("fd_means", features)  # its part from the means of the features
        yield Metric("variance", features)  # of the features, summed, over that of the reference
        yield Metric("kd_spread", features)  # standard deviation between the subsets
    for features, head in (("mini", "distance (mini)"), ("vgg", "LPIPS vgg"), ("alex", "LPIPS alex")):
        yield Metric("distance", features, head)
    yield Metric("psnr", head="PSNR", digits=2)  # to the images that a run starts from, where they are made anew
    for features, head in (("mini", "mini"), ("vgg", "LPIPS vgg"), ("alex", "LPIPS alex")):
        yield Metric("distance_to_truth", features, f"to truth ({head})")
    yield Metric("text_alignment", "mini", "cosine (mini)")
    yield Metric("text_alignment_to_baseline", "mini", digits=4)
    yield Metric("text_alignment", "clip", "CLIP cosine")
    yield Metric("text_alignment_to_baseline", "clip", digits=4)
    for kind, head in SCORES.items():
        yield Metric(kind, head=head)
        yield Metric(f"{kind}_to_baseline", head="− baseline")  # image by image
    heads = {"colors": "colours", "objects_chance": "(chance)", "brightness": "", "red": "", "green": "", "blue": "",
             "objects_held": "", "pairs_held": ""}  # fmt: skip
    for kind in ("count", "colors", "shapes", "objects", "exact", "objects_chance", "edges", "saturation", "brightness",
                 "contrast", "sharpness", "red", "green", "blue", "objects_held", "pairs_held"):  # fmt: skip
        yield Metric(kind, head=heads.get(kind, kind), digits=4 if kind == "sharpness" else 3, group="content")
    yield Metric("cost", head="cost", digits=2)  # operations over those of the baseline
    yield from (Metric("paper", column, f"paper: {head}", group="paper") for column, head in HEADS.items())


METRICS = {metric.name: metric for metric in _metrics()}  # in the order of a table's columns


def table(*frames: Frame, leads: Sequence[Mapping[str, Cell]] = ({},), groups: Collection[str] = GROUPS) -> Lines:
    """The head, then a row for each method: the lead of its frame, by head; the method; its numbers of these groups.

    One method alone has no columns relative to others.
    """
    alone = ("fd_to_baseline", "cost") if all(len(frame.methods) < 2 for frame in frames) else ()
    present = {metric for frame in frames for metric in frame.metrics() if metric.head and metric.kind not in alone}
    metrics = [metric for metric in METRICS.values() if metric in present and metric.group in groups]
    lines = [[*map(Cell, leads[0]), Cell("method", "method"), *(Cell(m.head, f"number {m.group}") for m in metrics)]]
    for lead, frame in zip(leads, frames, strict=True):
        for method in frame.methods:
            kind = "first" if method == frame.methods[0] else ""
            numbers = [Cell(str(frame[method, m.name]), f"number {m.group}") for m in metrics]
            leading = [cell._replace(kind=f"{cell.kind} {kind}".strip()) for cell in lead.values()]
            lines.append([*leading, Cell(method, "method"), *numbers])
    return lines


def marked(lines: Lines, methods: Mapping[str, Any]) -> Lines:
    """A table with the mark of each method before its name. methods: guidance, or the key of a look, by name."""
    looks = {name: look(guidance) for name, guidance in methods.items()}
    return [
        [cell._replace(mark=looks[cell.text].sign, color=looks[cell.text].color)
         if "method" in cell.kind and cell.text in looks else cell for cell in line]
        for line in lines
    ]  # fmt: skip


def markdown(*lines: Sequence[Cell]) -> str:
    """The lines of `table`."""
    texts = [[_neutral(cell.text) for cell in line] for line in lines]
    texts.insert(1, ["---:" if "number" in cell.kind else "---" for cell in lines[0]])
    return "".join(f"| {' | '.join(line)} |\n" for line in texts)


def _neutral(text: str) -> str:
    """A label or a prompt as text of a Markdown table: no HTML, link, code or further cell of its own."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)


def latex(head: Sequence[Cell], *rows: Sequence[Cell]) -> str:
    """The lines of `table` for the packages booktabs and graphicx, no wider than the text; the paper's columns stand
    apart, behind a rule."""
    top, *lines = (" & ".join(cell.text.translate(LATEX) for cell in line) + r" \\" for line in (head, *rows))
    paper = sum("paper" in cell.kind for cell in head)
    form = "l" + "r" * (len(head) - 1 - paper) + ("|" + "r" * paper if paper else "")
    fit = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    start = ["% booktabs, graphicx", fit, r"\begin{tabular}{" + form + "}", r"\toprule"]
    end = [r"\bottomrule", r"\end{tabular}}", ""]
    return "\n".join([*start, top, r"\midrule", *lines, *end])


def latex_tables(frame: Frame) -> str:
    """The table of a frame as LaTeX tables that fit a page: the contents of the images apart, LATEX_LINES methods each.
    """
    parts = [table(frame, groups=groups) for groups in (("quality", "paper"), ("content",))]
    return "\n\\bigskip\n".join(
        latex(head, *lines[start : start + LATEX_LINES])
        for head, *lines in parts if len(head) > 1
        for start in range(0, len(lines), LATEX_LINES)
    )  # fmt: skip


def to_jsonl(frame: Frame, common: Mapping[str, Any]) -> str:
    """A line a number: the facts common to the run, then method, metric, value, error."""
    return "".join(json.dumps({**common, **row}, ensure_ascii=False) + "\n" for row in frame.plain())
