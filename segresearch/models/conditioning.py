"""The conditioning of the UNet: text, pooled text and image sizes; further channels and an embedded guidance weight."""

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

    added: embedding of the pooled text and the sizes, None in a network without these. text: keys and values at every
    cross-attention, by its name. guidance: embedding of the guidance weight, in a network that has one.
    """

    added: Float[Tensor, "rows e"] | None
    text: Mapping[str, tuple[Float[Tensor, "rows _h _text _d"], Float[Tensor, "rows _h _text _d"]]]
    guidance: Float[Tensor, "rows _c"] | None = None

    @property
    def rows(self) -> int:
        return next(iter(self.text.values()))[0].shape[0] if self.added is None else self.added.shape[0]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Projection":
        """Every tensor changed by one function."""
        text = {name: (change(k), change(v)) for name, (k, v) in self.text.items()}
        return Projection(optional(change, self.added), text, optional(change, self.guidance))

    @staticmethod
    def cat(parts: Sequence["Projection"]) -> "Projection":
        """Rows of all, one after another."""
        text = {name: tuple(map(torch.cat, zip(*(p.text[name] for p in parts), strict=True))) for name in parts[0].text}
        added, guidance = (joined([getattr(p, name) for p in parts]) for name in ("added", "guidance"))
        return Projection(added, text, guidance)  # type: ignore[arg-type]


def optional(change: Callable[[Tensor], Tensor], z: Tensor | None) -> Tensor | None:
    """The tensor, changed, where there is one."""
    return None if z is None else change(z)


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of all, one after another; None where none of them is there."""
    return None if parts[0] is None else torch.cat(parts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cond:
    """The conditioning of one model, one row an image.

    context: hidden states of the text encoders, side by side.
    pooled: pooled text embedding of the last encoder; 0 wide where the model reads none (SD 1.5, 2.1).
    time_ids: original height and width, crop top and left, then target height and width in pixels (SDXL), or the
        aesthetic score (its refiner); 0 wide where the model has no such input (SD 1.5, 2.1).
    image: further channels of the UNet's input beside the latents, as they are: mask and masked-image latents
        (inpainting, 5), image latents (instruct-pix2pix, 4).
    guidance: the guidance weight that the UNet embeds (LCM), as diffusers' `guidance_scale` counts.
    projections: cached projections by network; see `projected` and `for_network`.
    latent: (h, w) of the latents of the images that time_ids tell the model of; None where it reads no size.
    """

    context: Float[Tensor, "rows text dim"]
    pooled: Float[Tensor, "rows pooled"]
    time_ids: Float[Tensor, "rows ids"]
    image: Float[Tensor, "rows extra _h _w"] | None = None
    guidance: Float[Tensor, " rows"] | None = None
    projections: Mapping[Any, Projection] = field(default_factory=dict, repr=False, compare=False)
    latent: tuple[int, int] | None = field(default=None, repr=False, compare=False)

    @property
    def rows(self) -> int:
        return self.context.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Cond":
        """Moved and cast, without projections. What is no text stays float32 at least: bf16 holds no size above 256
        exactly, and the latents beside the image are float32."""
        wide = dtype if dtype == torch.float64 else None
        ids, image, guidance = (optional(lambda z: z.to(device=device, dtype=wide), z) for z in self.beside)
        context, pooled = self.context.to(device, dtype), self.pooled.to(device, dtype)
        return Cond(context, pooled, ids, image, guidance, latent=self.latent)  # type: ignore[arg-type]

    @property
    def beside(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What is no text: time_ids, image and guidance."""
        return self.time_ids, self.image, self.guidance

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> "Cond":
        """The chosen rows."""
        return self._each(lambda z: z[index])

    def expand(self, rows: int) -> "Cond":
        """One row as `rows` rows, without a copy."""
        return self._each(lambda z: z.expand(rows, *z.shape[1:]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Cond":
        projections = {net: projection.each(change) for net, projection in self.projections.items()}
        ids, image, guidance = (optional(change, z) for z in self.beside)
        context, pooled = change(self.context), change(self.pooled)
        return Cond(context, pooled, ids, image, guidance, projections, self.latent)  # type: ignore[arg-type]

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
        for a, b in zip((self.context, self.pooled, *self.beside), (other.context, other.pooled, *other.beside)):
            if a is None or b is None:
                if a is not b:
                    return False
            elif a.shape != b.shape or not torch.equal(a, b):
                return False
        return True

    @staticmethod
    def cat(conds: Sequence["Cond"]) -> "Cond":
        """Rows of all, one after another.

        InputError if the text lengths differ: attention has no mask here, so padding would change the result. Also if
        some have an image or a guidance weight and others have none.
        """
        if len(conds) == 1:
            return conds[0]
        lengths = {c.context.shape[1] for c in conds}
        if len(lengths) > 1:
            raise InputError(
                f"conditionings of different text lengths {sorted(lengths)} cannot share a batch: "
                "encode them to one length (both prompt and negative through the same `encode`)"
            )
        for name in ("image", "guidance"):
            if len({getattr(c, name) is None for c in conds}) > 1:
                raise InputError(f"conditionings with and without `{name}` cannot share a batch: all or none have it")
        parts = zip(*((c.context, c.pooled, *c.beside) for c in conds), strict=True)
        context, pooled, ids, image, guidance = map(joined, parts)
        shared = [net for net in conds[0].projections if all(net in c.projections for c in conds)]
        projections = {net: Projection.cat([c.projections[net] for c in conds]) for net in shared}
        return Cond(context, pooled, ids, image, guidance, projections)  # type: ignore[arg-type]
