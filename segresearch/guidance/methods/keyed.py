"""Random choices at a site, which an image has in every branch and batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from segresearch.models.attention import Site


def keyed(draw: Callable[..., Tensor], h: Tensor, site: Site, what: str, *args: Any, shared: bool = False) -> Tensor:
    """`draw(keys, sigma, name, *args)` of `sampling.draws` for every row of h, (rows, ...).

    The rows of h are equal parts, one for each entry of `site.branches`, and each part holds the same images. An image
    has one draw, which all parts take. It depends on the image's key, sigma, the site and `what`, not on the batch.
    shared: key 0 for all images, so that all take one draw. Without a run, keys and sigma are zeros.
    """
    rows = len(h) // max(len(site.branches), 1)
    keys = site.keys
    if shared or keys is None:
        keys = torch.zeros(rows, dtype=torch.int64, device=h.device)
    sigma = torch.zeros(rows, device=h.device) if site.sigma is None else site.sigma
    drawn = draw(keys, sigma, f"{site.name}/{what}", *args)
    return drawn.repeat(len(h) // rows, *[1] * (drawn.ndim - 1))  # (rows of a part, ...) -> (rows, ...)
