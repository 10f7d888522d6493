"""The type checker of jaxtyping's import hook (pyproject.toml): beartype, applied to a function at its first call.

To apply it takes a millisecond a function, and a run of some tests calls few of the thousands that it imports. A check
costs more than what many a function does, and a run of a model calls thousands: of a function each test checks
the first `CALLS` calls.
"""

import collections
import functools
import sys
from collections.abc import Callable
from typing import Any

from beartype import beartype

CALLS = 24

calls: collections.Counter[tuple[str, str]] = collections.Counter()  # of each function in this test
resting: list[Any] = []  # functions that are not checked until the next test


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """As beartype(function), for the first calls in a test."""
    checked: list[Callable[..., Any]] = []
    name = (function.__module__, function.__qualname__)

    @functools.wraps(function)
    def first(*arguments: Any, **keywords: Any) -> Any:
        if not checked:
            checked.append(beartype(function))
        calls[name] += 1
        if calls[name] == 2 * CALLS:  # arguments and result are checked one after the other
            rest(*name)
        return checked[0](*arguments, **keywords)

    return first


def rest(module: str, name: str) -> None:
    """Stop checks of a function that its module can name; one inside of a function is checked at every call."""
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    while callable(found):  # decorators, then jaxtyping's wrapper, which looks for the mark
        found.__no_type_check__ = True
        resting.append(found)
        found = getattr(found, "__wrapped__", None)


def begin() -> None:
    """Check every function again."""
    for function in resting:
        vars(function).pop("__no_type_check__", None)
    resting.clear()
    calls.clear()
