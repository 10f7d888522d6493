"""What the ControlNets add at one step: each distinct conditioning once, whatever branches there are."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import Controlled, weighted
from segresearch.models.unet import Control


def in_use(control: Any) -> tuple[Controlled, ...]:
    """What `control` of a call holds, None standing for nothing; any iterable is read once.

    Raises ValueError for what is not made by `controlled`.
    """
    if control is None:
        return ()
    if isinstance(control, Controlled) or not isinstance(control, Iterable):
        kind = type(control).__name__
        raise InputError(f"control is a sequence of ControlNets in use: write control=[controlled(...)], got {kind}")
    found = tuple(control)
    wrong = next((one for one in found if not isinstance(one, Controlled)), None)
    if wrong is not None:
        kind = type(wrong).__name__
        raise InputError(f"control is a sequence of ControlNets in use: [controlled(net, image)], got a {kind} in it")
    return found


def residuals(
    denoiser: Any,
    x: Float[Tensor, "rows c h w"],
    sigma: Float[Tensor, " rows"],
    conds: Sequence[str],
    joined: Callable[[Sequence[str], int], Cond],
    base: str,
    control: Sequence[Controlled],
    values: Sequence[float] | None = None,
) -> Control | None:
    """Σ scale · residual of all ControlNets, for the rows of each of `conds` in turn (len(conds) · rows in all).

    conds: names of conditionings. joined: the rows of several, one after another (`Prepared.joined`).

    None where every scale is 0 or σ is outside every interval: nothing is then computed. A perturbed branch has the x
    and the conditioning of the branch it perturbs, so it shares that one's residuals; ControlNets are never perturbed.
    With `guess` only the rows of the conditioning `base` get any. values: sigma.tolist(), where the caller has read it.
    Raises ValueError for a hint of another number of rows, or what does not fit x.
    """
    total = None
    if control and values is None:
        values = sigma.tolist()
    for one in control:
        if one.rows not in (1, len(x)):
            raise InputError(f"a ControlNet has {one.rows} control images for {len(x)} images; it needs {len(x)} or 1")
        scales = [one.scale_at(s) for s in values or ()]
        names = [name for name in conds if name == base or not one.guess]
        if not any(scales) or not names:
            continue
        n = len(names)
        hint = one.hint if one.rows == 1 else one.hint.repeat(n, 1, 1, 1)  # (b, c, h, w) -> (n·b, c, h, w)
        own = denoiser.control(
            x.repeat(n, 1, 1, 1), sigma.repeat(n), joined(names, len(x)), one.net, hint, one.guess
        )
        own = _scaled(own, scales * n)
        if n < len(conds):
            own = _among(own, conds.index(base), len(conds))
        total = own if total is None else _plus(total, own)
    return total


def _scaled(control: Control, scales: Sequence[float]) -> Control:
    """Each row times its scale."""
    if set(scales) == {1.0}:
        return control
    return weighted(control, [per_row(scales, control.mid)] * (len(control.down) + 1))


def per_row(scales: Sequence[float], like: Float[Tensor, "rows c h w"]) -> float | Tensor:
    """A factor for each row: a number where they are all one, so that nothing moves to the device."""
    if len(set(scales)) == 1:
        return scales[0]
    return torch.tensor(scales, dtype=like.dtype, device=like.device)[:, None, None, None]


def _among(control: Control, place: int, blocks: int) -> Control:
    """The control's rows as block number `place` of `blocks`, the others zero."""

    def padded(r: Tensor) -> Tensor:
        zero = torch.zeros_like(r)
        return torch.cat([r if i == place else zero for i in range(blocks)])  # (b, ...) -> (blocks · b, ...)

    return Control(tuple(padded(r) for r in control.down), padded(control.mid))


def _plus(a: Control, b: Control) -> Control:
    return Control(tuple(r + s for r, s in zip(a.down, b.down, strict=True)), a.mid + b.mid)
