"""A sweep as a ranking: of every method its best scale, what it costs and changes, and how much the scale matters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segresearch.config.expand import describe
from segresearch.config.method import CFGTerm, GuidanceConfig
from segresearch.evaluation.frame import SCORES, Frame, Metric, Value
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.pages import Cell

AGREEMENT = ("text_alignment", "objects", "exact", "edges", *SCORES, *(f"{kind}_to_baseline" for kind in SCORES))
# kinds of metrics that a ranking shows beside distances


@dataclass(frozen=True)
class Ranked:
    """A method of a sweep. scales: the names of the method at its scales by factor, rising. best: the one of lowest
    distance. robust: the lowest and the highest factor whose distance is within one error of the best's, at each factor
    between too."""

    name: str
    scales: Mapping[float, str]
    best: float
    robust: tuple[float, float]

    @property
    def at_best(self) -> str:
        """The name of the method at its best scale."""
        return self.scales[self.best]

    @property
    def own(self) -> str | None:
        """The name of the method at its own scale; None where the sweep leaves that out."""
        return self.scales.get(1.0)


def one_scale(ranked: Sequence[Ranked]) -> bool:
    """Whether no method has a second scale, so that none is the best of several."""
    return all(len(one.scales) == 1 for one in ranked)


def ranking(spec: EvaluationSpec, frame: Frame) -> list[Ranked]:
    """All methods but the baseline, the lowest Fréchet distance first; () without a sweep or a distance."""
    if not spec.sweep or not frame.metrics("fd"):
        return []
    fd = frame.metrics("fd")[0]
    families: dict[str, dict[float, str]] = {}
    for name, one in spec.sweep.items():
        if name != spec.baseline:
            families.setdefault(one.of, {})[one.factor] = name
    best_of_each = []
    for name, scales in families.items():
        ordered = dict(sorted(scales.items()))
        best = min(ordered, key=lambda factor: _value(frame, ordered[factor], fd.name))  # noqa: B023
        within = [_within(frame[ordered[factor], f"fd_to_own_best-{fd.features}"]) for factor in ordered]
        best_of_each.append(Ranked(name, ordered, best, _span([*ordered], within, best)))
    return sorted(best_of_each, key=lambda ranked: _value(frame, ranked.at_best, fd.name))


def _value(frame: Frame, method: str, metric: str) -> float:
    value = frame[method, metric].value
    return float("inf") if value is None else value


def _within(difference: Value) -> bool:
    return difference.value is not None and difference.value <= (difference.error or 0.0)


def _span(factors: Sequence[float], within: Sequence[bool], best: float) -> tuple[float, float]:
    """The factors around the best one for which `within` holds without a gap."""
    low = high = factors.index(best)
    while low and within[low - 1]:
        low -= 1
    while high + 1 < len(factors) and within[high + 1]:
        high += 1
    return factors[low], factors[high]


def headline(spec: EvaluationSpec, frame: Frame, ranked: Sequence[Ranked]) -> list[str]:
    """What the ranking says, in sentences; two errors are told apart. Empty without a ranking."""
    if not ranked:
        return []
    fd = frame.metrics("fd")[0]
    to_baseline, to_best = f"fd_to_baseline-{fd.features}", f"fd_to_best-{fd.features}"
    first, base = ranked[0], f"“{spec.baseline}”"
    of_first = frame[first.at_best, to_baseline]
    like = [one.name for one in ranked[1:] if _side(frame[one.at_best, to_best]) == 0]
    better = [one.name for one in ranked if _side(frame[one.at_best, to_baseline]) < 0]
    worse = [one.name for one in ranked if all(_side(frame[m, to_baseline]) > 0 for m in one.scales.values())]
    ends = [one.name for one in ranked if len(one.scales) > 1 and one.best == max(one.scales)]
    scale = scale_text(spec.methods[first.at_best])
    best = f"{first.name}{f' at scale {scale}' if scale else ''}: {fd.head} {of_first} relative to {base}"
    chosen, tried = ("one scale", "") if one_scale(ranked) else ("best scale", " at every scale tried")
    lines = [
        f"The lowest distance has {best}. "
        + (f"Within two errors of it: {_list(like)}." if like else "No other method is within two errors of it."),
        f"Better than {base} by more than two errors at their {chosen}: {_list(better)} ({len(better)} of "
        f"{len(ranked)}). Worse by more than two errors{tried}: {_list(worse)} ({len(worse)}).",
    ]  # fmt: skip
    if ends:
        lines.append(f"Best at the largest scale tried, so that a larger one may be better: {_list(ends)}.")
    costs = [(frame[one.at_best, "cost"].value, one.name) for one in ranked if one.name in [first.name, *like]]
    counted = sorted((cost, name) for cost, name in costs if cost is not None)
    if len(counted) > 1:
        lines.append(f"Of the first and those within two errors of it {counted[0][1]} costs least: {counted[0][0]:.2f} "
                     f"times an image of {base}, in counted operations.")  # fmt: skip
    return lines


def _side(difference: Value) -> int:
    """−1 and 1 where it is below and above 0 by more than two errors, else 0."""
    if difference.value is None or abs(difference.value) <= 2 * (difference.error or 0.0):
        return 0
    return 1 if difference.value > 0 else -1


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def ranking_table(spec: EvaluationSpec, frame: Frame, ranked: Sequence[Ranked]) -> list[list[Cell]]:
    """Head and rows, one a method at its best scale, below the baseline."""
    fd = frame.metrics("fd")[0]
    net = fd.features
    distance = next(iter(frame.metrics("distance")), None)
    columns: list[tuple[str, str]] = [
        (f"{fd.head} − baseline", f"fd_to_baseline-{net}"), ("− that of the best", f"fd_to_best-{net}"),
        ("precision", f"precision-{net}"), ("recall", f"recall-{net}"),
    ]  # fmt: skip
    columns += [(distance.head, distance.name)] if distance else []
    columns += [(m.head, m.name) for m in frame.metrics(*AGREEMENT)]
    columns += [("cost", "cost")]
    heads = ["", "method", "best scale", "within one error", *(head for head, _ in columns), "at its own scale"]
    lines = [[Cell(head, "method" if head == "method" else "number" if i > 1 else "") for i, head in enumerate(heads)]]

    def numbers(method: str) -> list[Cell]:
        return [Cell(str(frame[method, name]), "number") for _, name in columns]

    lines.append([Cell(""), Cell(spec.baseline, "method"), *[Cell("–", "number")] * 2, *numbers(spec.baseline),
                  Cell("–", "number")])  # fmt: skip
    for place, one in enumerate(ranked, 1):
        low, high = one.robust
        span = f"×{low:g}" if low == high else f"×{low:g} to ×{high:g}"
        own = "–" if one.own is None else str(frame[one.own, f"fd_to_baseline-{net}"])
        scale = scale_text(spec.methods[one.at_best]) or "–"
        text = scale if len(one.scales) == 1 else f"{scale} (×{one.best:g})"
        lines.append([Cell(str(place)), Cell(one.name, "method"), Cell(text, "number"), Cell(span, "number"),
                      *numbers(one.at_best), Cell(own, "number")])  # fmt: skip
    return lines


def scale_text(guidance: GuidanceConfig) -> str:
    """The scales that a sweep changes, as numbers; "" where they are none."""
    own = [term.scale for term in guidance.terms.values() if not isinstance(term, CFGTerm)]
    own += [] if guidance.sag is None else [guidance.sag.scale]
    own = own or [getattr(entry.perturbation, "scale", None) for entry in guidance.every.values()]
    texts = [f"{scale:g}" for scale in own if isinstance(scale, float | int)]
    weights = [term.weight for term in guidance.terms.values() if isinstance(term, CFGTerm)]
    return " + ".join(texts or [f"w {weight:g}" for weight in weights if isinstance(weight, float | int)])


def protocol(spec: EvaluationSpec) -> list[tuple[str, str]]:
    """What all methods have in common, and how scales are counted: name and text."""
    config = spec.config
    options = ", ".join(f"{key}={value}" for key, value in config.sampler.options.items())
    texts = "none" if not any(spec.prompts) else config.prompts if isinstance(config.prompts, str) else "a list"
    return [
        ("images of each setting", f"{config.images}{spec.seeds_text()}, from the same noise: image i has seed i, "
                                   "prompt i"),
        ("sampler", f"{config.sampler.name}{f' ({options})' if options else ''}, {config.steps} steps, schedule "
                    f"{config.schedule.name}{'' if config.schedule.rho is None else f', rho {config.schedule.rho:g}'}"),
        ("model", f"{config.model.name}, networks in {config.model.dtype}"),
        ("prompts", texts), ("negative prompt", "zeros" if config.negative is None else repr(config.negative)),
        ("ControlNets", ", ".join(f"{name} ×{c.scale:g}" for name, c in config.controls.items()) or "none"),
        ("baseline", f"{spec.baseline}: {describe(spec.methods[spec.baseline])}"),
        ("scales", "s is the factor on the difference D[pos] − D[neg] in denoised space. The weight w of "
                   "classifier-free guidance is s + 1, and so is the γ of papers that write "
                   "D[neg] + γ·(D[pos] − D[neg]). A factor ×f multiplies s: w becomes 1 + f·(w − 1)."),
    ]  # fmt: skip


def settings_table(spec: EvaluationSpec) -> list[list[Cell]]:
    """Of every method, at its own scale where it is there, what acts, where and at which noise levels."""
    lines = [[Cell("method", "method"), *map(Cell, ("made of", "sites", "noise levels"))]]
    seen = set()
    for name, one in spec.sweep.items():
        if one.of in seen or (one.factor != 1 and any(o.of == one.of and o.factor == 1 for o in spec.sweep.values())):
            continue
        seen.add(one.of)
        guidance = spec.methods[name]
        places, levels = _places(guidance)
        formula = describe(guidance)
        lines.append([Cell(one.of, "method"), Cell(formula), Cell(places or "–"), Cell(levels or "all")])
    return lines


def _places(guidance: GuidanceConfig) -> tuple[str, str]:
    """The sites of all perturbations, and the intervals in σ."""
    perturbations: list[Any] = list(guidance.perturbations().values())
    places = dict.fromkeys(_listed(p.where) for p in perturbations if hasattr(p, "where"))
    terms = [
        term for term in (*guidance.terms.values(), guidance.sag) if term is not None and term.interval is not None
    ]
    levels = [f"σ {term.interval[0]:g} to {term.interval[1]:g}".replace("inf", "∞") for term in terms if term.interval]
    return ", ".join(places), ", ".join(dict.fromkeys(levels))


def _listed(where: Any) -> str:
    return where if isinstance(where, str) else str(where) if isinstance(where, int) else ", ".join(map(str, where))


def metric_of(frame: Frame, *kinds: str) -> Metric | None:
    """The first metric of these kinds that the frame has."""
    return next(iter(frame.metrics(*kinds)), None)
