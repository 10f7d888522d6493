"""The records of a method in the configs: its terms, and what is around them. Light: no torch.

The methods (SEG, APG, ...) are the dataclasses of segresearch.guidance, by their kinds (`config.kinds`); they are
imported when a value of theirs is validated.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Tag

from segresearch.config.inputs import IPAdapterConfig
from segresearch.config.kinds import CONDITIONINGS, PERTURBATIONS, POSTS, SCALES, SHAPES, one_of_kinds
from segresearch.config.networks import NetworkConfig
from segresearch.config.validate import Record, nearest, of_guidance, of_record
from segresearch.errors import ConfigError
from segresearch.fields import Fraction, NonNegative, Number, Whole
from segresearch.runs import LATER

if TYPE_CHECKING:
    from segresearch.guidance import Projected
else:
    Projected = Annotated[Any, of_guidance("postprocess.Projected")]

Where = str | Whole | tuple[str | Whole, ...]  # self-attention sites: a group, a glob, an index, or several of these
Heads = tuple[Whole, ...] | None  # None: all
Interval = tuple[Number, Number] | None  # (low, high) in sigma; None: everywhere


@dataclass(frozen=True)
class CustomConfig(Record):
    """Any function or class, imported from `target`; `options` are further keywords, or the arguments of the class.

    As a perturbation it is (q, k, v, site, attend) -> out, or (h, site, call) -> h where `site_kind` is "block", "ff"
    or "embedding". Elsewhere it is what a shape, a post-processor or a conditioning is (docs/guidance.md), and where,
    heads and site_kind are not read.
    """

    kind: Literal["custom"]
    target: str
    where: Where = "mid"
    heads: Heads = None
    site_kind: Literal["self", "cross", "block", "ff", "embedding"] = "self"
    options: dict[str, Any] = field(default_factory=dict)


if TYPE_CHECKING:
    PerturbationConfig: TypeAlias = Any
    ShapeConfig: TypeAlias = Any
    PostConfig: TypeAlias = Any
    ConditioningConfig: TypeAlias = Any
    Scale: TypeAlias = Any
else:
    Custom = Annotated[Any, of_record(CustomConfig), Tag("custom")]
    PerturbationConfig = one_of_kinds(PERTURBATIONS, Custom)
    ShapeConfig, PostConfig = one_of_kinds(SHAPES, Custom), one_of_kinds(POSTS, Custom)
    ConditioningConfig = one_of_kinds(CONDITIONINGS, Custom)
    Scale = Number | one_of_kinds(SCALES, default="ramp")


@dataclass(frozen=True)
class CFGTerm(Record):
    """Classifier-free guidance of weight w: (w − 1)·(D[pos] − D[neg]); 1 is no guidance. shape: in place of D[pos] −
    D[neg]."""

    kind: Literal["cfg"]
    weight: Scale
    interval: Interval = None
    pos: str = "cond"
    neg: str = "uncond"
    shape: ShapeConfig | None = None


@dataclass(frozen=True)
class PerturbedTerm(Record):
    """scale·(D[base] − D[base, perturbed]) while sigma lies in `interval`; several perturbations share one branch."""

    kind: Literal["perturbed"]
    perturbation: PerturbationConfig | tuple[PerturbationConfig, ...]
    scale: Scale
    base: str = "cond"
    interval: Interval = None
    shape: ShapeConfig | None = None


@dataclass(frozen=True)
class DifferenceTerm(Record):
    """scale·(D[pos] − D[neg]) of two conditionings, in the unit of the difference."""

    kind: Literal["difference"]
    pos: str
    neg: str
    scale: Scale
    interval: Interval = None
    shape: ShapeConfig | None = None


@dataclass(frozen=True)
class SAGConfig(Record):
    """Self-Attention Guidance around the sum of the terms; fields as of `SelfAttentionGuidance`."""

    scale: Scale
    blur_sigma: NonNegative = 1.0
    threshold: NonNegative = 1.0
    base: str | None = None
    interval: Interval = None


@dataclass(frozen=True)
class ZSamplingConfig(Record):
    """Z-sampling around the sum of the terms; fields as of `ZSampling`."""

    interval: Interval = None
    base: str | None = None


@dataclass(frozen=True)
class EveryConfig(Record):
    """A perturbation of every branch on a conditioning; "*" is all of them."""

    perturbation: PerturbationConfig
    conditioning: str = "*"


TERMS = {"cfg": CFGTerm, "perturbed": PerturbedTerm, "difference": DifferenceTerm}
if TYPE_CHECKING:
    TermConfig = CFGTerm | PerturbedTerm | DifferenceTerm
else:
    TermConfig = one_of_kinds({}, *(Annotated[kind, Tag(name)] for name, kind in TERMS.items()))


@dataclass(frozen=True)
class GuidanceConfig(Record):
    """A method: a sum of terms, post-processors after it, SAG or Z-sampling around it. No term at all is the vanilla
    model. rescale: φ in eps space, apg: on the whole guidance; both come before `post`.

    base: the conditioning that the terms are added to. every: perturbations of all branches. conditionings: those that
    are made from others or from texts, beside cond and uncond. networks: for perturbations of kind weak.
    """

    label: str | None = None
    base: str = "cond"
    terms: dict[str, TermConfig] = field(default_factory=dict)
    every: dict[str, EveryConfig] = field(default_factory=dict)
    conditionings: dict[str, ConditioningConfig] = field(default_factory=dict)
    networks: dict[str, NetworkConfig] = field(default_factory=dict)
    rescale: Fraction = 0.0
    apg: Projected | None = None
    post: dict[str, PostConfig] = field(default_factory=dict)
    sag: SAGConfig | None = None
    zigzag: ZSamplingConfig | None = None
    ip_adapter: IPAdapterConfig | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        known = ("cond", "uncond", *self.conditionings)
        read = (*known, "image")  # of instruct-pix2pix, see `StableDiffusion.with_image`
        for place, name in self.named_conditionings():
            if name not in read:
                raise ConfigError(f"{place}: {name!r} is not one of {', '.join(known)}{nearest(name, known)}")
        for place, perturbation in self.perturbations().items():
            network = getattr(perturbation, "network", None)
            if network is not None and network not in self.networks:
                there = ", ".join(self.networks) or "there are none"
                raise ConfigError(f"{place}.network: {network!r} is not one of `networks` ({there})")
        if self.sag is not None and self.zigzag is not None:
            raise ConfigError("zigzag: Z-sampling and SAG cannot both be around one method")

    def perturbations(self) -> dict[str, Any]:
        """All perturbations by their keys."""
        every = {f"every.{key}.perturbation": entry.perturbation for key, entry in self.every.items()}
        terms = {key: t.perturbation for key, t in self.terms.items() if isinstance(t, PerturbedTerm)}
        several = {key: p if isinstance(p, tuple) else (p,) for key, p in terms.items()}
        numbered = {(key, "" if len(ps) == 1 else f".{i}"): p for key, ps in several.items() for i, p in enumerate(ps)}
        return every | {f"terms.{key}.perturbation{number}": p for (key, number), p in numbered.items()}

    def named_conditionings(self) -> list[tuple[str, str]]:
        """Every key that names a conditioning, with the name."""
        places = [("base", self.base)]
        for key, term in self.terms.items():
            names = ("base",) if isinstance(term, PerturbedTerm) else ("pos", "neg")
            places += [(f"terms.{key}.{name}", getattr(term, name)) for name in names]
            places += [(f"terms.{key}.shape", name) for name in getattr(term.shape, "conditionings", ())]
        places += [(f"every.{k}.conditioning", e.conditioning) for k, e in self.every.items() if e.conditioning != "*"]
        for key, perturbation in self.perturbations().items():
            places += [(key, name) for name in getattr(perturbation, "conditionings", ())]
        makers = self.conditionings.items()
        places += [(f"conditionings.{key}.of", maker.of) for key, maker in makers if hasattr(maker, "of")]
        if self.sag is not None and self.sag.base is not None:
            places.append(("sag.base", self.sag.base))
        if self.zigzag is not None and self.zigzag.base is not None:
            places.append(("zigzag.base", self.zigzag.base))
        return places
