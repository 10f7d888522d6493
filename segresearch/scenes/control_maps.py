"""Exact maps of procedural scenes as ControlNet images, in the conventions of SDXL's canny and depth ControlNets."""

from jaxtyping import Bool, Float
from torch import Tensor

from segresearch.errors import InputError


def edge_image(edges: Bool[Tensor, "b h w"]) -> Float[Tensor, "b 3 h w"]:
    """Edges white (1) on black (0), the same in the three channels."""
    return edges.float()[:, None].repeat(1, 3, 1, 1)  # (b, h, w) -> (b, 3, h, w)


def depth_image(depth: Float[Tensor, "b h w"]) -> Float[Tensor, "b 3 h w"]:
    """Inverse distance, scaled for each image from 0 (its farthest finite pixel) to 1 (its nearest); the sky is 0.

    That is what depth estimators give (relative inverse depth, near is bright). depth: distances in any unit, infinite
    where there is nothing. An image without two finite distances is 0 throughout. Raises ValueError for a distance
    that is not positive.
    """
    if not (depth > 0).all():
        raise InputError(f"depth: distances must be positive, the smallest is {depth.min().item():g}")
    inverse = depth.double().reciprocal()  # infinite -> 0
    near = inverse.amax(dim=(1, 2), keepdim=True)
    far = inverse.where(inverse > 0, near).amin(dim=(1, 2), keepdim=True)
    span = (near - far).where(near > far, 1.0)
    scaled = ((inverse - far) / span).clamp(0, 1).where(inverse > 0, 0.0)
    return scaled.to(depth.dtype)[:, None].repeat(1, 3, 1, 1)  # (b, h, w) -> (b, 3, h, w)
