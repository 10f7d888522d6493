"""Perturbations of every kind of site, and a branch through a forward of its own, for the tests of branches."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from segresearch.guidance import select_sites
from segresearch.models.attention import sdpa
from segresearch.models.conditioning import Cond

close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def halved(h, site, call):
    return 0.5 * call(h)


def without_attention(h, site, call):
    return call(h, without=("attn1",))


def flipped(h, site, call):
    return call(h.flip(1))


def later(t, site, call):
    return call(t + 30.0)


def sharper(q, k, v, site, attend):
    return attend(2 * q, k, v, site)


def doubled(q, k, v, site, attend):
    return 2 * attend(q, k, v, site)


def alone(inner, x, sigma, cond, perturbations, **more):
    """One branch through a forward of its own, with no rows shared: its perturbations written as plain wrappers."""
    kinds = inner.unet.sites_by_kind

    def at(site):
        own = [p for p in perturbations if getattr(p, "site_kind", "self") == site.kind]
        return [p for p in own if site.name in select_sites(p.where, tuple(kinds[site.kind]))]

    def attend(q, k, v, site):
        call = sdpa
        for p in at(site):
            call = partial(lambda p, earlier, *arguments: p(*arguments, earlier), p, call)
        return call(q, k, v, site)

    def wrap(call, h, site):
        for p in at(site):
            call = partial(lambda p, earlier, h, **options: p(h, site, partial(earlier, **options)), p, call)
        return call(h)

    return inner(x, sigma, cond=cond, attend=attend, wrap=wrap, **more)


@dataclass(frozen=True)
class Scaled:
    """Another conditioning scaled by a factor, or by sigma."""

    of: str
    factor: float | None = None
    calls: ClassVar[list] = []

    @property
    def static(self):
        return self.factor is not None

    def __call__(self, conds, sigma, keys):
        self.calls.append(self.of)
        cond = conds[self.of]
        factor = self.factor or sigma[:, None, None]
        return Cond(cond.context * factor, cond.pooled, cond.time_ids)


@dataclass(frozen=True)
class Halves:
    """The left and the right half of an image, apart."""

    site_kind: ClassVar[str] = "view"

    def split(self, z):
        return torch.cat(z.chunk(2, dim=3))

    def join(self, denoised, like):
        return torch.cat(denoised.chunk(2), dim=3)


@dataclass(frozen=True)
class Other:
    network: str = "weak"
    site_kind: ClassVar[str] = "network"


@dataclass(frozen=True)
class Averaged:
    """Attention with the mean of the queries of this and the earlier sigma."""

    where: str = "mid"
    remembers: ClassVar[bool] = True

    def __call__(self, q, k, v, site, attend):
        before = site.past.read()
        site.past.write(q)
        return attend(q if before is None else (q + before) / 2, k, v, site)
