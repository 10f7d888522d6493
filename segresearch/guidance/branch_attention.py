"""The attention of all branches in one batch: which rows are under which perturbations, at which site."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.guidance.perturbations import Perturbation, checked_out
from segresearch.models.attention import Attend, Site, Watched

Watch = Callable[[Tensor, Tensor, Site], None]  # (q, k, site), before any perturbation
# (q, k, v, site, branches): what the innermost attention is handed, under the perturbations. The rows are as many equal
# blocks as there are entries in `branches`, each with the names of the branches that it is computed for.
Note = Callable[[Tensor, Tensor, Tensor, Site, list[tuple[str, ...]]], None]
Groups = Mapping[tuple[Perturbation, ...], Sequence[int]]  # the blocks of rows under the same perturbations


@dataclass(frozen=True)
class BlockAttention:
    """An `attend` for a batch of equal blocks of rows; at each site, blocks under the same perturbations go together.

    plan: the sites where any block is perturbed. rows: of one block. blocks: how many after the fork. before, after:
    names of the branches that each block serves, before the fork and after it; only `note` reads them.
    """

    plan: Mapping[str, Groups]
    rows: int
    blocks: int
    attend: Attend
    before: Sequence[tuple[str, ...]] = ()
    after: Sequence[tuple[str, ...]] = ()
    watch: Watch | None = None
    note: Note | None = None

    def queried(self, site: Site, rows: int) -> int:
        """Leading rows that need q and k here: those up to the last block that is not under `values_only`."""
        if site.name not in self.plan or rows != self.rows * self.blocks:
            return rows
        groups = self.plan[site.name].items()
        needed = [block for perturbations, blocks in groups if not values_only(perturbations) for block in blocks]
        return self.rows * (max(needed) + 1) if needed else 0

    def __call__(
        self,
        q: Float[Tensor, "rows_q heads tokens dim"],
        k: Float[Tensor, "rows_q heads tokens dim"],
        v: Float[Tensor, "rows heads tokens dim"],
        site: Site,
    ) -> Float[Tensor, "rows heads tokens dim"]:
        if self.watch is not None:
            self.watch(q, k, site)
        if site.name not in self.plan:
            return self._noted(self.after if len(v) == self.blocks * self.rows else self.before)(q, k, v, site)
        out = [v[:0]] * self.blocks
        for perturbations, blocks in self.plan[site.name].items():
            own = _chosen(v, blocks, self.rows)
            unasked = values_only(perturbations)  # these rows have no q and k
            mine = (own, own) if unasked else (_chosen(q, blocks, self.rows), _chosen(k, blocks, self.rows))
            through = _through(perturbations, self._noted([self.after[i] for i in blocks]))
            for block, part in zip(blocks, through(*mine, own, site).split(self.rows), strict=True):
                out[block] = part
        return torch.cat(out)

    def _noted(self, blocks: Sequence[tuple[str, ...]]) -> Attend:
        note = self.note
        if note is None:
            return self.attend
        return Watched(self.attend, lambda q, k, v, site: note(q, k, v, site, list(blocks)))


def values_only(perturbations: Sequence[Perturbation]) -> bool:
    """Whether the last of them, which decides, reads neither q nor k (`PAG`)."""
    return len(perturbations) > 0 and getattr(perturbations[-1], "values_only", False)


def _chosen(z: Tensor, blocks: Sequence[int], rows: int) -> Tensor:
    """The blocks of `rows` rows with these numbers, one after another; a view if they are neighbours."""
    if blocks[-1] - blocks[0] == len(blocks) - 1:
        return z[blocks[0] * rows : (blocks[-1] + 1) * rows]
    return torch.cat([z[i * rows : (i + 1) * rows] for i in blocks])


def _through(perturbations: Sequence[Perturbation], attend: Attend) -> Attend:
    """`attend` under the perturbations; each is handed what came before it."""
    for perturbation in perturbations:
        attend = _under(perturbation, attend)
    return attend


def _under(perturbation: Perturbation, attend: Attend) -> Attend:
    return lambda q, k, v, site: checked_out(perturbation(q, k, v, site, attend), v, perturbation, site)
