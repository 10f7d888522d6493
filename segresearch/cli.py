"""A script's way into Hydra: quick --help, and one clear line with an exit code instead of a traceback.

Exit codes: 0 done, 2 a setting or a file that is wrong, 3 weights that are missing or wrong, 4 not all is made or
whole, 5 no memory, no room or no right to write, 130 interrupted, 128 + n ended by signal n (SIGTERM 143, SIGUSR1 138,
SIGHUP 129) with what is whole kept; anything else is a defect and keeps its traceback.
HYDRA_FULL_ERROR=1 shows every traceback.

A sweep (-m) goes on past a job that fails, says at the end which ones did, and ends with 4 where others were done.
"""

import argparse
import contextlib
import errno
import functools
import io
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import MarkedYAMLError

from segresearch.config.compose import conf_dir
from segresearch.config.help import fill
from segresearch.config.trust import guarded
from segresearch.config.validate import RENAMED, nearest, unknown
from segresearch.errors import CheckpointError, ConfigError, Ended, InputError, PackageError, Stopped, one_line

FIGURES = {  # an experiment, and the figures of arXiv 2408.00760 that show the same for other images
    "fig4": ("fig10", "fig11"), "fig5": ("fig8", "fig9"), "fig15": ("fig16", "fig17", "fig18", "fig19"),
}  # fmt: skip
FULL = "HYDRA_FULL_ERROR"
ADDED = ("guidance", "controlnet")  # groups of which several act together
GROUPS = (*ADDED, "sampler", "schedule", "model", "metrics", "preset", "experiment")
INTERPOLATION = "`${` begins an interpolation; a prompt with it goes into a .txt file"
DISK = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "; free some room, then the same command resumes")
DISK |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "; choose another folder with out=")
SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # a launcher's, a closed terminal's, Slurm's
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # a CPU, a GPU, CUDA's libraries


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are one line with code 2, as those of settings are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` has what it takes")


def command(config_name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorates `main(config)`, with conf/`config_name`.yaml composed from the command line, as `hydra.main` does."""
    return lambda main: functools.wraps(main)(functools.partial(_run, main, config_name))


def _run(main: Callable[[Any], None], config_name: str) -> None:
    full, codes = FULL in os.environ, dict[str, int]()  # codes: of a sweep's jobs
    os.environ.setdefault(FULL, "1")  # Hydra raises its errors, and prints none

    @functools.wraps(main)
    def job(config: Any) -> None:
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            with one_line_errors(full):
                return main(config)
        own = [override for override in HydraConfig.get().overrides.task if override not in sys.argv]  # of this job
        overrides = " ".join(own) or f"job {len(codes) + 1}"
        codes[overrides] = 0
        try:
            main(config)
        except Exception as error:
            if full:
                raise
            code, text = explained(error)
            codes[overrides] = code or 1
            if code is None:
                traceback.print_exception(error)
            print(f"error: job {len(codes)} ({overrides}): {text}", file=sys.stderr)

    try:
        with one_line_errors(full), hydra_arguments(), guarded(lambda config: fill(config, config_name)):
            _refuse(sys.argv[1:])
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()
            failed = [overrides for overrides, code in codes.items() if code]
            if failed:
                text = f"{len(failed)} of {len(codes)} jobs failed ({'; '.join(failed)})"
                code = max(codes.values()) if len(set(codes.values())) == 1 else 4
                again = "" if set(codes.values()) <= {0, 2, 3} else "; the same command makes what is missing"
                raise Ended(code, text + again)
    finally:
        if not full:
            os.environ.pop(FULL)


def _refuse(arguments: list[str]) -> None:
    """ConfigError for what Hydra would do without a word or with a traceback: unpickle a file (--experimental-rerun),
    take the last of several choices of a group, or none (null), and --resolve without --cfg, of which it shows more."""
    if any(word.startswith("--exp") for word in arguments):
        raise ConfigError("--experimental-rerun: it unpickles a file; the same command resumes a run")
    if "--resolve" in arguments and not {"--cfg", "-c"} & set(arguments):
        raise ConfigError("--resolve: only with --cfg job, which shows the settings")
    for word in arguments:
        if match := re.fullmatch(rf"({'|'.join(GROUPS)})=(\[.*|null|~)", word, re.S):
            hint = "methods and ControlNets alone add up" if match[2][0] == "[" else "leave it out for the default"
            if match[2][0] != "[" or match[1] not in ADDED:
                raise ConfigError(f"{match[1]}: {match[2][:60]} is not the name of one file of conf/{match[1]}; {hint}")


def _one_line(message: Warning | str, category: type[Warning], *source: Any) -> str:
    """A warning as a script prints it: its text, and its source where it is not meant for users."""
    where = "" if category is UserWarning else f" ({':'.join(map(str, source[:2]))})"
    return f"warning: {' '.join(str(message).split())}{where}\n"


@contextlib.contextmanager
def one_line_usage() -> Iterator[None]:
    """Within the block a slip in the options of any parser is a ConfigError, as in those of Arguments."""
    parser: Any = argparse.ArgumentParser
    error, parser.error = parser.error, Arguments.error
    try:
        yield
    finally:
        parser.error = error


@contextlib.contextmanager
def hydra_arguments() -> Iterator[None]:
    """Within the block argparse serves Hydra's parser: options may stand between settings, and help texts that are
    strings alone are read (Hydra 1.3 adds one that is none until it is shown, and Python 3.14 reads each when it is
    added)."""
    holder: Any = argparse._ActionsContainer  # the base of parsers and their groups
    parser: Any = argparse.ArgumentParser
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_line_usage())
        stack.callback(setattr, parser, "parse_args", parser.parse_args)
        parser.parse_args = parser.parse_intermixed_args
        if check := getattr(holder, "_check_help", None):
            stack.callback(setattr, holder, "_check_help", check)
            holder._check_help = lambda parser, action: isinstance(action.help, str) and check(parser, action)
        yield


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within the block the signals of SIGNALS raise Stopped, but those that the process was told to ignore (nohup)."""
    before: dict[Any, Any] = {}

    def stop(number: int, _: Any) -> None:
        raise Stopped(number, signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def one_line_errors(full: bool = False) -> Iterator[None]:
    """Ends the process with a line and a code for errors that have one, unless `full` asks for tracebacks. Signals that
    ask for the end raise Stopped in it. A letter that the terminal lacks is printed as an escape."""
    warnings.formatwarning = _one_line  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with stoppable():
            try:
                yield
            finally:
                if sys.stdout is not None:  # as with `>&-`
                    sys.stdout.flush()  # where its reader has gone, the error is here and not at Python's end
    except BrokenPipeError:  # whoever read the output has gone, `| head` say
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python says so once more at its end
        raise SystemExit(141) from None
    except (Exception, KeyboardInterrupt) as error:
        code, text = explained(error)
        if code is None or full:
            raise
        if text:
            print(f"error: {text}", file=sys.stderr)
        raise SystemExit(code) from None


def explained(error: BaseException) -> tuple[int | None, str]:
    """The exit code of an error that one line explains (None: a defect), and its message on one line."""
    text = one_line(error)
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(word in text for word in NO_MEMORY):
        first = str(error).partition("\n")[0][:160] or text
        return 5, f"out of memory: {first}; lower batch_size, or take a smaller model.dtype"
    match error:
        case KeyboardInterrupt():
            code = error.code if isinstance(error, Stopped) else 130
            return code, f"{str(error) or 'stopped'}; the same command resumes"
        case Ended(code=code):
            return code, text
        case CheckpointError():
            return 3, text
        case MarkedYAMLError(problem_mark=mark, problem=problem) if mark:
            return 2, f"{mark.name}, line {mark.line + 1}: not YAML ({problem})"
        case MissingConfigException(missing_cfg_file=str(file), options=[*options]):
            group, _, choice = file.rpartition("/")
            if group == "experiment" and (same := next((n for n, others in FIGURES.items() if choice in others), "")):
                return 2, f"experiment: {choice} of the paper is in the style of {same}; take experiment={same}"
            if group == "experiment" and re.fullmatch(r"fig\d+", choice):
                also = {name: f" ({', '.join(others)} too)" for name, others in FIGURES.items()}
                known = [name + also.get(name, "") for name in options if name[-1:].isdigit()]
                text = f"{choice} of arXiv 2408.00760 has no experiment: nothing here has its settings"
                return 2, f"experiment: {text}; there are {', '.join(known)}"
            if choice in RENAMED:
                return 2, f"{group}: {choice!r} is now called {RENAMED[choice]}"
            return 2, f"{group}: no {choice!r}{nearest(choice, options)} (choices: {', '.join(options)})"
        case OverrideParseException(override=override):
            hint = "text with commas, brackets, = or letters beyond ASCII needs two quotes, as in 'prompts=[\"a, b\"]'"
            return 2, f"{override}: not key=value as Hydra reads it ({str(error).splitlines()[0]}); {hint}"
        case HydraException(__cause__=(ConfigAttributeError() | ConfigKeyError()) as cause):
            name, siblings = str(cause.full_key), sorted(str(key) for key in cause.parent_node or () if key != "hydra")
            if name.startswith("controls.") and not siblings:
                return 2, f"{name}: no control is chosen; controlnet=canny, depth or canny_depth bring theirs"
            return 2, f"{name}: {unknown(name.rpartition('.')[2], siblings)}"
        case HydraException() if several := re.search(r"Ambiguous value for argument '(.+?)=(.*)'", str(error)):
            key, value = several.groups()
            hint = f"for one value write '{key}=\"{value}\"', for a list {key}=[...], for a sweep add --multirun"
            return 2, f"{key}={value}: a bare comma could mean several things; {hint}"
        case HydraException() if foreign := re.search("Could not override '(.+?)'. No match", str(error)):
            taken = "only generate and evaluate take one" if foreign[1] == "experiment" else "no such group here"
            return 2, f"{foreign[1]}: {taken}; --help has what this command takes"
        case HydraException(__cause__=OmegaConfBaseException() as cause):
            return 2, f"{text}: {str(cause).splitlines()[0]}; {INTERPOLATION}"
        case OmegaConfBaseException(full_key=key) if key and "nterpolation" in text:
            return 2, f"{key}: {str(error).splitlines()[0]}; {INTERPOLATION}"
        case HydraException() | OmegaConfBaseException() | InputError() | PackageError():
            return 2, text
        case FileNotFoundError(filename=None):
            return 2, "the current folder is not there any more; go to another one"
        case OSError(strerror=reason, filename=file, errno=number):
            hint = DISK.get(number or 0, "")
            return 5 if hint else 2, f"{file or 'output'}: {reason}{hint}" if reason else text
    return None, text
