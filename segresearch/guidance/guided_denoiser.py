"""The guided denoiser: every branch that the active terms need, in one batched forward, with k-diffusion's contract.

x (b, 4, h, w) ─► [ before the fork: a part of b rows for each conditioning, computed once ]
               ─► [ from the first perturbed site on: a part of b rows for each branch, perturbed in its own way ]
               ─► D[branch] ─► D = D[base] + Σ s(σ)·(D[pos] − D[neg]) ─► post-processors

Branches on other inputs (a view) or of another network have a forward of their own, of the same form.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from segresearch.errors import InputError
from segresearch.guidance.conditionings import Prepared, made, with_rows
from segresearch.guidance.controlnet_residuals import active, per_row, residuals
from segresearch.guidance.formula import formula
from segresearch.guidance.perturbations import Perturbation, checked_out, site_kind
from segresearch.guidance.postprocess import rescale
from segresearch.guidance.row_layout import (
    BranchAttention,
    BranchCalls,
    Layout,
    Pass,
    Perturbed,
    layout,
    past_of,
    perturbed_sites,
    row_index,
)  # fmt: skip
from segresearch.guidance.step import Latents, Post, Sigma, Step
from segresearch.guidance.terms import Branch, Term
from segresearch.models.attention import Attend, Fork, plain, sdpa
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import ActiveControlNet
from segresearch.sampling.intervals import check_reach
from segresearch.sampling.memory import Past, Run

Conds = Mapping[str, Cond]
Control = Sequence[ActiveControlNet] | None
# attributes of the plain denoiser, which the guided one has too
SCHEDULE = (
    "unet", "sigmas", "sigma_min", "sigma_max", "sigma_to_t", "t_to_sigma", "steps_offset", "schedule", "timesteps",
)  # fmt: skip


class GuidedDenoiser:
    """model(x, sigma, conds=...) -> D = D[base] + Σ s(σ)·(D[pos] − D[neg]), then rescale, then the post-processors.

    Args:
        denoiser: the plain one, `denoiser(x, sigma, cond=, attend=, wrap=, residuals=, fork=) -> denoised`; owns the
            network.
        terms: by any names of yours; {} is the plain prediction.
        base: the conditioning that the terms are added to.
        rescale: φ of `postprocess.rescale`, 0 is off. As in the official code it acts in eps space, against D[base],
            and only where classifier-free guidance (a term between two unperturbed conditionings) is on.
        post: post-processors, in order, after rescale.
        attend: the innermost attention, which every perturbation ends in.
        fork: compute rows that are still equal once. Exact either way; False is there to prove it.
        every: perturbations of every branch on a conditioning, by its name; "*" is all of them.
        conditionings: conditionings that are made from others, by name, at every evaluation or, where they are
            `static`, once a run; each a call (conds, sigma, keys) -> Cond. One of an existing name takes its place.
            Those made from texts have `encode(sd, prompts, negative, size, settings)` instead; `conds` must hold its
            result.
        networks: denoisers of further networks, by the names that `Weak` uses.

    It holds no state: a call that raises leaves nothing behind, and what methods remember is in the `Run` of a
    `sample`. `sigmas`, `sigma_min` and the like are the denoiser's.

    Raises ValueError for a selector that matches no site, a head that does not exist, one branch name for two contents,
    a network that is not there, a rescale outside [0, 1].
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
        every: Mapping[str, Any] | None = None,
        conditionings: Mapping[str, Any] | None = None,
        networks: Mapping[str, Callable[..., Tensor]] | None = None,
    ):
        if isinstance(denoiser, GuidedDenoiser) or isinstance(getattr(denoiser, "inner", None), GuidedDenoiser):
            raise InputError("a GuidedDenoiser takes the plain denoiser, not a guided one; put all terms into one")
        for name, term in terms.items():
            if not isinstance(term, Term):
                raise InputError(f"terms[{name!r}] is {term!r}; a term is cfg(...), perturbed(...) or Term(...)")
            check_reach(term.interval, denoiser, f"terms[{name!r}]")
        if not 0 <= rescale <= 1:
            raise InputError(f"rescale must be in [0, 1], got {rescale!r}")
        self.denoiser, self.terms, self.base = denoiser, dict(terms), Branch(base)
        self.rescale, self.post, self.attend, self.fork = rescale, tuple(post), attend, fork
        for processor in post:
            if not callable(processor) or isinstance(processor, type):
                raise InputError(f"a post-processor is a call (guided, step) -> guided, got {processor!r}")
        for name, perturbations in (every or {}).items():
            if not isinstance(perturbations, Sequence):
                raise InputError(f"every[{name!r}] is {perturbations!r}; give a list of perturbations")
        for name, make in (conditionings or {}).items():
            if not callable(make) and not hasattr(make, "encode"):
                raise InputError(f"conditionings[{name!r}] is {make!r}; give a call (conds, sigma, keys) -> Cond")
        self.every = {name: tuple(perturbations) for name, perturbations in (every or {}).items()}
        self.conditionings, self.networks = dict(conditionings or {}), {"": denoiser, **(networks or {})}
        self._sites: dict[str, tuple[dict[str, dict[str, int]], tuple[str, ...]]] = {}
        self._perturbed: dict[tuple[Perturbation, ...], Perturbed] = {(): {}}
        by_name: dict[str, Branch] = {}
        for branch in [self.base, *(branch for term in self.terms.values() for branch in term.branches)]:
            other = by_name.setdefault(branch.name, branch).perturbations
            if other != branch.perturbations:
                both = f"{other} and {branch.perturbations}"
                raise InputError(f"two branches are named {branch.name!r}: {both}; rename one")
            try:
                self.perturbed(self.complete(branch))
            except InputError as error:
                raise InputError(f"branch {self.complete(branch)}: {error}") from error

    def __getattr__(self, name: str) -> Any:
        if name in SCHEDULE:
            return getattr(self.denoiser, name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def complete(self, branch: Branch) -> Branch:
        """The branch with the perturbations of every branch on its conditioning, which come first."""
        every = (*self.every.get("*", ()), *self.every.get(branch.conditioning, ()))
        if not every:
            return branch
        return replace(branch, perturbations=(*every, *branch.perturbations), name=branch.name or "every")

    def pass_of(self, branch: Branch) -> Pass:
        """The forward that a complete branch is computed in. InputError for a network that is not there."""
        names = [p.network for p in branch.perturbations if site_kind(p) == "network"]  # type: ignore[attr-defined]
        views = [p for p in branch.perturbations if site_kind(p) == "view"]
        if names and names[-1] not in self.networks:
            known = ", ".join(map(repr, [*self.networks][1:])) or "none"
            raise InputError(f"no network {names[-1]!r} in `networks`; there are {known}")
        if len(views) > 1 or len(names) > 1:
            raise InputError("two views or two networks of one branch")
        return Pass(*names[:1], *views[:1]) if names else Pass("", *views[:1])

    def sites(self, network: str) -> tuple[dict[str, dict[str, int]], tuple[str, ...]]:
        """Of a network the sites of every kind with their heads, and all of them in the order of a forward pass."""
        if network not in self._sites:
            unet = self.networks[network].unet  # type: ignore[attr-defined]
            self._sites[network] = unet.sites_by_kind, unet.all_sites
        return self._sites[network]

    def perturbed(self, branch: Branch) -> Perturbed:
        """The perturbations of a complete branch, by site."""
        if branch.perturbations not in self._perturbed:
            network = self.pass_of(branch).network
            if getattr(self.networks[network], "timesteps", 1) is None:
                for p in branch.perturbations:
                    if getattr(p, "in_timesteps", False):
                        raise InputError(f"{p} is in timesteps, and an EDM model has none, but ln(σ)/4")
            kinds, _ = self.sites(network)
            self._perturbed[branch.perturbations] = perturbed_sites(branch.perturbations, kinds)
        return self._perturbed[branch.perturbations]

    def branches(self, sigma: float, run: Run | None = None) -> list[Branch]:
        """The branches that are evaluated at this sigma, each once, base first."""
        active_terms = [term for name, term in self.terms.items() if term.acts(sigma, run, name)]
        return list(dict.fromkeys([self.base, *(branch for term in active_terms for branch in term.branches)]))

    def negative(self, sigma: float, run: Run | None = None) -> Branch:
        """The negative of classifier-free guidance where that is on, else the base. A conditioning that is made from
        others is no negative, but for one in the place of uncond."""
        terms = ((n, t) for n, t in self.terms.items() if t.mixes_conditionings and t.acts(sigma, run, n))
        given = (t.neg for _, t in terms if t.neg.conditioning not in {*self.conditionings} - {"uncond"})
        return next(given, self.base)

    def __call__(
        self,
        x: Latents,
        sigma: Sigma,
        conds: Conds,
        control: Control = None,
        attend: Attend | None = None,
        run: Run | None = None,
    ) -> Latents:
        """The guided denoised image. `attend`, if given, is the innermost attention of this call only.

        conds: by name; each of one row an image, or of one row for all. control: active ControlNets; their sum steers
        every branch, or with `guess` those of the base's conditioning. sigma may differ between rows: scales are taken
        per row, and a branch that any row needs is evaluated for all. attend sees the branches and sigma of its rows
        (`models.attention.Site`); a recorder is such a function (`segresearch.analysis.recorder`). run: of `sample`;
        without one random choices have one key for all images, and nothing is remembered.

        Raises InputError for a conditioning that `conds` lacks, or with a wrong number of rows, and for control images
        that do not fit x.
        """
        values = sigma.tolist()  # the one time that sigma is read: on a GPU each waits for all that came before
        sigma = sigma.view_as(sigma)  # a tensor object of this call's own, see Site.sigma
        branches = list(dict.fromkeys(b for s in sorted(set(values)) for b in self.branches(s, run)))
        denoised = self.evaluate(x, sigma, branches, conds, control, attend, values, run)
        return self.combine(x, sigma, denoised, values=values, run=run)

    def prepare(self, arguments: Mapping[str, Any], run: Run | None = None) -> dict[str, Any]:
        """The arguments of calls, with all that is the same at every step computed now; `sample` calls this.

        These are the keys, values and embedding of each conditioning for every network (`Cond.projected`).
        Conditionings of equal values become one object, whose rows are then computed once. Results do not change.
        """
        control = active(arguments.get("control"))
        nets = [*self.unets, *(one.net for one in control)]
        conds: dict[str, Cond] = {}
        for name, cond in made(self.conditionings, arguments.get("conds") or {}, static=True).items():
            same = next((other for other in conds.values() if other.equals(cond)), None)
            conds[name] = cond.projected(*nets) if same is None else same
        more = ({"control": control} if "control" in arguments else {}) | ({} if run is None else {"run": run})
        return {**arguments, "conds": Prepared(conds), **more}

    @property
    def unets(self) -> list[Any]:
        """The networks of all denoisers."""
        return [denoiser.unet for denoiser in self.networks.values()]  # type: ignore[attr-defined]

    def layout(self, branches: Sequence[Branch], conds: Conds, control: Sequence[ActiveControlNet] = ()) -> Layout:
        """The rows of the forward that gives these branches. InputError for a conditioning that `conds` lacks.

        Names of one Cond are one conditioning, unless a ControlNet steers the base's alone.
        """
        for name in self.every:
            if name != "*" and name not in conds:
                raise InputError(f"conds lacks {name!r}, which `every` names; given: {', '.join(map(repr, conds))}")
        first: dict[Any, str] = {}
        guess = any(net.guess for net in control)
        computed = {}
        for branch in branches:
            whole, name = self.complete(branch), branch.conditioning
            needed = (name, *(n for p in whole.perturbations for n in getattr(p, "conditionings", ())))
            if missing := [n for n in needed if n not in conds]:
                names = ", ".join(map(repr, conds)) or "none"
                raise InputError(f"conds lacks {missing[0]!r}, which the guidance needs; given: {names}")
            alias = name if guess else first.setdefault(id(conds[name]), name)
            computed[branch] = replace(whole, conditioning=alias)
        return self.plan(computed)

    def plan(self, computed: Mapping[Branch, Branch]) -> Layout:
        """The rows of one pass, of branches and the complete branch that each is computed as."""
        perturbed = {branch.perturbations: self.perturbed(branch) for branch in computed.values()}
        network = self.pass_of(next(iter(computed.values()))).network
        return layout(computed, perturbed, self.sites(network)[1] if any(perturbed) else (), self.fork)

    def passes(self, branches: Sequence[Branch]) -> dict[Pass, list[Branch]]:
        """The branches by the forward that each is computed in."""
        passes: dict[Pass, list[Branch]] = {}
        for branch in branches:
            passes.setdefault(self.pass_of(self.complete(branch)), []).append(branch)
        return passes

    def evaluate(
        self,
        x: Latents,
        sigma: Sigma,
        branches: Sequence[Branch],
        conds: Conds,
        control: Control = None,
        attend: Attend | None = None,
        values: Sequence[float] | None = None,
        run: Run | None = None,
    ) -> dict[Branch, Latents]:
        """D of every branch, in one forward for each view and network. values: sigma.tolist(), where the caller has
        read it."""
        keys = torch.zeros_like(sigma, dtype=torch.int64) if run is None else run.keys
        values = sigma.tolist() if values is None else values
        prepared = conds if isinstance(conds, Prepared) else Prepared(made(self.conditionings, conds, static=True))
        if any(callable(make) and not getattr(make, "static", False) for make in self.conditionings.values()):
            prepared = Prepared(made(self.conditionings, prepared, False, sigma, keys))
        denoised: dict[Branch, Latents] = {}
        for one, of_it in self.passes(branches).items():
            denoised |= self.forward(one, x, sigma, of_it, prepared, active(control), attend, values, run, keys)
        return {branch: denoised[branch] for branch in branches}

    def forward(
        self,
        one: Pass,
        x: Latents,
        sigma: Sigma,
        branches: Sequence[Branch],
        conds: Prepared,
        control: Sequence[ActiveControlNet],
        attend: Attend | None,
        values: Sequence[float],
        run: Run | None,
        keys: Int[Tensor, " rows"],
    ) -> dict[Branch, Latents]:
        """D of the branches of one pass."""
        rows, like, denoiser = x.shape[0], x, self.networks[one.network]
        if one.view is not None:
            x = one.view.split(x)  # (b, c, h, w) -> (v·b, c, h', w')
            control = [replace(net, hint=one.view.split(net.hint.expand(rows, -1, -1, -1))) for net in control]
        if len(x) % rows:
            raise InputError(f"{one.view!r}.split made {len(x)} rows of {rows}: give as many parts of each image")
        views = len(x) // rows
        plan = self.layout(branches, conds, control)
        control_residuals = residuals(
            denoiser, x, sigma.repeat(views), plan.conditionings,
            lambda names, _: conds.joined(names, rows, views, one.view), self.base.conditioning, control,
            [*values] * views,
        )  # fmt: skip
        parts = tuple(number * views + i for number in plan.source for i in range(views))
        if one.network and control_residuals is not None:
            widths = [net.config.skip_widths for net in (denoiser.unet, self.unet)]  # type: ignore[attr-defined]
            if widths[0] != widths[1]:
                text = f"network {one.network!r} has skips {widths[0]} wide, the ControlNet residuals {widths[1]}"
                raise InputError(f"{text}: it cannot steer a network of another size")
        fork = None
        if len(plan.branches) > len(plan.conditionings):
            index = row_index(parts, rows, x.device)
            if plan.fork is not None:
                fork = Fork(plan.fork, index)
            elif control_residuals is not None:
                control_residuals = control_residuals.each(lambda r: r[index])
        n = len(plan.inputs)
        before, after = (tuple(name for name in names for _ in range(views)) for names in plan.names)
        perturbations = [p for branch in plan.branches for p in branch.perturbations]
        needed = dict.fromkeys(n for p in perturbations for n in getattr(p, "conditionings", ()))
        texts = {name: with_rows(name, conds[name], rows).projected_by(denoiser.unet) for name in needed}  # type: ignore[attr-defined]
        groups = {
            site: {p: [i * views + j for i in of for j in range(views)] for p, of in at.items()}
            for site, at in plan.groups.items()
        }
        past = past_of(perturbations, run, values[0])
        attention = BranchAttention(groups, rows, before, after, attend or self.attend, sigma, keys, texts, past)
        denoised = denoiser(
            x.repeat(n, 1, 1, 1),  # (v·b, c, h, w) -> (n·v·b, c, h, w)
            sigma.repeat(n * views),
            cond=conds.joined(plan.inputs, rows, views, one.view),
            attend=attention,
            wrap=BranchCalls(attention) if groups else plain,
            residuals=control_residuals,
            fork=fork,
        )
        split = dict(zip(plan.branches, denoised.split(rows * views), strict=True))  # -> (v·b, c, h, w) each
        if one.view is not None:
            split = {branch: one.view.join(part, like) for branch, part in split.items()}
            checked_out(next(iter(split.values())), like.shape, f"{one.view!r}.join")
        return {branch: split[plan.computed[branch]] for branch in branches}

    def combine(
        self,
        x: Latents,
        sigma: Sigma,
        denoised: Mapping[Branch, Latents],
        extra: Latents | None = None,
        values: Sequence[float] | None = None,
        run: Run | None = None,
    ) -> Latents:
        """The sum of the terms (and `extra`, one more), rescaled and post-processed. values: as for `evaluate`."""
        guided = plain = denoised[self.base]
        values = sigma.tolist() if values is None else values
        by_name = {str(branch): d for branch, d in denoised.items()}
        step = Step(x, sigma, by_name, str(self.base), keys=None if run is None else run.keys)
        cfg_active = [False] * len(values)
        for name, term in self.terms.items():
            if not any(term.acts(s, run, name) for s in set(values)):
                continue
            scales = [term.scale_at(s, run) for s in values]
            scale, pos, neg = per_row(scales, plain), denoised[term.pos], denoised[term.neg]
            if term.shape is None:
                delta = pos - neg
            else:
                delta = term.shape(pos, neg, replace(step, scale=scale, past=Past(run, name, values[0])))
                checked_out(delta, x.shape, f"the shape of terms[{name!r}]")
            guided = guided + scale * delta
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
        for number, post in enumerate(self.post):
            owner = f"{post!r} ({number})" if number else repr(post)
            guided = post(guided, replace(step, past=Past(run, owner, values[0])))
            checked_out(guided, x.shape, post)
        return guided

    def __repr__(self) -> str:
        return formula(self)
