"""One call of `sample`: the key of each image, the levels, and what methods remember from one level to the next."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor

from segresearch.errors import InputError


@dataclass(frozen=True)
class Run:
    """What the evaluations of one `sample` have in common; `sample` makes it and hands it to `model.prepare`.

    keys: one number an image, from which all random choices are drawn (`sampling.draws`).
    sampler: its name. sigmas: the levels it goes through, falling to 0; None where it chooses its own levels.
    states: what methods remember, by owner and level; use `Past`. A copy of a run (`dataclasses.replace`) starts empty.
    """

    keys: Int[Tensor, " images"]
    sampler: str = "euler"
    sigmas: tuple[float, ...] | None = None
    states: dict[Hashable, dict[float, Any]] = field(init=False, default_factory=dict, repr=False, compare=False)

    def levels(self, owner: str) -> tuple[float, ...]:
        """The sigmas. InputError where the sampler chooses its own."""
        if self.sigmas is None:
            text = f"{owner} needs the levels of the schedule, and {self.sampler} here chooses its own"
            raise InputError(f"{text}; take euler, heun, dpmpp_2m or another sampler that follows the schedule")
        return self.sigmas


@dataclass(frozen=True)
class Past:
    """What one method remembers, as seen from one evaluation at noise level sigma.

    The state of a level is the one that its last evaluation wrote. `read` gives that of the closest level above sigma,
    so a second evaluation at a level (heun's) starts from the same state as the first. An evaluation between two levels
    (dpm_2's) reads, and what it writes is dropped. Without a run nothing is remembered.
    """

    run: Run | None
    owner: Hashable
    sigma: float

    def read(self) -> Any:
        """The state after the level before this one; None at the first."""
        states = {} if self.run is None else self.run.states.get(self.owner, {})
        above = [level for level in states if level > self.sigma]
        return states[min(above)] if above else None

    def write(self, state: Any) -> None:
        """Keep `state` as that of this level."""
        if self.run is None or self.sigma not in self.run.levels(str(self.owner)):
            return
        states = self.run.states.setdefault(self.owner, {})
        states[self.sigma] = state
        for level in sorted(states)[2:]:  # only the level itself and the one before it are read again
            del states[level]


NOTHING = Past(None, "", 0.0)
