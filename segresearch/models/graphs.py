"""CUDA graphs of calls: a call's kernels, captured once, are launched together from then on.

At batch 1 a step is bound by launching its kernels one by one. A replay launches them as one. The arguments of a call
must be made of values: tensors, numbers, texts, networks, module-level functions, containers, frozen dataclasses of
these. Only tensors that are new since the last replay are copied into the graph's own. A closure
or an object with a state may look at what passes (a recorder). A replay would not show it, so it is never captured.
"""

import dataclasses
import itertools
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

WARM_UPS = 2  # calls before the capture: kernels are chosen, caches of constants filled
LIMIT = 8  # graphs kept at once; the one that was replayed longest ago goes first
LEAVES = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


class NotCapturable(Exception):
    """Something in a call that cannot be part of a captured graph; the message names it."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """A value without its tensors: `key` is equal for values that differ in the contents of tensors alone."""

    tensors: tuple[Tensor, ...]
    key: Hashable


def structure(value: Any) -> Structure:
    """The tensors in `value`, in a fixed order, and a key of everything else: shapes, types, numbers, functions.

    NotCapturable for what is not made of values: a closure, a bound method, an object that is no frozen dataclass.
    """
    tensors: list[Tensor] = []
    key = _key(value, tensors)  # which collects the tensors on its way
    return Structure(tuple(tensors), key)


def _key(value: Any, tensors: list[Tensor]) -> Hashable:
    if isinstance(value, Tensor):
        tensors.append(value)
        return ("tensor", value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, LEAVES):
        return (type(value), value)
    if isinstance(value, nn.Module):  # where its weights lie, should it be moved
        first = next(iter(value.parameters()), None)
        return ("network", id(value), None if first is None else (first.data_ptr(), first.dtype))
    if isinstance(value, Mapping):
        return ("mapping", *((_key(k, tensors), _key(v, tensors)) for k, v in value.items()))
    if isinstance(value, tuple | list | range):
        return (type(value), *(_key(item, tensors) for item in value))
    if isinstance(value, partial):
        return ("partial", _key(value.func, tensors), _key(value.args, tensors), _key(value.keywords, tensors))
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType) and of_a_module(value):
        return value
    if is_value(value):
        return (type(value), *(_key(getattr(value, f.name), tensors) for f in dataclasses.fields(value)))
    raise NotCapturable(f"{value!r} may keep a state")


def of_a_module(function: Any) -> bool:
    """Whether a module holds this function under its own name: no closure, no method; or it is one of C's."""
    if isinstance(function, types.BuiltinFunctionType):
        return isinstance(function.__self__, types.ModuleType | None)
    module = sys.modules.get(function.__module__)
    return module is not None and getattr(module, function.__qualname__, None) is function


def is_value(instance: Any) -> bool:
    """Whether this is a frozen dataclass whose fields are all it holds. One of another package that can be called must
    be hashable too: a list in it could take notes."""
    if not dataclasses.is_dataclass(instance) or isinstance(instance, type):
        return False
    fields = {field.name for field in dataclasses.fields(instance)}
    if not instance.__dataclass_params__.frozen or not set(getattr(instance, "__dict__", ())) <= fields:  # type: ignore[attr-defined]
        return False
    if not callable(instance) or type(instance).__module__.startswith("segresearch."):
        return True
    try:
        hash(instance)
    except TypeError:
        return False
    return True


def rebuilt(value: Any, tensors: Sequence[Tensor]) -> Any:
    """`value` with these tensors in place of its own, in the order of `structure`."""
    return _rebuilt(value, iter(tensors))


def _rebuilt(value: Any, tensors: Any) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, LEAVES) or isinstance(value, nn.Module | range):
        return value
    if isinstance(value, Mapping):
        return {_rebuilt(k, tensors): _rebuilt(v, tensors) for k, v in value.items()}
    if isinstance(value, tuple | list):
        items = [_rebuilt(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, partial):
        function, args, keywords = (_rebuilt(part, tensors) for part in (value.func, value.args, value.keywords))
        return partial(function, *args, **keywords)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{
            f.name: _rebuilt(getattr(value, f.name), tensors) for f in dataclasses.fields(value) if f.init
        })  # fmt: skip
    return value


@dataclasses.dataclass
class Graph:
    """A captured call. source: the tensors that its own `static` ones were last copied from; result: what a replay
    overwrites."""

    graph: Any
    static: tuple[Tensor, ...]
    source: Sequence[tuple[Tensor, int]]
    result: Any
    kept: Any  # what the key names by identity, so that no other object takes its place

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        now = [(tensor, version(tensor)) for tensor in tensors]
        new = [i for i, (a, b) in enumerate(zip(now, self.source, strict=True)) if a[0] is not b[0] or a[1] != b[1]]
        if new:
            torch._foreach_copy_([self.static[i] for i in new], [tensors[i] for i in new])
            self.source = now
        self.graph.replay()
        return rebuilt(self.result, [tensor.clone() for tensor in structure(self.result).tensors])


def version(tensor: Tensor) -> int:
    """Grows with every change in place; of an inference tensor, which does not count them, never twice the same."""
    return next(_unknown) if tensor.is_inference() else tensor._version


_unknown = itertools.count(-1, -1)


class Graphs:
    """Calls of functions as CUDA graphs, captured at the first call with a new `structure`, `limit` of them kept.

    All share one pool of memory: a replay may overwrite what another computed on the way, never a result, which is
    copied out. A call that cannot be captured runs as it is, and a line says so once for each reason: arguments that
    may keep a state, tensors that are not on a GPU, gradients, an active dispatch mode (a FLOP counter), a failed
    capture.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.graphs: OrderedDict[Hashable, Graph | None] = OrderedDict()  # None: its capture failed
        self.pool: Any = None
        self.memo: OrderedDict[int, tuple[Any, Structure]] = OrderedDict()  # of arguments that come again at every step
        self.numbers: dict[Hashable, int] = {}  # of structures' keys, which are long to hash
        self.reasons: set[str] = set()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if len(self.numbers) > 4096:  # of arguments that are new at every call
            self.clear()
        try:
            structures = [self.structure(arg) for arg in args]
            tensors = [tensor for one in structures for tensor in one.tensors]
            refuse_state(tensors)
        except NotCapturable as reason:
            return self._plain(str(reason), function, args)
        key = (getattr(function, "__func__", function), *(one.key for one in structures))
        if key not in self.graphs:
            while len(self.graphs) >= self.limit:
                self.graphs.popitem(last=False)
            try:
                self.graphs[key] = self._captured(function, args, tensors)
            except RuntimeError as error:
                self.graphs[key] = None
                return self._plain(f"the capture failed: {str(error).splitlines()[0]}", function, args)
        self.graphs.move_to_end(key)
        graph = self.graphs[key]
        return function(*args) if graph is None else graph(tensors)

    def clear(self) -> None:
        """Free every graph and its memory."""
        self.graphs.clear()
        self.memo.clear()
        self.numbers.clear()
        self.pool = None

    def structure(self, value: Any) -> Structure:
        """Its `structure`, with a number for the key; kept for a value of many tensors, which comes at every step."""
        known = self.memo.get(id(value))
        if known is not None and known[0] is value:
            return known[1]
        whole = structure(value)
        one = Structure(whole.tensors, self.numbers.setdefault(whole.key, len(self.numbers)))
        if len(one.tensors) > 2 and dataclasses.is_dataclass(value):
            self.memo[id(value)] = (value, one)
            while len(self.memo) > self.limit:
                self.memo.popitem(last=False)
        return one

    def _captured(self, function: Callable[..., Any], args: Sequence[Any], tensors: Sequence[Tensor]) -> Graph:
        static = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in tensors)
        own = rebuilt(tuple(args), static)
        device = static[0].device
        with torch.cuda.device(device):
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    function(*own)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                result = function(*own)
        return Graph(graph, static, [(t, version(t)) for t in tensors], result, own)

    def _plain(self, reason: str, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        if reason not in self.reasons:
            self.reasons.add(reason)
            warnings.warn(f"compute.graph: a call runs without a CUDA graph: {reason}", stacklevel=2)
        return function(*args)


def refuse_state(tensors: Sequence[Tensor]) -> None:
    """NotCapturable where a graph of a call with these tensors is not possible, whatever it computes."""
    devices = {tensor.device for tensor in tensors}
    if not all(device.type == "cuda" for device in devices) or len(devices) != 1:
        raise NotCapturable(f"its tensors are on {', '.join(sorted(map(str, devices)))}")
    if torch.is_grad_enabled():
        raise NotCapturable("gradients are on")
    if _get_current_dispatch_mode() is not None:
        raise NotCapturable("its operations are watched (by a FLOP counter, say)")
