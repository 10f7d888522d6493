"""SDXL at its full size, with random weights: does it load from one file and take guided steps in the memory it should?

    python experiments/full_size.py --folder /tmp/full_size --steps 1

Writes a random SDXL of 3.47 billion parameters (UNet 2.57, text encoders 0.12 and 0.69, VAE 0.08) in float16 as one
file in the original layout (6.9 GB; an existing one is used again), loads it in bfloat16, takes guided steps (CFG and
SEG) and prints times and the peak of resident memory after each part. The images are noise; the sizes are the point.
"""

import argparse
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

GIB = 2**30


def peak() -> float:
    """The highest resident memory of this process so far, in GiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) * 1024 / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def original_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of an SDXL file in the original layout."""
    import torch  # late, here and below: --help answers at once
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from segresearch.checkpoints import key_maps
    from segresearch.models.network_configs import UNetConfig
    from segresearch.models.unet import UNet
    from segresearch.models.vae import VAE, VAEConfig

    text: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
    clip: dict[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    big: dict[str, Any] = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
    }
    with torch.device("meta"):
        networks = (
            (UNet(UNetConfig()), key_maps.unet_map(UNetConfig())),
            (VAE(VAEConfig()), key_maps.vae_map(4)),
            (CLIPTextModel(CLIPTextConfig(**text, **clip)), key_maps.clip_map),
            (
                CLIPTextModelWithProjection(CLIPTextConfig(**text, **big, projection_dim=1280)),
                key_maps.open_clip_map,
            ),
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for network, source_of in networks:
        for key, weight in network.state_dict().items():
            name, third, transpose = source_of(key)
            shape = tuple(weight.shape[::-1] if transpose else weight.shape)
            if ".mid.attn_1." in name and len(shape) == 2:
                shape = (*shape, 1, 1)  # the VAE's attention is written as 1×1 convolutions
            shapes[name] = shape if third is None else (3 * shape[0], *shape[1:])
    return shapes


def write(path: Path, seed: int = 0) -> None:
    """A float16 file of that layout: weights of variance 1/fan-in from one repeated block, norms 1, biases 0."""
    import torch

    shapes = original_shapes()
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(seed))  # odd: rows do not repeat
    text = json.dumps(header).encode()
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if len(shape) == 1:
                values = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
                file.write(values.half().numpy().data)
                continue
            piece = (block / math.sqrt(math.prod(shape[1:]))).half().numpy()
            left = math.prod(shape)
            while left:
                file.write(piece[:left].data)
                left -= min(left, len(piece))
    os.replace(partial, path)


def write_tokenizer(folder: Path) -> None:
    """Single bytes as tokens, at SDXL's length and with its two special tokens."""
    folder.mkdir(exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))


def main() -> None:
    parser = argparse.ArgumentParser(description="A full-size SDXL with random weights: memory and times.")
    parser.add_argument("--folder", type=Path, required=True, help="where the 6.9 GB file is written")
    parser.add_argument("--steps", type=int, default=1, help="guided steps taken (of a schedule of 25)")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--decode", action="store_true", help="decode the latents as well")
    parser.add_argument("--vae-dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tile", type=int, help="side of the VAE's tiles in pixels (compute.vae_tile)")
    parser.add_argument("--offload", action="store_true", help="text encoders and VAE on the CPU (compute.offload)")
    options = parser.parse_args()

    import torch

    from segresearch.guidance import SEG, GuidedDenoiser, cfg, perturbed
    from segresearch.models import load_model
    from segresearch.models.compute import Compute
    from segresearch.sampling import initial_noise, sample, sigmas

    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "random_sdxl.safetensors"
    clock = time.monotonic()

    def report(what: str) -> None:
        nonlocal clock
        now = time.monotonic()
        gpu = ""
        if options.device.startswith("cuda"):  # of this part alone
            torch.cuda.synchronize()
            now = time.monotonic()
            most, kept = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            gpu = f", GPU {most / GIB:.2f} GiB, {kept / GIB:.2f} with what the allocator keeps"
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print(f"{what}: {now - clock:.1f} s, peak {peak():.2f} GiB{gpu}", flush=True)
        clock = now

    if not path.is_file():
        write(path)
    write_tokenizer(options.folder / "tokens")
    report(f"file of {path.stat().st_size / GIB:.2f} GiB")
    sd = load_model(
        path, getattr(torch, options.dtype), options.device, tokenizer=options.folder / "tokens",
        vae_dtype=options.vae_dtype and getattr(torch, options.vae_dtype),
        compute=Compute(vae_tile=options.tile, offload=options.offload),
    )  # fmt: skip
    networks = (sd.unet, sd.vae, *sd.text.encoders)
    bytes_ = sum(p.nbytes for network in networks for p in network.parameters())
    counts = [sum(p.numel() for p in network.parameters()) / 1e9 for network in networks]
    print("billions of parameters: " + ", ".join(f"{n:.3f}" for n in counts) + f"; weights {bytes_ / GIB:.2f} GiB")
    report("loaded")
    size = (options.size, options.size)
    conds = sd.encode(["a red cube"], size=size)
    report("encoded")
    model = GuidedDenoiser(
        sd.denoiser, {"cfg": cfg(5.0), "seg": perturbed("seg", SEG(sigma=math.inf, where="mid"), scale=3.0)}
    )
    print(model)
    schedule = sigmas(sd.denoiser, "auto", 25)
    schedule = torch.cat([schedule[: options.steps], schedule[-1:]])
    noise = initial_noise([0], sd.latent_shape(size))
    with torch.no_grad():
        x = sample(model, noise, "euler", schedule, conds=conds)
        report(f"{options.steps} guided steps at {options.size} px")
        if options.decode:
            print(f"image {tuple(sd.decode(x).shape)}")
            report("decoded")
    print(f"latents finite: {bool(x.isfinite().all())}, std {float(x.std()):.3f}")


if __name__ == "__main__":
    main()
