"""The settings of what is drawn, and of what an analysis measures. Light: no torch."""

import math
from dataclasses import dataclass
from typing import Annotated

from segresearch.config.validate import Record
from segresearch.fields import Boundary, Count, NonNegative, within


@dataclass(frozen=True)
class GridConfig(Record):
    """How the grid is drawn: pixels a cell (None: by the images' size), most rows a panel, panels side by side."""

    cell: Annotated[int, within(16, 2048, whole=True)] | None = None
    rows: Count = 64
    across: Count = 2
    title: str | None = None


@dataclass(frozen=True)
class BlurConfig(Record):
    """The blurs that the captured queries are measured under: every sigma (tokens, 0 to inf) with every boundary."""

    sigmas: tuple[NonNegative, ...] = (0.5, 1.0, 2.0, 4.0, math.inf)
    boundaries: tuple[Boundary, ...] = ("reflect", "symmetric", "circular", "exact")
