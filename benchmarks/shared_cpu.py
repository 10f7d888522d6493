"""Seconds of rendering `scenes(range(1024))`, alone and next to busy processes on the other cores.

    env -u OMP_NUM_THREADS python benchmarks/shared_cpu.py                # one busy process for each other core
    env -u OMP_NUM_THREADS python benchmarks/shared_cpu.py --threads 2    # the same with two threads

Rounds alternate: alone, then busy. Prints a row of benchmarks/RESULTS.md. The machine must be quiet otherwise. The row
holds the load before the run, and the CPU seconds, which other processes change little.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BUSY = "import numpy as np\na = np.random.rand(300, 300)\nwhile True: a = a @ a; a /= a.max()"
ONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def rendered(threads: int | None, count: int) -> tuple[float, float]:
    """(seconds, CPU seconds) of rendering `count` scenes, with `threads` threads; None: the package's default."""
    from segresearch.scenes.scenes import scenes
    from segresearch.threads import threads as limit

    start, cpu_start = time.perf_counter(), time.process_time()
    with limit(threads) if threads else contextlib.nullcontext():
        scenes(range(count))
    return time.perf_counter() - start, time.process_time() - cpu_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="threads; default: those of the package")
    parser.add_argument("--busy", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="busy processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=1024)
    options = parser.parse_args()
    rendered(options.threads, 64)  # warm up
    alone, beside = [], []
    load = os.getloadavg()[0]
    for _ in range(options.rounds):
        alone.append(rendered(options.threads, options.count))
        others = [subprocess.Popen([sys.executable, "-c", BUSY], env=os.environ | ONE) for _ in range(options.busy)]
        try:
            time.sleep(1)
            beside.append(rendered(options.threads, options.count))
        finally:
            for other in others:
                other.kill()
                other.wait()
    (a, cpu_a), (b, cpu_b) = ([statistics.median(z) for z in zip(*times, strict=True)] for times in (alone, beside))
    print("| threads | busy | alone, s | beside, s | ratio | CPU s | CPU s beside | load before |")
    threads = options.threads or "not stated"
    print(f"| {threads} | {options.busy} | {a:.2f} | {b:.2f} | {b / a:.2f} | {cpu_a:.2f} | {cpu_b:.2f} | {load:.2f} |")


if __name__ == "__main__":
    main()
