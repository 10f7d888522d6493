"""What attention does at a site, and what a perturbation changes there, as numbers of each image.

Every number is a `Share`: a numerator and a denominator of each image, whose sums make the estimate. A mean over images
has the denominator 1. Half precisions are widened to fp32; logits come in blocks, so no map of a large site is held.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.analysis.logit_statistics import MEASURES, column_blocks, exponentials, wide
from segresearch.guidance.blur import constant
from segresearch.models.attention import Heads, KeyHeads


class Share(NamedTuple):
    """Σ numerator / Σ denominator over images. pairs: an image's numerator is the mean over its pairs with others."""

    numerator: Float[Tensor, " rows"]
    denominator: Float[Tensor, " rows"]
    pairs: bool = False


class Estimate(NamedTuple):
    """value: nan where the denominators are 0. error: standard error over images, nan for one image. images: their
    number."""

    value: float
    error: float
    images: int


def mean_of(values: Float[Tensor, " rows"]) -> Share:
    """The mean of a number of each image."""
    return Share(values, torch.ones_like(values))


def estimate(shares: Sequence[Share]) -> Estimate:
    """Over all images of several batches, in fp64 on the CPU; the error by the linear term of the ratio.

    The mean over pairs is a U-statistic: an image is in its own pairs and in those of the others, so that its influence
    counts twice.
    """
    numerator = torch.cat([share.numerator.double().cpu() for share in shares])
    denominator = torch.cat([share.denominator.double().cpu() for share in shares])
    n, total = len(numerator), float(denominator.mean())
    if not total:
        return Estimate(math.nan, math.nan, n)
    value = float(numerator.mean()) / total
    factor = 2 if shares[0].pairs else 1
    residual = factor * (numerator - numerator.mean()) - value * (denominator - denominator.mean())
    return Estimate(value, float(residual.std() / (total * math.sqrt(n))) if n > 1 else math.nan, n)


def common_share(z: Float[Tensor, "rows *shape"]) -> Share:
    """The share of the energy of z that is common to all images: the mean ⟨z_i, z_j⟩ over pairs of different images of
    the batch, over the mean |z_i|². Free of bias whatever the number of images: no image is paired with itself."""
    flat = z.flatten(1).to(wide(z.dtype))
    energy = flat.square().sum(1)
    others = (flat * (flat.sum(0) - flat)).sum(1)  # (rows, n) -> (rows,)
    if len(flat) < 2:
        return Share(torch.zeros_like(energy), torch.zeros_like(energy), True)
    return Share(others / (len(flat) - 1), energy, True)


def varying_share(out: Heads) -> Share:
    """The share of the energy of an attention's output that differs between the tokens of an image and head."""
    out = out.to(wide(out.dtype))
    energy = out.square().sum((1, 2, 3))
    constant = out.mean(2).square().sum((1, 2)) * out.shape[2]  # (rows, heads, tokens, dim) -> (rows,)
    return Share(energy - constant, energy)


def relative_change(perturbed: Heads, out: Heads) -> Share:
    """|perturbed − out| / |out| of each image, over all its heads and tokens; mean over images."""
    perturbed, out = (z.to(wide(z.dtype)).flatten(1) for z in (perturbed, out))
    return mean_of((perturbed - out).norm(dim=1) / out.norm(dim=1).clamp_min(1e-30))


@constant
def neighbours(h: int, w: int, device: torch.device) -> Int[Tensor, "tokens 9"]:
    """Of every token of a grid the numbers of the 3×3 tokens around it (column 4 is itself); −1 where there is none."""
    step = torch.arange(-1, 2, device=device)
    rows = torch.arange(h, device=device)[:, None, None, None] + step[:, None]  # (h, 1, 3, 1)
    columns = torch.arange(w, device=device)[:, None, None] + step  # (w, 1, 3)
    there = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)  # (h, w, 3, 3)
    return torch.where(there, rows * w + columns, -1).reshape(h * w, 9)


def near_chance(grid: tuple[int, int]) -> float:
    """The mass that uniform attention has on the 3×3 tokens around a query, mean over queries, edges counted."""
    sides = [3 * n - 2 if n > 1 else 1 for n in grid]  # Σ over the positions of how many of the three are there
    return sides[0] * sides[1] / (grid[0] * grid[1]) ** 2


def attention_shares(q: Heads, k: KeyHeads, out: Heads, grid: tuple[int, int]) -> dict[str, Share]:
    """Of a self-attention on a grid, means over queries and heads.

    keys: effective number of keys, exp of the entropy of a query's attention. near: its mass on the 3×3 tokens around
    the query (`near_chance` is that of uniform attention). own: its mass on the query's own token. position: the share
    of the variance of the queries over tokens that is the same in all images. varying: see `varying_share`.
    """
    rows, heads, tokens, _ = q.shape
    index = neighbours(*grid, q.device)
    sums = torch.zeros(3, rows * heads, dtype=torch.float64, device=q.device)
    for groups, queries, logits in column_blocks(k, q):
        columns = exponentials(logits)
        at = index[queries].expand(len(logits), -1, -1)  # (queries, 9) -> (groups, queries, 9)
        mass = columns.exp.gather(2, at.clamp(min=0)).double() / columns.total[..., None] * (at >= 0)
        effective = MEASURES["entropy"](columns).exp()
        sums[:, groups] += torch.stack([effective, mass.sum(2), mass[..., 4]]).sum(2)
    keys, near, own = (sums / tokens).unflatten(1, (rows, heads)).mean(2).float()  # (3, rows·heads) -> 3 of (rows,)
    varied = q.to(wide(q.dtype)) - q.to(wide(q.dtype)).mean(2, keepdim=True)
    return {
        "keys": mean_of(keys), "near": mean_of(near), "own": mean_of(own),
        "position": common_share(varied), "varying": varying_share(out),
    }  # fmt: skip
