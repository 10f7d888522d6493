"""A claim and what was measured of it."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RELATIONS = ("=", "<=", "<")


@dataclass(frozen=True)
class Verdict:
    """Both sides of one claim `left relation right`, for every column. All tensors (rows, heads, m) fp64.

    claim: the name of the function that judged it. statement: its place in arXiv 2408.00760, then what left and right
    are. relation: "=", "<=" or "<".
    axis, sigma, boundary: of the columns and the blur. n: entries in a column.
    tolerance: what the rounding of both sides can account for. A "<" holds only beyond it, "<=" and "=" up to it.
    """

    claim: str
    statement: str
    relation: str
    axis: str
    sigma: float | int
    boundary: str
    n: int
    left: Float[Tensor, "rows heads m"]
    right: Float[Tensor, "rows heads m"]
    tolerance: Float[Tensor, "rows heads m"]

    def __post_init__(self) -> None:
        assert self.relation in RELATIONS, self.relation

    @property
    def gap(self) -> Float[Tensor, "rows heads m"]:
        """left − right; 0 where both are −inf."""
        return torch.where(self.left == self.right, torch.zeros_like(self.left), self.left - self.right)

    @property
    def margin(self) -> Float[Tensor, "rows heads m"]:
        """By how much the claim holds (positive) or fails (negative): right − left, and −|gap| for an equality."""
        return -self.gap.abs() if self.relation == "=" else -self.gap

    @cached_property
    def holds(self) -> Bool[Tensor, "rows heads m"]:
        return self.margin > self.tolerance if self.relation == "<" else self.margin >= -self.tolerance

    @property
    def fraction(self) -> float:
        """Share of (row, head, column) where the claim holds."""
        return float(self.holds.double().mean())

    @property
    def by_head(self) -> Float[Tensor, "rows heads"]:
        """Share of columns where the claim holds, per row and head."""
        return self.holds.double().mean(dim=-1)

    @property
    def counterexample(self) -> tuple[int, int, int] | None:
        """(row, head, column) where the claim fails by most; None where it holds everywhere."""
        if bool(self.holds.all()):
            return None
        margin = torch.where(self.holds, math.inf, self.margin)
        row, head, column = torch.unravel_index(margin.argmin(), margin.shape)
        return int(row), int(head), int(column)

    def row(self) -> dict[str, object]:
        """One row of a tidy table: medians of both sides and of the gap, extremes of the margin, the counterexample."""
        worst = self.counterexample
        return {
            "claim": self.claim,
            "statement": self.statement,
            "axis": self.axis,
            "boundary": self.boundary,
            "blur_sigma": float(self.sigma),
            "n": self.n,
            "columns": self.left.numel(),
            "fraction": self.fraction,
            "left": float(self.left.median()),
            "right": float(self.right.median()),
            "gap": float(self.gap.median()),
            "margin_min": float(self.margin.min()),
            "margin": float(self.margin.median()),
            "margin_max": float(self.margin.max()),
            "counterexample": "" if worst is None else f"row {worst[0]}, head {worst[1]}, column {worst[2]}",
            "counterexample_left": math.nan if worst is None else float(self.left[worst]),
            "counterexample_right": math.nan if worst is None else float(self.right[worst]),
        }
