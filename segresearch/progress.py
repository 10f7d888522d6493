"""How far a run is: a bar on a terminal; elsewhere (a pipe, a job's log) a line now and then. Light: no torch."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

EVERY_SECONDS, EVERY_SHARE, SHORTEST = 60.0, 0.05, 10.0  # of lines: after a minute or 5 %, never within 10 s
FORMAT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}"


class Bar:
    """Progress over `total` units, in parts of a unit: `callback` counts the steps of a batch, `add` its end.

    watch: is given the numbers of each moment (`wandb_live`): what is done, the share, the speed, of each method what
    is done of it.
    """

    def __init__(
        self, total: int, unit: str = "image", stream: Any = None, clock: Callable[[], float] = time.monotonic,
        watch: Callable[[dict[str, float]], None] | None = None,
    ):  # fmt: skip
        self.total, self.unit, self.clock, self.watch = total, unit, clock, watch
        self.numbers: dict[str, float] = {}  # what `watch` is told beside
        self.stream = sys.stderr if stream is None else stream
        self.done, self.passed = 0, 0.0  # whole units; with the parts of the batch that runs
        self.name = self.of = ""
        self.start = self.last = clock()
        self.said = 0.0  # share of the last line
        self.bar = tqdm(total=total, unit=unit, file=self.stream, leave=False, smoothing=0.0, bar_format=FORMAT,
                        disable=not has_columns(self.stream))  # fmt: skip

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def describe(self, name: str, by: str = "") -> None:
        """What runs now, in front of the bar: a method, and by whom where there are several."""
        self.of, self.name = name, f"{by}, {name}" if by else name
        self.bar.set_description(self.name)  # tqdm puts a colon behind it

    def tell(self, text: str) -> None:
        """A line where there is no terminal, such as what begins now."""
        if self.bar.disable:
            print(text, file=self.stream, flush=True)

    def callback(self, count: int, rows: int, steps: int) -> Callable[[dict[str, Any]], None]:
        """For `sample`: the steps of a batch of `rows` images, which are `count` units. Nothing is read from x."""

        def report(info: dict[str, Any]) -> None:
            part: slice = info.get("rows", slice(0, rows))
            share = (part.start + min(1.0, (info["i"] + 1) / steps) * (part.stop - part.start)) / rows
            self._at(self.done + count * min(share, 0.99))  # the rest is decoding and writing

        return report

    def add(self, count: int) -> None:
        """`count` more units are done."""
        self.done += count
        if key := f"done/{self.of}" if self.of else "":
            self.numbers[key] = self.numbers.get(key, 0) + count
        self._at(float(self.done))

    def _at(self, passed: float) -> None:
        self.passed = max(self.passed, passed)
        self.bar.update(max(0.0, self.passed - self.bar.n))
        if self.watch is not None and self.total:
            speed = self.passed / max(self.clock() - self.start, 1e-9)
            self.watch({
                f"{self.unit}s": round(self.passed, 3), "share": round(self.passed / self.total, 5),
                f"{self.unit}s_per_second": round(speed, 5), **self.numbers,
            })  # fmt: skip
        if not self.bar.disable or not self.total:
            return
        now, share = self.clock(), self.passed / self.total
        waited = now - self.last
        if waited >= EVERY_SECONDS or waited >= SHORTEST and share >= self.said + EVERY_SHARE:
            self.last, self.said = now, share
            left = _time((now - self.start) * (1 / share - 1)) if share else "unknown time"
            text = f"{share:.0%} of {self.total} {self.unit}s, {_time(now - self.start)}, about {left} left"
            print(f"{self.name}: {text}" if self.name else text, file=self.stream, flush=True)


def has_columns(stream: Any) -> bool:
    """Whether a bar can be drawn: on a terminal that has a width, which one that a job started may lack."""
    try:
        return bool(stream.isatty() and os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):
        return bool(stream.isatty())


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
