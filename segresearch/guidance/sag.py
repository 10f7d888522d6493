"""Self-Attention Guidance (SAG, arXiv 2210.00939): guide away from the image whose salient parts were blurred."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.guidance.blur import check_blur, constant, fold_taps, gaussian_taps
from segresearch.guidance.controlnet_residuals import per_row
from segresearch.guidance.guided_denoiser import Conds, Control, GuidedDenoiser
from segresearch.guidance.step import Latents, Sigma
from segresearch.guidance.terms import ALWAYS, Branch, Interval, Scale, check_scale, scale_at, scale_text
from segresearch.models.attention import Attend, Heads, KeyHeads, Site
from segresearch.sampling.intervals import check_reach
from segresearch.sampling.memory import Run

TAPS = 9  # of the latent blur, whatever its sigma, as in the published code


class SelfAttentionGuidance:
    """Two forwards a step: the second denoises x̃ = x̂ + σ·ε, where x̂ is D[base] blurred under the first's attention.

        mask = (attention at the first mid site, mean over heads, sum over queries) > threshold, upsampled nearest
        x̂    = D[base](x), its masked latents blurred (9 taps, reflect)
        D    = inner + scale · (x̂ − D[base](x̂ + σ·ε)),   ε = (x − D[base](x))/σ

    The published term is s·(ε − ε̃) between the predictions at x and at x̃ (diffusers: noise_pred − degraded_pred). In
    denoised space this is x̂ − D(x̃): D(x) − D(x̃) would count the blur itself as guidance. It is added before the
    inner's rescale and post-processors. Written in denoised space it needs no scheduler, so any sampler works.

    Args:
        inner: a GuidedDenoiser (its terms stay), or a plain denoiser.
        scale: s, or s(σ); 1.0 in the SEG paper's comparison, 0.75 by default in diffusers.
        blur_sigma: of the latent blur, in latent pixels. threshold: of the mask; 1 is the mean attention.
        base: the conditioning that is degraded. None: the negative one of the inner CFG term where that is on (as
            in diffusers), else the inner's base.
        interval: (low, high) in σ in which it acts; outside there is no second forward.

    Raises ValueError for a scale that is not finite, a negative blur_sigma or threshold, a model without mid sites.
    """

    def __init__(
        self,
        inner: Callable[..., Tensor],
        scale: Scale = 0.75,
        blur_sigma: float | int = 1.0,
        threshold: float | int = 1.0,
        base: str | None = None,
        interval: Interval = ALWAYS,
    ):
        check_scale(scale, interval, "SAG")
        check_blur(blur_sigma, "reflect")
        if not threshold >= 0:
            raise InputError(f"SAG threshold must be >= 0, got {threshold!r}")
        self.inner = inner if isinstance(inner, GuidedDenoiser) else GuidedDenoiser(inner, {})
        self.denoiser, self.prepare = self.inner.denoiser, self.inner.prepare
        mid = [site for site in self.inner.unet.site_heads if site.startswith("mid_block.")]
        if not mid:
            raise InputError("SAG reads the first mid-block self-attention, and this model has none")
        self.site: str = mid[0]
        self.scale, self.interval, self.base = scale, interval, base
        check_reach(interval, self.denoiser, "SAG")
        self.blur_sigma, self.threshold = blur_sigma, threshold

    __getattr__ = GuidedDenoiser.__getattr__  # the schedule of `self.denoiser`

    def __call__(
        self, x: Latents, sigma: Sigma, conds: Conds, control: Control = None, attend: Attend | None = None,
        run: Run | None = None,
    ) -> Latents:  # fmt: skip
        """The guided denoised image; arguments and errors as for GuidedDenoiser.

        `control` and `attend` serve both forwards, each with ControlNets of its own x. In the second one the site's
        branch is called "<base>~sag".
        """
        values = sigma.tolist()
        scales = [scale_at(self.scale, self.interval, s, "SAG") for s in values]
        if not any(scales):
            return self.inner(x, sigma, conds, control, attend, run)
        sigma = sigma.view_as(sigma)  # a tensor object of this call's own, see Site.sigma
        bases = {self.inner.negative(s, run) if self.base is None else Branch(self.base) for s in values}
        if len(bases) > 1:
            raise InputError("SAG: rows of this batch are on both sides of the interval of the CFG term; name a base")
        base, rows = bases.pop(), x.shape[0]
        masks: list[Bool[Tensor, "rows mask_h mask_w"]] = []

        def masking(q: Heads, k: KeyHeads, v: KeyHeads, site: Site) -> Heads:
            """The innermost attention, which measures that of the base on its way."""
            if site.name == self.site:
                for i, names in enumerate(site.branches):
                    if str(base) in names:
                        block = slice(i * rows, (i + 1) * rows)
                        mask = attention_received(q[block], k[block]) > self.threshold
                        masks.append(mask.unflatten(1, site.grid))  # (b, n) -> (b, h', w')
            return innermost(q, k, v, site)

        innermost = attend or self.inner.attend
        branches = list(dict.fromkeys([base, *(b for s in sorted(set(values)) for b in self.inner.branches(s, run))]))
        denoised = self.inner.evaluate(x, sigma, branches, conds, control, masking, values, run)
        plain = denoised[base]
        degraded = self.degrade(plain, masks[0])
        noised = degraded + (x - plain)  # x − D = σ·ε
        named_attend = partial(under_name, innermost, f"{base}~sag")
        apart = None if run is None else replace(run)  # what is remembered is of x, not of x̃
        second = self.inner.evaluate(noised, sigma, [base], conds, control, named_attend, values, apart)[base]
        extra = per_row(scales, plain) * (degraded - second)
        return self.inner.combine(x, sigma, denoised, extra, values, run)

    def degrade(self, plain: Latents, mask: Bool[Tensor, "rows mask_h mask_w"]) -> Latents:
        """`plain` blurred where the mask is set; the mask may be of any coarser grid."""
        if self.blur_sigma == 0:
            return plain
        h, w = plain.shape[2:]
        down, across = (_latent_blur(n, float(self.blur_sigma), plain.dtype, plain.device) for n in (h, w))
        blurred = down @ plain @ across.T
        cover = F.interpolate(mask[:, None].to(plain.dtype), size=(h, w), mode="nearest")  # (b, h', w') -> (b, 1, h, w)
        return torch.where(cover > 0, blurred, plain)

    def __repr__(self) -> str:
        first, *rest = repr(self.inner).split("\n")
        negative = next((str(t.neg) for t in self.inner.terms.values() if t.mixes_conditionings), None)
        base = self.base or (f"{negative} where CFG is on, else " if negative else "") + str(self.inner.base)
        term = scale_text(self.scale, self.interval, "(x̂ − D[base](x̂ + σ·ε))")
        sag = f"  SAG: base {base}; x̂ = D[base] blurred (sigma {self.blur_sigma:g})"
        where = f" where the attention received at {self.site} > {self.threshold:g}"
        own = "" if self.base in (None, self.inner.base.conditioning) else f"D[{self.base}] if not among them, and "
        return "\n".join([f"{first} + {term}", sag + where, *rest, f"  and {own}1 row per image in a second forward"])


def under_name(attend: Attend, name: str, q: Heads, k: KeyHeads, v: KeyHeads, site: Site) -> Heads:
    """`attend` at a site whose rows belong to the branch of this name."""
    return attend(q, k, v, site._replace(branches=((name,),)))


@constant
def _latent_blur(n: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "{n} {n}"]:
    """One axis of the latent blur; built on the CPU and moved once, not once a step."""
    return fold_taps(gaussian_taps(sigma, TAPS).to(dtype), n, "reflect").to(device=device)


def attention_received(q: Heads, k: Heads, block: int = 256) -> Float[Tensor, "rows tokens"]:
    """Attention that each key gets: softmax over keys, summed over queries, mean over heads; its mean over keys is 1.

    In fp32 (fp64 stays), `block` queries at a time, so the whole map is never in memory.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide) * q.shape[-1] ** -0.5, k.to(wide)
    total = torch.zeros(k.shape[:3], dtype=wide, device=k.device)  # (b, h, n)
    for part in q.split(block, dim=2):
        total += (part @ k.mT).softmax(dim=-1).sum(dim=2)  # (b, h, block, n) -> (b, h, n)
    return total.mean(dim=1)
