"""How networks are called, as `Compute` says: compiled, as CUDA graphs, with weights that are copied for the call.

At batch 1 a step is bound by launching its kernels one by one. A graph, captured once, launches them together. Only
tensors that are new since its last replay are copied into its own. The arguments of a captured or compiled call must be
made of values: tensors, numbers, texts, networks, module-level functions, containers, frozen dataclasses of these.
A closure or an object with a state may look at what passes (a recorder). A replay would not show it.
"""

import dataclasses
import math
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import _get_current_dispatch_mode

from segresearch.models.compute import Compute, arithmetic
from segresearch.models.conditioning import Projection

WARM_UPS = 2  # calls before the capture: kernels are chosen, caches of constants filled
LIMIT = 8  # graphs kept at once; the one that was replayed longest ago goes first
VARIANTS = 64  # of a network that are compiled: shapes, dtypes, sets of branches
LEAVES = (type(None), bool, int, float, str, bytes, range, torch.dtype, torch.device)


class NotCapturable(Exception):
    """Something in a call that cannot be part of a captured graph; the message names it."""


def decompose(value: Any) -> tuple[Hashable, Sequence[Any], Callable[[Sequence[Any]], Any]]:
    """The kind of a value, the values that it is made of, and the function that makes it of such.

    NotCapturable for what is not made of values: a closure, a bound method, an object that is no frozen dataclass.
    """
    kind: Any = type(value)
    if isinstance(value, LEAVES):
        return (kind, value), (), lambda _: value
    if isinstance(value, nn.Module):  # where its weights lie, should it be moved
        first = next(iter(value.parameters()), None)
        return ("network", id(value), None if first is None else (first.data_ptr(), first.dtype)), (), lambda _: value
    if isinstance(value, Mapping):
        n = len(value)
        return "mapping", (*value, *value.values()), lambda parts: dict(zip(parts[:n], parts[n:], strict=True))
    if isinstance(value, tuple | list):
        return kind, value, kind._make if hasattr(value, "_fields") else kind
    if isinstance(value, partial):
        return kind, (value.func, value.args, value.keywords), lambda parts: partial(parts[0], *parts[1], **parts[2])
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType) and of_a_module(value):
        return value, (), lambda _: value
    if is_value(value):
        names = {field.name: field.init for field in dataclasses.fields(value)}

        def build(parts: Sequence[Any]) -> Any:
            arguments = zip(names.items(), parts, strict=True)
            return dataclasses.replace(value, **{name: part for (name, init), part in arguments if init})

        return kind, [getattr(value, name) for name in names], build
    raise NotCapturable(f"{value!r} may keep a state")


def of_a_module(function: Any) -> bool:
    """Whether a module holds this function under its own name: no closure, no method; or it is one of C's."""
    if isinstance(function, types.BuiltinFunctionType):
        return isinstance(function.__self__, types.ModuleType | None)
    return getattr(sys.modules.get(function.__module__), function.__qualname__, None) is function


def is_value(instance: Any) -> bool:
    """Whether this is a frozen dataclass whose fields are all it holds. One of another package that can be called must
    be hashable too: a list in it could take notes."""
    if not dataclasses.is_dataclass(instance) or isinstance(instance, type):
        return False
    frozen, names = instance.__dataclass_params__.frozen, {f.name for f in dataclasses.fields(instance)}  # type: ignore[attr-defined]
    try:
        if callable(instance) and not type(instance).__module__.startswith("segresearch."):
            hash(instance)
    except TypeError:
        return False
    return frozen and set(getattr(instance, "__dict__", ())) <= names


class Structure(NamedTuple):
    """The tensors of a value, in a fixed order; `key` is equal for values that differ in their contents alone."""

    tensors: list[Tensor]
    key: Hashable


def structure(value: Any) -> Structure:
    """The tensors in `value` and a key of all else: shapes, types, numbers, functions. NotCapturable: `decompose`."""
    tensors = []

    def key(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            tensors.append(value)
            return ("tensor", value.shape, value.stride(), value.dtype, value.device)
        kind, parts, _ = decompose(value)
        return (kind, *map(key, parts))

    return Structure(tensors, key(value))


def rebuilt(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each of its tensors changed, in the order of `structure`."""
    if isinstance(value, Tensor):
        return change(value)
    _, parts, build = decompose(value)
    return build([rebuilt(part, change) for part in parts])


@dataclasses.dataclass
class Graph:
    """A captured call. source: the tensors that its `static` ones were last copied from, each with its `version`."""

    graph: Any
    static: Sequence[Tensor]
    source: Sequence[tuple[Tensor, float | int]]
    result: Any  # which a replay overwrites
    kept: Any  # what the key names by identity, so that no other object takes its place

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        now = [(tensor, version(tensor)) for tensor in tensors]
        new = [i for i, (a, b) in enumerate(zip(now, self.source, strict=True)) if a[0] is not b[0] or a[1] != b[1]]
        if new:
            torch._foreach_copy_([self.static[i] for i in new], [tensors[i] for i in new])
            self.source = now
        self.graph.replay()
        return rebuilt(self.result, torch.clone)


def version(tensor: Tensor) -> float | int:
    """Grows with every change in place. Inference tensors do not count them: NaN, which differs from itself."""
    return math.nan if tensor.is_inference() else tensor._version


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
        self.known = lru_cache(limit)(structure)  # of projections, which are large and come again at every step
        line = "compute.graph: a call runs without a CUDA graph: "
        self.warn = cache(lambda reason: warnings.warn(line + reason, stacklevel=4))  # once for each reason

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            structures = [self.structure(arg) for arg in args]
            tensors = [tensor for one in structures for tensor in one.tensors]
            refuse_state(tensors)
        except NotCapturable as reason:
            self.warn(str(reason))
            return function(*args)
        key = (getattr(function, "__func__", function), *(one.key for one in structures))
        if key not in self.graphs:
            while len(self.graphs) >= self.limit:
                self.graphs.popitem(last=False)
            try:
                self.graphs[key] = self.capture(function, args, tensors)
            except RuntimeError as error:
                self.graphs[key] = None
                self.warn(f"the capture failed: {str(error).splitlines()[0]}")
        self.graphs.move_to_end(key)
        graph = self.graphs[key]
        return function(*args) if graph is None else graph(tensors)

    def structure(self, value: Any) -> Structure:
        """The `structure` of a value, computed once for a projection."""
        return self.known(value) if isinstance(value, Projection) else structure(value)

    def clear(self) -> None:
        """Free every graph and its memory."""
        self.graphs.clear()
        self.known.cache_clear()
        self.pool = None

    def capture(self, function: Callable[..., Any], args: Sequence[Any], tensors: Sequence[Tensor]) -> Graph:
        """The call as a graph that reads copies of `tensors`, those of the arguments."""
        own = rebuilt(tuple(args), torch.clone)
        device = tensors[0].device
        with torch.cuda.device(device):
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    function(*own)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                result = function(*own)
        return Graph(graph, structure(own).tensors, [(t, version(t)) for t in tensors], result, own)


def refuse_state(tensors: Sequence[Tensor]) -> None:
    """NotCapturable where a graph of a call with these tensors is not possible, whatever it computes."""
    devices = {tensor.device for tensor in tensors}
    if not all(device.type == "cuda" for device in devices) or len(devices) != 1:
        raise NotCapturable(f"its tensors are on {', '.join(sorted(map(str, devices)))}")
    if torch.is_grad_enabled():
        raise NotCapturable("gradients are on")
    if _get_current_dispatch_mode() is not None:
        raise NotCapturable("its operations are watched (by a FLOP counter, say)")


class Runner:
    """Calls of a network as `Compute` asks: its arithmetic, compiled, as CUDA graphs.

    Where compilation or a graph is not possible, a warning gives the reason and the call runs without it.
    """

    def __init__(self, compute: Compute):
        self.compute, self.graphs = compute, Graphs()
        self.networks: dict[Any, Any] = {}  # by the plain one, its compiled form; the plain one again where that fails
        self.warn = cache(partial(warnings.warn, stacklevel=2))

    def __call__(self, function: Callable[..., Any], net: Any, x: Tensor, *args: Any) -> Any:
        """function(net, x, *args), on the device of x."""
        run = partial(self.graphs, function) if self.compute.graph else function
        with arithmetic(self.compute.resolved(x.device).precision, x.device):
            if not self.compute.compile:
                return run(net, x, *args)
            try:
                for arg in args:  # a new closure at every call, such as a recorder's, would be compiled at every call
                    self.graphs.structure(arg)
            except NotCapturable as state:
                self.warn(f"compute.compile: a call runs uncompiled: {state}")
                return run(net, x, *args)
            if net not in self.networks:
                self.networks[net] = torch.compile(net, dynamic=False, fullgraph=True)
            try:
                with torch._dynamo.config.patch("cache_size_limit", VARIANTS):  # type: ignore[attr-defined]
                    return run(self.networks[net], x, *args)
            except Exception as error:
                of_the_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
                if not of_the_compiler or self.networks[net] is net:
                    raise
                self.networks[net] = net
                reason = " ".join(str(error).split()[:40])
                self.warn(f"compute.compile: {type(net).__name__} runs uncompiled: {reason}")
                return run(net, x, *args)


class Method(nn.Module):
    """A method of a module as a forward, which is what `functional_call` calls."""

    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.name)(*args, **kwargs)


def on_device(module: nn.Module, device: torch.device | str, method: str = "__call__") -> Callable[..., Any]:
    """`module`, or the method of that name, computing on `device` with copies of its weights and buffers.

    The copies are made at each call and freed after it; the module keeps its own, where they are. Tensors among the
    arguments lie on `device` already. A module that lies there is called without copying. While a call runs, the module
    shows the copies (torch.func.functional_call), so one module serves one call at a time.
    """
    call = Method(module, method)

    def run(*args: Any, **kwargs: Any) -> Any:
        own = {**dict(call.named_parameters()), **dict(call.named_buffers())}
        return functional_call(call, {k: z.to(device, non_blocking=True) for k, z in own.items()}, args, kwargs)

    return run


def pin(module: nn.Module) -> None:
    """Put the weights and buffers of a module that is being loaded into page-locked memory, from which copies to a GPU
    are fast and need not be waited for. Nothing happens where there is no CUDA."""
    if torch.cuda.is_available():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.pin_memory()
