"""Measuring: interleaved rounds, medians, peak memory, one process per part, the machine.

All candidates take turns within each round, in one process, so that other load on the machine slows all of them.
Times are medians over the rounds. Ratios are medians of the ratios within rounds.
"""

import contextlib
import gc
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ON_A_CPU, ON_A_GPU = "# Measured", "# On a GPU: "  # the starts of sections of RESULTS.md
Calls = Mapping[str, Callable[[], Any]]


def interleaved(calls: Calls, rounds: int, device: str = "cpu", warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every call in every round, after `warm` uncounted rounds."""
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for number in range(-warm, rounds):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """Median over the rounds of time[over] / time[under]."""
    return median([a / b for a, b in zip(times[over], times[under], strict=True)])


def resident() -> int:
    """Bytes of the resident set."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Peak:
    """The largest resident set inside, sampled every 2 ms: `whole`, and `bytes` above that at entry."""

    def __enter__(self) -> "Peak":
        self.start = self.whole = resident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.002):
            self.whole = max(self.whole, resident())

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.whole = max(self.whole, resident())
        self.bytes = self.whole - self.start


def child(part: str, threads: int, **arguments: Any) -> Any:
    """`part`(**arguments) of benchmarks/parts.py in a separate process with `threads` threads; its result."""
    command = [sys.executable, str(HERE / "run.py"), "--child", part, json.dumps(arguments), "--threads", str(threads)]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{part} {arguments} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def bounded(command: Sequence[str], limit: float, log: Path, **environment: str) -> str:
    """Runs `command` for at most `limit` seconds, with its output in `log`. Returns "" or the failure in one line.

    All its child processes end with it.
    """
    with log.open("a") as file:
        streams: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True, **streams)
        try:
            code = process.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not code:
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"ended with {code}: {lines[-1].strip()[:300] if lines else 'no message'}"


def write(path: Path, text: str) -> None:
    """Replaces the content of the file by `text`, atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def sections(text: str) -> dict[str, str]:
    """The sections of a results file by their first lines, "# ..."."""
    parts = [part.strip() for part in re.split(r"(?m)^(?=# )", text) if part.strip()]
    return {part.splitlines()[0]: part for part in parts}


def with_sections(text: str, new: str) -> str:
    """`text` with the sections of `new`: each replaces the one with the same first line, or is appended."""
    return "\n\n".join((sections(text) | sections(new)).values()) + "\n"


def with_start(text: str, start: str) -> str:
    """`text` with its CPU sections replaced by `start`, and all other sections kept."""
    others = [part for line, part in sections(text).items() if not line.startswith(ON_A_CPU)]
    return "\n\n".join([start.strip(), *others]) + "\n"


def machine(threads: int) -> dict[str, Any]:
    """The machine and the versions that the numbers depend on."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line)
        cpu = next(lines, cpu)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": threads, "load_at_start": round(load, 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "diffusers", "segresearch")},
    }  # fmt: skip


def installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with padded columns."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
