"""Improved precision and recall (arXiv 1904.06991): is an image within the k-nearest-neighbour balls of a set?

The balls around the features of a set reach to the k-th nearest other feature of it. Precision: share of generated
features in a ball of the reference; recall: share of the reference in a ball of the generated. Both depend on N (balls
shrink as it grows), so they compare only at equal N on either side.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.metrics.mmd import checked_sets
from segresearch.threads import few_features, one_thread_for

ROUNDING = 1e-13  # squared distances below this times the squared lengths are rounding, and count as 0


@dataclass(frozen=True)
class PrecisionRecall:
    """Both shares, and what they rest on: n generated against n_reference, the k-th nearest neighbour, dim features."""

    precision: float
    recall: float
    n: int
    n_reference: int
    neighbour: int
    dim: int


def _squared_distances(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """Exactly 0 between equal features."""
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)  # (n, dim), (m, dim) -> (n, m)
    squares = lengths - 2 * x @ y.T
    return squares.where(squares > ROUNDING * lengths, 0)


def squared_radii(x: Float[Tensor, "n dim"], neighbour: int = 3, block: int = 1024) -> Float[Tensor, " n"]:
    """Squared distance of each feature to its k-th nearest other one (itself is the first)."""
    return torch.cat([_squared_distances(rows, x).kthvalue(neighbour + 1, dim=1).values for rows in x.split(block)])


def covered(
    x: Float[Tensor, "n dim"], centres: Float[Tensor, "m dim"], radii: Float[Tensor, " m"], block: int = 1024
) -> float:
    """Share of x that lies within one of the balls of squared radii, whose edge belongs to them."""
    inside = [(_squared_distances(rows, centres) <= radii).any(1) for rows in x.split(block)]
    return torch.cat(inside).double().mean().item()


@one_thread_for(few_features)
def precision_recall(
    features: Float[Tensor, "n dim"], reference: Float[Tensor, "m other"], neighbour: int = 3, block: int = 1024
) -> PrecisionRecall:
    """Precision and recall of generated features against a reference, in fp64, N stated.

    Memory beside the features is one block × max(n, m) matrix of distances. InputError for as few images as
    `neighbour`, for values that are not finite or features of another number.
    """
    x, y = checked_sets(features, reference, least=0)
    n, m = len(x), len(y)
    if not 1 <= neighbour < min(n, m):
        raise InputError(f"neighbour={neighbour}: must lie between 1 and {min(n, m) - 1}, for {n} and {m} images")
    centre = y.mean(0)  # distances do not change, their rounding shrinks
    x, y = x - centre, y - centre
    precision = covered(x, y, squared_radii(y, neighbour, block), block)
    recall = covered(y, x, squared_radii(x, neighbour, block), block)
    return PrecisionRecall(precision, recall, n, m, neighbour, x.shape[1])
