"""The arithmetic of docs/evaluation.md: what 30,000 images × 40 methods cost on SDXL, from steps measured on a GPU."""

import math
import re
from typing import NamedTuple

IMAGES, METHODS, STEPS = 30_000, 40, 25
GPUS = (8, 64, 512)
SHARDS = (100, 20)  # images
# Measured on one H200: fp16, 1024 px, batch 1, eager. Seconds of a step by its operations over a plain step.
STEP = {1.0: 0.044, 1.67: 0.052, 2.67: 0.059}  # plain, SEG, CFG+SEG
WHOLE = 3.0  # seconds of 25 steps of CFG+SEG in one call of the sampler
DECODE = 0.1
METRICS = 0.1  # assumed: Inception, LPIPS and CLIP of an image
IMAGE = 3 * 1024 * 1024  # bytes
FEATURES = 4 * 2048  # bytes
RESAMPLE = 4.0  # assumed: seconds of one Fréchet distance of 2048 features, on 32 threads
RESAMPLES = 23  # of a method at n_bootstrap=20: with the distance itself and those of its extrapolation


class Share(NamedTuple):
    """Ranges of the busiest worker, its hours, and the share of all workers' time that is idle."""

    ranges: int
    hours: float
    idle: float


def step(operations: float) -> float:
    """Seconds, on the line between the measured steps (beyond the last: continued)."""
    (x0, y0), (x1, y1), (x2, y2) = STEP.items()
    if operations > x1:
        return y1 + (y2 - y1) * (operations - x1) / (x2 - x1)
    return y0 + (y1 - y0) * (operations - x0) / (x1 - x0)


def mean_step(guidance: str) -> tuple[float, float]:
    """Operations over a plain step, and seconds, of the mean method of the table of costs in docs/guidance.md."""
    (table,) = re.findall(r"<!-- cost: begin -->\n(.*?)<!-- cost: end -->", guidance, re.DOTALL)
    operations = [float(line.split("|")[3]) for line in table.splitlines()[2:]]
    return sum(operations) / len(operations), sum(map(step, operations)) / len(operations)


def picture(seconds: float) -> float:
    """Seconds of one image of a method of such a step: the measured ratio of whole samplings to their steps."""
    return seconds * STEPS * WHOLE / (STEPS * STEP[2.67]) + DECODE + METRICS


def share(gpus: int, shard: int, seconds: float) -> Share:
    """Each worker has every `gpus`-th range; seconds: of an image."""
    ranges = math.ceil(IMAGES / shard)
    busiest = math.ceil(ranges / gpus)
    return Share(busiest, busiest * shard * METHODS * seconds / 3600, 1 - ranges / (busiest * gpus))


def plan(guidance: str) -> dict[str, str]:
    """Texts by the names of their marks."""
    operations, seconds = mean_step(guidance)
    one = picture(seconds)
    least = seconds * STEPS + DECODE + METRICS
    hours = IMAGES * METHODS * one / 3600
    lines = ["| GPUs | images a shard | ranges | the busiest worker | time | idle at the end |",
             "|---:|---:|---:|---|---:|---:|"]  # fmt: skip
    for gpus in GPUS:
        for shard in SHARDS:
            s = share(gpus, shard, one)
            took = f"{s.hours / 24:.1f} days" if s.hours > 48 else f"{s.hours:.1f} hours"
            ranges = math.ceil(IMAGES / shard)
            lines.append(f"| {gpus} | {shard} | {ranges:,} | {s.ranges} of {ranges / gpus:.1f} | {took} | "
                         f"{100 * s.idle:.1f} % |")  # fmt: skip
    files = {shard: math.ceil(IMAGES / shard) * METHODS for shard in SHARDS}
    kept = {shard: math.ceil(64 / shard) * shard * METHODS * IMAGE / 1e9 for shard in SHARDS}
    return {
        "plan.operations": f"{operations:.2f}", "plan.step": f"{seconds:.3f}", "plan.image": f"{one:.2f}",
        "plan.ratio": f"{WHOLE / (STEPS * STEP[2.67]):.2f}", "plan.hours": f"{hours:,.0f}",
        "plan.least": f"{IMAGES * METHODS * least / 3600:,.0f}", "plan.gpus": "\n".join(lines),
        "plan.range": " and ".join(f"{shard * METHODS * one / 3600:.1f}" for shard in SHARDS),
        "plan.lost": " and ".join(f"{shard * one / 60:.1f}" for shard in SHARDS),
        "plan.files": " or ".join(f"{count:,}" for count in files.values()),
        "plan.features": f"{IMAGES * METHODS * FEATURES / 1e9:.1f}",
        "plan.kept": " or ".join(f"{size:.1f}" for size in kept.values()),
        "plan.all": f"{IMAGES * METHODS * IMAGE / 1e12:.1f}",
        "plan.reduce": f"{METHODS * RESAMPLES * RESAMPLE / 60:.0f}",
    }  # fmt: skip
