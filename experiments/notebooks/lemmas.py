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
# model. `docs/theory.md` discusses the results; `experiments/analyze.py` does the same at length.

# %%
import torch

from segresearch.analysis import energy_plots, measurements
from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.claims import check_claims, check_weighted
from segresearch.analysis.energy import compare_hessians
from segresearch.analysis.logit_statistics import columns
from segresearch.analysis.recorder import Recorder
from segresearch.guidance import GuidedDenoiser
from segresearch.models import load_model
from segresearch.sampling import initial_noise, sample

sd = load_model("mini")
prompts = ["", "a green cone"]
recorder = Recorder(sd.unet.site_heads, where="mid", steps=[0, 4, 7])
sample(
    GuidedDenoiser(sd.denoiser, {}),
    initial_noise([0, 1], sd.latent_shape()),
    steps=8,
    conds=sd.encode(prompts),
    attend=recorder.attend([{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]),
)
entry = energy_plots.example(recorder.recording)
print(entry.site, entry.grid, f"sigma_t {entry.sigma[0]:.3f}")

# %% [markdown]
# ## Each claim under one blur
#
# Both sides, the margin (positive where the claim holds) and how often it holds. First the boundary that the proofs
# assume (doubly stochastic), then the one that the official code ships.

# %%
for boundary in ("exact", "reflect"):
    print(boundary)
    for result in check_claims(entry.q, entry.k, "queries", BlurOperator(entry.grid, 1.0, boundary)):
        margin = result.margin.median()
        print(f"  {result.statement:66} holds {result.fraction:7.2%}, median margin {margin:9.4f}")

# %% [markdown]
# Eq. (22) is the one that is reversed: the mean stays and the log-sum-exp falls, so the product of the softmax rises.
#
# With weights ½ at the ends of each axis the lemmas hold for the shipped boundary too, and they hold for the dual:
# blurred keys, with columns over keys.

# %%
for result in check_weighted(entry.q, entry.k, "queries", BlurOperator(entry.grid, 1.0, "reflect")):
    print(f"{result.statement:60} holds {result.fraction:7.2%}")
for result in check_claims(entry.q, entry.k, "keys", BlurOperator(entry.grid, 1.0, "exact"))[:3]:
    print(f"dual: {result.statement:54} holds {result.fraction:7.2%}")

# %% [markdown]
# ## Eq. (19) beside the chain rule
#
# The paper multiplies the Hessian entry by entry with B; the chain rule gives BᵀHB. Medians over a few columns.

# %%
few = columns(entry.q, entry.k, "queries", torch.arange(4))[0, 0]  # (4 keys, n)
for sigma in (0.5, 1.0):
    compared = compare_hessians(few, BlurOperator(entry.grid, sigma, "exact"))
    print(f"blur sigma {sigma}: relative distance {compared['distance'].median():.3f}")
    print(f"  log pdet H(a)                     {compared['log_pdet'].median():9.2f}")
    print(f"  log |det H(Ba) o B|, eq. (19)     {compared['entrywise_log_det'].median():9.2f}")
    print(f"  log prod xi(Ba) b_ii, eq. (21)    {compared['entrywise_log_product'].median():9.2f}")
    print(f"  log pdet B'H(Ba)B, chain rule     {compared['chain_log_pdet'].median():9.2f}")

# %% [markdown]
# ## Where Theorem 3.1 holds
#
# The table that `analyze.py` writes, of this recording, and the regime map drawn from it.

# %%
rows, claims = measurements.measure(recorder.recording, [0.5, 1.0, 2.0], ["exact"], sd.unet.sites)
for claim in claims:
    if claim.claim.startswith("theorem"):
        print(f"{claim.claim} {claim.axis:8} sigma {claim.blur_sigma:g}: holds {claim.share:7.2%}, worst {claim.worst}")

# %%
energy_plots.regime(rows, "exact", "mini")

# %%
energy_plots.against_sigma(rows, "mini")
