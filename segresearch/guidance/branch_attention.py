"""The attention of all branches in one batch: which rows are under which perturbations, at which site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.guidance.perturbations import Perturbation, checked_out
from segresearch.guidance.row_layout import Groups
from segresearch.models.attention import Attend, Heads, Site

Names = tuple[tuple[str, ...], ...]  # the branches that each block of rows belongs to


@dataclass(frozen=True)
class BranchAttention:
    """An `attend` for a batch of equal blocks of rows; at each site, blocks under the same perturbations go together.

    groups: the sites where any block is perturbed (`row_layout.Layout`). rows: of one block.
    before, after: branches of each block before the fork and after it. sigma: of the rows of one block.
    attend: the innermost attention, which all perturbations end in. Its site holds the branches of its rows and sigma.
    """

    groups: Mapping[str, Groups]
    rows: int
    before: Names
    after: Names
    attend: Attend
    sigma: Float[Tensor, " rows"] | None = None

    def __call__(self, q: Heads, k: Heads, v: Heads, site: Site) -> Heads:
        if site.name not in self.groups:
            names = self.after if len(v) == len(self.after) * self.rows else self.before
            return self.attend(q, k, v, Site(site.name, site.grid, names, self.sigma))
        out = [v[:0]] * len(self.after)
        for perturbations, blocks in self.groups[site.name].items():
            group_q, group_k, group_v = (_blocks(z, blocks, self.rows) for z in (q, k, v))  # (m · self.rows, h, n, d)
            group_site = Site(site.name, site.grid, tuple(self.after[block] for block in blocks), self.sigma)
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


def perturbed_attention(perturbation: Perturbation, attend: Attend, q: Heads, k: Heads, v: Heads, site: Site) -> Heads:
    """The perturbation's output, checked."""
    return checked_out(perturbation(q, k, v, site, attend), v, perturbation, site)
