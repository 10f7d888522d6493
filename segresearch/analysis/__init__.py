"""The energy bench: statistics, curvature and energy of attention logits, and the paper's claims judged on them.

    statistics   mean, variance, lse, entropy of columns of logits, without the n×n map
    smoothing    the blur as a matrix: determinant, diagonal, column sums from its 1-D factors
    curvature    Hessians of the energy −lse, (pseudo-)determinants in log space, traces and norms
    energy       Definition 2.1 and its dual as functions, Hopfield energy, slices of the landscape
    recorder     captured queries and keys
    measurements a recording to a tidy table and the claims, tested
    regimes, verdict, energy_plots, report, settings, analyze    where the theorem holds; shares; the page and its run
    lemmas       one function per claim of arXiv 2408.00760, with both sides, the gap and where it holds
"""
