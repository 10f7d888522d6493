"""How the networks compute, beside what they compute: arithmetic, CUDA graphs, compilation, tiles, offloading.

Light: torch is imported where it is used, so that configs can hold a `Compute`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from segresearch.errors import InputError
from segresearch.fields import Flag, within

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compute:
    """How a loaded model computes; `load_sdxl(..., compute=Compute(...))`, and `compute.*` of every script.

    precision: of fp32 arithmetic. "fast" is torch's own default on a GPU: convolutions round their factors to TF32 (10
        bits of mantissa). "exact" keeps fp32, so that CPU and GPU agree to rounding. "auto" is fast on a GPU and exact
        elsewhere. It has no effect on networks in bf16 or fp16.
    graph: replay the networks' kernels as CUDA graphs, captured once for each shape and set of branches.
    compile: run the networks through torch.compile, once for each shape and set of branches.
    vae_tile: side of the VAE's tiles in image pixels; None decodes and encodes whole images.
    offload: text encoders and VAE lie on the CPU and come to the GPU for each call.
    """

    precision: Literal["auto", "exact", "fast"] = "auto"
    graph: Flag = False
    compile: Flag = False
    vae_tile: Annotated[int, within(64, whole=True)] | None = None
    offload: Flag = False

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "exact", "fast"):
            raise InputError(f"compute.precision={self.precision!r}: choose auto, exact or fast")
        for name in ("graph", "compile", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"compute.{name}={getattr(self, name)!r}: true or false")
        tile = self.vae_tile
        if tile is not None and (not isinstance(tile, int) or isinstance(tile, bool) or tile < 64):
            raise InputError(f"compute.vae_tile={tile!r}: whole pixels from 64 up, or null for whole images")

    def resolved(self, device: "torch.device | str") -> "Compute":
        """What of it acts on this device, with `precision` decided: only a GPU has another arithmetic, and graphs."""
        if not str(device).startswith("cuda"):
            return replace(self, precision="exact", graph=False)
        return self if self.precision != "auto" else replace(self, precision="fast")

    def record(self, device: "torch.device | str") -> dict[str, Any]:
        """For the record of a PNG: the kind of device, and what acts on it."""
        kind = str(device).partition(":")[0]
        return {"device": kind, **asdict(self.resolved(kind))}

    def identity(self, device: "torch.device | str") -> dict[str, Any]:
        """What of it acts on this device and is not the plain way (eager, exact, whole), as {"compute": {...}}.

        {} where that is nothing. Where a network lies between its calls changes nothing."""
        plain = asdict(Compute(precision="exact"))
        own = {key: value for key, value in asdict(self.resolved(device)).items() if key != "offload"}
        own = {key: value for key, value in own.items() if value != plain[key]}
        return {"compute": own} if own else {}


PLAIN = Compute()
VARIANTS = 64  # of a network that are compiled: shapes, dtypes, sets of branches


@contextmanager
def arithmetic(precision: str, device: "torch.device | str") -> Iterator[None]:
    """fp32 products on this device as `Compute.precision` says ("exact" or "fast"); afterwards as before.

    Sets torch's two switches of TF32, where the device is a GPU: of matrix products (always off) and of convolutions.
    """
    if not str(device).startswith("cuda"):
        yield
        return
    import torch

    matmul, cudnn, fast = torch.backends.cuda.matmul, torch.backends.cudnn, precision == "fast"
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32, cudnn.allow_tf32 = False, fast
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Runner:
    """Calls of a network as `Compute` asks: its arithmetic, compiled, as CUDA graphs.

    Where compilation or a graph is not possible, a warning gives the reason and the call runs without it.
    """

    def __init__(self, compute: Compute):
        self.compute = compute
        self.graphs: Any = None
        self.networks: dict[Any, Any] = {}  # by the plain one, its compiled form; the plain one again where that fails
        self.lines: set[str] = set()
        if compute.graph:
            from segresearch.models.graphs import Graphs

            self.graphs = Graphs()

    def __call__(self, function: Callable[..., Any], net: Any, x: "torch.Tensor", *args: Any) -> Any:
        """function(net, x, *args), on the device of x."""
        with arithmetic(self.compute.resolved(x.device).precision, x.device):
            if not self.compute.compile:
                return self._run(function, net, x, *args)
            import torch

            from segresearch.models.graphs import NotCapturable, structure

            of_one = structure if self.graphs is None else self.graphs.structure  # which keeps that of the text
            try:
                for arg in args:  # a new closure at every call, such as a recorder's, would be compiled at every call
                    of_one(arg)
            except NotCapturable as state:
                self._once(f"compute.compile: a call runs uncompiled: {state}")
                return self._run(function, net, x, *args)
            if net not in self.networks:
                self.networks[net] = torch.compile(net, dynamic=False, fullgraph=True)
            try:
                with torch._dynamo.config.patch(recompile_limit(), VARIANTS):  # type: ignore[attr-defined]
                    return self._run(function, self.networks[net], x, *args)
            except Exception as error:
                of_the_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
                if not of_the_compiler or self.networks[net] is net:
                    raise
                self.networks[net] = net
                reason = " ".join(str(error).split()[:40])
                self._once(f"compute.compile: {type(net).__name__} runs uncompiled: {reason}")
                return self._run(function, net, x, *args)

    def _run(self, function: Callable[..., Any], net: Any, *args: Any) -> Any:
        return function(net, *args) if self.graphs is None else self.graphs(function, net, *args)

    def _once(self, line: str) -> None:
        if line not in self.lines:
            self.lines.add(line)
            warnings.warn(line, stacklevel=3)


def recompile_limit() -> str:
    """The name of torch's setting of how many variants of a network it compiles; it was renamed."""
    import torch

    return "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
