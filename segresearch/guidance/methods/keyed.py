"""What random choices at a site are keyed by."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.models.attention import Site


def keys_and_sigma(
    site: Site, z: Float[Tensor, "rows *shape"], shared: bool = False
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Of every row of z, for `sampling.draws`: an image has the same in all its branches and in every batch.

    shared: key 0 for all images, so that they share their draws. Without a run all are zeros.
    """
    rows, device = z.shape[0], z.device
    keys = torch.zeros(1, dtype=torch.int64, device=device) if shared or site.keys is None else site.keys
    sigma = torch.zeros(1, device=device) if site.sigma is None else site.sigma
    return keys.repeat(rows // keys.shape[0]), sigma.repeat(rows // sigma.shape[0])
