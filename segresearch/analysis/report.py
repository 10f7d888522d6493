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
SUMMARY = ("mean_kept", "product_falls", "theorem_paper", "theorem_chain")


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
        **findings(rows, queries), queries=table(queries), keys=table([c for c in claims if c.axis == "keys"]),
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


def findings(rows: Sequence[Row], claims: Sequence[ClaimSummary]) -> dict[str, Any]:
    """What the page's summary says. claims: those on columns over queries. Shares of columns where a claim holds are
    given by claim; reflect: of mean_kept at finite σ, since at σ = ∞ there is no boundary."""
    kept, product, *theorem = ([c for c in claims if c.claim == name] for name in SUMMARY)
    by_claim = dict(zip(SUMMARY[2:], theorem)) | {
        "mean_kept": [c for c in kept if c.boundary != "reflect"],
        "reflect": [c for c in kept if c.boundary == "reflect" and c.blur_sigma < np.inf],
        "product_falls": [c for c in product if c.boundary != "reflect"] or product,
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
    blocks: dict[tuple[str, str], dict[float, ClaimSummary]] = {}
    for c in claims:
        blocks.setdefault((c.statement, c.boundary), {})[c.blur_sigma] = c
    lines, last = [], ""
    for statement, boundary in sorted(blocks, key=lambda key: [k[0] for k in blocks].index(key[0])):
        tested = blocks[statement, boundary]
        worst = min(tested.values(), key=lambda c: c.smallest)
        where = ", ".join(f"{key} {repr(value) if key == 'prompt' else value}" for key, value in worst.worst.items())
        cells = [Cell(boundary), *(_share(tested.get(s)) for s in sigmas)]
        cells.append(Cell(_span([c.median for c in tested.values()], _number)))
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
