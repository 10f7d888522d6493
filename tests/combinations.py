"""Random branches, steps and runs, for the tests of how branches are combined."""

import torch

from segresearch.guidance.methods.adaptive_stop import AdaptiveStop
from segresearch.guidance.methods.adg import ADG
from segresearch.guidance.methods.apg import APG
from segresearch.guidance.methods.cfg_zero import CFGZero
from segresearch.guidance.methods.fdg import FDG
from segresearch.guidance.methods.higs import HiGS
from segresearch.guidance.methods.mambo import MamboG
from segresearch.guidance.methods.mimic import Mimic
from segresearch.guidance.methods.momentum import Momentum
from segresearch.guidance.methods.perp_neg import PerpNeg
from segresearch.guidance.methods.rescaled import Rescale
from segresearch.guidance.methods.sg_prev import SGPrev
from segresearch.guidance.methods.smc import SMC
from segresearch.guidance.methods.tag import TAG
from segresearch.guidance.methods.tcfg import TCFG
from segresearch.guidance.methods.thresholding import Threshold
from segresearch.guidance.methods.tsr import TSR
from segresearch.guidance.step import Step
from segresearch.sampling.memory import Past, Run

W = 5.0
SIGMAS = (10.0, 4.0, 2.0, 1.0, 0.0)
SHAPES_OF_TERMS = (
    APG(norm=3.0), CFGZero(), TCFG(), FDG(), MamboG(), ADG(), Mimic(mimic=2.0, percentile=0.9), SMC(gain=0.05),
    SMC(switch="unit"), PerpNeg(), AdaptiveStop(cosine=0.5), SGPrev(),
)  # fmt: skip
POSTS = (Rescale(), Rescale(space="eps"), TAG(), TSR(), Momentum(), HiGS(), Threshold())


def latents(seed: int, rows: int = 3, h: int = 8, w: int = 12, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A row is the same whatever the number of rows."""
    parts = [torch.randn(4, h, w, generator=torch.Generator().manual_seed(100 * seed + i)) for i in range(rows)]
    return torch.stack(parts).to(dtype)


def branches(rows: int = 3, h: int = 8, w: int = 12, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    cond = latents(1, rows, h, w, dtype)
    return {
        "cond": cond,
        "uncond": cond + 0.3 * latents(2, rows, h, w, dtype),
        "negative": cond + 0.3 * latents(3, rows, h, w, dtype),
    }


def step_of(d: dict[str, torch.Tensor], sigma: float = 2.0, scale: float = W - 1, run: Run | None = None) -> Step:
    cond = d["cond"]
    sigmas = torch.full((len(cond),), sigma, dtype=torch.promote_types(cond.dtype, torch.float32))
    x = cond + sigma * latents(7, *cond.shape[::2], cond.shape[3], cond.dtype)
    return Step(x, sigmas, d, "cond", scale, Past(run, "method", sigma))


def run_of(sampler: str = "euler", sigmas: tuple[float, ...] | None = SIGMAS) -> Run:
    return Run(torch.arange(3), sampler, sigmas)


def guided(shape, d, step: Step) -> torch.Tensor:
    neg = d["cond"] if isinstance(shape, SGPrev) else d["uncond"]
    return d["cond"] + step.scale * shape(d["cond"], neg, step)


def in_eps(shape, c: torch.Tensor, u: torch.Tensor, w: float, sigma: float = 2.0) -> torch.Tensor:
    """The ε that a shape gives for predictions c and u of ε."""
    x = latents(7, len(c), *c.shape[2:], c.dtype)
    d = {"cond": x - sigma * c, "uncond": x - sigma * u}
    step = Step(x, torch.full((len(c),), sigma, dtype=c.dtype), d, "cond", w - 1)
    return step.eps(guided(shape, d, step))


def flat(z: torch.Tensor) -> list[torch.Tensor]:
    return [row.flatten() for row in z]


def plain_cfg(d: dict[str, torch.Tensor], w: float = W) -> torch.Tensor:
    return d["uncond"] + w * (d["cond"] - d["uncond"])
