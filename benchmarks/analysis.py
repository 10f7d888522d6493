"""Statistics and curvature of SDXL-size attention: streamed (`segresearch.analysis`) beside the naive n×n way.

Two loads of random q and k in fp32, dim 64, blur σ = 2 with reflecting ends, along the queries: SDXL's mid block (10
sites × 20 heads × 1024 tokens) and one site of 10 heads × 4096 tokens. Memory is the peak above what it is when the
inputs are ready. On a busy machine compare the processor seconds of --threads 1, since two threads wait for each other.

    streamed    everything of `curvature`, before and after the blur: mean, variance, lse, entropy, log-determinants
                (pseudo-determinant, eq. (20) with b_ii, chain rule), traces, spectral norm
    maps        the naive way for what maps alone give: a site's logits, their blur and both softmaxes whole, then
                reductions over them. No norms and no determinant of a matrix.
    hessians    the naive way for determinants and norms: the two n×n Hessians of a column and their eigenvalues, of one
                column; the time for all columns is that times their number, stated as an estimate.
"""

import math
import time

from harness import Peak

LOADS = {"mid block": (10, 20, (32, 32)), "4096 tokens": (1, 10, (64, 64))}  # sites, heads, grid
WAYS = ("streamed", "maps", "hessians")
DIM, SIGMA, BOUNDARY = 64, 2.0, "reflect"


def maps(q, k, operator) -> dict:
    """Statistics of one site from its whole maps, (1, heads, queries, keys)."""
    import torch

    out = {}
    a = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    h, w = operator.grid
    down, across = (factor.float() for factor in operator.factors)
    image = a.reshape(1, -1, h, w, a.shape[-1])
    smooth = torch.einsum("ih,jw,bnhwk->bnijk", down, across, image).reshape(a.shape)
    for name, z in (("before", a), ("after", smooth)):
        xi = z.softmax(dim=2)
        lse = z.logsumexp(dim=2)
        entropy = -(xi * xi.clamp_min(1e-38).log()).sum(dim=2)
        out[name] = (z.mean(dim=2), z.var(dim=2, correction=0), lse, entropy, 1 - xi.square().sum(dim=2))
    return out


def measure(load: str, way: str, threads: int, quick: bool) -> dict:
    """Time and memory of one way on one load, in this process."""
    import torch

    from segresearch.analysis.blur_operator import BlurOperator
    from segresearch.analysis.energy import chain_hessian, curvature, hessian
    from segresearch.analysis.logit_statistics import columns

    torch.set_num_threads(threads)
    sites, heads, grid = LOADS[load]
    sites = 1 if quick else sites
    n = math.prod(grid)
    generator = torch.Generator().manual_seed(0)
    inputs: list = [tuple(1.5 * torch.randn(1, heads, n, DIM, generator=generator) for _ in "qk") for _ in range(sites)]
    operator, plain = BlurOperator(grid, SIGMA, BOUNDARY), BlurOperator(grid, 0, BOUNDARY)
    tiny = BlurOperator((2, 2), 1.0)
    small: list = [torch.randn(1, 1, 4, DIM, generator=generator) for _ in "qk"]
    q, k = small  # warm up
    curvature(q, k, "queries", tiny), maps(q, k, tiny), torch.linalg.eigvalsh(torch.eye(64).double())
    share = 1.0
    with Peak() as peak:
        start, busy = time.perf_counter(), time.process_time()
        if way == "streamed":
            for q, k in inputs:
                curvature(q, k, "queries", plain)
                curvature(q, k, "queries", operator)
        elif way == "maps":
            for q, k in inputs:
                maps(q, k, operator)
        else:
            share = 1 / (sites * heads * n)
            q, k = inputs[0]
            a = columns(q[:, :1], k[:, :1], "queries", torch.arange(1))[0, 0, 0]
            torch.linalg.eigvalsh(-hessian(a))
            torch.linalg.eigvalsh(-chain_hessian(a, operator))
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
    megabytes = sum(z.numel() * z.element_size() for pair in inputs for z in pair) / 1e6
    return {
        "load": load, "way": way, "sites": sites, "heads": heads, "tokens": n, "threads": threads,
        "share_measured": share, "seconds": seconds, "cpu_seconds": busy, "seconds_for_all": seconds / share,
        "peak_megabytes": peak.bytes / 1e6, "input_megabytes": megabytes,
    }  # fmt: skip
