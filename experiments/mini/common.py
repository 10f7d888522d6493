"""Shared by the training scripts: keyed randomness, learning rate, averaged weights, checkpoints and the loss log.

A training is a function of (seed, step). Batch n and its noise come from generators that are keyed by step n. So a run
that is interrupted and resumed from its checkpoint ends at the same weights as an uninterrupted one.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from segresearch.errors import Ended


def replace_file(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: under a temporary name, then renamed. `content` is its bytes, or a function that writes
    them.

    A reader never sees half of the file. A failed write leaves the old file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    replace_file(path, lambda file: np.save(file, array))


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    replace_file(path, lambda file: torch.save(dict(state), file))


AGAIN = "remove it, and the same command resumes"


def read_json(path: Path) -> Any:
    """What a JSON file holds. Ended(4) for one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Ended(4, f"{path}: damaged, not JSON; {AGAIN}") from error


def load_state(path: Path, hint: str = "", device: Any = None) -> dict[str, Any]:
    """What `save_state` wrote. Ended(4) for a damaged file; hint: what to do then. OSError where it is missing."""
    try:
        state = torch.load(path, weights_only=True, map_location=device)
        if isinstance(state, dict):
            return state
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch has many for a file that is not its own
        raise Ended(4, f"{path}: damaged; {hint or PRODUCT}") from error
    raise Ended(4, f"{path}: not of a training; {hint or PRODUCT}")


PRODUCT = "remove it and the file of its part in RUNS/parts, and the same command makes it again from its checkpoint"


def logged_lines(log: Path, step: int) -> list[str]:
    """The lines of a log up to a step; a last line that a loss of power cut is left out. Ended(4) for another that is
    damaged."""
    kept, lines = [], log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            if number < len(lines):
                raise Ended(4, f"{log}, line {number}: damaged, not JSON; remove the line, "
                               "and the same command resumes") from error  # fmt: skip
    return kept


def generator(*key: int) -> torch.Generator:
    """A generator for a key, such as (seed, stream, step)."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )


def batch_indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Indices (batch,) of batch `step`. Epochs are keyed permutations of range(count), without an incomplete batch."""
    epoch, position = divmod(step, count // batch)
    return torch.randperm(count, generator=generator(seed, 101, epoch))[position * batch : (position + 1) * batch]


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.0, hold: float = 0.0) -> float:
    """Linear warm-up to `peak`, constant until step hold · steps, then half a cosine to floor · peak at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, int(hold * steps))
    if step < start:
        return peak
    progress = min(1.0, (step - start) / max(1, steps - start))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class Average:
    """Exponential moving average of the weights, with a decay that grows from 0 to `decay` as (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged, current = list(self.weights.values()), [v.detach() for v in model.state_dict().values()]
        torch._foreach_lerp_(averaged, current, 1 - decay)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def slowest(rate: float) -> float:
    """The lowest rate of the worker processes."""
    if world() == 1:
        return rate
    lowest = torch.tensor([rate], dtype=torch.float64)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return lowest.item()


@torch.no_grad()
def share_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Replace every gradient by its mean over the worker processes, if there are several. Returns the mean loss."""
    if world() == 1:
        return loss.detach()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [loss.detach().reshape(1)])
    dist.all_reduce(flat)
    flat /= world()
    parts = flat[:-1].split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])
    return flat[-1]


TIMED = range(10, 30)  # steps that are timed where a training has a time and no number of steps


@dataclass(frozen=True)
class Plan:
    """Settings of a training. stop: end the process at this step, while the learning rate is that of `steps`.

    seconds: choose the number of steps that this machine takes in so many seconds, in place of `steps`. It is measured
    on steps TIMED of the first start, written to <folder>/steps.json, and holds from there on.
    """

    steps: int
    peak: float = 1e-3
    warmup: int = 200
    floor: float = 0.0
    hold: float = 0.0
    decay: float = 0.999
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    save_every: int = 500
    log_every: int = 50
    stop: int | None = None
    seconds: float | None = None

    @staticmethod
    def of(args: argparse.Namespace, **settings: Any) -> "Plan":
        """From `arguments`; settings: further fields."""
        return Plan(args.steps, peak=args.peak, stop=args.stop, seconds=args.seconds, **settings)

    def rate(self, step: int, steps: int | None) -> float:
        """The learning rate of a step. steps: of the training, None before they are measured."""
        if steps is None or step < TIMED.stop:  # so that a training that starts again repeats it
            return self.peak * min(1.0, (step + 1) / self.warmup)
        return learning_rate(step, steps, self.peak, self.warmup, self.floor, self.hold)


def known_steps(folder: Path, plan: Plan, measured: int | None = None) -> int | None:
    """The steps of a training: those of the plan, or where it has a time, those in <folder>/steps.json. measured: to be
    written there, where there are none yet. None where they are not known."""
    if plan.seconds is None:
        return plan.steps
    path = folder / "steps.json"
    if measured is not None and not path.exists():
        replace_file(path, json.dumps({"steps": measured, "seconds": plan.seconds}).encode())
    steps = read_json(path) if path.exists() else {"steps": None}
    if not isinstance(steps, dict) or not isinstance(steps.get("steps"), int | None):
        raise Ended(4, f"{path}: damaged, no number of steps; {AGAIN}")
    return steps.get("steps")


def arguments(parser: argparse.ArgumentParser, steps: int, batch: int, peak: float) -> argparse.Namespace:
    """Those of `parser` and those that every training has, with these defaults, from the command line. torch runs with
    the threads of them from here on."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seconds", type=float, help="train for about this long, in place of --steps")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--peak", type=float, default=peak, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stop", type=int, help="end the process at this step; the same command goes on")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def train(
    folder: Path,
    model: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, Mapping[str, float | Tensor]]],
    plan: Plan,
    metadata: Mapping[str, Any],
    at_save: Callable[[int, Mapping[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Train `model` on loss_of(step) -> (loss, numbers to log). Returns the averaged weights.

    <folder>/checkpoint.pt holds the newest state, from which training resumes. <folder>/loss.jsonl gets a line every
    log_every steps. metadata: written into that log at every start. at_save(step, averaged weights) is called after
    each checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, undecayed = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.peak, betas=plan.betas, fused=True)
    average = Average(model, plan.decay)
    checkpoint, log, start, earlier = folder / "checkpoint.pt", folder / "loss.jsonl", 0, 0.0
    if checkpoint.exists():
        hint = "remove it, and the same command begins this training again"
        state = load_state(checkpoint, hint, next(iter(average.weights.values())).device)
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            average.weights = state["average"]
            start, earlier = state["step"], state["seconds"]
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise Ended(4, f"{checkpoint}: of another training than this; {hint}") from error
    lines = logged_lines(log, start)
    lines.append(
        json.dumps({"step": start, "facts": {**metadata, "plan": vars(plan), "threads": torch.get_num_threads()}})
    )
    leader = rank() == 0
    if leader:
        replace_file(log, "".join(f"{line}\n" for line in lines).encode())
    sums: dict[str, Any] = {}
    begin, mark, last = time.monotonic(), time.monotonic(), start
    steps = known_steps(folder, plan)
    stop = min(filter(None, (steps, plan.stop)), default=None)
    model.train()
    for step in itertools.count(start):
        if steps is None and step == TIMED.start:
            timed = time.monotonic()
        if steps is None and step == TIMED.stop:
            assert plan.seconds is not None
            rate = slowest(len(TIMED) / (time.monotonic() - timed))
            steps = known_steps(folder, plan, max(TIMED.stop + 1, int(plan.seconds * rate)))
            stop = min(filter(None, (steps, plan.stop)))
        if stop is not None and step >= stop:
            break
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step, steps)
        loss, values = loss_of(step)
        loss.backward()
        loss = share_gradients(model, loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
        for key, value in {"loss": loss, "norm": norm, **values}.items():  # read below: to read here would wait
            sums[key] = sums.get(key, 0.0) + value
        if steps is None:
            loss.item()  # waits, so that the time is that of whole steps
        now, done = time.monotonic(), step + 1
        if not leader:
            continue
        if done % plan.log_every == 0 or done == stop:
            n = done - last
            line = {"step": done, **{k: round(float(v) / n, 6) for k, v in sums.items()}}
            line |= {"lr": round(optimizer.param_groups[0]["lr"], 8), "seconds": round(earlier + now - begin, 1)}
            line["steps_per_second"] = round(n / (now - mark), 3)
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
            sums, mark, last = {}, now, done
        if done % plan.save_every == 0 or done == stop:
            state = {"step": done, "seconds": earlier + now - begin, "model": model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "average": average.weights}
            save_state(checkpoint, state)
            if at_save is not None:
                at_save(done, {k: v.cpu() for k, v in average.weights.items()})
    return {k: v.cpu() for k, v in average.weights.items()}
