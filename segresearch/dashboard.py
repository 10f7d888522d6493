"""A W&B workspace or report of an experiment, as code: panels over the runs that `outputs.log_evaluation` writes.

Built without a server: `spec` is what would be sent. Sending it needs an account. wandb-workspaces is an extra.
"""

import json
from pathlib import Path
from typing import Any, Literal

from segresearch.errors import ConfigError, one_line
from segresearch.evaluation.compare_runs import overview
from segresearch.evaluation.frame import METRICS
from segresearch.wandb_log import GALLERY, GUIDANCE, SIDE_BY_SIDE, TABLE

EXTRA = "wandb-workspaces is not installed; pip install 'segresearch[dashboards]' brings it"
ABOUT = (
    "Methods of guidance measured on the same noise. blur is σ/(1 + σ) of SEG: 0 is none, 1 is σ = ∞. Fréchet "
    "distances compare only at equal N. Runs of the group {}."
)


def metrics_of(name: str, out: str | Path = "runs") -> tuple[str, ...]:
    """The metrics of the experiment's results, by which panels are chosen. ConfigError where it has none."""
    names = {metric.name for run in overview(name, out).runs for metric in run.frame.metrics()}
    return tuple(key for key in METRICS if key in names)


def build(
    kind: Literal["workspace", "report"], name: str, metrics: tuple[str, ...], project: str = "segresearch",
    entity: str = "",
) -> Any:  # fmt: skip
    """A Workspace or a Report of wandb-workspaces over the experiment's group. ConfigError without that package."""
    try:
        import wandb_workspaces.reports.v2 as report
        import wandb_workspaces.workspaces as workspace
    except ImportError as error:
        raise ConfigError(EXTRA) from error
    experiment, parts = f"Config('experiment') = '{name}'", _parts(report, metrics)
    if kind == "workspace":
        sections = []
        for title, (_, panels) in parts.items():
            grid = workspace.SectionLayoutSettings(columns=min(2, len(panels)), rows=-(-len(panels) // 2))
            sections.append(workspace.Section(name=title, panels=panels, is_open=True, layout_settings=grid))
        return workspace.Workspace(
            entity=entity, project=project, name=f"{name} methods of guidance", sections=sections,
            runset_settings=workspace.RunsetSettings(filters=experiment),
            settings=workspace.WorkspaceSettings(max_runs=100),
        )  # fmt: skip
    blocks: list[Any] = [report.P(ABOUT.format(name))]
    for title, (job, panels) in parts.items():
        runs = report.Runset(name=name, filters=f"{experiment} and JobType = '{job}'")
        blocks += [report.H2(title), report.PanelGrid(runsets=[runs], panels=panels)]
    return report.Report(
        project=project, entity=entity, title=f"{name}: methods of guidance", width="fluid", blocks=blocks,
        description="metrics.jsonl in each run's folder is the record",
    )  # fmt: skip


def _parts(report: Any, names: tuple[str, ...]) -> dict[str, tuple[str, list[Any]]]:
    """By title the kind of the W&B runs, and the panels; none without panels."""
    metrics = [METRICS[name] for name in names]
    frechet, distances = ([m for m in metrics if m.kind == kind] for kind in ("fd", "distance"))
    bars = [m.name for m in metrics if m.kind in ("fd", "saturation", "contrast")]
    blur = [
        report.ScatterPlot(title=f"{fd.head} against the blur of SEG, σ/(1 + σ)", x=report.Config("blur"),
                           y=report.SummaryMetric(fd.name), range_x=(0.0, 1.0))
        for fd in frechet
    ]  # fmt: skip
    pareto = [
        report.ScatterPlot(title=f"{fd.head} against {distance.head} to the baseline: lower left is better",
                           x=report.SummaryMetric(distance.name), y=report.SummaryMetric(fd.name))
        for fd in frechet for distance in distances
    ]  # fmt: skip
    guidance = report.LinePlot(title="RMS of what guidance adds", x="evaluation", y=[GUIDANCE])
    gallery = report.MediaBrowser(title="The same seeds", media_keys=[GALLERY], num_columns=4)
    parts = {
        "Fréchet distance against σ": ("method", blur), "Quality against distance": ("method", pareto),
        "Values by method": ("method", [report.BarPlot(title=bar, metrics=[bar]) for bar in bars]),
        "Size of the guidance, by evaluation": ("method", [guidance]), "Images": ("method", [gallery]),
        "Tables": ("evaluation", [report.WeavePanelSummaryTable(table_name=key) for key in (TABLE, SIDE_BY_SIDE)]),
    }  # fmt: skip
    for title, (_, panels) in parts.items():
        width, height = (24, 12) if title == "Tables" else (12, 9)
        for i, panel in enumerate(panels):  # from left to right, on a grid 24 wide
            panel.layout = report.Layout(x=width * i % 24, y=width * i // 24 * height, w=width, h=height)
    return {title: part for title, part in parts.items() if part[1]}


def spec(board: Any) -> dict[str, Any]:
    """What would be sent, as plain data."""
    sent: dict[str, Any] = json.loads(board._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return sent


def publish(board: Any) -> str:
    """Save it at W&B; its address. ConfigError in one line without an account, or where that fails."""
    import wandb

    try:
        api = wandb.Api(timeout=30)
        board.entity = board.entity or api.default_entity
        board.save()
    except wandb.errors.UsageError as error:
        hint = "run `wandb login`, or set WANDB_API_KEY; without --publish it is built and printed"
        raise ConfigError(f"publishing needs a W&B account: {hint}") from error
    except Exception as error:  # of many kinds, by network and server
        raise ConfigError(f"W&B did not take it: {one_line(error)[:200]}") from error
    return str(board.url)
