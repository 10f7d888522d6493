"""Numbers as tables and commands print them. Light: imports nothing heavy."""

import math


def rounded(value: float | int, error: float | None = None, digits: int = 3) -> str:
    """ "7.25 ± 0.25": to two digits of the error where there is one, else `digits` after the point."""
    if error and math.isfinite(error):
        digits = min(max(1 - math.floor(math.log10(error)), 0), 6)
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"
