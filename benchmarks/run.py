"""segresearch next to diffusers, and next to the bound of its arithmetic: times, memory, scaling.

    python benchmarks/run.py --quick                       # under ten minutes on two quiet cores
    python benchmarks/run.py --markdown benchmarks/RESULTS.md
    python benchmarks/run.py --device cuda                 # on a GPU, in under seven minutes: other parts (cuda.py)
    python benchmarks/run.py --only steps memory --px 512

Parts, each in a separate process:

    limits     floating-point operations of every kind of step, counted on the meta device
    steps      one step at SDXL's full size, ours and diffusers' in turns, with the same random weights
    memory     peak memory of these steps
    start      importing, --help, loading mini
    load       loading SDXL at full size from one file of 6.9 GB, written to --folder first (*)
    decode     the VAE at full size (*)
    mini       images per second over batch sizes; one process of two threads next to two of one
    terms      a step of mini over the number of SEG terms (*)
    compile    torch.compile on mini, which takes minutes (*)
    analysis   statistics of attention, streamed next to whole maps (*)

    (*) not with --quick, which also takes fewer rounds and measures only our step of CFG+SEG.

Ratios are medians of the ratios within rounds, in which all candidates take turns. They need a quiet machine.

On a GPU, SDXL at full size, 1024 px, bf16: steps at batch 1, 4 and 8, eager and as CUDA graphs next to diffusers'; some
compiled; complete images; decode with and without tiles; trials of other options. --only takes the first words of
parts (steps, compiled, images, decode, trials, mini, analyze, memory). --quick leaves out compilations and trials.
gpu.sh runs the tests that need a GPU as well.
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
ALONE = ("CFG+SEG",)  # --quick does not run diffusers' counterpart of these
QUICK: tuple[str, ...] = ("unguided", "SEG", "CFG+SEG", "ControlNet+SEG")
FULL: tuple[str, ...] = ("unguided", "SEG", "PAG", "CFG", "CFG+SEG", "ControlNet+SEG")
GOALS = {"unguided": 1 / 1.02, "SEG": 1.15, "ControlNet+SEG": 1.25}  # times faster than diffusers, at 512 px on a CPU
GIB, MB = 2**30, 1e6


def percent(value: float) -> str:
    return f"{100 * (value - 1):+.1f} %"


def show_limits(results: list[dict], options: argparse.Namespace) -> list[str]:
    rows = []
    for one in results:
        base = one["flops"]["unguided"]["step"]
        rows += [
            [one["px"], method, f"{f['step'] / 1e12:.3f}", f"{f['step'] / base:.3f}", f"{f['text'] / 1e12:.3f}"]
            for method, f in one["flops"].items()
        ]
    head = ("px", "step", "TFLOP", "of an unguided step", "TFLOP of the text, once per image")
    return ["## Operations of a step", "Counted on the meta device; batch 1, SEG and PAG on `mid`.", table(head, rows)]


def show_steps(results: list[dict], options: argparse.Namespace) -> list[str]:
    from parts import DIFFUSERS

    out = ["## Steps at full size, random weights, one image"]
    for one in results:
        times, flops, ceiling = one["times"], one["flops"], one["ceiling"]
        rows, limits = [], []
        for method, counted in flops.items():
            mine, (label, key) = f"ours: {method}", DIFFUSERS[method]
            compared = f"diffusers: {key}" in times
            faster = ratio(times, f"diffusers: {key}", mine) if compared else math.nan
            goal = GOALS.get(method) if one["px"] == 512 else None
            verdict = "" if goal is None else f" (goal {goal:.2f} {'reached' if faster >= goal else 'missed'})"
            twice = "" if method == "unguided" else f"{ratio(times, 'diffusers: two rows', mine):.2f}"
            share = f"{100 * counted['step'] / median(times[mine]) / ceiling:.0f} %"
            seconds = f"{median(times[mine]):.3f}"
            other = ["–"] * 3
            if compared:
                other = [label, f"{median(times[f'diffusers: {key}']):.3f}", f"{faster:.2f}{verdict}"]
            rows.append([method, seconds, *other, twice, share])
            if method != "unguided":
                limit, measured = counted["step"] / flops["unguided"]["step"], ratio(times, mine, "ours: unguided")
                near = "within 5 %" if measured <= 1.05 * limit else "not within 5 %"
                limits.append([f"{method} / unguided", f"{measured:.3f}", f"{limit:.3f}",
                               f"{percent(measured / limit)} ({near})"])  # fmt: skip
        title = f"### {one['px']} px, {one['dtype']}, {one['device']}"
        head = ("ours", "s", "diffusers", "s", "times faster", "than 2 rows", "of the matmul ceiling")
        rounds = len(times["ours: unguided"])
        note = f"Medians of {rounds} interleaved rounds; matmul ceiling {ceiling / 1e12:.3f} TFLOP/s, measured."
        out += [title, note, table(head, rows)]
        out += [table(("ratio of ours", "measured", "FLOP limit", "above it"), limits)]
    return out


def show_memory(results: list[dict], options: argparse.Namespace) -> list[str]:
    rows = []
    for one in results:
        mine, other = one["ours"], one["diffusers"]
        sizes = [f"{z / GIB:.2f}" for z in (mine["whole"], other["whole"], mine["above"], other["above"])]
        higher = "higher" if mine["whole"] > other["whole"] * 1.005 else "not higher"
        rows.append([one["method"], one["px"], *sizes, higher])
    head = ("step", "px", "ours, GiB", "diffusers, GiB", "ours above the weights", "diffusers above the weights", "")
    return ["## Peak memory", "Two steps in a separate process, weights included.", table(head, rows)]


def show_start(results: dict, options: argparse.Namespace) -> list[str]:
    return ["## Start-up", table(("process", "s"), [[k, f"{v:.2f}"] for k, v in results.items()])]


def show_load(results: dict, options: argparse.Namespace) -> list[str]:
    text = (
        f"A random SDXL of full size, one float16 file of 6.9 GB, to {results['dtype']}: {results['seconds']:.1f} s, "
        f"peak {results['above'] / GIB:.2f} GiB for {results['weights'] / GIB:.2f} GiB of weights."
    )
    return ["## Loading", text]


def show_decode(results: list[dict], options: argparse.Namespace) -> list[str]:
    rows = [
        [d["px"], d["dtype"], *(f"{median(d['times'][k]):.2f}" for k in ("ours", "diffusers")),
         f"{ratio(d['times'], 'diffusers', 'ours'):.2f}"] for d in results
    ]  # fmt: skip
    return ["## VAE decode at full size", table(("px", "dtype", "ours, s", "diffusers, s", "times faster"), rows)]


def show_mini(results: dict, options: argparse.Namespace) -> list[str]:
    ceiling, rows = results["ceiling"], []
    for r in results["steps"]["rows"]:
        share = f"{100 * r['flops'] / r['seconds'] / ceiling:.0f} %"
        rows.append([r["method"], r["batch"], f"{1e3 * r['seconds'] / r['batch']:.2f}", share])
    decode = [[d["part"], f"{1e3 * d['seconds'] / d['images']:.2f}"] for d in results["steps"]["decode"]]
    whole = [[w["ways"], w["batch"], w["images"], f"{w['images'] / w['seconds']:.2f}"] for w in results["images"]]
    return [
        "## mini",
        f"fp32; matmul ceiling {ceiling / 1e9:.0f} GFLOP/s, measured.",
        table(("step", "batch", "ms an image", "of the matmul ceiling"), rows),
        table(("decode, images at a time", "ms an image"), decode),
        f"SEG, {results['images'][0]['steps']} steps, from text to pixels:",
        table(("processes × threads", "batch", "images", "images/s"), whole),
    ]


def show_terms(results: list[dict], options: argparse.Namespace) -> list[str]:
    base = results[0]["seconds"]
    rows = [[f["terms"], f"{f['seconds'] / base:.2f}", f"{f['flops_ratio']:.2f}"] for f in results]
    return ["## Number of SEG terms (mini)", table(("terms", "time / unguided", "FLOP limit"), rows)]


def show_compile(results: dict, options: argparse.Namespace) -> list[str]:
    faster, times = ratio(results["times"], "eager", "compiled"), results["times"]
    text = (
        f"CFG+SEG on mini, batch {results['batch']}: {median(times['eager']):.3f} s eager, "
        f"{median(times['compiled']):.3f} s compiled ({faster:.2f} × faster) after {results['compile_seconds']:.0f} s "
        f"of compiling; largest difference {results['max_difference']:.1e}."
    )
    return ["## torch.compile", text]


def show_analysis(results: list[dict], options: argparse.Namespace) -> list[str]:
    rows = [
        [f["load"], f["way"], f"{f['seconds']:.2f}",
         f"{f['seconds_for_all']:.1f}" + (" (est.)" if f["share_measured"] < 1 else ""), f"{f['peak_megabytes']:.0f}"]
        for f in results
    ]  # fmt: skip
    return ["## Analysis: streamed next to whole maps", table(("load", "way", "s", "s for all", "peak MB"), rows)]


def sizes(options: argparse.Namespace) -> list[int]:
    return options.px or [256, 512]


def measure(part: str, options: argparse.Namespace) -> Any:
    """The results of one part, as plain data."""
    quick, threads, device, dtype = options.quick, options.threads, options.device, "bfloat16"
    rounds = options.rounds or (2 if quick else 7)
    if part == "limits":
        from networks import steps_flops

        methods = (*FULL, "ControlNet")
        counted = sorted({*sizes(options), *(() if quick else (1024,))})
        return [{"px": px, "flops": {w: steps_flops(px, w) for w in methods}} for px in counted]
    if part == "steps":
        from networks import steps_flops

        methods, results = QUICK if quick else FULL, []
        ceiling = child("matmul_ceiling", threads, dtype=dtype, device=device, size=2048)
        for px in sizes(options):
            arguments = {"px": px, "dtype": dtype, "device": device, "methods": methods, "rounds": rounds}
            one = child("steps", threads, **arguments, alone=ALONE if quick else ())
            results.append(one | {"ceiling": ceiling, "flops": {method: steps_flops(px, method) for method in methods}})
        return results
    if part == "memory":
        results, largest = [], max(sizes(options))
        for method, key in (("unguided", "unguided"), ("SEG", "PAG"), ("ControlNet+SEG", "ControlNet+PAG")):
            if method != "SEG" and quick:
                continue
            same = {"px": largest, "dtype": dtype, "device": device}
            both = (("ours", method), ("diffusers", key))
            ours, diffusers = (child("peak", threads, who=who, method=name, **same) for who, name in both)
            results.append({"method": method, "px": largest, "ours": ours, "diffusers": diffusers})
        return results
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
            "steps": child("mini_steps", threads, batches=batches, methods=few, rounds=rounds),
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
    """Images a second of one process with all threads, and of as many processes as threads with one each."""
    results: list[dict] = []
    images, steps = (32, 10) if quick else (1000, 25)
    for batch in (8,) if quick else (25,):
        one = child("mini_images", threads, images=images, batch=batch, steps=steps)
        results.append(one | {"ways": f"1 × {threads}"})
        share = {"images": images // threads, "batch": batch, "steps": steps}
        command = [sys.executable, __file__, "--child", "mini_images", json.dumps(share), "--threads", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        running = [subprocess.Popen(command, **piped) for _ in range(threads)]
        shares = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
        together = {"images": sum(e["images"] for e in shares), "seconds": max(e["seconds"] for e in shares)}
        results.append(shares[0] | together | {"ways": f"{threads} × 1"})
    return results


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
    summary = ", ".join(f"{k} {v}" for k, v in facts.items() if v is not None)
    lines = ["# Measured", f"    python benchmarks/run.py {' '.join(sys.argv[1:])}", f"Machine: {summary}."]
    results: dict[str, Any] = {"machine": facts, "options": sys.argv[1:], "seconds": {}}
    print("\n\n".join(lines), flush=True)
    for part in options.only or PARTS:
        if not options.only and options.quick and part in SLOW:
            continue
        start = time.perf_counter()
        results[part] = measure(part, options)
        results["seconds"][part] = time.perf_counter() - start
        section = globals()[f"show_{part}"](results[part], options)
        lines += section
        print("\n" + "\n\n".join(section), flush=True)
        print(f"\n({part}: {results['seconds'][part]:.0f} s)", file=sys.stderr, flush=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(partial, options.out)
    if options.markdown:
        before = options.markdown.read_text() if options.markdown.is_file() else ""
        options.markdown.write_text(with_start(before, "\n\n".join(lines)))


if __name__ == "__main__":
    main()
