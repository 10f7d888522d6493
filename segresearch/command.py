"""A script's way into Hydra: quick --help, and one clear line with an exit code instead of a traceback.

Exit codes: 0 done, 2 a setting or a file that is wrong, 3 weights that are missing or wrong, 4 not all is made or
whole, 5 no memory, no room or no right to write, 130 interrupted; anything else is a defect and keeps its traceback.
HYDRA_FULL_ERROR=1 shows every traceback.

A sweep (-m) goes on past a job that fails, says at the end which ones did, and ends with 4 where others were done.
"""

import argparse
import contextlib
import errno
import functools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segresearch.config import conf_dir
from segresearch.errors import CheckpointError, ConfigError, Ended, InputError, PackageError
from segresearch.typed import nearest, unknown

FULL = "HYDRA_FULL_ERROR"
INTERRUPTED = 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)
RENAMED = {"judges": "metrics", "pace": "preset"}  # groups of evaluate.py, by their old names
TARGET = "_target_"  # by which Hydra makes objects of its own
CLOSED = ("searchpath", "callbacks", "job_logging", "hydra_logging")  # of Hydra: what they name is made into objects


def command(config_name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorates `main(config)`, with conf/`config_name`.yaml composed from the command line, as `hydra.main` does."""

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            import hydra

            shown = FULL in os.environ  # errors are to come here, not to be printed by Hydra
            os.environ.setdefault(FULL, "1")
            own, ended = os.getpid(), Sweep()
            warnings.formatwarning = _one_line  # type: ignore[assignment]

            @functools.wraps(main)
            def job(config: Any) -> None:
                ended.started += 1
                overrides = _swept()
                if overrides is None:
                    with _ending(shown):
                        main(config)
                    return
                try:
                    main(config)
                except Exception as error:
                    if os.getpid() != own or shown:  # a launcher's own process: it carries the error back
                        raise
                    ended.add(overrides, error)

            try:
                with _ending(shown, config_name), lazy_help():
                    _refuse_targets(sys.argv[1:])
                    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()
                    if ended.failed:
                        raise ended.end()
            finally:
                if not shown:
                    os.environ.pop(FULL)

        return run

    return decorate


def _one_line(message: Warning | str, category: type[Warning], *where: Any) -> str:
    """A warning as a script prints it: what it says; its place too where it is not meant for users."""
    place = "" if category is UserWarning else f" ({':'.join(map(str, where[:2]))})"
    return f"warning: {' '.join(str(message).split())}{place}\n"


@dataclass
class Sweep:
    """The jobs of a sweep: how many were started, and the exit codes of those that failed, by their overrides."""

    started: int = 0
    failed: dict[str, int] = field(default_factory=dict)

    def add(self, overrides: str, error: Exception) -> None:
        """Say what happened to one job; the next one follows."""
        code = exit_code(error)
        if code is None:
            traceback.print_exception(error)
        self.failed[overrides] = 1 if code is None else code
        print(f"error: job {self.started} ({overrides}): {line(error)}", file=sys.stderr)

    def end(self) -> "Ended":
        """4, or the code that all jobs share where none was done."""
        codes = set(self.failed.values())
        code = codes.pop() if len(self.failed) == self.started and len(codes) == 1 else 4
        listed = "; ".join(self.failed)
        hint = "the same command makes what is missing"
        return Ended(code, f"{len(self.failed)} of {self.started} jobs failed ({listed}); {hint}")


def _swept() -> str | None:
    """The overrides of this job of a sweep; None where there is no sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return " ".join(HydraConfig.get().overrides.task)


def _refuse_targets(arguments: Sequence[str]) -> None:
    """ConfigError for a command line, or a config folder that it names, that would have Hydra make objects. Hydra's
    own launchers and sweepers are chosen by name (hydra/launcher=submitit_slurm); nothing here needs more."""
    hint = "choose Hydra's parts by name, as in hydra/launcher=submitit_slurm; perturbations name theirs with `target`"
    for argument in arguments:
        key, _, value = argument.partition("=")
        if re.match(rf"[+~]*hydra[./]({'|'.join(CLOSED)})", key):
            raise ConfigError(f"{argument}: not open to a command line, since it can make objects; {hint}")
        if TARGET in key or re.search(rf"['\"]?{TARGET}['\"]?\s*:", value):
            raise ConfigError(f"{argument}: no setting here makes objects by {TARGET}; {hint}")
    flags = ("--config-dir", "-cd", "--config-path", "-cp")
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        named = any(f.startswith(flag) and flag.startswith(f[:10]) for f in flags)  # argparse takes abbreviations
        if named and (equals or i + 1 < len(arguments)):
            folder = Path(value if equals else arguments[i + 1])
            for path in _yaml(folder):
                keys = _keys(path)
                if TARGET in keys:
                    raise ConfigError(f"{path}: no setting here makes objects by {TARGET}; {hint}")
                if closed := sorted(keys.intersection(CLOSED)):
                    raise ConfigError(f"{path}: {closed[0]} is not open to a config, since it can make objects; {hint}")


def _yaml(folder: Path) -> list[Path]:
    """The YAML files below a folder, links to folders followed."""
    found = (Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(path for path in found if path.suffix in (".yaml", ".yml"))


def _keys(path: Path) -> set[str]:
    """Every key of a YAML file, at any depth; none of one that cannot be read, which says so later."""
    import yaml

    def below(value: Any) -> set[str]:
        if isinstance(value, Mapping):
            return {str(key) for key in value}.union(*map(below, value.values()))
        return set().union(*map(below, value)) if isinstance(value, list) else set()

    try:
        return below(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, ValueError):
        return set()


@contextlib.contextmanager
def lazy_help() -> Iterator[None]:
    """From Python 3.14 on argparse reads each help text when it is added. Hydra 1.3 adds one that is no string until it
    is shown, so Hydra does not start there. Inside this context argparse reads strings only.
    """
    holder = argparse._ActionsContainer  # what parsers and their groups inherit from
    check = getattr(holder, "_check_help", None)
    if check is None:  # Python 3.13 and before
        yield
        return

    def of_strings(self: Any, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            check(self, action)

    holder._check_help = of_strings  # type: ignore[attr-defined]
    try:
        yield
    finally:
        holder._check_help = check  # type: ignore[attr-defined]


@contextlib.contextmanager
def _ending(shown: bool, config_name: str = "") -> Iterator[None]:
    """Ends the process with a line and a code for errors that have one, unless tracebacks are to be `shown`."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        said = _translated(error, config_name) if config_name and not shown else error
        code = exit_code(said)
        if code is None or shown:
            raise
        if code != INTERRUPTED:
            print(f"error: {line(said)}", file=sys.stderr)
        raise SystemExit(code) from None


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that one line explains, or None for a defect."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Ended):
        return error.code
    if isinstance(error, OSError):
        return 5 if error.errno in (*NO_ROOM, *LOCKED) else 2
    if out_of_memory(error):
        return 5
    if isinstance(error, CheckpointError):
        return 3
    composed = type(error).__module__ in ("hydra.errors", "omegaconf.errors")
    return 2 if composed or _unread(error) or isinstance(error, InputError | PackageError) else None


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # a CPU, CUDA, its libraries
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _unread(error: BaseException) -> str | None:
    """Where and why a YAML file cannot be read, if that is what happened."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{mark.name}, line {mark.line + 1}: not YAML ({problem})" if mark and problem else None


def line(error: BaseException) -> str:
    """The error's message as one line."""
    if isinstance(error, OSError) and error.strerror:
        hint = "; free some room, then the same command resumes" if error.errno in NO_ROOM else ""
        hint = "; choose another folder with out=" if error.errno in LOCKED else hint
        return f"{error.filename or 'output'}: {error.strerror}{hint}"
    if out_of_memory(error):
        said = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        return f"out of memory: {said}; lower batch_size, or take a smaller model.dtype"
    return _unread(error) or " ".join(str(error).split()) or type(error).__name__


def sources() -> list[Path]:
    """The config folders of the running command (--config-dir and the like), for `plan.settings`."""
    from hydra.core.hydra_config import HydraConfig

    given = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    return [Path(s.path) for s in given if s.schema == "file" and Path(s.path) != conf_dir()]


def hydra_settings() -> dict[str, Any]:
    """The Hydra part of conf/generate.yaml, which a config.yaml needs besides its settings to be run as it is."""
    from omegaconf import OmegaConf

    base = OmegaConf.to_container(OmegaConf.load(conf_dir() / "generate.yaml"), resolve=False)
    assert isinstance(base, dict)
    quiet = [d for d in base["defaults"] if isinstance(d, Mapping) and any(k.startswith("override hydra/") for k in d)]
    return {"defaults": ["_self_", *quiet], "hydra": {k: v for k, v in base["hydra"].items() if k != "help"}}


def _translated(error: BaseException, config_name: str) -> BaseException:
    """Hydra's own errors about the command line in the words of `typed`."""
    from hydra.errors import MissingConfigException, OverrideParseException

    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        choices = ", ".join(error.options)
        return ConfigError(f"{group}: no {choice!r}{nearest(choice, error.options)} (choices: {choices})")
    if isinstance(error, OverrideParseException):
        hint = "text with commas, brackets, = or letters beyond ASCII needs two quotes, as in 'prompts=[\"a, b\"]'"
        return ConfigError(f"{error.override}: not key=value as Hydra reads it ({text.splitlines()[0]}); {hint}")
    several = re.search(r"Ambiguous value for argument '(.+?)=(.*)'", text)
    if several:
        key, value = several.groups()
        hint = f"for one value write '{key}=\"{value}\"', for a list {key}=[...], for a sweep add --multirun"
        return ConfigError(f"{key}={value}: a bare comma could mean several things; {hint}")
    missing = re.search(r"Could not override '([^']+)'", text)
    if missing and missing[1] in RENAMED:
        return ConfigError(f"{missing[1]}: now called {RENAMED[missing[1]]}")
    if missing:
        name, siblings = _siblings(missing[1], config_name)
        if name.startswith("controls.") and not siblings:
            return ConfigError(f"{name}: no control is chosen; controlnet=canny, depth or canny_depth bring theirs")
        return unknown(name, siblings)
    return error


def _siblings(key: str, config_name: str) -> tuple[str, list[str]]:
    """`key` as far as its first unknown part, and what exists beside that under the same command line without it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import DictConfig, OmegaConf

    given = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
    kept = [a for a in given if not re.match(rf"\+*{re.escape(key)}(=|\.)", a)]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            node: Any = compose(config_name, overrides=kept)
    except Exception:  # another override is wrong too
        return key, []
    parts = key.split(".")
    for depth, part in enumerate(parts, 1):
        if not isinstance(node, DictConfig) or part not in node:
            return ".".join(parts[:depth]), sorted(map(str, node)) if isinstance(node, DictConfig) else []
        node = OmegaConf.select(node, part)
    return key, []
