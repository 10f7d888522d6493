"""Tensors that depend on a few numbers alone: made once and kept."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for a function of hashable values that gives a small tensor: it is made once for each set of values.

    All are kept, for a CUDA graph may read them; `cache_clear()` drops them. Such a tensor serves gradients too,
    wherever it was first made. torch.compile sees the function without its cache. So what makes the tensor must run on
    the device, without a copy from the CPU, wherever a perturbation calls it: a CUDA graph could not hold that copy.
    """
    cached = cache(torch.inference_mode(False)(function))

    @wraps(function)
    def call(*values: Any) -> Any:
        return function(*values) if torch.compiler.is_compiling() else cached(*values)

    call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return call
