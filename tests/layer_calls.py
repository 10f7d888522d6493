"""Sites, tokens and layers without a network, and the methods that change the call of a layer."""

import torch

from segresearch.guidance.methods.s2_guidance import S2
from segresearch.guidance.methods.slg import SLG
from segresearch.guidance.methods.ssg import SSG
from segresearch.guidance.methods.tpg import TPG
from segresearch.models.attention import Site

KEYS = torch.tensor([11, -5, 7])
BLOCK = Site("mid_block.attentions.0.transformer_blocks.1", (8, 12), "block")
CHOSEN = (
    "down_blocks.2.attentions.0.transformer_blocks.1",
    BLOCK.name,
    "up_blocks.0.attentions.1.transformer_blocks.0",
)


def at(site: Site, rows: int = 3, parts: int = 1, sigma: float = 3.0) -> Site:
    """The site with the keys and sigma of `rows` images."""
    names = tuple((f"part {i}",) for i in range(parts))
    return site._replace(branches=names, sigma=torch.full((rows,), sigma), keys=KEYS[:rows])


def tokens(rows: int = 3, n: int = 6, c: int = 8, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randn(n, c, generator=generator, dtype=torch.float64) for _ in range(rows)]).to(dtype)


def doubled(h, without=()):
    return 2 * h


CALLS = [TPG(), SSG(tokens=0.3, channels=0.3), SLG(), SLG(layers=["attn1"]), S2(share=0.5)]


TIME = Site("time_embedding", (1, 1), "embedding")


def embedded(t):
    return torch.stack([t, 2 * t + 1, t.sqrt(), -t], dim=1)
