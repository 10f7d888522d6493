"""The page of an analysis: one HTML file that tells the story, its figures inside, readable without a network."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segresearch.analysis.measurements import Judged, Row, chosen, values
from segresearch.config import AnalyzeConfig
from segresearch.runs import code_version

CSS = """
:root { --ink: #16181d; --quiet: #5f6672; --rule: #d9dce1 }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 72rem;
  margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-top: 1px solid var(--rule); padding-top: 1rem }
p, li { max-width: 46rem } .quiet { color: var(--quiet) }
code { font-size: .92em; background: #f3f4f6; padding: .05em .3em; border-radius: 3px }
figure { margin: 1rem 0 } figure img { max-width: 100%; height: auto } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0 }
th, td { padding: .28rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
th { font-weight: 600; white-space: nowrap } td.claim { min-width: 15rem } td.place { min-width: 16rem }
td.share { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr.first td { border-top: 2px solid var(--quiet) } summary { cursor: pointer }
"""

MEAN, PRODUCT, PAPER, CHAIN = "mean_kept", "product_falls", "theorem_paper", "theorem_chain"


def page(
    config: AnalyzeConfig,
    images: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    claims: Sequence[Judged],
    figures: Mapping[str, Path],
) -> str:
    """The whole page. figures: paths of PNGs by the names that `segresearch.analysis.story` gives them."""
    model = config.model.name
    body = [
        f"<h1>The energy landscape of {_text(model)}</h1>",
        f'<p class="quiet">{_text(_run(config, images, rows))}</p>',
        *_summary(rows, claims),
        "<h2>The claims, judged on what was measured</h2>",
        "<p>Each claim was checked on every column of logits that was captured: for one image, noise level, site, "
        "head and key, the logits over all queries (Definition 2.1). A cell is the share of columns for which the "
        "claim holds. <b>reflect</b> is the boundary that the official SEG code ships; the others make the blur "
        "doubly stochastic, as the proofs assume. Margins say how far a claim is from failing: below 0 it fails; the "
        "place is where that is worst.</p>",
        _claims_table([c for c in claims if c.axis == "queries"]),
        "<details><summary>The dual of Appendix B: blurred keys, columns over keys</summary>",
        _claims_table([c for c in claims if c.axis == "keys"]),
        "</details>",
        "<h2>What the blur does to the logits</h2>",
        *_figures(figures, "sigma", "limits"),
        "<h2>Theorem 3.1: a matter of regime</h2>",
        "<p>The theorem says that blurring the queries attenuates the curvature of the energy. Under the paper's own "
        "approximations, eqs. (19) and (20), that is so exactly where <i>n</i>·(lse fall) stays below −Σ log "
        "b<sub>ii</sub>: soft attention or a wide blur. The chain rule gives the Hessian BᵀH(ã)B, whose bound is −2 "
        "log|det B|, and the conclusion holds far more widely.</p>",
        *_figures(figures, "regime"),
        "<h2>Layer by layer, step by step</h2>",
        *_figures(figures, "layers"),
        "<h2>The landscape itself</h2>",
        *_figures(figures, "field", "energy", "attention"),
        "<h2>Where the numbers are</h2>",
        "<p><code>table.csv</code> beside this page holds one row for each site, head, noise level, blur σ and "
        "boundary; <code>verdicts.csv</code> one for each claim, boundary and blur σ; <code>config.yaml</code> all "
        "settings. "
        f'<span class="quiet">Code: {_text(code_version())}.</span></p>',
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{_text(model)}: energy landscape</title>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{CSS}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _run(config: AnalyzeConfig, images: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    prompts = list(dict.fromkeys(image["prompt"] for image in images))
    words = "; ".join(f"“{p}”" if p else "no prompt" for p in prompts)
    sites, heads = len({r["site"] for r in rows}), len({(r["site"], r["head"]) for r in rows})
    steps = sorted({r["step"] for r in rows})
    return (
        f"{len(images)} images ({words}), {config.sampler.name}, {config.steps} steps, measured at steps "
        f"{', '.join(map(str, steps))}; branch {config.branch}, {sites} self-attention sites, {heads} heads."
    )


def _summary(rows: Sequence[Row], claims: Sequence[Judged]) -> list[str]:
    """A few sentences with the numbers that matter most."""
    said = []

    def shares(claim: str, reflect: bool | None = None) -> list[Judged]:
        return [
            c for c in claims if c.claim == claim and c.axis == "queries" and reflect in (None, c.boundary == "reflect")
        ]

    def span(parts: Sequence[Judged]) -> str:
        low, high = (_percent(pick(c.share for c in parts)) for pick in (min, max))
        return low if low == high else f"{low} to {high}"

    if shares(MEAN, False):
        text = f"Without reflect padding the blur keeps the mean of a column in {span(shares(MEAN, False))} of columns"
        shipped = [c for c in shares(MEAN, True) if c.blur_sigma < np.inf]  # at σ = ∞ there is no boundary
        if shipped:
            shift = max(r["mean_shift"] for r in chosen(rows, boundary="reflect"))
            text += (
                f"; with it, as shipped, in {span(shipped)} (finite σ): the mean moves by up to {shift:.2g} standard "
            )
            text += "deviations, averaged over a head"
        said.append(text + " (Lemma 3.1).")
    if shares(PRODUCT):
        finite = [c for c in shares(PRODUCT, False)] or shares(PRODUCT)
        said.append(
            f"Eq. (22), that Π ξ does not rise, holds in {span(finite)} of columns by blur: the mean is kept and the "
            "lse falls, so the product rises."
        )
    for claim, name in ((PAPER, "under eqs. (19) and (20)"), (CHAIN, "by the chain rule")):
        if shares(claim):
            worst = min(shares(claim), key=lambda c: c.share)
            said.append(
                f"Theorem 3.1's conclusion {name} holds in {span(shares(claim))} of columns; least often for "
                f"{worst.boundary}, blur σ = {_sigma(worst.blur_sigma)}."
            )
    spread = values(rows, "spread")
    said.append(
        f"Logits spread over queries with a standard deviation of {np.median(spread):.2g} (median head; "
        f"{spread.min():.2g} to {spread.max():.2g})."
    )
    return ["<ul>", *(f"<li>{_text(s)}</li>" for s in said), "</ul>"]


def _claims_table(claims: Sequence[Judged]) -> str:
    """A block a claim: rows are boundaries, columns blur sigmas, cells the share of columns where it holds."""
    sigmas = sorted({c.blur_sigma for c in claims})
    head = "".join(f"<th>σ = {_sigma(s)}</th>" for s in sigmas)
    lines = [f"<tr><th>claim</th><th>boundary</th>{head}<th>median margin</th><th>worst margin, and where</th></tr>"]
    for claim in dict.fromkeys(c.claim for c in claims):
        mine = [c for c in claims if c.claim == claim]
        boundaries = list(dict.fromkeys(c.boundary for c in mine))
        for i, boundary in enumerate(boundaries):
            here = {c.blur_sigma: c for c in mine if c.boundary == boundary}
            worst = min(here.values(), key=lambda c: c.smallest)
            cells = "".join(_share(here.get(s)) for s in sigmas)
            medians = [c.median for c in here.values()]
            middle = " to ".join(dict.fromkeys((_number(min(medians)), _number(max(medians)))))
            place = ", ".join(
                f"{key} {value!r}" if key == "prompt" else f"{key} {value}" for key, value in worst.worst.items()
            )
            name, _, formula = mine[0].statement.partition(": ")
            statement = f"<b>{_text(name)}</b><br>{_text(formula)}"
            first = "" if i else f'<td class="claim" rowspan="{len(boundaries)}">{statement}</td>'
            lines.append(
                f"<tr{'' if i else ' class=first'}>{first}<td>{boundary}</td>{cells}<td>{middle}</td><td class="
                f'"quiet place">{_number(worst.smallest)} at σ = {_sigma(worst.blur_sigma)}: {_text(place)}</td></tr>'
            )
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _share(claim: Judged | None) -> str:
    if claim is None:
        return "<td></td>"
    color = "33,102,172" if claim.share >= 0.5 else "196,80,27"
    depth = 0.08 + 0.42 * abs(2 * claim.share - 1)
    return f'<td class="share" style="background:rgba({color},{depth:.2f})">{_text(_percent(claim.share))}</td>'


def _percent(share: float) -> str:
    """Never 100 % or 0 % unless it is exactly so."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return f"{value:.3g}".replace("inf", "∞").replace("-", "−")


def _sigma(sigma: float) -> str:
    return "∞" if np.isinf(sigma) else f"{sigma:g}"


def _figures(figures: Mapping[str, Path], *names: str) -> list[str]:
    """The figures of these names that there are, inside the page."""
    made = []
    for name in names:
        for key, path in figures.items():
            if key == name or key.startswith(f"{name}_"):
                data = base64.b64encode(path.read_bytes()).decode()
                made.append(f'<figure><img alt="{_text(key)}" src="data:image/png;base64,{data}"></figure>')
    return made


def _text(value: Any) -> str:
    return html.escape(str(value))
