"""IP-Adapter (arXiv 2308.06721): an image as a prompt, by keys and values of its own at every cross-attention.

    image ─ CLIP vision tower ─ image_proj ─► tokens (rows, n, text width) ─ to_k_ip, to_v_ip of each site ─► k′, v′
    out = attend(q, k, v) + scale · softmax(q k′ᵀ/√d) v′

k′ and v′ do not depend on the step: an `ImagePrompt` holds them, and is a perturbation of the cross-attention. Module
names are the key names of the published files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.errors import InputError
from segresearch.models.attention import Attend, Heads, KeyHeads, Site, sdpa
from segresearch.models.unet import UNet

Prompts = dict[str, tuple["ImagePrompt", ...]]  # by conditioning, as `GuidedDenoiser(every=)` takes them


class Linear(nn.Module):
    """Base: the pooled image as n tokens."""

    pooled = True  # what it reads: the image embedding; else the hidden states before the last layer

    def __init__(self, width: int, tokens: int, context: int):
        super().__init__()
        self.proj, self.norm = nn.Linear(width, tokens * context), nn.LayerNorm(context)

    def forward(self, image: Float[Tensor, "rows width"]) -> Float[Tensor, "rows n context"]:
        return self.norm(rearrange(self.proj(image), "b (n c) -> b n c", c=self.norm.normalized_shape[0]))


class Perceiver(nn.Module):
    """Attention of the tokens to the image and to themselves."""

    def __init__(self, width: int, heads: int, dim: int = 64):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * dim, bias=False)
        self.to_out = nn.Linear(heads * dim, width, bias=False)

    def forward(self, x: Float[Tensor, "rows m c"], tokens: Float[Tensor, "rows n c"]) -> Float[Tensor, "rows n c"]:
        x, tokens = self.norm1(x), self.norm2(tokens)
        parts = (self.to_q(tokens), *self.to_kv(torch.cat([x, tokens], dim=1)).chunk(2, dim=-1))
        q, k, v = (rearrange(z, "b n (h d) -> b h n d", h=self.heads) for z in parts)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class Resampler(nn.Module):
    """Plus: n learned tokens that read the image's hidden states, layer by layer."""

    pooled = False

    def __init__(self, width: int, tokens: int, context: int, inner: int, depth: int, heads: int, factor: int):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, tokens, inner))
        self.proj_in, self.proj_out = nn.Linear(width, inner), nn.Linear(inner, context)
        self.norm_out = nn.LayerNorm(context)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            up, down = nn.Linear(inner, factor * inner, bias=False), nn.Linear(factor * inner, inner, bias=False)
            forward = nn.Sequential(nn.LayerNorm(inner), up, nn.GELU(), down)
            self.layers.append(nn.ModuleList([Perceiver(inner, heads), forward]))

    def forward(self, image: Float[Tensor, "rows m width"]) -> Float[Tensor, "rows n context"]:
        x, tokens = self.proj_in(image), self.latents.expand(len(image), -1, -1)
        layers: Any = self.layers
        for attention, forward in layers:
            tokens = tokens + attention(x, tokens)
            tokens = tokens + forward(tokens)
        return self.norm_out(self.proj_out(tokens))


class KeysValues(nn.Module):
    """Of one cross-attention."""

    def __init__(self, context: int, width: int):
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)


class IPAdapter(nn.Module):
    """The adapter of one UNet. The published files count attentions, self and cross, of the down blocks, the up blocks,
    then the mid block: the cross-attentions have the odd numbers."""

    def __init__(self, unet: UNet, image_proj: Linear | Resampler):
        super().__init__()
        blocks = sorted((b.attn2 for b in unet.transformer_blocks), key=lambda a: a.name.startswith("mid_block"))
        self.sites = {attention.name: (str(2 * i + 1), attention.heads) for i, attention in enumerate(blocks)}
        self.image_proj = image_proj
        context = unet.config.cross_attention_dim
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): KeysValues(context, attention.to_q.out_features) for i, attention in enumerate(blocks)}
        )

    def forward(self, image: Tensor, scale: float | int = 1.0, where: Any = "*") -> "ImagePrompt":
        """The prompt of encoded images: their embeddings (base), or hidden states (plus)."""
        layers: Any = self.ip_adapter
        tokens, texts = self.image_proj(image.to(layers["1"].to_k_ip.weight)), {}
        for name, (number, heads) in self.sites.items():
            both = (to(tokens) for to in (layers[number].to_k_ip, layers[number].to_v_ip))
            k, v = (rearrange(z, "b n (h d) -> b h n d", h=heads) for z in both)
            texts[name] = (k, v)
        return ImagePrompt(texts, scale, where)


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Attention to an image beside that to the text, a perturbation of every branch on one conditioning.

    texts: keys and values of the image at every cross-attention, of one row or a row for each image. scale: 1 is the
    adapter as it was trained, 0 nothing. where: selector of cross-attentions.
    InputError for a scale that is not finite.
    """

    texts: Mapping[str, tuple[Tensor, Tensor]]
    scale: float | int = 1.0
    where: str | int | Sequence[str] = "*"
    site_kind: ClassVar[str] = "cross"

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, float | int) and math.isfinite(self.scale)):
            raise InputError(f"ip_adapter.scale={self.scale!r}: a finite number; 1 is the adapter as it was trained")

    def __call__(self, q: Heads, k: KeyHeads, v: KeyHeads, site: Site, attend: Attend) -> Heads:
        """Attention to the text and, scaled, to the image."""
        text, own = attend(q, k, v, site), self.texts[site.name]
        if q.shape[0] % own[0].shape[0]:
            raise InputError(f"ip_adapter: {own[0].shape[0]} images for {q.shape[0]} rows; give one, or one for each")
        k, v = (z.repeat(q.shape[0] // z.shape[0], 1, 1, 1) for z in own)
        return text + self.scale * sdpa(q, k, v, site)

    def __repr__(self) -> str:
        return f"ImagePrompt(scale={self.scale:g}, where={self.where!r})"


@dataclass(frozen=True)
class ImagePrompter:
    """An adapter with its CLIP vision tower, from images to the prompts of `GuidedDenoiser(every=)`."""

    adapter: IPAdapter
    tower: Any  # CLIPVisionModelWithProjection

    @torch.no_grad()
    def every(self, images: Sequence[Any], scale: float | int = 1.0, where: Any = "*") -> Prompts:
        """Of PIL images, one or one for each sampled image: {"cond": of these, "uncond": of no image}, as diffusers
        has it (base: an embedding of zeros; plus: the hidden states of a grey image)."""
        from transformers import CLIPImageProcessor

        side = self.tower.config.image_size
        process = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        pixels = process([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        pixels = pixels.to(self.tower.device, self.tower.dtype)
        if self.adapter.image_proj.pooled:
            image = self.tower(pixels).image_embeds
            none = torch.zeros_like(image[:1])
        else:
            both = torch.cat([pixels, torch.zeros_like(pixels[:1])])
            *rows, empty = self.tower(both, output_hidden_states=True).hidden_states[-2]
            image, none = torch.stack(rows), empty[None]
        return {"cond": (self.adapter(image, scale, where),), "uncond": (self.adapter(none, scale, where),)}
