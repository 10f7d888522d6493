"""A script's way into Hydra: quick --help, and one clear line with an exit code instead of a traceback.

Exit codes: 2 a setting or a file that is wrong, 5 no room on the disk, 130 interrupted, or the one that an error brings
as `Ended`; anything else is a defect and keeps its traceback. HYDRA_FULL_ERROR=1 shows every traceback.
"""

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from segresearch.config import conf_dir
from segresearch.typed import ConfigError, nearest, unknown

FULL = "HYDRA_FULL_ERROR"
INTERRUPTED = 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Ended(ValueError):
    """What ends a script with a code of its own: 3 weights that are missing or wrong, 4 not all there, 5 no room."""

    def __init__(self, code: int, said: str):
        super().__init__(said)
        self.code = code


def command(config_name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorates `main(config)`, with conf/`config_name`.yaml composed from the command line, as `hydra.main` does."""

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            import hydra

            shown = FULL in os.environ  # errors are to come here, not to be printed by Hydra
            os.environ.setdefault(FULL, "1")

            @functools.wraps(main)
            def job(config: Any) -> None:
                with _ending(shown):
                    main(config)

            try:
                with _ending(shown, config_name):
                    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()
            finally:
                if not shown:
                    os.environ.pop(FULL)

        return run

    return decorate


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
        return 5 if error.errno in NO_ROOM else 2
    composed = type(error).__module__ in ("hydra.errors", "omegaconf.errors")
    return 2 if composed or isinstance(error, ValueError | ImportError) else None


def line(error: BaseException) -> str:
    """The error's message as one line."""
    if isinstance(error, OSError) and error.strerror:
        hint = "; free some room, then the same command resumes" if error.errno in NO_ROOM else ""
        return f"{error.filename or 'output'}: {error.strerror}{hint}"
    return " ".join(str(error).split()) or type(error).__name__


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
        hint = "text with commas or brackets needs two quotes, as in 'prompts=[\"a, b\"]'"
        return ConfigError(f"{error.override}: not key=value as Hydra reads it ({text.splitlines()[0]}); {hint}")
    several = re.search(r"Ambiguous value for argument '(.+?)=(.*)'", text)
    if several:
        key, value = several.groups()
        hint = f"for one value write '{key}=\"{value}\"', for a list {key}=[...], for a sweep add --multirun"
        return ConfigError(f"{key}={value}: a bare comma could mean several things; {hint}")
    missing = re.search(r"Could not override '([^']+)'", text)
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
