"""What several tests of runs call: composed settings, a script's module, the files of a run, a figure."""

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure

from segresearch.config import GenerateConfig, GuidanceConfig, conf_dir, settings
from segresearch.plot_style import canvas


def composed(*overrides: str, name: str = "generate", kind: Any = GenerateConfig) -> Any:
    """The settings of conf/`name`.yaml with `overrides`, as the schema `kind`."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return settings(compose(name, overrides=list(overrides)), kind)


def every_method(*overrides: str, custom: str) -> dict[str, GuidanceConfig]:
    """Every method of conf/guidance by its name, from one composition. custom: the target of guidance=custom."""
    own = {"custom": f", terms: {{custom: {{perturbation: {{target: {custom}}}}}}}"}
    names = sorted(path.stem for path in (conf_dir() / "guidance").glob("*.yaml"))
    entries = ",".join(f"{{guidance: {name}, label: {name}{own.get(name, '')}}}" for name in names)
    config = composed(f"compare=[{entries}]", "guidance=none", "model.networks.weak=weak", *overrides)
    return {method.label: dataclasses.replace(method, label=None) for method in config.compare}


def script(name: str) -> ModuleType:
    """The module of experiments/`name`.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", conf_dir().parent / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path in it; locks are of processes, not of runs."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.parent.name != ".locks"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def one_figure(*_: Any) -> dict[str, Figure]:
    """In place of the figures of an evaluation, which take most of its time."""
    figure = canvas(1.0, "Quality", "A caption.", width=1.5)
    figure.subplots().plot([1, 2])
    return {"quality": figure}


def outside(figure: Figure) -> list[str]:
    """What of a figure reaches beyond its edges: names in its axes, and anything else."""
    names = [text for axis in figure.axes for text in axis.texts if text.get_text()]
    boxes = {text.get_text(): text.get_window_extent() for text in names}
    boxes |= {"all": figure.get_tightbbox().transformed(figure.dpi_scale_trans)}
    (x0, y0), (x1, y1) = figure.bbox.min - 1, figure.bbox.max + 1
    return [name for name, box in boxes.items() if box.x0 < x0 or box.y0 < y0 or box.x1 > x1 or box.y1 > y1]
