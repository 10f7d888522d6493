"""The networks, their text conditioning, and the UNet as a k-diffusion denoiser.

What `__all__` names is imported when it is first used: modules here need no torch to be imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segresearch.checkpoints.in_memory import from_diffusers
    from segresearch.checkpoints.load import load_model
    from segresearch.guidance.diffusers_unet import to_diffusers
    from segresearch.models.stable_diffusion import StableDiffusion

__all__ = ["StableDiffusion", "from_diffusers", "load_model", "to_diffusers"]
HOMES = {"from_diffusers": "checkpoints.in_memory", "to_diffusers": "guidance.diffusers_unet"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"segresearch.{HOMES.get(name, 'checkpoints.load')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
