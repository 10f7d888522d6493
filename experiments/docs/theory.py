"""The measured numbers of docs/theory.md: from the tables of `experiments/analyze.py model=mini`, and of the notebook
of the lemmas."""

import csv
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from segresearch.pages import percent, span
from segresearch.plot_style import name_sigma

Row = Mapping[str, str]
Rows = Sequence[Row]
BOUNDARIES = ("reflect", "symmetric", "circular", "exact")
DOUBLY = BOUNDARIES[1:]  # doubly stochastic
SIGMAS = (0.5, 1.0, 2.0, 4.0, math.inf)
FINITE = SIGMAS[:-1]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def analysis(folder: Path) -> dict[str, str]:
    """Texts by the names of their marks, from a run's table.csv and verdicts.csv."""
    rows, claims = read(folder / "table.csv"), read(folder / "verdicts.csv")
    return {**of_verdicts(claims), **of_table(rows)}


def notebook(root: Path) -> dict[str, str]:
    """The part of the notebook of the lemmas that compares eq. (19) with the chain rule, as a program prints it."""
    script = root / "experiments" / "notebooks" / "lemmas.py"
    printed = subprocess.run([sys.executable, script], cwd=root, check=True, capture_output=True, text=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith(("blur sigma", "  log "))]
    return {"eq19": "\n".join(["```", *lines, "```"])}


def of_verdicts(claims: Rows) -> dict[str, str]:
    def chosen(claim: str, boundaries: Sequence[str] = BOUNDARIES, sigmas: Sequence[float] = SIGMAS,
               axis: str = "queries") -> list[Row]:  # fmt: skip
        return [c for c in claims if c["claim"] == claim and c["axis"] == axis and c["boundary"] in boundaries
                and float(c["blur_sigma"]) in sigmas]  # fmt: skip

    def share(*which: object, **axis: str) -> str:
        return span([float(c["share_holding"]) for c in chosen(*which, **axis)], percent)  # type: ignore[arg-type]

    def table(claim: str, text: Callable[[Row], str]) -> str:
        return by_blur(lambda boundary, sigma: text(chosen(claim, [boundary], [sigma])[0]))

    def shares(claim: str) -> str:
        return table(claim, lambda c: percent(float(c["share_holding"])))

    def medians(claim: str) -> str:
        return table(claim, lambda c: number(float(c["median_margin"]), 3))

    def worst(claim: str, boundaries: Sequence[str], digits: int = 4) -> tuple[str, str]:
        least = min(chosen(claim, boundaries), key=lambda c: float(c["smallest_margin"]))
        at = f"`{least['smallest_at']}`, blur σ = {name_sigma(float(least['blur_sigma']))}"
        return number(float(least["smallest_margin"]), digits), at

    lse, at = worst("lse_falls", ["reflect"], 3)
    margins = [("eqs. (19)–(20), `exact`", *worst("theorem_paper", ["exact"])),
               ("chain rule", *worst("theorem_chain", BOUNDARIES))]  # fmt: skip
    gap = max(-float(c["smallest_margin"]) for c in claims if c["claim"] == "blur_commutes")
    failing = 1 - min(float(c["share_holding"]) for c in chosen("lse_falls", ["reflect"]))
    half, one, infinite = (-float(chosen("diagonal_shrinks", ["exact"], [s])[0]["median_margin"])
                           for s in (0.5, 1.0, math.inf))  # fmt: skip
    return {
        "columns": f"{int(chosen('mean_kept')[0]['columns']):,}",
        "mean.doubly": share("mean_kept", DOUBLY),
        "mean.reflect": share("mean_kept", ["reflect"], FINITE),
        "variance.doubly": share("variance_falls", DOUBLY),
        "variance.reflect": share("variance_falls", ["reflect"]),
        "lse.doubly": share("lse_falls", DOUBLY),
        "lse.reflect": share("lse_falls", ["reflect"]),
        "eq21": share("diagonal_shrinks"),
        "eq22": share("product_falls", DOUBLY),
        "theorem": share("theorem_paper"),
        "chain": share("theorem_chain"),
        "commutes": share("blur_commutes"),
        "commutes.gap": f"below 1e−{-math.ceil(math.log10(gap)):02d}",
        "dual": ", ".join(share(c, DOUBLY, axis="keys") for c in ("mean_kept", "variance_falls", "lse_falls")),
        "weighted": ", ".join(share(f"{c}_weighted") for c in ("mean_kept", "variance_falls", "lse_falls")),
        "lse.failing": percent(failing), "lse.worst": lse.lstrip("−"), "lse.worst-at": at,
        "diagonal.half": number(half, 4), "diagonal.one": number(one, 4), "diagonal.infinite": number(infinite, 4),
        "eq22.shares": shares("product_falls"), "eq22.margins": medians("product_falls"),
        "theorem.shares": shares("theorem_paper"), "theorem.margins": medians("theorem_paper"),
        "chain.shares": shares("theorem_chain"), "chain.margins": medians("theorem_chain"),
        "worst": "\n".join(["| | margin, nats | column |", "|---|---|---|",
                            *(f"| {' | '.join(line)} |" for line in margins)]),
        "trace.falls": share("trace_falls"),
    }  # fmt: skip


def of_table(rows: Rows) -> dict[str, str]:
    def values(column: str, **where: object) -> np.ndarray:
        """Of the heads at which `where` is so."""
        some = [r for r in rows if all((float(r[k]) if isinstance(v, float) else r[k]) == v for k, v in where.items())]
        return np.array([float(row[column]) for row in some])

    def blurs(column: str) -> str:
        return by_blur(lambda b, s: number(np.median(values(column, boundary=b, blur_sigma=s)), 2))

    spread = values("spread", boundary="exact", blur_sigma=1.0)
    shift = [values("mean_shift", boundary="reflect", blur_sigma=s) for s in SIGMAS]
    noise = sorted({float(row["sigma_t"]) for row in rows}, reverse=True)
    levels = {name: [values(column, boundary="exact", blur_sigma=1.0, sigma_t=s).mean() for s in noise] for name, column
              in (("logit standard deviation", "spread"), ("share, eqs. (19)–(20)", "eq20_holds"),
                  ("share, chain rule", "chain_holds"))}  # fmt: skip
    names = "trace_before", "chain_trace_after"
    trace = {name: values(name, boundary="exact", blur_sigma=1.0) for name in names}
    return {
        "spread": number(np.median(spread), 3), "spread.span": span(spread.tolist(), lambda x: number(x, 3)),
        "shift": "\n".join([
            head(""), *(f"| {name} | {' | '.join(number(f(z), 2) for z in shift)} |"
                        for name, f in (("median head", np.median), ("largest", np.max)))]),
        "variance.ratio": blurs("variance_ratio"),
        "variance.largest": number(values("variance_ratio_max", boundary="reflect").max(), 3),
        "lse.fall": blurs("lse_fall"), "lse.taylor": blurs("taylor_fall"),
        "noise": "\n".join([
            f"| | {' | '.join(f'σ_t = {number(s, 3)}' for s in noise)} |", f"|---|{'---|' * len(noise)}",
            *(f"| {name} | {' | '.join((percent if 'share' in name else three)(x) for x in means)} |"
              for name, means in levels.items())]),
        "trace.before": number(np.median(trace["trace_before"]), 3),
        "trace.after": number(np.median(trace["chain_trace_after"]), 3),
        "trace.before-mean": number(trace["trace_before"].mean(), 3),
        "trace.after-mean": number(trace["chain_trace_after"].mean(), 3),
        "reflect.left": number(np.median(values("variance_ratio", boundary="reflect", blur_sigma=4.0)), 2),
        "exact.left": number(np.median(values("variance_ratio", boundary="exact", blur_sigma=4.0)), 2),
    }  # fmt: skip


def head(first: str) -> str:
    """Of a table with a column a blur."""
    return "\n".join([f"| {first} | {' | '.join(f'σ = {name_sigma(s)}' for s in SIGMAS)} |".replace("|  |", "| |"),
                      f"|---|{'---|' * len(SIGMAS)}"])  # fmt: skip


def by_blur(text: Callable[[str, float], str]) -> str:
    return "\n".join([head("boundary"), *(f"| {b} | {' | '.join(text(b, s) for s in SIGMAS)} |" for b in BOUNDARIES)])


def number(x: float, digits: int) -> str:
    """With so many significant digits, and all digits before the point; 0 below 1e-6, which is rounding."""
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    x = 0.0 if abs(x) < 1e-6 else x
    return (f"{x:,.0f}" if abs(x) >= 10 ** (digits - 1) else f"{x:.{digits}g}").replace("-", "−")


def three(x: float) -> str:
    return number(x, 3)
