"""The errors that are a user's, not a defect: a script ends with their one line and a code of its own.

Everything else that is raised is a defect of the program (or of a perturbation of one's own), and shows its traceback.
Light: no torch.
"""

import reprlib
from typing import Any

LONGEST, WORD = 1000, 300  # letters of a message, and of a word in it
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class InputError(ValueError):
    """An argument cannot be used. The message has the value, where it is, and what would do instead."""


class ConfigError(InputError):
    """A setting that cannot be: one line with its full name, its value, and what would do instead."""


class CheckpointError(InputError):
    """Weights that are missing, incomplete, or of another architecture. One line, whatever the names and values in it,
    which come from files of unknown origin."""

    def __init__(self, message: str):
        super().__init__(_short(printable(" ".join(message.splitlines()))))


class Ended(InputError):
    """What ends a script with a code of its own."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:  # subclasses take other arguments
        return _ended, (type(self), self.code, str(self))


def _ended(kind: type[Ended], code: int, message: str) -> Ended:
    """An Ended that crossed a process."""
    error = kind.__new__(kind, message)
    error.code = code
    return error


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end (SIGTERM, SIGHUP, SIGUSR1), handled as Ctrl-C is: what is whole stays."""

    def __init__(self, number: int, name: str):
        super().__init__(f"stopped by {name}")
        self.code = 128 + number


class NotFinite(Ended):
    """Latents, images or metrics that are not finite: uncaught, it ends a script with exit code 4."""

    def __init__(self, message: str):
        super().__init__(4, message)


class PackageError(ImportError):
    """A package that is missing, or of a version that does not do."""


def shown(value: Any) -> str:
    """A value of unknown origin for a message: its repr, cut where it is long or nested."""
    return _SHORT.repr(value)


def printable(text: str) -> str:
    """The text with an escape in place of each letter that a terminal cannot show, or would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """The message of an error on one line, long words and lines without their middle; its class where it has none."""
    words = (word if len(word) <= WORD else f"{word[: WORD // 2]}...{word[-20:]}" for word in str(error).split())
    return _short(" ".join(words)) or type(error).__name__


def _short(line: str) -> str:
    """A line without its middle, where it is longer than LONGEST."""
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
