"""Run the GPU tests and the benchmark within a time limit, and write one file of results: benchmarks/gpu.sh.

    python benchmarks/gpu.py                        # 9 minutes at most; results in runs/gpu/results.md
    python benchmarks/gpu.py --device cpu --smoke   # the same code at tiny sizes, without a GPU
    python benchmarks/gpu.py --only bench           # or tests
    python benchmarks/gpu.py --keep runs/gpu/results.md      # its tables into benchmarks/RESULTS.md

Every test file and every part of the benchmark is a separate process with a time limit. The file is rewritten after
each, so that an interrupted run keeps its results. The ends of all logs are write beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from cuda_plan import counting, plan, run_part, warm_up  # noqa: E402
from cuda_tables import tables  # noqa: E402
from harness import HERE, ON_A_GPU, bounded, machine, table, with_sections, write  # noqa: E402

ROOT = HERE.parent
TESTS = ("study", "generate", "full_size", "compute", "images")  # files of tests/gpu
TESTS_LIMIT = 220.0  # seconds a file
SMALL = "every_method and sag_cfg or guess or follows or guided_steps or analyze or device_gives"  # for a trial
MOST = 900_000  # characters of the file
LOG = 20_000  # characters of the end of a log that are kept
NUMBERS = "## All numbers"


class Results:
    """The results so far. `save` writes all of them."""

    def __init__(self, folder: Path, work: Path, facts: dict[str, Any]):
        self.folder, self.work, self.facts = folder, work, facts
        self.tests: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.lock = threading.Lock()

    def save(self) -> None:
        with self.lock:
            self._save()

    def _save(self) -> None:
        summary = ", ".join(f"{k} {v}" for k, v in self.facts.items() if v is not None)
        heading = f"{ON_A_GPU}{self.facts['gpu'] or 'none, a trial'}, commit {self.facts['commit']}"
        lines = [heading, f"    benchmarks/gpu.sh {' '.join(sys.argv[1:])}".rstrip(), f"Machine: {summary}."]
        lines += ["; ".join(self.notes) + "."] if self.notes else []
        lines += self.test_tables() + (["## Benchmark", *tables(self.parts)] if self.parts else [])
        raw = {"facts": self.facts, "tests": self.tests, "parts": self.parts}
        text = ("\n\n".join(lines) + "\n").replace(f"{ROOT}/", "")
        for content in (raw, {"facts": self.facts, "parts": self.parts}):
            whole = f"{text}\n{NUMBERS}\n\n```json\n{json.dumps(content)}\n```\n"
            if len(whole) < MOST:
                break
        write(self.folder / "results.md", whole[:MOST])
        logs = [f"==> {p.name}\n{p.read_text(errors='replace')[-LOG:]}" for p in sorted(self.work.glob("*.log"))]
        write(self.folder / "logs.txt", "\n".join(logs))

    def test_tables(self) -> list[str]:
        """Counts of passed tests, the failed tests, and the numbers that tests recorded."""
        if not self.tests:
            return []
        rows, failed, notes = [], [], []
        for name, one in self.tests.items():
            ends = [n for n in one["notes"] if n["name"] == "test"]
            count = {kind: sum(n["value"] == kind for n in ends) for kind in ("passed", "failed", "skipped")}
            rows.append([name, *count.values(), one["seconds"], one["failed"]])
            failed += [f"- {n['test']}: {n['value']}: {' '.join(n['reason'].split())[:300]}"
                       for n in ends if n["value"] != "passed"]  # fmt: skip
            notes += [f"| {n['name'][:100]} | {cell(n['value'])} |" for n in one["notes"] if n["name"] != "test"]
        out = ["## Tests", table(("file", "passed", "failed", "skipped", "s", ""), rows)]
        out += ["\n".join(failed)] if failed else []
        return out + (["\n".join(["| note | value |", "|---|---|", *notes])] if notes else [])


def cell(value: Any) -> str:
    """A value as the cell of a table."""
    text = f"{value:.3g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, dict) else str(value)
    return " ".join(text.replace("|", "/").split())[:120]


def commit() -> str:
    """The commit of the code: $COMMIT (for a copy without its git history), else git's."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    call = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=20)
        described = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        described = ""
    return described or "unknown"


def driver() -> str | None:
    call = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def test_file(name: str, folder: Path, device: str, limit: float) -> dict[str, Any]:
    """How the tests of tests/gpu/test_gpu_`name`.py ended, and their notes, in at most `limit` seconds."""
    notes, log = folder / f"tests-{name}.jsonl", folder / f"tests-{name}.log"
    notes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5",
               str(ROOT / "tests" / "gpu" / f"test_gpu_{name}.py"), "--rootdir", str(ROOT)]  # fmt: skip
    if device == "cpu":
        command += ["-k", SMALL]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"SEGRESEARCH_TEST_DEVICE": device, "SEGRESEARCH_TEST_NOTES": str(notes), "PYTHONPATH": paths}
    start = time.perf_counter()
    failed = bounded(command, limit, log, **environment)
    lines = notes.read_text().splitlines() if notes.is_file() else []
    return {"failed": failed, "seconds": round(time.perf_counter() - start, 1),
            "notes": [json.loads(line) for line in lines if line.endswith("}")]}  # fmt: skip


def run(
    device: str, smoke: bool, only: Sequence[str], limit: float, folder: Path, parts: Sequence[str] = ()
) -> Results:
    """Everything, in `limit` seconds. Compilations run in parallel with the first test files.

    parts: the selected parts of the benchmark, by their first words; none: all.
    """
    end = time.monotonic() + limit
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**machine(os.cpu_count() or 1), "driver": driver(), "commit": commit()}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        results = Results(folder, Path(work), facts)
        _run(results, Path(work), device, smoke, only, end, parts)
    return results


def _run(
    results: Results, work: Path, device: str, smoke: bool, only: Sequence[str], end: float, parts: Sequence[str]
) -> None:
    start = time.monotonic()
    results.save()
    threads = {name: "1" if device == "cpu" else "4" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
             "TORCHINDUCTOR_AUTOGRAD_CACHE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}  # fmt: skip
    if smoke:
        cache["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes minutes without a GPU

    def left(reserve: float = 5.0) -> float:
        return end - time.monotonic() - reserve

    def run_tests(name: str) -> None:
        results.tests[name] = test_file(name, work, device, min(TESTS_LIMIT, left()))
        results.save()

    def compile_part(part: Any) -> None:
        done = run_part(part, work, left(), **cache, **threads)
        results.notes.append(f"{part.name}: {done['seconds']:.0f} s {done['failed']}".rstrip())
        results.save()

    def count(part: Any) -> None:
        counted.update(run_part(part, work, left(), **threads)["results"] or {})

    counted: dict[str, int] = {}
    os.environ.update(threads)
    together: list[tuple[Any, Any]] = [(run_tests, name) for name in TESTS] if "tests" in only else []
    together += [(count, counting(smoke))] if "bench" in only else []
    compiles = "bench" in only and (not parts or "compiled" in parts)
    together += [(compile_part, part) for part in warm_up(device, smoke)] if compiles else []
    with ThreadPoolExecutor(2 if device == "cpu" else max(1, len(together))) as pool:
        for future in [pool.submit(call, argument) for call, argument in together]:
            future.result()
    selected = [part for part in plan(device, smoke) if not parts or part.name.startswith(("ceiling", *parts))]
    for part in selected if "bench" in only else ():
        if part.function == "steps" and counted:
            part.arguments["counted"] = counted
        if left() < 15:
            results.parts[part.name] = {"results": None, "failed": "not started: no time left", "seconds": 0}
        else:
            results.parts[part.name] = run_part(part, work, left(), **cache, **threads)
        results.save()
        print(f"{part.name}: {results.parts[part.name]['seconds']} s {results.parts[part.name]['failed']}", flush=True)
    results.facts["seconds"] = round(time.monotonic() - start)
    results.save()


def bench(device: str, quick: bool, parts: Sequence[str] | None, markdown: Path | None) -> None:
    """The benchmark alone, in under seven minutes. Prints its tables and writes them into the file `markdown`."""
    refuse_without(device)
    selected = parts or (("steps", "images", "decode", "memory") if quick else ())
    folder = Path("runs/gpu")
    run(device, False, ["bench"], 410, folder, selected)
    section = (folder / "results.md").read_text().partition(f"\n{NUMBERS}")[0]
    print(section)
    if markdown:
        write(markdown, with_sections(markdown.read_text() if markdown.is_file() else "", section))


def refuse_without(device: str) -> None:
    """SystemExit, in one line, if there is no such GPU."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no GPU here: torch finds no CUDA device; gpu.py --device cpu --smoke tries the code without")


def keep(results: Path) -> None:
    """Copy the tables of a results.md into benchmarks/RESULTS.md, without the raw numbers."""
    path = HERE / "RESULTS.md"
    section = results.read_text().partition(f"\n{NUMBERS}")[0]
    if not section.startswith(ON_A_GPU):
        raise SystemExit(f"{results}: begins with {section[:20]!r}, not with {ON_A_GPU!r}: give a file of gpu.sh")
    write(path, with_sections(path.read_text(), section))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the code")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--only", nargs="+", default=["tests", "bench"], choices=["tests", "bench"])
    parser.add_argument("--limit", type=float, default=530, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu"))
    parser.add_argument("--keep", type=Path, metavar="RESULTS", help="put the tables of this file into RESULTS.md")
    options = parser.parse_args()
    if options.keep:
        return keep(options.keep)
    refuse_without(options.device)
    results = run(options.device, options.smoke, options.only, options.limit, options.out)
    print("\n\n".join(results.test_tables()[:3]))
    print(f"results: {options.out / 'results.md'}")
    if any(one["failed"] for one in results.tests.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
