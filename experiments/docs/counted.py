"""Numbers of docs/methods.md that are of `mini`, and the table of costs of docs/guidance.md."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from segresearch.guidance import GuidedDenoiser, cfg
from segresearch.guidance.step import Step, dot, norm
from segresearch.models import load_model
from segresearch.sampling import initial_noise, sample

PROMPTS = ("a red sphere left of a blue cube", "two yellow cubes", "a green cone", "a blue ring behind a red cube")
SEEDS, STEPS, WEIGHT = 4, 25, 3.0
AGREE = 0.991  # Adaptive Guidance's


def agreement() -> dict[str, str]:
    """Of CFG 3 on mini, 25 Euler steps, four prompts with four seeds each: the cosine of its two predictions, the norm
    of their difference, and the largest value of the finished latents."""
    sd = load_model("mini")
    eps: list[Tensor] = []
    denoised: list[Tensor] = []
    norms: list[Tensor] = []

    def note(guided: Tensor, step: Step) -> Tensor:
        """A post-processor that changes nothing."""
        pos, neg = step.denoised["cond"], step.denoised["uncond"]
        for kept, (a, b) in ((eps, (step.x - pos, step.x - neg)), (denoised, (pos, neg))):
            kept.append((dot(a, b) / (norm(a) * norm(b))).flatten())
        norms.append(norm(pos - neg).flatten())
        return guided

    model = GuidedDenoiser(sd.denoiser, {"cfg": cfg(WEIGHT)}, post=[note])
    texts = [prompt for prompt in PROMPTS for _ in range(SEEDS)]
    latents = sample(model, initial_noise(range(len(texts)), sd.latent_shape()), steps=STEPS, conds=sd.encode(texts))
    passed = (torch.stack(denoised) > AGREE).int().argmax(dim=0) + 1  # (images,): the first step above, from 1
    return {
        "stop.eps": f"{float(torch.stack(eps).min()):.4f}",
        "stop.steps": f"{int(passed.min())} to {int(passed.max())}",
        "apg.largest": f"{float(torch.stack(norms).max()):.1f}",
        "latent.largest": f"{float(latents.abs().max()):.1f}",
    }


def cost(root: Path) -> dict[str, str]:
    """The table that `python benchmarks/methods.py` prints."""
    script = root / "benchmarks" / "methods.py"
    printed = subprocess.run([sys.executable, script], cwd=root, check=True, capture_output=True, text=True).stdout
    head = ["| method | rows, and the site where they fork | operations over a plain step |", "| --- | --- | ---: |"]
    return {"cost": "\n".join([*head, *(line for line in printed.splitlines() if line.startswith("| `"))])}
