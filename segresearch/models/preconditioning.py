"""What a network's input and output stand for: D = c_skip·x + c_out·F(c_in·x, t)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from segresearch.errors import InputError
from segresearch.models.scheduler import PREDICTIONS

Latents = Float[Tensor, "rows c h w"]
Level = Float[Tensor, "rows 1 1 1"]  # σ, to multiply images with


@dataclass(frozen=True)
class Preconditioning:
    """The scalings of a network F, at noise level σ. With d = sigma_data, which is 1 where it is None:

        c_in = 1/√(σ² + d²)
        epsilon       D = x − σ·F                       (arXiv 2006.11239)
        sample        D = F
        v_prediction  D = d²/(σ² + d²)·x − σ·d/√(σ² + d²)·F       (v of arXiv 2202.00512, appendix D)
        EDM           as v_prediction, but + before F for epsilon   (arXiv 2206.00364, table 1)

    sigma_data: of EDM, whose network is given ln(σ)/4. None: it is given timesteps of a table.
    timestep_scaling: of LCM (arXiv 2310.04378, eq. 9): D becomes (z/4 + s·√(s² + 1/4)·D)/(s² + 1/4) with
        z = c_in·x and s = timestep_scaling·t; at t = 0 it is z. None: D stays.

    InputError for a prediction that is unknown, or `sample` under EDM.
    """

    prediction: str = "epsilon"
    sigma_data: float | None = None
    timestep_scaling: float | None = None

    def __post_init__(self) -> None:
        known = PREDICTIONS if self.sigma_data is None else PREDICTIONS[:2]
        if self.prediction not in known:
            raise InputError(f"prediction {self.prediction!r} is not supported, only {' and '.join(known)}")

    @property
    def data(self) -> float:
        """d²."""
        return 1.0 if self.sigma_data is None else self.sigma_data**2

    @property
    def plus(self) -> bool:
        """Whether the network's output is EDM's own, which is added."""
        return self.sigma_data is not None and self.prediction == "epsilon"

    def scaled(self, x: Latents, sigma: Level) -> Latents:
        """c_in·x."""
        return x / (sigma**2 + self.data).sqrt()

    def denoised(self, out: Latents, x: Latents, sigma: Level, t: Level) -> Latents:
        """D from the network's output; t: what the network was given."""
        if self.prediction == "sample":
            denoised = out
        elif self.prediction == "epsilon" and not self.plus:
            denoised = x - sigma * out
        else:
            skip = x * self.data / (sigma**2 + self.data)
            change = sigma * self.data**0.5 / (sigma**2 + self.data).sqrt() * out
            denoised = skip + change if self.plus else skip - change
        if self.timestep_scaling is None:
            return denoised
        s = self.timestep_scaling * t
        return s / (s**2 + 0.25).sqrt() * denoised + 0.25 / (s**2 + 0.25) * self.scaled(x, sigma)

    def output(self, denoised: Latents, x: Latents, sigma: Level, t: Level) -> Latents:
        """The network's output that gives D, the inverse of `denoised`; not finite at σ = 0 or, of LCM, at t = 0."""
        if self.timestep_scaling is not None:
            s = self.timestep_scaling * t
            denoised = (denoised - 0.25 / (s**2 + 0.25) * self.scaled(x, sigma)) * (s**2 + 0.25).sqrt() / s
        if self.prediction == "sample":
            return denoised
        if self.prediction == "epsilon" and not self.plus:
            return (x - denoised) / sigma
        change = x * self.data / (sigma**2 + self.data) - denoised
        out = change * (sigma**2 + self.data).sqrt() / (sigma * self.data**0.5)
        return -out if self.plus else out

    def unscaled(self, z: Latents, sigma: Level) -> Latents:
        """x from c_in·x."""
        return z * (sigma**2 + self.data).sqrt()

    def target(self, clean: Latents, noise: Latents, sigma: Level) -> Latents:
        """The output of which D is the clean image, at x = clean + σ·noise; without LCM's boundary."""
        if self.prediction == "sample":
            return clean
        if self.prediction == "epsilon" and not self.plus:
            return noise
        d = self.data**0.5
        target = (self.data * noise - sigma * clean) / (d * (sigma**2 + self.data).sqrt())
        return -target if self.plus else target
