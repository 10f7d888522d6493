"""SDXL's networks, its text conditioning, and the UNet as a k-diffusion denoiser.

`SDXL` and `load_sdxl` are imported when they are first used, so that modules here can be imported without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segresearch.checkpoints.load import load_sdxl
    from segresearch.models.sdxl import SDXL

__all__ = ["SDXL", "load_sdxl"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("segresearch.checkpoints.load"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
