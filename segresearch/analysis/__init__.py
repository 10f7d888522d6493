"""The energy bench: statistics, curvature and energy of attention logits, and tests of the paper's claims on them.

    recorder            queries and keys captured while a model samples
    blur_operator       the blur as a matrix: determinant, diagonal and traces from its 1-D factors
    logit_statistics    mean, variance, lse, entropy of columns of logits, without the n×n map
    energy              Definition 2.1, its landscape, Hessians, determinants in log space, the Hopfield energy
    claims              the claims of arXiv 2408.00760, with both sides, the gap and where each holds
    measurements        a recording to a tidy table and the tested claims
    energy_plots, report, analyze    the plots, the page and the run that writes them
"""
