"""The schema of the configs: what Hydra composes from conf/ must fit these dataclasses. Light: no torch.

SEG, PAG, Ramp and Projected are those of segresearch.guidance; they are imported when a value of theirs is validated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from segresearch.config.parse import SCENE
from segresearch.config.validate import Record, of_guidance
from segresearch.errors import ConfigError
from segresearch.fields import Boundary, Count, Flag, Fraction, NonNegative, Number, Whole, within
from segresearch.models.compute import Compute
from segresearch.wandb_log import WandbConfig

if TYPE_CHECKING:
    from segresearch.guidance import PAG, SEG, Projected, Ramp
else:
    SEG, PAG, Ramp, Projected = (Annotated[Any, of_guidance(name)] for name in ("SEG", "PAG", "Ramp", "Projected"))

DType = Literal["float32", "bfloat16", "float16", "float64"]
Batch = Count | Literal["auto"]  # images a batch; auto: the model's own number for the device
Where = str | Whole | tuple[str | Whole, ...]  # self-attention sites: a group, a glob, an index, or several of these
Heads = tuple[Whole, ...] | None  # None: all
Seeds = Whole | str | tuple[Whole | str, ...]
Prompts = str | tuple[str, ...]
Size = tuple[Count, Count] | None  # (height, width) in pixels; None: the model's own
Scale = Number | Ramp
Interval = tuple[Number, Number] | None  # (low, high) in sigma; None: everywhere
Base = Literal["cond", "uncond"]
Option = Annotated[Flag | Whole | Number | str, Field(union_mode="left_to_right")]
by_kind = Discriminator(lambda v: str(v.get("kind", "") if isinstance(v, Mapping) else getattr(v, "kind", "")))


@dataclass(frozen=True)
class ModelConfig(Record):
    """The weights (the arguments of `load_sdxl`), and the numbers that suit them: conf/model."""

    name: str
    path: str
    dtype: DType = "float32"
    vae_dtype: DType | None = None
    variant: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    batch_size: Count = 8
    batch_size_cuda: Count | None = None
    scales: dict[str, Number] = field(default_factory=dict)
    controlnets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CustomConfig(Record):
    """Any function (q, k, v, site, attend) -> out, imported from `target`; `options` are further keywords."""

    kind: Literal["custom"]
    target: str
    where: Where = "mid"
    heads: Heads = None
    options: dict[str, Any] = field(default_factory=dict)


PerturbationConfig = Annotated[
    Annotated[SEG, Tag("seg")] | Annotated[PAG, Tag("pag")] | Annotated[CustomConfig, Tag("custom")], by_kind
]


@dataclass(frozen=True)
class CFGTerm(Record):
    """Classifier-free guidance of weight w: (w − 1)·(D[cond] − D[uncond]); 1 is no guidance."""

    kind: Literal["cfg"]
    weight: Scale
    interval: Interval = None


@dataclass(frozen=True)
class PerturbedTerm(Record):
    """scale·(D[base] − D[base, perturbed]) while sigma lies in `interval`; several perturbations share one branch."""

    kind: Literal["perturbed"]
    perturbation: PerturbationConfig | tuple[PerturbationConfig, ...]
    scale: Scale
    base: Base = "cond"
    interval: Interval = None


@dataclass(frozen=True)
class SAGConfig(Record):
    """Self-Attention Guidance around the sum of the terms; fields as of `SelfAttentionGuidance`."""

    scale: Scale
    blur_sigma: NonNegative = 1.0
    threshold: NonNegative = 1.0
    base: Base | None = None
    interval: Interval = None


TermConfig = Annotated[Annotated[CFGTerm, Tag("cfg")] | Annotated[PerturbedTerm, Tag("perturbed")], by_kind]


@dataclass(frozen=True)
class GuidanceConfig(Record):
    """A method: a sum of terms, rescale and APG after it, SAG around it. No term at all is the vanilla model."""

    label: str | None = None
    terms: dict[str, TermConfig] = field(default_factory=dict)
    rescale: Fraction = 0.0
    apg: Projected | None = None
    sag: SAGConfig | None = None


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
            hint = "or set preprocess=none where the image is a depth map itself"
            raise ConfigError(
                f"depth_model: missing, and {files[0]} needs one; name one (a folder or a cached hub id), {hint}"
            )


@dataclass(frozen=True)
class SamplerConfig(Record):
    """A k-diffusion sampler by name, and its own keywords (eta, s_churn, ...)."""

    name: str
    options: dict[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig(Record):
    """A noise schedule by name; `rho` bends karras and polyexponential (None: their usual value)."""

    name: str
    rho: Number | None = None


@dataclass(frozen=True)
class PanelConfig(Record):
    """One block of the grid; fields that are None are those of the run."""

    title: str = ""
    compare: tuple[GuidanceConfig, ...] = ()
    prompts: Prompts | None = None
    negative: str | None = None
    seeds: Seeds | None = None
    pairing: Literal["product", "zip"] | None = None
    controls: dict[str, ControlConfig] | None = None


@dataclass(frozen=True)
class GridConfig(Record):
    """How the grid is drawn: pixels a cell (None: by the images' size), most rows a panel, panels side by side."""

    cell: Annotated[int, within(16, 2048, whole=True)] | None = None
    rows: Count = 64
    across: Count = 2
    title: str | None = None


@dataclass(frozen=True)
class BlurConfig(Record):
    """The blurs that the captured queries are measured under: every sigma (tokens, 0 to inf) with every boundary."""

    sigmas: tuple[NonNegative, ...] = (0.5, 1.0, 2.0, 4.0, math.inf)
    boundaries: tuple[Boundary, ...] = ("reflect", "symmetric", "circular", "exact")


@dataclass(frozen=True)
class RunConfig(Record):
    """The fields of every run. prompts: see `read_prompts`. negative: None is zeros, as SDXL was trained."""

    model: ModelConfig
    sampler: SamplerConfig
    schedule: ScheduleConfig
    guidance: GuidanceConfig = GuidanceConfig()
    prompts: Prompts = ("",)
    negative: str | None = None
    steps: Count = 25
    size: Size = None
    batch_size: Batch = 8
    device: str = "auto"
    compute: Annotated[Compute, Record] = Compute()
    out: str = "runs"


@dataclass(frozen=True)
class GenerateConfig(RunConfig):
    """A `generate` run: conf/generate.yaml. `out`, `device`, `batch_size` and `grid` do not enter its identity."""

    name: str = "generate"
    controls: dict[str, ControlConfig] = field(default_factory=dict)
    compare: tuple[GuidanceConfig, ...] = ()
    panels: tuple[PanelConfig, ...] = ()
    seeds: Seeds = "0-3"
    pairing: Literal["product", "zip"] = "product"
    grid: GridConfig = GridConfig()


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """An `evaluate` run: conf/evaluate.yaml. Methods, measured on images of the same noise and prompts.

    Shards are identified by everything that images depend on to the last bit, so by `batch_size` and `shard` too. Runs
    are identified by their methods, the number of images and the metrics.
    """

    name: str = "evaluate"
    compare: tuple[GuidanceConfig, ...] = ()
    images: Count = 1000
    shard: Count = 100
    keep: Annotated[int, within(0, whole=True)] | None = None
    features: tuple[Literal["mini", "inception", "dinov2", "clip"], ...] = ("mini",)
    distances: tuple[Literal["mini", "vgg", "alex"], ...] = ("mini",)
    text_alignment: Literal["none", "mini", "clip"] = "mini"
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
    wandb: Annotated[WandbConfig, Record] = WandbConfig()


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
    wandb: Annotated[WandbConfig, Record] = WandbConfig()

    def __post_init__(self) -> None:
        blur = self.blur
        lists = {"measured_steps": self.measured_steps, "blur.sigmas": blur.sigmas, "blur.boundaries": blur.boundaries}
        for name, values in lists.items():
            if not values:
                raise ConfigError(f"{name}: empty; give at least one")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}: {list(values)} names one twice")
        for step in self.measured_steps:
            if not -self.steps <= step < self.steps:
                known = f"{self.steps} steps are 0 to {self.steps - 1}"
                raise ConfigError(f"measured_steps: there is no step {step}; {known}")

    @property
    def steps_from_0(self) -> tuple[int, ...]:
        """The measured steps as numbers from 0, rising."""
        return tuple(sorted({step % self.steps for step in self.measured_steps}))
