"""Perturbations of what the network computes; they know nothing of CFG, branches or batches.

Of attention (site_kind "self", which is meant where there is none, or "cross"): `(q, k, v, site, attend) -> out`.
Of a transformer block, a feed-forward or the embedding of t ("block", "ff", "embedding"): `(h, site, call) -> h`.
Of the whole network: "view", a branch on parts of x, by `split(z) -> parts` and `join(denoised parts, x) -> denoised`
(methods/swg.py); "network", a branch of another network, by its name `network` (methods/weak.py).

`attend` and `call` are what one may use: the plain one or, where several perturbations meet on a site, the one before
it. A perturbation with `remembers = True` finds at `site.past` what it kept there; one with `conditionings = (names)`
finds their keys and values at `site.texts`. `At` says where a plain function acts, SEG and PAG know it themselves.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from segresearch.errors import InputError
from segresearch.fields import Boundary, Fraction, NonNegative, Whole, one_of
from segresearch.guidance.blur import blur, check_blur, constant
from segresearch.guidance.sites import Where, check_heads
from segresearch.models.attention import KINDS, Attend, Heads, KeyHeads, Site

Perturbation = Any  # (q, k, v, site, attend) -> out, each Heads; (h, site, call) -> h; or of one of the kinds in WHOLE
WHOLE = ("view", "network")  # the kinds of perturbations that have no sites


def site_kind(perturbation: Any) -> str:
    """What a perturbation perturbs: a kind of sites (`attention.KINDS`), or one of WHOLE."""
    return getattr(perturbation, "site_kind", "self")


def checked_out(out: Any, shape: Sequence[int], owner: Any, site: Site | None = None) -> Tensor:
    """`out`, a tensor of this shape; for anything else an InputError with what made it (an object, or words) and the
    site."""
    actual = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if actual != tuple(shape):
        name, place = owner if isinstance(owner, str) else repr(owner), f" at {site.name}" if site is not None else ""
        raise InputError(f"{name} gave {actual}{place}, expected {tuple(shape)}")
    return out


def freeze(perturbation: Any) -> None:
    """Lists (of a config file, say) become tuples, so that equal perturbations compare and hash equal."""
    where, heads = perturbation.where, getattr(perturbation, "heads", None)
    if isinstance(where, bool) or not isinstance(where, str | int | Sequence):
        raise InputError(f"where={where!r}: a selector is a text, an index or a list of these")
    if not isinstance(where, str | int):
        object.__setattr__(perturbation, "where", tuple(where))
    if heads is not None:
        if not isinstance(heads, Sequence) or not all(isinstance(h, int) for h in heads):
            raise InputError(f"heads={heads!r}: a list of head indices, or None for all")
        if not heads:
            raise InputError("heads=[] perturbs nothing; name at least one head, or None for all")
        object.__setattr__(perturbation, "heads", tuple(heads))
        if min(perturbation.heads) < 0:
            raise InputError(f"heads={list(heads)}: head indices start at 0")


@constant
def head_mask(heads: tuple[int, ...], count: int, site: str, device: torch.device) -> Bool[Tensor, "1 {count} 1 1"]:
    check_heads(heads, count, site)
    numbers = torch.arange(count, device=device)
    mask = torch.zeros(count, dtype=torch.bool, device=device)
    for head in heads:
        mask = mask | (numbers == head)
    return mask[None, :, None, None]


def on_heads(heads: Sequence[int] | None, out: Tensor, plain: Tensor, site: Site) -> Tensor:
    """`out` on these heads, `plain` on the others; None is all."""
    if heads is None:
        return out
    return torch.where(head_mask(tuple(heads), out.shape[1], site.name, out.device), out, plain)


def else_plain(
    heads: Sequence[int] | None, out: Heads, q: Heads, k: KeyHeads, v: KeyHeads, site: Site, attend: Attend
) -> Heads:
    """`out` on these heads, `attend` on the others, which is called only where there are others."""
    return out if heads is None else on_heads(heads, out, attend(q, k, v, site), site)


@dataclass(frozen=True)
class SEG:
    """Smoothed Energy Guidance, arXiv 2408.00760: out = softmax(B Q Kᵀ/√d) V with the blur B of Definition 2.1.

    Blurring the queries blurs the whole map of logits (Proposition 3.1), without ever forming it.

    sigma: standard deviation of the blur in tokens; 0 is plain attention, above 9999 (inf) every query is their mean.
    where: sites, see `segresearch.guidance.sites`. heads: indices of the blurred heads; None is all.
    on: "q" (the paper), "k" (the dual of its Appendix B: blur the keys) or "qk" (both).
    boundary: of `blur_matrix`; "reflect" reproduces the official code.

    Raises ValueError for a negative or NaN sigma, an unknown `on` or boundary, and empty or negative heads.
    """

    kind: Literal["seg"] = field(default="seg", kw_only=True, repr=False)
    sigma: NonNegative = math.inf
    where: Where = "mid"
    heads: Sequence[Whole] | None = None
    on: Annotated[str, one_of("q", "k", "qk")] = "q"
    boundary: Boundary = "reflect"

    def __post_init__(self) -> None:
        check_blur(self.sigma, self.boundary)
        if self.on not in ("q", "k", "qk"):
            raise InputError(f'SEG blurs on="q", "k" or "qk", got {self.on!r}')
        freeze(self)

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        """Attention of the blurred queries and/or keys on the site's grid."""
        return attend(self._smooth(q, site, "q"), self._smooth(k, site, "k"), v, site)

    def _smooth(self, z: Tensor, site: Site, which: str) -> Tensor:
        if which not in self.on:
            return z
        smooth = blur(z, site.grid, self.sigma, self.boundary)
        return on_heads(self.heads, smooth, z, site)


@dataclass(frozen=True)
class PAG:
    """Perturbed-Attention Guidance, arXiv 2403.17377: the attention map becomes the identity, so out = V.

    tau: how far: the map is (1 − τ)·softmax + τ·identity, hence out = (1 − τ)·attend(q, k, v) + τ·v. 1 is the paper's
        PAG and computes no attention; 0 is plain attention; between is SoftPAG (arXiv 2506.10978).
    where, heads: as in `SEG`.

    Raises ValueError for tau outside [0, 1], and empty or negative heads.
    """

    kind: Literal["pag"] = field(default="pag", kw_only=True, repr=False)
    where: Where = "mid"
    heads: Sequence[Whole] | None = None
    tau: Fraction = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise InputError(f"PAG tau must be in [0, 1], got {self.tau!r}")
        freeze(self)

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site, attend: Attend) -> Heads:
        """(1 − τ)·attend(q, k, v) + τ·v."""
        if self.tau == 1 and self.heads is None:
            return v
        plain = attend(q, k, v, site)
        if self.tau == 0:
            return plain
        out = v if self.tau == 1 else torch.lerp(plain, v, self.tau)
        return on_heads(self.heads, out, plain, site)


@dataclass(frozen=True)
class At:
    """A plain function as a perturbation at sites and heads.

    function: `(q, k, v, site, attend) -> out`, which always sees every head; or `(h, site, call) -> h` for the kinds
        "block", "ff" and "embedding".
    where: sites. heads: only these heads take the function's output, the others plain attention (one further `attend`).
    site_kind: the kind of the sites, one of `attention.KINDS`.
    """

    function: Callable[..., Tensor]
    where: Where = "mid"
    heads: Sequence[int] | None = None
    site_kind: str = "self"

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise InputError(f"a perturbation is a call (q, k, v, site, attend) -> out, got {self.function!r}")
        if self.site_kind not in KINDS:
            raise InputError(f"site_kind={self.site_kind!r}: sites are of the kinds {', '.join(KINDS)}")
        if self.heads is not None and self.site_kind not in ("self", "cross"):
            raise InputError(f"heads={list(self.heads)}: a site of kind {self.site_kind!r} has no heads")
        freeze(self)

    def __call__(self, *arguments: Any) -> Tensor:
        """The function's output, on the chosen heads."""
        if len(arguments) == 3:
            return self.function(*arguments)  # (h, site, call)
        q, k, v, site, attend = arguments
        shape = (*q.shape[:3], v.shape[3])
        if self.heads is None:
            return checked_out(self.function(*arguments), shape, self, site)
        plain = attend(q, k, v, site)  # first, should the function work in place
        out = checked_out(self.function(*arguments), shape, self, site)
        return on_heads(self.heads, out, plain, site)

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", None) or repr(self.function)
        heads = f", heads={self.heads}" if self.heads is not None else ""
        return f"{name}(where={self.where!r}{heads})"
