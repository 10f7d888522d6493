"""What is measured on a GPU, each part in a process of its own with its own limit: a part that fails is recorded as
failed, with what it had found until then, and the next one follows.

    python benchmarks/cuda.py PART JSON FILE     one part with these arguments; its results in FILE, as they come

Rows of a table are timed in turn, round after round in one process. `size` tiny and device cpu try the code.
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

from harness import installed, median, written  # noqa: E402

Save = Callable[[Any], None]


class Rows:
    """Calls by name, each built, warmed up and timed in turn; one that fails is left out, with its reason."""

    def __init__(self, device: str, save: Save, **facts: Any):
        self.calls: dict[str, Callable[[], Any]] = {}
        self.found: dict[str, Any] = {**facts, "times": {}, "first": {}, "failed": {}}
        self.device, self.save = device, save

    def wait(self) -> None:
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def add(self, name: str, build: Callable[[], Callable[[], Any]], warm: int = 3) -> None:
        """`build()` is called now, and what it makes `warm` times: the first is noted, with what it compiles."""
        start = time.perf_counter()
        with self.kept(name):
            call = build()
            for number in range(warm):
                call()
                self.wait()
                if number == 0:
                    self.found["first"][name] = round(time.perf_counter() - start, 2)
            self.calls[name] = call
        self.save(self.found)

    @contextlib.contextmanager
    def kept(self, name: str) -> Any:
        try:
            yield
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            self.found["failed"][name] = f"{type(error).__name__}: {said}"
            self.calls.pop(name, None)
            print(f"{name}: {self.found['failed'][name]}", file=sys.stderr, flush=True)

    def time(self, rounds: int) -> None:
        times = self.found["times"]
        for _ in range(rounds):
            for name, call in list(self.calls.items()):
                with self.kept(name):
                    self.wait()
                    start = time.perf_counter()
                    call()
                    self.wait()
                    times.setdefault(name, []).append(round(time.perf_counter() - start, 7))
            self.save(self.found)


def ceiling(save: Save, device: str, side: int) -> None:
    """FLOP/s of square matrix products and bytes/s of a copy."""
    import torch

    found = {}
    for dtype in ("bfloat16", "float16"):
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in "ab")
        rows = Rows(device, lambda _: None)
        rows.add(dtype, lambda a=a, b=b: lambda: a @ b)
        rows.time(15)
        found[dtype] = 2 * side**3 / median(rows.found["times"][dtype])
        save(found)


def flops(save: Save, px: int, device: str, size: str, whats: Sequence[str]) -> None:
    """Floating-point operations of a step for one picture, counted on the meta device."""
    from networks import steps_flops

    save({what: steps_flops(px, what, size=size)["step"] for what in whats})


def steps(
    save: Save, px: int, batch: int, device: str, size: str, whats: Sequence[str], ways: Sequence[str],
    beside: Sequence[str], rounds: int, counted: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Seconds of a step: `whats` in `ways`; beside, diffusers' UNet eager and compiled and its pipelines' steps.

    counted: the operations of a step for one picture, where they are known.
    """
    import torch
    from networks import guided, ours, pipeline_step, plain_denoiser, rows_of_diffusers, steps_flops, theirs

    from segresearch.models.compute import Compute

    dtype = torch.bfloat16
    facts = {"px": px, "batch": batch, "dtype": "bfloat16"}
    counted = counted or {what: steps_flops(px, what, size=size)["step"] for what in whats}
    flops = {what: batch * counted[what] for what in whats}
    rows = Rows(device, save, **facts, flops=flops, peak={})
    control = any("ControlNet" in what for what in whats)
    own = ours(dtype, device, control, size)
    denoisers: dict[str, Any] = {}
    for way in ways:
        given = Compute(graph="graph" in way, compile="compile" in way)
        denoisers[way] = plain_denoiser(own[0], given).to(device)
        if way == "compile+graph" and "compile" in denoisers:  # compiled once
            denoisers[way].run.networks = denoisers["compile"].run.networks
        for what in whats:
            with peak_of(rows.found["peak"], f"{what}, {way}", device):
                rows.add(f"{what}, {way}", lambda what=what, way=way: guided(
                    what, *own, px, dtype, device, batch, denoisers[way], size), warm=3 if rounds else 1)  # fmt: skip
    if any(b.startswith("compiled") for b in beside):  # which takes its time: ours first, lest there is none left
        rows.time(rounds)
        rows.found["times"] = {}
    if beside and installed("diffusers"):
        others = theirs(*own, size)

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
                for what, label, key in (("SEG", "PAG pipeline", "PAG"), ("CFG+SEG", "CFG + PAG pipeline", "CFG+PAG"),
                                         ("ControlNet+SEG", "ControlNet PAG pipeline", "ControlNet+PAG"))
                if what in whats
            ],
        }  # fmt: skip
        for which in beside:
            for name, build in builds[which]:
                rows.add(name, build, warm=3 if rounds else 1)
    elif beside:
        rows.found["failed"]["diffusers"] = "not installed"
    for way, denoiser in denoisers.items():
        if "graph" in way and device.startswith("cuda") and None in denoiser.run.graphs.graphs.values():
            rows.found["failed"][f"graphs of {way}"] = "; ".join(denoiser.run.graphs.reasons)
        if "compile" in way and any(net is compiled for net, compiled in denoiser.run.networks.items()):
            rows.found["failed"][f"networks of {way}"] = "ran uncompiled"
    rows.time(rounds)


@contextlib.contextmanager
def peak_of(peaks: dict[str, float], name: str, device: str) -> Any:
    """Notes the GiB of GPU memory that were used at most inside, all that was there before among them."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    yield
    if device.startswith("cuda"):
        peaks[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


def pictures(save: Save, px: int, batch: int, device: str, size: str, steps: int, ways: Sequence[str]) -> None:
    """Seconds of whole generations, from random conditionings to uint8 pixels: CFG + SEG, the VAE in fp32."""
    import torch
    from networks import inputs, ours, plain_denoiser, terms

    from segresearch.guidance import GuidedDenoiser
    from segresearch.models.compute import Compute
    from segresearch.sampling import sample

    rows = Rows(device, save, px=px, batch=batch, steps=steps)
    unet, vae = ours(torch.bfloat16, device, False, size)[0], random_vae(torch.float32, device, size)
    x, _, conds, _ = inputs(px, torch.bfloat16, device, batch, size)
    noise = x / x.std()

    def build(way: str) -> Any:
        denoiser = plain_denoiser(unet, Compute(graph="graph" in way, compile="compile" in way)).to(device)
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
    """Seconds and peak memory of decoding one picture whole and in tiles, and how far apart the two are."""
    import torch

    found: list[dict[str, Any]] = []
    for side in sides:
        z = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0)).to(device)
        for dtype in ("bfloat16", "float32"):
            vae = random_vae(getattr(torch, dtype), device, size)
            found += [decode_row(vae, z, None, device, dtype), decode_row(vae, z, tile, device, dtype)]
            whole, tiles = (one.pop("picture", None) for one in found[-2:])
            if whole is not None and tiles is not None:
                found[-1] |= {"apart": float((whole - tiles).abs().max()), "of": float(whole.abs().max())}
            save(found)


def decode_row(vae: Any, z: Any, tile: int | None, device: str, dtype: str) -> dict[str, Any]:
    import torch

    way = "whole" if tile is None else "tiles"
    rows, peaks = Rows(device, lambda _: None), {}
    weights = torch.cuda.memory_allocated() / 2**30 if device.startswith("cuda") else 0.0
    row: dict[str, Any] = {"px": z.shape[-1] * 8, "dtype": dtype, "way": way, "tile": tile}
    with peak_of(peaks, way, device), rows.kept(way):
        row["picture"] = vae.decode(z, tile=tile)
    rows.add(way, lambda: lambda: vae.decode(z, tile=tile), warm=1)
    rows.time(3)
    peak = peaks.get(way)
    return row | {"peak": peak, "above": None if peak is None else peak - weights,
                  "times": rows.found["times"].get(way), "failed": rows.found["failed"].get(way)}  # fmt: skip


def trials(save: Save, px: int, device: str, size: str, batches: Sequence[int], rounds: int) -> None:
    """What else might pay, on a plain captured step: memory layout, SDPA's backends, inference mode, cuDNN's search."""
    import copy

    import torch
    from networks import guided, ours, plain_denoiser, terms
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from segresearch.models.compute import Compute

    assert terms("plain") == {}
    unet, _ = ours(torch.bfloat16, device, False, size)
    last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    found = {}
    for batch in batches:
        rows = Rows(device, lambda part, batch=batch: save(found | {str(batch): part}), batch=batch)

        def build(net: Any = unet, around: Any = contextlib.nullcontext, graph: bool = True, batch: int = batch) -> Any:
            denoiser = plain_denoiser(net, Compute(graph=graph)).to(device)
            call = guided("plain", net, None, px, torch.bfloat16, device, batch, denoiser, size)

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
        found[str(batch)] = rows.found
        fused(rows.found, px, device, batch, rounds)
        save(found)


def fused(found: dict[str, Any], px: int, device: str, batch: int, rounds: int) -> None:
    """q, k and v as three products and as one, of SDXL's two widths: seconds of ten."""
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
        found.setdefault("qkv", {}).update({name: median(times) for name, times in rows.found["times"].items()})


def mini(save: Save, device: str, batches: Sequence[int], steps: int) -> None:
    """Pictures a second of the embedded model at `preset=quick`'s steps: SEG, from noise to uint8, fp32 and bf16."""
    import torch
    from networks import terms

    from segresearch.guidance import GuidedDenoiser
    from segresearch.models import load_sdxl
    from segresearch.models.compute import Compute
    from segresearch.sampling import initial_noise, sample

    found: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        for graph in (False, True):
            sdxl = load_sdxl("mini", getattr(torch, dtype), device, compute=Compute(graph=graph))
            for batch in batches:
                rows = Rows(device, lambda _: None)

                def call(batch: int = batch, sdxl: Any = sdxl) -> Any:
                    model = GuidedDenoiser(sdxl.denoiser, terms("SEG"))
                    noise, conds = initial_noise(range(batch), sdxl.latent_shape()), sdxl.encode([""] * batch)
                    x = sample(model, noise, "dpmpp_2m", "karras", steps, conds=conds, seeds=range(batch))
                    return sdxl.decode(x).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()

                rows.add("", lambda call=call: call, warm=1)
                rows.time(2)
                found.append({"dtype": dtype, "graph": graph, "batch": batch, "times": rows.found["times"].get(""),
                              "failed": rows.found["failed"].get("")})  # fmt: skip
                save(found)


def script(save: Save, device: str, name: str, given: Sequence[str]) -> None:
    """Seconds of a script of experiments/, from start to end."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(root / "experiments" / f"{name}.py"), f"device={device}", f"out={out}", *given]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    end = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    save({"name": name, "seconds": round(time.perf_counter() - start, 1), "code": done.returncode, "said": end[-2:]})


def memory(save: Save, px: int, device: str, who: str, what: str) -> None:
    """Peak memory of two steps of SDXL at full size."""
    import parts

    save({"who": who, "what": what, "px": px, **parts.peak(who, what, px, "bfloat16", device)})


def main() -> None:
    name, arguments, into = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    import torch

    if arguments["device"] == "cpu":
        torch.set_num_threads(1)
    with torch.no_grad():
        {f.__name__: f for f in (ceiling, flops, steps, pictures, decode, trials, mini, script, memory)}[name](
            lambda found: written(into, json.dumps(found)), **arguments
        )


if __name__ == "__main__":
    main()
