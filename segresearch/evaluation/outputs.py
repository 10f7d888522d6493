"""What a finished evaluation leaves: tables, plots, the page with its images in one HTML file, W&B runs."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from segresearch import runs
from segresearch.checkpoints.resolve import resolve_model
from segresearch.config import GuidanceConfig
from segresearch.config.compose import written_config
from segresearch.config.expand import slug
from segresearch.config.method import PerturbedTerm
from segresearch.control_images.identify import control_records, identify_controls
from segresearch.evaluation import branch_plots, branches, plots, ranking, ranking_plots, shards
from segresearch.evaluation.aggregate import Result
from segresearch.evaluation.frame import FORCED, latex_tables, markdown, marked, table, to_jsonl
from segresearch.evaluation.sample_shards import IMAGES, Worker
from segresearch.evaluation.spec import EvaluationSpec
from segresearch.init_images import identify_init
from segresearch.pages import Cell, embedded, render, title_of, to_csv
from segresearch.plot_style import Shown, save, shown
from segresearch.records import figure_record, image_record, png, run_record, save_png
from segresearch.wandb_log import GALLERY, GUIDANCE, SIDE_BY_SIDE, TABLE, WandbRun, log

PAGE = "index.html"
OF_A_CALL = {"out": "runs", "device": "auto", "stage": "all", "wandb": {"mode": "off"}, "vector": []}
TALLEST = 256  # pixels that an image of the page is high
SMALLEST = 96  # a smaller one is shown larger
Example = tuple[Image.Image, dict[str, Any]]  # an image, and the record by which `segresearch.reproduce` repeats it


def write(spec: EvaluationSpec, result: Result, folder: Path) -> list[str]:
    """Tables, plots and the page; their names in the folder."""
    config, lines = spec.config, table(result.frame)
    texts = {
        "config.yaml": written_config(config, OF_A_CALL),
        "table.md": markdown(*lines) + "".join(f"\n{text}\n" for text in forced(config.force)),
        "table.tex": "".join(f"% {text}\n" for text in forced(config.force)) + latex_tables(result.frame),
        "metrics.csv": to_csv(result.frame.plain()),
        "metrics.jsonl": to_jsonl(result.frame, spec.facts(folder.name, result.reference_images)),
    }  # fmt: skip
    if result.diagnostics:
        texts["diagnostics.csv"] = to_csv(branches.plain_rows(result.diagnostics))
    for name, text in texts.items():
        runs.write(folder / name, text)
    where, ranked = spec.describe(result.reference_images), ranking.ranking(spec, result.frame)
    if ranked:
        figures = ranking_plots.draw_ranking(spec, result.frame, ranked, where)
    else:
        figures = plots.draw(spec, result)
    if result.diagnostics:
        figures |= branch_plots.draw_branches(result.frame, result.diagnostics, spec.methods, where)
    paths = {name: folder / "figures" / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        save(figure, paths[name], figure_record(name, "evaluate", config, OF_A_CALL), config.vector)
    runs.write(folder / PAGE, page(spec, result, [shown(*item, where) for item in figures.items()], folder.name))
    return [*texts, *(str(path.relative_to(folder)) for path in paths.values()), PAGE]


def forced(force: bool) -> list[str]:
    """The warning of tables that were made with force=true."""
    return [FORCED] * force


def examples(spec: EvaluationSpec, run: str, methods: Sequence[str]) -> dict[str, list[Example]]:
    """Of each of these methods the images of the first seeds. run: the name of the run's folder."""
    config, model = spec.config, resolve_model(spec.config.model.path)
    shared = run_record(config, runs.fingerprint(model), run)
    seeds = spec.numbers[: config.n_examples]
    control_images = {i: spec.controls[i] if spec.controls else () for i in seeds}
    identified = identify_controls(config.controls, list(control_images.values()), model)
    controls = {i: control_records(identified, row) for i, row in control_images.items()}
    texts = dict(zip(seeds, spec.texts(seeds)))
    starts = {i: spec.inits[i] if spec.inits else () for i in seeds}
    init = identify_init(config.init, list(starts.values()))
    shown: dict[str, list[Example]] = {method: [] for method in methods}
    for method in methods:
        guidance = spec.methods[method]
        for path, rows in ((spec.shard(method, rows), rows) for rows in spec.ranges if rows.start in seeds):
            sampled = {**shared, **shards.header(path)["versions"]}
            for i, pixels in zip(rows[: seeds.stop - rows.start], shards.load(path, IMAGES)):
                negative = spec.negatives[i % len(spec.negatives)] if spec.negatives else config.negative
                image = {"prompt": texts[i], "negative": negative, "seed": i, **controls[i]}
                image |= init.record(starts[i])
                record = image_record(sampled, method, guidance, **image)
                shown[method].append((Image.fromarray(pixels.transpose(1, 2, 0).copy()), record))
    return shown


def page(spec: EvaluationSpec, result: Result, figures: Sequence[Shown], run: str) -> str:
    """The whole page. run: the name of the run's folder."""
    config, frame, ranked = spec.config, result.frame, ranking.ranking(spec, result.frame)
    images = examples(spec, run, [spec.baseline, *(one.at_best for one in ranked)] if ranked else [*spec.methods])
    paper = f"{spec.paper} of arXiv 2408.00760, on {config.model.name}" if spec.paper else ""
    name = title_of(config.name, "evaluate", frame.methods)
    title = paper if config.name == spec.paper else ": ".join(filter(None, (name, paper)))
    names = {one.name: spec.methods[one.at_best] for one in ranked} | dict(spec.methods)
    return render(
        title, [spec.describe(result.reference_images), *forced(config.force)], "evaluation", spec=spec, run=run,
        code=runs.code_version(),
        quality=marked(table(frame, groups=("quality", "paper")), names),
        content=marked(table(frame, groups=("content",)), names),
        plots=[figure for figure in figures if not figure.name.startswith("branch_")],
        methods=marked([[Cell(method, "method") for method in images]], names)[0],
        rows=[[_shown(*image) for image in row] for row in zip(*images.values(), strict=True)],
        sampled_by=sampled_by(spec), branches=branch_sections(result, {one.name: one for one in figures}, names),
        ranking=marked(ranking.ranking_table(spec, frame, ranked), names) if ranked else [],
        headline=ranking.headline(spec, frame, ranked), single=ranking.one_scale(ranked),
        protocol=ranking.protocol(spec), settings=marked(ranking.settings_table(spec), names),
    )  # fmt: skip


def branch_sections(
    result: Result, figures: Mapping[str, Shown], methods: Mapping[str, GuidanceConfig]
) -> list[dict[str, Any]]:
    """What the page says of weak branches: of each question its title, how to read it, its table and its figure."""
    numbers = result.diagnostics
    if not numbers:
        return []
    parts = [
        ("alone", "Is the branch alone a worse model?", branches.ALONE, branches.alone_table(result.frame, numbers))
    ]
    parts += [(q.key, q.title, q.text, branches.table_of(q, numbers)) for q in branches.QUESTIONS]
    return [
        {"title": title, "text": text, "table": marked(lines, methods), "plots": some}
        for key, title, text, lines in parts
        if (some := [figures[name] for name in [f"branch_{key}"] if name in figures]) or len(lines) > 1
    ]


def sampled_by(spec: EvaluationSpec) -> str:
    """The versions of the code that sampled the images; a line on stderr where they are not the current ones."""
    versions = [shards.header(path)["versions"] for path in spec.shards()]
    texts = [", ".join(f"{name} {version}" for name, version in some.items()) for some in [runs.versions(), *versions]]
    sampled = "; ".join(sorted(set(texts[1:])))
    if sampled != texts[0]:
        hint = "not all images are of this code and torch; a new `out` samples them all again"
        print(f"{hint}: {sampled}", file=sys.stderr)
    if remark := shards.unplaced(spec.shards()):
        print(f"{remark}; they are used as they are, and a new `out` samples them all again", file=sys.stderr)
    return sampled


def _shown(image: Image.Image, record: Mapping[str, Any]) -> dict[str, Any]:
    """A small image is enlarged by a whole factor on the page, a large one is sent smaller."""
    if image.height > TALLEST:
        size = max(1, round(image.width * TALLEST / image.height)), TALLEST
        image = image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, SMALLEST // image.height)
    alt = ", ".join(filter(None, (str(record["method"]), f"seed {record['seed']}", record["prompt"])))
    return {"seed": record["seed"], "prompt": record["prompt"], "src": embedded(png(image, record)), "alt": alt,
            "small": image.height <= 192, "width": image.width * factor, "height": image.height * factor}  # fmt: skip


def mirrored(spec: EvaluationSpec, run: str, reference_images: int, worker: Worker) -> WandbRun:
    """What W&B is told of a worker while it samples. run: the name of the run's folder."""
    config = spec.config
    name = f"{config.name} {run}" + ("" if worker.world == 1 else f" {worker}")
    facts = {key: value for key, value in spec.facts(run, reference_images).items() if key != "experiment"}
    settings = {**facts, "images": config.images, "methods": list(spec.methods)}  # dashboards choose by `experiment`
    return WandbRun(name, config.name, "", settings, tags=[config.model.name])


def log_evaluation(spec: EvaluationSpec, result: Result, folder: Path) -> bool:
    """In W&B the experiment is a group; each method, and the whole, is a run in it. See `wandb_log.log`."""
    config = spec.config
    common = {**spec.facts(folder.name, result.reference_images), "images": config.images, "code": runs.code_version()}
    rows: dict[str, dict[str, Any]] = {method: {} for method in spec.methods}
    for row in result.frame.rows:
        rows[row.method] |= {row.metric: row.value, f"{row.metric}-error": row.error}

    def wandb_runs(temporary: Path) -> list[WandbRun]:
        shown = examples(spec, folder.name, [*spec.methods])
        seeds = spec.numbers[: min(map(len, shown.values()))]
        texts = dict(zip(seeds, spec.texts(seeds)))
        files = {method: [temporary / slug(method) / f"seed{i}.png" for i in seeds] for method in shown}
        for method, some in shown.items():
            for path, (image, record) in zip(files[method], some, strict=True):
                save_png(image, path, record)
        samples = [{"seed": i, "prompt": texts[i]} for i in seeds]
        captions = [f"seed {i}" + (f": {texts[i]}" if texts[i] else "") for i in seeds]
        of_methods = [
            WandbRun(
                f"{method} {folder.name}", config.name, "method",
                {**common, **facts(method, spec.methods[method])}, values,
                {GUIDANCE: result.norms[method]} if result.norms.get(method) else {},
                {"image table": [{**s, "image": path} for s, path in zip(samples, files[method])]},
                {GALLERY: list(zip(files[method], captions))}, [config.model.name, method],
            )
            for method, values in rows.items()
        ]  # fmt: skip
        side_by_side = [{**s, **dict(zip(files, paths))} for s, paths in zip(samples, zip(*files.values()))]
        tables = {TABLE: [{"method": method, **row} for method, row in rows.items()], SIDE_BY_SIDE: side_by_side}
        figures = {path.stem: [(path, "")] for path in sorted((folder / "figures").glob("*.png"))}
        settings, whole = {**common, "all": runs.plain(config)}, f"{config.name} {folder.name}"
        last = WandbRun(whole, config.name, "evaluation", settings, tables=tables, images=figures,
                        tags=[config.model.name])  # fmt: skip
        return [*of_methods, last]

    return log(config.wandb, Path(config.out), [folder.name, common, rows], wandb_runs)


def facts(method: str, guidance: GuidanceConfig) -> dict[str, Any]:
    """What plots and filters of W&B are about. blur: σ/(1 + σ), which puts σ from 0 to ∞ on an axis from 0 to 1."""
    settings: dict[str, Any] = {"method": method, "kind": plots.kind(guidance), "guidance": guidance}
    for term in guidance.terms.values():
        if term.kind == "cfg":
            settings["cfg"] = term.weight
            continue
        settings["scale"] = term.scale
        perturbation = term.perturbation if isinstance(term, PerturbedTerm) else None
        if getattr(perturbation, "kind", "") == "seg":
            sigma = perturbation.sigma  # type: ignore[union-attr]
            settings |= {"sigma": sigma, "blur": 1.0 if sigma == float("inf") else sigma / (1 + sigma)}
    return runs.plain(settings if guidance.sag is None else {**settings, "scale": guidance.sag.scale})
