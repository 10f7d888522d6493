"""Guidance that perturbs self-attention, on Stable Diffusion and k-diffusion's samplers: a research framework.

Implements Smoothed Energy Guidance (SEG, arXiv 2408.00760), Perturbed-Attention Guidance (PAG, arXiv 2403.17377),
Self-Attention Guidance (SAG, arXiv 2210.00939) and classifier-free guidance (arXiv 2207.12598) as functions handed to a
hand-written UNet. Nothing is ever set on a loaded module.

    segresearch.models          the networks, text conditioning and the k-diffusion denoiser
    segresearch.checkpoints     from a path or a name to a loaded model
    segresearch.guidance        perturbations, branches and terms, the guided denoiser
    segresearch.sampling        k-diffusion's samplers, noise schedules, per-image noise
    segresearch.analysis        the energy of attention: statistics, curvature, the paper's claims on real activations
    segresearch.metrics         metrics of images and of sets of images
    segresearch.evaluation      methods side by side: shards of images, metrics, tables, pages
    segresearch.control_images  images for ControlNets
    segresearch.scenes          procedural captioned scenes
    segresearch.config          the settings of a run: types, checks, and the objects built from them

This module imports nothing: `import segresearch` is immediate, the subpackages load torch when they are imported.
"""

__version__ = "0.1.0"
