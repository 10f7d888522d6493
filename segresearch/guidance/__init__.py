"""Guidance: perturbations of a network, terms that combine branches, and the denoisers that evaluate them."""

from segresearch.guidance.blur import blur, blur_matrix
from segresearch.guidance.guided_denoiser import GuidedDenoiser
from segresearch.guidance.perturbations import PAG, SEG, At, Perturbation
from segresearch.guidance.postprocess import Projected, rescale
from segresearch.guidance.sag import SelfAttentionGuidance
from segresearch.guidance.sites import select_sites
from segresearch.guidance.terms import Branch, Ramp, Term, cfg, perturbed

__all__ = [
    "PAG", "SEG", "At", "Branch", "GuidedDenoiser", "Perturbation", "Projected", "Ramp", "SelfAttentionGuidance",
    "Term", "blur", "blur_matrix", "cfg", "perturbed", "rescale", "select_sites",
]  # fmt: skip
