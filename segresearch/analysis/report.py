"""The page of an analysis: the story of the energy landscape with its plots inside."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segresearch.analysis.measurements import ClaimSummary, Row, chosen, values
from segresearch.config import AnalyzeConfig
from segresearch.pages import Cell, render
from segresearch.plot_style import name_sigma
from segresearch.runs import code_version

KINDS = ("sigma", "limits", "regime", "layers", "field", "energy", "attention")  # of plots, before "_boundary"


def page(
    config: AnalyzeConfig, images: Sequence[Mapping[str, Any]], rows: Sequence[Row], claims: Sequence[ClaimSummary],
    plots: Mapping[str, Path],
) -> str:  # fmt: skip
    """The whole page. plots: PNG files by the names that `energy_plots.draw` gives them."""
    kinds = {kind: [path for name, path in plots.items() if name.partition("_")[0] == kind] for kind in KINDS}
    queries = [c for c in claims if c.axis == "queries"]
    prompts = "; ".join(f"“{p}”" if p else "no prompt" for p in dict.fromkeys(image["prompt"] for image in images))
    sites, heads = len({r["site"] for r in rows}), len({(r["site"], r["head"]) for r in rows})
    steps = ", ".join(map(str, sorted({r["step"] for r in rows})))
    lead = (
        f"{len(images)} images ({prompts}), {config.sampler.name}, {config.steps} steps, measured at steps {steps}; "
        f"branch {config.branch}, {sites} self-attention sites, {heads} heads."
    )
    return render(
        f"The energy landscape of {config.model.name}", [lead], "energy", plots=kinds, **findings(rows, queries),
        queries=table(queries), keys=table([c for c in claims if c.axis == "keys"]), code=code_version(),
    )  # fmt: skip


def findings(rows: Sequence[Row], claims: Sequence[ClaimSummary]) -> dict[str, Any]:
    """What the page's summary says. claims: those on columns over queries. Shares of columns where a claim holds are
    given by claim; reflect: of mean_kept at finite σ, since at σ = ∞ there is no boundary."""

    def tested(claim: str, reflect: bool | None = None) -> list[ClaimSummary]:
        return [c for c in claims if c.claim == claim and reflect in (None, c.boundary == "reflect")]

    by_claim = {
        "theorem_paper": tested("theorem_paper"),
        "theorem_chain": tested("theorem_chain"),
        "mean_kept": tested("mean_kept", reflect=False),
        "reflect": [c for c in tested("mean_kept", reflect=True) if c.blur_sigma < np.inf],
        "product_falls": tested("product_falls", reflect=False) or tested("product_falls"),
    }
    by_claim = {claim: some for claim, some in by_claim.items() if some}
    worst = {claim: min(some, key=lambda c: c.share) for claim, some in by_claim.items()}
    spread = values(rows, "spread")
    return {
        "shares": {claim: _span([c.share for c in some], _percent) for claim, some in by_claim.items()},
        "worst": {claim: f"{c.boundary}, blur σ = {name_sigma(c.blur_sigma)}" for claim, c in worst.items()},
        "shift": max(values(chosen(rows, boundary="reflect"), "mean_shift"), default=0),
        "spread": (np.median(spread), spread.min(), spread.max()),
    }


def table(claims: Sequence[ClaimSummary]) -> tuple[list[Cell], list[list[Cell]]]:
    """Head and rows. A block a claim: rows are boundaries, columns blur sigmas, cells the shares where it holds."""
    sigmas = sorted({c.blur_sigma for c in claims})
    heads = ("claim", "boundary", *(f"σ = {name_sigma(s)}" for s in sigmas), "median margin", "worst margin, and where")
    lines = []
    for statement in dict.fromkeys(c.statement for c in claims):
        of_claim = [c for c in claims if c.statement == statement]
        boundaries = list(dict.fromkeys(c.boundary for c in of_claim))
        name, _, formula = statement.partition(": ")
        first = [Cell(formula, "claim first", name, rows=len(boundaries))]
        for boundary in boundaries:
            tested = [c for c in of_claim if c.boundary == boundary]
            worst = min(tested, key=lambda c: c.smallest)
            shares = {c.blur_sigma: _share(c.share) for c in tested}
            where = ", ".join(f"{key} {repr(v) if key == 'prompt' else v}" for key, v in worst.worst.items())
            lines.append([
                *first, Cell(boundary), *(shares.get(sigma, Cell()) for sigma in sigmas),
                Cell(_span([c.median for c in tested], _number)),
                Cell(f"{_number(worst.smallest)} at σ = {name_sigma(worst.blur_sigma)}: {where}", "quiet where"),
            ])  # fmt: skip
            first = []
    return [Cell(head) for head in heads], lines


def _share(share: float) -> Cell:
    color = "33,102,172" if share >= 0.5 else "196,80,27"
    depth = 0.08 + 0.42 * abs(2 * share - 1)
    return Cell(_percent(share), "number", style=f"background:rgba({color},{depth:.2f})")


def _span(numbers: Sequence[float], text: Callable[[float], str]) -> str:
    return " to ".join(dict.fromkeys((text(min(numbers)), text(max(numbers)))))


def _percent(share: float) -> str:
    """Never 100 % or 0 % unless it is exactly so."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return f"{value:.3g}".replace("inf", "∞").replace("-", "−")
