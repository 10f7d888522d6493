"""One call of `sample`: the key of each image, the schedule, and what methods remember from one sigma to the next."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor

from segresearch.errors import InputError


class Memory:
    """States by owner and sigma; `Past` reads and writes them."""

    def __init__(self) -> None:
        self.states: dict[Hashable, dict[float, Any]] = {}


@dataclass(frozen=True)
class Run:
    """What the evaluations of one `sample` have in common; `sample` makes it and hands it to `model.prepare`.

    keys: one number an image, from which all random choices are drawn (`sampling.draws`).
    sampler: its name. sigmas: the schedule's, falling to 0; None where the sampler chooses its own.
    memory: empty in a new run and in a copy of one (`dataclasses.replace`).
    """

    keys: Int[Tensor, " images"]
    sampler: str = "euler"
    sigmas: tuple[float, ...] | None = None
    memory: Memory = field(init=False, default_factory=Memory, repr=False, compare=False)

    def schedule(self, owner: str) -> tuple[float, ...]:
        """The schedule's sigmas. InputError where the sampler chooses its own."""
        if self.sigmas is None:
            text = f"{owner} needs the sigmas of the schedule, and {self.sampler} with these options chooses its own"
            raise InputError(f"{text}; take euler, heun, dpmpp_2m or another sampler that follows the schedule")
        return self.sigmas


@dataclass(frozen=True)
class Past:
    """What one method remembers, as seen from one evaluation at `sigma`.

    The state of a sigma of the schedule is the one that its last evaluation wrote. `read` gives that of the closest
    sigma above this one, so a second evaluation at a sigma (heun's) starts from the same state as the first. An
    evaluation between two sigmas of the schedule (dpm_2's) reads, and what it writes is dropped. Without a run nothing
    is remembered.
    """

    run: Run | None
    owner: Hashable
    sigma: float

    def read(self) -> Any:
        """The state after the sigma before this one; None at the first."""
        states = {} if self.run is None else self.run.memory.states.get(self.owner, {})
        above = [sigma for sigma in states if sigma > self.sigma]
        return states[min(above)] if above else None

    def write(self, state: Any) -> None:
        """Keep `state` as that of this sigma."""
        name = self.owner if isinstance(self.owner, str) else type(self.owner[0]).__name__  # type: ignore[index]
        if self.run is None or self.sigma not in self.run.schedule(name):
            return
        states = self.run.memory.states.setdefault(self.owner, {})
        states[self.sigma] = state
        for sigma in sorted(states)[2:]:  # only this one and the one before it are read again
            del states[sigma]


NOTHING = Past(None, "", 0.0)
