"""Small UNets as diffusers configures them, and inputs that fit all of them."""

import torch

from segresearch.models.conditioning import Cond

SHARED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
    "cross_attention_dim": 24,
    "sample_size": 16,
}
TWO_LEVELS = SHARED | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 3),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "norm_num_groups": 8,
}
THREE_LEVELS = SHARED | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 2),
    "attention_head_dim": (2, 4, 3),
    "use_linear_projection": False,
    "norm_num_groups": 16,
}
WIDE_STEP = TWO_LEVELS | {"attention_head_dim": 2, "transformer_layers_per_block": 1, "layers_per_block": 3}


def inputs(rows: int, h: int, w: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, h, w, generator=g, dtype=dtype)
    context = torch.randn(rows, 7, 24, generator=g, dtype=dtype)
    pooled = torch.randn(rows, 16, generator=g, dtype=dtype)
    ids = torch.tensor([[8.0 * h, 8.0 * w, 0, 0, 8.0 * h, 8.0 * w]]).expand(rows, 6).clone()
    return x, torch.linspace(1.0, 961.5, rows), Cond(context, pooled, ids)
