"""How many threads torch computes with on a CPU: one for small work, whatever OMP_NUM_THREADS says.

An operation of microseconds gains little from a second thread. If another process holds that thread's core, every
such operation waits for it, and 1 s becomes 20 s. So functions of small work are decorated:

    @one_thread                              def scenes(indices, ...)        always one
    @one_thread_for(few_features)            def kid(features, ...)          one, if its arguments are small
    with threads(4): scenes(range(1024))     four, because the caller says so
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P, R = ParamSpec("P"), TypeVar("R")
FEW = 512  # dimensions of a feature: matrices of so many rows and columns are small work
_inside_threads: ContextVar[bool] = ContextVar("inside_threads", default=False)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads inside, for small work too; afterwards as many as before, also after an exception."""
    before, token = torch.get_num_threads(), _inside_threads.set(True)
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
        _inside_threads.reset(token)


def one_thread_for(small: Callable[..., bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: one thread if `small` is true of the arguments; inside `threads`, always as many as those."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def single(*args: P.args, **kwargs: P.kwargs) -> R:
            alone = small(*args, **kwargs) and not _inside_threads.get()
            with threads(1) if alone else contextlib.nullcontext():
                return function(*args, **kwargs)

        return single

    return decorated


one_thread = one_thread_for(lambda *args, **kwargs: True)  # decorator: one thread; inside `threads`, as many as those


def few_features(features: Tensor, *others: Any, **options: Any) -> bool:
    """Whether features (n, dim) have at most FEW dimensions."""
    return features.shape[1] <= FEW
