"""Guidance as a sum of terms over branches: D = D[base] + Σ s(σ) · (D[pos] − D[neg]).

A branch is one evaluation of the network: a conditioning, and perturbations of what the network computes. s is always
the factor on the difference, so CFG's weight w enters as s = w − 1 (docs/guidance.md translates other conventions).
The shape of a term puts another difference in place of D[pos] − D[neg].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative, Number
from segresearch.guidance.perturbations import WHOLE, At, Perturbation, site_kind
from segresearch.guidance.sites import Where
from segresearch.guidance.step import Shape
from segresearch.sampling.intervals import ALWAYS, Interval, check_interval
from segresearch.sampling.memory import Past, Run

Scale = float | int | Callable[[float], float]  # a number, or s(σ); `in_run(sigma, run)`, if it has that, comes first


def check_scale(scale: Scale, interval: Sequence[float | int], owner: str) -> None:
    """ValueError for a scale that is not finite or an interval that is not 0 ≤ low ≤ high."""
    if not callable(scale) and not (isinstance(scale, float | int) and math.isfinite(scale)):
        raise InputError(f"the scale of {owner} must be finite, got {scale!r}")
    check_interval(interval, owner)


def scale_at(scale: Scale, interval: Interval, sigma: float, owner: str, run: Run | None = None) -> float:
    """s(σ), and 0 outside the interval. ValueError if the schedule gives no finite number."""
    if not interval[0] <= sigma <= interval[1]:
        return 0.0
    value = _value(scale, sigma, run)
    if not math.isfinite(value):
        raise InputError(f"the scale of {owner} is {value} at sigma {sigma:g}")
    return value


def _value(scale: Scale, sigma: float, run: Run | None) -> float:
    if not callable(scale):
        return float(scale)
    value = scale.in_run(sigma, run) if hasattr(scale, "in_run") else scale(sigma)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"the scale {_schedule(scale)} gave {value!r} at sigma {sigma:g}, not a number") from error


def scale_text(scale: Scale, interval: Interval, factor: str) -> str:
    """How a term is printed: "3·(…) [σ ≤ 5]"."""
    low, high = interval
    bounds = (f"{low:g} ≤ " if low > 0 else "") + "σ" + (f" ≤ {high:g}" if high < math.inf else "")
    number = f"{scale:g}" if isinstance(scale, float | int) else _schedule(scale)
    return f"{number}·{factor}" + (f" [{bounds}]" if bounds != "σ" else "")


def _schedule(scale: Callable[[float], float]) -> str:
    """A function's name with its argument, else the object's own words."""
    return f"{scale.__name__}(σ)" if hasattr(scale, "__name__") else str(scale)


@dataclass(frozen=True)
class Branch:
    """One evaluation of the network.

    conditioning: key into the `conds` of a call ("cond", "uncond", or any name the caller gives).
    perturbations: applied in this order; a later one on the same site is handed the earlier ones as its `attend`.
    name: what follows the ~ when it is printed; needed if there are perturbations. It does not count in comparisons.

    Raises ValueError for perturbations without a name, a name without perturbations, and for perturbations that have no
    `where` or cannot be hashed.
    """

    conditioning: str
    perturbations: tuple[Perturbation, ...] = ()
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if bool(self.perturbations) != bool(self.name):
            raise InputError(f"a branch has perturbations and a name, or neither: {self.perturbations}, {self.name!r}")
        for p in self.perturbations:
            if site_kind(p) not in WHOLE and not (callable(p) and hasattr(p, "where")) or isinstance(p, type):
                raise InputError(f'branch {self}: {p!r} has no place; give one: At(function, where="mid")')
            try:
                hash(p)
            except TypeError as error:
                hint = "make it a function or a frozen dataclass"
                raise InputError(f"branch {self}: {p!r} cannot be hashed ({error}); {hint}") from error

    def __str__(self) -> str:
        return f"{self.conditioning}~{self.name}" if self.name else self.conditioning


@dataclass(frozen=True)
class Ramp:
    """A scale that follows σ: `start` from `sigma_start` up, `stop` from `sigma_stop` down, linear in log σ between.

    Raises ValueError unless sigma_start > sigma_stop > 0 and both scales are finite.
    """

    kind: Literal["ramp"] = field(default="ramp", kw_only=True, repr=False)
    start: Number
    stop: Number
    sigma_start: NonNegative = 14.614642
    sigma_stop: NonNegative = 0.029167

    def __post_init__(self) -> None:
        if not (math.inf > self.sigma_start > self.sigma_stop > 0) or not math.isfinite(self.start + self.stop):
            raise InputError(f"a ramp needs sigma_start > sigma_stop > 0 and finite scales, got {self}")

    def __call__(self, sigma: float) -> float:
        clamped = min(max(sigma, self.sigma_stop), self.sigma_start)
        along = math.log(self.sigma_start / clamped) / math.log(self.sigma_start / self.sigma_stop)
        return self.start + (self.stop - self.start) * along

    def __str__(self) -> str:
        return f"({self.start:g} → {self.stop:g} for σ {self.sigma_start:g} → {self.sigma_stop:g})"


@dataclass(frozen=True)
class Term:
    """s(σ) · (D[pos] − D[neg]), or s(σ) · shape(D[pos], D[neg], step).

    scale: a finite number, or a call from σ (float) to one. Where it is 0, the term's branches are not evaluated.
    interval: (low, high) in σ, both ends included; outside it the scale is 0.
    shape: what takes the place of the difference (`guidance.step`). A sum of differences is the same in eps, denoised
        and v space; a shape is not, so each names its space. Further conditionings that it reads are its
        `conditionings`, a tuple of names.

    Raises ValueError for a scale that is not finite or an interval that is not 0 ≤ low ≤ high.
    """

    pos: Branch
    neg: Branch
    scale: Scale
    interval: Interval = ALWAYS
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if self.shape is not None and (not callable(self.shape) or isinstance(self.shape, type)):
            raise InputError(f"the shape of a term is a call (pos, neg, step) -> delta, got {self.shape!r}")
        check_scale(self.scale, self.interval, str(self))

    def scale_at(self, sigma: float, run: Run | None = None) -> float:
        """s(σ), 0 outside the interval. Raises ValueError if the schedule gives no finite number."""
        return scale_at(self.scale, self.interval, sigma, str(self), run)

    def acts(self, sigma: float, run: Run | None = None, owner: str = "") -> bool:
        """Whether the term adds something at σ. A shape with `stopped(past)` may end it for the rest of a run."""
        if not self.adds or not self.scale_at(sigma, run):
            return False
        stopped = getattr(self.shape, "stopped", None)
        return stopped is None or not stopped(Past(run, owner, sigma))

    @property
    def adds(self) -> bool:
        """Whether there is something to add, at a scale that is not 0."""
        return self.pos != self.neg or self.shape is not None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Those that it reads."""
        return (self.pos, self.neg, *map(Branch, getattr(self.shape, "conditionings", ())))

    @property
    def mixes_conditionings(self) -> bool:
        """Whether this is classifier-free guidance: two conditionings, both unperturbed."""
        return self.pos.conditioning != self.neg.conditioning and not self.pos.name and not self.neg.name

    def __str__(self) -> str:
        difference = f"(D[{self.pos}] − D[{self.neg}])" if self.pos != self.neg else f"(D[{self.pos}])"
        shape = "" if self.shape is None else getattr(self.shape, "__name__", None) or repr(self.shape)
        return scale_text(self.scale, self.interval, f"{shape}{difference}")


def cfg(
    weight: Scale,
    interval: Sequence[float | int] = ALWAYS,
    pos: str = "cond",
    neg: str = "uncond",
    shape: Shape | None = None,
) -> Term:
    """Classifier-free guidance (arXiv 2207.12598) in the usual weight w: D[uncond] + w·(D[cond] − D[uncond]).

    As a term on D[cond] its scale is w − 1, so at w = 1 `neg` is not evaluated. A callable gives w(σ). shape: as of
    `Term`.
    """
    check_scale(weight, ALWAYS, "cfg")
    scale = _LessOne(weight) if callable(weight) else weight - 1
    return Term(Branch(pos), Branch(neg), scale, _interval(interval), shape)


@dataclass(frozen=True)
class _LessOne:
    weight: Callable[[float], float]

    def __call__(self, sigma: float) -> float:
        return self.weight(sigma) - 1

    def in_run(self, sigma: float, run: Run | None) -> float:
        return _value(self.weight, sigma, run) - 1

    def __str__(self) -> str:
        return f"({_schedule(self.weight)} − 1)"


def perturbed(
    name: str,
    perturbation: Perturbation | Sequence[Perturbation],
    scale: Scale,
    base: str = "cond",
    where: Where | None = None,
    heads: Sequence[int] | None = None,
    interval: Sequence[float | int] = ALWAYS,
    shape: Shape | None = None,
) -> Term:
    """Guidance away from a perturbed branch: s·(D[base] − D[base~name]).

    Args:
        name: of the perturbed branch, as printed.
        perturbation: SEG(...), PAG(...), any function (q, k, v, site, attend) -> out, or several of them for one
            branch; a later one that meets an earlier one on a site is handed the earlier as `attend`.
        scale: s, or s(σ). The paper's γ in eq. (9) of arXiv 2408.00760 is s + 1.
        base: the conditioning that is perturbed. "cond" is the official code's choice, "uncond" the paper's eq. (10).
        where, heads: sites and heads of the perturbation; None keeps its own. A plain function has none of its own
            and gets where="mid" and every head. Given several perturbations, these apply to each.
        interval: (low, high) of σ in which the term acts. shape: as of `Term`.
    """
    several = perturbation if isinstance(perturbation, Sequence) else [perturbation]
    bound = tuple(_bind(p, where, heads) for p in several)
    return Term(Branch(base), Branch(base, bound, name), scale, _interval(interval), shape)


def _interval(interval: Sequence[float | int]) -> Interval:
    check_scale(0.0, interval, "this term")
    return (interval[0], interval[1])


def _bind(p: Perturbation, where: Where | None, heads: Sequence[int] | None) -> Perturbation:
    if not hasattr(p, "where") and site_kind(p) not in WHOLE:
        if getattr(p, "remembers", False) or getattr(p, "conditionings", ()):
            raise InputError(f"{p!r} has no place: give its class a field `where`")
        p = At(p, site_kind=site_kind(p))
    changes = {name: value for name, value in (("where", where), ("heads", heads)) if value is not None}
    if not changes:
        return p
    if not is_dataclass(p) or not changes.keys() <= {field.name for field in fields(p)}:
        raise InputError(f"{p!r} takes no {' and no '.join(changes)}; name its place where it is made")
    return replace(p, **changes)  # type: ignore[type-var]
