"""Images of several methods from the same seeds, each with its record, and the grid that compares them. An image that
exists is not sampled again: the same command resumes a run, and a finished run loads no model."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from segresearch import image_page, runs
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import GenerateConfig
from segresearch.config.build import build_guidance, configured_model, device_kind, resolved
from segresearch.config.compose import written_config
from segresearch.config.expand import ImageSpec, Panel, panels, slug
from segresearch.control_images.identify import control_records, identify_controls
from segresearch.errors import NotFinite
from segresearch.image_grid import cell_height, draw_grid, image_size
from segresearch.image_page import PanelFiles
from segresearch.init_images import identify_init, in_words, init_images, save_start
from segresearch.pages import title_of
from segresearch.progress import Bar
from segresearch.records import (
    config_record,
    image_record,
    read_record,
    run_record,
    sampling_identity,
    save_png,
    with_networks,
)  # fmt: skip
from segresearch.wandb_live import live
from segresearch.wandb_log import WandbRun, log

if TYPE_CHECKING:
    from segresearch.models import StableDiffusion

GRID_VERSION = 2
PAGE = "index.html"
OF_A_CALL = {"out": "runs", "device": "auto", "batch_size": "auto", "wandb": {"mode": "off"}}  # not of the run
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
        if not self.sampled:
            return f"all {self.existing} images exist already\ngrid: {self.grid}\npage: {self.folder / PAGE}"
        rate = f"{self.sampled / self.seconds:.2f} images/s"
        existing = f", {self.existing} existed already" if self.existing else ""
        return f"{self.sampled} images sampled ({rate}){existing}\ngrid: {self.grid}\npage: {self.folder / PAGE}"


@dataclass(frozen=True)
class Run:
    """A config with every prompt in full, what the images depend on, the folder that is named by it, and its files."""

    config: GenerateConfig
    identity: Mapping[str, Any]
    folder: Path
    panels: list[PanelFiles]


def generate(config: GenerateConfig, model: "StableDiffusion | None" = None) -> RunResult:
    """Sample the missing images of the run that `config` describes, then draw its grid.

    model: already loaded; None loads `config.model` if anything is missing. InputError for settings that do not fit
    the model, OSError where the folder cannot be written. On an interrupt finished images stay. The same run in another
    process is waited for.
    """
    run = expand(resolved(config, model))
    with runs.locked(config.out, f"{config.name}/{run.folder.name}"):
        return complete(run, model)


def complete(run: Run, model: "StableDiffusion | None") -> RunResult:
    """What is missing of a run: its images, its grid, its log."""
    seconds = 0.0
    records = dict(item for files in run.panels for images in files.images.values() for item in images.items())
    stored = {path: read_record(path) or {} for path in records}
    missing = {path for path, r in records.items() if any(stored[path].get(key) != r[key] for key in IDENTITY)}
    existing = len(records) - len(missing)
    if others := {str(stored[path].get("code")) for path in records.keys() - missing} - {runs.code_version()}:
        other = f"images by other code ({', '.join(sorted(others))}) are kept"
        print(f"{other}; remove {run.folder} to sample them again", flush=True)
    if missing and existing:
        print(f"{existing} of {len(records)} images exist already, {len(missing)} are sampled", flush=True)
    if missing:
        runs.create(run.folder)
        try:
            seconds = sample_missing(run, missing, model)
        except BaseException:
            with contextlib.suppress(OSError):
                run.folder.rmdir()  # if it is empty
            raise
    else:
        save_given_images(run, image_size(next(iter(records))))
    result = RunResult(run.folder, save_grid(run), len(missing), existing, seconds)
    log_images(run, result)
    return result


def expand(config: GenerateConfig) -> Run:
    """The run of `config`; its folder is not created. ConfigError and CheckpointError for files that are missing."""
    weights = resolve_model(config.model.path)
    plan = [
        replace(panel, methods={name: with_networks(g, weights) for name, g in panel.methods.items()})
        for panel in panels(config)
    ]
    fingerprint = runs.fingerprint(weights)
    identified = [identify_controls(panel.controls, [row.images for row in panel.rows], weights) for panel in plan]
    inits = [identify_init(panel.init, [row.init for row in panel.rows]) for panel in plan]
    entries = []  # of each panel what its images depend on
    for panel, controls, init in zip(plan, identified, inits, strict=True):
        rows = [{"prompt": row.prompt, "seed": row.seed, **own(panel, row)} for row in panel.rows]
        columns = zip(*(row.images for row in panel.rows), strict=True)  # of each control its images
        steered = [control.identity(column) for control, column in zip(controls.values(), columns, strict=True)]
        entry: dict[str, Any] = {"title": panel.title, "negative": panel.negative, "rows": rows}
        started = {} if panel.init.image is None else {"init": init.identity([row.init for row in panel.rows])}
        entry |= {"methods": panel.methods} | ({"controls": steered} if steered else {})
        entries.append(entry | started)
    identity = runs.plain({**sampling_identity(config, fingerprint), "panels": entries})
    folder, expanded = runs.run_folder(config.out, config.name, identity), []
    shared = run_record(config, fingerprint, folder.name)
    prompts = [tuple(dict.fromkeys(row.prompt for row in panel.rows)) for panel in plan]
    for number, (panel, controls, init, texts) in enumerate(zip(plan, identified, inits, prompts, strict=True), 1):
        subfolder = "" if len(plan) == 1 else f"{number}-{slug(panel.title)}" if panel.title else str(number)
        numbers, digits = {text: i for i, text in enumerate(texts)}, len(str(len(texts) - 1))
        prefixes = [f"prompt{numbers[row.prompt]:0{digits}d}-" if len(texts) > 1 else "" for row in panel.rows]
        digits = len(str(max(row.seed for row in panel.rows)))
        seeds = [f"seed{row.seed:0{digits}d}.png" for row in panel.rows]
        more = [
            {"negative": row.negative, **control_records(controls, row.images), **init.record(row.init)}
            | own(panel, row)
            for row in panel.rows
        ]
        images: dict[str, Any] = {}
        for method, guidance in panel.methods.items():
            paths = [folder / "images" / subfolder / slug(method) / (p + s) for p, s in zip(prefixes, seeds)]
            images[method] = {
                path: image_record(shared, method, guidance, prompt=row.prompt, seed=row.seed, **image)
                for path, row, image in zip(paths, panel.rows, more, strict=True)
            }
        files = {name: [folder / "controls" / subfolder / slug(name) / seed for seed in seeds] for name in controls}
        kinds = ("image", "mask")[: len(panel.rows[0].init)]
        starts = {kind: [folder / "starts" / subfolder / kind / seed for seed in seeds] for kind in kinds}
        expanded.append(PanelFiles(panel, images, files, starts))
    in_full = tuple(replace(table, **panel.in_full) for table, panel in zip(config.panels, plan))
    whole: Mapping[str, Any] = {"panels": in_full} if in_full else plan[0].in_full
    return Run(replace(config, **dict(whole)), identity, folder, expanded)


def own(panel: Panel, row: ImageSpec) -> dict[str, Any]:
    """What only some rows of a panel have: a negative prompt or a size of their own."""
    negative = {} if row.negative == panel.negative else {"negative": row.negative}
    return negative | ({} if row.size is None else {"size": row.size})


def batches(rows: Sequence[ImageSpec], size: int) -> list[list[int]]:
    """The numbers of the rows in batches of at most `size`, each of images of one size."""
    of_size: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        of_size.setdefault(row.size, []).append(i)
    return [numbers[i : i + size] for numbers in of_size.values() for i in range(0, len(numbers), size)]


def sample_missing(run: Run, missing: set[Path], model: "StableDiffusion | None") -> float:
    """Sample and save `missing`, in batches that do not depend on which images exist. Returns the seconds."""
    from segresearch.control_images.prepare import controlled_batch
    from segresearch.sample_images import run_sigmas, sample_images

    config, saved, batch_size = run.config, 0, int(run.config.batch_size)
    nets = list(dict.fromkeys(control.net for files in run.panels for control in files.panel.controls.values()))
    sd = configured_model(config.model, config.device, nets, config.compute) if model is None else model
    for given in {row.size or config.size for files in run.panels for row in files.panel.rows}:
        sd.latent_shape(given)  # what does not fit the model fails here, before the first image
    columns = [
        (files.panel, method, list(images.items()), build_guidance(files.panel.methods[method], sd))
        for files in run.panels
        for method, images in files.images.items()
    ]
    save_given_images(run, config.size or sd.default_size)
    start = time.perf_counter()
    runs.write(run.folder / "config.yaml", written_config(config, OF_A_CALL))
    try:
        with live(config.wandb, Path(config.out), mirrored(run)) as watch, Bar(len(missing), watch=watch) as bar:
            for panel, method, images, guided in columns:
                bar.describe(method)
                for numbers in batches(panel.rows, batch_size):
                    rows, batch = [panel.rows[i] for i in numbers], [images[i] for i in numbers]
                    if missing.isdisjoint(path for path, _ in batch):
                        continue
                    sized = config if rows[0].size is None else replace(config, size=rows[0].size)
                    size, sigmas = sized.size or sd.default_size, run_sigmas(sd, config, panel.init)
                    control = controlled_batch(sd, panel.controls, [row.images for row in rows], size, sigmas)
                    init = init_images(panel.init, [row.init for row in rows], size)
                    seeds, prompts = [row.seed for row in rows], [row.prompt for row in rows]
                    negatives = {row.negative for row in rows}
                    negative = negatives.pop() if len(negatives) == 1 else [row.negative or "" for row in rows]
                    new = len(missing.intersection(path for path, _ in batch))
                    report = bar.callback(new, len(batch), len(sigmas) - 1)
                    pixels = sample_images(
                        sd, guided, seeds, prompts, sized, negative, control, init=init, callback=report
                    )
                    for (path, record), one in zip(batch, pixels.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                        if path in missing:
                            save_png(Image.fromarray(one), path, record)
                            saved += 1
                    bar.add(new)
    except NotFinite as error:
        raise NotFinite(f"{method}: {error}; try model.dtype=float32 or lower scales") from error
    except KeyboardInterrupt as stop:
        stop.args = (f"{str(stop) or 'stopped'}: {saved} of {len(missing)} images sampled, and kept",)
        raise
    return time.perf_counter() - start


def mirrored(run: Run) -> WandbRun:
    """The run as W&B is told of it, without numbers and images."""
    config = run.config
    settings = {**config_record(config, OF_A_CALL), "run": run.folder.name, "code": runs.code_version()}
    tags = [config.model.name, *(method for files in run.panels for method in files.images)][:20]
    return WandbRun(f"{config.name} {run.folder.name}", config.name, "images", settings, tags=tags)


def log_images(run: Run, result: RunResult) -> None:
    """In W&B: the grid, and the images of each method as a gallery. See `wandb_log.log`."""
    config, whole = run.config, mirrored(run)
    galleries: dict[str, list[tuple[Path, str]]] = {"grid": [(result.grid, "")]}
    for files in run.panels:
        for method, images in files.images.items():
            title = f"{files.panel.title}: {method}" if files.panel.title else method
            shown = [(p, f"seed {r['seed']}" + f": {r['prompt']}" * bool(r["prompt"])) for p, r in images.items()]
            galleries[slug(title)] = shown[: config.grid.rows]
    logged = replace(whole, values={"images": result.sampled + result.existing}, images=galleries)
    log(config.wandb, Path(config.out), [whole.name, sorted(galleries)], lambda _: [logged])


def save_given_images(run: Run, size: tuple[int, int]) -> None:
    """Write control images, starting images and masks as files, for the grid and for inspection."""
    for files in run.panels:
        for row, *paths in zip(files.panel.rows, *files.starts.values()):
            save_start(files.panel.init, row.init, row.size or size, paths)
        records = next(iter(files.images.values())).values()
        for name, paths in files.controls.items():
            from segresearch.control_images.prepare import save_control_image

            for path, image in zip(paths, records, strict=True):
                settings = image["controls"][name]
                record = {"run": run.folder.name, "control": name, "image": settings["image"], "seed": image["seed"],
                          "settings": settings, "size": list(size)}  # fmt: skip
                save_control_image(files.panel.controls[name], settings["image"], size, path, record)


def save_grid(run: Run) -> Path:
    """grid.png: a block a panel, rows are seeds (and prompts), columns methods; kept if it is this grid already. The
    page beside it."""
    config, path, limit = run.config, run.folder / "grid.png", run.config.grid.rows
    blocks = [block for files in run.panels for block in image_page.blocks(files, limit, config.grid.across)]
    sampling = f"{config.model.name}: {config.sampler.name}, {config.steps} steps, {config.schedule.name} schedule"
    more = f"; the first {limit} rows of more" if any(len(files.panel.rows) > limit for files in run.panels) else ""
    steered = " under one control image" if any(files.controls for files in run.panels) else ""
    started = "one image and its noise" if any(files.starts for files in run.panels) else "one noise"
    compared = f"Every row starts from {started}{steered}; columns differ in guidance alone"
    if all(map(image_page.alone, run.panels)):
        compared = "Each image starts from the noise of its seed"
    note = f"{sampling}. {compared}{more}."
    methods = list(dict.fromkeys(method for files in run.panels for method in files.images))
    title = config.grid.title or title_of(config.name, "generate", methods)
    texts = [(block.title, block.heads, block.captions) for block in blocks]
    drawn = runs.digest([GRID_VERSION, config.grid, texts, title, note])
    compute = config.compute.record(device_kind(config.device))
    record = runs.plain({"run": run.folder.name, "drawn": drawn, "settings": run.identity, "compute": compute})
    existing = read_record(path) or {}
    if not existing.pop("generate", None) or existing != record:
        record["generate"] = config_record(config, OF_A_CALL)  # not compared: it names folders
        cell = config.grid.cell or cell_height(blocks[0].paths[0][0])
        save_png(draw_grid(blocks, title, note, cell, config.grid.across), path, record)
    facts = {"run": run.folder.name, "model": f"{config.model.name}, {config.model.dtype}"}
    if starts := dict.fromkeys(in_words(files.panel.init) for files in run.panels if files.starts):
        facts["start"] = "; ".join(starts)
    runs.write(run.folder / PAGE, image_page.page(run.panels, run.folder, title, note, facts, limit))
    return path
