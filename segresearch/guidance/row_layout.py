"""The rows of one forward pass: which branches share rows, and where the pass forks into a block of rows a branch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from segresearch.guidance.constants import constant
from segresearch.guidance.perturbations import Perturbation
from segresearch.guidance.terms import Branch

Perturbed = Mapping[str, tuple[Perturbation, ...]]  # the perturbations of one branch, by site
Groups = Mapping[tuple[Perturbation, ...], Sequence[int]]  # numbers of the blocks under the same perturbations


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
    def names_before(self) -> tuple[tuple[str, ...], ...]:
        """For each conditioning the names of all requested branches on it."""
        pairs = self.computed.items()
        return tuple(tuple(str(b) for b, same in pairs if same.conditioning == name) for name in self.conditionings)

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """For each branch the names of the requested branches that are equal to it."""
        pairs = self.computed.items()
        return tuple(tuple(str(b) for b, same in pairs if same == branch) for branch in self.branches)


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
