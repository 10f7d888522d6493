"""The conditionings of a run: those of the call, those that are made from them, and their rows joined for a batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segresearch.errors import InputError
from segresearch.models.conditioning import Cond


def made(
    makers: Mapping[str, Any],
    conds: Mapping[str, Cond],
    static: bool,
    sigma: Float[Tensor, " rows"] | None = None,
    keys: Int[Tensor, " rows"] | None = None,
) -> dict[str, Cond]:
    """`conds` and those that `makers` make of them: once a run (static), or at every evaluation.

    InputError for a maker of a conditioning that `conds` lacks, or whose result is no Cond.
    """
    active = {n: make for n, make in makers.items() if callable(make) and getattr(make, "static", False) == static}
    for make in active.values():
        name = getattr(make, "of", None)
        if name is not None and name not in conds:
            raise InputError(f"conds lacks {name!r}, which {make!r} is made of; there are {', '.join(conds) or 'none'}")
    results = {name: make(conds, sigma, keys) for name, make in active.items()}
    for name, cond in results.items():
        if not isinstance(cond, Cond):
            raise InputError(f"conditionings[{name!r}]: {active[name]!r} made {type(cond).__name__}, not a Cond")
        if not any(cond is other for other in conds.values()):  # its cached keys may be of another text
            results[name] = replace(cond, projections={})
    return {**conds, **results}


class Prepared(Mapping[str, Cond]):
    """Conditionings by name, for a run of calls: what a batch needs of several is joined at its first call.

    It cannot be changed; for other conditionings call `prepare` again.
    """

    def __init__(self, conds: Mapping[str, Cond]):
        self._conds = dict(conds)
        self.joins: dict[tuple[tuple[str, ...], int, int, Any], Cond] = {}

    def __getitem__(self, name: str) -> Cond:
        return self._conds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._conds)

    def __len__(self) -> int:
        return len(self._conds)

    def with_rows(self, conds: Mapping[str, Cond]) -> "Prepared":
        """The same for other rows; `sample` cuts a batch into images by this."""
        return Prepared(conds)

    def joined(self, names: Sequence[str], rows: int, times: int = 1, view: Any = None) -> Cond:
        """`rows` rows of each of these conditionings, each `times` times, one after another; the image of each in the
        parts that `view` makes of x."""
        key = (tuple(names), rows, times, view)
        if key not in self.joins:
            parts = [with_rows(name, self[name], rows) for name in names]
            cond = Cond.cat([part for part in parts for _ in range(times)])
            if view is not None and cond.image is not None:
                cond = replace(cond, image=torch.cat([view.split(part.image) for part in parts]))
            self.joins[key] = cond
        return self.joins[key]


def with_rows(name: str, cond: Cond, rows: int) -> Cond:
    """The conditioning of this name with `rows` rows. InputError where it has neither one nor as many."""
    if cond.rows == rows:
        return cond
    if cond.rows == 1:
        return cond.expand(rows)
    raise InputError(f"conds[{name!r}] has {cond.rows} rows for {rows} images; it needs {rows} or 1")
