"""ControlNets (arXiv 2302.05543) of SDXL, SD 1.5 and 2.1: a copy of the UNet's encoding half that reads an image too.

    image (rows, 3, H, W) ─ controlnet_cond_embedding ─► hint (rows, c, h, w)        once an image
    x (rows, 4, h, w) ─ conv_in + hint ─ down_blocks ─ mid_block ─ 1×1 convolutions ─► residuals      once a step

Module names are the key names of a diffusers checkpoint. Its self-attention is never perturbed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.errors import InputError
from segresearch.models.conditioning import Cond, Projection
from segresearch.models.network_configs import ControlNetConfig
from segresearch.models.unet import ControlResiduals, Encoder
from segresearch.sampling.intervals import ALWAYS, Interval, check_interval


class ImageEmbedding(nn.Module):
    """An image to a hint at latent size: 3×3 convolutions, every second one with stride 2 (diffusers:
    ControlNetConditioningEmbedding)."""

    def __init__(self, out_channels: int, widths: Sequence[int]):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nn.ModuleList(
            conv for a, b in pairs for conv in (nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1, stride=2))
        )
        self.conv_out = zeroed(nn.Conv2d(widths[-1], out_channels, 3, padding=1))

    def forward(self, image: Float[Tensor, "rows 3 image_h image_w"]) -> Float[Tensor, "rows c h w"]:
        x = F.silu(self.conv_in(image))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


def zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution at zero, as a ControlNet's outer layers start."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class ControlNet(Encoder):
    """A ControlNet of any size. A new one adds nothing: its outer layers are zero."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        widths = config.skip_widths
        self.controlnet_cond_embedding = ImageEmbedding(widths[0], config.conditioning_embedding_out_channels)
        self.controlnet_down_blocks = nn.ModuleList(zeroed(nn.Conv2d(w, w, 1)) for w in widths)
        self.controlnet_mid_block = zeroed(nn.Conv2d(widths[-1], widths[-1], 1))

    def embed_image(self, image: Float[Tensor, "rows 3 image_h image_w"]) -> Float[Tensor, "rows c h w"]:
        """The hint of a control image, RGB in [0, 1] at the size of the sampled image: once an image, not once a step.

        InputError unless both sides are multiples of `config.image_factor`.
        """
        (height, width), factor = image.shape[2:], self.config.image_factor
        if height % factor or width % factor or not height or not width:
            sides = f"its sides must be positive multiples of {factor}"
            raise InputError(f"controlnet: the control image is {height}×{width} pixels; {sides}")
        if self.config.controlnet_conditioning_channel_order == "bgr":
            image = image.flip(1)
        return self.controlnet_cond_embedding(image.to(self.conv_in.weight))

    def forward(
        self,
        x: Float[Tensor, "rows c h w"],
        t: Float[Tensor, " rows"],
        cond: Cond | Projection,
        hint: Float[Tensor, "hint_rows d hint_h hint_w"],
        guess: bool = False,
    ) -> ControlResiduals:
        """Residuals for the UNet's skips and mid block at model input x and timestep t, in the network's dtype.

        hint: of `embed_image`, a row for each of x or one for all. guess: residuals weighted from 0.1 at the first
        skip to 1 at the mid block, in equal ratios (diffusers' guess_mode). Raises ValueError if cond or hint does not
        fit x.
        """
        self.check(x, cond)
        if hint.shape[2:] != x.shape[2:]:
            factor = self.config.image_factor
            (h, w), (height, width) = ([factor * n for n in z.shape[2:]] for z in (hint, x))
            raise InputError(f"controlnet: the control image is {h}×{w} pixels, the image {height}×{width}")
        if hint.shape[0] not in (1, x.shape[0]):
            raise InputError(f"controlnet: {hint.shape[0]} rows of hint for {x.shape[0]} rows of x")
        context = self.context(t, cond)
        mid, skips = self.encode(x, context, hint.to(context.emb.dtype))
        convs = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        residuals = [conv(skip) for conv, skip in zip(convs, (*skips, mid), strict=True)]
        if guess:
            weights = torch.logspace(-1, 0, len(residuals)).tolist()
            residuals = [residual * weight for residual, weight in zip(residuals, weights, strict=True)]
        return ControlResiduals(tuple(residuals[:-1]), residuals[-1])


@dataclass(frozen=True)
class ActiveControlNet:
    """One ControlNet in use: residuals `scale` · net(x, t, cond, hint) where σ is inside the interval.

    hint: of `net.embed_image`, a row for each image or one for all. interval: (low, high) in σ, both included
    (`sampling.step_interval` makes one from fractions of the steps). guess: the residuals go to the rows of the base
    conditioning only, none to the others such as "uncond", and are weighted by depth from 0.1 to 1.

    InputError for a scale that is not finite or an interval that is not 0 ≤ low ≤ high.
    """

    net: ControlNet
    hint: Float[Tensor, "rows c h w"]
    scale: float | int = 1.0
    interval: Interval = ALWAYS
    guess: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, float | int) and math.isfinite(self.scale)):
            raise InputError(f"the scale of a ControlNet must be finite, got {self.scale!r}")
        check_interval(self.interval, "a ControlNet")

    @property
    def rows(self) -> int:
        return self.hint.shape[0]

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> "ActiveControlNet":
        """For the chosen images."""
        return replace(self, hint=self.hint[index])

    def scale_at(self, sigma: float) -> float:
        """The scale at σ: 0 outside the interval."""
        return float(self.scale) if self.interval[0] <= sigma <= self.interval[1] else 0.0


def controlled(
    net: ControlNet,
    image: Float[Tensor, "rows channels h w"],
    scale: float | int = 1.0,
    interval: Sequence[float | int] = ALWAYS,
    guess: bool = False,
) -> ActiveControlNet:
    """A ControlNet with its control image: RGB in [0, 1] at the image's size, a row for each image or one for all.

    The image is embedded here, once, in the net's dtype and on its device. Other arguments: of ActiveControlNet.
    InputError for an image that is not RGB in [0, 1] or whose sides do not fit, and as ActiveControlNet does.
    """
    tensor = isinstance(image, Tensor)
    if not (tensor and image.ndim == 4 and image.shape[1] == 3 and image.numel() and image.is_floating_point()):
        kind = f"{tuple(image.shape)} {image.dtype}" if tensor else f"a {type(image).__name__}"
        raise InputError(f"a control image is a tensor of RGB in [0, 1], (rows, 3, h, w); got {kind}")
    low, high = image.min().item(), image.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise InputError(f"a control image is RGB in [0, 1]; these values reach from {low:g} to {high:g}")
    with torch.no_grad():
        return ActiveControlNet(net, net.embed_image(image), scale, tuple(interval), guess)  # type: ignore[arg-type]
