"""Pictures of several methods on the same seeds, each with its settings, and the grid that compares them.

The run folder is named by the content of its settings. A picture that is there already is not made again, so the same
command resumes a stopped run, and a finished run returns without loading the model.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segresearch import images, runs
from segresearch.build import build_guidance, device_kind, load_model, of_model, with_batch_size
from segresearch.checkpoints.resolve import resolve_model
from segresearch.command import hydra_settings
from segresearch.config import ControlConfig, GenerateConfig, GuidanceConfig
from segresearch.control_images.identify import Sources
from segresearch.errors import Ended
from segresearch.plan import Panel, panels, slug

if TYPE_CHECKING:
    from segresearch.models import SDXL
    from segresearch.models.controlnet import ActiveControlNet


VERSION = 1  # of the grid's drawing
OF_A_CALL = {"out": "runs", "device": "auto", "batch_size": "auto"}  # not of the run
IDENTITY = ("run", "method", "prompt", "seed")  # what tells one picture's settings from any other's


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, its grid, how many pictures it made and found, and the seconds spent making them."""

    folder: Path
    grid: Path
    made: int
    found: int
    seconds: float

    def __str__(self) -> str:
        rate = f" ({self.made / self.seconds:.2f} images/s)" if self.made and self.seconds else ""
        done = f"{self.made} images made{rate}" + (f", {self.found} were there already" if self.found else "")
        return f"{done if self.made else f'all {self.found} images were there already'}\ngrid: {_near(self.grid)}"


@dataclass(frozen=True)
class Picture:
    """One picture to be made: where it goes and everything it depends on (its settings are also its PNG's text)."""

    path: Path
    prompt: str
    seed: int
    images: tuple[str, ...]  # one for each control
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Pictures of one method that are sampled together, whichever of them are there already."""

    guidance: GuidanceConfig
    negative: str | None
    controls: Mapping[str, ControlConfig]
    pictures: tuple[Picture, ...]


def generate(config: GenerateConfig, model: "SDXL | None" = None) -> RunResult:
    """Make what is missing of the run that `config` describes, then its grid.

    model: already loaded; None loads `config.model` if anything is missing.
    ValueError for settings that do not fit the model, OSError where the folder cannot be written. On an
    interrupt finished pictures stay.
    """
    config = with_batch_size(of_model(config, model))
    plan = panels(config)
    weights = resolve_model(config.model.path)
    sources = Sources(plan, weights)
    semantic = semantics(config, plan, runs.fingerprint(weights), sources)
    folder = runs.run_folder(config.out, config.name, semantic)
    batches = list(cut(config, plan, semantic, folder, sources))
    pictures = [p for batch in batches for p in batch.pictures]
    there = {p.path: images.read_settings(p.path) or {} for p in pictures}
    missing = {p.path for p in pictures if any(there[p.path].get(k) != p.settings[k] for k in IDENTITY)}
    others = {found["code"] for path, found in there.items() if path not in missing} - {runs.code_version()}
    if others:
        _say(f"images by other code ({', '.join(sorted(others))}) are kept; remove {_near(folder)} to make them anew")
    todo = [batch for batch in batches if any(p.path in missing for p in batch.pictures)]
    seconds = 0.0
    if todo:
        if len(missing) < len(pictures):
            _say(f"{len(pictures) - len(missing)} of {len(pictures)} images are there already, {len(missing)} to make")
        try:
            nets = list(sources.nets)
            sdxl = load_model(config.model, config.device, nets, config.compute) if model is None else model
            guided = {
                id(b.guidance): build_guidance(b.guidance, sdxl.denoiser) for b in todo
            }  # any fails before one runs
            sdxl.latent_shape(config.size)
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty
            raise
        show_controls(plan, folder, semantic, config.size or sdxl.default_size)
        start = time.perf_counter()
        runs.write(folder / "config.yaml", written_config(config, plan))
        _make(config, sdxl, todo, missing, lambda g: guided[id(g)])
        seconds = time.perf_counter() - start
    elif any(panel.controls for panel in plan):
        show_controls(plan, folder, semantic, images.picture_size(pictures[0].path))
    grid = draw(config, plan, folder, semantic)
    return RunResult(folder, grid, len(missing), len(pictures) - len(missing), seconds)


def semantics(config: GenerateConfig, plan: tuple[Panel, ...], fingerprint: str, sources: Sources) -> dict[str, Any]:
    """What the pictures depend on, and no more: not where they go, the device, or how many are made at a time."""
    model = {"fingerprint": fingerprint, "dtype": config.model.dtype, "vae_dtype": config.model.vae_dtype}
    asked = {"sampler": config.sampler, "schedule": config.schedule, "steps": config.steps, "size": config.size}
    asked |= config.compute.identity(device_kind(config.device))
    written = [
        {
            "title": panel.title,
            "negative": panel.negative,
            "rows": [{"prompt": row.prompt, "seed": row.seed} for row in panel.rows],
            "methods": panel.methods,
            **sources.identity(panel),
        }
        for panel in plan
    ]
    return runs.plain({"model": model, **asked, "panels": written})


def cut(
    config: GenerateConfig, plan: tuple[Panel, ...], semantic: Mapping[str, Any], folder: Path, sources: Sources
) -> Iterator[Batch]:
    """All pictures of the run in batches; those already there count, so a resume repeats the same batches."""
    common = {k: v for k, v in semantic.items() if k != "panels"}
    loaded = ("name", "path", "variant", "config", "tokenizer")
    common["model"] = {**{key: getattr(config.model, key) for key in loaded}, **common["model"]}
    common["compute"] = config.compute.record(device_kind(config.device))
    common |= {"run": runs.digest(semantic), **runs.versions()}
    for number, panel in enumerate(plan, 1):
        for method, guidance in panel.methods.items():
            paths = picture_paths(folder, plan, number, method)
            pictures = [
                Picture(path, row.prompt, row.seed, row.images, {
                    **common, "method": method, "guidance": runs.plain(guidance), "prompt": row.prompt,
                    "negative": panel.negative, "seed": row.seed, **sources.settings(panel, row),
                })
                for path, row in zip(paths, panel.rows, strict=True)
            ]  # fmt: skip
            size = int(config.batch_size)
            for i in range(0, len(pictures), size):
                yield Batch(guidance, panel.negative, panel.controls, tuple(pictures[i : i + size]))


def picture_paths(folder: Path, plan: tuple[Panel, ...], number: int, method: str) -> list[Path]:
    """images/[panel/]method/[prompt-]seed.png for every row of panel `number` (from 1); prompts are numbered."""
    panel = plan[number - 1]
    place = folder / "images" / panel_place(plan, number)
    order = list(dict.fromkeys(row.prompt for row in panel.rows))
    prefix = {p: f"prompt{i:0{len(str(len(order) - 1))}d}-" if len(order) > 1 else "" for i, p in enumerate(order)}
    digits = len(str(max(row.seed for row in panel.rows)))
    return [place / slug(method) / f"{prefix[row.prompt]}seed{row.seed:0{digits}d}.png" for row in panel.rows]


def panel_place(plan: tuple[Panel, ...], number: int) -> str:
    """The folder of panel `number` among the others; "" where it is the only one."""
    title = plan[number - 1].title
    return "" if len(plan) == 1 else f"{number}-{slug(title)}" if title else str(number)


def control_paths(folder: Path, plan: tuple[Panel, ...], number: int, control: str) -> list[Path]:
    """controls/[panel/]control/seed.png for every row of panel `number` (from 1): prompts share a seed's image."""
    rows = plan[number - 1].rows
    digits, place = len(str(max(row.seed for row in rows))), folder / "controls" / panel_place(plan, number)
    return [place / slug(control) / f"seed{row.seed:0{digits}d}.png" for row in rows]


def show_controls(plan: tuple[Panel, ...], folder: Path, semantic: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Write the control images as files, for whoever looks and for the grid."""
    for number, panel in enumerate(plan, 1):
        for k, (name, control) in enumerate(panel.controls.items()):
            from segresearch.control_images.prepare import show

            for path, row in zip(control_paths(folder, plan, number, name), panel.rows, strict=True):
                made = runs.plain(dataclasses.replace(control, image=row.images[k]))
                said = {"run": runs.digest(semantic), "control": name, "image": row.images[k], "seed": row.seed,
                        "settings": made, "size": list(size)}  # fmt: skip
                show(control, row.images[k], size, path, said)


def _make(
    config: GenerateConfig, sdxl: "SDXL", todo: list[Batch], missing: set[Path], guided: Callable[[GuidanceConfig], Any]
) -> None:
    import torch
    from PIL import Image
    from tqdm import tqdm

    from segresearch.sampling import initial_noise, sample, sigmas

    levels: Any = config.schedule.name
    if config.schedule.rho is not None:
        levels = sigmas(sdxl.denoiser, config.schedule.name, config.steps, config.schedule.rho)
    shape, made = sdxl.latent_shape(config.size), 0
    with torch.no_grad(), sdxl.arithmetic(), tqdm(total=len(missing), unit="image", disable=None, leave=False) as bar:
        try:
            for batch in todo:
                seeds = [p.seed for p in batch.pictures]
                bar.set_description(str(batch.pictures[0].settings["method"]))
                conds = sdxl.encode([p.prompt for p in batch.pictures], negative=batch.negative, size=config.size)
                more: dict[str, Any] = {"control": control(sdxl, config, batch)} if batch.controls else {}
                latents = sample(
                    guided(batch.guidance), initial_noise(seeds, shape), sampler=config.sampler.name, schedule=levels,
                    steps=config.steps, conds=conds, seeds=seeds, options=config.sampler.options, **more,
                )  # fmt: skip
                finite = latents.isfinite().flatten(1).all(1).tolist()  # (b, c, h, w) -> (b)
                if bad := [p.seed for p, whole in zip(batch.pictures, finite, strict=True) if not whole]:
                    name = batch.pictures[0].settings["method"]
                    hint = "try model.dtype=float32 or lower scales"
                    raise Ended(4, f"{name}: the latents of seeds {bad} are not finite; {hint}")
                pixels = sdxl.decode(latents).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
                for picture, image in zip(batch.pictures, pixels.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                    if picture.path in missing:
                        images.save_png(Image.fromarray(image), picture.path, picture.settings)
                        made += 1
                        bar.update()
        except KeyboardInterrupt:
            bar.close()
            print(f"stopped: {made} of {len(missing)} images made, and kept; the same command resumes", file=sys.stderr)
            raise


def control(sdxl: "SDXL", config: GenerateConfig, batch: Batch) -> list["ActiveControlNet"]:
    """The ControlNets of a batch, each with the control images of its pictures."""
    from segresearch.control_images.prepare import controlled_batch
    from segresearch.sampling import sigmas

    levels = sigmas(sdxl.denoiser, config.schedule.name, config.steps, config.schedule.rho)
    shown = [picture.images for picture in batch.pictures]
    return controlled_batch(sdxl, batch.controls, shown, config.size or sdxl.default_size, levels)


def draw(config: GenerateConfig, plan: tuple[Panel, ...], folder: Path, semantic: Mapping[str, Any]) -> Path:
    """grid.png: a block a panel, rows are seeds (and prompts), columns methods; kept if it is this grid already."""
    path, most = folder / "grid.png", config.grid.rows
    blocks, cut_off = [], 0
    for number, panel in enumerate(plan, 1):
        shown = {f"control: {c}" if len(panel.controls) > 1 else "control": c for c in panel.controls}
        columns = [control_paths(folder, plan, number, name) for name in shown.values()]
        columns += [picture_paths(folder, plan, number, method) for method in panel.methods]
        rows, cells = panel.rows[:most], [list(row) for row in zip(*columns, strict=True)][:most]
        cut_off = max(cut_off, len(panel.rows) - most)
        captions = [(f"seed {row.seed}", row.prompt) for row in rows]
        title = panel.title
        if not title and len({row.prompt for row in rows}) == 1 and rows[0].prompt:
            title, captions = f"“{rows[0].prompt}”", [(first, "") for first, _ in captions]
        blocks.append(images.Block(title, (*shown, *panel.methods), captions, cells))
    sampling = f"{config.model.name}: {config.sampler.name}, {config.steps} steps, {config.schedule.name} schedule"
    more = f"; the first {most} rows of more" if cut_off > 0 else ""
    steered = " under one control image" if any(panel.controls for panel in plan) else ""
    note = f"{sampling}. Every row starts from one noise{steered}; columns differ in guidance alone{more}."
    title = config.grid.title or config.name
    texts = [(b.title, b.heads, b.captions) for b in blocks]
    drawn = runs.digest([VERSION, config.grid, texts, title, note])
    whole = {key: value for key, value in whole_config(config, plan).items() if key not in OF_A_CALL}
    kind = device_kind(config.device)
    whole["compute"] = runs.plain(config.compute.resolved(kind))
    compute = config.compute.record(kind)
    settings = runs.plain({"run": runs.digest(semantic), "drawn": drawn, "settings": semantic, "compute": compute})
    found = images.read_settings(path) or {}
    if not found.pop("generate", None) or found != settings:
        settings["generate"] = whole  # its paths are of this machine, so they are not compared
        cell = config.grid.cell or images.cell_size(blocks[0].paths[0][0])
        images.save_png(images.draw_grid(blocks, title, note, cell, config.grid.across), path, settings)
    return path


def whole_config(config: GenerateConfig, plan: tuple[Panel, ...]) -> dict[str, Any]:
    """Every setting in full, prompts included."""
    values: dict[str, Any] = runs.plain(config)
    for panel, given in zip(plan, values["panels"] or [values], strict=True):
        given["prompts"] = list(dict.fromkeys(row.prompt for row in panel.rows))
    return values


def written_config(config: GenerateConfig, plan: tuple[Panel, ...]) -> str:
    """config.yaml: every setting in full, in a form that generate.py takes back."""
    from omegaconf import OmegaConf

    parts = (hydra_settings(), whole_config(config, plan) | OF_A_CALL)
    return "".join(OmegaConf.to_yaml(OmegaConf.create(part)) for part in parts)


def _say(text: str) -> None:
    print(text, flush=True)


def _near(path: Path) -> Path:
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path.resolve()
