"""The networks of SDXL, text conditioning, checkpoints and the k-diffusion denoiser.

    from segresearch.models import load_sdxl
    sdxl  = load_sdxl("mini")
    conds = sdxl.encode(["a red cube"])

Names are loaded when they are first used, so that a script can look around here without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from segresearch.errors import CheckpointError

if TYPE_CHECKING:
    from segresearch.models.attention import Attend, Fork, Heads, Site, sdpa
    from segresearch.models.conditioning import Cond
    from segresearch.models.controlnet import ActiveControlNet, ControlNet, ControlNetConfig, controlled
    from segresearch.models.denoiser import Denoiser
    from segresearch.models.load import SDXL, load_sdxl
    from segresearch.models.text import TextEncoders
    from segresearch.models.unet import ControlResiduals, UNet, UNetConfig
    from segresearch.models.vae import VAE, VAEConfig

_HOMES = {
    "attention": ("Attend", "Fork", "Heads", "Site", "sdpa"),
    "conditioning": ("Cond",),
    "controlnet": ("ControlNet", "ControlNetConfig", "ActiveControlNet", "controlled"),
    "denoiser": ("Denoiser",),
    "load": ("SDXL", "load_sdxl"),
    "locate": ("CheckpointError",),
    "text": ("TextEncoders",),
    "unet": ("ControlResiduals", "UNet", "UNetConfig"),
    "vae": ("VAE", "VAEConfig"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "VAE", "SDXL", "Attend", "CheckpointError", "Cond", "ControlNet", "ControlNetConfig", "ControlResiduals",
    "ActiveControlNet",
    "Denoiser", "Fork", "Heads", "Site", "TextEncoders", "UNet", "UNetConfig", "VAEConfig", "controlled", "load_sdxl",
    "sdpa",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
