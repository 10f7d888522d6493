"""The guided denoiser: every branch that the active terms need, in one batched forward, with k-diffusion's contract.

x (b, 4, h, w) ─► [ before the fork: a block of b rows for each conditioning, computed once ]
               ─► [ from the first perturbed site on: a block of b rows for each branch, each with its own attention ]
               ─► D[branch] ─► D = D[base] + Σ s(σ)·(D[pos] − D[neg]) ─► post-processors
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.errors import InputError
from segresearch.guidance.branch_attention import BlockAttention, Groups, Note, Watch
from segresearch.guidance.constants import constant
from segresearch.guidance.controlnet_residuals import in_use, per_row, residuals
from segresearch.guidance.perturbations import Perturbation
from segresearch.guidance.postprocess import Post, rescale
from segresearch.guidance.sites import check_heads, select_sites
from segresearch.guidance.terms import Branch, Term
from segresearch.models.attention import Attend, Fork, sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import Controlled
from segresearch.models.unet import Control

# read through from the inner denoiser
SCHEDULE = ("unet", "sigmas", "sigma_min", "sigma_max", "sigma_to_t", "t_to_sigma", "steps_offset")
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
            raise InputError(
                "a GuidedDenoiser takes the plain denoiser, not a guided one; put all terms into one GuidedDenoiser"
            )
        for name, term in terms.items():
            if not isinstance(term, Term):
                raise InputError(f"terms[{name!r}] is {term!r}; a term is cfg(...), perturbed(...) or Term(...)")
        if not 0 <= rescale <= 1:
            raise InputError(f"rescale must be in [0, 1], got {rescale!r}")
        self.denoiser = denoiser
        self.terms = dict(terms)
        self.base = Branch(base)
        self.rescale = rescale
        self.post = tuple(post)
        self.attend = attend
        self.fork = fork
        self._sites: tuple[str, ...] = tuple(denoiser.unet.site_heads) if self.terms else ()  # type: ignore[attr-defined]
        self._places: dict[tuple[Perturbation, ...], dict[str, tuple[Perturbation, ...]]] = {(): {}}
        named: dict[str, Branch] = {}
        for term in self.terms.values():
            for branch in (term.pos, term.neg):
                other = named.setdefault(branch.name, branch).perturbations
                if other != branch.perturbations:
                    raise InputError(
                        f"two branches are named {branch.name!r}: {other} and {branch.perturbations}; rename one"
                    )
                if branch.perturbations not in self._places:
                    self._places[branch.perturbations] = self._place(branch.perturbations)

    def _place(self, perturbations: Sequence[Perturbation]) -> dict[str, tuple[Perturbation, ...]]:
        """Site name -> the perturbations there, in their order."""
        places: dict[str, tuple[Perturbation, ...]] = {}
        heads: dict[str, int] = self.denoiser.unet.site_heads  # type: ignore[attr-defined]
        for perturbation in perturbations:
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

        `record` is shown what the innermost attention sees (`segresearch.analysis.recorder`); it changes no output bit.

        conds: by name; each of one row an image, or of one row for all. control: ControlNets in use; their sum steers
        every branch, or with `guess` those of the base's conditioning. sigma may differ between rows: scales are taken
        per row, and a branch that any row needs is evaluated for all.

        Raises ValueError for a conditioning that `conds` lacks, or with a wrong number of rows, and for control images
        that do not fit x.
        """
        values = sigma.tolist()  # the one time that sigma is read: on a GPU each waits for all that came before
        branches = list(dict.fromkeys(b for s in sorted(set(values)) for b in self.branches(s)))
        denoised = self.evaluate(x, sigma, branches, conds, control, attend, record=record, values=values)
        return self.combine(x, sigma, denoised, values=values)

    def prepare(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of calls, with all that is the same at every step computed now; `sample` calls this.

        Every network's keys, values and embedding of each conditioning (`Cond.projected`); and conditionings of equal
        values as one object, whose rows are then computed once. The calls' results do not change.
        """
        made: dict[str, Cond] = {}
        control = in_use(arguments.get("control"))
        nets = [self.unet, *(one.net for one in control)]
        for name, cond in (arguments.get("conds") or {}).items():
            same = next((other for other in made.values() if other.equals(cond)), None)
            made[name] = cond.projected(*nets) if same is None else same
        return {**arguments, "conds": Prepared(made), **({"control": control} if "control" in arguments else {})}

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
        values: Sequence[float] | None = None,
    ) -> dict[Branch, Float[Tensor, "rows c h w"]]:
        """D of every branch, in one forward. The rows of branches[0] come first everywhere, so a `watch` finds them.

        values: sigma.tolist(), where the caller has read it.
        """
        missing = [branch.conditioning for branch in branches if branch.conditioning not in conds]
        if missing:
            given = ", ".join(map(repr, conds)) or "none"
            raise InputError(f"conds lacks {missing[0]!r}, which the guidance needs; given: {given}")
        control = in_use(control)
        # names of one Cond are one conditioning, unless a ControlNet tells the base from the others
        first: dict[int, str] = {}
        apart = any(one.guess for one in control)
        merged = {
            b: b if apart else replace(b, conditioning=first.setdefault(id(conds[b.conditioning]), b.conditioning))
            for b in branches
        }
        asked = sorted(dict.fromkeys(merged.values()), key=lambda branch: bool(branch.perturbations))
        names = list(dict.fromkeys(branch.conditioning for branch in asked))
        rows, site = x.shape[0], self._fork_site(asked) if self.fork else None
        conds = conds if isinstance(conds, Prepared) else Prepared(conds)
        steered = residuals(self.denoiser, x, sigma, names, conds.joined, self.base.conditioning, control, values)
        blocks = [branch.conditioning for branch in asked] if site is None else names
        fork = None
        if len(asked) > len(names):
            index = _copies(tuple(names.index(branch.conditioning) for branch in asked), rows, x.device)
            if site is not None:
                fork = Fork(site, index)
            elif steered is not None:
                steered = Control(tuple(r[index] for r in steered.down), steered.mid[index])
        n = len(blocks)
        served = {a: tuple(str(b) for b in branches if merged[b] == a) for a in asked}
        denoised = self.denoiser(
            x.repeat(n, 1, 1, 1),  # (b, c, h, w) -> (n·b, c, h, w)
            sigma.repeat(n),
            cond=conds.joined(blocks, rows),
            attend=BlockAttention(
                self._plan(asked),
                rows,
                len(asked),
                attend or self.attend,
                [tuple(str(b) for b in branches if merged[b].conditioning == name) for name in names],
                list(served.values()),
                watch,
                record and record(sigma),
            ),
            control=steered,
            fork=fork,
        )
        found = dict(zip(asked, denoised.split(rows), strict=True))  # (asked · b, c, h, w) -> (b, c, h, w) each
        return {branch: found[merged[branch]] for branch in branches}

    def combine(
        self,
        x: Float[Tensor, "rows c h w"],
        sigma: Float[Tensor, " rows"],
        denoised: Mapping[Branch, Float[Tensor, "rows c h w"]],
        extra: Float[Tensor, "rows c h w"] | None = None,
        values: Sequence[float] | None = None,
    ) -> Float[Tensor, "rows c h w"]:
        """The sum of the terms (and `extra`, one more), rescaled and post-processed. values: as for `evaluate`."""
        plain = guided = denoised[self.base]
        values = sigma.tolist() if values is None else values
        mixed = [False] * len(values)
        for term in self.terms.values():
            scales = [term.scale_at(s) for s in values]
            if term.pos == term.neg or not any(scales):
                continue
            guided = guided + per_row(scales, plain) * (denoised[term.pos] - denoised[term.neg])
            if term.mixes_conditionings:
                mixed = [m or bool(s) for m, s in zip(mixed, scales, strict=True)]
        if extra is not None:
            guided = guided + extra
        if self.rescale and any(mixed):
            rescaled = rescale(guided, plain, x, self.rescale)
            if not all(mixed):
                chosen = torch.tensor(mixed, device=x.device)[:, None, None, None]
                rescaled = torch.where(chosen, rescaled, guided)
            guided = rescaled
        for post in self.post:
            guided = post(guided, plain, x, sigma)
        return guided

    def _fork_site(self, branches: Sequence[Branch]) -> str | None:
        """The first perturbed site, if any conditioning is asked for more than once."""
        if len(branches) == len({branch.conditioning for branch in branches}):
            return None
        perturbed = {site for branch in branches for site in self._places[branch.perturbations]}
        return next(site for site in self._sites if site in perturbed)

    def _plan(self, branches: Sequence[Branch]) -> dict[str, Groups]:
        """At every site that any branch perturbs: the numbers of the branches under the same perturbations."""
        places = [self._places[branch.perturbations] for branch in branches]
        plan: dict[str, dict[tuple[Perturbation, ...], list[int]]] = {site: {} for place in places for site in place}
        for site, groups in plan.items():
            for block, place in enumerate(places):
                groups.setdefault(place.get(site, ()), []).append(block)
        return dict(plan)

    def __repr__(self) -> str:
        lines = ["D = " + " + ".join([f"D[{self.base}]", *map(str, self.terms.values())]).replace("+ -", "− ")]
        asked = [branch for term in self.terms.values() for branch in (term.pos, term.neg) if branch.perturbations]
        for branch in dict.fromkeys(asked):
            what, places = ", then ".join(map(repr, branch.perturbations)), self._places[branch.perturbations]
            lines.append(f"  {branch}: {what} at {len(places)} of {len(self._sites)} sites")
        if self.rescale:
            lines.append(f"  rescale {self.rescale:g}: in eps, against D[{self.base}], where conditionings are mixed")
        lines += [f"  then {post!r}" for post in self.post]
        constant = [t for t in self.terms.values() if t.pos != t.neg and (callable(t.scale) or t.scale)]
        branches = list(dict.fromkeys([self.base, *(b for t in constant for b in (t.pos, t.neg))]))
        site = self._fork_site(branches) if self.fork else None
        first = len({b.conditioning for b in branches}) if site else len(branches)
        lines.append(f"  rows per image: {first}" + (f" -> {len(branches)} from {site}" if site else ""))
        return "\n".join(lines)


class Prepared(Mapping[str, Cond]):
    """Conditionings by name, for a run of calls: what a batch needs of several is joined at its first call.

    It cannot be changed; for other conditionings call `prepare` again.
    """

    def __init__(self, conds: Mapping[str, Cond]):
        self._conds = dict(conds)
        self.joins: dict[tuple[tuple[str, ...], int], Cond] = {}

    def __getitem__(self, name: str) -> Cond:
        return self._conds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._conds)

    def __len__(self) -> int:
        return len(self._conds)

    def joined(self, names: Sequence[str], rows: int) -> Cond:
        """`rows` rows of each of these conditionings, one after another."""
        key = (tuple(names), rows)
        if key not in self.joins:
            self.joins[key] = Cond.cat([_rows(name, self[name], rows) for name in names])
        return self.joins[key]


@constant
def _copies(blocks: tuple[int, ...], rows: int, device: torch.device) -> Int[Tensor, " rows_out"]:
    """The row numbers of these blocks of `rows` rows, one block after another; made once, not once a step."""
    return torch.tensor([block * rows + row for block in blocks for row in range(rows)], device=device)


def _rows(name: str, cond: Cond, rows: int) -> Cond:
    if cond.rows == rows:
        return cond
    if cond.rows == 1:
        return cond.expand(rows)
    raise InputError(f"conds[{name!r}] has {cond.rows} rows for {rows} images; it needs {rows} or 1")
