"""What belongs to an image among the arguments of a model: counting rows, and cutting out one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from segresearch.errors import InputError


def row_count(value: Any) -> int | None:
    """Rows of a tensor with axes or of an object that says so (`rows`); None for anything else."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    rows = getattr(value, "rows", None)
    return rows if isinstance(rows, int) else None


def checked_rows(name: str, value: Any, images: int) -> None:
    """ValueError, with its position in `value`, where something in it has rows that are neither one nor `images`."""
    rows = row_count(value)
    if rows is not None and rows not in (1, images):
        raise InputError(f"{name} has {rows} rows for {images} images of noise; give one row per image, or one for all")
    if rows is None and isinstance(value, Mapping):
        for key, item in value.items():
            checked_rows(f"{name}[{key!r}]", item, images)


def one_row(value: Any, index: int, images: int) -> Any:
    """`value` for image `index` alone: everything in it that has a row per image is cut to that row.

    Descends into mappings, lists, tuples and dataclasses; what has another count of rows, or none, stays as it is.
    """
    if isinstance(value, nn.Module):
        return value
    rows = row_count(value)
    if rows is not None:
        return value[index : index + 1] if rows == images else value
    if isinstance(value, Mapping):
        return {key: one_row(item, index, images) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [one_row(item, index, images) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value) if field.init)
        return dataclasses.replace(value, **{name: one_row(getattr(value, name), index, images) for name in fields})
    return value
