"""What the UNet is told besides x and t."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """SDXL's conditioning, one row an image.

    context: hidden states of both text encoders, side by side.
    pooled: pooled text embedding of the second encoder.
    time_ids: original height and width, crop top and left, target height and width, in pixels.
    """

    context: Float[Tensor, "rows text dim"]
    pooled: Float[Tensor, "rows pooled"]
    time_ids: Float[Tensor, "rows 6"]

    @property
    def rows(self) -> int:
        return self.context.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Cond":
        """Moved and cast; time_ids stay float32 at least, since bf16 cannot hold a size above 256 exactly."""
        ids = dtype if dtype == torch.float64 else None
        return Cond(
            self.context.to(device, dtype), self.pooled.to(device, dtype), self.time_ids.to(device=device, dtype=ids)
        )

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> "Cond":
        """The chosen rows."""
        return Cond(self.context[index], self.pooled[index], self.time_ids[index])

    @staticmethod
    def cat(conds: Sequence["Cond"]) -> "Cond":
        """Rows of all, one after another.

        Raises ValueError if the text lengths differ: attention has no mask here, so padding would change the result.
        """
        lengths = {c.context.shape[1] for c in conds}
        if len(lengths) > 1:
            raise ValueError(
                f"conditionings of different text lengths {sorted(lengths)} cannot share a batch: "
                "encode them to one length (both prompt and negative through the same `encode`)"
            )
        return Cond(
            torch.cat([c.context for c in conds]),
            torch.cat([c.pooled for c in conds]),
            torch.cat([c.time_ids for c in conds]),
        )
