"""The guided denoiser: every branch that the active terms need, in one batched forward, with k-diffusion's contract.

x (b, 4, h, w) ─► [ before the fork: a block of b rows for each conditioning, computed once ]
               ─► [ from the first perturbed site on: a block of b rows for each branch, each with its own attention ]
               ─► D[branch] ─► D = D[base] + Σ s(σ)·(D[pos] − D[neg]) ─► post-processors
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.guidance.control import residuals
from segresearch.guidance.perturbations import Perturbation, checked_out
from segresearch.guidance.postprocess import Post, rescale
from segresearch.guidance.select import check_heads, select_sites
from segresearch.guidance.terms import Branch, Term
from segresearch.models.attention import Attend, Fork, Site, Watched, sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import Controlled
from segresearch.models.unet import Control

# read through from the inner denoiser
SCHEDULE = ("unet", "sigmas", "sigma_min", "sigma_max", "sigma_to_t", "t_to_sigma", "steps_offset")
Watch = Callable[[Tensor, Tensor, Site], None]  # (q, k, site), before any perturbation
# (q, k, v, site, branches): what the innermost attention is handed, under the perturbations. The rows are as many equal
# blocks as there are entries in `branches`, each with the names of the branches that it is computed for.
Note = Callable[[Tensor, Tensor, Tensor, Site, list[tuple[str, ...]]], None]
Record = Callable[[Tensor], Note | None]  # called once per forward with its sigma (rows,); None: not this one


class GuidedDenoiser:
    """model(x, sigma, conds=...) -> D = D[base] + Σ s(σ)·(D[pos] − D[neg]), then rescale, then the post-processors.

    Args:
        denoiser: the plain one, `denoiser(x, sigma, cond=, attend=, control=, fork=) -> denoised`; owns the network.
        terms: by any names of yours; {} is the plain prediction.
        base: the conditioning that the terms are added to.
        rescale: φ of `postprocess.rescale`, 0 is off. As in the official code it acts in eps space, against D[base],
            and only where classifier-free guidance (a term between two unperturbed conditionings) is on.
        post: post-processors, in order, after rescale.
        attend: the innermost attention, which every perturbation ends in.
        fork: compute rows that are still equal once. Exact either way; False is there to prove it.

    It holds no state: a call that raises leaves nothing behind. `sigmas`, `sigma_min` and the like are the denoiser's.

    Raises ValueError for a selector that matches no site, a head that does not exist, one branch name for two contents,
    a rescale outside [0, 1].
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        terms: Mapping[str, Term],
        base: str = "cond",
        rescale: float | int = 0.0,
        post: Sequence[Post] = (),
        attend: Attend = sdpa,
        fork: bool = True,
    ):
        if isinstance(denoiser, GuidedDenoiser) or isinstance(getattr(denoiser, "inner", None), GuidedDenoiser):
            raise ValueError(
                "a GuidedDenoiser takes the plain denoiser, not a guided one; put all terms into one GuidedDenoiser"
            )
        for name, term in terms.items():
            if not isinstance(term, Term):
                raise ValueError(f"terms[{name!r}] is {term!r}; a term is cfg(...), perturbed(...) or Term(...)")
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1], got {rescale!r}")
        self.denoiser = denoiser
        self.terms = dict(terms)
        self.base = Branch(base)
        self.rescale = rescale
        self.post = tuple(post)
        self.attend = attend
        self.fork = fork
        self._places: dict[Branch, dict[str, tuple[Perturbation, ...]]] = {}
        named: dict[str, Branch] = {}
        for term in self.terms.values():
            for branch in (term.pos, term.neg):
                other = named.setdefault(branch.name, branch).perturbations
                if other != branch.perturbations:
                    raise ValueError(
                        f"two branches are named {branch.name!r}: {other} and {branch.perturbations}; rename one"
                    )
                if branch.perturbations and branch not in self._places:
                    self._places[branch] = self._place(branch)

    def _place(self, branch: Branch) -> dict[str, tuple[Perturbation, ...]]:
        """Site name -> the branch's perturbations there, in their order."""
        places: dict[str, tuple[Perturbation, ...]] = {}
        heads: dict[str, int] = self.denoiser.unet.site_heads  # type: ignore[attr-defined]
        for perturbation in branch.perturbations:
            for site in select_sites(perturbation.where, tuple(heads)):  # type: ignore[attr-defined]
                check_heads(getattr(perturbation, "heads", None), heads[site], site)
                places[site] = (*places.get(site, ()), perturbation)
        return places

    def __getattr__(self, name: str) -> Any:
        if name in SCHEDULE:
            return getattr(self.denoiser, name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def branches(self, sigma: float) -> list[Branch]:
        """What is evaluated at this sigma, each once, base first."""
        active = [term for term in self.terms.values() if term.pos != term.neg and term.scale_at(sigma)]
        return list(dict.fromkeys([self.base, *(branch for term in active for branch in (term.pos, term.neg))]))

    def __call__(
        self,
        x: Float[Tensor, "rows c h w"],
        sigma: Float[Tensor, " rows"],
        conds: Mapping[str, Cond],
        control: Sequence[Controlled] | None = None,
        attend: Attend | None = None,
        record: Record | None = None,
    ) -> Float[Tensor, "rows c h w"]:
        """The guided denoised image. `attend`, if given, is the innermost attention of this call only.

        `record` is shown what the innermost attention sees (`segresearch.analysis.record`); it changes no output bit.

        conds: by name; each of one row an image, or of one row for all. control: ControlNets in use; their sum steers
        every branch, or with `guess` those of the base's conditioning. sigma may differ between rows: scales are taken
        per row, and a branch that any row needs is evaluated for all.

        Raises ValueError for a conditioning that `conds` lacks, or with a wrong number of rows, and for control images
        that do not fit x.
        """
        branches = list(dict.fromkeys(b for s in sorted(set(sigma.tolist())) for b in self.branches(s)))
        return self.combine(x, sigma, self.evaluate(x, sigma, branches, conds, control, attend, record=record))

    def evaluate(
        self,
        x: Float[Tensor, "rows c h w"],
        sigma: Float[Tensor, " rows"],
        branches: Sequence[Branch],
        conds: Mapping[str, Cond],
        control: Sequence[Controlled] | None = None,
        attend: Attend | None = None,
        watch: Watch | None = None,
        record: Record | None = None,
    ) -> dict[Branch, Float[Tensor, "rows c h w"]]:
        """D of every branch, in one forward. The rows of branches[0] come first everywhere, so a `watch` finds them."""
        names = list(dict.fromkeys(branch.conditioning for branch in branches))
        missing = [name for name in names if name not in conds]
        if missing:
            given = ", ".join(map(repr, conds)) or "none"
            raise ValueError(f"conds lacks {missing[0]!r}, which the guidance needs; given: {given}")
        rows, site = x.shape[0], self._fork_site(branches) if self.fork else None
        own = {name: _rows(name, conds[name], rows) for name in names}
        steered = residuals(self.denoiser, x, sigma, own, self.base.conditioning, control or ())
        blocks = [branch.conditioning for branch in branches] if site is None else names
        fork = None
        if len(branches) > len(names):
            start = torch.tensor([names.index(branch.conditioning) * rows for branch in branches], device=x.device)
            index = (start[:, None] + torch.arange(rows, device=x.device)).flatten()  # (branches · b,)
            if site is not None:
                fork = Fork(site, index)
            elif steered is not None:
                steered = Control(tuple(r[index] for r in steered.down), steered.mid[index])
        n = len(blocks)
        denoised = self.denoiser(
            x.repeat(n, 1, 1, 1),  # (b, c, h, w) -> (n·b, c, h, w)
            sigma.repeat(n),
            cond=Cond.cat([own[name] for name in blocks]),
            attend=self._attention(branches, rows, attend or self.attend, watch, record and record(sigma)),
            control=steered,
            fork=fork,
        )
        return dict(zip(branches, denoised.split(rows), strict=True))  # (branches · b, c, h, w) -> (b, c, h, w) each

    def combine(
        self,
        x: Float[Tensor, "rows c h w"],
        sigma: Float[Tensor, " rows"],
        denoised: Mapping[Branch, Float[Tensor, "rows c h w"]],
        extra: Float[Tensor, "rows c h w"] | None = None,
    ) -> Float[Tensor, "rows c h w"]:
        """The sum of the terms (and `extra`, one more), rescaled and post-processed."""
        plain = guided = denoised[self.base]
        mixed = torch.zeros_like(sigma, dtype=torch.bool)
        for term in self.terms.values():
            scale = torch.tensor([term.scale_at(s) for s in sigma.tolist()], dtype=plain.dtype, device=plain.device)
            if term.pos == term.neg or not scale.any():
                continue
            guided = guided + scale[:, None, None, None] * (denoised[term.pos] - denoised[term.neg])
            if term.mixes_conditionings:
                mixed = mixed | (scale != 0)
        if extra is not None:
            guided = guided + extra
        if self.rescale and mixed.any():
            guided = torch.where(mixed[:, None, None, None], rescale(guided, plain, x, self.rescale), guided)
        for post in self.post:
            guided = post(guided, plain, x, sigma)
        return guided

    def _fork_site(self, branches: Sequence[Branch]) -> str | None:
        """The first perturbed site, if any conditioning is asked for more than once."""
        if len(branches) == len({branch.conditioning for branch in branches}):
            return None
        perturbed = {site for branch in branches for site in self._places.get(branch, ())}
        return next(site for site in self.unet.site_heads if site in perturbed)

    def _attention(
        self, branches: Sequence[Branch], rows: int, attend: Attend, watch: Watch | None, note: Note | None
    ) -> Attend:
        """The attention of all branches: at each site, blocks of rows under the same perturbations go together."""
        sites = {site for branch in branches for site in self._places.get(branch, ())}
        plan: dict[str, dict[tuple[Perturbation, ...], list[int]]] = {site: {} for site in sites}
        for site, groups in plan.items():
            for block, branch in enumerate(branches):
                groups.setdefault(self._places.get(branch, {}).get(site, ()), []).append(block)

        after: list[tuple[str, ...]] = [(str(branch),) for branch in branches]  # the fork: a block for each branch
        conditionings = list(dict.fromkeys(branch.conditioning for branch in branches))  # before it: for each of these
        before = [tuple(str(b) for b in branches if b.conditioning == name) for name in conditionings]

        def noted(blocks: list[tuple[str, ...]]) -> Attend:
            return attend if note is None else Watched(attend, lambda q, k, v, site: note(q, k, v, site, blocks))

        def composed(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
            if watch is not None:
                watch(q, k, site)
            if site.name not in plan:
                return noted(after if len(q) == len(after) * rows else before)(q, k, v, site)
            out = [v[:0]] * len(branches)
            for perturbations, blocks in plan[site.name].items():
                mine = [_blocks(z, blocks, rows) for z in (q, k, v)]
                inner = noted([after[i] for i in blocks])
                parts = _through(perturbations, inner)(mine[0], mine[1], mine[2], site).split(rows)
                for block, part in zip(blocks, parts, strict=True):
                    out[block] = part
            return torch.cat(out)

        return composed

    def __repr__(self) -> str:
        lines = ["D = " + " + ".join([f"D[{self.base}]", *map(str, self.terms.values())]).replace("+ -", "− ")]
        for branch, places in self._places.items():
            what = ", then ".join(map(repr, branch.perturbations))
            lines.append(f"  {branch}: {what} at {len(places)} of {len(self.unet.site_heads)} sites")
        if self.rescale:
            lines.append(f"  rescale {self.rescale:g}: in eps, against D[{self.base}], where conditionings are mixed")
        lines += [f"  then {post!r}" for post in self.post]
        constant = [t for t in self.terms.values() if t.pos != t.neg and (callable(t.scale) or t.scale)]
        branches = list(dict.fromkeys([self.base, *(b for t in constant for b in (t.pos, t.neg))]))
        site = self._fork_site(branches) if self.fork else None
        first = len({b.conditioning for b in branches}) if site else len(branches)
        lines.append(f"  rows per image: {first}" + (f" -> {len(branches)} from {site}" if site else ""))
        return "\n".join(lines)


def _blocks(z: Tensor, blocks: Sequence[int], rows: int) -> Tensor:
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


def _rows(name: str, cond: Cond, rows: int) -> Cond:
    if cond.rows == rows:
        return cond
    if cond.rows == 1:
        return cond[[0] * rows]
    raise ValueError(f"conds[{name!r}] has {cond.rows} rows for {rows} images; it needs {rows} or 1")
