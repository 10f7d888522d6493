"""How the networks compute: arithmetic, CUDA graphs, compilation, tiles, offloading. Light: torch is imported late."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from segresearch.errors import InputError
from segresearch.fields import Flag, within

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compute:
    """How a loaded model computes; `load_model(..., compute=Compute(...))`, and `compute.*` of every script.

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
        if self.vae_tile is not None and not (type(self.vae_tile) is int and self.vae_tile >= 64):
            raise InputError(f"compute.vae_tile={self.vae_tile!r}: whole pixels from 64 up, or null for whole images")

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
        """What of it acts on this device and is not the plain way (eager, exact, whole), as {"compute": {...}}, or {}.

        Where a network lies between its calls (offload) changes no image."""
        plain = Compute(precision="exact", offload=self.offload)
        own = {k: v for k, v in asdict(self.resolved(device)).items() if v != getattr(plain, k)}
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
