"""Randomness keyed per image: image i is the same whatever the batch, and no global stream is touched."""

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.sampling.kdiffusion import k_diffusion

RESOLUTION = 1e-6  # to which a Brownian tree rounds its sigmas
NoiseSampler = Callable[[Tensor, Tensor], Tensor]  # (sigma, sigma_next) -> unit Gaussian noise shaped like x


def checked_seed(seed: Any) -> int:
    """`seed` as an int in [0, 2^63), else a ValueError with the value."""
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value < 2**63:
        raise InputError(f"a seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
    return value


def image_key(source: int | bytes, stream: str) -> int:
    """A 63-bit key for one image and one named stream, from its seed or from the bytes of its initial noise."""
    data = source if isinstance(source, bytes) else checked_seed(source).to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=8, person=b"segresearch", key=stream.encode()).digest()
    return int.from_bytes(digest, "little") >> 1


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "images *shape"]:
    """Unit Gaussian noise, one CPU generator per image: (len(seeds), *shape), fp32, on the CPU.

    Image i depends on seeds[i] and `shape` alone. The generator is seeded with the seed itself, so that diffusers gives
    the same start with `generator=[torch.Generator().manual_seed(s) for s in seeds]`. ValueError: no seeds, a seed that
    is not an integer from 0 to 2^63 - 1, a shape with a side below 1.
    """
    if not len(seeds):
        raise InputError("initial_noise needs at least one seed")
    if not shape or min(shape) < 1:
        raise InputError(f"the shape of one image's noise must have positive sides, got {tuple(shape)}")
    generators = [torch.Generator().manual_seed(checked_seed(seed)) for seed in seeds]
    return torch.stack([torch.randn(*shape, generator=generator, dtype=torch.float32) for generator in generators])


def noise_keys(noise: Float[Tensor, "images *latent"], seeds: Sequence[int] | None, stream: str) -> list[int]:
    """One key per image: of (seed, stream), or where there are no seeds of the image's own initial noise, in fp32."""
    if seeds is None:
        rows = noise.detach().to("cpu", torch.float32).contiguous()
        return [image_key(row.numpy().tobytes(), stream) for row in rows]
    if len(seeds) != len(noise):
        raise InputError(f"seeds must be one per image: got {len(seeds)} seeds for {len(noise)} images")
    return [image_key(seed, stream) for seed in seeds]


def white_noise(x: Float[Tensor, "images *latent"], keys: Sequence[int]) -> NoiseSampler:
    """Independent noise at every call (ancestral samplers): one CPU generator per image, read call by call."""
    generators = [torch.Generator().manual_seed(key) for key in keys]
    shape = x.shape[1:]

    def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]).to(x)

    return draw


def tree_end(sigma: float) -> float:
    """An end of a Brownian tree as the tree has it: in fp32, then rounded. At sigma 4096, of zero terminal SNR, the two
    differ by more than the resolution."""
    return round(float(torch.tensor(sigma, dtype=torch.float32)), 6)


def brownian_noise(
    x: Float[Tensor, "images *latent"], keys: Sequence[int], sigmas: Float[Tensor, " sigmas"]
) -> NoiseSampler:
    """Increments of one Brownian path per image (SDE samplers), over exactly the positive `sigmas` that are used.

    Paths live on the CPU in fp32, so that device and precision do not change them. Querying one twice, or in parts,
    gives increments of the same path. They are built at the first draw: a single step draws nothing, and its sigmas
    span no interval.
    """
    low = tree_end(math.floor(float(sigmas[sigmas > 0].min()) / RESOLUTION) * RESOLUTION)
    high = tree_end(math.ceil(float(sigmas.max()) / RESOLUTION) * RESOLUTION)
    template = torch.zeros(x.shape, dtype=torch.float32)
    paths: list[NoiseSampler] = []

    def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        if not paths:
            paths.append(k_diffusion().sampling.BrownianTreeNoiseSampler(template, low, high, seed=list(keys)))
        # a sampler's exp(log(sigma)) may lie a rounding outside of the path
        ends = [torch.tensor(min(max(float(s), low), high), dtype=torch.float64) for s in (sigma, sigma_next)]
        return paths[0](*ends).to(x)

    return draw
