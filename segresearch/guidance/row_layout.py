"""The rows of one forward: which branches share rows, where it forks into a part for each branch, and what each part
does at the sites that a branch is perturbed at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.guidance.blur import constant
from segresearch.guidance.perturbations import Perturbation, checked_out, site_kind
from segresearch.guidance.sites import check_heads, select_sites
from segresearch.guidance.terms import Branch
from segresearch.models.attention import EMBEDDING, Attend, Call, Heads, KeyHeads, Part, Site
from segresearch.models.conditioning import Projection
from segresearch.sampling.memory import Past, Run

Perturbed = Mapping[str, tuple[Perturbation, ...]]  # the perturbations of one branch, by site
Groups = Mapping[tuple[Perturbation, ...], Sequence[int]]  # numbers of the parts under the same perturbations
Names = tuple[tuple[str, ...], ...]  # the branches that each part of the rows belongs to


class Pass(NamedTuple):
    """What the branches of one forward have in common: their network, by name, and their view of x."""

    network: str = ""
    view: Any = None


def perturbed_sites(perturbations: Sequence[Perturbation], kinds: Mapping[str, Mapping[str, int]]) -> Perturbed:
    """Site name -> the perturbations there, in their order. kinds: of every kind the sites, with their heads.

    Raises InputError for a selector that matches no site, or a head that a site does not have.
    """
    sites: dict[str, tuple[Perturbation, ...]] = {}
    for perturbation in perturbations:
        kind = site_kind(perturbation)
        for site in select_sites(perturbation.where, tuple(kinds[kind]), kind) if kind in kinds else ():  # type: ignore[attr-defined]
            check_heads(getattr(perturbation, "heads", None), kinds[kind][site], site)
            sites[site] = (*sites.get(site, ()), perturbation)
    return sites


@dataclass(frozen=True)
class Layout:
    """Parts of equally many rows: one for each distinct conditioning up to the fork, one for each branch after it.

    conditionings: the distinct ones. branches: the distinct ones, unperturbed first.
    fork: the site at which the parts of the conditionings become those of the branches. None: the branches have their
        own parts from the start.
    groups: at every site where any branch is perturbed, the branches under the same perturbations.
    computed: for each requested branch, the one of `branches` that is equal to it.
    """

    conditionings: tuple[str, ...]
    branches: tuple[Branch, ...]
    fork: str | None
    groups: Mapping[str, Groups]
    computed: Mapping[Branch, Branch]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The conditioning of each part that enters the network."""
        return tuple(branch.conditioning for branch in self.branches) if self.fork is None else self.conditionings

    @property
    def source(self) -> tuple[int, ...]:
        """For each branch the number of its conditioning."""
        return tuple(self.conditionings.index(branch.conditioning) for branch in self.branches)

    @property
    def names(self) -> tuple[Names, Names]:
        """The requested branches on each conditioning, and those that are equal to each branch."""
        pairs = self.computed.items()
        before = (tuple(str(b) for b, same in pairs if same.conditioning == name) for name in self.conditionings)
        return tuple(before), tuple(tuple(str(b) for b, same in pairs if same == branch) for branch in self.branches)


def layout(
    computed: Mapping[Branch, Branch],
    perturbed: Mapping[tuple[Perturbation, ...], Perturbed],
    sites: Sequence[str],
    fork: bool = True,
) -> Layout:
    """The fewest rows that give every branch.

    computed: each branch with all its perturbations, on the first of the conditionings that are equal to its own.
    perturbed: for each tuple of perturbations that occurs, these by site. sites: all, in the order of a forward pass.
    fork: False gives every branch its own rows from the start.

    Branches on one conditioning have equal rows up to the first perturbed site, which is where the pass forks. Where
    no two branches share a conditioning, or the embedding of t is perturbed, nothing forks.
    """
    distinct = sorted(dict.fromkeys(computed.values()), key=lambda branch: bool(branch.perturbations))
    conditionings = tuple(dict.fromkeys(branch.conditioning for branch in distinct))
    by_site = [perturbed[branch.perturbations] for branch in distinct]
    groups: dict[str, dict[tuple[Perturbation, ...], list[int]]] = {site: {} for sites in by_site for site in sites}
    for site, parts in groups.items():
        for number, perturbations in enumerate(by_site):
            parts.setdefault(perturbations.get(site, ()), []).append(number)
    shared = len(distinct) > len(conditionings)
    first = next((site for site in sites if site in groups), EMBEDDING) if fork and shared else EMBEDDING
    return Layout(conditionings, tuple(distinct), None if first == EMBEDDING else first, groups, computed)


@constant
def row_index(parts: tuple[int, ...], rows: int, device: torch.device) -> Int[Tensor, " rows_out"]:
    """Row numbers of these parts of `rows` rows, one part after another; made once, not once a step."""
    return torch.tensor([part * rows + row for part in parts for row in range(rows)], device=device)


@dataclass(frozen=True)
class BranchAttention:
    """An `attend` for a batch of equal parts of rows; at each site, parts under the same perturbations go together.

    groups: the sites where any part is perturbed (`Layout`). rows: of one part.
    before, after: branches of each part before the fork and after it. sigma, keys: of the rows of one part.
    attend: the innermost attention, which all perturbations end in. Its site holds the branches of its rows and sigma.
    texts: the conditionings that a perturbation of the cross-attention asks for. past: the run and σ, where a
    perturbation remembers something; its owner is set for each site and branch.
    """

    groups: Mapping[str, Groups]
    rows: int
    before: Names
    after: Names
    attend: Attend
    sigma: Float[Tensor, " rows"] | None = None
    keys: Int[Tensor, " rows"] | None = None
    texts: Mapping[str, Projection] = field(default_factory=dict)
    past: Past | None = None

    def __call__(self, q: Heads, k: KeyHeads, v: KeyHeads, site: Site) -> Heads:
        if site.name not in self.groups:
            names = self.after if len(q) == len(self.after) * self.rows else self.before
            return self.attend(q, k, v, site._replace(branches=names, sigma=self.sigma, keys=self.keys))
        out = [q[:0]] * len(self.after)
        for perturbations, parts in self.groups[site.name].items():
            group_q, group_k, group_v = (_rows(z, parts, self.rows) for z in (q, k, v))  # (m · self.rows, h, n, d)
            attend = compose(perturbations, self.attend, self.past)
            for part, rows in zip(parts, attend(group_q, group_k, group_v, self.site(site, parts)).split(self.rows)):
                out[part] = rows
        return torch.cat(out)

    def site(self, site: Site, parts: Sequence[int]) -> Site:
        """The site of a call with these parts."""
        texts = {name: one.text[site.name] for name, one in self.texts.items()} if site.kind == "cross" else {}
        names = tuple(self.after[part] for part in parts)
        return site._replace(branches=names, sigma=self.sigma, keys=self.keys, texts=texts)

    def within(self, block: str, parts: Sequence[int]) -> "BranchAttention":
        """The attention in a block, of a batch of these parts alone."""
        groups = {}
        for site in (f"{block}.attn1", f"{block}.attn2", f"{block}.ff"):
            if site in self.groups:
                numbers = {p: [parts.index(i) for i in of if i in parts] for p, of in self.groups[site].items()}
                groups[site] = {p: of for p, of in numbers.items() if of}
        after = tuple(self.after[part] for part in parts)
        return BranchAttention(
            groups, self.rows, after, after, self.attend, self.sigma, self.keys, self.texts, self.past
        )


@dataclass(frozen=True)
class BranchCalls:
    """A `wrap` for the same batch: at each site, parts under the same perturbations are one call."""

    attention: BranchAttention

    def __call__(self, call: Call, h: Float[Tensor, "rows *shape"], site: Site) -> Float[Tensor, "rows_out *out"]:
        a = self.attention
        if site.name not in a.groups:
            return call(h)
        out: list[Tensor] = [h[:0]] * len(a.after)
        for perturbations, parts in a.groups[site.name].items():
            own: Call = call
            if site.kind in ("block", "embedding") and len(parts) < len(a.after):
                within = a.within(site.name, parts)
                own = partial(call, part=Part(row_index(tuple(parts), a.rows, h.device), within, BranchCalls(within)))
            for perturbation in perturbations:
                own = partial(perturbed_call, perturbation, own, a.site(site, parts), a.past)
            for part, rows in zip(parts, own(_rows(h, parts, a.rows)).split(a.rows)):
                out[part] = rows
        return torch.cat(out)


def _rows(z: Tensor, parts: Sequence[int], rows: int) -> Tensor:
    """The parts of `rows` rows with these numbers, one after another; a view if they are neighbours."""
    if parts[-1] - parts[0] == len(parts) - 1:
        return z[parts[0] * rows : (parts[-1] + 1) * rows]
    return torch.cat([z[i * rows : (i + 1) * rows] for i in parts])


def compose(perturbations: Sequence[Perturbation], attend: Attend, past: Past | None = None) -> Attend:
    """`attend` under the perturbations; each is handed what came before it."""
    for perturbation in perturbations:
        attend = partial(perturbed_attention, perturbation, attend, past)
    return attend


def perturbed_attention(
    perturbation: Any, attend: Attend, past: Past | None, q: Heads, k: KeyHeads, v: KeyHeads, site: Site
) -> Heads:
    """The perturbation's output, checked. One that remembers is called for each branch."""
    if past is not None and remembers(perturbation):
        parts = zip(*(z.chunk(len(site.branches)) for z in (q, k, v)), owned(perturbation, site, past), strict=True)
        out: Any = torch.cat([perturbation(*part, attend) for part in parts])
    else:
        out = perturbation(q, k, v, site, attend)
    return checked_out(out, (*q.shape[:3], v.shape[3]), perturbation, site)


def perturbed_call(
    perturbation: Any, call: Call, site: Site, past: Past | None, h: Float[Tensor, "rows *shape"], **options: Any
) -> Float[Tensor, "rows *out"]:
    """A call under the perturbation, checked. options: of the call of a block (`without`). One that remembers finds at
    `site.past` what it kept for these branches together, since a call of a block is for all its rows."""
    if past is not None and remembers(perturbation):
        site = site._replace(past=replace(past, owner=(perturbation, site.name, site.branches)))
    out = perturbation(h, site, partial(call, **options) if options else call)
    width = getattr(out, "shape", ())[1:] if site.kind == "embedding" else h.shape[1:]
    return checked_out(out, (len(h), *width), perturbation, site)


def remembers(perturbation: Any) -> bool:
    """Whether it reads and writes `site.past`."""
    return getattr(perturbation, "remembers", False)


def owned(perturbation: Any, site: Site, past: Past) -> list[Site]:
    """The site of each branch alone, with what the perturbation remembers there of it."""
    return [
        site._replace(branches=(names,), past=replace(past, owner=(perturbation, site.name, names[0])))
        for names in site.branches
    ]


def past_of(perturbations: Sequence[Perturbation], run: Run | None, sigma: float) -> Past | None:
    """The run and σ for these perturbations; None where none of them remembers anything."""
    return Past(run, "", sigma) if any(map(remembers, perturbations)) else None
