"""The type checker of jaxtyping's import hook (pyproject.toml): beartype, applied to a function at its first call.

To apply it takes a millisecond a function, and a run of some tests calls few of the thousands that it imports.
"""

import functools
from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """As beartype(function)."""
    checked: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def first(*arguments: Any, **keywords: Any) -> Any:
        if not checked:
            checked.append(beartype(function))
        return checked[0](*arguments, **keywords)

    return first
