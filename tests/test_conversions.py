"""The conventions of papers, diffusers, ComfyUI and pamparamm: each formula with its own numbers, and what it is here.

Every row is (where, their result, ours): their formula written out, and terms, shapes or post-processors with the
converted number.
"""

import math

import pytest
import torch
from diffusers.guiders import FrequencyDecoupledGuidance

from segresearch.guidance.methods.apg import APG
from segresearch.guidance.methods.cfg_zero import CFGZero
from segresearch.guidance.methods.cfgpp import PlusPlus
from segresearch.guidance.methods.fdg import FDG
from segresearch.guidance.methods.mambo import MamboG
from segresearch.guidance.methods.mimic import Mimic
from segresearch.guidance.methods.momentum import Momentum
from segresearch.guidance.methods.perp_neg import PerpNeg
from segresearch.guidance.methods.rescaled import Rescale
from segresearch.guidance.methods.smc import SMC
from segresearch.guidance.methods.tag import TAG
from segresearch.guidance.methods.tcfg import TCFG
from segresearch.guidance.methods.tsr import TSR
from segresearch.guidance.methods.weight_schedules import Schedule
from segresearch.guidance.perturbations import PAG, SEG
from segresearch.guidance.step import Step, along
from segresearch.guidance.terms import Branch, Term, cfg, perturbed
from segresearch.sampling.memory import Past, Run

SIGMA, AFTER = 2.0, 1.5
GENERATOR = torch.Generator().manual_seed(0)
X, C, U, WEAK, WEAK_U, N = (torch.randn(1, 4, 6, 8, generator=GENERATOR, dtype=torch.float64) for _ in range(6))
X = X * SIGMA
D = {"cond": C, "uncond": U, "cond~p": WEAK, "uncond~p": WEAK_U, "negative": N}
SEG_P, PAG_P = SEG(), PAG()


def ours(*terms: Term, base: str = "cond", post=()) -> torch.Tensor:
    """D[base] + Σ s·Δ′, post-processed, at X and SIGMA."""
    run = Run(torch.zeros(1, dtype=torch.int64), "euler", (SIGMA, AFTER, 0.0))
    step = Step(X, torch.full((1,), SIGMA, dtype=torch.float64), D, base, past=Past(run, "m", SIGMA))
    out = D[base]
    for term in terms:
        pos, neg, s = D[str(term.pos)], D[str(term.neg)], term.scale_at(SIGMA, run)
        here = Step(X, step.sigma, D, base, s, Past(run, str(term), SIGMA))
        out = out + s * (pos - neg if term.shape is None else term.shape(pos, neg, here))
    for p in post:
        out = p(out, step)
    return out


def eps(d: torch.Tensor) -> torch.Tensor:
    return (X - d) / SIGMA


def from_eps(e: torch.Tensor) -> torch.Tensor:
    return X - SIGMA * e


def v(d: torch.Tensor) -> torch.Tensor:
    return (eps(d) - SIGMA * d) / math.sqrt(1 + SIGMA**2)


def apg_delta() -> torch.Tensor:  # r 3, η 0.5, momentum has nothing to add at a first step
    delta = (C - U) * min(1.0, 3.0 / float((C - U).norm()))
    return delta - 0.5 * along(delta, C)


def std_match(z: torch.Tensor, reference: torch.Tensor, phi: float) -> torch.Tensor:
    return phi * z * reference.std() / z.std() + (1 - phi) * z


def comfy_perp(neg_scale: float, w: float) -> torch.Tensor:
    pos, neg = C - U, N - U
    return U + w * (pos - neg_scale * (neg - (neg * pos).sum() / pos.norm() ** 2 * pos))


def comfy_tag(t_scale: float, r_scale: float) -> torch.Tensor:
    radial = along(C - X, X)
    return X + t_scale * (C - X - radial) + r_scale * radial


def alpha() -> torch.Tensor:
    return (eps(C) * eps(U)).sum() / (eps(U) ** 2).sum()


def weak(scale: float, p=SEG_P, base: str = "cond") -> Term:
    return perturbed("p", p, scale, base=base)


ratio = float((C - U).norm() / (X - U).norm())
TABLE = {
    # CFG
    "CFG, usual w": (U + 5 * (C - U), ours(cfg(5.0))),
    "CFG, its paper's w: (1 + w)·c − w·u": (5 * C - 4 * U, ours(cfg(4.0 + 1))),
    "CFG, diffusers' original formulation: c + w·Δ": (C + 4 * (C - U), ours(cfg(4.0 + 1))),
    "CFG on base uncond": (U + 5 * (C - U), ours(Term(Branch("cond"), Branch("uncond"), 5.0), base="uncond")),
    # SEG, PAG, SLG
    "SEG, official code": (U + 5 * (C - U) + 3 * (C - WEAK), ours(cfg(5.0), weak(3.0))),
    "SEG, its paper's eq. 9: c~ + γ(c − c~)": (WEAK + 4 * (C - WEAK), ours(weak(4.0 - 1))),
    "SEG, its paper's eq. 10": (U + 5 * (C - U) + 3 * (U - WEAK_U), ours(cfg(5.0), weak(3.0, base="uncond"))),
    "SEG, diffusers' guider without CFG": (WEAK + 3 * (C - WEAK), ours(weak(3.0 - 1))),
    "PAG, official pipelines": (U + 5 * (C - U) + 3 * (C - WEAK), ours(cfg(5.0), weak(3.0, PAG_P))),
    "PAG, its paper: ε + s(ε − ε~)": (from_eps(eps(C) + 3 * (eps(C) - eps(WEAK))), ours(weak(3.0, PAG_P))),
    "SLG, SD3.5 and diffusers": (U + 5 * (C - U) + 2.8 * (C - WEAK), ours(cfg(5.0), weak(2.8))),
    "autoguidance: weak + w(c − weak)": (WEAK + 2 * (C - WEAK), ours(weak(2.0 - 1))),
    # CFG++
    "CFG++, paper's λ": (
        0.6 * (C - U) + U + (X - U) * AFTER / SIGMA,
        X + (AFTER - SIGMA) * eps(ours(cfg(PlusPlus(0.6)))),
    ),
    "CFG++, A1111's w: λ = w/12.5": (
        0.6 * (C - U) + U + (X - U) * AFTER / SIGMA,
        X + (AFTER - SIGMA) * eps(ours(cfg(PlusPlus(7.5 / 12.5)))),
    ),
    # APG
    "APG, paper: c + (w − 1)Δ′": (C + 4 * apg_delta(), ours(cfg(5.0, shape=APG(0.5, 3.0)))),
    "APG, ComfyUI: c + wΔ′": (C + 5 * apg_delta(), ours(cfg(5.0 + 1, shape=APG(0.5, 3.0)))),
    "APG, diffusers' guider on D: u + wΔ′": (
        U + 5 * apg_delta(),
        ours(Term(Branch("cond"), Branch("uncond"), 5.0, shape=APG(0.5, 3.0)), base="uncond"),
    ),
    # CFG-Zero*
    "CFG-Zero*, diffusers on ε": (
        from_eps(alpha() * eps(U) + 5 * (eps(C) - alpha() * eps(U))),
        ours(cfg(5.0, shape=CFGZero())),
    ),
    "CFG-Zero*, ComfyUI, less what it adds": (
        alpha() * U + 5 * (C - alpha() * U) - (5 - 1) * (1 - alpha()) * X,
        ours(cfg(5.0, shape=CFGZero())),
    ),
    # FDG
    "FDG, equal w": (U + 5 * (C - U), ours(cfg(5.0, shape=FDG((1.0, 1.0))))),
    "FDG, paper's and diffusers' w_high 12, w_low 5": (
        FrequencyDecoupledGuidance(guidance_scales=[12.0, 5.0]).forward(C, U).pred,
        ours(cfg(5.0, shape=FDG((11 / 4, 1.0)))),
    ),
    # MAMBO-G
    "MAMBO-G, paper: 1 + (w − 1)exp": (
        U + (1 + 9 * math.exp(-8 * ratio)) * (C - U),
        ours(cfg(10.0, shape=MamboG(8.0))),
    ),
    "MAMBO-G, diffusers' original: c + w·exp·Δ": (
        C + 10 * math.exp(-8 * ratio) * (C - U),
        ours(cfg(10.0 + 1, shape=MamboG(8.0))),
    ),
    # thresholding
    "mimic scale equal to the cfg scale": (U + 7 * (C - U), ours(cfg(7.0, shape=Mimic(7.0)))),
    # Perp-Neg
    "Perp-Neg, ComfyUI": (comfy_perp(0.7, 8.0), ours(cfg(8.0, shape=PerpNeg(weight=0.7)))),
    # SMC
    "SMC-CFG, official k in ε": (
        from_eps(eps(U) + 5 * (eps(C) - eps(U) - 0.2 * (eps(C) - eps(U)).sign())),
        ours(cfg(5.0, shape=SMC(gain=0.2))),
    ),
    "SMC-CFG, pamparamm at one σ: its k is σ·gain": (
        U + 5 * (C - U - 0.1 * (C - U) / (C - U).norm()),
        ours(cfg(5.0, shape=SMC(gain=0.1 / SIGMA, switch="unit"))),
    ),
    # rescale
    "rescale, diffusers on ε": (
        from_eps(std_match(eps(U + 5 * (C - U)), eps(C), 0.7)),
        ours(cfg(5.0), post=[Rescale(0.7, "eps")]),
    ),
    "rescale, paper and ComfyUI on v": (
        std_match(v(U + 5 * (C - U)), v(C), 0.7),
        v(ours(cfg(5.0), post=[Rescale(0.7)])),
    ),
    # TAG, TSR, eps-scaling
    "TAG, ComfyUI's t_scale with r_scale 1": (comfy_tag(1.15, 1.0), ours(post=[TAG(1.15)])),
    "TSR, ComfyUI's tsr_k and tsr_sigma": (
        from_eps(eps(C) * (9 / SIGMA**2 + 1) / (9 / SIGMA**2 / 0.95 + 1)),
        ours(post=[TSR(0.95, 3.0)]),
    ),
    "eps-scaling, ε/λ": (from_eps(eps(C) / 1.005), ours(post=[TSR(1 / 1.005, math.inf)])),
    # schedules
    "C²FG: ω·e^(λ(1 − t)), halfway": (
        U + 5 * math.exp(0.2 * 0.5) * (C - U),
        ours(cfg(Schedule("exponential", 5 * math.exp(0.2), 5.0, sigma_max=SIGMA**2, sigma_min=1.0))),
    ),
    "TV-CFG's peak: 2w − 1": (
        U + 9 * (C - U),
        ours(cfg(Schedule("triangle", 2 * 5.0 - 1, 1.0, sigma_max=SIGMA**2, sigma_min=1.0))),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_conversion(name):
    theirs, here = TABLE[name]
    torch.testing.assert_close(here, theirs, atol=1e-6, rtol=1e-6)


def test_tcfg_and_momentum_of_other_programs_are_other_formulas():
    """TCFG on D is not TCFG on ε. pamparamm's momentum is that of D, without σ: no number converts it."""
    step = Step(X, torch.full((1,), SIGMA, dtype=torch.float64), D, "cond", 4.0)
    at_zero = Step(torch.zeros_like(X), step.sigma, D, "cond", 4.0)  # where σ·ε = −D
    assert not torch.allclose(TCFG()(C, U, step), TCFG()(C, U, at_zero))
    run = Run(torch.zeros(1, dtype=torch.int64), "euler", (SIGMA, AFTER, 0.0))
    post = Momentum(high=math.inf, low=0.0)
    post(U, Step(X, step.sigma, D, "cond", past=Past(run, "m", SIGMA)))
    moved = post(C, Step(X, step.sigma * AFTER / SIGMA, D, "cond", past=Past(run, "m", AFTER))) - C
    along_d = (moved * (C - U)).sum() / moved.norm() / (C - U).norm()
    assert along_d < 0.99


def test_sag_in_denoised_space_is_its_formula_in_eps():
    """ε + s(ε − ε~), with ε~ the prediction at x~ = x^ + σ·ε, is D + s(x^ − D(x~))."""
    blurred, second = N, WEAK
    noised = blurred + SIGMA * eps(C)
    theirs = from_eps(eps(C) + 0.75 * (eps(C) - (noised - second) / SIGMA))
    torch.testing.assert_close(C + 0.75 * (blurred - second), theirs)


def test_nag_scale_of_the_official_code_is_the_papers_plus_one():
    """z₊ + s(z₊ − z₋) (paper, pamparamm) is n·z₊ − (n − 1)·z₋ (official nag_scale n) for n = s + 1."""
    torch.testing.assert_close(C + 2 * (C - N), 3 * C - (3 - 1) * N)
