"""Sample the missing shards of an evaluation and measure them: which part is this process's, by torchrun's environment
or Slurm's. Workers never talk to each other."""

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from segresearch import runs
from segresearch.config.build import build_guidance
from segresearch.control_images.prepare import controlled_batch
from segresearch.errors import ConfigError, Ended, NotFinite
from segresearch.evaluation import shards
from segresearch.evaluation.image_metrics import Samples, check_size, measure
from segresearch.evaluation.shards import Array, Damaged
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.init_images import init_images
from segresearch.progress import Bar
from segresearch.sample_images import decode_images, encode_conds, run_sigmas, sample_latents
from segresearch.wandb_live import live
from segresearch.wandb_log import WandbRun

if TYPE_CHECKING:
    from segresearch.models import StableDiffusion

LAUNCHERS = (  # a step's tasks, not the job's: a batch script that calls the program once is one worker
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
SHOWN = 40  # letters of a value that is no number
LATE = 90.0  # seconds in which a file of another machine is seen: NFS remembers up to 60 that it was not there
DECODED = 10  # latents that are decoded together on a CPU, in whose cache small parts stay
PIXELS = 2**23  # of images decoded together on a GPU, at least one image
IMAGES, NORMS, COST = OF_SAMPLING = "images", "norms", "cost"  # arrays
SAMPLING = "sampled"  # their producer


@dataclass(frozen=True)
class Worker:
    """Worker `rank` (from 0) of `world`; `local` is its number on its machine, and that of its GPU. spread: the workers
    are on several machines."""

    rank: int = 0
    world: int = 1
    local: int = 0
    spread: bool = False

    def __str__(self) -> str:
        return f"worker {self.rank + 1} of {self.world}"

    def part(self, items: Sequence[Any]) -> list[Any]:
        """Every `world`-th of items, from `rank` on."""
        return list(items[self.rank :: self.world])

    def device(self, device: str) -> str:
        """ "auto" as the GPU of this worker where there are several workers; anything else as it is."""
        if device != "auto" or self.world == 1:
            return device
        return f"cuda:{self.local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def worker(environ: Mapping[str, str] = os.environ) -> Worker:
    """This process among the workers. ConfigError where the variables make no sense."""
    names = next((names for names in LAUNCHERS if environ.keys() >= set(names[:2])), None)
    if names is None:
        return Worker()

    def number(name: str, default: int = 0) -> int:
        text = environ.get(name, str(default))
        if not re.fullmatch(r"[0-9]{1,9}", text):
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
            raise ConfigError(f"{name}={shown}: not a whole number below 10⁹; the launcher sets it, else unset it")
        return int(text)

    rank, world, local = map(number, names)
    if rank >= world:
        raise ConfigError(f"{names[0]}={rank}, {names[1]}={world}: the rank must be below the number of workers")
    if names[0] == "RANK":  # torchrun
        return Worker(rank, world, local, spread=number("LOCAL_WORLD_SIZE", world) != world)
    return Worker(rank, world, local, spread=number("SLURM_STEP_NUM_NODES", 1) != 1)


@dataclass
class Progress:
    """How many images were sampled and how many existed, and a message for each shard that could not be written."""

    sampled: int = 0
    existing: int = 0
    failures: list[str] = field(default_factory=list)


def required_arrays(spec: EvaluationSpec, method: str, rows: range) -> dict[str, str]:
    """What the shard of a method and a range must hold: the producer of each array.

    images: uint8 (n, 3, h, w), of the shards up to `keep`. norms: (n, evaluations), root mean square of what guidance
    adds, for samplers that evaluate all images equally often. cost: (1,), floating-point operations of the sampling of
    one image, in the run's first shard. And an array of each metric, but the baseline's of those that compare with it.
    """
    config = spec.config
    steady = config.sampler.name != "dpm_adaptive" and not config.sampler.options.get("s_churn")
    first = rows.start == spec.numbers.start
    kept = config.keep is None or rows.start - spec.numbers.start < config.keep
    names = [name for name, held in ((IMAGES, kept), (NORMS, steady), (COST, first)) if held]
    measured = [metric for metric in spec.metrics if not (metric.baseline and method == spec.baseline)]
    return dict.fromkeys(names, SAMPLING) | {metric.array: metric.producer for metric in measured}


def missing_arrays(spec: EvaluationSpec, rows: range) -> dict[str, set[str]]:
    """The arrays that the shards of a range lack, by method; methods that lack none are left out."""
    missing = {}
    for method in spec.methods:
        lacking = required_arrays(spec, method, rows).items() - shards.producers(spec.shard(method, rows)).items()
        missing[method] = {name for name, _ in lacking}
    return {method: names for method, names in missing.items() if names}


def incomplete(spec: EvaluationSpec, progress: Progress, worker: Worker) -> str:
    """Which shards are left to other workers, "" for none. Ended(4) where no worker is left to write them."""
    missing, failed = sum(len(missing_arrays(spec, rows)) for rows in spec.ranges), ""
    if progress.failures:
        hint = "try model.dtype=float32 or lower scales"
        failed = f"{missing} shards could not be written: {progress.failures[0]}; {hint}"
        if worker.world == 1 or missing == len(progress.failures):
            raise Ended(4, failed)
    if not missing:
        return ""
    message = f"{missing} of {len(spec.shards())} shards are missing"
    if worker.world == 1:
        raise Ended(4, f"{message}; the same command without stage= writes them")
    return f"{worker} has written its part; {message}, which others write" + (f"; {failed}" if failed else "")


def await_late(spec: EvaluationSpec, worker: Worker, seconds: float = LATE) -> None:
    """Where the workers are on several machines, wait for shards that are not seen yet, at most so long. So the last
    worker to write makes the tables although its disk shows it the others' last shards late."""
    end = time.monotonic() + seconds
    missing = list(spec.ranges) if worker.spread else []
    while (missing := [rows for rows in missing if missing_arrays(spec, rows)]) and time.monotonic() < end:
        time.sleep(2)


def sample_shards(
    spec: EvaluationSpec, worker: Worker, load: Callable[[], "StableDiffusion"], mirror: WandbRun | None = None
) -> Progress:
    """Write every shard of this worker's ranges that lacks an array. Images that are stored are not sampled again.

    load: called when the first image is to be sampled. Then every method is built and every metric tried on a blank
    image, so that what cannot work fails early. mirror: the W&B run that is told of the progress.
    """

    @cache
    def loaded() -> "StableDiffusion":
        sd = load()
        sd.latent_shape(spec.config.size)
        check_size(spec.metrics, spec.config.size or sd.default_size)
        for guidance in spec.methods.values():
            build_guidance(guidance, sd)
        return sd

    own = worker.part(spec.ranges)
    todo = {rows: len(missing) for rows in own if (missing := missing_arrays(spec, rows))}
    count = sum(len(rows) * methods for rows, methods in todo.items())
    if todo:
        runs.create(Path(spec.config.out) / "shards")
    progress = Progress(existing=sum(map(len, own)) * len(spec.methods) - count)
    watched = contextlib.nullcontext() if mirror is None or not count else live(
        spec.config.wandb, Path(spec.config.out), mirror
    )  # fmt: skip
    with watched as watch, Bar(count, watch=watch) as bar:
        left = []  # ranges that another process samples: the same command twice shares the work
        for rows in todo:
            with runs.locked(spec.config.out, _lock(spec, rows), wait=False) as held:
                if held:
                    _write_range(spec, rows, loaded, bar, progress, worker)
                else:
                    left.append(rows)
        for rows in left:
            with runs.locked(spec.config.out, _lock(spec, rows)):
                _write_range(spec, rows, loaded, bar, progress, worker)  # what it did not write
    return progress


def _lock(spec: EvaluationSpec, rows: range) -> str:
    methods = runs.digest([folder.name for folder in spec.folders.values()])
    return f"images {rows.start} to {rows.stop - 1} of {spec.config.name} ({methods})"


def _write_range(spec: EvaluationSpec, rows: range, *rest: Any) -> None:
    """`_write_shards`, where each shard that proves to be damaged is dropped, and so written again."""
    for method in spec.methods:
        shards.drop_damaged(spec.shard(method, rows))
    for _ in spec.methods:
        try:
            return _write_shards(spec, rows, *rest)
        except Damaged as error:
            shards.drop(error)
    _write_shards(spec, rows, *rest)


def _write_shards(
    spec: EvaluationSpec, rows: range, load: Callable[[], "StableDiffusion"], bar: Bar, progress: Progress,
    worker: Worker,
) -> None:  # fmt: skip
    """Write the arrays that the shards of a range lack, the baseline's first: distances need its images."""
    baseline: Tensor | None = None
    controls: list[Any] = []  # of each batch; the methods share them
    relative = {metric.array for metric in spec.metrics if metric.baseline}

    def images_of(method: str, names: set[str], bar: Bar | None) -> tuple[Tensor, dict[str, Any]]:
        """From the shard where it holds them and lacks no array of sampling, else sampled, to the same bits."""
        path = spec.shard(method, rows)
        if shards.producers(path).get(IMAGES) == SAMPLING and not names.intersection(OF_SAMPLING):
            if bar is not None:
                bar.add(len(rows))
            return torch.from_numpy(shards.load(path, IMAGES)), {}
        return sample_range(spec, method, rows, load(), controls, bar)

    for method, names in missing_arrays(spec, rows).items():  # another worker may have written some by now
        path = spec.shard(method, rows)
        bar.describe(method, "" if worker.world == 1 else str(worker))
        try:
            if baseline is None and method != spec.baseline and names & relative:
                baseline, _ = images_of(spec.baseline, set(), None)
            images, arrays = images_of(method, names, bar)
            baseline = images if method == spec.baseline else baseline
            samples = Samples(images, images if baseline is None else baseline, spec.texts(rows), rows)
            measured = measure(spec.metrics, samples, names)
        except NotFinite as error:
            progress.failures.append(f"{method}, {path.stem}: {error}")
            if method == spec.baseline:
                return
            continue
        arrays = {IMAGES: images.numpy(), NORMS: np.zeros((len(rows), 0), np.float32), **arrays}
        present = shards.producers(path)
        kept = {name: Array(shards.load(path, name), present[name]) for name in present.keys() - names}
        sampled = {name: Array(arrays[name], SAMPLING) for name in names.intersection(OF_SAMPLING)}
        before = shards.header(path) if kept else {}
        versions = before["versions"] if IMAGES in kept else runs.versions()
        shards.write(path, kept | measured | sampled, versions, placed="place" in before or not kept)
        progress.sampled += len(rows)
        bar.numbers["shards"] = bar.numbers.get("shards", 0) + 1


def sample_range(
    spec: EvaluationSpec,
    method: str,
    rows: range,
    sd: "StableDiffusion",
    controls: list[Any],
    bar: Bar | None = None,
) -> tuple[UInt8[Tensor, "b 3 h w"], dict[str, np.ndarray]]:
    """Images of `rows`, in batches that start with the range, and the arrays NORMS (where all images were evaluated
    equally often) and COST (see `required_arrays`). Raises NotFinite.

    controls: the active ControlNets of each batch, filled where it is empty. bar: of the images, moved
    at each step and each batch.
    """
    config, step = spec.config, int(spec.config.batch_size)
    batches = [rows[i : i + step] for i in range(0, len(rows), step)]
    size, sigmas = config.size or sd.default_size, run_sigmas(sd, config, config.init)
    if config.controls and not controls:
        for batch in batches:
            controls.append(controlled_batch(sd, config.controls, [spec.controls[i] for i in batch], size, sigmas))
    norms: list[list[Tensor]] = []  # of each batch and evaluation (b,)

    def note_norm(guided: Tensor, at: Any) -> Tensor:
        """The last post-processor: notes the root mean square of what guidance adds, and changes nothing."""
        norms[-1].append((guided - at.plain).square().mean((1, 2, 3)).sqrt())  # (b, c, h, w) -> (b,)
        return guided

    model = build_guidance(spec.methods[method], sd, [note_norm])
    images, arrays = [], {}
    for batch, control in zip(batches, controls or [()] * len(batches), strict=True):
        norms.append([])
        conds = encode_conds(sd, model, spec.texts(batch), spec.negative(batch), config.size, config.text)
        init = init_images(config.init, [spec.inits[i] for i in batch] if spec.inits else (), size)
        counted = batch.start == spec.numbers.start
        with FlopCounterMode(display=False) if counted else contextlib.nullcontext() as counter:
            report = None if bar is None else bar.callback(len(batch), len(batch), len(sigmas) - 1)
            latents = sample_latents(sd, model, batch, conds, config, control, init=init, callback=report)
        if counter is not None:
            arrays[COST] = np.array([counter.get_total_flops() / len(batch)])
        decoded = DECODED if latents.device.type == "cpu" else max(1, PIXELS // math.prod(size))
        pixels = decode_images(sd, latents, decoded)
        images.append((pixels if init is None else init.paste(pixels)).cpu())
        if bar is not None:
            bar.add(len(batch))
    count = len(norms[0])
    if count and all([len(norm) for norm in steps] == [len(batch)] * count for steps, batch in zip(norms, batches)):
        arrays[NORMS] = torch.cat([torch.stack(steps, dim=1) for steps in norms]).float().cpu().numpy()  # (b, steps)
    return torch.cat(images), arrays
