"""From a config that Hydra composed to the settings of a run: names in `compare` and `controlnet` become files."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from segresearch import runs
from segresearch.config.schema import EvaluateConfig, GenerateConfig
from segresearch.config.validate import nearest, typed
from segresearch.config.yaml_files import check_yaml
from segresearch.errors import ConfigError


def conf_dir() -> Path:
    """The folder of the YAML configs: conf/ of a checkout, segresearch/conf of an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "generate.yaml").is_file():
            return folder
    raise ConfigError(f"no configs: neither {package.parent / 'conf'} nor {package / 'conf'} has a generate.yaml")


def settings(config: Mapping[str, Any], kind: Any = GenerateConfig) -> Any:
    """The settings of a composed config: interpolations resolved, names in `compare` replaced by their guidance,
    a panel's `controlnet` (a name or several) by their controls, with those of its `controls` merged in.

    A name is a file of conf/, or of a folder that Hydra was given (--config-dir). kind: the schema; an experiment's
    file may hold settings of GenerateConfig and of EvaluateConfig, and each takes its own. Raises ConfigError.
    """
    root: Any = config.copy() if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    OmegaConf.set_struct(root, False)
    for key in ("hydra", "defaults"):  # still there where the mapping was not composed by Hydra
        root.pop(key, None)
    panels = root.get("panels")
    tables = {"": root} | {f"panels.{i}.": p for i, p in enumerate(panels if isinstance(panels, ListConfig) else [])}
    for at, table in tables.items():
        if not isinstance(table, DictConfig):
            continue
        if isinstance(compare := table.get("compare"), ListConfig):
            table.compare = []
            for i, entry in enumerate(compare):  # a name, a list of names (their terms together), or overrides of them
                inline = entry.copy() if isinstance(entry, DictConfig) else OmegaConf.create({"guidance": entry})
                table.compare.append(OmegaConf.merge(*_named(inline.pop("guidance", []), f"{at}compare.{i}"), inline))
        if at and "controlnet" in table:
            parts = _named(table.pop("controlnet"), f"{at}controlnet", "controlnet")
            table.controls = OmegaConf.merge(*parts, table.get("controls") or {})
    plain: Any = OmegaConf.to_container(root, resolve=True)
    if "experiment" in plain:
        raise ConfigError("experiment: its file must begin with the line `# @package _global_`, as those of conf/ do")
    other = {GenerateConfig: EvaluateConfig, EvaluateConfig: GenerateConfig}.get(kind, kind)
    for key in {f.name for f in dataclasses.fields(other)} - {f.name for f in dataclasses.fields(kind)}:
        if plain.pop(key, None) and key == "panels":
            raise ConfigError(f"{key}: for generate.py; evaluate.py takes the methods of one table, in compare")
    return typed(kind, plain)


def _named(names: str | Sequence[str], at: str, group: str = "guidance") -> list[Any]:
    """conf/`group`/NAME.yaml of each name, after the files in its defaults list."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    folders = [conf_dir(), *reversed([Path(source.path) for source in sources if source.schema == "file"])]
    files = {file.stem: file for folder in folders for file in sorted((folder / group).glob("*.yaml"))}
    nodes: list[Any] = []
    for name in [names] if isinstance(names, str) else names:
        if name not in files:
            choices = f" (choices: {', '.join(sorted(files))})"
            raise ConfigError(f"{at}: no {group} {name!r}{nearest(str(name), files)}{choices}")
        if conf_dir() not in files[name].parents:
            check_yaml(files[name])
        node: Any = OmegaConf.load(files[name])
        nodes += [*_named([parent for parent in node.pop("defaults", []) if parent != "_self_"], at, group), node]
    return nodes


def written_config(config: Any, of_a_call: Mapping[str, Any]) -> str:
    """config.yaml of a run, which its script takes back: every setting, and the Hydra part of conf/generate.yaml.
    of_a_call: keys that are of one call and not of the run, each with its value in the file."""
    base: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "generate.yaml"), resolve=False)
    quiet = [d for d in base["defaults"] if isinstance(d, Mapping) and any(k.startswith("override hydra/") for k in d)]
    hydra = {"defaults": ["_self_", *quiet], "hydra": {k: v for k, v in base["hydra"].items() if k != "help"}}
    settings = runs.plain(config) | runs.plain(of_a_call)
    return "".join(OmegaConf.to_yaml(OmegaConf.create(part)) for part in (hydra, settings))
