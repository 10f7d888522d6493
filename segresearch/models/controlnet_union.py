"""A union of ControlNets: one network for several kinds of control images (diffusers' ControlNetUnionModel; xinsir's
`controlnet-union-sdxl-1.0` and its promax form).

    image ─ controlnet_cond_embedding ─► e ─► e + spatial_ch_projs(layers(mean e + task_embedding[kind])): the hint
    embedding of t, sizes and text, + control_add_embedding(kind)

`union.of_kind("depth")` is the ControlNet of one kind, over the same weights, which serves wherever a ControlNet does.
In diffusers the layers attend over the batch in place of their two tokens, so an image there depends on those beside
it. Here each row attends to itself, which is what diffusers computes for one image.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segresearch.errors import InputError
from segresearch.models.conditioning import Cond, Projection
from segresearch.models.controlnet import ControlNet
from segresearch.models.network_configs import ControlNetConfig
from segresearch.models.unet import ControlResiduals, Embedding, sinusoid

KINDS = ("openpose", "depth", "scribble", "canny", "normal", "segment", "tile", "repaint")  # of the published ones


@dataclass(frozen=True)
class UnionConfig(ControlNetConfig):
    """kinds: of control images. layers: of the network that weighs them."""

    kinds: int = 6
    layers: int = 1


class Layer(nn.Module):
    """Attention of a token to itself, then an MLP, each with a residual (diffusers: ResidualAttentionBlock)."""

    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 1)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Float[Tensor, "rows c"]) -> Float[Tensor, "rows c"]:
        weight, bias = (z.chunk(3)[2] for z in (self.attn.in_proj_weight, self.attn.in_proj_bias))  # of the values
        x = x + self.attn.out_proj(nn.functional.linear(self.ln_1(x), weight, bias))
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class ControlNetUnion(ControlNet):
    """All kinds together, as loaded."""

    config: UnionConfig

    def __init__(self, config: UnionConfig):
        super().__init__(config)
        width, sizes = config.block_out_channels[0], config.addition_time_embed_dim
        self.task_embedding = nn.Parameter(torch.zeros(config.kinds, width))
        self.transformer_layes = nn.ModuleList(Layer(width) for _ in range(config.layers))  # the files' spelling
        self.spatial_ch_projs = nn.Linear(width, width)
        self.control_add_embedding = Embedding(config.kinds * sizes, 4 * width)
        self.kinds = [OfKind(self, kind) for kind in range(config.kinds)]

    def of_kind(self, kind: str | int) -> ControlNet:
        """The ControlNet of one kind, by its number or its published name. InputError for one that is not there."""
        names = KINDS[: self.config.kinds]
        index = names.index(kind) if kind in names else kind
        if not isinstance(index, int) or not 0 <= index < self.config.kinds:
            known = f"{', '.join(names)}, or a number below {self.config.kinds}"
            raise InputError(f"kind={kind!r}: this union of ControlNets has {known}")
        return self.kinds[index]

    def embed_image(self, image: Float[Tensor, "rows 3 image_h image_w"]) -> Float[Tensor, "rows c h w"]:
        """InputError: a union needs a kind."""
        raise InputError(f"a union of ControlNets needs the kind of the image: {', '.join(KINDS[: self.config.kinds])}")

    def forward(self, *arguments: object, **options: object) -> ControlResiduals:
        """InputError: a union needs a kind."""
        raise InputError("a union of ControlNets needs the kind of the image: union.of_kind(...)")


class OfKind(ControlNet):
    """The modules of a union, for one kind."""

    union: Any

    def __init__(self, union: ControlNetUnion, kind: int):
        nn.Module.__init__(self)
        for name, module in union.named_children():
            self.add_module(name, module)
        self.config, self.kind = union.config, kind
        object.__setattr__(self, "union", union)  # no submodule: it holds the modules that are here already

    def embed_image(self, image: Float[Tensor, "rows 3 image_h image_w"]) -> Float[Tensor, "rows c h w"]:
        """The hint of an image of this kind; arguments and errors as of ControlNet."""
        hint = super().embed_image(image)
        x = hint.mean(dim=(2, 3)) + self.union.task_embedding[self.kind]
        for layer in self.union.transformer_layes:
            x = layer(x)
        return hint + self.union.spatial_ch_projs(x)[:, :, None, None]

    def project(self, cond: Cond) -> Projection:
        """As of ControlNet, with the embedding of the kind added."""
        projection, net = super().project(cond), self.union
        chosen = torch.zeros(net.config.kinds, device=self.conv_in.weight.device)
        chosen[self.kind] = 1
        kind = sinusoid(chosen, net.config.addition_time_embed_dim).flatten()[None]  # (kinds, d) -> (1, kinds · d)
        return replace(projection, added=projection.added + net.control_add_embedding(kind.to(self.conv_in.weight)))
