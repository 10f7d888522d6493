"""segresearch beside diffusers, and beside what the arithmetic allows: times, memory, scaling.

    python benchmarks/run.py --quick                       # under ten minutes on two quiet cores
    python benchmarks/run.py --markdown benchmarks/RESULTS.md
    python benchmarks/run.py --device cuda                 # a GPU, in under seven minutes: other parts (cuda.py)
    python benchmarks/run.py --only steps memory --px 512

Parts, each in a process of its own:

    limits     floating-point operations of every kind of step, counted on the meta device
    steps      one step at SDXL's full size with random weights, ours and diffusers' in turn, sharing the weights
    memory     peak of the same
    start      importing, --help, loading mini
    load       loading SDXL at full size from one file of 6.9 GB, written to --folder first (*)
    decode     the VAE at full size (*)
    mini       pictures a second over batch sizes; one process of two threads beside two of one
    terms      a step of mini over the number of SEG terms (*)
    compile    torch.compile on mini, which takes minutes (*)
    analysis   statistics of attention, streamed beside whole maps (*)

    (*) not with --quick, which also takes fewer rounds, and of CFG+SEG measures our step alone.

Ratios are medians of ratios within rounds, in which everything compared takes its turn. They need a quiet machine.

On a GPU, SDXL at full size, 1024 px, bf16: steps at batch 1, 4 and 8, eager and as CUDA graphs beside diffusers'; some
compiled; whole pictures; decode with and without tiles; what else might pay. --only takes the first words of parts
(steps, compiled, pictures, decode, trials, mini, analyze, memory), --quick leaves out what is compiled and tried.
gpu.sh runs the tests that need a GPU too.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from harness import HERE, child, machine, median, ratio, table, with_start  # noqa: E402

PARTS = ("limits", "steps", "memory", "start", "load", "decode", "mini", "terms", "compile", "analysis")
SLOW = ("load", "decode", "terms", "compile", "analysis")  # left out of --quick
ALONE = ("CFG+SEG",)  # --quick does not run diffusers' way of these
QUICK: tuple[str, ...] = ("plain", "SEG", "CFG+SEG", "ControlNet+SEG")
FULL: tuple[str, ...] = ("plain", "SEG", "PAG", "CFG", "CFG+SEG", "ControlNet+SEG")
GOALS = {"plain": 1 / 1.02, "SEG": 1.15, "ControlNet+SEG": 1.25}  # times faster than diffusers, at 512 px on a CPU
GIB, MB = 2**30, 1e6


def percent(value: float) -> str:
    return f"{100 * (value - 1):+.1f} %"


def show_limits(found: list[dict], options: argparse.Namespace) -> list[str]:
    rows = []
    for one in found:
        base = one["flops"]["plain"]["step"]
        rows += [
            [one["px"], what, f"{f['step'] / 1e12:.3f}", f"{f['step'] / base:.3f}", f"{f['text'] / 1e12:.3f}"]
            for what, f in one["flops"].items()
        ]
    head = ("px", "step", "TFLOP", "of a plain step", "TFLOP once a picture, for the text")
    return ["## What a step asks for", "Counted on the meta device; batch 1, SEG and PAG on `mid`.", table(head, rows)]


def show_steps(found: list[dict], options: argparse.Namespace) -> list[str]:
    from parts import THEIRS

    out = ["## Steps at full size, random weights, one picture"]
    for one in found:
        times, flops, ceiling = one["times"], one["flops"], one["ceiling"]
        rows, limits = [], []
        for what, counted in flops.items():
            mine, (label, key) = f"ours: {what}", THEIRS[what]
            beside = f"diffusers: {key}" in times
            faster = ratio(times, f"diffusers: {key}", mine) if beside else math.nan
            goal = GOALS.get(what) if one["px"] == 512 else None
            verdict = "" if goal is None else f" ({'reaches' if faster >= goal else 'misses'} {goal:.2f})"
            twice = "" if what == "plain" else f"{ratio(times, 'diffusers: two rows', mine):.2f}"
            share = f"{100 * counted['step'] / median(times[mine]) / ceiling:.0f} %"
            seconds = f"{median(times[mine]):.3f}"
            other = ["–"] * 3
            if beside:
                other = [label, f"{median(times[f'diffusers: {key}']):.3f}", f"{faster:.2f}{verdict}"]
            rows.append([what, seconds, *other, twice, share])
            if what != "plain":
                limit, measured = counted["step"] / flops["plain"]["step"], ratio(times, mine, "ours: plain")
                near = "within 5 %" if measured <= 1.05 * limit else "misses 5 %"
                limits.append([f"{what} / plain", f"{measured:.3f}", f"{limit:.3f}",
                               f"{percent(measured / limit)} ({near})"])  # fmt: skip
        title = f"### {one['px']} px, {one['dtype']}, {one['device']}"
        head = ("ours", "s", "diffusers", "s", "times faster", "than 2 rows", "of the matmul ceiling")
        rounds = len(times["ours: plain"])
        note = f"Medians of {rounds} interleaved rounds; matmul ceiling {ceiling / 1e12:.3f} TFLOP/s, measured."
        out += [title, note, table(head, rows)]
        out += [table(("ratio of ours", "measured", "FLOP limit", "above it"), limits)]
    return out


def show_memory(found: list[dict], options: argparse.Namespace) -> list[str]:
    rows = []
    for one in found:
        mine, other = one["ours"], one["diffusers"]
        sizes = [f"{z / GIB:.2f}" for z in (mine["whole"], other["whole"], mine["above"], other["above"])]
        higher = "higher" if mine["whole"] > other["whole"] * 1.005 else "not higher"
        rows.append([one["what"], one["px"], *sizes, higher])
    head = ("step", "px", "ours, GiB", "diffusers, GiB", "ours above the weights", "diffusers above the weights", "")
    return ["## Peak memory", "Two steps in a process of its own, weights included.", table(head, rows)]


def show_start(found: dict, options: argparse.Namespace) -> list[str]:
    return ["## Start-up", table(("process", "s"), [[k, f"{v:.2f}"] for k, v in found.items()])]


def show_load(found: dict, options: argparse.Namespace) -> list[str]:
    text = (
        f"A random SDXL of full size, one float16 file of 6.9 GB, to {found['dtype']}: {found['seconds']:.1f} s, peak "
        f"{found['above'] / GIB:.2f} GiB for {found['weights'] / GIB:.2f} GiB of weights."
    )
    return ["## Loading", text]


def show_decode(found: list[dict], options: argparse.Namespace) -> list[str]:
    rows = [
        [d["px"], d["dtype"], *(f"{median(d['times'][k]):.2f}" for k in ("ours", "diffusers")),
         f"{ratio(d['times'], 'diffusers', 'ours'):.2f}"] for d in found
    ]  # fmt: skip
    return ["## VAE decode at full size", table(("px", "dtype", "ours, s", "diffusers, s", "times faster"), rows)]


def show_mini(found: dict, options: argparse.Namespace) -> list[str]:
    ceiling, rows = found["ceiling"], []
    for r in found["steps"]["rows"]:
        share = f"{100 * r['flops'] / r['seconds'] / ceiling:.0f} %"
        rows.append([r["what"], r["batch"], f"{1e3 * r['seconds'] / r['batch']:.2f}", share])
    decode = [[d["part"], f"{1e3 * d['seconds'] / d['images']:.2f}"] for d in found["steps"]["decode"]]
    whole = [[w["ways"], w["batch"], w["images"], f"{w['images'] / w['seconds']:.2f}"] for w in found["images"]]
    return [
        "## mini",
        f"fp32; matmul ceiling {ceiling / 1e9:.0f} GFLOP/s, measured.",
        table(("step", "batch", "ms an image", "of the matmul ceiling"), rows),
        table(("decode, images at a time", "ms an image"), decode),
        f"SEG, {found['images'][0]['steps']} steps, from text to pixels:",
        table(("processes × threads", "batch", "images", "images/s"), whole),
    ]


def show_terms(found: list[dict], options: argparse.Namespace) -> list[str]:
    base = found[0]["seconds"]
    rows = [[f["terms"], f"{f['seconds'] / base:.2f}", f"{f['flops_ratio']:.2f}"] for f in found]
    return ["## Number of SEG terms (mini)", table(("terms", "time / plain", "FLOP limit"), rows)]


def show_compile(found: dict, options: argparse.Namespace) -> list[str]:
    faster, times = ratio(found["times"], "eager", "compiled"), found["times"]
    text = (
        f"CFG+SEG on mini, batch {found['batch']}: {median(times['eager']):.3f} s eager, "
        f"{median(times['compiled']):.3f} s compiled ({faster:.2f} × faster) after {found['compile_seconds']:.0f} s of "
        f"compiling; largest difference {found['max_difference']:.1e}."
    )
    return ["## torch.compile", text]


def show_analysis(found: list[dict], options: argparse.Namespace) -> list[str]:
    rows = [
        [f["load"], f["way"], f"{f['seconds']:.2f}",
         f"{f['seconds_for_all']:.1f}" + (" (est.)" if f["share_measured"] < 1 else ""), f"{f['peak_megabytes']:.0f}"]
        for f in found
    ]  # fmt: skip
    return ["## Analysis: streamed beside whole maps", table(("load", "way", "s", "s for all", "peak MB"), rows)]


def sizes(options: argparse.Namespace) -> list[int]:
    return options.px or [256, 512]


def measure(part: str, options: argparse.Namespace) -> Any:
    """The results of one part, as plain data."""
    quick, threads, device, dtype = options.quick, options.threads, options.device, "bfloat16"
    rounds = options.rounds or (2 if quick else 7)
    if part == "limits":
        from networks import steps_flops

        whats = (*FULL, "ControlNet")
        counted = sorted({*sizes(options), *(() if quick else (1024,))})
        return [{"px": px, "flops": {w: steps_flops(px, w) for w in whats}} for px in counted]
    if part == "steps":
        from networks import steps_flops

        whats, found = QUICK if quick else FULL, []
        ceiling = child("matmul_ceiling", threads, dtype=dtype, device=device, size=2048)
        for px in sizes(options):
            own = {"px": px, "dtype": dtype, "device": device, "whats": whats, "rounds": rounds}
            one = child("steps", threads, **own, alone=ALONE if quick else ())
            found.append(one | {"ceiling": ceiling, "flops": {what: steps_flops(px, what) for what in whats}})
        return found
    if part == "memory":
        found, largest = [], max(sizes(options))
        for what, key in (("plain", "plain"), ("SEG", "PAG"), ("ControlNet+SEG", "ControlNet+PAG")):
            if what != "SEG" and quick:
                continue
            same = {"px": largest, "dtype": dtype, "device": device}
            both = (("ours", what), ("diffusers", key))
            own, other = (child("peak", threads, who=who, what=name, **same) for who, name in both)
            found.append({"what": what, "px": largest, "ours": own, "diffusers": other})
        return found
    if part == "start":
        return child("start_up", threads, rounds=min(rounds, 1 if quick else 3))
    if part == "load":
        with tempfile.TemporaryDirectory() as temporary:
            return child("loading", threads, folder=options.folder or temporary, dtype="bfloat16")
    if part == "decode":
        pixels = [256] if quick else [256, 512]
        kinds = ["float32"] if quick else ["float32", "bfloat16"]
        same = {"device": device, "rounds": rounds}
        return [child("decode", threads, px=px, dtype=dtype, **same) for px in pixels for dtype in kinds]
    if part == "mini":
        batches: tuple[int, ...] = (1, 8, 32) if quick else (1, 4, 8, 16, 32, 64)
        few: tuple[str, ...] = QUICK[:2] if quick else FULL[:5]
        return {
            "ceiling": child("matmul_ceiling", threads, dtype="float32", device="cpu", size=2048),
            "steps": child("mini_steps", threads, batches=batches, whats=few, rounds=rounds),
            "images": mini_images(threads, quick),
        }
    if part == "terms":
        return child("scaling", threads, rounds=rounds)
    if part == "compile":
        return child("compiling", threads, rounds=rounds)
    from analysis import LOADS, WAYS

    ways = ("streamed", "maps") if quick else WAYS
    return [child("analysis", threads, load=load, way=way, quick=quick) for load in LOADS for way in ways]


def mini_images(threads: int, quick: bool) -> list[dict]:
    """Pictures a second of one process with all threads, and of as many processes as threads with one each."""
    found: list[dict] = []
    images, steps = (32, 10) if quick else (1000, 25)
    for batch in (8,) if quick else (25,):
        one = child("mini_images", threads, images=images, batch=batch, steps=steps)
        found.append(one | {"ways": f"1 × {threads}"})
        share = {"images": images // threads, "batch": batch, "steps": steps}
        command = [sys.executable, __file__, "--child", "mini_images", json.dumps(share), "--threads", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        running = [subprocess.Popen(command, **piped) for _ in range(threads)]
        ended = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
        together = {"images": sum(e["images"] for e in ended), "seconds": max(e["seconds"] for e in ended)}
        found.append(ended[0] | together | {"ways": f"{threads} × 1"})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and parts")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    parser.add_argument("--rounds", type=int, help="timed repetitions (default 7; --quick 2), on a CPU")
    parser.add_argument("--px", nargs="+", type=int, help="sizes of the full-size steps (default 256 512), on a CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--folder", help="where the file for `load` is kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--child", nargs=2, metavar=("PART", "JSON"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        import parts
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(getattr(parts, options.child[0])(**json.loads(options.child[1]))))
        return
    if options.device.startswith("cuda"):
        import gpu

        return gpu.bench(options.device, options.quick, options.only, options.markdown)
    for name in options.only or ():
        if name not in PARTS:
            parser.error(f"--only {name}: choose among {', '.join(PARTS)}")
    facts = machine(options.threads)
    said = ", ".join(f"{k} {v}" for k, v in facts.items() if v is not None)
    lines = ["# Measured", f"    python benchmarks/run.py {' '.join(sys.argv[1:])}", f"Machine: {said}."]
    results: dict[str, Any] = {"machine": facts, "options": sys.argv[1:], "seconds": {}}
    print("\n\n".join(lines), flush=True)
    for part in options.only or PARTS:
        if not options.only and options.quick and part in SLOW:
            continue
        start = time.perf_counter()
        results[part] = measure(part, options)
        results["seconds"][part] = time.perf_counter() - start
        shown = globals()[f"show_{part}"](results[part], options)
        lines += shown
        print("\n" + "\n\n".join(shown), flush=True)
        print(f"\n({part}: {results['seconds'][part]:.0f} s)", file=sys.stderr, flush=True)
        written = options.out.with_suffix(".partial")
        written.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(written, options.out)
    if options.markdown:
        before = options.markdown.read_text() if options.markdown.is_file() else ""
        options.markdown.write_text(with_start(before, "\n\n".join(lines)))


if __name__ == "__main__":
    main()
