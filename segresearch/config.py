"""The typed schema of the configs: what Hydra composes from conf/ must fit these dataclasses. Light: no torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from segresearch.errors import ConfigError
from segresearch.models.compute import Compute
from segresearch.tracking import WandbConfig
from segresearch.typed import Bounds

DType = Literal["float32", "bfloat16", "float16", "float64"]
Count = Annotated[int, Bounds(1, 100_000_000)]
Batch = Count | Literal["auto"]  # images a batch; auto: the model's own number for the device
Width = Annotated[float, Bounds(low=0)]
Where = str | int | tuple[str | int, ...]  # a selector of self-attention sites: group, glob, block index, or several
Heads = tuple[int, ...] | None  # the heads perturbed; None: all
Seeds = int | str | tuple[int | str, ...]


@dataclass(frozen=True)
class ModelConfig:
    """Which weights (the arguments of `load_sdxl`), and what suits them.

    batch_size, batch_size_cuda: images a batch where the run does not say, and on a GPU (None: as many).
    scales: useful guidance scales by method, which conf/guidance and conf/controlnet refer to.
    controlnets: its ControlNets by what they read (canny, depth), which conf/controlnet refers to.
    """

    name: str
    path: str
    dtype: DType = "float32"
    vae_dtype: DType | None = None
    variant: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    batch_size: Count = 8
    batch_size_cuda: Count | None = None
    scales: dict[str, float] = field(default_factory=dict)
    controlnets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SEGConfig:
    """Smoothed Energy Guidance's blur of the queries (or keys); `sigma` in tokens, 0 to inf."""

    kind: Literal["seg"]
    sigma: Width = math.inf
    where: Where = "mid"
    heads: Heads = None
    on: Literal["q", "k", "qk"] = "q"
    boundary: Literal["reflect", "symmetric", "circular", "exact"] = "reflect"


@dataclass(frozen=True)
class PAGConfig:
    """Perturbed-Attention Guidance: the pattern becomes (1 − tau)·pattern + tau·identity."""

    kind: Literal["pag"]
    tau: Annotated[float, Bounds(0, 1)] = 1.0
    where: Where = "mid"
    heads: Heads = None


@dataclass(frozen=True)
class CustomConfig:
    """Any function (q, k, v, site, attend) -> out, imported from `target`; `options` are further keywords."""

    kind: Literal["custom"]
    target: str
    where: Where = "mid"
    heads: Heads = None
    options: dict[str, Any] = field(default_factory=dict)


PerturbationConfig = SEGConfig | PAGConfig | CustomConfig


@dataclass(frozen=True)
class RampConfig:
    """A scale that goes from `start` (sigma_start and above) to `stop` (sigma_stop and below), linear in log sigma."""

    start: float
    stop: float
    sigma_start: Width = 14.614642
    sigma_stop: Width = 0.029167


@dataclass(frozen=True)
class CFGTerm:
    """Classifier-free guidance of weight w: (w − 1)·(D[cond] − D[uncond]); 1 is no guidance."""

    kind: Literal["cfg"]
    weight: float | RampConfig
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class PerturbedTerm:
    """scale·(D[base] − D[base, perturbed]) while sigma lies in `interval`; several perturbations share one branch."""

    kind: Literal["perturbed"]
    perturbation: PerturbationConfig | tuple[PerturbationConfig, ...]
    scale: float | RampConfig
    base: Literal["cond", "uncond"] = "cond"
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class SAGConfig:
    """Self-Attention Guidance, wrapped around whatever the terms make; fields as of `SelfAttentionGuidance`."""

    scale: float | RampConfig
    blur_sigma: Width = 1.0
    threshold: Width = 1.0
    base: Literal["cond", "uncond"] | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class APGConfig:
    """Adaptive Projected Guidance's projection and norm limit on the sum of the terms."""

    eta: Width = 0.0
    norm: Width = math.inf


@dataclass(frozen=True)
class GuidanceConfig:
    """A method: a sum of terms, rescale and APG after it, SAG around it. No term at all is the vanilla model."""

    label: str | None = None
    terms: dict[str, CFGTerm | PerturbedTerm] = field(default_factory=dict)
    rescale: Annotated[float, Bounds(0, 1)] = 0.0
    apg: APGConfig | None = None
    sag: SAGConfig | None = None


@dataclass(frozen=True)
class ControlConfig:
    """One ControlNet and its images; several act together, each with its `scale`.

    net: a name in the model's folder controlnet/, a diffusers ControlNet folder, or a hub id in the local cache.
    image: a file, "scene:12" (an exact map of that held-out procedural scene) or a list: one for each seed, repeating
        in turn; "scene:0-7" are eight, "scene:0-" as many as there are seeds.
    preprocess: what is read of a picture: canny (edges) or depth; of a scene these are its exact maps. none: as it is.
    low, high: thresholds of canny. depth_model: an estimator of transformers, a folder or a hub id in the local cache.
    start, end: of its use, as fractions of the steps. guess: for the conditional branch only, residuals weighted by
        depth, as diffusers' guess mode.
    """

    net: str
    image: str | tuple[str, ...]
    preprocess: Literal["none", "canny", "depth"] = "none"
    low: Annotated[float, Bounds(low=0)] = 100.0
    high: Annotated[float, Bounds(low=0)] = 200.0
    depth_model: str | None = None
    scale: float = 1.0
    start: Annotated[float, Bounds(0, 1)] = 0.0
    end: Annotated[float, Bounds(0, 1)] = 1.0
    guess: bool = False


@dataclass(frozen=True)
class SamplerConfig:
    """A k-diffusion sampler by name, and its own keywords (eta, s_churn, ...)."""

    name: str
    options: dict[str, bool | int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig:
    """A noise schedule by name; `rho` bends karras and polyexponential (None: their usual value)."""

    name: str
    rho: float | None = None


@dataclass(frozen=True)
class PanelConfig:
    """One block of the grid; what it leaves out (None) it takes from the run."""

    title: str = ""
    compare: tuple[GuidanceConfig, ...] = ()
    prompts: str | tuple[str, ...] | None = None
    negative: str | None = None
    seeds: Seeds | None = None
    pairing: Literal["product", "zip"] | None = None
    controls: dict[str, ControlConfig] | None = None


@dataclass(frozen=True)
class GridConfig:
    """How the grid is drawn: pixels a cell (None: by the images' size), most rows a panel, panels side by side."""

    cell: Annotated[int, Bounds(16, 2048)] | None = None
    rows: Count = 64
    across: Count = 2
    title: str | None = None


@dataclass(frozen=True)
class GenerateConfig:
    """Everything of one `generate` run. `out`, `device`, `batch_size` and `grid` do not enter the run's identity."""

    model: ModelConfig
    sampler: SamplerConfig
    schedule: ScheduleConfig
    guidance: GuidanceConfig = GuidanceConfig()
    name: str = "generate"
    controls: dict[str, ControlConfig] = field(default_factory=dict)
    compare: tuple[GuidanceConfig, ...] = ()
    panels: tuple[PanelConfig, ...] = ()
    prompts: str | tuple[str, ...] = ("",)
    negative: str | None = None
    seeds: Seeds = "0-3"
    pairing: Literal["product", "zip"] = "product"
    steps: Count = 25
    size: tuple[Count, Count] | None = None
    batch_size: Batch = 8
    device: str = "auto"
    compute: Compute = Compute()
    out: str = "runs"
    grid: GridConfig = GridConfig()


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything of one `evaluate` run: settings of guidance, measured on pictures of the same noise and prompts.

    Shards are told by what pictures depend on to the last bit, so by `batch_size` and `shard` too, which fix what is
    sampled together; not by how many there are, what measures them, where it runs. Runs are told by their settings, by
    how many pictures there are and by what measures them.

    compare, guidance: the settings; pictures of the first are the ones that distances are taken to. images: of each
    setting; image i has seed i and prompt i, prompts repeating in turn. keep: pictures stored, of each setting (null:
    all). controls: ControlNets over every setting; image i has control image i. features, distances,
    text_alignment: the networks that look at pictures. weights: their files, where they do not lie where their
    publishers' tools keep them; checksums: their SHA-256, where others are meant than the published ones. reference: real pictures,
    "scene:100000-109999" or a folder. n_bootstrap, n_subsets: resamples of the bootstrap, subsets of the kernel
    distance. paper: whose figures
    stand beside (auto: those of the table that the run is named after). stage: one stage of the run. threads: of a
    process on a CPU; it may change the last bit of pictures.
    """

    model: ModelConfig
    sampler: SamplerConfig
    schedule: ScheduleConfig
    guidance: GuidanceConfig = GuidanceConfig()
    name: str = "evaluate"
    compare: tuple[GuidanceConfig, ...] = ()
    prompts: str | tuple[str, ...] = ("",)
    negative: str | None = None
    images: Count = 1000
    steps: Count = 25
    size: tuple[Count, Count] | None = None
    batch_size: Batch = 8
    shard: Count = 100
    keep: Annotated[int, Bounds(low=0)] | None = None
    features: tuple[Literal["mini", "inception", "dinov2", "clip"], ...] = ("mini",)
    distances: tuple[Literal["mini", "vgg", "alex"], ...] = ("mini",)
    text_alignment: Literal["none", "mini", "clip"] = "mini"
    weights: dict[str, str | None] = field(default_factory=dict)
    checksums: dict[str, str | None] = field(default_factory=dict)
    reference: str = "scene:100000-109999"
    n_bootstrap: Annotated[int, Bounds(0, 100_000)] = 100
    n_subsets: Annotated[int, Bounds(1, 10_000)] = 20
    force: bool = False
    paper: Literal["auto", "none", "table1", "table2"] = "auto"
    controls: dict[str, ControlConfig] = field(default_factory=dict)
    n_examples: Annotated[int, Bounds(1, 64)] = 8
    stage: Literal["all", "shards", "verify", "reduce"] = "all"
    threads: Annotated[int, Bounds(1, 1024)] = 1
    device: str = "auto"
    compute: Compute = Compute()
    out: str = "runs"
    wandb: WandbConfig = WandbConfig()


def conf_dir() -> Path:
    """The folder of the YAML configs: conf/ of a checkout, segresearch/conf of an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "generate.yaml").is_file():
            return folder
    raise ConfigError(f"no configs: neither {package.parent / 'conf'} nor {package / 'conf'} has a generate.yaml")
