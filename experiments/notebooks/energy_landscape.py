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
# # The energy landscape of a model's self-attention
#
# Smoothed Energy Guidance (arXiv 2408.00760) blurs the queries of self-attention and calls the result a flatter energy
# landscape. This notebook captures queries and keys of the embedded model while it samples, and looks at that
# landscape: the field of logits, the energy around a real column, attention maps, each before and after the blur.
#
# It runs top to bottom as a script (`python experiments/notebooks/energy_landscape.py`), or as a notebook after
# `jupytext --to ipynb` (or directly, with jupytext's Jupyter extension).

# %%
from segresearch.analysis import energy_plots
from segresearch.analysis.blur_operator import BlurOperator
from segresearch.analysis.energy import energies, hopfield_energy, hopfield_update
from segresearch.analysis.recorder import Recorder
from segresearch.guidance import SEG, GuidedDenoiser, perturbed
from segresearch.models import load_model
from segresearch.sample_images import decode_images
from segresearch.sampling import initial_noise, sample

sd = load_model("mini")
prompt, seed, steps = "a red sphere left of a blue cube", 0, 10

# %% [markdown]
# ## Capture
#
# The recorder is an argument of the call. It keeps what the softmax sees, per branch: here in the mid block, along a
# trajectory guided by SEG with an infinite blur.

# %%
model = GuidedDenoiser(sd.denoiser, {"seg": perturbed("seg", SEG(where="mid"), scale=1.0)})
print(model)
recorder = Recorder(sd.unet.site_heads, where="mid", steps=[0, steps // 2, steps - 1])
noise = initial_noise([seed], sd.latent_shape())
latents = sample(
    model, noise, steps=steps, conds=sd.encode([prompt]), attend=recorder.attend([{"prompt": prompt, "seed": seed}])
)
recording = recorder.recording
print(len(recording), "calls recorded:", recording.branches, "at", len(recording.sites), "sites")

# %% [markdown]
# ## Energy, before and after
#
# Definition 2.1: each key has a column of logits over the queries, with the energy −lse. In the perturbed branch every
# query is the mean query at every site of the mid block, so the energy can only be higher (Lemma 3.2 as its proof shows
# it). At the first site both branches still see the same keys.

# %%
for step in recording.steps:
    plain, smooth = (recording.select(recording.sites[0], name, step)[0] for name in ("cond", "cond~seg"))
    before, after = (energies(entry.q, entry.k, "queries").mean().item() for entry in (plain, smooth))
    print(f"sigma_t {plain.sigma[0]:7.3f}: mean energy {before:.3f} -> {after:.3f} nats")

# %% [markdown]
# ## Attention as a Hopfield update
#
# With the keys as values, attention of a query z is one update of a modern Hopfield network that stores the keys
# (arXiv 2008.02217, eqs. 2 and 3): a gradient step of length 1 down the energy −lse(β, Kz) + ½ z·z + constant. Repeated
# updates never raise it.

# %%
keys, z = plain.k.double(), plain.q.double()
beta = keys.shape[-1] ** -0.5
for update in range(5):
    print(f"after {update} updates: mean Hopfield energy {hopfield_energy(z, keys, beta).mean():.3f}")
    z = hopfield_update(z, keys, beta)

# %% [markdown]
# ## The field, and the landscape around it

# %%
entry = energy_plots.example(recording.select(branch="cond"))
blurs = [BlurOperator(entry.grid, sigma, "reflect") for sigma in (1.0, 2.0, float("inf"))]
energy_plots.field(entry, 0, 0, blurs)

# %%
energy_plots.landscape(entry, 0, 0, blurs)

# %% [markdown]
# ## What a query attends to

# %%
image = decode_images(sd, latents)[0].permute(1, 2, 0).numpy()  # (3, h, w) -> (h, w, 3)
energy_plots.attention(entry, 0, blurs, image)

# %% [markdown]
# ## The limits of the blur
#
# The official code's kernel is cut at the grid's size, so its blur never tends to the mean: an infinite σ is a jump.

# %%
energy_plots.limits(entry, ["reflect", "exact"])
