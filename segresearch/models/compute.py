"""How the networks compute, beside what they compute: arithmetic, CUDA graphs, compilation, tiles, offloading.

Light: torch is imported where it is used, so that configs can hold a `Compute`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compute:
    """How a loaded model computes; `load_sdxl(..., compute=Compute(...))`, and `compute.*` of every script.

    precision: of fp32 arithmetic. "fast" lets the GPU's matrix units round the inputs of fp32 products to TF32 (10 bits
        of mantissa); "exact" keeps fp32, so that CPU and GPU agree to rounding; "auto" is fast on a GPU, exact elsewhere.
        It has no effect on networks in bf16 or fp16.
    graph: replay the networks' kernels as CUDA graphs, captured once for each shape and set of branches.
    compile: run the networks through torch.compile, once for each shape and set of branches.
    vae_tile: side of the VAE's tiles in image pixels; None decodes and encodes whole pictures.
    offload: text encoders and VAE lie on the CPU and come to the GPU for each call.
    """

    precision: Literal["auto", "exact", "fast"] = "auto"
    graph: bool = False
    compile: bool = False
    vae_tile: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "exact", "fast"):
            raise ValueError(f"compute.precision={self.precision!r}: choose auto, exact or fast")
        if self.vae_tile is not None and self.vae_tile < 64:
            raise ValueError(f"compute.vae_tile={self.vae_tile!r}: at least 64 pixels, or null for whole pictures")

    def resolved(self, device: "torch.device | str") -> "Compute":
        """With `precision` decided for this device."""
        from dataclasses import replace

        if self.precision != "auto":
            return self
        return replace(self, precision="fast" if str(device).startswith("cuda") else "exact")
