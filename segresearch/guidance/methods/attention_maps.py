"""Dense attention maps of one image at a time, and the paths between two maps.

A map of n tokens has n² entries for every head (84 MB at SDXL's mid block, 1024 tokens and 20 heads), so only those of
one image are in memory at once. They are fp32 (fp64 stays fp64) whatever the network's dtype is.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.guidance.step import wide
from segresearch.models.attention import Heads, KeyHeads

Map = Float[Tensor, "rows heads tokens keys"]


def logits(q: Heads, k: KeyHeads) -> Map:
    """q kᵀ / √dim."""
    return wide(q) @ wide(k).mT / math.sqrt(q.shape[-1])


def attention_map(q: Heads, k: KeyHeads) -> Map:
    """softmax(q kᵀ / √dim) over the keys."""
    return logits(q, k).softmax(dim=-1)


def image_by_image(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The function of each row of the tensors, rows joined again; so no image depends on the others of its batch."""
    rows = zip(*(z.split(1) for z in tensors), strict=True)
    return torch.cat([function(*row) for row in rows])


def between(a: Map, b: Map, tau: float, path: str) -> Map:
    """The map at τ in [0, 1] on a path from a to b, on each row of the map; rows sum to one.

    "linear": (1−τ)·a + τ·b.
    "log_linear": ∝ a^(1−τ)·b^τ. Each entry of b gets a mass of 1e-6, for where b is 0 the path would be 0 at every τ.
    "slerp": the slerp of √a and √b, squared, which is the geodesic of Fisher and Rao.
    "chord": the straight line from √a to √b, squared: ∝ ((1−τ)·√a + τ·√b)².
    """
    if path == "linear":
        return torch.lerp(a, b, tau)
    if path == "log_linear":
        floor = 1e-6
        mixed = a.clamp_min(1e-12) ** (1 - tau) * (b * (1 - floor * (b.shape[-1] - 1)) + floor) ** tau
    else:
        start, end = (1 - tau) * a.sqrt(), tau * b.sqrt()
        if path == "slerp":
            angle = (a.sqrt() * b.sqrt()).sum(dim=-1, keepdim=True).clamp_max(1 - 1e-7).acos()
            start, end = ((1 - tau) * angle).sin() * a.sqrt(), (tau * angle).sin() * b.sqrt()
        mixed = (start + end) ** 2
    return mixed / mixed.sum(dim=-1, keepdim=True)


def target_query(q: Heads, target: str, temperature: float) -> Heads | None:
    """The query whose map is the target of `SoftPAG`; None for "identity" and "max", which are no map of a query."""
    if target == "uniform":
        return torch.zeros_like(q)
    if target == "temperature":
        return q / temperature
    return wide(q).mean(dim=2, keepdim=True).to(q.dtype).expand_as(q) if target == "mean_query" else None


def target_map(q: Heads, k: KeyHeads, target: str, temperature: float) -> Map:
    """The target of `SoftPAG` as a map."""
    if target == "max":
        scores = logits(q, k)
        return torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    query = target_query(q, target, temperature)
    eye = torch.eye(q.shape[2], dtype=wide(q).dtype, device=q.device)
    return eye.expand(*q.shape[:2], -1, -1) if query is None else attention_map(query, k)
