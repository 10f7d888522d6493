"""Samplers, noise schedules and per-image noise: k-diffusion behind one door."""

from segresearch.sampling.doorway import k_diffusion

__all__ = ["k_diffusion"]
