"""The typed settings of experiments/analyze.py. Light: no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from segresearch.config import (
    Batch,
    Count,
    GuidanceConfig,
    Heads,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    Seeds,
    Where,
)
from segresearch.config import Width as Sigma
from segresearch.errors import ConfigError
from segresearch.models.compute import Compute
from segresearch.tracking import WandbConfig
from segresearch.typed import typed

BoundaryName = Literal["reflect", "symmetric", "circular", "exact"]


@dataclass(frozen=True)
class BlurConfig:
    """The blurs that the captured queries are measured under: every sigma (tokens, 0 to inf) with every boundary."""

    sigmas: tuple[Sigma, ...] = (0.5, 1.0, 2.0, 4.0, math.inf)
    boundaries: tuple[BoundaryName, ...] = ("reflect", "symmetric", "circular", "exact")


@dataclass(frozen=True)
class AnalyzeConfig:
    """Everything of one `analyze` run. `out`, `device`, `batch_size` and `wandb` do not enter the run's identity.

    measured_steps: counted from 0; negative ones from the end. where, heads: the attention that is captured.
    branch: whose; "cond" is the unperturbed one, whatever the guidance. keep: leave q and k in the run folder.
    """

    model: ModelConfig
    sampler: SamplerConfig
    schedule: ScheduleConfig
    guidance: GuidanceConfig = GuidanceConfig()
    name: str = "analyze"
    prompts: str | tuple[str, ...] = ("",)
    negative: str | None = None
    seeds: Seeds = "0-1"
    steps: Count = 25
    measured_steps: tuple[int, ...] = (0, 6, 12, 18, 24)
    size: tuple[Count, Count] | None = None
    where: Where = "*"
    heads: Heads = None
    branch: str = "cond"
    blur: BlurConfig = BlurConfig()
    keep: bool = False
    batch_size: Batch = 8
    device: str = "auto"
    compute: Compute = Compute()
    out: str = "runs"
    wandb: WandbConfig = WandbConfig()


def settings(config: Mapping[str, Any]) -> AnalyzeConfig:
    """The typed settings of a composed config. Raises ConfigError, one line, for what cannot be."""
    from omegaconf import DictConfig, OmegaConf

    root = config.copy() if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    given = OmegaConf.to_container(root, resolve=True)
    assert isinstance(given, dict)
    given = {key: value for key, value in given.items() if key not in ("hydra", "defaults")}
    made: AnalyzeConfig = typed(AnalyzeConfig, given)
    steps, blur = made.measured_steps, made.blur
    for name, values in (("measured_steps", steps), ("blur.sigmas", blur.sigmas), ("blur.boundaries", blur.boundaries)):
        if not values:
            raise ConfigError(f"{name}: empty; give at least one")
        if len(set(values)) < len(values):
            raise ConfigError(f"{name}: {list(values)} names one twice")
    measured_steps(made)
    return made


def measured_steps(config: AnalyzeConfig) -> tuple[int, ...]:
    """`measured_steps` as step numbers from 0, rising. Raises ConfigError for a step that the run does not have."""
    wrong = [step for step in config.measured_steps if not -config.steps <= step < config.steps]
    if wrong:
        last = config.steps - 1
        raise ConfigError(f"measured_steps: there is no step {wrong[0]}; {config.steps} steps are 0 to {last}")
    return tuple(sorted({step % config.steps for step in config.measured_steps}))
