"""One run of the energy bench: sample, capture q and k, measure, judge, draw, and write it all as a page.

    <out>/<name>/<id>/  index.html      the page, which holds its figures and works offline
                        table.csv       site × head × σ_t × blur σ × boundary
                        verdicts.csv    claim × boundary × blur σ
                        figures/*.png   config.yaml
                        recording/      the captured q and k, if they are to be kept

The page is written last: a folder that has it is complete, and the same command then measures nothing again.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segresearch import runs
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import AnalyzeConfig, ScheduleConfig
from segresearch.config.build import build_guidance, device_kind, load_model, of_model, with_batch_size
from segresearch.config.compose import hydra_settings
from segresearch.config.expand import measured_steps
from segresearch.config.parse import parse_seeds, read_prompts
from segresearch.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from segresearch.analysis.recorder import Recording
    from segresearch.models import SDXL

VERSION = 1  # of the measurement and the page: part of the identity
PAGE = "index.html"


@dataclass(frozen=True)
class Analysis:
    """What a run left: its folder, its page, whether it was there already, and the seconds it took."""

    folder: Path
    page: Path
    found: bool
    seconds: float

    def __str__(self) -> str:
        done = "all was there already" if self.found else f"measured in {self.seconds:.0f} s"
        return f"{done}\npage: {self.page}"


def analyze(config: AnalyzeConfig, model: "SDXL | None" = None) -> Analysis:
    """Measure what `config` asks for, unless its folder is complete.

    model: already loaded; None loads `config.model`. ValueError for settings that do not fit the model, OSError where
    the folder cannot be written.
    """
    start = time.perf_counter()
    config = with_batch_size(of_model(config, model))
    images = [{"prompt": p, "seed": s} for p in read_prompts(config.prompts) for s in parse_seeds(config.seeds)]
    identity = semantics(config, images, runs.fingerprint(resolve_model(config.model.path)))
    folder = runs.run_folder(config.out, config.name, identity)
    recorded, page = folder / "recording", folder / PAGE
    if page.is_file() and (recorded.is_dir() or not config.keep):
        return Analysis(folder, page, True, time.perf_counter() - start)
    try:
        sdxl = load_model(config.model, config.device, compute=config.compute) if model is None else model
        recording, pictures = capture(config, sdxl, images, recorded)
        _measured(config, sdxl, recording, pictures, images, folder)
        if not config.keep:
            shutil.rmtree(recorded)
    except BaseException:
        shutil.rmtree(recorded, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    return Analysis(folder, page, False, time.perf_counter() - start)


def semantics(config: AnalyzeConfig, images: Sequence[dict[str, Any]], fingerprint: str) -> dict[str, Any]:
    """What the numbers depend on, and no more: not where they go, the device, or how many are made at a time."""
    asked = {
        key: getattr(config, key)
        for key in ("sampler", "schedule", "guidance", "negative", "steps", "size", "where", "heads", "branch", "blur")
    }
    asked |= config.compute.identity(device_kind(config.device))
    model = {"fingerprint": fingerprint, "dtype": config.model.dtype}
    asked |= {"measured_steps": measured_steps(config), "images": images}
    return runs.plain({"version": VERSION, "model": model, **asked})


def capture(
    config: AnalyzeConfig, sdxl: "SDXL", images: Sequence[dict[str, Any]], folder: Path
) -> tuple["Recording", "np.ndarray"]:
    """Sample `images`; what `config.branch` attends with, streamed to `folder`, and the pictures (n, h, w, 3) uint8.

    ValueError for a branch, a site, a head or a size that is not.
    """
    import torch

    from segresearch.analysis.recorder import Recorder
    from segresearch.guidance import SelfAttentionGuidance
    from segresearch.sampling import initial_noise, sample

    guided = build_guidance(config.guidance, sdxl.denoiser)
    inner = guided.inner if isinstance(guided, SelfAttentionGuidance) else guided
    names = dict.fromkeys(map(str, [inner.base, *(b for t in inner.terms.values() for b in (t.pos, t.neg))]))
    if config.branch not in names:
        raise ConfigError(f"branch: no branch {config.branch!r} under this guidance; there are {', '.join(names)}")
    shape, schedule, pictures = sdxl.latent_shape(config.size), levels(config.schedule, sdxl, config.steps), []
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    recorder = Recorder(
        sdxl.unet.site_heads, config.where, config.heads, measured_steps(config), [config.branch], folder=folder
    )
    with torch.no_grad(), sdxl.arithmetic():
        size = int(config.batch_size)
        for i in range(0, len(images), size):
            batch = images[i : i + size]
            seeds = [image["seed"] for image in batch]
            conds = sdxl.encode([image["prompt"] for image in batch], negative=config.negative, size=config.size)
            latents = sample(
                guided, initial_noise(seeds, shape), sampler=config.sampler.name, schedule=schedule, steps=config.steps,
                conds=conds, seeds=seeds, options=config.sampler.options, attend=recorder.attend(batch),
            )  # fmt: skip
            pictures.append(sdxl.decode(latents).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8))
    if not len(recorder.recording):
        raise ConfigError(
            f"branch {config.branch!r} computes no attention at where={config.where!r} in steps {config.measured_steps}"
        )
    return recorder.recording, torch.cat(pictures).permute(0, 2, 3, 1).cpu().numpy()


def levels(schedule: ScheduleConfig, sdxl: "SDXL", steps: int) -> Any:
    """The schedule by name, or its levels where it is bent by rho."""
    from segresearch.sampling import sigmas

    return schedule.name if schedule.rho is None else sigmas(sdxl.denoiser, schedule.name, steps, schedule.rho)


def _measured(
    config: AnalyzeConfig,
    sdxl: "SDXL",
    recording: "Recording",
    pictures: "np.ndarray",
    images: Sequence[dict[str, Any]],
    folder: Path,
) -> None:
    """The table, the verdicts, the figures and the page of a recording, written to `folder`."""
    import torch
    from tqdm import tqdm

    from segresearch.analysis import figures, measurements, report, story

    rows: list[measurements.Row] = []
    judged: list[measurements.Judged] = []
    sites = tuple(sdxl.unet.site_heads)
    device = sdxl.device if sdxl.device.type == "cuda" else torch.device("cpu")  # both have fp64
    measured = measurements.measure(recording, config.blur.sigmas, config.blur.boundaries, sites, device)
    for some, claims in tqdm(measured, total=len(recording), unit="site", disable=None, leave=False):
        rows += some
        judged += claims
    rows, claims = measurements.pooled(rows), measurements.together(judged)
    drawn = story.draw(config, recording, rows, pictures, images)
    paths = {name: folder / "figures" / f"{name}.png" for name in drawn}
    asked = {key: value for key, value in runs.plain(config).items() if key not in ("out", "device", "wandb")}
    kind = device_kind(config.device)
    asked["compute"] = runs.plain(config.compute.resolved(kind))
    record = {"code": runs.code_version(), "analyze": asked, "compute": config.compute.record(kind)}
    for name, figure in drawn.items():
        figures.save(figure, paths[name], {"figure": name, **record})
    runs.write(folder / "config.yaml", written_config(config))
    runs.write(folder / "table.csv", measurements.to_csv(rows))
    verdict_rows = [claim.row() for claim in claims]
    runs.write(folder / "verdicts.csv", measurements.to_csv(verdict_rows))
    runs.write(folder / PAGE, report.page(config, images, rows, claims, paths))
    metrics = {f"{c.claim}/{c.boundary}/sigma_{c.blur_sigma:g}": c.share for c in claims}
    tables = {"table": rows, "verdicts": verdict_rows}
    name = f"{config.name}-{folder.name}"
    mirror(config.wandb, folder, [Mirror(name, config.name, "analysis", "", config, metrics, {}, tables, paths)])


def written_config(config: AnalyzeConfig) -> str:
    """config.yaml: every setting in full, in a form that analyze.py takes back."""
    from omegaconf import OmegaConf

    of_a_call = {"out": "runs", "device": "auto", "batch_size": "auto", "wandb": {"mode": "off"}}
    return "".join(OmegaConf.to_yaml(OmegaConf.create(p)) for p in (hydra_settings(), runs.plain(config) | of_a_call))
