"""What W&B shows of an experiment, as code: a workspace or a report over the runs that `study.mirror` writes.

Built without a server: `spec` is what would be sent. Sending it needs an account. wandb-workspaces is an extra.
"""

import json
from pathlib import Path
from typing import Any, Literal

from segresearch.errors import ConfigError
from segresearch.evaluation.compare_runs import RESULTS
from segresearch.evaluation.table import DISTANCES, FRECHET
from segresearch.tracking import GUIDANCE, PICTURES, SIDE_BY_SIDE, TABLE

EXTRA = "wandb-workspaces is not installed; pip install 'segresearch[dashboards]' brings it"
Kind = Literal["workspace", "report"]
LOOK = ("saturation", "contrast")


def found_metrics(name: str, out: str | Path = "runs") -> tuple[str, ...]:
    """The columns of the experiment's results, by which panels are chosen. ConfigError where it has none."""
    keys: dict[str, None] = {}
    for path in sorted((Path(out) / name).glob(f"*/{RESULTS}")):
        try:
            rows = json.loads(path.read_text())["rows"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        keys |= dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    if not keys:
        raise ConfigError(f"{name}: no results in {Path(out) / name}; run experiments/evaluate.py name={name} first")
    return tuple(keys)


def build(kind: Kind, name: str, metrics: tuple[str, ...], project: str = "segresearch", entity: str = "") -> Any:
    """A Workspace or a Report of wandb-workspaces over the experiment's group. ConfigError without that package."""
    try:
        import wandb_workspaces.reports.v2 as report
        import wandb_workspaces.workspaces as workspace
    except ImportError as error:
        raise ConfigError(EXTRA) from error
    parts = _parts(metrics)
    of_settings, of_whole = (
        f"Config('experiment') = '{name}' and JobType = '{job}'" for job in ("setting", "evaluation")
    )
    if kind == "report":
        about = (
            "Settings of guidance measured on the same noise. blur is σ/(1 + σ) of SEG: 0 is none, 1 is σ = ∞. "
            f"Fréchet distances compare only at equal N. Runs of the group {name}."
        )
        blocks: list[Any] = [report.P(about)]
        for title, panels, whole in parts:
            chosen = of_whole if whole else of_settings
            runs = report.Runset(name=name, filters=chosen)  # of the report's own project: a named one is looked up
            blocks += [report.H2(title), report.PanelGrid(runsets=[runs], panels=panels)]
        return report.Report(project=project, entity=entity, title=f"{name}: settings of guidance", width="fluid",
                             description="metrics.jsonl in each run's folder is the record", blocks=blocks)  # fmt: skip
    sections = [
        workspace.Section(name=title, panels=panels, is_open=True, layout_settings=_layout(workspace, panels))
        for title, panels, _ in parts
    ]
    of_all = workspace.RunsetSettings(filters=f"Config('experiment') = '{name}'")
    return workspace.Workspace(
        entity=entity,
        project=project,
        name=f"{name} settings of guidance",
        sections=sections,
        runset_settings=of_all,
        settings=workspace.WorkspaceSettings(max_runs=100),
    )


def _layout(workspace: Any, panels: list[Any]) -> Any:
    return workspace.SectionLayoutSettings(columns=min(2, max(1, len(panels))), rows=max(1, -(-len(panels) // 2)))


def _parts(metrics: tuple[str, ...]) -> list[tuple[str, list[Any], bool]]:
    """Titles, panels, and whether they are of the run of the whole evaluation (else of those of the settings)."""
    import wandb_workspaces.reports.v2 as report

    def place(i: int) -> Any:
        return report.Layout(x=12 * (i % 2), y=9 * (i // 2), w=12, h=9)

    distances = [key for key in metrics if key.startswith("fd-") and key.removeprefix("fd-") in FRECHET]
    apart = [key for key in metrics if key.startswith("distance-") and key.removeprefix("distance-") in DISTANCES]
    blur = [
        report.ScatterPlot(title=f"{FRECHET[key[3:]]} against the blur of SEG, σ/(1 + σ)", x=report.Config("blur"),
                           y=report.SummaryMetric(key), range_x=(0.0, 1.0), layout=place(i))
        for i, key in enumerate(distances)
    ]  # fmt: skip
    pareto = [
        report.ScatterPlot(title=f"{FRECHET[key[3:]]} against {DISTANCES[far.removeprefix('distance-')]} to the first "
                           "setting: lower left is better", x=report.SummaryMetric(far), y=report.SummaryMetric(key))
        for key in distances for far in apart
    ]  # fmt: skip
    for i, panel in enumerate(pareto):
        panel.layout = place(i)
    bars = [key for key in (*distances, *LOOK) if key in metrics]
    look = [report.BarPlot(title=key, metrics=[key], layout=place(i)) for i, key in enumerate(bars)]
    norms = [report.LinePlot(title="RMS of what guidance adds", x="evaluation", y=[GUIDANCE], layout=place(0))]
    shown = [report.MediaBrowser(title="The same seeds", media_keys=[PICTURES], num_columns=4, layout=place(0))]
    tables = [report.WeavePanelSummaryTable(table_name=name, layout=report.Layout(x=0, y=12 * i, w=24, h=12))
              for i, name in enumerate((TABLE, SIDE_BY_SIDE))]  # fmt: skip
    found: list[tuple[str, list[Any], bool]] = [
        ("Fréchet distance against σ", blur, False),
        ("Quality against distance", pareto, False),
        ("Numbers by setting", look, False),
        ("Size of the guidance, by evaluation", norms, False),
        ("Pictures", shown, False),
        ("Tables", tables, True),
    ]
    return [part for part in found if part[1]]


def spec(made: Any) -> dict[str, Any]:
    """What would be sent, as plain data."""
    given = made._to_model()
    sent: dict[str, Any] = json.loads(given.model_dump_json(by_alias=True, exclude_none=True))
    return sent


def publish(made: Any) -> str:
    """Save it at W&B; its address. ConfigError in one line without an account, or where that fails."""
    import wandb

    try:
        api = wandb.Api(timeout=30)
    except wandb.errors.UsageError as error:
        hint = "run `wandb login`, or set WANDB_API_KEY; without --publish it is built and printed"
        raise ConfigError(f"publishing needs a W&B account: {hint}") from error
    try:
        if not made.entity:
            made.entity = api.default_entity
        made.save()
    except Exception as error:  # of many kinds, by network and server
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"W&B did not take it: {reason[:200]}") from error
    return str(made.url)
