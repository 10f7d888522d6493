"""The page of an analysis: the story of the energy landscape with its plots inside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segresearch.analysis.measurements import ClaimSummary, Row, chosen, values
from segresearch.analysis.settings import AnalyzeConfig
from segresearch.pages import Cell, render
from segresearch.plot_style import name_sigma
from segresearch.runs import code_version

KINDS = ("sigma", "limits", "regime", "layers", "field", "energy", "attention")  # of plots, before "_boundary"


def page(
    config: AnalyzeConfig, images: Sequence[Mapping[str, Any]], rows: Sequence[Row], claims: Sequence[ClaimSummary],
    plots: Mapping[str, Path],
) -> str:  # fmt: skip
    """The whole page. plots: PNG files by the names that `energy_plots.draw` gives them."""
    kinds: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for name, path in plots.items():
        kinds[name.partition("_")[0]].append(path)
    queries = [c for c in claims if c.axis == "queries"]
    return render(
        f"The energy landscape of {config.model.name}", [_run(config, images, rows)], "energy", plots=kinds,
        summary=summary(rows, queries), queries=table(queries), keys=table([c for c in claims if c.axis == "keys"]),
        code=code_version(),
    )  # fmt: skip


def _run(config: AnalyzeConfig, images: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    prompts = "; ".join(f"“{p}”" if p else "no prompt" for p in dict.fromkeys(image["prompt"] for image in images))
    sites, heads = len({r["site"] for r in rows}), len({(r["site"], r["head"]) for r in rows})
    steps = ", ".join(map(str, sorted({r["step"] for r in rows})))
    return (
        f"{len(images)} images ({prompts}), {config.sampler.name}, {config.steps} steps, measured at steps {steps}; "
        f"branch {config.branch}, {sites} self-attention sites, {heads} heads."
    )


def summary(rows: Sequence[Row], claims: Sequence[ClaimSummary]) -> list[str]:
    """A few sentences with the values that matter most. claims: those on columns over queries."""
    lines = []
    kept = [c for c in claims if c.claim == "mean_kept"]
    stochastic = [c for c in kept if c.boundary != "reflect"]
    reflect = [c for c in kept if c.boundary == "reflect" and c.blur_sigma < np.inf]  # at σ = ∞ there is no boundary
    if stochastic:
        text = f"Without reflect padding the blur keeps the mean of a column in {_span(stochastic)} of columns"
        if reflect:
            shift = max(r["mean_shift"] for r in chosen(rows, boundary="reflect"))
            text += (
                f"; with it, as shipped, in {_span(reflect)} (finite σ): the mean moves by up to {shift:.2g} standard "
                "deviations, averaged over a head"
            )
        lines.append(f"{text} (Lemma 3.1).")
    product = [c for c in claims if c.claim == "product_falls"]
    if product:
        share = _span([c for c in product if c.boundary != "reflect"] or product)
        lines.append(
            f"Eq. (22), that Π ξ does not rise, holds in {share} of columns by blur: the mean is kept and the lse "
            "falls, so the product rises."
        )
    for claim, name in (("theorem_paper", "under eqs. (19) and (20)"), ("theorem_chain", "by the chain rule")):
        theorem = [c for c in claims if c.claim == claim]
        if theorem:
            worst = min(theorem, key=lambda c: c.share)
            lines.append(
                f"Theorem 3.1's conclusion {name} holds in {_span(theorem)} of columns; least often for "
                f"{worst.boundary}, blur σ = {name_sigma(worst.blur_sigma)}."
            )
    spread = values(rows, "spread")
    lines.append(
        f"Logits spread over queries with a standard deviation of {np.median(spread):.2g} (median head; "
        f"{spread.min():.2g} to {spread.max():.2g})."
    )
    return lines


def table(claims: Sequence[ClaimSummary]) -> tuple[list[Cell], list[list[Cell]]]:
    """Head and rows. A block a claim: rows are boundaries, columns blur sigmas, cells the shares where it holds."""
    sigmas = sorted({c.blur_sigma for c in claims})
    heads = ("claim", "boundary", *(f"σ = {name_sigma(s)}" for s in sigmas), "median margin", "worst margin, and where")
    blocks: dict[tuple[str, str], dict[float, ClaimSummary]] = {}
    for c in claims:
        blocks.setdefault((c.statement, c.boundary), {})[c.blur_sigma] = c
    lines, last = [], ""
    for statement, boundary in sorted(blocks, key=lambda key: [k[0] for k in blocks].index(key[0])):
        tested = blocks[statement, boundary]
        worst = min(tested.values(), key=lambda c: c.smallest)
        medians = [c.median for c in tested.values()]
        where = ", ".join(f"{key} {repr(value) if key == 'prompt' else value}" for key, value in worst.worst.items())
        cells = [Cell(boundary), *(_share(tested.get(s)) for s in sigmas)]
        cells.append(Cell(" to ".join(dict.fromkeys((_number(min(medians)), _number(max(medians)))))))
        cells.append(Cell(f"{_number(worst.smallest)} at σ = {name_sigma(worst.blur_sigma)}: {where}", "quiet where"))
        if statement != last:
            name, _, formula = statement.partition(": ")
            cells.insert(0, Cell(formula, "claim first", name, rows=sum(key[0] == statement for key in blocks)))
            last = statement
        lines.append(cells)
    return [Cell(head) for head in heads], lines


def _share(claim: ClaimSummary | None) -> Cell:
    if claim is None:
        return Cell()
    color = "33,102,172" if claim.share >= 0.5 else "196,80,27"
    depth = 0.08 + 0.42 * abs(2 * claim.share - 1)
    return Cell(_percent(claim.share), "number", style=f"background:rgba({color},{depth:.2f})")


def _span(claims: Sequence[ClaimSummary]) -> str:
    """The range of their shares."""
    return " to ".join(dict.fromkeys(_percent(pick(c.share for c in claims)) for pick in (min, max)))


def _percent(share: float) -> str:
    """Never 100 % or 0 % unless it is exactly so."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return f"{value:.3g}".replace("inf", "∞").replace("-", "−")
