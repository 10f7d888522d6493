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
import itertools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from segresearch.config.compose import conf_dir
from segresearch.config.names import RENAMED, nearest, unknown
from segresearch.errors import CheckpointError, ConfigError, Ended, InputError, PackageError

FULL = "HYDRA_FULL_ERROR"
INTERRUPTED = 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)


def command(config_name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorates `main(config)`, with conf/`config_name`.yaml composed from the command line, as `hydra.main` does."""

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            import hydra

            full, process, failed, started = FULL in os.environ, os.getpid(), dict[str, int](), itertools.count(1)
            os.environ.setdefault(FULL, "1")  # Hydra raises its errors, and prints none
            warnings.formatwarning = _one_line  # type: ignore[assignment]

            @functools.wraps(main)
            def job(config: Any) -> None:
                number, overrides = next(started), _swept()
                with one_line_errors(full) if overrides is None else contextlib.nullcontext():
                    try:
                        main(config)
                    except Exception as error:
                        if overrides is None or full or os.getpid() != process:  # a launcher carries its error back
                            raise
                        failed[overrides] = exit_code(error) or 1
                        if exit_code(error) is None:
                            traceback.print_exception(error)
                        print(f"error: job {number} ({overrides}): {line(error)}", file=sys.stderr)

            try:
                with one_line_errors(full), lazy_help():
                    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()
                    if failed:
                        raise _sweep_end(failed, next(started) - 1)
            finally:
                if not full:
                    os.environ.pop(FULL)

        return run

    return decorate


def _sweep_end(failed: Mapping[str, int], count: int) -> Ended:
    """The end of a sweep of `count` jobs: with 4, or with the code that all jobs share where none was done."""
    codes = set(failed.values())
    code = codes.pop() if len(failed) == count and len(codes) == 1 else 4
    hint = "the same command makes what is missing"
    return Ended(code, f"{len(failed)} of {count} jobs failed ({'; '.join(failed)}); {hint}")


def _one_line(message: Warning | str, category: type[Warning], *source: Any) -> str:
    """A warning as a script prints it: its text, and its source where it is not meant for users."""
    where = "" if category is UserWarning else f" ({':'.join(map(str, source[:2]))})"
    return f"warning: {' '.join(str(message).split())}{where}\n"


def _swept() -> str | None:
    """The overrides of this job of a sweep; None where there is no sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return " ".join(HydraConfig.get().overrides.task)


@contextlib.contextmanager
def lazy_help() -> Iterator[None]:
    """From Python 3.14 on argparse reads each help text when it is added. Hydra 1.3 adds one that is no string until it
    is shown, so Hydra does not start there. Inside this context argparse reads strings only.
    """
    holder = argparse._ActionsContainer  # the base of parsers and their groups
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
def one_line_errors(full: bool = False) -> Iterator[None]:
    """Ends the process with a line and a code for errors that have one, unless `full` asks for tracebacks."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        final = error if full else _translated(error)
        code = exit_code(final)
        if code is None or full:
            raise
        if code != INTERRUPTED:
            print(f"error: {line(final)}", file=sys.stderr)
        raise SystemExit(code) from None


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that one line explains, or None for a defect."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Ended):
        return error.code
    if isinstance(error, OSError):
        return 5 if error.errno in (*NO_ROOM, *LOCKED) else 2
    if _out_of_memory(error):
        return 5
    if isinstance(error, CheckpointError):
        return 3
    composed = type(error).__module__ in ("hydra.errors", "omegaconf.errors")
    return 2 if composed or _not_yaml(error) or isinstance(error, InputError | PackageError) else None


def line(error: BaseException) -> str:
    """The error's message as one line."""
    if isinstance(error, OSError) and error.strerror:
        hint = "; free some room, then the same command resumes" if error.errno in NO_ROOM else ""
        hint = "; choose another folder with out=" if error.errno in LOCKED else hint
        return f"{error.filename or 'output'}: {error.strerror}{hint}"
    if _out_of_memory(error):
        text = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        return f"out of memory: {text}; lower batch_size, or take a smaller model.dtype"
    return _not_yaml(error) or " ".join(str(error).split()) or type(error).__name__


def _out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # a CPU, CUDA, its libraries
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _not_yaml(error: BaseException) -> str | None:
    """Where and why a YAML file cannot be read, of an error of its parser."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{mark.name}, line {mark.line + 1}: not YAML ({problem})" if mark and problem else None


def _translated(error: BaseException) -> BaseException:
    """Hydra's own errors about the command line in the words of the schema."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if choice in RENAMED:
            return ConfigError(f"{group}: {choice!r} is now called {RENAMED[choice]}")
        choices = ", ".join(error.options)
        return ConfigError(f"{group}: no {choice!r}{nearest(choice, error.options)} (choices: {choices})")
    if isinstance(error, OverrideParseException):
        hint = "text with commas, brackets, = or letters beyond ASCII needs two quotes, as in 'prompts=[\"a, b\"]'"
        return ConfigError(f"{error.override}: not key=value as Hydra reads it ({text.splitlines()[0]}); {hint}")
    if several := re.search(r"Ambiguous value for argument '(.+?)=(.*)'", text):
        key, value = several.groups()
        hint = f"for one value write '{key}=\"{value}\"', for a list {key}=[...], for a sweep add --multirun"
        return ConfigError(f"{key}={value}: a bare comma could mean several things; {hint}")
    if isinstance(error.__cause__, OmegaConfBaseException) and "Could not override" in text:
        name, parent = str(error.__cause__.full_key), error.__cause__.parent_node
        siblings = sorted(str(key) for key in parent or () if key != "hydra")
        if name.startswith("controls.") and not siblings:
            return ConfigError(f"{name}: no control is chosen; controlnet=canny, depth or canny_depth bring theirs")
        return unknown(name, siblings)
    return error

