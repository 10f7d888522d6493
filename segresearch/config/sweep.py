"""Every method of an evaluation at several scales: its own scale times each factor of the sweep. Light: no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from segresearch.config.method import CFGTerm, GuidanceConfig
from segresearch.config.validate import nearest
from segresearch.errors import ConfigError


class Swept(NamedTuple):
    """A method at one scale. of: the method that it is a scale of; factor: its scale over that one's own."""

    guidance: GuidanceConfig
    of: str
    factor: float | int = 1.0


def swept(
    methods: Mapping[str, GuidanceConfig], factors: Sequence[float | int], at: Mapping[str, float | int] | None = None
) -> dict[str, Swept]:
    """`methods` by name, all but the first (the baseline) once for each factor: "PAG ×0.5", "PAG", "PAG ×2".

    at: by the name of a method the one factor that it has in place of these. A method without a scale (a
    post-processor of plain CFG has that of the CFG) stays once. ConfigError where two come to have one name, and for
    a factor of no method.
    """
    at, known = at or {}, list(methods)[1:]
    for name in (name for name in at if name not in known):
        raise ConfigError(f"sweep.at: {name!r} is no method here{nearest(name, known)} ({', '.join(known)})")
    sweep: dict[str, Swept] = {}
    for number, (name, guidance) in enumerate(methods.items()):
        own = [at[name]] if name in at else sorted(factors)
        scaled = {} if not number else {factor: at_scale(guidance, factor) for factor in own}
        versions = {factor: one for factor, one in scaled.items() if one is not None} or {1.0: guidance}
        for factor, one in versions.items():
            label = name if factor == 1 else f"{name} ×{factor:g}"
            if label in sweep:
                raise ConfigError(f"sweep: two methods would be called {label!r}; give one of them another label")
            sweep[label] = Swept(replace(one, label=label), name, factor)
    return sweep


def at_scale(guidance: GuidanceConfig, factor: float | int) -> GuidanceConfig | None:
    """The method at `factor` times its scale; None where it has none.

    The scale of a method is that of its terms other than classifier-free guidance and of SAG; of plain guidance w − 1,
    since a weight of 1 is no guidance; of a method that changes every branch that of its perturbations.
    """
    times, terms = partial(_times, factor, 0.0), dict[str, Any](guidance.terms)
    own = {name: term for name, term in terms.items() if not isinstance(term, CFGTerm)}
    if own or guidance.sag is not None:
        terms |= {name: replace(term, scale=times(term.scale)) for name, term in own.items()}
        sag = None if guidance.sag is None else replace(guidance.sag, scale=times(guidance.sag.scale))
        return replace(guidance, terms=terms, sag=sag)
    every = {
        name: entry for name, entry in guidance.every.items() if _number(getattr(entry.perturbation, "scale", None))
    }
    if every:
        changed = {
            name: replace(entry.perturbation, scale=times(entry.perturbation.scale)) for name, entry in every.items()
        }
        entries = {name: replace(entry, perturbation=changed[name]) for name, entry in every.items()}
        return replace(guidance, every={**guidance.every, **entries})
    if not terms:
        return None
    return replace(guidance, terms={
        name: replace(term, weight=_times(factor, 1.0, term.weight)) for name, term in terms.items()
    })  # fmt: skip


def _times(factor: float | int, zero: float, scale: Any) -> Any:
    """A scale, or a schedule of one, whose distance from `zero` is `factor` times as large."""
    if _number(scale):
        return float(f"{zero + factor * (scale - zero):.12g}")
    if hasattr(scale, "strength"):
        return replace(scale, strength=factor * scale.strength)
    ends = [name for name in ("start", "stop", "low", "high") if hasattr(scale, name)]
    if not ends:
        raise ConfigError(f"sweep: {scale!r} has no scale that a factor could change; leave `sweep` out")
    return replace(scale, **{name: _times(factor, zero, getattr(scale, name)) for name in ends})


def _number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
