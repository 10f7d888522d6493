"""How the networks compute, beside what they compute: arithmetic, CUDA graphs, compilation, tiles, offloading.

Light: torch is imported where it is used, so that configs can hold a `Compute`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from segresearch.errors import InputError
from segresearch.typed import Bounds

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
    vae_tile: side of the VAE's tiles in image pixels; None decodes and encodes whole pictures.
    offload: text encoders and VAE lie on the CPU and come to the GPU for each call.
    """

    precision: Literal["auto", "exact", "fast"] = "auto"
    graph: bool = False
    compile: bool = False
    vae_tile: Annotated[int, Bounds(low=64)] | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "exact", "fast"):
            raise InputError(f"compute.precision={self.precision!r}: choose auto, exact or fast")
        if self.vae_tile is not None and self.vae_tile < 64:
            raise InputError(f"compute.vae_tile={self.vae_tile!r}: at least 64 pixels, or null for whole pictures")

    def resolved(self, device: "torch.device | str") -> "Compute":
        """With `precision` decided for this device."""
        if self.precision != "auto":
            return self
        return replace(self, precision="fast" if str(device).startswith("cuda") else "exact")

    def identity(self, device: "torch.device | str") -> dict[str, Any]:
        """What of it can change a pixel on this device, as {"compute": {...}}; {} where that is nothing: eager, exact,
        whole pictures."""
        plain = asdict(Compute(precision="exact"))
        own = {key: value for key, value in asdict(self.resolved(device)).items() if key != "offload"}
        own = {key: value for key, value in own.items() if value != plain[key]}
        return {"compute": own} if own else {}


PLAIN = Compute()


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

    A way that cannot work here is given up, with one line that says why; the call is then made the plain way.
    """

    def __init__(self, compute: Compute):
        self.compute = compute
        self.graphs: Any = None
        self.networks: dict[Any, Any] = {}  # by the plain one, its compiled form; the plain one again where that fails
        if compute.graph:
            from segresearch.models.graphs import Graphs

            self.graphs = Graphs()

    def __call__(self, function: Callable[..., Any], net: Any, x: "torch.Tensor", *args: Any) -> Any:
        """function(net, x, *args), on the device of x."""
        with arithmetic(self.compute.resolved(x.device).precision, x.device):
            if not self.compute.compile:
                return self._run(function, net, x, *args)
            import torch

            if net not in self.networks:
                self.networks[net] = torch.compile(net, dynamic=False, fullgraph=True)
            try:
                return self._run(function, self.networks[net], x, *args)
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:  # type: ignore[attr-defined]
                if self.networks[net] is net:
                    raise
                self.networks[net] = net
                reason = " ".join(str(error).split()[:40])
                warnings.warn(f"compute.compile: {type(net).__name__} runs uncompiled: {reason}", stacklevel=2)
                return self._run(function, net, x, *args)

    def _run(self, function: Callable[..., Any], net: Any, *args: Any) -> Any:
        return function(net, *args) if self.graphs is None else self.graphs(function, net, *args)
