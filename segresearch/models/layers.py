"""Residual, down- and upsampling blocks that the UNet and the VAE share. Names are the checkpoints' key names."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.models.attention import Fork, follow


class Resnet(nn.Module):
    """GroupNorm, SiLU, 3×3 convolution, twice; between them the time embedding, if any, is added per channel."""

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float, emb_channels: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_channels, out_channels) if emb_channels else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(
        self, x: Float[Tensor, "rows c h w"], emb: Float[Tensor, "rows_e e"] | None = None, fork: Fork | None = None
    ) -> Float[Tensor, "rows d h w"]:
        y = self.conv1(F.silu(self.norm1(x)))  # c -> d
        if self.time_emb_proj is not None:
            assert emb is not None
            y = y + self.time_emb_proj(F.silu(follow(emb, x, fork)))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class Downsample(nn.Module):
    """3×3 convolution, stride 2; `symmetric` pads one pixel on every side (UNet), else right and below only (VAE)."""

    def __init__(self, channels: int, symmetric: bool):
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Float[Tensor, "rows c h w"]) -> Float[Tensor, "rows c h2 w2"]:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour to `size`, by default twice the grid, then a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "rows c h w"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "rows c h2 w2"]:
        return self.conv(F.interpolate(x, size=size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest"))
