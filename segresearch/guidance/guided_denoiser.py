"""The guided denoiser: every branch that the active terms need, in one batched forward, with k-diffusion's contract.

x (b, 4, h, w) ─► [ before the fork: a block of b rows for each conditioning, computed once ]
               ─► [ from the first perturbed site on: a block of b rows for each branch, each with its own attention ]
               ─► D[branch] ─► D = D[base] + Σ s(σ)·(D[pos] − D[neg]) ─► post-processors
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segresearch.errors import InputError
from segresearch.guidance.controlnet_residuals import active, per_row, residuals
from segresearch.guidance.perturbations import Perturbation
from segresearch.guidance.postprocess import Latents, Post, Sigma, rescale
from segresearch.guidance.row_layout import BranchAttention, Layout, Perturbed, layout, row_index
from segresearch.guidance.sites import check_heads, select_sites
from segresearch.guidance.terms import Branch, Term
from segresearch.models.attention import Attend, Fork, sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import ActiveControlNet

Conds = Mapping[str, Cond]
Control = Sequence[ActiveControlNet] | None
# attributes of the plain denoiser, which the guided one has too
SCHEDULE = ("unet", "sigmas", "sigma_min", "sigma_max", "sigma_to_t", "t_to_sigma", "steps_offset")


class GuidedDenoiser:
    """model(x, sigma, conds=...) -> D = D[base] + Σ s(σ)·(D[pos] − D[neg]), then rescale, then the post-processors.

    Args:
        denoiser: the plain one, `denoiser(x, sigma, cond=, attend=, residuals=, fork=) -> denoised`; owns the network.
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
        self.denoiser, self.terms, self.base = denoiser, dict(terms), Branch(base)
        self.rescale, self.post, self.attend, self.fork = rescale, tuple(post), attend, fork
        self._heads: dict[str, int] = denoiser.unet.site_heads if self.terms else {}  # type: ignore[attr-defined]
        self._perturbed: dict[tuple[Perturbation, ...], Perturbed] = {(): {}}
        by_name: dict[str, Branch] = {}
        for term in self.terms.values():
            for branch in (term.pos, term.neg):
                other = by_name.setdefault(branch.name, branch).perturbations
                if other != branch.perturbations:
                    raise InputError(
                        f"two branches are named {branch.name!r}: {other} and {branch.perturbations}; rename one"
                    )
                if branch.perturbations not in self._perturbed:
                    self._perturbed[branch.perturbations] = perturbed_sites(branch.perturbations, self._heads)

    def __getattr__(self, name: str) -> Any:
        if name in SCHEDULE:
            return getattr(self.denoiser, name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def branches(self, sigma: float) -> list[Branch]:
        """The branches that are evaluated at this sigma, each once, base first."""
        active_terms = [term for term in self.terms.values() if term.pos != term.neg and term.scale_at(sigma)]
        return list(dict.fromkeys([self.base, *(branch for term in active_terms for branch in (term.pos, term.neg))]))

    def __call__(
        self, x: Latents, sigma: Sigma, conds: Conds, control: Control = None, attend: Attend | None = None
    ) -> Latents:
        """The guided denoised image. `attend`, if given, is the innermost attention of this call only.

        conds: by name; each of one row an image, or of one row for all. control: active ControlNets; their sum steers
        every branch, or with `guess` those of the base's conditioning. sigma may differ between rows: scales are taken
        per row, and a branch that any row needs is evaluated for all. attend sees the branches and sigma of its rows
        (`models.attention.Site`); a recorder is such a function (`segresearch.analysis.recorder`).

        Raises InputError for a conditioning that `conds` lacks, or with a wrong number of rows, and for control images
        that do not fit x.
        """
        values = sigma.tolist()  # the one time that sigma is read: on a GPU each waits for all that came before
        sigma = sigma.view_as(sigma)  # a tensor object of this call's own, see Site.sigma
        branches = list(dict.fromkeys(b for s in sorted(set(values)) for b in self.branches(s)))
        denoised = self.evaluate(x, sigma, branches, conds, control, attend, values)
        return self.combine(x, sigma, denoised, values=values)

    def prepare(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of calls, with all that is the same at every step computed now; `sample` calls this.

        These are the keys, values and embedding of each conditioning for every network (`Cond.projected`).
        Conditionings of equal values become one object, whose rows are then computed once. Results do not change.
        """
        control = active(arguments.get("control"))
        nets = [self.unet, *(one.net for one in control)]
        conds: dict[str, Cond] = {}
        for name, cond in (arguments.get("conds") or {}).items():
            same = next((other for other in conds.values() if other.equals(cond)), None)
            conds[name] = cond.projected(*nets) if same is None else same
        return {**arguments, "conds": Prepared(conds), **({"control": control} if "control" in arguments else {})}

    def layout(self, branches: Sequence[Branch], conds: Conds, control: Sequence[ActiveControlNet] = ()) -> Layout:
        """The rows of the forward that gives these branches. InputError for a conditioning that `conds` lacks.

        Names of one Cond are one conditioning, unless a ControlNet steers the base's alone.
        """
        missing = [branch.conditioning for branch in branches if branch.conditioning not in conds]
        if missing:
            names = ", ".join(map(repr, conds)) or "none"
            raise InputError(f"conds lacks {missing[0]!r}, which the guidance needs; given: {names}")
        conditionings = dict.fromkeys(branch.conditioning for branch in branches)
        first: dict[Any, str] = {}
        guess = any(net.guess for net in control)
        alias = {name: name if guess else first.setdefault(id(conds[name]), name) for name in conditionings}
        return layout(branches, self._perturbed, tuple(self._heads), alias, self.fork)

    def evaluate(
        self,
        x: Latents,
        sigma: Sigma,
        branches: Sequence[Branch],
        conds: Conds,
        control: Control = None,
        attend: Attend | None = None,
        values: Sequence[float] | None = None,
    ) -> dict[Branch, Latents]:
        """D of every branch, in one forward. values: sigma.tolist(), where the caller has read it."""
        rows, control = x.shape[0], active(control)
        plan = self.layout(branches, conds, control)
        conds = conds if isinstance(conds, Prepared) else Prepared(conds)
        control_residuals = residuals(
            self.denoiser, x, sigma, plan.conditionings, conds.joined, self.base.conditioning, control, values
        )
        fork = None
        if len(plan.branches) > len(plan.conditionings):
            index = row_index(plan.source, rows, x.device)
            if plan.fork is not None:
                fork = Fork(plan.fork, index)
            elif control_residuals is not None:
                control_residuals = control_residuals.each(lambda r: r[index])
        n = len(plan.inputs)
        denoised = self.denoiser(
            x.repeat(n, 1, 1, 1),  # (b, c, h, w) -> (n·b, c, h, w)
            sigma.repeat(n),
            cond=conds.joined(plan.inputs, rows),
            attend=BranchAttention(plan.groups, rows, *plan.names, attend or self.attend, sigma),
            residuals=control_residuals,
            fork=fork,
        )
        parts = dict(zip(plan.branches, denoised.split(rows), strict=True))  # (m·b, c, h, w) -> (b, c, h, w) each
        return {branch: parts[plan.computed[branch]] for branch in branches}

    def combine(
        self,
        x: Latents,
        sigma: Sigma,
        denoised: Mapping[Branch, Latents],
        extra: Latents | None = None,
        values: Sequence[float] | None = None,
    ) -> Latents:
        """The sum of the terms (and `extra`, one more), rescaled and post-processed. values: as for `evaluate`."""
        plain = guided = denoised[self.base]
        values = sigma.tolist() if values is None else values
        cfg_active = [False] * len(values)
        for term in self.terms.values():
            scales = [term.scale_at(s) for s in values]
            if term.pos == term.neg or not any(scales):
                continue
            guided = guided + per_row(scales, plain) * (denoised[term.pos] - denoised[term.neg])
            if term.mixes_conditionings:
                cfg_active = [active or bool(s) for active, s in zip(cfg_active, scales, strict=True)]
        if extra is not None:
            guided = guided + extra
        if self.rescale and any(cfg_active):
            rescaled = rescale(guided, plain, x, self.rescale)
            if not all(cfg_active):
                chosen = torch.tensor(cfg_active, device=x.device)[:, None, None, None]
                rescaled = torch.where(chosen, rescaled, guided)
            guided = rescaled
        for post in self.post:
            guided = post(guided, plain, x, sigma)
        return guided

    def __repr__(self) -> str:
        lines = ["D = " + " + ".join([f"D[{self.base}]", *map(str, self.terms.values())]).replace("+ -", "− ")]
        branches = [branch for term in self.terms.values() for branch in (term.pos, term.neg) if branch.perturbations]
        for branch in dict.fromkeys(branches):
            sites, names = len(self._perturbed[branch.perturbations]), ", then ".join(map(repr, branch.perturbations))
            lines.append(f"  {branch}: {names} at {sites} of {len(self._heads)} sites")
        if self.rescale:
            lines.append(f"  rescale {self.rescale:g}: in eps, against D[{self.base}], where conditionings are mixed")
        lines += [f"  then {post!r}" for post in self.post]
        terms = [t for t in self.terms.values() if t.pos != t.neg and (callable(t.scale) or t.scale)]
        branches = list(dict.fromkeys([self.base, *(b for t in terms for b in (t.pos, t.neg))]))
        alias = {branch.conditioning: branch.conditioning for branch in branches}
        plan = layout(branches, self._perturbed, tuple(self._heads), alias, self.fork)
        forked = f" -> {len(plan.branches)} from {plan.fork}" if plan.fork else ""
        return "\n".join([*lines, f"  rows per image: {len(plan.inputs)}{forked}"])


def perturbed_sites(perturbations: Sequence[Perturbation], heads: Mapping[str, int]) -> Perturbed:
    """Site name -> the perturbations there, in their order. heads: of every site, by its name.

    Raises InputError for a selector that matches no site, or a head that a site does not have.
    """
    sites: dict[str, tuple[Perturbation, ...]] = {}
    for perturbation in perturbations:
        for site in select_sites(perturbation.where, tuple(heads)):  # type: ignore[attr-defined]
            check_heads(getattr(perturbation, "heads", None), heads[site], site)
            sites[site] = (*sites.get(site, ()), perturbation)
    return sites


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


def _rows(name: str, cond: Cond, rows: int) -> Cond:
    if cond.rows == rows:
        return cond
    if cond.rows == 1:
        return cond.expand(rows)
    raise InputError(f"conds[{name!r}] has {cond.rows} rows for {rows} images; it needs {rows} or 1")
