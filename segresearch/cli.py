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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from segresearch.config.compose import conf_dir
from segresearch.config.validate import RENAMED, nearest, unknown
from segresearch.errors import CheckpointError, Ended, InputError, PackageError

FULL = "HYDRA_FULL_ERROR"
INTERRUPTED = 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # a CPU, a GPU, CUDA's libraries


def command(config_name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorates `main(config)`, with conf/`config_name`.yaml composed from the command line, as `hydra.main` does."""

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            import hydra
            from hydra.core.hydra_config import HydraConfig
            from hydra.types import RunMode

            full, process, codes = FULL in os.environ, os.getpid(), dict[str, int]()  # codes: of a sweep's jobs
            os.environ.setdefault(FULL, "1")  # Hydra raises its errors, and prints none
            warnings.formatwarning = _one_line  # type: ignore[assignment]

            @functools.wraps(main)
            def job(config: Any) -> None:
                if HydraConfig.get().mode != RunMode.MULTIRUN:
                    with one_line_errors(full):
                        return main(config)
                overrides = " ".join(HydraConfig.get().overrides.task)
                codes[overrides] = 0
                try:
                    main(config)
                except Exception as error:
                    if full or os.getpid() != process:  # a launcher carries its error back
                        raise
                    code, text = explained(error)
                    codes[overrides] = code or 1
                    if code is None:
                        traceback.print_exception(error)
                    print(f"error: job {len(codes)} ({overrides}): {text}", file=sys.stderr)

            try:
                with one_line_errors(full), lazy_help():
                    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()
                    if any(codes.values()):
                        raise _sweep_end(codes)
            finally:
                if not full:
                    os.environ.pop(FULL)

        return run

    return decorate


def _sweep_end(codes: Mapping[str, int]) -> Ended:
    """The end of a sweep: with 4, or with the code that all jobs share where none was done."""
    failed = [overrides for overrides, code in codes.items() if code]
    code, *others = set(codes.values())
    text = f"{len(failed)} of {len(codes)} jobs failed ({'; '.join(failed)}); the same command makes what is missing"
    return Ended(4 if others else code, text)


def _one_line(message: Warning | str, category: type[Warning], *source: Any) -> str:
    """A warning as a script prints it: its text, and its source where it is not meant for users."""
    where = "" if category is UserWarning else f" ({':'.join(map(str, source[:2]))})"
    return f"warning: {' '.join(str(message).split())}{where}\n"


@contextlib.contextmanager
def lazy_help() -> Iterator[None]:
    """From Python 3.14 on argparse reads each help text when it is added. Hydra 1.3 adds one that is no string until it
    is shown, so Hydra does not start there. Inside this context argparse reads strings only.
    """
    holder: Any = argparse._ActionsContainer  # the base of parsers and their groups
    check = getattr(holder, "_check_help", None)
    if check is None:  # Python 3.13 and before
        yield
        return
    holder._check_help = lambda parser, action: isinstance(action.help, str) and check(parser, action)
    try:
        yield
    finally:
        holder._check_help = check


@contextlib.contextmanager
def one_line_errors(full: bool = False) -> Iterator[None]:
    """Ends the process with a line and a code for errors that have one, unless `full` asks for tracebacks."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code, text = explained(error)
        if code is None or full:
            raise
        if code != INTERRUPTED:
            print(f"error: {text}", file=sys.stderr)
        raise SystemExit(code) from None


def explained(error: BaseException) -> tuple[int | None, str]:
    """The exit code of an error that one line explains (None: a defect), and its message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(word in text for word in NO_MEMORY):
        first = str(error).partition("\n")[0][:160] or text
        return 5, f"out of memory: {first}; lower batch_size, or take a smaller model.dtype"
    if (mark := getattr(error, "problem_mark", None)) and (problem := getattr(error, "problem", None)):
        return 2, f"{mark.name}, line {mark.line + 1}: not YAML ({problem})"
    if message := _of_hydra(error):
        return 2, message
    match error:
        case KeyboardInterrupt():
            return INTERRUPTED, text
        case Ended(code=code):
            return code, text
        case OSError(strerror=str(reason), filename=file, errno=number):
            hint = "; free some room, then the same command resumes" if number in NO_ROOM else ""
            hint = "; choose another folder with out=" if number in LOCKED else hint
            return 5 if hint else 2, f"{file or 'output'}: {reason}{hint}"
        case CheckpointError():
            return 3, text
        case OSError() | InputError() | PackageError():
            return 2, text
    return None, text


def _of_hydra(error: BaseException) -> str | None:
    """The message of an error of Hydra in the words of the schema; None for other errors."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    match error:
        case MissingConfigException(missing_cfg_file=str(file), options=[*options]):
            group, _, choice = file.rpartition("/")
            if choice in RENAMED:
                return f"{group}: {choice!r} is now called {RENAMED[choice]}"
            return f"{group}: no {choice!r}{nearest(choice, options)} (choices: {', '.join(options)})"
        case OverrideParseException(override=override):
            hint = "text with commas, brackets, = or letters beyond ASCII needs two quotes, as in 'prompts=[\"a, b\"]'"
            return f"{override}: not key=value as Hydra reads it ({str(error).splitlines()[0]}); {hint}"
        case HydraException(__cause__=(ConfigAttributeError() | ConfigKeyError()) as cause):
            name, siblings = str(cause.full_key), sorted(str(key) for key in cause.parent_node or () if key != "hydra")
            if name.startswith("controls.") and not siblings:
                return f"{name}: no control is chosen; controlnet=canny, depth or canny_depth bring theirs"
            return unknown(name, siblings)
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    if several := re.search(r"Ambiguous value for argument '(.+?)=(.*)'", str(error)):
        key, value = several.groups()
        hint = f"for one value write '{key}=\"{value}\"', for a list {key}=[...], for a sweep add --multirun"
        return f"{key}={value}: a bare comma could mean several things; {hint}"
    return " ".join(str(error).split())
