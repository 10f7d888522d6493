"""The rows of one forward: which branches share rows, where it forks into a block for each branch, their attention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.guidance.blur import constant
from segresearch.guidance.perturbations import Perturbation, checked_out
from segresearch.guidance.terms import Branch
from segresearch.models.attention import Attend, Heads, KeyHeads, Site

Perturbed = Mapping[str, tuple[Perturbation, ...]]  # the perturbations of one branch, by site
Groups = Mapping[tuple[Perturbation, ...], Sequence[int]]  # numbers of the blocks under the same perturbations
Names = tuple[tuple[str, ...], ...]  # the branches that each block of rows belongs to


@dataclass(frozen=True)
class Layout:
    """Blocks of equally many rows: one for each distinct conditioning up to the fork, one for each branch after it.

    conditionings: the distinct ones. branches: the distinct ones, unperturbed first.
    fork: the site at which the blocks of the conditionings become those of the branches. None: the branches have their
        own blocks from the start.
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
        """The conditioning of each block that enters the network."""
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
    branches: Sequence[Branch],
    perturbed: Mapping[tuple[Perturbation, ...], Perturbed],
    sites: Sequence[str],
    alias: Mapping[str, str],
    fork: bool = True,
) -> Layout:
    """The fewest rows that give every one of `branches`.

    perturbed: for each tuple of perturbations that occurs, these by site. sites: all, in the order of a forward pass.
    alias: for each conditioning the name of the first one that is equal to it. fork: False gives every branch its own
    rows from the start.

    Branches on one conditioning have equal rows up to the first perturbed site, which is where the pass forks. Where
    no two branches share a conditioning nothing forks.
    """
    computed = {branch: replace(branch, conditioning=alias[branch.conditioning]) for branch in branches}
    distinct = sorted(dict.fromkeys(computed.values()), key=lambda branch: bool(branch.perturbations))
    conditionings = tuple(dict.fromkeys(branch.conditioning for branch in distinct))
    by_site = [perturbed[branch.perturbations] for branch in distinct]
    groups: dict[str, dict[tuple[Perturbation, ...], list[int]]] = {site: {} for sites in by_site for site in sites}
    for site, blocks in groups.items():
        for number, perturbations in enumerate(by_site):
            blocks.setdefault(perturbations.get(site, ()), []).append(number)
    shared = len(distinct) > len(conditionings)
    first = next(site for site in sites if site in groups) if fork and shared else None
    return Layout(conditionings, tuple(distinct), first, dict(groups), computed)


@constant
def row_index(blocks: tuple[int, ...], rows: int, device: torch.device) -> Int[Tensor, " rows_out"]:
    """Row numbers of these blocks of `rows` rows, one block after another; made once, not once a step."""
    return torch.tensor([block * rows + row for block in blocks for row in range(rows)], device=device)


@dataclass(frozen=True)
class BranchAttention:
    """An `attend` for a batch of equal blocks of rows; at each site, blocks under the same perturbations go together.

    groups: the sites where any block is perturbed (`Layout`). rows: of one block.
    before, after: branches of each block before the fork and after it. sigma: of the rows of one block.
    attend: the innermost attention, which all perturbations end in. Its site holds the branches of its rows and sigma.
    """

    groups: Mapping[str, Groups]
    rows: int
    before: Names
    after: Names
    attend: Attend
    sigma: Float[Tensor, " rows"] | None = None

    def __call__(self, q: Heads, k: KeyHeads, v: KeyHeads, site: Site) -> Heads:
        if site.name not in self.groups:
            names = self.after if len(v) == len(self.after) * self.rows else self.before
            return self.attend(q, k, v, site._replace(branches=names, sigma=self.sigma))
        out = [v[:0]] * len(self.after)
        for perturbations, blocks in self.groups[site.name].items():
            group_q, group_k, group_v = (_blocks(z, blocks, self.rows) for z in (q, k, v))  # (m · self.rows, h, n, d)
            group_site = site._replace(branches=tuple(self.after[block] for block in blocks), sigma=self.sigma)
            parts = compose(perturbations, self.attend)(group_q, group_k, group_v, group_site).split(self.rows)
            for block, part in zip(blocks, parts, strict=True):
                out[block] = part
        return torch.cat(out)


def _blocks(z: Tensor, blocks: Sequence[int], rows: int) -> Tensor:
    """The blocks of `rows` rows with these numbers, one after another; a view if they are neighbours."""
    if blocks[-1] - blocks[0] == len(blocks) - 1:
        return z[blocks[0] * rows : (blocks[-1] + 1) * rows]
    return torch.cat([z[i * rows : (i + 1) * rows] for i in blocks])


def compose(perturbations: Sequence[Perturbation], attend: Attend) -> Attend:
    """`attend` under the perturbations; each is handed what came before it."""
    for perturbation in perturbations:
        attend = partial(perturbed_attention, perturbation, attend)
    return attend


def perturbed_attention(perturbation: Perturbation, attend: Attend, q: Heads, k: KeyHeads, v: KeyHeads, site: Site) -> Heads:
    """The perturbation's output, checked."""
    return checked_out(perturbation(q, k, v, site, attend), v, perturbation, site)
