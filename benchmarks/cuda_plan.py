"""The parts that benchmarks/cuda.py measures, their order, and how one is run."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import HERE, bounded, installed

WAYS = ("eager", "graph", "compile", "compile+graph")
ROWS = ("unguided", "SEG", "CFG+SEG", "ControlNet+SEG")


@dataclass(frozen=True)
class Part:
    """One process: a function of cuda.py, its arguments, and its time limit in seconds."""

    name: str
    function: str
    limit: float
    arguments: dict[str, Any] = field(default_factory=dict)


def plan(device: str, smoke: bool) -> list[Part]:
    """The parts, most important first, since time may not suffice for all."""
    px, size, rounds = (64, "tiny", 2) if smoke else (1024, "full", 12)
    same = {"px": px, "device": device, "size": size}

    def steps_of(batch: int) -> Part:
        arguments = {"methods": ROWS, "ways": ("eager", "graph"), "batch": batch, "rivals": ("eager", "pipelines")}
        return Part(f"steps, batch {batch}", "steps", 110, same | arguments | {"rounds": rounds if batch == 1 else 6})

    def compiled(method: str, batch: int, rivals: Sequence[str], limit: float) -> Part:
        ways = ("graph", "compile", "compile+graph")
        arguments = {"methods": (method,), "ways": ways, "batch": batch, "rivals": rivals}
        return Part(f"compiled {method}, batch {batch}", "steps", limit, same | arguments | {"rounds": rounds})

    def images_of(batch: int) -> Part:
        arguments = {"batch": batch, "steps": 2 if smoke else 25, "ways": ("eager", "graph")}
        return Part(f"images, batch {batch}", "images", 90, same | arguments)

    first = [Part("ceiling", "ceiling", 60, {"device": device, "side": 256 if smoke else 8192}), steps_of(1),
             compiled("unguided", 1, ("eager", "compiled"), 200)]  # fmt: skip
    sides = {"sides": (64,) if smoke else (1024, 2048), "tile": 64 if smoke else 512}
    rest = [
        images_of(1),
        Part("decode", "decode", 80, {"device": device, "size": size} | sides),
        Part("trials", "trials", 90, same | {"batches": (2,) if smoke else (1, 8), "rounds": rounds}),
        Part("mini", "mini", 60, {"device": device, "batches": (2,) if smoke else (25, 100, 400),
                                         "steps": 1 if smoke else 10}),  # fmt: skip
    ]
    if smoke:
        return first + rest
    last = [
        images_of(4),
        steps_of(4),
        Part("analyze", "script", 120, {"device": device, "name": "analyze", "overrides": ()}),
        *(Part(f"memory of {who}", "memory", 60, {"px": px, "device": device, "who": who, "method": method})
          for who, method in (("ours", "SEG"), ("diffusers", "PAG"))),
    ]  # fmt: skip
    more = [compiled("CFG+SEG", 1, (), 150), compiled("unguided", 8, (), 150), steps_of(8)]
    return first + more + rest + last


def counting(smoke: bool) -> Part:
    """The part that counts operations. It needs no GPU."""
    px, size = (64, "tiny") if smoke else (1024, "full")
    return Part("flops", "flops", 120, {"px": px, "device": "cpu", "size": size, "methods": ROWS})


def warm_up(device: str, smoke: bool) -> list[Part]:
    """The compilations of `plan`, to run in parallel before it. Its kernels then come from a cache on disk."""
    parts = []
    for part in plan(device, smoke):
        if part.name.startswith("compiled "):
            arguments = part.arguments | {"rounds": 0, "rivals": (), "ways": ("compile",)}
            parts.append(Part(f"warm-up: {part.name}", "steps", 240, arguments))
            others = [b for b in part.arguments["rivals"] if b.startswith("compiled")]
            for other in others if installed("diffusers") else []:
                arguments = part.arguments | {"rounds": 0, "rivals": (other,), "ways": ()}
                parts.append(Part(f"warm-up: diffusers {other}, {part.name}", "steps", 240, arguments))
    return parts


def run_part(part: Part, folder: Path, limit: float, **environment: str) -> dict[str, Any]:
    """The results of a part in at most `limit` seconds, as {"results", "failed", "seconds"}. Its log is in `folder`."""
    name = "".join(c if c.isalnum() else "-" for c in part.name)
    into, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [sys.executable, str(HERE / "cuda.py"), part.function, json.dumps(part.arguments), str(into)]
    start = time.perf_counter()
    failed = bounded(command, min(limit, part.limit), log, PYTHONWARNINGS="default", **environment)
    results = json.loads(into.read_text()) if into.is_file() else None
    return {"results": results, "failed": failed, "seconds": round(time.perf_counter() - start, 1)}
