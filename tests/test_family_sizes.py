"""The UNets of every family at full size have the weights and the sites of diffusers' own."""

import pytest
import torch
from diffusers import (
    UNet2DConditionModel,
)
from helpers import composed

from segresearch.config import conf_dir
from segresearch.guidance.sites import select_sites
from segresearch.models.unet import UNet, UNetConfig

THREE = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, "block_out_channels": (320, 640, 1280),
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SIZES = {  # the real sizes, and how many weights and self-attention sites they make
    "sd15": ({"attention_head_dim": 8, "cross_attention_dim": 768}, 859_520_964, 16),
    "sd15_inpainting": ({"attention_head_dim": 8, "cross_attention_dim": 768, "in_channels": 9}, 859_535_364, 16),
    "lcm": ({"attention_head_dim": 8, "cross_attention_dim": 768, "time_cond_proj_dim": 256}, 859_602_884, 16),
    "sd21": (
        {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
        865_910_724, 16,
    ),
    "sdxl": (THREE | {"transformer_layers_per_block": (1, 2, 10)}, 2_567_463_684, 70),
    "ssd1b": (
        THREE | {
            "transformer_layers_per_block": ((1,), (2, 2), (4, 4)), "mid_block_type": "UNetMidBlock2D",
            "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        },
        1_331_334_404, 34,
    ),
    "vega": (
        THREE | {
            "transformer_layers_per_block": ((1,), (1, 1), (2, 2)), "mid_block_type": "UNetMidBlock2D",
            "reverse_transformer_layers_per_block": ((2, 2, 2), (1, 1, 1), 1),
        },
        745_225_604, 15,
    ),
    "koala700m": (
        THREE | {"transformer_layers_per_block": (0, 2, 5), "layers_per_block": 1, "mid_block_type": None},
        782_822_724, 21,
    ),
    "koala1b": (THREE | {"transformer_layers_per_block": (0, 2, 6), "layers_per_block": 1}, 1_161_184_324, 30),
    "refiner": (
        THREE | {
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            "block_out_channels": (384, 768, 1536, 1536), "attention_head_dim": (6, 12, 24, 24),
            "transformer_layers_per_block": 4, "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
        },
        2_259_526_660, 44,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_full_sizes(name):
    """The counts are those of diffusers' UNet of the same config, which has the same keys."""
    config, count, sites = SIZES[name]
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**config)
        unet = UNet(UNetConfig.from_dict(dict(theirs.config) | ({"size_ids": 5} if name == "refiner" else {})))
    shapes = {key: p.shape for key, p in theirs.state_dict().items()}
    assert shapes == {key: p.shape for key, p in unet.state_dict().items()}
    assert sum(p.numel() for p in unet.parameters()) == count and len(unet.sites) == sites
    if (conf_dir() / "model" / f"{name}.yaml").is_file():  # the blocks that it names exist
        model = composed(f"model={name}", "guidance=none").model
        assert model.name == name and set(model.sites) == {"tpg", "ssg", "slg", "s2"}
        assert all(select_sites(w, tuple(unet.sites_by_kind["block"]), "block") for w in model.sites.values())
