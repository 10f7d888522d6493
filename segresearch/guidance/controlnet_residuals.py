"""The residuals of the active ControlNets at one step: computed once for each conditioning, whatever the branches."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from segresearch.errors import InputError
from segresearch.guidance.step import Latents, Sigma
from segresearch.models.conditioning import Cond
from segresearch.models.controlnet import ActiveControlNet
from segresearch.models.unet import ControlResiduals


def active(control: Any) -> tuple[ActiveControlNet, ...]:
    """The ControlNets in the `control` of a call; None is none. An iterable is read once.

    Raises InputError for anything that is not made by `controlled`.
    """
    if control is None:
        return ()
    if isinstance(control, ActiveControlNet) or not isinstance(control, Iterable):
        kind = type(control).__name__
        raise InputError(f"control is a sequence of ControlNets in use: write control=[controlled(...)], got {kind}")
    nets = tuple(control)
    wrong = next((net for net in nets if not isinstance(net, ActiveControlNet)), None)
    if wrong is not None:
        kind = type(wrong).__name__
        raise InputError(f"control is a sequence of ControlNets in use: [controlled(net, image)], got a {kind} in it")
    return nets


def residuals(
    denoiser: Any,
    x: Latents,
    sigma: Sigma,
    conditionings: Sequence[str],
    joined: Callable[[Sequence[str], int], Cond],
    base: str,
    control: Sequence[ActiveControlNet],
    values: Sequence[float] | None = None,
) -> ControlResiduals | None:
    """Σ scale · residual of all ControlNets, for the rows of each conditioning in turn (len(conditionings) · rows).

    joined: the rows of several conditionings, one after another (`Prepared.joined`). values: sigma.tolist(), where the
    caller has read it. None is returned where every scale is 0 or σ is outside every interval: nothing is computed.

    A perturbed branch has the x and the conditioning of the branch that it perturbs, so it shares that one's residuals.
    ControlNets are never perturbed. With `guess` only the rows of the conditioning `base` get residuals.
    Raises InputError for a hint of another number of rows, or of a size that does not fit x.
    """
    total = None
    values = sigma.tolist() if control and values is None else values or ()
    for net in control:
        if net.rows not in (1, len(x)):
            raise InputError(f"a ControlNet has {net.rows} control images for {len(x)} images; it needs {len(x)} or 1")
        scales = [net.scale_at(s) for s in values]
        names = [name for name in conditionings if name == base or not net.guess]
        if not any(scales) or not names:
            continue
        n = len(names)
        hint = net.hint if net.rows == 1 else net.hint.repeat(n, 1, 1, 1)  # (b, c, h, w) -> (n·b, c, h, w)
        cond = joined(names, len(x))
        residual = denoiser.residuals(x.repeat(n, 1, 1, 1), sigma.repeat(n), cond, net.net, hint, net.guess)
        if set(scales) != {1.0}:
            factor = per_row(scales * n, residual.mid)
            residual = residual.each(lambda r, factor=factor: r * factor)
        if n < len(conditionings):
            zeros = [name != base for name in conditionings]
            residual = residual.each(lambda r, zeros=zeros: torch.cat([torch.zeros_like(r) if z else r for z in zeros]))
        total = residual if total is None else total + residual
    return total


def per_row(scales: Sequence[float], like: Latents) -> float | Tensor:
    """A factor for each row: a number where they are all one, so that nothing moves to the device."""
    if len(set(scales)) == 1:
        return scales[0]
    return torch.tensor(scales, dtype=like.dtype, device=like.device)[:, None, None, None]
