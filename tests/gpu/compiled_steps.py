"""Steps of a tiny random UNet compiled, beside eager: `python compiled_steps.py DEVICE`, a JSON line for each.

A process of its own, since the shape checks that the test run wraps around every function cannot be compiled.
"""

import json
import sys
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from guidance_models import denoiser, noisy  # noqa: E402

from segresearch.guidance import SEG, GuidedDenoiser, cfg, perturbed  # noqa: E402
from segresearch.models.compute import Compute  # noqa: E402
from segresearch.models.denoiser import Denoiser  # noqa: E402

TERMS = {"plain": {}, "cfg, seg": {"cfg": cfg(3.0), "seg": perturbed("seg", SEG(1.0), 1.0)}}


@torch.no_grad()
def main(device: str) -> None:
    warnings.simplefilter("always")
    plain = denoiser(torch.float32).to(device)
    eager = Denoiser(plain.unet, plain.alphas, compute=Compute(precision="exact")).to(device)
    graph = device.startswith("cuda")
    own = Denoiser(plain.unet, plain.alphas, compute=Compute(precision="exact", compile=True, graph=graph)).to(device)
    x, sigma, conds = noisy(2, dtype=torch.float32)
    x, sigma, conds = x.to(device), sigma.to(device), {name: c.to(device, x.dtype) for name, c in conds.items()}
    for name, terms in TERMS.items():
        models = [GuidedDenoiser(one, terms) for one in (eager, own)]
        given = models[0].prepare({"conds": conds})
        start = time.perf_counter()
        first = models[1](x, sigma, **given)
        seconds = time.perf_counter() - start
        apart = max(
            float((models[1](x * s, sigma * s, **given) - models[0](x * s, sigma * s, **given)).abs().max())
            for s in (1.0, 0.3, 0.02)
        )
        found = {"name": name, "apart": apart, "scale": float(first.abs().max()), "seconds": seconds}
        found["compiled"] = own.run.networks[plain.unet] is not plain.unet
        found["graphs"] = sum(g is not None for g in own.run.graphs.graphs.values()) if graph else 0
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
