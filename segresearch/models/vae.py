"""The autoencoder of the Stable Diffusion families, with the key names of a diffusers checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.errors import InputError, shown
from segresearch.models import tiles
from segresearch.models.layers import Downsample, Resnet, Upsample
from segresearch.models.network_configs import check_fixed, counts, refuse_giant

_EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """Sizes, in the terms of a diffusers config.json; the defaults are SDXL's. Scaled latents have unit scale.

    A config that lacks scaling_factor means another one in other families: see `checkpoints.folder`.
    latents_mean, latents_std: of each channel, where scaled latents are (z − mean) · scaling_factor / std (Playground
    v2.5).
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> "VAEConfig":
        """From a diffusers `vae/config.json`. Raises ValueError, naming key and value, for another architecture."""
        refuse_giant(config, "vae")
        check_fixed(config, {"act_fn": ("silu",)}, "vae")
        for key, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if set(config.get(key, [known])) != {known}:
                raise InputError(f"vae config: {key}={shown(config[key])} is not supported, only {known}")
        values = ((f.name, config.get(f.name)) for f in fields(VAEConfig))
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values if v is not None}
        for name in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            if name in own:
                (own[name],) = counts(own[name], 1, name, "vae")
        if "block_out_channels" in own:
            widths = own["block_out_channels"]
            n = len(widths) if isinstance(widths, tuple) and widths else 1
            own["block_out_channels"] = counts(widths, n, "block_out_channels", "vae")
        for name in ("scaling_factor", "shift_factor"):
            value = own.get(name, 1.0)
            if not isinstance(value, int | float) or not abs(value) < 1e6 or (name == "scaling_factor" and value <= 0):
                raise InputError(f"vae config: {name}={shown(value)} must be a number")
            own |= {name: float(value)} if name in own else {}
        return VAEConfig(**own)

    def __post_init__(self) -> None:
        groups = self.norm_num_groups
        for width in self.block_out_channels:
            if width % groups:
                raise InputError(f"vae config: width {width} is not a multiple of norm_num_groups {groups}")
        mean, std, n = self.latents_mean, self.latents_std, self.latent_channels
        if {mean, std} != {None} and not (mean and std and len(mean) == len(std) == n and min(std) > 0):
            both = f"latents_mean={shown(mean)} and latents_std={shown(std)}"
            raise InputError(f"vae config: {both} must be {n} numbers each, one for each latent channel, or both null")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)


class PixelAttention(nn.Module):
    """One head over all pixels of the lowest grid; `many` queries are computed at a time, None is all."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Float[Tensor, "b c h w"], many: int | None = None) -> Float[Tensor, "b c h w"]:
        y = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)
        y = torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(many or q.shape[2], dim=2)], 2)
        return x + rearrange(self.to_out[0](y), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Mid(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups, _EPS) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if attention else [])

    def forward(self, x: Float[Tensor, "b c h w"], many: int | None = None) -> Float[Tensor, "b c h w"]:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x, many)
        return self.resnets[1](x)


class Block(nn.Module):
    """Resnets, then half the grid ("down") or twice the grid ("up"); the last block of a half keeps it ("")."""

    def __init__(self, channels: int, width: int, layers: int, groups: int, resample: str):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(width if i else channels, width, groups, _EPS) for i in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(width, symmetric=False)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if resample == "up" else [])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


def blocks(widths: Sequence[int], layers: int, groups: int, resample: str) -> nn.ModuleList:
    """A block for each of the widths, in the order of a forward pass."""
    return nn.ModuleList(
        Block(widths[max(i - 1, 0)], width, layers, groups, resample if i < len(widths) - 1 else "")
        for i, width in enumerate(widths)
    )


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths, g = c.block_out_channels, c.norm_num_groups
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = blocks(widths, c.layers_per_block, g, "down")
        self.mid_block = Mid(widths[-1], g, c.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(g, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c2 h w"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths, g = c.block_out_channels[::-1], c.norm_num_groups
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Mid(widths[0], g, c.mid_block_add_attention)
        self.up_blocks = blocks(widths, c.layers_per_block + 1, g, "up")
        self.conv_norm_out = nn.GroupNorm(g, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def channelwise(values: Sequence[float] | None, z: Float[Tensor, "b l h w"]) -> Float[Tensor, "1 l 1 1"]:
    """A number for each channel of z."""
    return torch.tensor(values, dtype=z.dtype, device=z.device)[None, :, None, None]


class VAE(nn.Module):
    """Images in [−1, 1] to latents of unit scale and back, computed in the weights' dtype, returned in fp32 or fp64."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder, n = Encoder(config), Decoder(config), config.latent_channels
        self.quant_conv = nn.Conv2d(2 * n, 2 * n, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(n, n, 1) if config.use_post_quant_conv else nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    def moments(
        self, images: Float[Tensor, "b c H W"], tile: int | None = None
    ) -> tuple[Float[Tensor, "b l h w"], Float[Tensor, "b l h w"]]:
        """Mean and log-variance of the latent Gaussian, in the VAE's own units (not scaled).

        tile: as of `decode`. Raises ValueError if a side is not a multiple of the downsampling factor.
        """
        f = self.config.factor
        if images.shape[2] % f or images.shape[3] % f:
            sides = tuple(images.shape[2:])
            raise InputError(f"vae: image sides {sides} must be multiples of {f}: crop or pad the image")
        x, tile = images.to(self.dtype), self._tile(images, 1, tile)
        y = self.encoder(x) if tile is None else tiles.encoded(self.encoder, x, tile)
        mean, logvar = self.quant_conv(y).chunk(2, dim=1)  # (b, 2l, h, w) -> 2 × l
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(
        self,
        images: Float[Tensor, "b c H W"],
        tile: int | None = None,
        noise: Float[Tensor, "b l h w"] | None = None,
    ) -> Float[Tensor, "b l h w"]:
        """Scaled latents: (z − shift) · scaling_factor, where z is the mean of the latent Gaussian, or with unit
        Gaussian `noise` a draw from it, mean + deviation · noise. tile: as of `decode`."""
        mean, logvar = self.moments(images, tile)
        mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
        return self.scaled(mean if noise is None else mean + (0.5 * logvar.to(mean)).exp() * noise.to(mean))

    def scaled(self, z: Float[Tensor, "b l h w"]) -> Float[Tensor, "b l h w"]:
        """Latents in the VAE's own units to unit scale."""
        c = self.config
        if c.latents_mean is None:
            return (z - c.shift_factor) * c.scaling_factor
        mean, std = (channelwise(value, z) for value in (c.latents_mean, c.latents_std))
        return (z - mean) * c.scaling_factor / std

    def unscaled(self, latents: Float[Tensor, "b l h w"]) -> Float[Tensor, "b l h w"]:
        """Latents of unit scale to the VAE's own units."""
        c = self.config
        if c.latents_mean is None:
            return latents / c.scaling_factor + c.shift_factor
        mean, std = (channelwise(value, latents) for value in (c.latents_mean, c.latents_std))
        return latents * std / c.scaling_factor + mean

    def decode(self, latents: Float[Tensor, "b l h w"], tile: int | None = None) -> Float[Tensor, "b c H W"]:
        """Images from scaled latents, not clamped.

        Computed in the weights' dtype: SDXL's own VAE overflows in fp16, so keep it in fp32 or bf16.
        tile: side, in image pixels, of the windows in which a larger image is computed to save memory (`tiles`);
        None computes whole images. Both give the same image to rounding. Raises ValueError for a tile smaller than
        a latent pixel, and for latents that want a gradient, which windows do not have.
        """
        c, channels = self.config, latents.shape[1]
        if channels != c.latent_channels:
            raise InputError(f"vae: latents of {channels} channels, this model's have {c.latent_channels}")
        z = self.post_quant_conv(self.unscaled(latents).to(self.dtype))
        tile = self._tile(latents, c.factor, tile)
        images = self.decoder(z) if tile is None else tiles.decoded(self.decoder, z, tile, c.factor)
        return images.to(torch.promote_types(images.dtype, torch.float32))

    def _tile(self, x: Float[Tensor, "b c h w"], scale: int, tile: int | None) -> int | None:
        """`tile`, or None where an image of x, with `scale` image pixels for each of x, lies within it."""
        least = self.config.factor
        if tile is not None and (not isinstance(tile, int) or tile < least):
            raise InputError(f"vae: tile={tile!r} must be a whole number of image pixels, at least {least}")
        if tile is None or max(x.shape[2:]) * scale <= tile:
            return None
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(f"vae: no gradients through tiles of {tile} pixels: tile=None keeps them")
        return tile
