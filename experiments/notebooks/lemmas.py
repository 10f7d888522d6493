# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The claims of Smoothed Energy Guidance, on real activations
#
# Section 3 of arXiv 2408.00760 argues that a Gaussian blur of the queries keeps the mean of the logits, lowers their
# variance and attenuates the curvature of the energy. Here each claim is checked on queries and keys of the embedded
# model. `docs/theory.md` discusses what is found; `experiments/analyze.py` does the same at length.

# %%
import torch

from segresearch.analysis import figures, measurements, story
from segresearch.analysis.lemmas import corrected, dual, judge
from segresearch.analysis.recorder import Recorder
from segresearch.analysis.regimes import hessians
from segresearch.analysis.smoothing import Smoothing
from segresearch.analysis.statistics import columns
from segresearch.guidance import GuidedDenoiser
from segresearch.models import load_sdxl
from segresearch.sampling import initial_noise, sample

sdxl = load_sdxl("mini")
prompts = ["", "a green cone"]
recorder = Recorder(sdxl.unet.site_heads, where="mid", steps=[0, 4, 7])
sample(
    GuidedDenoiser(sdxl.denoiser, {}),
    initial_noise([0, 1], sdxl.latent_shape()),
    steps=8,
    conds=sdxl.encode(prompts),
    attend=recorder.attend([{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]),
)
entry = story.example(recorder.recording)
print(entry.site, entry.grid, f"sigma_t {entry.sigma[0]:.3f}")

# %% [markdown]
# ## Each claim under one blur
#
# Both sides, the margin (positive where the claim holds) and how often it holds. First the boundary that the proofs
# assume (doubly stochastic), then the one that the official code ships.

# %%
for boundary in ("exact", "reflect"):
    print(boundary)
    for verdict in judge(entry.q, entry.k, "queries", Smoothing(entry.grid, 1.0, boundary)):
        margin = verdict.margin.median()
        print(f"  {verdict.statement:66} holds {verdict.fraction:7.2%}, median margin {margin:9.4f}")

# %% [markdown]
# Eq. (22) is the one that is reversed: the mean stays and the log-sum-exp falls, so the product of the softmax rises.
#
# With weights ½ at the ends of each axis the lemmas hold for the shipped boundary too, and they hold for the dual:
# blurred keys, with columns over keys.

# %%
for verdict in corrected(entry.q, entry.k, "queries", Smoothing(entry.grid, 1.0, "reflect")):
    print(f"{verdict.statement:60} holds {verdict.fraction:7.2%}")
for verdict in dual(entry.q, entry.k, Smoothing(entry.grid, 1.0, "exact"))[:3]:
    print(f"dual: {verdict.statement:54} holds {verdict.fraction:7.2%}")

# %% [markdown]
# ## Eq. (19) beside the chain rule
#
# The paper multiplies the Hessian entry by entry with B; the chain rule gives BᵀHB. Medians over a few columns.

# %%
few = columns(entry.q, entry.k, "queries", torch.arange(4))[0, 0]  # (4 keys, n)
for sigma in (0.5, 1.0):
    found = hessians(few, Smoothing(entry.grid, sigma, "exact"))
    print(f"blur sigma {sigma}: relative distance {found.distance.median():.3f}")
    print(f"  log pdet H(a)                     {found.log_pdet.median():9.2f}")
    print(f"  log |det H(Ba) o B|, eq. (19)     {found.entrywise_log_det.median():9.2f}")
    print(f"  log prod xi(Ba) b_ii, eq. (21)    {found.entrywise_log_product.median():9.2f}")
    print(f"  log pdet B'H(Ba)B, chain rule     {found.chain_log_pdet.median():9.2f}")

# %% [markdown]
# ## Where Theorem 3.1 holds
#
# The table that `analyze.py` writes, of this recording, and the regime map drawn from it.

# %%
parts = list(measurements.measure(recorder.recording, [0.5, 1.0, 2.0], ["exact"], sdxl.unet.sites))
rows = [row for some, _ in parts for row in some]
for claim in measurements.together(claim for _, claims in parts for claim in claims):
    if claim.claim.startswith("theorem"):
        print(f"{claim.claim} {claim.axis:8} sigma {claim.blur_sigma:g}: holds {claim.share:7.2%}, worst {claim.worst}")

# %%
story.regime(rows, entry, "exact", "mini")

# %%
figures.against_sigma(rows, "mini")
