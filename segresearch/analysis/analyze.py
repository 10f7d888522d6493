"""One run of the energy bench: sample, capture q and k, measure, test the claims, plot, and write it all as a page.

    <out>/<name>/<id>/  index.html      the page, which holds its figures and works offline
                        table.csv       site × head × σ_t × blur σ × boundary
                        verdicts.csv    claim × boundary × blur σ
                        figures/*.png   config.yaml
                        files.json      the digests of all these
                        recording/      the captured q and k, if they are to be kept

The page is written after all that it shows: a folder that has it is complete, and the same command then measures
nothing again, unless a file is no longer what was written.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8

from segresearch import runs
from segresearch.analysis import energy_plots
from segresearch.analysis.measurements import ClaimSummary, Rows, chosen, measure, values
from segresearch.analysis.recorder import Images, Recorder, Recording
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import AnalyzeConfig
from segresearch.config.build import build_guidance, configured_model, resolved
from segresearch.config.compose import written_config
from segresearch.config.expand import init_rows, parse_seeds, read_negatives, read_prompts
from segresearch.errors import ConfigError
from segresearch.init_images import identify_init, init_images
from segresearch.pages import Cell, percent, render, span, to_csv
from segresearch.plot_style import Shown, name_sigma, save, shown
from segresearch.progress import Bar
from segresearch.records import figure_record, sampling_identity, with_networks
from segresearch.sample_images import sample_images
from segresearch.wandb_log import WandbRun, log

if TYPE_CHECKING:
    from segresearch.models import StableDiffusion

Claims = Sequence[ClaimSummary]
Pixels = UInt8[np.ndarray, "images h w 3"]
VERSION = 1  # of the measurement and the page: part of the identity
PAGE = "index.html"
FILES = "files.json"  # name -> SHA-256 of each file that shows the run
PLOTS = ("sigma", "limits", "regime", "layers", "field", "energy", "attention")  # kinds, before "_boundary"
OF_A_CALL = {"out": "runs", "device": "auto", "batch_size": "auto", "wandb": {"mode": "off"}, "vector": []}


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


def analyze(config: AnalyzeConfig, model: "StableDiffusion | None" = None) -> Analysis:
    """Sample the images of `config` and measure their attention, unless its folder is complete.

    model: already loaded; None loads `config.model`. Raises InputError for settings that do not fit the model, OSError
    if the folder cannot be written.
    """
    start = time.perf_counter()
    config = resolved(config, model)
    seeds = parse_seeds(config.seeds)
    prompts = read_prompts(config.prompts)
    negative, negatives = read_negatives(config.negative, len(prompts))
    texts = [{"prompt": p} | ({"negative": negatives[i]} if negatives else {}) for i, p in enumerate(prompts)]
    images = [{**text, "seed": seed} for text in texts for seed in seeds]
    config = dataclasses.replace(config, negative=negative)
    starts = dict(zip(seeds, init_rows(config, len(seeds))))
    identity = sampling_identity(config, runs.fingerprint(resolve_model(config.model.path)))
    identity |= {key: getattr(config, key) for key in ("guidance", "negative", "where", "heads", "branch", "blur")}
    identity["guidance"] = with_networks(config.guidance, resolve_model(config.model.path))
    identity |= {"version": VERSION, "images": images, "measured_steps": config.steps_from_0}
    if starts:
        identity["init"] = identify_init(config.init, [*starts.values()]).identity([*starts.values()])
    folder = runs.run_folder(config.out, config.name, identity)
    recorded, html, partial = folder / "recording", folder / PAGE, folder / ".recording"
    drawn = all(any((folder / "figures").glob(f"*.{kind}")) for kind in config.vector)
    damaged = damaged_files(folder) if html.is_file() else []
    if damaged:
        print(f"{folder / damaged[0]}: changed or missing; all is measured again", file=sys.stderr, flush=True)
    elif html.is_file() and drawn and (recorded.is_dir() or not config.keep):
        return Analysis(folder, html, True, time.perf_counter() - start)
    runs.create(folder)
    try:
        sd = configured_model(config.model, config.device, compute=config.compute) if model is None else model
        _write(config, sd, images, *_capture(config, sd, images, starts, partial), folder)
        shutil.rmtree(recorded, ignore_errors=True)  # of a run whose page was deleted
        if config.keep:
            partial.rename(recorded)  # a recording under its own name is complete
        else:
            shutil.rmtree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    return Analysis(folder, html, False, time.perf_counter() - start)


def damaged_files(folder: Path) -> list[str]:
    """The files of a complete run that are not those that were written; [] too where FILES is missing, as of a run of
    an earlier version."""
    try:
        digests = json.loads((folder / FILES).read_text(encoding="utf-8"))
        return [name for name, digest in digests.items() if runs.file_digest(folder / name) != digest]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return [FILES]


def _capture(
    config: AnalyzeConfig, sd: "StableDiffusion", images: Images, starts: Mapping[int, Sequence[str]], folder: Path
) -> tuple[Recording, Pixels]:
    """Sample `images`: q and k of `config.branch`, streamed to `folder`, and the pixels.
    starts: of each seed the images that it starts from.

    Raises InputError for a branch, a site, a head or a size that does not exist.
    """
    guided = build_guidance(config.guidance, sd)
    inner = getattr(guided, "inner", guided)
    names = dict.fromkeys(map(str, [inner.base, *(b for t in inner.terms.values() for b in t.branches)]))
    if config.branch not in names:
        raise ConfigError(f"branch: no branch {config.branch!r} under this guidance; there are {', '.join(names)}")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    steps, branches = config.steps_from_0, [config.branch]
    recorder = Recorder(sd.unet.site_heads, config.where, config.heads, steps, branches, folder=folder)
    pixels, size = [], int(config.batch_size)
    with Bar(len(images)) as bar:
        bar.describe("sampling")
        bar.tell(f"sampling {len(images)} images")
        for batch in (images[start : start + size] for start in range(0, len(images), size)):
            seeds, prompts = [image["seed"] for image in batch], [image["prompt"] for image in batch]
            attend = recorder.attend(batch)
            init = init_images(config.init, [starts.get(seed, ()) for seed in seeds], config.size or sd.default_size)
            negatives = [image["negative"] for image in batch if "negative" in image]
            negative = negatives or (config.negative if isinstance(config.negative, str | None) else None)
            report = bar.callback(len(batch), len(batch), config.init.steps(config.steps))
            pixels.append(sample_images(
                sd, guided, seeds, prompts, config, negative, attend=attend, init=init, callback=report
            ))  # fmt: skip
            bar.add(len(batch))
    if not recorder.entries:
        raise ConfigError(
            f"branch {config.branch!r} computes no attention at where={config.where!r} in steps {config.measured_steps}"
        )
    return recorder.recording, torch.cat(pixels).permute(0, 2, 3, 1).cpu().numpy()  # (n, 3, h, w) -> (n, h, w, 3)


def _write(
    config: AnalyzeConfig, sd: "StableDiffusion", images: Images, recording: Recording, pixels: Pixels, to: Path
) -> None:
    """Measure a recording; its table, claims, figures and page go to a folder."""
    device = sd.device if sd.device.type == "cuda" else torch.device("cpu")  # both have fp64
    sites = tuple(sd.unet.site_heads)
    rows, claims = measure(recording, config.blur.sigmas, config.blur.boundaries, sites, device)
    paths, plots = {}, {}
    for name, figure in energy_plots.draw(config, recording, rows, pixels, images).items():
        paths[name], plots[name] = to / "figures" / f"{name}.png", shown(name, figure)
        record = figure_record(name, "analyze", config, ("out", "device", "wandb", "vector"))
        save(figure, paths[name], record, config.vector)
    runs.write(to / "config.yaml", written_config(config, OF_A_CALL))
    tables = {"table": rows, "verdicts": [claim.row() for claim in claims]}
    for name, table in tables.items():
        runs.write(to / f"{name}.csv", to_csv(table, digits=7))
    runs.write(to / PAGE, page(config, images, rows, claims, plots))
    names = ["config.yaml", *(f"{name}.csv" for name in tables), *(f"figures/{name}.png" for name in paths), PAGE]
    runs.write(to / FILES, json.dumps({name: runs.file_digest(to / name) for name in names}, indent=1) + "\n")
    metrics = shares(claims)
    name, pictures = f"{config.name}-{to.name}", {key: [(path, "")] for key, path in paths.items()}
    logged = WandbRun(name, config.name, "analysis", config, metrics, tables=tables, images=pictures,
                      tags=[config.model.name])  # fmt: skip
    log(config.wandb, Path(config.out), [name, metrics], lambda _: [logged])


def shares(claims: Sequence[Any]) -> dict[str, float]:
    """The share of columns where each claim holds, by the claim, the axis of the blur, its boundary and its sigma."""
    return {f"{c.claim}/{c.axis}/{c.boundary}/sigma_{c.blur_sigma:g}": c.share for c in claims}


def page(config: AnalyzeConfig, images: Images, rows: Rows, claims: Claims, plots: Mapping[str, Shown]) -> str:
    """The whole page. plots: by the names that `energy_plots.draw` gives them."""
    kinds = {kind: [one for name, one in plots.items() if name.partition("_")[0] == kind] for kind in PLOTS}
    queries = [c for c in claims if c.axis == "queries"]
    prompts = "; ".join(f"“{p}”" if p else "no prompt" for p in dict.fromkeys(image["prompt"] for image in images))
    sites, heads = len({r["site"] for r in rows}), len({(r["site"], r["head"]) for r in rows})
    steps = ", ".join(map(str, sorted({r["step"] for r in rows})))
    lead = (
        f"{len(images)} images ({prompts}), {config.sampler.name}, {config.steps} steps, measured at steps {steps}; "
        f"branch {config.branch}, {sites} self-attention sites, {heads} heads."
    )
    return render(
        f"The energy landscape of {config.model.name}", [lead], "energy", plots=kinds, **findings(rows, queries),
        queries=table(queries), keys=table([c for c in claims if c.axis == "keys"]), code=runs.code_version(),
    )  # fmt: skip


def findings(rows: Rows, claims: Claims) -> dict[str, Any]:
    """What the page's summary says. claims: those on columns over queries. Shares of columns where a claim holds are
    given by claim; reflect: of mean_kept at finite σ, since at σ = ∞ there is no boundary."""

    def tested(claim: str, reflect: bool | None = None) -> list[ClaimSummary]:
        return [c for c in claims if c.claim == claim and reflect in (None, c.boundary == "reflect")]

    by_claim = {
        "theorem_paper": tested("theorem_paper"),
        "theorem_chain": tested("theorem_chain"),
        "mean_kept": tested("mean_kept", reflect=False),
        "reflect": [c for c in tested("mean_kept", reflect=True) if c.blur_sigma < np.inf],
        "product_falls": tested("product_falls", reflect=False) or tested("product_falls"),
    }
    by_claim = {claim: some for claim, some in by_claim.items() if some}
    worst = {claim: min(some, key=lambda c: c.share) for claim, some in by_claim.items()}
    spread = values(rows, "spread")
    return {
        "shares": {claim: span([c.share for c in some], percent) for claim, some in by_claim.items()},
        "worst": {claim: f"{c.boundary}, blur σ = {name_sigma(c.blur_sigma)}" for claim, c in worst.items()},
        "shift": max(values(chosen(rows, boundary="reflect"), "mean_shift"), default=0),
        "spread": (np.median(spread), spread.min(), spread.max()),
    }


def table(claims: Claims) -> tuple[list[Cell], list[list[Cell]]]:
    """Head and rows. A block a claim: rows are boundaries, columns blur sigmas, cells the shares where it holds."""
    sigmas = sorted({c.blur_sigma for c in claims})
    heads = ("claim", "boundary", *(f"σ = {name_sigma(s)}" for s in sigmas), "median margin", "worst margin, and where")
    lines = []
    for statement in dict.fromkeys(c.statement for c in claims):
        of_claim = [c for c in claims if c.statement == statement]
        boundaries = list(dict.fromkeys(c.boundary for c in of_claim))
        name, _, formula = statement.partition(": ")
        first = [Cell(formula, "claim first", name, rows=len(boundaries))]
        for boundary in boundaries:
            tested = [c for c in of_claim if c.boundary == boundary]
            worst = min(tested, key=lambda c: c.smallest)
            shares = {c.blur_sigma: _share(c.share) for c in tested}
            where = ", ".join(f"{key} {repr(v) if key == 'prompt' else v}" for key, v in worst.worst.items())
            lines.append([
                *first, Cell(boundary), *(shares.get(sigma, Cell()) for sigma in sigmas),
                Cell(span([c.median for c in tested], _number)),
                Cell(f"{_number(worst.smallest)} at σ = {name_sigma(worst.blur_sigma)}: {where}", "quiet where"),
            ])  # fmt: skip
            first = []
    return [Cell(head) for head in heads], lines


def _share(share: float) -> Cell:
    color = "33,102,172" if share >= 0.5 else "196,80,27"
    depth = 0.08 + 0.42 * abs(2 * share - 1)
    return Cell(percent(share), "number", style=f"background:rgba({color},{depth:.2f})")


def _number(value: float) -> str:
    return f"{value:.3g}".replace("inf", "∞").replace("-", "−")
