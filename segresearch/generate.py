"""Images of several methods from the same seeds, each with its record, and the grid that compares them.

The run folder is named by the content of its settings. An image that exists is not sampled again, so the same command
resumes a stopped run, and a finished run returns without loading the model.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segresearch import runs
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import GenerateConfig
from segresearch.config.build import build_guidance, device_kind, load_model, resolved
from segresearch.config.expand import ImageSpec, Panel, panels, slug
from segresearch.control_images.identify import IdentifiedControl, control_records, identify_control
from segresearch.errors import NotFinite
from segresearch.image_grid import Block, cell_height, draw_grid, image_size
from segresearch.png_metadata import read_record, save_png
from segresearch.records import config_record, image_record, run_record, sampling_identity

if TYPE_CHECKING:
    from segresearch.models import SDXL


GRID_VERSION = 1
OF_A_CALL = {"out": "runs", "device": "auto", "batch_size": "auto"}  # not of the run
IDENTITY = ("run", "method", "prompt", "seed")  # tell one image's record from any other's


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and grid, how many images were sampled and how many existed, seconds of sampling."""

    folder: Path
    grid: Path
    sampled: int
    existing: int
    seconds: float

    def __str__(self) -> str:
        grid = self.grid.resolve()
        if grid.is_relative_to(Path.cwd()):
            grid = grid.relative_to(Path.cwd())
        if not self.sampled:
            return f"all {self.existing} images exist already\ngrid: {grid}"
        rate = f" ({self.sampled / self.seconds:.2f} images/s)" if self.seconds else ""
        existing = f", {self.existing} existed already" if self.existing else ""
        return f"{self.sampled} images sampled{rate}{existing}\ngrid: {grid}"


@dataclass(frozen=True)
class ImageFile:
    """The file of one image: what it is sampled from, and the record that it carries."""

    path: Path
    spec: ImageSpec
    record: Mapping[str, Any]


@dataclass(frozen=True)
class PanelImages:
    """A panel and its files, in the order of its rows: images by method, paths of control images by control."""

    panel: Panel
    images: Mapping[str, list[ImageFile]]
    controls: Mapping[str, list[Path]]


@dataclass(frozen=True)
class Column:
    """The images of one method in a panel, and the guided denoiser that samples them."""

    panel: Panel
    method: str
    images: list[ImageFile]
    guided: Any


@dataclass(frozen=True)
class Run:
    """A config expanded. identity: everything that the images depend on; `folder` is named by it."""

    config: GenerateConfig
    identity: Mapping[str, Any]
    folder: Path
    panels: list[PanelImages]


def generate(config: GenerateConfig, model: "SDXL | None" = None) -> RunResult:
    """Sample the missing images of the run that `config` describes, then draw its grid.

    model: already loaded; None loads `config.model` if anything is missing. InputError for settings that do not fit
    the model, OSError where the folder cannot be written. On an interrupt finished images stay.
    """
    run = expand(resolved(config, model))
    images = [image for files in run.panels for column in files.images.values() for image in column]
    records = {image.path: read_record(image.path) or {} for image in images}
    missing = {i.path for i in images if any(records[i.path].get(key) != i.record[key] for key in IDENTITY)}
    others = {record["code"] for path, record in records.items() if path not in missing} - {runs.code_version()}
    if others:
        other = f"images by other code ({', '.join(sorted(others))}) are kept"
        print(f"{other}; remove {run.folder} to sample them again", flush=True)
    existing, seconds = len(images) - len(missing), 0.0
    if missing and existing:
        print(f"{existing} of {len(images)} images exist already, {len(missing)} are sampled", flush=True)
    if missing:
        try:
            nets = list(dict.fromkeys(c.net for p in run.panels for c in p.panel.controls.values()))
            sdxl = load_model(config.model, config.device, nets, config.compute) if model is None else model
            columns = [
                Column(files.panel, method, column, build_guidance(files.panel.methods[method], sdxl.denoiser))
                for files in run.panels
                for method, column in files.images.items()
            ]
            sdxl.latent_shape(config.size)  # what does not fit the model fails here, before the first image
        except BaseException:
            with contextlib.suppress(OSError):
                run.folder.rmdir()  # if it is empty
            raise
        save_control_images(run, config.size or sdxl.default_size)
        start = time.perf_counter()
        runs.write(run.folder / "config.yaml", runs.written_config(complete_settings(run), OF_A_CALL))
        sample_missing(run.config, sdxl, columns, missing)
        seconds = time.perf_counter() - start
    else:
        save_control_images(run, image_size(images[0].path))
    return RunResult(run.folder, save_grid(run), len(missing), existing, seconds)


def expand(config: GenerateConfig) -> Run:
    """The run of `config`; its folder is created. ConfigError and CheckpointError for files that are missing."""
    plan, weights = panels(config), resolve_model(config.model.path)
    identified = [
        {
            name: identify_control(control, [row.images[k] for row in panel.rows], weights, f"controls.{name}")
            for k, (name, control) in enumerate(panel.controls.items())
        }
        for panel in plan
    ]
    fingerprint = runs.fingerprint(weights)
    entries = list(map(panel_identity, plan, identified))
    identity = runs.plain({**sampling_identity(config, fingerprint), "panels": entries})
    folder, expanded = runs.run_folder(config.out, config.name, identity), []
    shared = run_record(config, fingerprint, folder.name)
    for number, (panel, controls) in enumerate(zip(plan, identified, strict=True), 1):
        subfolder = "" if len(plan) == 1 else f"{number}-{slug(panel.title)}" if panel.title else str(number)
        digits = len(str(max(row.seed for row in panel.rows)))
        seeds = [f"seed{row.seed:0{digits}d}.png" for row in panel.rows]
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in panel.rows))}
        digits = len(str(len(prompts) - 1))
        prefixes = [f"prompt{prompts[row.prompt]:0{digits}d}-" if len(prompts) > 1 else "" for row in panel.rows]
        names = [prefix + seed for prefix, seed in zip(prefixes, seeds, strict=True)]
        steered, images = [control_records(controls, row.images) for row in panel.rows], {}
        for method, guidance in panel.methods.items():
            paths = [folder / "images" / subfolder / slug(method) / name for name in names]
            records = [
                image_record(shared, method, guidance, row.prompt, panel.negative, row.seed, control)
                for row, control in zip(panel.rows, steered, strict=True)
            ]
            images[method] = list(map(ImageFile, paths, panel.rows, records))
        files = {name: [folder / "controls" / subfolder / slug(name) / seed for seed in seeds] for name in controls}
        expanded.append(PanelImages(panel, images, files))
    return Run(config, identity, folder, expanded)


def panel_identity(panel: Panel, controls: Mapping[str, IdentifiedControl]) -> dict[str, Any]:
    """What the images of a panel depend on beside the run's settings."""
    rows = [{"prompt": row.prompt, "seed": row.seed} for row in panel.rows]
    identity = {"title": panel.title, "negative": panel.negative, "rows": rows, "methods": panel.methods}
    if controls:
        by_control = zip(*(row.images for row in panel.rows), strict=True)
        identity["controls"] = [c.identity(images) for c, images in zip(controls.values(), by_control, strict=True)]
    return identity


def sample_missing(config: GenerateConfig, sdxl: "SDXL", columns: list[Column], missing: set[Path]) -> None:
    """Sample and save `missing`, in batches that do not depend on which images exist."""
    from PIL import Image
    from tqdm import tqdm

    from segresearch.control_images.prepare import controlled_batch
    from segresearch.sample_images import run_sigmas, sample_images

    batch_size, saved = int(config.batch_size), 0
    size, sigmas = config.size or sdxl.default_size, run_sigmas(sdxl, config)
    with sdxl.arithmetic(), tqdm(total=len(missing), unit="image", disable=None, leave=False) as bar:
        try:
            for column in columns:
                bar.set_description(column.method)
                for batch in (column.images[i : i + batch_size] for i in range(0, len(column.images), batch_size)):
                    if not any(image.path in missing for image in batch):
                        continue
                    panel, rows = column.panel, [image.spec for image in batch]
                    control = controlled_batch(sdxl, panel.controls, [row.images for row in rows], size, sigmas)
                    seeds, prompts = [row.seed for row in rows], [row.prompt for row in rows]
                    pixels = sample_images(sdxl, column.guided, seeds, prompts, config, panel.negative, control)
                    for image, one in zip(batch, pixels.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                        if image.path in missing:
                            save_png(Image.fromarray(one), image.path, image.record)
                            saved += 1
                            bar.update()
        except NotFinite as error:
            raise NotFinite(f"{column.method}: {error}; try model.dtype=float32 or lower scales") from error
        except KeyboardInterrupt:
            bar.close()
            kept = f"stopped: {saved} of {len(missing)} images sampled, and kept"
            print(f"{kept}; the same command resumes", file=sys.stderr)
            raise


def save_control_images(run: Run, size: tuple[int, int]) -> None:
    """Write the control images as files, for the grid and for inspection."""
    for files in run.panels:
        for k, (name, control) in enumerate(files.panel.controls.items()):
            from segresearch.control_images.prepare import save_control_image

            for path, row in zip(files.controls[name], files.panel.rows, strict=True):
                settings = runs.plain(dataclasses.replace(control, image=row.images[k]))
                record = {"run": run.folder.name, "control": name, "image": row.images[k], "seed": row.seed,
                          "settings": settings, "size": list(size)}  # fmt: skip
                save_control_image(control, row.images[k], size, path, record)


def save_grid(run: Run) -> Path:
    """grid.png: a block a panel, rows are seeds (and prompts), columns methods; kept if it is this grid already."""
    config, path, limit = run.config, run.folder / "grid.png", run.config.grid.rows
    blocks = []
    for files in run.panels:
        heads = [f"control: {name}" if len(files.controls) > 1 else "control" for name in files.controls]
        columns = [*files.controls.values(), *([image.path for image in c] for c in files.images.values())]
        rows, cells = files.panel.rows[:limit], [list(row) for row in zip(*columns, strict=True)][:limit]
        title, captions = files.panel.title, [(f"seed {row.seed}", row.prompt) for row in rows]
        if not title and len({row.prompt for row in rows}) == 1 and rows[0].prompt:
            title, captions = f"“{rows[0].prompt}”", [(seed, "") for seed, _ in captions]
        blocks.append(Block(title, (*heads, *files.images), captions, cells))
    sampling = f"{config.model.name}: {config.sampler.name}, {config.steps} steps, {config.schedule.name} schedule"
    more = f"; the first {limit} rows of more" if any(len(files.panel.rows) > limit for files in run.panels) else ""
    steered = " under one control image" if any(files.controls for files in run.panels) else ""
    note = f"{sampling}. Every row starts from one noise{steered}; columns differ in guidance alone{more}."
    title = config.grid.title or config.name
    texts = [(block.title, block.heads, block.captions) for block in blocks]
    drawn = runs.digest([GRID_VERSION, config.grid, texts, title, note])
    compute = config.compute.record(device_kind(config.device))
    record = runs.plain({"run": run.folder.name, "drawn": drawn, "settings": run.identity, "compute": compute})
    existing = read_record(path) or {}
    if not existing.pop("generate", None) or existing != record:
        record["generate"] = config_record(config, OF_A_CALL, complete_settings(run))  # not compared: it names folders
        cell = config.grid.cell or cell_height(blocks[0].paths[0][0])
        save_png(draw_grid(blocks, title, note, cell, config.grid.across), path, record)
    return path


def complete_settings(run: Run) -> dict[str, Any]:
    """Every setting in full, prompts of files and scenes included."""
    settings: dict[str, Any] = runs.plain(run.config)
    for files, holder in zip(run.panels, settings["panels"] or [settings], strict=True):
        holder["prompts"] = list(dict.fromkeys(row.prompt for row in files.panel.rows))
    return settings
