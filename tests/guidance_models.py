"""A tiny random UNet under the plain denoiser, for the guidance tests: 15 sites, some in every group; ControlNets."""

from dataclasses import fields
from functools import lru_cache

import torch

from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import ControlNet, ControlNetConfig
from segresearch.models.denoiser import Denoiser, alphas_cumprod
from segresearch.models.network_configs import EncoderConfig
from segresearch.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(32, 32, 64),
    layers_per_block=(1, 1, 1),
    transformer_layers_per_block=(1, 1, 3),
    heads=(2, 2, 4),
    cross_attention_dim=24,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 16,
    norm_num_groups=8,
)


@lru_cache
def denoiser(dtype: torch.dtype = torch.float64) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(CONFIG).to(dtype).eval().requires_grad_(False)
        for name, weight in unet.named_parameters():  # maps far from uniform, so that perturbing them shows
            if "attn1.to_q" in name or "attn1.to_k" in name:
                weight *= 3
    return Denoiser(unet, alphas_cumprod({}))


def noisy(rows: int = 2, h: int = 8, w: int = 12, sigma: float = 3.0, dtype: torch.dtype = torch.float64):
    """x, sigma and two conditionings; a row is the same whatever the number of rows."""

    def draw(seed: int, *shape: int) -> torch.Tensor:
        parts = [torch.randn(*shape, generator=torch.Generator().manual_seed(100 * seed + i)) for i in range(rows)]
        return torch.stack(parts).to(dtype)

    ids = torch.tensor([[8.0 * h, 8.0 * w, 0, 0, 8.0 * h, 8.0 * w]]).expand(rows, 6).clone()
    conds = {name: Cond(draw(seed, 5, 24), draw(seed + 10, 16), ids) for seed, name in enumerate(("cond", "uncond"), 1)}
    return draw(0, 4, h, w) * sigma, torch.full((rows,), sigma, dtype=dtype), conds


class Counted(ControlNet):
    """Notes the rows of every forward."""

    def forward(self, x, t, cond, hint, guess=False):
        self.rows_seen = [*getattr(self, "rows_seen", []), len(x)]
        return super().forward(x, t, cond, hint, guess)


SHARED = {field.name: getattr(CONFIG, field.name) for field in fields(EncoderConfig)}
CONTROL_CONFIG = ControlNetConfig(
    **SHARED | {"conditioning_embedding_out_channels": (4, 6), "transformer_layers_per_block": (1, 1, 1)}
)


def control_net(seed=0, zero=False) -> Counted:
    with torch.random.fork_rng():
        torch.manual_seed(50 + seed)
        made = Counted(CONTROL_CONFIG).double().eval().requires_grad_(False)
        if not zero:
            for layer in (*made.controlnet_down_blocks, made.controlnet_mid_block):
                layer.weight.normal_(0, 0.2)
            made.controlnet_cond_embedding.conv_out.weight.normal_(0, 0.2)
    return made


def control_image(rows=2, h=4, w=8, seed=9) -> torch.Tensor:
    return torch.rand(rows, 3, 2 * h, 2 * w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
