"""The schema of the configs: what Hydra composes from conf/ must fit these dataclasses. Light: no torch.

Those of a method are in `config.method`.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from segresearch.config.figures import BlurConfig, GridConfig
from segresearch.config.inputs import InitConfig
from segresearch.config.method import GuidanceConfig, Heads, Where
from segresearch.config.networks import Embeddings, Loras
from segresearch.config.validate import Record
from segresearch.errors import ConfigError
from segresearch.fields import Count, Flag, Fraction, NonNegative, Number, Whole, within
from segresearch.models.compute import Compute
from segresearch.models.text_settings import TextSettings
from segresearch.runs import LATER
from segresearch.wandb_log import WandbConfig

SCENE = "scene:"  # the prefix of procedural scenes, among names of files
DType = Literal["float32", "bfloat16", "float16", "float64"]
Seeds = Whole | str | tuple[Whole | str, ...]
Prompts = str | tuple[str, ...]
Option = Annotated[Flag | Whole | Number | str, Field(union_mode="left_to_right")]


@dataclass(frozen=True)
class ModelConfig(Record):
    """The weights (the arguments of `load_model`), and the numbers that suit them: conf/model."""

    name: str
    path: str
    dtype: DType = "float32"
    vae_dtype: DType | None = None
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    variant: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    vae: str | None = None
    unet: str | None = None
    text_encoder: str | tuple[str, ...] | None = None
    loras: Loras = field(default=(), metadata=LATER)
    embeddings: Embeddings = field(default=(), metadata=LATER)
    batch_size: Count = 8
    batch_size_cuda: Count | None = None
    scales: dict[str, Number] = field(default_factory=dict)
    sites: dict[str, Where] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)
    controlnets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ControlConfig(Record):
    """One ControlNet and its images: conf/controlnet. Several act together, each with its `scale`."""

    net: str
    image: str | tuple[str, ...]
    preprocess: Literal["none", "canny", "depth"] = "none"
    low: NonNegative = 100.0
    high: NonNegative = 200.0
    depth_model: str | None = None
    scale: Number = 1.0
    start: Fraction = 0.0
    end: Fraction = 1.0
    guess: Flag = False
    kind: str | int | None = field(default=None, metadata=LATER)  # of a union: of the image

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ConfigError(f"start: {self.start:g} is not below end, {self.end:g}: it would never act")
        if self.low > self.high:
            raise ConfigError(f"low: {self.low:g} is above high, {self.high:g}")
        if not math.isfinite(self.scale):
            raise ConfigError(f"scale: {self.scale:g} is not finite; 1 is the ControlNet as it was trained")
        images = (self.image,) if isinstance(self.image, str) else self.image
        files = [image for image in images if not image.startswith(SCENE)]
        if self.preprocess == "depth" and files and not self.depth_model:
            hint = "name a folder or a cached hub id, or set preprocess=none where the image is a depth map itself"
            raise ConfigError(f"depth_model: missing, and {files[0]} needs one; {hint}")


@dataclass(frozen=True)
class SamplerConfig(Record):
    """A k-diffusion sampler by name, and its own keywords (eta, s_churn, ...)."""

    name: str
    options: dict[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig(Record):
    """A noise schedule by name, auto: the model's own; `rho` bends karras and polyexponential (None: as usual)."""

    name: str = "auto"
    rho: Number | None = None


@dataclass(frozen=True)
class PanelConfig(Record):
    """One block of the grid; fields that are None are those of the run."""

    title: str = ""
    compare: tuple[GuidanceConfig, ...] = ()
    prompts: Prompts | None = None
    negative: Prompts | None = None
    sizes: tuple[tuple[Count, Count], ...] | None = None
    seeds: Seeds | None = None
    pairing: Literal["product", "zip"] | None = None
    controls: dict[str, ControlConfig] | None = None
    init: Annotated[InitConfig, Record] | None = None


@dataclass(frozen=True)
class RunConfig(Record):
    """The fields of every run. prompts, negative: see `read_prompts`, `read_negatives`."""

    model: ModelConfig
    sampler: SamplerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    prompts: Prompts = ("",)
    negative: Prompts | None = None
    text: Annotated[TextSettings, Record] = TextSettings()
    steps: Count = 25
    size: tuple[Count, Count] | None = None  # (height, width) in pixels; None: the model's own
    init: Annotated[InitConfig, Record] = InitConfig()
    batch_size: Count | Literal["auto"] = 8  # auto: the model's own number for the device
    device: str = "auto"
    compute: Annotated[Compute, Record] = Compute()
    out: str = "runs"


@dataclass(frozen=True)
class GenerateConfig(RunConfig):
    """A `generate` run: conf/generate.yaml. `out`, `device`, `batch_size`, `grid` and `wandb` do not enter its
    identity."""

    name: str = "generate"
    controls: dict[str, ControlConfig] = field(default_factory=dict)
    compare: tuple[GuidanceConfig, ...] = ()
    panels: tuple[PanelConfig, ...] = ()
    sizes: tuple[tuple[Count, Count], ...] | None = None  # one for each prompt, in place of `size`
    seeds: Seeds = "0-3"
    pairing: Literal["product", "zip"] = "product"
    grid: GridConfig = GridConfig()
    wandb: Annotated[WandbConfig, Record] = WandbConfig()


@dataclass(frozen=True)
class DiagnosticsConfig(Record):
    """What the weak branches of an evaluation change (`analysis.branch_diagnostics`).

    images: of the trajectories. scenes: real images, of the prompts' scenes or else of `reference`, on which the
    model's error is measured. steps: of the schedule at which all is measured. dtype: of the networks here; None is the
    run's.
    """

    images: Annotated[int, within(2, 1_000_000, whole=True)] = 200
    scenes: Annotated[int, within(0, 1_000_000, whole=True)] = 200
    steps: tuple[Whole, ...] = (0,)
    dtype: DType | None = None


@dataclass(frozen=True)
class SweepConfig(Record):
    """Every method but the baseline at several scales: its own times each of `scales` (`config.sweep`). at: by name the
    one factor of a method in their place, such as the best of an earlier sweep."""

    scales: tuple[NonNegative, ...] = (0.5, 1.0, 2.0)
    at: dict[str, NonNegative] = field(default_factory=dict, metadata=LATER)

    def __post_init__(self) -> None:
        if 0 in self.at.values():
            raise ConfigError(f"at: {self.at}: none of the factors can be 0")
        if len(self.scales) < 2 or len(set(self.scales)) < len(self.scales) or 0 in self.scales:
            raise ConfigError(f"scales: {list(self.scales)}: give two different factors at least, none of them 0")


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """An `evaluate` run, conf/evaluate.yaml: methods, measured on images of the same noise and prompts. Shards are
    identified by everything that images depend on to the last bit, so by `batch_size` and `shard` too; runs by their
    methods, the number of images and the metrics."""

    name: str = "evaluate"
    compare: tuple[GuidanceConfig, ...] = ()
    images: Count = 1000
    first: Annotated[int, within(0, 100_000_000, whole=True)] = field(default=0, metadata=LATER)
    shard: Count = 100
    keep: Annotated[int, within(0, whole=True)] | None = None
    features: tuple[Literal["mini", "inception", "dinov2", "clip"], ...] = ("mini",)
    distances: tuple[Literal["mini", "vgg", "alex"], ...] = ("mini",)
    text_alignment: Literal["none", "mini", "clip"] = "mini"
    scores: tuple[Literal["aesthetic", "pickscore", "hpsv2", "hpsv21", "imagereward"], ...] = field(
        default=(), metadata=LATER
    )
    weights: dict[str, str | None] = field(default_factory=dict)
    checksums: dict[str, str | None] = field(default_factory=dict)
    reference: str = "scene:100000-109999"
    n_bootstrap: Annotated[int, within(0, 100_000, whole=True)] = 100
    n_subsets: Annotated[int, within(1, 10_000, whole=True)] = 20
    force: Flag = False
    paper: Literal["auto", "none", "table1", "table2"] = "auto"
    controls: dict[str, ControlConfig] = field(default_factory=dict)
    n_examples: Annotated[int, within(1, 64, whole=True)] = 8
    stage: Literal["all", "shards", "verify", "reduce"] = "all"
    threads: Annotated[int, within(1, 1024, whole=True)] = 1
    diagnostics: DiagnosticsConfig | None = None
    sweep: SweepConfig | None = None
    vector: tuple[Literal["pdf", "svg"], ...] = ()
    wandb: Annotated[WandbConfig, Record] = WandbConfig()

    def __post_init__(self) -> None:
        steps = (0,) if self.diagnostics is None else self.diagnostics.steps
        if not steps or not all(-self.steps <= step < self.steps for step in steps):
            known = f"{self.steps} steps are 0 to {self.steps - 1}"
            raise ConfigError(f"diagnostics.steps: {list(steps)}: each must be a step; {known}")


@dataclass(frozen=True)
class AnalyzeConfig(RunConfig):
    """An `analyze` run: conf/analyze.yaml. `out`, `device`, `batch_size` and `wandb` do not enter its identity."""

    name: str = "analyze"
    seeds: Seeds = "0-1"
    measured_steps: tuple[Whole, ...] = (0, 6, 12, 18, 24)
    where: Where = "*"
    heads: Heads = None
    branch: str = "cond"
    blur: BlurConfig = BlurConfig()
    keep: Flag = False
    vector: tuple[Literal["pdf", "svg"], ...] = ()
    wandb: Annotated[WandbConfig, Record] = WandbConfig()

    def __post_init__(self) -> None:
        lists = {"measured_steps": self.measured_steps, "blur.sigmas": self.blur.sigmas}
        for name, values in (lists | {"blur.boundaries": self.blur.boundaries}).items():
            if not values:
                raise ConfigError(f"{name}: empty; give at least one")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}: {list(values)} names one twice")
        steps = self.init.steps(self.steps)
        for step in self.measured_steps:
            if not -steps <= step < steps:
                known = f"{steps} steps are 0 to {steps - 1}"
                raise ConfigError(f"measured_steps: there is no step {step}; {known}; give measured_steps=[0], say")

    @property
    def steps_from_0(self) -> tuple[int, ...]:
        """The measured steps as numbers from 0, rising."""
        return tuple(sorted({step % self.init.steps(self.steps) for step in self.measured_steps}))
