"""The measurements of run.py, each in a separate process (`harness.child`). Every function returns JSON data.

Imports are inside the functions, so that the memory and the start of a part include only its own imports.
"""

import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import Peak, interleaved, median, resident

ROOT = Path(__file__).resolve().parent.parent
DIFFUSERS = {  # method: the label of diffusers' way to the same images (with its rows), and its key
    "unguided": ("UNet, 1 row", "unguided"), "SEG": ("PAG pipeline, 2 rows", "PAG"),
    "PAG": ("PAG pipeline, 2 rows", "PAG"), "CFG": ("UNet, 2 rows", "two rows"),
    "CFG+SEG": ("PAG pipeline, 3 rows", "CFG+PAG"),
    "ControlNet+SEG": ("ControlNet PAG pipeline, 2 rows", "ControlNet+PAG"),
}  # fmt: skip


def _call(who: str, method: str, nets: Any, px: int, dtype: Any, device: str) -> Any:
    """One step, ours or diffusers'. `nets`: (unet, controlnet) of whose step it is."""
    from networks import guided, pipeline_step, rows_of_diffusers

    unet, net = nets
    if who == "ours":
        return guided(method, unet, net, px, dtype, device)
    if method in ("unguided", "two rows"):
        return rows_of_diffusers(1 if method == "unguided" else 2, unet, px, dtype, device)
    return pipeline_step(method, unet, net, px, dtype, device)


def steps(
    px: int, dtype: str, device: str, rounds: int, methods: Sequence[str], alone: Sequence[str] = ()
) -> dict:
    """Seconds of one step at full size: ours for each of `methods`, diffusers' for all but `alone`, and two rows of its
    UNet."""
    import torch
    from networks import our_networks, their_networks

    kind = getattr(torch, dtype)
    nets = our_networks(kind, device, any("ControlNet" in w for w in methods))
    others = their_networks(*nets)
    calls = {f"ours: {method}": _call("ours", method, nets, px, kind, device) for method in methods}
    rivals = [*dict.fromkeys(DIFFUSERS[method][1] for method in methods if method not in alone), "two rows"]
    calls |= {f"diffusers: {method}": _call("diffusers", method, others, px, kind, device) for method in rivals}
    times = interleaved(calls, rounds, device)
    return {"px": px, "dtype": dtype, "device": device, "times": times}


def peak(who: str, method: str, px: int, dtype: str, device: str) -> dict:
    """Peak memory of two steps at full size, in bytes: total, and above the weights."""
    import torch
    from networks import our_networks, their_networks

    kind = getattr(torch, dtype)
    nets = our_networks(kind, device, "ControlNet" in method)
    nets = nets if who == "ours" else their_networks(*nets)
    call = _call(who, method, nets, px, kind, device)
    if device.startswith("cuda"):
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        call()
        whole = torch.cuda.max_memory_allocated()
        return {"above": whole - start, "whole": whole}
    with Peak() as memory:
        call()
        call()
    return {"above": memory.bytes, "whole": memory.whole}


def matmul_ceiling(dtype: str, device: str, size: int) -> float:
    """FLOP/s of a square matrix product, the best of ten."""
    import torch

    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in "ab")
    return 2 * size**3 / min(interleaved({"": lambda: a @ b}, 10, device)[""])


def start_up(rounds: int) -> dict:
    """Wall seconds of processes from start to end."""
    python, generate = sys.executable, str(ROOT / "experiments" / "generate.py")
    loading = "from segresearch.models import load_model; load_model('mini')"
    commands = {
        "python -c pass": [python, "-c", "pass"],
        "import segresearch": [python, "-c", "import segresearch"],
        "generate.py --help": [python, generate, "--help"],
        "import torch": [python, "-c", "import torch"],
        "load_model('mini')": [python, "-c", loading],
        "import diffusers' SDXL pipeline": [python, "-c", "from diffusers import StableDiffusionXLPipeline"],
    }

    def run(command: list[str]) -> Any:
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)

    times = interleaved({name: run(command) for name, command in commands.items()}, rounds)
    return {name: median(t) for name, t in times.items()}


def loading(folder: str, dtype: str) -> dict:
    """Seconds and peak memory of loading a random SDXL of full size (6.9 GB of float16 in one file, written first)."""
    import torch

    sys.path.insert(0, str(ROOT / "experiments"))
    import full_size

    from segresearch.models import load_model

    path = Path(folder) / "random_sdxl.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        full_size.write(path)
    full_size.write_tokenizer(path.parent / "tokens")
    before = resident()
    with Peak() as memory:
        start = time.perf_counter()
        sd = load_model(path, dtype=getattr(torch, dtype), tokenizer=path.parent / "tokens")
        seconds = time.perf_counter() - start
    networks = (sd.unet, sd.vae, *sd.text.encoders)
    weights = sum(p.nbytes for network in networks for p in network.parameters())
    return {"seconds": seconds, "above": memory.whole - before, "weights": weights, "dtype": dtype}


def decode(px: int, dtype: str, device: str, rounds: int) -> dict:
    """Seconds of decoding a image with a VAE of SDXL's size, ours and diffusers'."""
    import torch
    from diffusers import AutoencoderKL
    from networks import filled

    from segresearch.models.vae import VAE, VAEConfig

    kind = getattr(torch, dtype)
    widths = (128, 256, 512, 512)
    with torch.device("meta"):
        ours: Any = VAE(VAEConfig())
        theirs: Any = AutoencoderKL(
            block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
        )  # fmt: skip
    ours = filled(ours, kind, device)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.eval().requires_grad_(False)
    z = torch.randn(1, 4, px // 8, px // 8, generator=torch.Generator().manual_seed(0)).to(device, kind)
    with torch.no_grad():
        calls = {"ours": lambda: ours.decode(z), "diffusers": lambda: theirs.decode(z).sample}
        return {"px": px, "dtype": dtype, "times": interleaved(calls, rounds, device)}


def _mini(device: str = "cpu") -> Any:
    from segresearch.models import load_model

    return load_model("mini", device=device)


def _mini_step(sd: Any, guidance: dict[str, Any], batch: int, denoiser: Any = None) -> Any:
    """A call that takes one step for `batch` images of mini."""
    import torch

    from segresearch.guidance import GuidedDenoiser
    from segresearch.sampling import initial_noise

    size = sd.default_size
    model = GuidedDenoiser(denoiser or sd.denoiser, guidance)
    with torch.no_grad():
        prepared = model.prepare({"conds": sd.encode(["a red cube"] * batch, size=size)})
    x = 3.0 * initial_noise(range(batch), sd.latent_shape(size)).to(sd.denoiser.sigmas.device)
    sigma = torch.full((batch,), 3.0, device=x.device)

    @torch.no_grad()
    def call() -> Any:
        return model(x, sigma, **prepared)

    return call


def mini_steps(batches: Sequence[int], methods: Sequence[str], rounds: int) -> dict:
    """Seconds of a step of mini for every batch size and guidance, and of decoding a batch whole and ten at a time."""
    import torch
    from networks import flops, terms

    sd = _mini()
    results: dict[str, Any] = {"rows": [], "decode": []}
    calls, counted = {}, {}
    for method in methods:
        for batch in batches:
            call = _mini_step(sd, terms(method), batch)
            calls[f"{method} {batch}"], counted[f"{method} {batch}"] = call, flops(call)
    for name, times in interleaved(calls, rounds).items():
        method, batch = name.rsplit(" ", 1)
        row = {"method": method, "batch": int(batch), "seconds": median(times), "flops": counted[name]}
        results["rows"].append(row)
    z = torch.randn(max(batches), *sd.latent_shape(sd.default_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ways = {part: (lambda part=part: [sd.decode(p) for p in z.split(part)]) for part in (1, 5, 10, len(z))}
        results["decode"] = [
            {"part": part, "images": len(z), "seconds": median(times)}
            for part, times in interleaved(ways, rounds).items()  # type: ignore[arg-type]
        ]
    return results


def mini_images(images: int, batch: int, steps: int, method: str = "SEG") -> dict:
    """Seconds of sampling images with mini, from text to pixels, without writing files."""
    import torch
    from networks import terms

    from segresearch.guidance import GuidedDenoiser
    from segresearch.sampling import initial_noise, sample

    sd = _mini()
    size, model = sd.default_size, GuidedDenoiser(sd.denoiser, terms(method))

    def run(seeds: range) -> None:
        conds = sd.encode(["a red cube"] * len(seeds), size=size)
        x = sample(model, initial_noise(seeds, sd.latent_shape(size)), steps=steps, conds=conds)
        with torch.no_grad():
            for part in x.split(10):
                sd.decode(part).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    run(range(2))
    start = time.perf_counter()
    for first in range(0, images, batch):
        run(range(first, min(first + batch, images)))
    return {"images": images, "batch": batch, "steps": steps, "seconds": time.perf_counter() - start}


def scaling(rounds: int, batch: int = 8) -> list[dict]:
    """Seconds of a step of mini over the number of SEG terms, and the operations of each."""
    from networks import flops

    from segresearch.guidance import SEG, perturbed

    sd = _mini()
    sigmas = (math.inf, 1.0, 2.0, 4.0)
    guidances = [{f"seg{s:g}": perturbed(f"seg{s:g}", SEG(sigma=s), 1.0) for s in sigmas[:n]} for n in range(5)]
    calls = {str(n): _mini_step(sd, guidance, batch) for n, guidance in enumerate(guidances)}
    times = interleaved(calls, rounds)
    base = flops(calls["0"])
    return [
        {"terms": int(n), "batch": batch, "seconds": median(times[n]), "flops_ratio": flops(call) / base}
        for n, call in calls.items()
    ]


def compiling(rounds: int, batch: int = 8) -> dict:
    """A CFG+SEG step of mini, eager and compiled: seconds, seconds of compiling, and the largest difference."""
    from networks import terms

    from segresearch.models.compute import Compute
    from segresearch.models.denoiser import Denoiser

    sd = _mini()
    compiled = Denoiser(sd.unet, sd.denoiser.alphas, compute=Compute(compile=True))
    calls = {
        "eager": _mini_step(sd, terms("CFG+SEG"), batch),
        "compiled": _mini_step(sd, terms("CFG+SEG"), batch, compiled),
    }
    start = time.perf_counter()
    first = calls["compiled"]()
    seconds = time.perf_counter() - start
    error = float((first - calls["eager"]()).abs().max())
    return {"batch": batch, "compile_seconds": seconds, "max_difference": error, "times": interleaved(calls, rounds)}


def analysis(load: str, way: str, quick: bool) -> dict:
    import torch
    from analysis import measure

    return measure(load, way, torch.get_num_threads(), quick)
