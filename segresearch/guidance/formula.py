"""A guided denoiser in words: its formula, what is done to each branch, and its rows."""

from typing import Any

from segresearch.guidance.perturbations import Perturbation, site_kind
from segresearch.guidance.row_layout import Pass, perturbed_sites
from segresearch.guidance.terms import Branch


def formula(model: Any) -> str:
    """What `print` gives of a GuidedDenoiser."""
    lines = ["D = " + " + ".join([f"D[{model.base}]", *map(str, model.terms.values())]).replace("+ -", "− ")]
    branches = [model.base, *(branch for term in model.terms.values() for branch in term.branches)]
    for name, perturbations in model.every.items():
        lines.append(f"  every branch on {name}: {', then '.join(map(repr, perturbations))}")
    lines += [f"  {branch}: {places(model, branch)}" for branch in dict.fromkeys(branches) if branch.perturbations]
    lines += [f"  {name}: made by {make!r}" for name, make in model.conditionings.items()]
    if model.rescale:
        lines.append(f"  rescale {model.rescale:g}: in eps, against D[{model.base}], where conditionings are mixed")
    lines += [f"  then {post!r}" for post in model.post]
    terms = [t for t in model.terms.values() if t.adds and (callable(t.scale) or t.scale)]
    rows = []
    for one, members in model.passes([model.base, *(b for t in terms for b in t.branches)]).items():
        plan = model.plan({branch: model.complete(branch) for branch in members})
        forked = f" -> {len(plan.branches)} from {plan.fork}" if plan.fork else ""
        own = f" in a forward of {one.network or 'its own'}" if one != Pass() else ""
        rows.append(f"{len(plan.inputs)}{forked}{own}" + (f", each {one.view!r}" if one.view is not None else ""))
    return "\n".join([*lines, f"  rows per image: {', and '.join(rows)}"])


def places(model: Any, branch: Branch) -> str:
    """What is done to a branch, and at how many sites."""
    by_kind: dict[str, list[Perturbation]] = {}
    for perturbation in branch.perturbations:
        by_kind.setdefault(site_kind(perturbation), []).append(perturbation)
    kinds, texts = model.sites(model.pass_of(model.complete(branch)).network)[0], []
    for kind, perturbations in by_kind.items():
        text = ", then ".join(map(repr, perturbations))
        if kind in kinds:
            noun = "sites" if kind == "self" else f"{kind} sites"
            text += f" at {len(perturbed_sites(perturbations, kinds))} of {len(kinds[kind])} {noun}"
        texts.append(text)
    return "; ".join(texts)
