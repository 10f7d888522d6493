"""What the parts of benchmarks/cuda.py found, as tables; a part that found less shows less."""

from collections.abc import Mapping
from typing import Any

from cuda_plan import ROWS, WAYS
from harness import median, ratio, table

PLAIN_MS, FLOP_MARGIN, SHARE, COMPILED = 16.0, 1.2, 0.6, 1.2  # the goals, of an H200 at 1024 px in bf16
BOUND = 0.5  # share of the ceiling from which a step is bound by its arithmetic, and ratios of FLOPs mean something
BESIDE = {"SEG": "PAG pipeline", "CFG+SEG": "CFG + PAG pipeline", "ControlNet+SEG": "ControlNet PAG pipeline"}
Parts = Mapping[str, Mapping[str, Any]]


def shown(parts: Parts) -> list[str]:
    """All tables, in the order of the plan."""
    out: list[str] = []
    ceiling = ((parts.get("ceiling") or {}).get("found") or {}).get("bfloat16")
    if ceiling:
        out.append(f"Matmul ceiling in bf16: {ceiling / 1e12:.0f} TFLOP/s, measured.")
    for name, part in parts.items():
        found, kind = part.get("found"), name.partition(",")[0].partition(" ")[0]
        make = {"steps": steps, "compiled": steps, "pictures": pictures, "decode": decode, "trials": trials,
                "mini": mini, "analyze": script, "memory": memory}.get(kind)  # fmt: skip
        if make is not None and found:
            out += [f"### {name[:1].upper()}{name[1:]}", *make(found, ceiling)]
        if part.get("failed"):
            out.append(f"**{name} {part['failed']}.**")
    return out + goals(parts, ceiling)


def failures(failed: Mapping[str, str]) -> list[str]:
    return ["Failed: " + "; ".join(f"{name} ({said})" for name, said in failed.items()) + "."] if failed else []


def milliseconds(times: Mapping[str, list[float]], name: str) -> str:
    return f"{1e3 * median(times[name]):.2f}" if times.get(name) else "–"


def share(found: Mapping[str, Any], name: str, ceiling: float | None) -> float | None:
    """Of the ceiling, that "what, way" reaches."""
    if not ceiling or not found["times"].get(name):
        return None
    return found["flops"][name.rpartition(", ")[0]] / median(found["times"][name]) / ceiling


def steps(found: Mapping[str, Any], ceiling: float | None) -> list[str]:
    times, rows, limits = found["times"], [], []
    for what in [w for w in ROWS if w in found["flops"]]:
        for way in WAYS:
            name = f"{what}, {way}"
            if not times.get(name):
                continue
            of = share(found, name, ceiling)
            other, plain = f"diffusers {BESIDE.get(what)}", f"plain, {way}"
            beside = f"{ratio(times, other, name):.2f} × {BESIDE[what]}" if complete(times, other, name) else ""
            rows.append([what, way, milliseconds(times, name), f"{found['first'].get(name, 0):.1f}",
                         "–" if of is None else f"{100 * of:.0f} %", beside])  # fmt: skip
            bound = share(found, plain, ceiling)
            if what != "plain" and bound is not None and bound >= BOUND and complete(times, name, plain):
                limit = found["flops"][what] / found["flops"]["plain"]
                measured = ratio(times, name, plain)
                limits.append([f"{what} / plain, {way}", f"{measured:.3f}", f"{limit:.3f}", f"{measured / limit:.2f}"])
    head = ("step", "way", "ms", "first call, s", "of the ceiling", "times faster than diffusers'")
    out = [f"{found['px']} px, {found['dtype']}, {rounds(times)} rounds.", table(head, rows)]
    out += [table(("ratio", "measured", "FLOP limit", "times the limit"), limits)] if limits else []
    others = [name for name in times if name.startswith("diffusers") and times[name]]
    if others:
        mine = [n for n in times if n.startswith("plain, ")]
        cells = [[o, milliseconds(times, o), *(f"{ratio(times, o, m):.2f}" if complete(times, o, m) else "–"
                                               for m in mine)] for o in others]  # fmt: skip
        out.append(table(("beside", "ms", *(f"times faster: {m}" for m in mine)), cells))
    return out + failures(found["failed"])


def complete(times: Mapping[str, list[float]], *names: str) -> bool:
    """Whether all were timed in the same rounds."""
    return all(times.get(n) for n in names) and len({len(times[n]) for n in names}) == 1


def rounds(times: Mapping[str, list[float]]) -> int:
    return max((len(t) for t in times.values()), default=0)


def pictures(found: Mapping[str, Any], ceiling: float | None) -> list[str]:
    rows = [
        [way, f"{median(times):.2f}", f"{found['batch'] / median(times):.3f}"]
        for way, times in found["times"].items()
        if times
    ]
    note = f"{found['px']} px, batch {found['batch']}, {found['steps']} steps of CFG+SEG in bf16, VAE decode in fp32."
    return [note, table(("way", "s a batch", "images/s"), rows), *failures(found["failed"])]


def decode(found: list[Mapping[str, Any]], ceiling: float | None) -> list[str]:
    rows = []
    for d in found:
        apart = f"{d['apart']:.1e} of {d['of']:.1f}" if d.get("apart") is not None else ""
        memory = ["–" if d["peak"] is None else f"{d[key]:.2f}" for key in ("peak", "above")]
        seconds = f"{median(d['times']):.3f}" if d.get("times") else d.get("failed") or "–"
        way = d["way"] + (f" of {d['tile']}" if d["tile"] else "")
        rows.append([d["px"], d["dtype"], way, seconds, *memory, apart])
    head = ("px", "dtype", "way", "s", "peak, GiB", "above the weights, GiB", "largest difference")
    return ["The VAE at full size, one picture, random weights.", table(head, rows)]


def mini(found: list[Mapping[str, Any]], ceiling: float | None) -> list[str]:
    rows = [[d["dtype"], "graph" if d["graph"] else "eager", d["batch"],
             f"{d['batch'] / median(d['times']):.1f}" if d["times"] else d["failed"]] for d in found]  # fmt: skip
    return ["SEG, 10 steps of dpmpp_2m, noise to pixels.", table(("dtype", "way", "batch", "images/s"), rows)]


def script(found: Mapping[str, Any], ceiling: float | None) -> list[str]:
    return [f"experiments/{found['name']}.py alone: {found['seconds']} s, exit code {found['code']}."]


def memory(found: Mapping[str, Any], ceiling: float | None) -> list[str]:
    whole, above = (found[key] / 2**30 for key in ("whole", "above"))
    return [f"Two {found['what']} steps at {found['px']} px: {whole:.2f} GiB, {above:.2f} above the weights."]


def trials(found: Mapping[str, Any], ceiling: float | None) -> list[str]:
    out = ["A plain step as a CUDA graph unless it says eager."]
    for batch, part in found.items():
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
    """The goals that what was found can judge, each with its verdict."""
    tables = [part["found"] for name, part in parts.items() if name.startswith(("steps", "compiled")) and part["found"]]
    best: dict[tuple[str, int], tuple[float, str, Mapping[str, Any]]] = {}
    faster: list[float] = []
    for found in tables:
        times = found["times"]
        for name, t in times.items():
            what, _, way = name.rpartition(", ")
            if t and what in found["flops"]:
                key = (what, found["batch"])
                best[key] = min(best.get(key, (float("inf"), "", found)), (median(t), way, found), key=lambda b: b[0])
        own = [n for n in times if n.startswith("plain, ")]
        rivals = [n for n in times if n.startswith("diffusers UNet, compiled")]
        if found["batch"] == 1 and own and rivals:
            faster.append(min(max(ratio(times, r, o) for o in own if complete(times, r, o)) for r in rivals))
    rows = []

    def judge(goal: str, value: float, bound: float, most: bool, text: str) -> None:
        rows.append([goal, text, "reaches" if (value <= bound if most else value >= bound) else "misses"])

    if ("plain", 1) in best:
        seconds, way, found = best["plain", 1]
        judge(f"plain step, batch 1: at most {PLAIN_MS:.0f} ms", 1e3 * seconds, PLAIN_MS, True,
              f"{1e3 * seconds:.2f} ms, {way}")  # fmt: skip
        if ("CFG+SEG", 1) in best:
            both, other, also = best["CFG+SEG", 1]
            limit = also["flops"]["CFG+SEG"] / found["flops"]["plain"]
            times = both / (seconds * limit)
            judge(f"CFG+SEG: at most {FLOP_MARGIN} × its FLOP ratio {limit:.2f} of that", times, FLOP_MARGIN, True,
                  f"{times:.2f} × ({1e3 * both:.2f} ms, {other})")  # fmt: skip
    if ("plain", 8) in best and ceiling:
        seconds, way, found = best["plain", 8]
        of = found["flops"]["plain"] / seconds / ceiling
        judge(f"plain step, batch 8: at least {100 * SHARE:.0f} % of the ceiling", of, SHARE, False,
              f"{100 * of:.0f} %, {way}")  # fmt: skip
    if faster:
        judge(f"at least {COMPILED} × diffusers' compiled UNet, batch 1", min(faster), COMPILED, False,
              f"{min(faster):.2f} ×")  # fmt: skip
    return ["### Goals", table(("goal", "measured", ""), rows)] if rows else []
