"""The VAE's decoder and encoder window by window: less memory, the same image to rounding.

Tiles that are decoded on their own differ from the whole image, for GroupNorm and the lowest grid's attention see all
of it; blending hides the seams, not the difference. Here no tile is decoded on its own. Every convolution of the whole
network reads windows of its input, a pixel wider than those it writes, and every normalization takes its statistics
from all windows. So there are no seams, nothing to blend, and no error but that of rounding. The lowest grid is small
and computed whole, its attention with as many queries at a time as a window has pixels there.

What lies in memory are two activations of the highest grid (three, at half the channels, while widths change) and the
temporaries of one window. The upsampling to the highest grid has the most channels: it is never held, but computed
twice, for the statistics and for the values, which costs an eighth more operations in all (SDXL's decoder).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from segresearch.models.vae import Decoder, Encoder

Window = tuple[int, int, int, int]  # top, bottom, left, right; the bottom row and the right column are outside


@dataclass(frozen=True)
class Grid:
    """Activations of one image that are read by windows: a tensor, or computed for each window (tensor is None)."""

    size: tuple[int, int]
    read: Callable[[Window], Float[Tensor, "1 c rows columns"]]
    tensor: Float[Tensor, "1 c h w"] | None = None


@torch.no_grad()
def decoded(decoder: Decoder, z: Float[Tensor, "b l h w"], tile: int, factor: int) -> Float[Tensor, "b c H W"]:
    """`decoder(z)`, image by image, in windows of at most tile × tile image pixels. No gradients."""
    if len(z) > 1:
        return torch.cat([decoded(decoder, row, tile, factor) for row in z.split(1)])
    x = held(decoder.mid_block(decoder.conv_in(z), (tile // factor) ** 2))
    blocks: Any = decoder.up_blocks
    for i, block in enumerate(blocks):
        side = max(tile * 2**i // factor, 1)  # the same part of the image on every grid
        for layer in block.resnets:
            x = held(resnet(layer, x, side))
        for layer in block.upsamplers:
            x = upsampled(layer, x)
            if i + 2 < len(blocks):
                x = held(filled(x.read, x.size, 2 * side))
    return convolved(decoder.conv_out, x, side, affine(decoder.conv_norm_out, x, side))


@torch.no_grad()
def encoded(encoder: Encoder, images: Float[Tensor, "b c H W"], tile: int) -> Float[Tensor, "b l2 h w"]:
    """`encoder(images)`, image by image, in windows of at most tile × tile image pixels. No gradients."""
    if len(images) > 1:
        return torch.cat([encoded(encoder, row, tile) for row in images.split(1)])
    x = held(convolved(encoder.conv_in, held(images), tile))
    blocks: Any = encoder.down_blocks
    for i, block in enumerate(blocks):
        side = max(tile // 2**i, 1)
        for layer in block.resnets:
            x = held(resnet(layer, x, side))
        for layer in block.downsamplers:
            x = held(downsampled(layer, x, max(side // 2, 1)))
    y = encoder.mid_block(x.read((0, x.size[0], 0, x.size[1])), side**2)
    return encoder.conv_out(F.silu(encoder.conv_norm_out(y)))


def held(x: Float[Tensor, "1 c h w"]) -> Grid:
    return Grid((x.shape[2], x.shape[3]), lambda window: cut(x, window), x)


def resnet(block: Any, x: Grid, side: int) -> Float[Tensor, "1 d h w"]:
    """The resnet of x. A held x whose width stays is overwritten with the sum."""
    norm1 = affine(block.norm1, x, side)
    keep = x.tensor is not None and block.conv_shortcut is None
    y: Any = None
    total: Any = x.tensor if keep else None
    for window in windows(x.size, side):
        wide = around(window, x.size)
        part = x.read(wide)
        y = written(y, x.size, window, cut(block.conv1(activated(part, norm1)), window, wide))  # c -> d
        if not keep:
            part = cut(part, window, wide)
            part = part if block.conv_shortcut is None else block.conv_shortcut(part)
            total = written(total, x.size, window, part)
        del part
    inner = held(y)
    norm2 = affine(block.norm2, inner, side)
    for window in windows(x.size, side):
        wide = around(window, x.size)
        cut(total, window).add_(cut(block.conv2(activated(inner.read(wide), norm2)), window, wide))
    return total


def upsampled(block: Any, x: Grid) -> Grid:
    """Twice the grid, computed when it is read."""

    def read(window: Window) -> Tensor:
        top, bottom, left, right = window
        low = around((top // 2, (bottom + 1) // 2, left // 2, (right + 1) // 2), x.size)
        part = x.read(low)
        return cut(block(part), window, (2 * low[0], 0, 2 * low[2], 0))

    return Grid((2 * x.size[0], 2 * x.size[1]), read)


def downsampled(block: Any, x: Grid, side: int) -> Float[Tensor, "1 c h2 w2"]:
    """Half the grid; the block pads right and below only, so a window reads one row and one column more there."""
    h, w = x.size

    def read(window: Window) -> Tensor:
        top, bottom, left, right = (2 * n for n in window)
        return block(x.read((top, min(bottom + 1, h), left, min(right + 1, w))))

    return filled(read, (h // 2, w // 2), side)


def convolved(
    conv: nn.Module, x: Grid, side: int, norm: tuple[Tensor, Tensor] | None = None
) -> Float[Tensor, "1 d h w"]:
    """A 3×3 convolution that keeps the grid, of x or of the activated x."""

    def read(window: Window) -> Tensor:
        wide = around(window, x.size)
        part = x.read(wide)
        return cut(conv(part if norm is None else activated(part, norm)), window, wide)

    return filled(read, x.size, side)


def affine(norm: nn.GroupNorm, x: Grid, side: int) -> tuple[Float[Tensor, "1 c 1 1"], Float[Tensor, "1 c 1 1"]]:
    """Scale and shift of each channel that normalize x with the statistics of the whole grid, in fp32 at least."""
    shares, means, variances = [], [], []
    for window in windows(x.size, side):
        part = x.read(window)
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        groups = rearrange(part, "1 (g c) h w -> g (c h w)", g=norm.num_groups)
        variance, mean = torch.var_mean(groups, dim=1, correction=0)
        shares.append((window[1] - window[0]) * (window[3] - window[2]) / (x.size[0] * x.size[1]))
        means.append(mean)
        variances.append(variance)
    mean = torch.stack([s * m for s, m in zip(shares, means, strict=True)]).sum(0)
    spread = [s * (v + (m - mean).square()) for s, m, v in zip(shares, means, variances, strict=True)]
    each = norm.num_channels // norm.num_groups
    scale = norm.weight * (torch.stack(spread).sum(0) + norm.eps).rsqrt().repeat_interleave(each)  # groups -> channels
    shift = norm.bias - mean.repeat_interleave(each) * scale
    return scale[None, :, None, None], shift[None, :, None, None]


def activated(x: Float[Tensor, "1 c h w"], norm: tuple[Tensor, Tensor]) -> Float[Tensor, "1 c h w"]:
    """SiLU of the normalized x, rounded to its dtype where the whole network rounds."""
    scale, shift = norm
    return F.silu(torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype), inplace=True)


def written(
    x: Float[Tensor, "1 c h w"] | None, size: tuple[int, int], window: Window, part: Float[Tensor, "1 c rows columns"]
) -> Float[Tensor, "1 c h w"]:
    """x with `part` in its window; None is a new tensor of that size."""
    x = part.new_empty((*part.shape[:2], *size)) if x is None else x
    cut(x, window).copy_(part)
    return x


def filled(read: Callable[[Window], Tensor], size: tuple[int, int], side: int) -> Float[Tensor, "1 c h w"]:
    """All windows of a grid in one tensor."""
    x: Any = None
    for window in windows(size, side):
        x = written(x, size, window, read(window))
    return x


def windows(size: tuple[int, int], side: int) -> Iterator[Window]:
    """Windows of at most side × side that cover the grid, row by row."""
    h, w = size
    for top in range(0, h, side):
        for left in range(0, w, side):
            yield top, min(top + side, h), left, min(left + side, w)


def around(window: Window, size: tuple[int, int]) -> Window:
    """A pixel wider on each side, within the grid."""
    top, bottom, left, right = window
    return max(top - 1, 0), min(bottom + 1, size[0]), max(left - 1, 0), min(right + 1, size[1])


def cut(x: Float[Tensor, "1 c h w"], window: Window, of: Window = (0, 0, 0, 0)) -> Float[Tensor, "1 c rows columns"]:
    """The part of x within `window`, where x itself starts at the top left of `of`."""
    top, bottom, left, right = window
    return x[:, :, top - of[0] : bottom - of[0], left - of[2] : right - of[2]]
