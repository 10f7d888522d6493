"""A typed config expanded into methods, prompts, control images and ranges of images, and the files of their shards.
Light: no torch, except where prompts or control images are those of scenes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segresearch import runs
from segresearch.config.expand import (
    HELD_OUT,
    control_rows,
    describe,
    init_rows,
    methods,
    read_negatives,
    read_prompts,
    scene_numbers,
    slug,
)
from segresearch.config.method import GuidanceConfig
from segresearch.config.schema import SCENE, EvaluateConfig
from segresearch.config.sweep import Swept, swept
from segresearch.control_images.identify import identify_control
from segresearch.errors import ConfigError
from segresearch.evaluation import paper_numbers
from segresearch.init_images import identify_init
from segresearch.records import sampling_identity, with_networks

if TYPE_CHECKING:
    from segresearch.evaluation.image_metrics import ImageMetric

VERSION = 3  # of what shards hold
OF_RESULTS = ("images", "features", "distances", "text_alignment", "n_bootstrap", "n_subsets", "force")  # not of shards


@dataclass(frozen=True)
class EvaluationSpec:
    """What a config evaluates.

    methods: guidance by name; the first is the baseline. prompts: image i has prompts[i], repeating in turn; negatives
    too, () where all have the config's. scenes:
    the procedural scenes whose captions the prompts are, or (). controls: of image i its control images, one for each
    of the config's controls. inits: of image i the image that it starts from, and its mask. paper: the table of the
    paper to compare with. folders: of the shards of each method, {} until `with_folders`. sweep: of what each method is
    a scale, {} without a sweep. metrics: of each image, () until `image_metrics` has loaded their networks.
    """

    config: EvaluateConfig
    methods: Mapping[str, GuidanceConfig]
    prompts: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    scenes: tuple[int, ...] = ()
    controls: tuple[tuple[str, ...], ...] = ()
    inits: tuple[tuple[str, ...], ...] = ()
    paper: str | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    sweep: Mapping[str, Swept] = field(default_factory=dict)
    metrics: tuple["ImageMetric", ...] = ()

    @property
    def baseline(self) -> str:
        """The method whose images distances are taken to."""
        return next(iter(self.methods))

    @property
    def numbers(self) -> range:
        """The images of each method. Image i has seed i."""
        return range(self.config.first, self.config.first + self.config.images)

    @property
    def ranges(self) -> tuple[range, ...]:
        """Ranges of images, a shard of each method for each range; the last may be shorter."""
        numbers, size = self.numbers, self.config.shard
        return tuple(numbers[start : start + size] for start in range(0, len(numbers), size))

    def texts(self, rows: range) -> list[str]:
        """The prompts of some images."""
        return [self.prompts[i % len(self.prompts)] for i in rows]

    def negative(self, rows: range) -> str | list[str] | None:
        """The negative prompts of some images: one for all, or one for each."""
        if self.negatives:
            return [self.negatives[i % len(self.negatives)] for i in rows]
        return self.config.negative if isinstance(self.config.negative, str | None) else None

    def shard(self, method: str, rows: range) -> Path:
        return self.folders[method] / f"{rows.start:07d}-{rows.stop:07d}.safetensors"

    def shards(self) -> list[Path]:
        """Every shard of the run, in the order in which they are aggregated."""
        return [self.shard(method, rows) for method in self.methods for rows in self.ranges]

    def facts(self, run: str, reference_images: int) -> dict[str, Any]:
        """What metrics.jsonl and W&B say of a run beside its numbers. run: the name of its folder."""
        groups = {key: getattr(self.config, key).name for key in ("model", "sampler", "schedule")}
        settings = {**groups, "steps": self.config.steps, "reference": self.config.reference}
        return {"experiment": self.config.name, "run": run, **settings, "reference_images": reference_images}

    def describe(self, reference_images: int) -> str:
        """The run in one line."""
        config = self.config
        real = f", against {reference_images} real ones" if reference_images else ""
        forced = "; made with force=true" * config.force
        return (f"{config.model.name}, {config.sampler.name}, {config.steps} steps, {config.schedule.name} schedule; "
                f"N = {config.images} images a method{self.seeds_text()}{real}{forced}")  # fmt: skip

    def seeds_text(self) -> str:
        """Which seeds the images have, where they are not the first ones."""
        return f" of seeds {self.numbers[0]} to {self.numbers[-1]}" if self.config.first else ""


def evaluation_spec(config: EvaluateConfig) -> EvaluationSpec:
    """Expand the config. Raises ConfigError for methods that are alike, prompts that cannot be read, a table of the
    paper whose prompts do not match."""
    by_name = methods((*config.compare, config.guidance))
    end = config.first + config.images
    prompts = read_prompts(config.prompts, "prompts", end)
    scenes: tuple[int, ...] = ()
    if isinstance(config.prompts, str):
        scenes = tuple(HELD_OUT + n for n in scene_numbers(config.prompts, end, "prompts") or ())
    if config.keep is not None and config.keep < config.n_examples:
        raise ConfigError(f"keep: {config.keep} images kept are fewer than n_examples, {config.n_examples}; lower it")
    for key, names in {"features": config.features, "distances": config.distances, "scores": config.scores}.items():
        if len(set(names)) < len(names):
            raise ConfigError(f"{key}: {list(names)} names one twice")
    paper = paper_numbers.table_for(config.paper, config.name, by_name, prompts)
    sweep = {} if config.sweep is None else swept(by_name, config.sweep.scales, config.sweep.at)
    by_name = {name: one.guidance for name, one in sweep.items()} or by_name
    controls, inits = control_rows(config.controls, end), init_rows(config, end)
    _, negatives = read_negatives(config.negative, len(prompts))
    return EvaluationSpec(config, by_name, prompts, negatives, scenes, controls, inits, paper, sweep=sweep)


def with_folders(spec: EvaluationSpec, model: Path) -> EvaluationSpec:
    """`spec` with the folder of each method's shards: <out>/shards/<method>-<digest>, a digest of everything that can
    change a pixel and of nothing else. Runs that share a method share its shards.

    model: the folder or file of the model. `batch_size` is a number. ConfigError for a ControlNet or a control image
    that is not there.
    """
    config = spec.config
    common = {
        **sampling_identity(config, runs.fingerprint(model)), "version": VERSION,
        "negative": list(spec.negatives) or config.negative,
        "batch_size": config.batch_size, "shard": config.shard,
        "prompts": config.prompts if _open_ended(config.prompts) else runs.digest(spec.prompts),
        "controls": [_control_identity(spec, k, model) for k in range(len(config.controls))],
        **({"init": _init_identity(spec)} if spec.inits else {}),
    }  # fmt: skip
    folders = {}
    for method, guidance in spec.methods.items():
        unnamed = dataclasses.replace(with_networks(guidance, model), label=None)
        digest = runs.digest({**common, "guidance": unnamed})
        folders[method] = Path(config.out) / "shards" / f"{slug(describe(unnamed))}-{digest}"
    return dataclasses.replace(spec, folders=folders)


def run_identity(spec: EvaluationSpec, reference: str) -> dict[str, Any]:
    """What names the folder of a run: its methods in order, and everything else that its tables depend on.

    reference: the identity of the real images.
    """
    settings = {key: getattr(spec.config, key) for key in OF_RESULTS}
    named = [[method, folder.name] for method, folder in spec.folders.items()]
    later = {key: getattr(spec.config, key) for key in ("diagnostics", "sweep", "scores", "first")}
    added = {key: setting for key, setting in later.items() if setting not in (None, (), 0)}
    return {"methods": named, "reference": reference, "paper": spec.paper, **settings, **added}


def _open_ended(text: str | tuple[str, ...]) -> bool:
    """ "scene:0-", of which a longer run has the same first ones."""
    return isinstance(text, str) and text.startswith(SCENE) and text.rstrip().endswith("-")


def _control_identity(spec: EvaluationSpec, k: int, model: Path) -> dict[str, Any]:
    """What images depend on of the k-th control: its settings and the contents of its images, of scenes their names."""
    name, control = list(spec.config.controls.items())[k]
    images = [row[k] for row in spec.controls]
    scene = next((image for image in images if image.startswith(SCENE)), None)  # one stands for how all are rendered
    read = list(dict.fromkeys(image for image in images if image == scene or not image.startswith(SCENE)))
    identified = identify_control(control, read, model, f"controls.{name}")
    contents = {image: identified.contents(image) for image in read}
    listed = control.image if _open_ended(control.image) else [contents.get(image, image) for image in images]
    return {**identified.identity(read), "contents": contents.get(images[0]), "images": runs.digest(listed)}


def _init_identity(spec: EvaluationSpec) -> dict[str, Any]:
    """What images depend on of those that they start from; scenes by their names, and how the first is rendered."""
    init, rows = spec.config.init, spec.inits
    read = [row for row in dict.fromkeys(rows) if row == rows[0] or not all(name.startswith(SCENE) for name in row)]
    identified = identify_init(init, read)
    listed = [
        given if _open_ended(given) else [identified.digests.get((key, row[k]), row[k]) for row in rows]
        for k, (key, given) in enumerate((("image", init.image), ("mask", init.mask)))
        if given is not None
    ]
    return {**identified.identity(rows[:1]), "images": runs.digest(listed)}
