"""Tensors that depend on a few numbers alone: made once, and constants of compiled code."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch


def constant(maxsize: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for a function of hashable values that gives a tensor: it is made once for each set of values.

    The newest `maxsize` are kept; `cache_clear()` drops them. Such a tensor serves gradients too, wherever it was first
    made. Compiled code takes it as it is, so what makes it may run on the CPU, which a CUDA graph could not hold.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        cached = lru_cache(maxsize)(torch.inference_mode(False)(function))

        @torch.compiler.assume_constant_result
        @wraps(function)
        def call(*values: Any) -> Any:
            return cached(*values)

        call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        return call

    return decorate
