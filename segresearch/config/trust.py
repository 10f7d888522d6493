"""What a config of unknown origin cannot do: leave the config folders, or have Hydra import or start anything.

Hydra builds objects from its own node (launcher, sweeper, callbacks, logging), from whatever file wrote into it. So the
check is on what was composed and before anything is built, at the two doors that every composition passes: a run, a
job of a sweep, --cfg, --help. Light: no torch.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from segresearch.config.yaml_files import check_yaml
from segresearch.errors import ConfigError

OWN = "hydra._internal.core_plugins."  # Hydra's launcher and sweeper
MOST = 200  # levels of nesting


def name_of_a_file(path: str) -> None:
    """ConfigError for a config's path ("guidance/seg") that is not of names alone, and so could leave its folder."""
    parts = re.split(r"[/\\]", path.removesuffix(".yaml").removesuffix(".yml"))
    if path.endswith("/"):
        raise ConfigError(f"{path.rstrip('/')}: empty; give the name of a file in the config folders")
    if parts[0].endswith(":") or any(part in ("", ".", "..") or part.startswith("~") for part in parts):
        group, _, choice = path.partition("/")
        at = f"{group}: {choice!r}" if choice and group not in ("", "..") else repr(path)
        raise ConfigError(f"{at} is a path; a choice is the name of a file in the config folders (see --config-dir)")


def check_composed(config: Mapping[str, Any]) -> None:
    """ConfigError for a composed config that names a target, or a part of Hydra other than its own."""
    plain: Any = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else dict(config)
    hydra = _mapping(plain.pop("hydra", None), "hydra")
    _refuse_targets(plain)
    for key in ("launcher", "sweeper"):
        node = _mapping(hydra.pop(key, None), f"hydra.{key}")
        target = str(node.pop("_target_", OWN))
        if not target.startswith(OWN):
            raise ConfigError(f"hydra.{key}: {target!r} is not Hydra's own; start jobs with sbatch or srun")
        _refuse_targets(node, f"hydra.{key}.")
    if callbacks := _mapping(hydra.pop("callbacks", None), "hydra.callbacks"):
        raise ConfigError(f"hydra.callbacks: {', '.join(callbacks)} would be imported; leave them out")
    job = _mapping(hydra.get("job"), "hydra.job")
    if variables := set(_mapping(job.get("env_set"), "hydra.job.env_set")) - {*(job.get("env_copy") or ())}:
        raise ConfigError(f"hydra.job.env_set: {', '.join(sorted(variables))}: set variables in the shell")
    for key in ("job_logging", "hydra_logging"):
        _refuse_factories(_mapping(hydra.pop(key, None), f"hydra.{key}"), f"hydra.{key}")
    _refuse_targets(hydra, "hydra.")


def _mapping(node: Any, at: str) -> dict[Any, Any]:
    if not isinstance(node, dict | None):
        raise ConfigError(f"{at}: {node!r} is not a mapping")  # an interpolation would be looked at by nobody
    return node or {}


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    yield from node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()


def _refuse_targets(node: Any, at: str = "", depth: int = 0) -> None:
    if depth > MOST:
        raise ConfigError(f"{at[:60]}...: nested in more than {MOST} levels")
    for key, item in _items(node):
        if key == "_target_":
            raise ConfigError(f"{at}_target_: {item!r} would be imported; no config can name a target of Hydra")
        _refuse_targets(item, f"{at}{key}.", depth + 1)


def _refuse_factories(node: Any, at: str) -> None:
    """What logging.config imports: "()", and a `class` outside Python's logging; what it looks up by ext://; and what
    is not there yet, an interpolation."""
    for key, item in _items(node):
        text = str(item)
        foreign = key == "class" and not re.fullmatch(r"logging\.\w+", text)
        looked_up = text.startswith("ext://") and text not in ("ext://sys.stdout", "ext://sys.stderr")
        later = isinstance(item, str) and "${" in item and key != "filename"
        if key == "()" or foreign or looked_up or later:
            raise ConfigError(f"{at}.{key}: {item!r} would be imported; choose hydra/job_logging=none")
        _refuse_factories(item, f"{at}.{key}")


@contextlib.contextmanager
def guarded(change: Callable[[Any], None] = lambda _: None) -> Iterator[None]:
    """Within the block Hydra loads no file outside the config folders, and every composed config is checked. change:
    is then given it."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_repository import ConfigRepository
    from hydra.core.object_type import ObjectType

    from segresearch.config.compose import conf_dir

    load, compose = ConfigRepository.load_config, ConfigLoaderImpl.load_configuration

    def load_named(self: Any, config_path: str) -> Any:
        name_of_a_file(config_path)
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is not None and source.scheme() == "file":
            file = Path(source.path, f"{config_path.removesuffix('.yaml')}.yaml")
            if conf_dir() not in file.parents:
                check_yaml(file)
        return load(self, config_path)

    def compose_checked(self: Any, *arguments: Any, **keywords: Any) -> Any:
        try:
            config = compose(self, *arguments, **keywords)
        except RecursionError:
            raise ConfigError("defaults: the defaults of these configs lead back to themselves") from None
        check_composed(config)
        change(config)
        return config

    holders: tuple[Any, Any] = ConfigRepository, ConfigLoaderImpl
    holders[0].load_config, holders[1].load_configuration = load_named, compose_checked
    try:
        yield
    finally:
        holders[0].load_config, holders[1].load_configuration = load, compose
