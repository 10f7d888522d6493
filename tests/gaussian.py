"""A model whose images have a Gaussian distribution that is known, for the tests of samplers."""


import torch

SHAPE = (4, 6, 10)


class Gaussian:
    """The exact denoiser of data N(0, deviation^2), on SDXL's noise levels: D(x, sigma) = x s^2 / (s^2 + sigma^2)."""

    steps_offset = 1

    def __init__(self, deviation: float = 0.8):
        alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
        self.sigmas = ((1 - alphas) / alphas) ** 0.5
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]
        self.variance = deviation**2
        self.calls = 0

    def __call__(self, x, sigma, conds=None, gain=1.0):
        self.calls += 1
        assert sigma.shape == x.shape[:1]
        variance = self.variance if conds is None else conds["cond"][:, None, None, None]
        return gain * x * variance / (variance + sigma[:, None, None, None] ** 2)
