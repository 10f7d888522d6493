"""The energy bench: statistics, curvature and energy of attention logits, and tests of the paper's claims on them.

    recorder            queries and keys captured while a model samples
    blur_operator       the blur as a matrix: determinant, diagonal and traces from its 1-D factors
    logit_statistics    mean, variance, lse, entropy of columns of logits, without the n×n map
    curvature           Hessians of the energy −lse, (pseudo-)determinants in log space, traces and norms
    energy              Definition 2.1 and its dual, the Hopfield energy, surfaces through the landscape
    claims              one function per claim of arXiv 2408.00760, with both sides, the gap and where it holds
    theorem_regimes     where Theorem 3.1 holds, the limits of the blur, eq. (19) against the chain rule
    measurements        a recording to a tidy table and the tested claims
    energy_plots, report, analyze    the plots, the page and the run that writes them
"""
