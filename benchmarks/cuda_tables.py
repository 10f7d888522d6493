"""The results of benchmarks/cuda.py as tables. Incomplete results give incomplete tables."""

from collections.abc import Mapping
from typing import Any

from cuda_plan import ROWS, WAYS
from harness import median, ratio, table

UNGUIDED_MS, FLOP_MARGIN, SHARE, COMPILED = 16.0, 1.2, 0.6, 1.2  # the goals, of an H200 at 1024 px in bf16
BOUND = 0.5  # share of the ceiling above which arithmetic limits a step, so that ratios of FLOPs are meaningful
BESIDE = {"SEG": "PAG pipeline", "CFG+SEG": "CFG + PAG pipeline", "ControlNet+SEG": "ControlNet PAG pipeline"}
Parts = Mapping[str, Mapping[str, Any]]


def tables(parts: Parts) -> list[str]:
    """All tables, in the order of the plan."""
    out: list[str] = []
    ceiling = ((parts.get("ceiling") or {}).get("results") or {}).get("bfloat16")
    if ceiling:
        out.append(f"Matmul ceiling in bf16: {ceiling / 1e12:.0f} TFLOP/s, measured.")
    for name, part in parts.items():
        results, kind = part.get("results"), name.partition(",")[0].partition(" ")[0]
        make = {"steps": steps, "compiled": steps, "images": images, "decode": decode, "trials": trials,
                "mini": mini, "analyze": script, "memory": memory}.get(kind)  # fmt: skip
        if make is not None and results:
            out += [f"### {name[:1].upper()}{name[1:]}", *make(results, ceiling)]
        if part.get("failed"):
            out.append(f"**{name} {part['failed']}.**")
    return out + goals(parts, ceiling)


def failures(failed: Mapping[str, str]) -> list[str]:
    return ["Failed: " + "; ".join(f"{name} ({reason})" for name, reason in failed.items()) + "."] if failed else []


def milliseconds(times: Mapping[str, list[float]], name: str) -> str:
    return f"{1e3 * median(times[name]):.2f}" if times.get(name) else "–"


def share(results: Mapping[str, Any], name: str, ceiling: float | None) -> float | None:
    """The share of the ceiling that `name` ("method, way") reaches."""
    if not ceiling or not results["times"].get(name):
        return None
    return results["flops"][name.rpartition(", ")[0]] / median(results["times"][name]) / ceiling


def steps(results: Mapping[str, Any], ceiling: float | None) -> list[str]:
    times, rows, limits = results["times"], [], []
    for method in [w for w in ROWS if w in results["flops"]]:
        for way in WAYS:
            name = f"{method}, {way}"
            if not times.get(name):
                continue
            of = share(results, name, ceiling)
            other, base = f"diffusers {BESIDE.get(method)}", f"unguided, {way}"
            beside = f"{ratio(times, other, name):.2f} × {BESIDE[method]}" if complete(times, other, name) else ""
            rows.append([method, way, milliseconds(times, name), f"{results['first'].get(name, 0):.1f}",
                         "–" if of is None else f"{100 * of:.0f} %", beside])  # fmt: skip
            bound = share(results, base, ceiling)
            if method != "unguided" and bound is not None and bound >= BOUND and complete(times, name, base):
                limit = results["flops"][method] / results["flops"]["unguided"]
                measured = ratio(times, name, base)
                name = f"{method} / unguided, {way}"
                limits.append([name, f"{measured:.3f}", f"{limit:.3f}", f"{measured / limit:.2f}"])
    head = ("step", "way", "ms", "first call, s", "of the ceiling", "times faster than diffusers'")
    out = [f"{results['px']} px, {results['dtype']}, {rounds(times)} rounds.", table(head, rows)]
    out += [table(("ratio", "measured", "FLOP limit", "times the limit"), limits)] if limits else []
    others = [name for name in times if name.startswith("diffusers") and times[name]]
    if others:
        mine = [n for n in times if n.startswith("unguided, ")]
        cells = [[o, milliseconds(times, o), *(f"{ratio(times, o, m):.2f}" if complete(times, o, m) else "–"
                                               for m in mine)] for o in others]  # fmt: skip
        out.append(table(("diffusers", "ms", *(f"times faster: {m}" for m in mine)), cells))
    return out + failures(results["failed"])


def complete(times: Mapping[str, list[float]], *names: str) -> bool:
    """Whether all have times of the same rounds."""
    return all(times.get(n) for n in names) and len({len(times[n]) for n in names}) == 1


def rounds(times: Mapping[str, list[float]]) -> int:
    return max((len(t) for t in times.values()), default=0)


def images(results: Mapping[str, Any], ceiling: float | None) -> list[str]:
    rows = [
        [way, f"{median(times):.2f}", f"{results['batch'] / median(times):.3f}"]
        for way, times in results["times"].items()
        if times
    ]
    size = f"{results['px']} px, batch {results['batch']}"
    note = f"{size}, {results['steps']} steps of CFG+SEG in bf16, VAE decode in fp32."
    return [note, table(("way", "s a batch", "images/s"), rows), *failures(results["failed"])]


def decode(results: list[Mapping[str, Any]], ceiling: float | None) -> list[str]:
    rows = []
    for d in results:
        difference = f"{d['difference']:.1e} of {d['largest']:.1f}" if d.get("difference") is not None else ""
        memory = ["–" if d["peak"] is None else f"{d[key]:.2f}" for key in ("peak", "above")]
        seconds = f"{median(d['times']):.3f}" if d.get("times") else d.get("failed") or "–"
        way = d["way"] + (f" of {d['tile']}" if d["tile"] else "")
        rows.append([d["px"], d["dtype"], way, seconds, *memory, difference])
    head = ("px", "dtype", "way", "s", "peak, GiB", "above the weights, GiB", "largest difference")
    return ["The VAE at full size, one image, random weights.", table(head, rows)]


def mini(results: list[Mapping[str, Any]], ceiling: float | None) -> list[str]:
    rows = [[d["dtype"], "graph" if d["graph"] else "eager", d["batch"],
             f"{d['batch'] / median(d['times']):.1f}" if d["times"] else d["failed"]] for d in results]  # fmt: skip
    return ["SEG, 10 steps of dpmpp_2m, noise to pixels.", table(("dtype", "way", "batch", "images/s"), rows)]


def script(results: Mapping[str, Any], ceiling: float | None) -> list[str]:
    return [f"experiments/{results['name']}.py alone: {results['seconds']} s, exit code {results['code']}."]


def memory(results: Mapping[str, Any], ceiling: float | None) -> list[str]:
    whole, above = (results[key] / 2**30 for key in ("whole", "above"))
    return [f"Two {results['method']} steps at {results['px']} px: {whole:.2f} GiB, {above:.2f} above the weights."]


def trials(results: Mapping[str, Any], ceiling: float | None) -> list[str]:
    out = ["A unguided step as a CUDA graph unless it says eager."]
    for batch, part in results.items():
        base, times = "as it is", part["times"]
        rows = [[name, milliseconds(times, name), f"{ratio(times, base, name):.3f}" if complete(times, base, name)
                 else "–"] for name in times]  # fmt: skip
        out.append(table((f"batch {batch}", "ms", "times faster"), rows))
        if part.get("qkv"):
            cells = [[name, f"{1e3 * s:.3f}"] for name, s in part["qkv"].items()]
            out.append(table((f"q, k, v, batch {batch}, ten times", "ms"), cells))
        out += failures(part["failed"])
    return out


def goals(parts: Parts, ceiling: float | None) -> list[str]:
    """The goals that the results can decide, each with its verdict."""
    candidates = (part["results"] for name, part in parts.items() if name.startswith(("steps", "compiled")))
    measured = [results for results in candidates if results]
    best: dict[tuple[str, int], tuple[float, str, Mapping[str, Any]]] = {}
    faster: list[float] = []
    for results in measured:
        times = results["times"]
        for name, t in times.items():
            method, _, way = name.rpartition(", ")
            if t and method in results["flops"]:
                key = (method, results["batch"])
                before = best.get(key, (float("inf"), "", results))
                best[key] = min(before, (median(t), way, results), key=lambda b: b[0])
        unguided = [n for n in times if n.startswith("unguided, ")]
        rivals = [n for n in times if n.startswith("diffusers UNet, compiled")]
        if results["batch"] == 1 and unguided and rivals:
            faster.append(min(max(ratio(times, r, o) for o in unguided if complete(times, r, o)) for r in rivals))
    rows = []

    def check(goal: str, value: float, bound: float, most: bool, text: str) -> None:
        rows.append([goal, text, "reached" if (value <= bound if most else value >= bound) else "missed"])

    if ("unguided", 1) in best:
        seconds, way, results = best["unguided", 1]
        check(f"unguided step, batch 1: at most {UNGUIDED_MS:.0f} ms", 1e3 * seconds, UNGUIDED_MS, True,
              f"{1e3 * seconds:.2f} ms, {way}")  # fmt: skip
        if ("CFG+SEG", 1) in best:
            both, other, also = best["CFG+SEG", 1]
            limit = also["flops"]["CFG+SEG"] / results["flops"]["unguided"]
            times = both / (seconds * limit)
            check(f"CFG+SEG: at most {FLOP_MARGIN} × its FLOP ratio {limit:.2f} of that", times, FLOP_MARGIN, True,
                  f"{times:.2f} × ({1e3 * both:.2f} ms, {other})")  # fmt: skip
    if ("unguided", 8) in best and ceiling:
        seconds, way, results = best["unguided", 8]
        of = results["flops"]["unguided"] / seconds / ceiling
        check(f"unguided step, batch 8: at least {100 * SHARE:.0f} % of the ceiling", of, SHARE, False,
              f"{100 * of:.0f} %, {way}")  # fmt: skip
    if faster:
        check(f"at least {COMPILED} × diffusers' compiled UNet, batch 1", min(faster), COMPILED, False,
              f"{min(faster):.2f} ×")  # fmt: skip
    return ["### Goals", table(("goal", "measured", ""), rows)] if rows else []
