"""Random choices of methods, keyed per image, level and place: numbers that are a hash of these, not of a stream.

A choice does not depend on the batch, the order of the calls or the device: integers are equal to the bit everywhere.
Nothing is drawn on the CPU, so a CUDA graph holds the draws as it holds any other operation.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GOLDEN, MIX_1, MIX_2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(z: Int[Tensor, " *shape"]) -> Int[Tensor, " *shape"]:
    """The finaliser of SplitMix64, modulo 2^64 (integers wrap around)."""
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor  # a logical shift
    return z ^ (z >> 31 & (1 << 33) - 1)


def place(name: str) -> int:
    """A 63-bit number of a name, such as a site's: FNV-1a, which torch.compile can follow."""
    number = 0xCBF29CE484222325
    for byte in name.encode():
        number = (number ^ byte) * 0x100000001B3 % (1 << 64)
    return number >> 1


def bits(
    keys: Int[Tensor, " rows"], sigma: Float[Tensor, " rows"], name: str, count: int
) -> Int[Tensor, "rows {count}"]:
    """`count` random 64-bit integers for each image at this noise level and place."""
    level = sigma.float().view(torch.int32).to(torch.int64)
    row = mixed(mixed(keys + place(name)) + level * GOLDEN)  # (rows,)
    index = torch.arange(1, count + 1, device=keys.device) * GOLDEN
    return mixed(row[:, None] + index)  # (rows, 1) + (count,) -> (rows, count)


def uniform(
    keys: Int[Tensor, " rows"], sigma: Float[Tensor, " rows"], name: str, count: int
) -> Float[Tensor, "rows {count}"]:
    """Uniform in (0, 1), fp32, 24 bits each."""
    return ((bits(keys, sigma, name, count) >> 40 & (1 << 24) - 1).float() + 0.5) * 2.0**-24


def normal(
    keys: Int[Tensor, " rows"], sigma: Float[Tensor, " rows"], name: str, count: int
) -> Float[Tensor, "rows {count}"]:
    """Unit Gaussian, fp32 (Box–Muller)."""
    radius = (-2 * uniform(keys, sigma, f"{name}/radius", count).log()).sqrt()
    return radius * (2 * math.pi * uniform(keys, sigma, f"{name}/angle", count)).cos()


def permutation(
    keys: Int[Tensor, " rows"], sigma: Float[Tensor, " rows"], name: str, count: int
) -> Int[Tensor, "rows {count}"]:
    """A permutation of 0 … count − 1 for each image."""
    return bits(keys, sigma, name, count).argsort(dim=1, stable=True)


def chosen(
    keys: Int[Tensor, " rows"], sigma: Float[Tensor, " rows"], name: str, share: float
) -> Bool[Tensor, " rows"]:
    """Whether each image takes this choice, of probability `share`."""
    return uniform(keys, sigma, name, 1)[:, 0] < share
