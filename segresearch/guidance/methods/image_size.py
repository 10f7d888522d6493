"""Conditionings of another image size."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from segresearch.errors import InputError
from segresearch.fields import NonNegative
from segresearch.models.conditioning import Cond


@dataclass(frozen=True)
class ImageSize:
    """A conditioning with the sizes of a smaller original image, as of SDXL's `negative_original_size` (2307.01952).

    c with time_ids (factor·H, factor·W, top, left, H, W): the network is told that the training image was enlarged, and
    it learnt that such images are blurred. As the `neg` of a term it guides away from that; D[c] + s·(D[c] −
    D[c_small]) is the same in every space. The papers name no values; diffusers' documentation shows 512 of 1024 px,
    factor 0.5. mini has seen one size only, and takes no notice that means anything.

    of: the conditioning that is changed. factor: of the original size.
    """

    kind: Literal["image_size"] = field(default="image_size", kw_only=True, repr=False)
    static: ClassVar[bool] = True
    of: str = "cond"
    factor: NonNegative = 0.5

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise InputError(f"ImageSize factor must be > 0, got {self.factor!r}")

    def __call__(self, conds: Mapping[str, Cond], sigma: Any = None, keys: Any = None) -> Cond:
        """`of` with the original size times factor. InputError for a model without sizes."""
        cond = conds[self.of]
        if not cond.time_ids.shape[1]:
            raise InputError("ImageSize: this model has no image sizes in its conditioning (SDXL's has)")
        ids = cond.time_ids.clone()  # (rows, ids)
        ids[:, :2] *= self.factor
        return replace(cond, time_ids=ids, projections={})
