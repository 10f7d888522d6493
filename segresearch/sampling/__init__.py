"""Samplers, noise schedules and per-image noise: the only import of k-diffusion.

    noise = initial_noise(seeds, sd.latent_shape())
    x0 = sample(model, noise, sampler="euler", schedule="auto", steps=25, conds=conds)
"""

from segresearch.sampling.intervals import ALWAYS, step_interval
from segresearch.sampling.kdiffusion import k_diffusion
from segresearch.sampling.loop import SAMPLERS, sample
from segresearch.sampling.noise import image_key, initial_noise
from segresearch.sampling.schedules import SCHEDULES, sigmas, start_scale
from segresearch.sampling.start import ImageStart

step_window = step_interval  # its older name

__all__ = [
    "ALWAYS", "SAMPLERS", "SCHEDULES", "ImageStart", "image_key", "initial_noise", "k_diffusion", "sample", "sigmas",
    "start_scale", "step_interval", "step_window",
]  # fmt: skip
