"""Sampling of what is missing of a run, range by range, and its measurement."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from segresearch import runs
from segresearch.config import EvaluateConfig
from segresearch.config.build import build_guidance
from segresearch.control_images.prepare import controlled_batch
from segresearch.evaluation import shards
from segresearch.evaluation.image_metrics import Judge, NotFinite, Pictures, measured, names, tried
from segresearch.evaluation.shards import Array
from segresearch.evaluation.spec import Study
from segresearch.evaluation.workers import Worker
from segresearch.sampling import initial_noise, sample, sigmas

if TYPE_CHECKING:
    from segresearch.models import SDXL

DECODED = 10  # latents that are decoded together on a CPU, in whose cache small parts stay
PIXELS = 2**23  # of pictures decoded together on a GPU, at least a picture
IMAGES, NORMS, COST, SAMPLED = "images", "norms", "cost", "sampled"


@dataclass
class Made:
    """How many pictures were sampled and found, and what could not be made, in words."""

    made: int = 0
    found: int = 0
    failed: list[str] = field(default_factory=list)


def wanted(config: EvaluateConfig, judges: Sequence[Judge], setting: int, rows: range) -> dict[str, str]:
    """What the shard of these rows must hold: name -> by."""
    kept = config.keep is None or rows.start < config.keep
    steady = config.sampler.name != "dpm_adaptive" and not config.sampler.options.get("s_churn")
    own = {IMAGES: SAMPLED} if kept else {}
    counted = {COST: SAMPLED} if rows.start == 0 else {}
    return own | ({NORMS: SAMPLED} if steady else {}) | counted | names(judges, setting)


def lacking(config: EvaluateConfig, plan: Study, judges: Sequence[Judge], rows: range) -> dict[str, set[str]]:
    """Of each setting, what its shard of these rows lacks; settings that lack nothing are left out."""
    found: dict[str, set[str]] = {}
    for i, setting in enumerate(plan.settings):
        there = shards.held(plan.shard(setting, rows))
        missing = {key for key, by in wanted(config, judges, i, rows).items() if there.get(key) != by}
        found |= {setting: missing} if missing else {}
    return found


class Sampler:
    """Pictures of any setting and range, and the size of the guidance at each evaluation. The model is loaded when the
    first is asked for; every setting is built and every judge tried then, so that what cannot be fails early."""

    def __init__(self, config: EvaluateConfig, plan: Study, judges: Sequence[Judge], load: Callable[[], "SDXL"]):
        self.config, self.plan, self.judges, self.load = config, plan, judges, load
        self.sdxl: SDXL | None = None
        self.notes: list[Tensor] = []
        self.guided: Mapping[str, Any] = {}
        self.steered: dict[range, Any] = {}  # the controls of the batches of the range in hand
        self.versions = runs.versions()

    def note(self, guided: Tensor, plain: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The last post-processor of every setting: looks at what guidance adds, and changes nothing."""
        self.notes.append((guided - plain).square().mean((1, 2, 3)).sqrt())  # (b, c, h, w) -> (b,)
        return guided

    def control(self, batch: range, levels: Any) -> Any:
        """The ControlNets of a batch with its control images, which every setting of it shares."""
        if batch not in self.steered:
            config, sdxl = self.config, self.sdxl
            assert sdxl is not None
            if isinstance(levels, str):
                levels = sigmas(sdxl.denoiser, levels, config.steps)
            shown = [self.plan.controls[i] for i in batch]
            made = controlled_batch(sdxl, config.controls, shown, config.size or sdxl.default_size, levels)
            self.steered = {k: v for k, v in self.steered.items() if abs(k.start - batch.start) < config.shard}
            self.steered[batch] = made
        return self.steered[batch]

    def decoded(self, device: torch.device) -> int:
        """How many latents are decoded together."""
        assert self.sdxl is not None
        pixels = math.prod(self.config.size or self.sdxl.default_size)
        return DECODED if device.type == "cpu" else max(1, PIXELS // pixels)

    def __call__(
        self, setting: str, rows: range, done: Callable[[int], object]
    ) -> tuple[UInt8[Tensor, "b 3 h w"], dict[str, np.ndarray]]:
        """Pictures of `rows`, in batches that start with the range; and the arrays NORMS (b, evaluations), where these
        are as many for all, and COST (1,), floating-point operations of the sampling of a picture, counted in the first
        batch of the range. Raises NotFinite."""
        config = self.config
        if self.sdxl is None:
            self.sdxl = self.load()
            self.sdxl.latent_shape(config.size)
            tried(self.judges, config.size or self.sdxl.default_size)
            self.guided = {k: build_guidance(g, self.sdxl.denoiser, [self.note]) for k, g in self.plan.settings.items()}
        sdxl, images, norms, cost = self.sdxl, [], [], math.nan
        levels: Any = config.schedule.name
        if config.schedule.rho is not None:
            levels = sigmas(sdxl.denoiser, config.schedule.name, config.steps, config.schedule.rho)
        size = int(config.batch_size)
        for batch in (rows[i : i + size] for i in range(0, len(rows), size)):
            conds = sdxl.encode(self.plan.texts(batch), negative=config.negative, size=config.size)
            self.notes = []
            more = {"control": self.control(batch, levels)} if config.controls else {}
            counter = FlopCounterMode(display=False) if batch.start == 0 else None
            with torch.no_grad():
                with counter or contextlib.nullcontext():
                    latents = sample(
                        self.guided[setting], initial_noise(list(batch), sdxl.latent_shape(config.size)),
                        sampler=config.sampler.name, schedule=levels, steps=config.steps, conds=conds,
                        seeds=list(batch), options=config.sampler.options, **more,
                    )  # fmt: skip
                if counter is not None:
                    cost = counter.get_total_flops() / len(batch)
                if not latents.isfinite().all():
                    whole = latents.isfinite().flatten(1).all(1).tolist()
                    broken = [i for i, finite in zip(batch, whole, strict=True) if not finite]
                    raise NotFinite(f"latents of pictures {broken} are not finite")
                decoded = torch.cat([sdxl.decode(part) for part in latents.split(self.decoded(latents.device))])
                images.append(decoded.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu())
            if self.notes and all(len(n) == len(batch) for n in self.notes):
                norms.append(torch.stack(self.notes, dim=1).float().cpu())
            done(len(batch))
        found = {COST: np.array([cost])} if rows.start == 0 else {}
        if len(norms) == len(images):
            found[NORMS] = torch.cat(norms).numpy()
        return torch.cat(images), found


def make(
    config: EvaluateConfig, plan: Study, judges: Sequence[Judge], worker: Worker, load: Callable[[], "SDXL"]
) -> Made:
    """Every shard of this worker's ranges that is not whole. A range is done setting by setting, the first one first,
    so that its pictures are at hand for the distances; what is there already is not made again."""
    mine = worker.part(plan.ranges)
    todo = [(rows, missing) for rows in mine if (missing := lacking(config, plan, judges, rows))]
    count = sum(len(rows) * len(missing) for rows, missing in todo)
    result = Made(found=sum(map(len, mine)) * len(plan.settings) - count)
    sampler = Sampler(config, plan, judges, load)
    with tqdm(total=count, unit="image", disable=None, leave=False, smoothing=0.05) as bar:
        for rows, _ in todo:
            if missing := lacking(config, plan, judges, rows):  # another worker may have made some by now
                _range(config, plan, judges, rows, missing, sampler, bar, result)
    return result


def _range(
    config: EvaluateConfig, plan: Study, judges: Sequence[Judge], rows: range,
    missing: Mapping[str, set[str]], sampler: Sampler, bar: Any, result: Made,
) -> None:  # fmt: skip
    first: Tensor | None = None
    against = {judge.name for judge in judges if judge.against}
    for i, setting in enumerate(plan.settings):
        if setting not in missing:
            continue
        place, lack = plan.shard(setting, rows), missing[setting]
        bar.set_description(setting)
        try:
            if first is None and (i == 0 or lack & against):
                first, more = _pictures(plan, plan.first, rows, lack if i == 0 else set(), sampler,
                                         bar if i == 0 else None)  # fmt: skip
            if i == 0:
                assert first is not None
                images = first
            else:
                images, more = _pictures(plan, setting, rows, lack, sampler, bar)
            said = Pictures(images, images if first is None else first, plan.texts(rows), rows)
            made = shards.made(place) if IMAGES in shards.held(place) and IMAGES not in lack else sampler.versions
            arrays = {
                key: Array(shards.load(place, key), by) for key, by in shards.held(place).items() if key not in lack
            }
            arrays |= measured(judges, said, lack)
        except NotFinite as error:
            result.failed.append(f"{setting}, {shards.name(rows)}: {error}")
            if i == 0:
                return
            continue
        if IMAGES in lack:
            arrays[IMAGES] = Array(images.numpy(), SAMPLED)
        for key in sorted({NORMS, COST} & lack):
            arrays[key] = Array(more.get(key, np.zeros((len(rows), 0), np.float32)), SAMPLED)
        shards.commit(place, arrays, made)
        result.made += len(rows)


def _pictures(
    plan: Study, setting: str, rows: range, lack: set[str], sampler: Sampler, bar: Any
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """From the shard where it holds them and nothing of the sampling is lacking, else sampled, to the same bits."""
    place = plan.shard(setting, rows)
    if shards.held(place).get(IMAGES) == SAMPLED and not lack & {IMAGES, NORMS, COST}:
        images = torch.from_numpy(shards.load(place, IMAGES))
        if bar is not None:
            bar.update(len(rows))
        return images, {}
    return sampler(setting, rows, bar.update if bar is not None else lambda _: None)
