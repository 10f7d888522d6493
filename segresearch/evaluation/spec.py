"""From a typed config to what is to be measured: settings, prompts, controls, ranges, and where shards of them lie.
Light: no torch, except where prompts or control images are those of scenes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segresearch import runs
from segresearch.config import EvaluateConfig, GuidanceConfig
from segresearch.config.build import device_kind, with_batch_size
from segresearch.config.expand import checked_control, describe, methods, slug
from segresearch.config.parse import HELD_OUT, SCENE, control_images, read_prompts, scene_numbers
from segresearch.control_images.identify import identify_control
from segresearch.errors import ConfigError
from segresearch.evaluation import paper_numbers
from segresearch.evaluation.shards import cut, name

VERSION = 2  # of what shards hold
# and not of shards
OF_RESULTS = ("images", "features", "distances", "text_alignment", "n_bootstrap", "n_subsets", "force")


@dataclass(frozen=True)
class Study:
    """settings: guidance by label, the first is what distances are taken to. prompts: image i has prompts[i], repeating
    in turn. scenes: indices of procedural scenes whose captions these are, or (). controls: of image i its control
    images, one for each of the config's controls. ranges: of images, a shard each. places: of each setting, the folder
    of its shards; {} until `placed`."""

    settings: Mapping[str, GuidanceConfig]
    prompts: tuple[str, ...]
    scenes: tuple[int, ...]
    ranges: tuple[range, ...]
    paper: str | None
    controls: tuple[tuple[str, ...], ...] = ()
    places: Mapping[str, Path] = field(default_factory=dict)

    def texts(self, rows: range) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in rows]

    @property
    def first(self) -> str:
        return next(iter(self.settings))

    def shard(self, setting: str, rows: range) -> Path:
        return self.places[setting] / name(rows)

    def shards(self) -> list[Path]:
        """Every shard of the run, in the order in which they are reduced."""
        return [self.shard(setting, rows) for setting in self.settings for rows in self.ranges]


def study(config: EvaluateConfig) -> Study:
    """What `config` asks for. Raises ConfigError for settings that are alike, prompts that cannot be read, figures of
    the paper that do not apply."""
    settings = methods(config.compare, config.guidance)
    prompts = read_prompts(config.prompts, "prompts", config.images)
    scenes: tuple[int, ...] = ()
    if isinstance(config.prompts, str):
        scenes = tuple(HELD_OUT + n for n in scene_numbers(config.prompts, config.images, "prompts") or ())
    if config.keep is not None and config.keep < config.n_examples:
        counts = f"{config.keep} pictures kept are fewer than are shown, {config.n_examples}"
        raise ConfigError(f"keep: {counts}; lower `n_examples`")
    for key in ("features", "distances"):
        values = getattr(config, key)
        if len(set(values)) < len(values):
            raise ConfigError(f"{key}: {list(values)} names one twice")
    chosen = paper_numbers.chosen(config.paper, config.name, settings, prompts)
    columns = []
    for key, control in config.controls.items():
        checked_control(control, f"controls.{key}")
        columns.append(control_images(control.image, config.images, f"controls.{key}.image"))
    controls = tuple(zip(*columns, strict=True))
    return Study(settings, prompts, scenes, tuple(cut(config.images, config.shard)), chosen, controls)


def placed(config: EvaluateConfig, plan: Study, model: Path) -> Study:
    """`plan` with the folder of each setting's shards: <out>/shards/<setting>-<digest>, the digest that of all that its
    pictures depend on to the last bit, and no more. Runs that share a setting share its shards.

    model: the folder or file of the model. ConfigError for a ControlNet or a control image that is not there.
    """
    config = with_batch_size(config)
    asked = ("sampler", "schedule", "negative", "steps", "size", "batch_size", "shard")
    kind = {"dtype": config.model.dtype, "vae_dtype": config.model.vae_dtype}
    common = {
        "version": VERSION, "model": {"fingerprint": runs.fingerprint(model), **kind},
        **{key: getattr(config, key) for key in asked},
        "prompts": config.prompts if _open_ended(config.prompts) else runs.digest(plan.prompts),
    }  # fmt: skip
    common |= config.compute.identity(device_kind(config.device))
    if config.controls:
        common["controls"] = _controls(config, plan, model)
    places = {}
    for setting, guidance in plan.settings.items():
        bare = dataclasses.replace(guidance, label=None)
        digest = runs.digest(runs.plain({**common, "guidance": bare}))
        places[setting] = Path(config.out) / "shards" / f"{slug(describe(bare))}-{digest}"
    return dataclasses.replace(plan, places=places)


def run_identity(config: EvaluateConfig, plan: Study, reference: str) -> dict[str, Any]:
    """What tells one run from another: its settings, the order and the names in which they are shown, and what else its
    table depends on. reference: the identity of the real pictures."""
    asked = {key: getattr(config, key) for key in OF_RESULTS}
    settings = [[setting, place.name] for setting, place in plan.places.items()]
    return {"settings": settings, "reference": reference, "paper": plan.paper, **runs.plain(asked)}


def _open_ended(text: str | tuple[str, ...]) -> bool:
    """ "scene:0-", of which a longer run has the same first ones."""
    return isinstance(text, str) and text.startswith(SCENE) and text.rstrip().endswith("-")


def _controls(config: EvaluateConfig, plan: Study, model: Path) -> list[Any]:
    found = []
    for k, (key, control) in enumerate(config.controls.items()):
        shown = [images[k] for images in plan.controls]
        scenes = [image for image in shown if image.startswith(SCENE)]
        some = [*scenes[:1], *dict.fromkeys(image for image in shown if not image.startswith(SCENE))]
        own = identify_control(control, some, model, f"controls.{key}").identity(some)
        contents = dict(zip(some, own.pop("contents"), strict=True))
        listed = control.image if _open_ended(control.image) else [contents.get(image, image) for image in shown]
        found.append({**own, "first": contents[shown[0]], "images": runs.digest(listed)})
    return found
