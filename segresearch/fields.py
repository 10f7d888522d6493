"""Types of fields with their limits, for dataclasses that pydantic reads. Light: no torch.

"inf" is a number wherever a number is expected; true and NaN are not.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, Strict, TypeAdapter
from pydantic_core import PydanticCustomError


def within(low: float | int, high: float | int = math.inf, whole: bool = False) -> PlainValidator:
    """The check of a number, or of a whole one, from `low` to `high`."""
    noun = "a whole number" if whole else "a number"
    limits = f">= {low:g}" if high == math.inf else f"from {low:g} to {high:g}"

    def check(value: Any) -> float | int:
        try:
            number = value if whole else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not isinstance(number, int if whole else float) or math.isnan(number):
            raise PydanticCustomError("type", noun)  # type: ignore[arg-type]
        if not low <= number <= high:
            raise PydanticCustomError("range", f"{noun} {limits}")  # type: ignore[arg-type]
        return number

    return PlainValidator(check)


def one_of(*choices: str) -> PlainValidator:
    """The check of a text that is one of `choices`, for a field that is `str` in Python."""
    return PlainValidator(TypeAdapter(Literal[choices]).validate_python)  # type: ignore[arg-type]


Number = Annotated[float | int, within(-math.inf)]
NonNegative = Annotated[float | int, within(0)]
Fraction = Annotated[float | int, within(0, 1)]
Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Boundary = Annotated[str, one_of("reflect", "symmetric", "circular", "exact")]  # of SEG's blur, see `blur_matrix`
Count = Annotated[int, within(1, 100_000_000, whole=True)]
