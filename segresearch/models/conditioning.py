"""The conditioning of the UNet: text, pooled text and image sizes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError


@dataclass(frozen=True, eq=False)
class Projection:
    """The part of a forward pass that depends on the conditioning alone: computed once a prompt, not once a step.

    added: embedding of the pooled text and the sizes. text: keys and values at every cross-attention, by its name.
    """

    added: Float[Tensor, "rows e"]
    text: Mapping[str, tuple[Float[Tensor, "rows _h _text _d"], Float[Tensor, "rows _h _text _d"]]]

    @property
    def rows(self) -> int:
        return self.added.shape[0]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Projection":
        return Projection(change(self.added), {name: (change(k), change(v)) for name, (k, v) in self.text.items()})

    @staticmethod
    def cat(parts: Sequence["Projection"]) -> "Projection":
        """Rows of all, one after another."""
        text = {name: tuple(map(torch.cat, zip(*(p.text[name] for p in parts), strict=True))) for name in parts[0].text}
        return Projection(torch.cat([p.added for p in parts]), text)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cond:
    """SDXL's conditioning, one row an image.

    context: hidden states of both text encoders, side by side.
    pooled: pooled text embedding of the second encoder.
    time_ids: original height and width, crop top and left, target height and width, in pixels.
    projections: cached projections by network; see `projected` and `for_network`.
    """

    context: Float[Tensor, "rows text dim"]
    pooled: Float[Tensor, "rows pooled"]
    time_ids: Float[Tensor, "rows 6"]
    projections: Mapping[Any, Projection] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> int:
        return self.context.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Cond":
        """Moved and cast, without projections; time_ids stay float32 at least: bf16 holds no size above 256 exactly."""
        ids = self.time_ids.to(device=device, dtype=dtype if dtype == torch.float64 else None)
        return Cond(self.context.to(device, dtype), self.pooled.to(device, dtype), ids)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> "Cond":
        """The chosen rows."""
        return self._each(lambda z: z[index])

    def expand(self, rows: int) -> "Cond":
        """One row as `rows` rows, without a copy."""
        return self._each(lambda z: z.expand(rows, *z.shape[1:]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Cond":
        projections = {net: projection.each(change) for net, projection in self.projections.items()}
        return Cond(change(self.context), change(self.pooled), change(self.time_ids), projections)

    def projected(self, *nets: Any) -> "Cond":
        """With the projections of these networks (`UNet.project`), for as long as their weights stay as they are."""
        return replace(self, projections={**self.projections, **{net: net.project(self) for net in nets}})

    def for_network(self, net: Any) -> "Projection | Cond":
        """The cached keys and values for `net`, or the conditioning itself."""
        return self.projections.get(net, self)

    def projected_by(self, net: Any) -> Projection:
        """The keys and values for `net`, cached or computed now."""
        return self.projections.get(net) or net.project(self)

    def equals(self, other: "Cond") -> bool:
        """Whether the two hold the same values."""
        mine, its = ((c.context, c.pooled, c.time_ids) for c in (self, other))
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(mine, its, strict=True))

    @staticmethod
    def cat(conds: Sequence["Cond"]) -> "Cond":
        """Rows of all, one after another.

        Raises ValueError if the text lengths differ: attention has no mask here, so padding would change the result.
        """
        if len(conds) == 1:
            return conds[0]
        lengths = {c.context.shape[1] for c in conds}
        if len(lengths) > 1:
            raise InputError(
                f"conditionings of different text lengths {sorted(lengths)} cannot share a batch: "
                "encode them to one length (both prompt and negative through the same `encode`)"
            )
        context, pooled, ids = map(torch.cat, zip(*((c.context, c.pooled, c.time_ids) for c in conds), strict=True))
        shared = [net for net in conds[0].projections if all(net in c.projections for c in conds)]
        return Cond(context, pooled, ids, {net: Projection.cat([c.projections[net] for c in conds]) for net in shared})
