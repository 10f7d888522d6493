"""The measurements on a GPU. Each part is a separate process with a time limit. A part that fails is recorded as
failed, with its results until then, and the next part follows.

    python benchmarks/cuda.py PART JSON FILE     one part with these arguments; FILE is rewritten with each result

The rows of a table take turns, round after round in one process. size=tiny and device=cpu test the code.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from harness import installed, median, write  # noqa: E402

Save = Callable[[Any], None]


class Rows:
    """Calls by name: built, warmed up, and timed in turns. A call that fails is dropped and its error recorded."""

    def __init__(self, device: str, save: Save, **facts: Any):
        self.calls: dict[str, Callable[[], Any]] = {}
        self.results: dict[str, Any] = {**facts, "times": {}, "first": {}, "failed": {}}
        self.device, self.save = device, save

    def wait(self) -> None:
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def add(self, name: str, build: Callable[[], Callable[[], Any]], warm: int = 3) -> None:
        """Calls `build()`, then its call `warm` times. The first call is timed, compilation included."""
        start = time.perf_counter()
        with self.guarded(name):
            call = build()
            for number in range(warm):
                call()
                self.wait()
                if number == 0:
                    self.results["first"][name] = round(time.perf_counter() - start, 2)
            self.calls[name] = call
        self.save(self.results)

    @contextlib.contextmanager
    def guarded(self, name: str) -> Any:
        try:
            yield
        except Exception as error:
            message = " ".join(str(error).split())[:200]
            self.results["failed"][name] = f"{type(error).__name__}: {message}"
            self.calls.pop(name, None)
            print(f"{name}: {self.results['failed'][name]}", file=sys.stderr, flush=True)

    def time(self, rounds: int) -> None:
        times = self.results["times"]
        for _ in range(rounds):
            for name, call in list(self.calls.items()):
                with self.guarded(name):
                    self.wait()
                    start = time.perf_counter()
                    call()
                    self.wait()
                    times.setdefault(name, []).append(round(time.perf_counter() - start, 7))
            self.save(self.results)


def ceiling(save: Save, device: str, side: int) -> None:
    """FLOP/s of square matrix products and bytes/s of a copy."""
    import torch

    results = {}
    for dtype in ("bfloat16", "float16"):
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in "ab")
        rows = Rows(device, lambda _: None)
        rows.add(dtype, lambda a=a, b=b: lambda: a @ b)
        rows.time(15)
        results[dtype] = 2 * side**3 / median(rows.results["times"][dtype])
        save(results)


def flops(save: Save, px: int, device: str, size: str, methods: Sequence[str]) -> None:
    """Floating-point operations of a step for one image, counted on the meta device."""
    from networks import steps_flops

    save({method: steps_flops(px, method, size=size)["step"] for method in methods})


def steps(
    save: Save, px: int, batch: int, device: str, size: str, methods: Sequence[str], ways: Sequence[str],
    rivals: Sequence[str], rounds: int, counted: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Seconds of a step of `methods` in `ways`, and of `rivals`: diffusers' UNet, eager or compiled, and pipelines.

    counted: the operations of a step for one image, if known.
    """
    import torch
    from networks import (
        guided,
        our_networks,
        pipeline_step,
        rows_of_diffusers,
        steps_flops,
        their_networks,
        unguided_denoiser,
    )

    from segresearch.models.compute import Compute

    dtype = torch.bfloat16
    facts = {"px": px, "batch": batch, "dtype": "bfloat16"}
    counted = counted or {method: steps_flops(px, method, size=size)["step"] for method in methods}
    flops = {method: batch * counted[method] for method in methods}
    rows = Rows(device, save, **facts, flops=flops, peak={})
    control = any("ControlNet" in method for method in methods)
    nets = our_networks(dtype, device, control, size)
    denoisers: dict[str, Any] = {}
    for way in ways:
        compute = Compute(graph="graph" in way, compile="compile" in way)
        denoisers[way] = unguided_denoiser(nets[0], compute).to(device)
        if way == "compile+graph" and "compile" in denoisers:  # compiled once
            denoisers[way].run.networks = denoisers["compile"].run.networks
        for method in methods:
            with peak_of(rows.results["peak"], f"{method}, {way}", device):
                rows.add(
                    f"{method}, {way}",
                    lambda method=method, way=way: guided(
                        method, *nets, px, dtype, device, batch, denoisers[way], size
                    ),
                    warm=3 if rounds else 1,
                )
    if any(b.startswith("compiled") for b in rivals):  # compiling may use up the time: ours first
        rows.time(rounds)
        rows.results["times"] = {}
    if rivals and installed("diffusers"):
        others = their_networks(*nets, size)

        def compiled(mode: str | None) -> Any:
            def build() -> Any:
                net = torch.compile(others[0], dynamic=False, mode=mode)
                call = rows_of_diffusers(batch, net, px, dtype, device, size)
                return lambda: (torch.compiler.cudagraph_mark_step_begin(), call())[1]

            return build

        builds = {
            "eager": [("diffusers UNet, eager", lambda: rows_of_diffusers(batch, others[0], px, dtype, device, size))],
            "compiled": [("diffusers UNet, compiled", compiled(None))],
            "compiled, graph": [("diffusers UNet, compiled, graph", compiled("reduce-overhead"))],
            "pipelines": [
                (f"diffusers {label}", lambda key=key: pipeline_step(key, *others, px, dtype, device, batch, size))
                for method, label, key in (("SEG", "PAG pipeline", "PAG"), ("CFG+SEG", "CFG + PAG pipeline", "CFG+PAG"),
                                         ("ControlNet+SEG", "ControlNet PAG pipeline", "ControlNet+PAG"))
                if method in methods
            ],
        }  # fmt: skip
        for which in rivals:
            for name, build in builds[which]:
                rows.add(name, build, warm=3 if rounds else 1)
    elif rivals:
        rows.results["failed"]["diffusers"] = "not installed"
    for way, denoiser in denoisers.items():
        if "graph" in way and device.startswith("cuda") and None in denoiser.run.graphs.graphs.values():
            rows.results["failed"][f"graphs of {way}"] = "a capture failed, the warning says why"
        if "compile" in way and any(net is compiled for net, compiled in denoiser.run.networks.items()):
            rows.results["failed"][f"networks of {way}"] = "ran uncompiled"
    rows.time(rounds)


@contextlib.contextmanager
def peak_of(peaks: dict[str, float], name: str, device: str) -> Any:
    """Records the peak GPU memory of the block in GiB, including what was allocated before it."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    yield
    if device.startswith("cuda"):
        peaks[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


def images(save: Save, px: int, batch: int, device: str, size: str, steps: int, ways: Sequence[str]) -> None:
    """Seconds of complete images, from random conditionings to uint8 pixels: CFG + SEG, the VAE in fp32."""
    import torch
    from networks import inputs, our_networks, terms, unguided_denoiser

    from segresearch.guidance import GuidedDenoiser
    from segresearch.models.compute import Compute
    from segresearch.sampling import sample

    rows = Rows(device, save, px=px, batch=batch, steps=steps)
    unet, vae = our_networks(torch.bfloat16, device, False, size)[0], random_vae(torch.float32, device, size)
    x, _, conds, _ = inputs(px, torch.bfloat16, device, batch, size)
    noise = x / x.std()

    def build(way: str) -> Any:
        denoiser = unguided_denoiser(unet, Compute(graph="graph" in way, compile="compile" in way)).to(device)
        model = GuidedDenoiser(denoiser, terms("CFG+SEG"))

        def call() -> torch.Tensor:
            latents = sample(model, noise, "euler", steps=steps, conds=conds)
            pixels = torch.cat([vae.decode(z) for z in latents.split(1)])
            return pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()

        return call

    for way in ways:
        rows.add(way, lambda way=way: build(way), warm=1)
    rows.time(3)


def random_vae(dtype: Any, device: str, size: str) -> Any:
    """A VAE of SDXL's size, or a tiny one, with random weights."""
    import torch
    from networks import filled

    from segresearch.models.vae import VAE, VAEConfig

    with torch.device("meta"):
        vae = VAE(VAEConfig(block_out_channels=(32, 32, 64, 64)) if size == "tiny" else VAEConfig())
    return filled(vae, dtype, device)


def decode(save: Save, sides: Sequence[int], device: str, tile: int, size: str) -> None:
    """Seconds and peak memory of decoding one image whole and in tiles, and their largest difference."""
    import torch

    results: list[dict[str, Any]] = []
    for side in sides:
        z = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0)).to(device)
        for dtype in ("bfloat16", "float32"):
            vae = random_vae(getattr(torch, dtype), device, size)
            results += [decode_row(vae, z, None, device, dtype), decode_row(vae, z, tile, device, dtype)]
            whole, tiles = (one.pop("image", None) for one in results[-2:])
            if whole is not None and tiles is not None:
                results[-1] |= {"difference": float((whole - tiles).abs().max()), "largest": float(whole.abs().max())}
            save(results)


def decode_row(vae: Any, z: Any, tile: int | None, device: str, dtype: str) -> dict[str, Any]:
    import torch

    way = "whole" if tile is None else "tiles"
    rows, peaks = Rows(device, lambda _: None), {}
    weights = torch.cuda.memory_allocated() / 2**30 if device.startswith("cuda") else 0.0
    row: dict[str, Any] = {"px": z.shape[-1] * 8, "dtype": dtype, "way": way, "tile": tile}
    with peak_of(peaks, way, device), rows.guarded(way):
        row["image"] = vae.decode(z, tile=tile)
    rows.add(way, lambda: lambda: vae.decode(z, tile=tile), warm=1)
    rows.time(3)
    peak = peaks.get(way)
    return row | {"peak": peak, "above": None if peak is None else peak - weights,
                  "times": rows.results["times"].get(way), "failed": rows.results["failed"].get(way)}  # fmt: skip


def trials(save: Save, px: int, device: str, size: str, batches: Sequence[int], rounds: int) -> None:
    """Other options for an unguided step with a graph: memory layout, SDPA, inference mode, cuDNN's search."""
    import copy

    import torch
    from networks import guided, our_networks, terms, unguided_denoiser
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from segresearch.models.compute import Compute

    assert terms("unguided") == {}
    unet, _ = our_networks(torch.bfloat16, device, False, size)
    last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    results = {}
    for batch in batches:
        rows = Rows(device, lambda part, batch=batch: save(results | {str(batch): part}), batch=batch)

        def build(net: Any = unet, around: Any = contextlib.nullcontext, graph: bool = True, batch: int = batch) -> Any:
            denoiser = unguided_denoiser(net, Compute(graph=graph)).to(device)
            call = guided("unguided", net, None, px, torch.bfloat16, device, batch, denoiser, size)

            def inside() -> Any:
                with around():
                    return call()

            return inside

        def searched(graph: bool = True, build: Any = build) -> Any:
            torch.backends.cudnn.benchmark = True
            try:
                call = build(graph=graph)
                for _ in range(3):
                    call()
                return call
            finally:
                torch.backends.cudnn.benchmark = False

        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
                    "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
        rows.add("as it is", build)
        rows.add("channels_last", lambda build=build: build(last))
        for name, backend in backends.items():
            rows.add(f"SDPA {name}", lambda b=backend, build=build: build(around=lambda: sdpa_kernel(b)))
        rows.add("inference mode", lambda build=build: build(around=torch.inference_mode))
        rows.add("eager, no_grad", lambda build=build: build(graph=False))
        rows.add("eager, inference mode", lambda build=build: build(around=torch.inference_mode, graph=False))
        rows.add("cuDNN's search", searched)
        rows.time(rounds)
        results[str(batch)] = rows.results
        fused(rows.results, px, device, batch, rounds)
        save(results)


def fused(results: dict[str, Any], px: int, device: str, batch: int, rounds: int) -> None:
    """Seconds of ten projections to q, k and v at SDXL's two widths, as three products and as one."""
    import torch

    for width, tokens in ((640, (px // 16) ** 2), (1280, (px // 32) ** 2)):
        x = torch.randn(batch, tokens, width, device=device).bfloat16()
        weights = [torch.randn(width, width, device=device).bfloat16() for _ in range(3)]
        whole = torch.cat(weights)
        rows = Rows(device, lambda _: None)
        rows.add(f"{width} wide, three", lambda x=x, weights=weights: lambda: [
            torch.nn.functional.linear(x, w) for _ in range(10) for w in weights])  # fmt: skip
        rows.add(f"{width} wide, one", lambda x=x, whole=whole: lambda: [
            torch.nn.functional.linear(x, whole) for _ in range(10)])  # fmt: skip
        rows.time(rounds)
        results.setdefault("qkv", {}).update({name: median(times) for name, times in rows.results["times"].items()})


def mini(save: Save, device: str, batches: Sequence[int], steps: int) -> None:
    """Images a second of the embedded model at `preset=quick`'s steps: SEG, from noise to uint8, fp32 and bf16."""
    import torch
    from networks import terms

    from segresearch.guidance import GuidedDenoiser
    from segresearch.models import load_model
    from segresearch.models.compute import Compute
    from segresearch.sampling import initial_noise, sample

    results: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        for graph in (False, True):
            sd = load_model("mini", getattr(torch, dtype), device, compute=Compute(graph=graph))
            for batch in batches:
                rows = Rows(device, lambda _: None)

                def call(batch: int = batch, sd: Any = sd) -> Any:
                    model = GuidedDenoiser(sd.denoiser, terms("SEG"))
                    noise, conds = initial_noise(range(batch), sd.latent_shape()), sd.encode([""] * batch)
                    x = sample(model, noise, "dpmpp_2m", "karras", steps, conds=conds, seeds=range(batch))
                    return sd.decode(x).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()

                rows.add("", lambda call=call: call, warm=1)
                rows.time(2)
                results.append({"dtype": dtype, "graph": graph, "batch": batch, "times": rows.results["times"].get(""),
                              "failed": rows.results["failed"].get("")})  # fmt: skip
                save(results)


def script(save: Save, device: str, name: str, overrides: Sequence[str]) -> None:
    """Seconds of a script of experiments/, from start to end."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as out:
        file = root / "experiments" / f"{name}.py"
        command = [sys.executable, str(file), f"device={device}", f"out={out}", *overrides]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    end = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    save({"name": name, "seconds": round(time.perf_counter() - start, 1), "code": done.returncode, "output": end[-2:]})


def memory(save: Save, px: int, device: str, who: str, method: str) -> None:
    """Peak memory of two steps of SDXL at full size."""
    import parts

    save({"who": who, "method": method, "px": px, **parts.peak(who, method, px, "bfloat16", device)})


def main() -> None:
    name, arguments, into = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    import torch

    if arguments["device"] == "cpu":
        torch.set_num_threads(1)
    with torch.no_grad():
        {f.__name__: f for f in (ceiling, flops, steps, images, decode, trials, mini, script, memory)}[name](
            lambda results: write(into, json.dumps(results)), **arguments
        )


if __name__ == "__main__":
    main()
