"""SDXL's networks, its text conditioning, and the UNet as a k-diffusion denoiser.

`StableDiffusion` and `load_model` are imported when they are first used: modules here need no torch to be imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segresearch.checkpoints.load import load_model
    from segresearch.models.stable_diffusion import StableDiffusion

__all__ = ["StableDiffusion", "load_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("segresearch.checkpoints.load"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
