"""Rows of a table as CSV. Light: no torch."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def to_csv(rows: Sequence[Mapping[str, Any]], digits: int | None = None) -> str:
    """A column a key, in the order in which the keys first occur; None is empty, infinities are "inf".

    digits: significant digits of floats; None writes all.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.{digits}g}" if digits and isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
