"""From a typed config to what is to be measured: settings, prompts, ranges, and the identity of the run. Light: no
torch, except where prompts are the captions of scenes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segresearch import runs
from segresearch.config import EvaluateConfig, GuidanceConfig
from segresearch.plan import HELD_OUT, methods, read_prompts, scene_numbers, slug
from segresearch.study import paper
from segresearch.study.shards import cut, name
from segresearch.typed import ConfigError

VERSION = 1  # of what shards hold


@dataclass(frozen=True)
class Study:
    """settings: guidance by label, the first is what distances are taken to. prompts: image i has prompts[i], repeating
    in turn. scenes: indices of procedural scenes whose captions these are, or (). ranges: of images, a shard each."""

    settings: Mapping[str, GuidanceConfig]
    prompts: tuple[str, ...]
    scenes: tuple[int, ...]
    ranges: tuple[range, ...]
    paper: str | None

    def texts(self, rows: range) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in rows]

    @property
    def first(self) -> str:
        return next(iter(self.settings))

    def shard(self, folder: Path, setting: str, rows: range) -> Path:
        return folder / "shards" / slug(setting) / name(rows)

    def shards(self, folder: Path) -> list[Path]:
        """Every shard of the run, in the order in which they are reduced."""
        return [self.shard(folder, setting, rows) for setting in self.settings for rows in self.ranges]


def study(config: EvaluateConfig) -> Study:
    """What `config` asks for. Raises ConfigError for settings that are alike, prompts that cannot be read, figures of
    the paper that do not apply."""
    settings = methods(config.compare, config.guidance)
    prompts = read_prompts(config.prompts, "prompts", config.images)
    scenes: tuple[int, ...] = ()
    if isinstance(config.prompts, str):
        scenes = tuple(HELD_OUT + n for n in scene_numbers(config.prompts, config.images, "prompts") or ())
    if config.shard % config.batch_size:
        reason = "each would end in a smaller batch; choose another of the two"
        raise ConfigError(f"shard: {config.shard} is not a multiple of batch_size, {config.batch_size}: {reason}")
    if config.keep is not None and config.keep < config.shown:
        raise ConfigError(f"keep: {config.keep} pictures kept are fewer than are shown, {config.shown}; lower `shown`")
    for key in ("features", "distances"):
        values = getattr(config, key)
        if len(set(values)) < len(values):
            raise ConfigError(f"{key}: {list(values)} names one twice")
    chosen = paper.chosen(config.paper, config.name, settings, prompts)
    return Study(settings, prompts, scenes, tuple(cut(config.images, config.shard)), chosen)


def identity(config: EvaluateConfig, plan: Study, fingerprint: str) -> dict[str, Any]:
    """What pictures depend on, to the last bit of a float, and no more."""
    asked = ("sampler", "schedule", "negative", "steps", "size", "batch_size", "shard")
    open_ended = bool(plan.scenes) and str(config.prompts).rstrip().endswith("-")
    prompts = config.prompts if open_ended else runs.digest(plan.prompts)  # a longer run has the same first pictures
    model = {"fingerprint": fingerprint, "dtype": config.model.dtype, "vae_dtype": config.model.vae_dtype}
    given = {key: getattr(config, key) for key in asked}
    return runs.plain({"version": VERSION, "model": model, **given, "prompts": prompts, "settings": plan.settings})
