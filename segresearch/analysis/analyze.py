"""One run of the energy bench: sample, capture q and k, measure, test the claims, plot, and write it all as a page.

    <out>/<name>/<id>/  index.html      the page, which holds its figures and works offline
                        table.csv       site × head × σ_t × blur σ × boundary
                        verdicts.csv    claim × boundary × blur σ
                        figures/*.png   config.yaml
                        recording/      the captured q and k, if they are to be kept

The page is written last: a folder that has it is complete, and the same command then measures nothing again.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from segresearch import runs
from segresearch.analysis import energy_plots, report
from segresearch.analysis.measurements import measure
from segresearch.analysis.recorder import Recorder, Recording
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import AnalyzeConfig
from segresearch.config.build import build_guidance, load_model, resolved
from segresearch.config.compose import written_config
from segresearch.config.parse import parse_seeds, read_prompts
from segresearch.errors import ConfigError
from segresearch.guidance import SelfAttentionGuidance
from segresearch.models import SDXL
from segresearch.pages import to_csv
from segresearch.plot_style import save
from segresearch.records import figure_record, sampling_identity
from segresearch.sample_images import sample_images
from segresearch.wandb_log import WandbRun, log

Images = Sequence[Mapping[str, Any]]  # the prompt and the seed of each
Pixels = UInt8[np.ndarray, "images h w 3"]
VERSION = 1  # of the measurement and the page: part of the identity
PAGE = "index.html"
MEASURED = ("guidance", "negative", "where", "heads", "branch", "blur")  # beside the sampling's settings
OF_A_CALL = {"out": "runs", "device": "auto", "batch_size": "auto", "wandb": {"mode": "off"}}  # not of the run


@dataclass(frozen=True)
class Analysis:
    """The result of a run: its folder and page, whether both were complete before, and the seconds it took."""

    folder: Path
    page: Path
    reused: bool
    seconds: float

    def __str__(self) -> str:
        done = "all was there already" if self.reused else f"measured in {self.seconds:.0f} s"
        return f"{done}\npage: {self.page}"


def analyze(config: AnalyzeConfig, model: SDXL | None = None) -> Analysis:
    """Sample the images of `config` and measure their attention, unless its folder is complete.

    model: already loaded; None loads `config.model`. Raises InputError for settings that do not fit the model, OSError
    if the folder cannot be written.
    """
    start = time.perf_counter()
    config = resolved(config, model)
    images = [{"prompt": p, "seed": s} for p in read_prompts(config.prompts) for s in parse_seeds(config.seeds)]
    identity = sampling_identity(config, runs.fingerprint(resolve_model(config.model.path)))
    identity |= {key: getattr(config, key) for key in MEASURED}
    identity |= {"version": VERSION, "images": images, "measured_steps": config.steps_from_0}
    folder = runs.run_folder(config.out, config.name, identity)
    recorded, page = folder / "recording", folder / PAGE
    if page.is_file() and (recorded.is_dir() or not config.keep):
        return Analysis(folder, page, True, time.perf_counter() - start)
    try:
        sdxl = load_model(config.model, config.device, compute=config.compute) if model is None else model
        _write(config, sdxl, *_capture(config, sdxl, images, recorded), images, folder)
        if not config.keep:
            shutil.rmtree(recorded)
    except BaseException:
        shutil.rmtree(recorded, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    return Analysis(folder, page, False, time.perf_counter() - start)


def _capture(config: AnalyzeConfig, sdxl: SDXL, images: Images, folder: Path) -> tuple[Recording, Pixels]:
    """Sample `images`: q and k of `config.branch`, streamed to `folder`, and the pixels.

    Raises InputError for a branch, a site, a head or a size that does not exist.
    """
    guided = build_guidance(config.guidance, sdxl.denoiser)
    inner = guided.inner if isinstance(guided, SelfAttentionGuidance) else guided
    names = dict.fromkeys(map(str, [inner.base, *(b for t in inner.terms.values() for b in (t.pos, t.neg))]))
    if config.branch not in names:
        raise ConfigError(f"branch: no branch {config.branch!r} under this guidance; there are {', '.join(names)}")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    steps, branches = config.steps_from_0, [config.branch]
    recorder = Recorder(sdxl.unet.site_heads, config.where, config.heads, steps, branches, folder=folder)
    pixels, size = [], int(config.batch_size)
    for batch in (images[start : start + size] for start in range(0, len(images), size)):
        seeds, prompts = [image["seed"] for image in batch], [image["prompt"] for image in batch]
        attend = recorder.attend(batch)
        pixels.append(sample_images(sdxl, guided, seeds, prompts, config, config.negative, attend=attend))
    if not recorder.entries:
        raise ConfigError(
            f"branch {config.branch!r} computes no attention at where={config.where!r} in steps {config.measured_steps}"
        )
    return recorder.recording, torch.cat(pixels).permute(0, 2, 3, 1).cpu().numpy()  # (n, 3, h, w) -> (n, h, w, 3)


def _write(
    config: AnalyzeConfig, sdxl: SDXL, recording: Recording, pixels: Pixels, images: Images, folder: Path
) -> None:
    """Measure a recording; its table, claims, figures and page go to `folder`."""
    device = sdxl.device if sdxl.device.type == "cuda" else torch.device("cpu")  # both have fp64
    sites = tuple(sdxl.unet.site_heads)
    rows, claims = measure(recording, config.blur.sigmas, config.blur.boundaries, sites, device)
    paths = {}
    for name, figure in energy_plots.draw(config, recording, rows, pixels, images).items():
        paths[name] = folder / "figures" / f"{name}.png"
        save(figure, paths[name], figure_record(name, "analyze", config, ("out", "device", "wandb")))
    runs.write(folder / "config.yaml", written_config(config, OF_A_CALL))
    tables = {"table": rows, "verdicts": [claim.row() for claim in claims]}
    for name, table in tables.items():
        runs.write(folder / f"{name}.csv", to_csv(table, digits=7))
    runs.write(folder / PAGE, report.page(config, images, rows, claims, paths))
    metrics = {f"{c.claim}/{c.boundary}/sigma_{c.blur_sigma:g}": c.share for c in claims}
    name, plots = f"{config.name}-{folder.name}", {key: [(path, "")] for key, path in paths.items()}
    logged = WandbRun(name, config.name, "analysis", config, metrics, tables=tables, images=plots)
    log(config.wandb, folder, [name, metrics], lambda _: [logged])
