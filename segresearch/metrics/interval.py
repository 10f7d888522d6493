"""Intervals around a distance from its bootstrap over pictures."""

import math

import torch

from segresearch.errors import InputError
from segresearch.metrics.frechet import Frechet


def interval(found: Frechet, level: float = 0.95) -> tuple[float, float]:
    """An interval for the distance that N pictures of this model give on average, at this N, reference as given.

    Resampled distances are larger than the one they come from, by about their bias at N, so their spread is taken about
    their own mean and laid around `found.distance`: (d + q_low − mean, d + q_high − mean). The bias of d itself against
    infinitely many pictures stays: see `Frechet.extrapolated`. ValueError for fewer draws than the level needs.
    """
    if not 0 < level < 1:
        raise InputError(f"level={level}: must lie between 0 and 1")
    least = math.ceil(2 / (1 - level) - 1e-9)
    if len(found.draws) < least:
        raise InputError(f"{len(found.draws)} draws: an interval of {level:.0%} needs frechet_distance(draws={least})")
    draws = torch.tensor(found.draws, dtype=torch.float64)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (found.distance + draws.quantile(ends) - draws.mean()).tolist()
    return max(0.0, low), high
