"""Encode captions and images before the training of the CLIPs and the UNet, shard by shard. Existing shards are kept.

python -m experiments.mini.encode tokens     # <shard>.npy: uint16 (variants, scenes, 48), by the first tokenizer
python -m experiments.mini.encode latents    # <shard>.npy: fp16 (scenes, 4, 16, 16), scaled latents of the trained VAE

--model takes the VAE of a finished model in place of that in <runs>/vae.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from experiments.mini.common import save_array
from experiments.mini.render import SHARD, held, shard_path, shard_rows
from experiments.mini.tokenizer import load_tokenizer, tokenize
from experiments.mini.train_vae import load_vae
from segresearch.models import load_model
from segresearch.scenes.scenes import captions


def load_shards(folder: Path, count: int, axis: int) -> torch.Tensor:
    """The first `count` scenes of tokens (axis 1) or latents (axis 0), in memory."""
    paths = {shard_path(folder, k): rows for k, rows in shard_rows(count)}
    if missing := [path.name for path, rows in paths.items() if held(path, axis) < len(rows)]:
        few = f"shards {missing[0]} … ({len(missing)} in all) are missing, or hold too few"
        raise ValueError(f"{folder}: {few}: run experiments.mini.encode")
    whole = np.concatenate([np.load(p) for p in paths], axis=axis)
    return torch.from_numpy(whole).narrow(axis, 0, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("tokens", "latents"))
    parser.add_argument("--runs", type=Path, default=Path("runs/mini"), help="folder of scenes/, tokenizers/, vae/")
    parser.add_argument("--model", help="of the VAE, a diffusers folder or mini, instead of <runs>/vae")
    parser.add_argument("--images", type=int, default=40 * SHARD, help="scenes 0 … are encoded")
    parser.add_argument("--variants", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--part", default="0/1", help="k/n: only shards k, k + n, ...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the VAE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.runs / args.kind
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.runs / "tokenizers" / "tokenizer") if args.kind == "tokens" else None
    vae = None
    if args.kind == "latents":
        vae = load_model(args.model).vae if args.model else load_vae(args.runs / "vae" / "vae.pt")[0]
        vae.to(args.device)
    k, n = map(int, args.part.split("/"))
    for shard, index in shard_rows(args.images)[k::n]:
        path = shard_path(out, shard)
        if held(path, axis=1 if tokenizer is not None else 0) >= len(index):
            continue
        if tokenizer is not None:
            texts = [captions(index, seed=args.seed, variant=v) for v in range(args.variants)]
            array = torch.stack([tokenize(tokenizer, t) for t in texts]).numpy().astype(np.uint16)
        else:
            assert vae is not None
            images = torch.from_numpy(np.load(shard_path(args.runs / "scenes", shard))[: len(index)])
            rows = 128 if args.device == "cpu" else SHARD
            with torch.no_grad(), torch.autocast(torch.device(args.device).type, torch.bfloat16):
                parts = [vae.encode(part.to(args.device).float() / 127.5 - 1) for part in images.split(rows)]
            array = torch.cat(parts).half().cpu().numpy()
        save_array(path, array)
        print(path, flush=True)


if __name__ == "__main__":
    main()
