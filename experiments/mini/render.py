"""Render the training scenes once, into shards that the other scripts read: <out>/00000.npy, uint8 (scenes, 3, 64, 64).

Scene i is scenes([i], seed), so the shard number and the seed fix every pixel. Existing shards are kept: the same
command resumes. Several processes can share the work with --part k/n.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from experiments.mini.common import save_array
from segresearch.scenes.scenes import scenes

SHARD = 4096


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.npy"


def open_images(folder: Path, count: int) -> list[np.ndarray]:
    """The first ⌈count / SHARD⌉ shards, memory-mapped. Raises ValueError if one is missing."""
    paths = [shard_path(folder, k) for k in range(-(-count // SHARD))]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise ValueError(
            f"{folder}: shards {missing[0]} … ({len(missing)} in all) are missing: run experiments.mini.render"
        )
    return [np.load(p, mmap_mode="r") for p in paths]


def take(shards: list[np.ndarray], index: torch.Tensor) -> torch.Tensor:
    """Images (len(index), 3, 64, 64) in [−1, 1], fp32."""
    picked = np.stack([shards[i // SHARD][i % SHARD] for i in index.tolist()])
    return torch.from_numpy(picked).float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mini/scenes"))
    parser.add_argument("--shards", type=int, default=40, help=f"shards of {SHARD} scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1", help="k/n: only shards k, k + n, ...")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    k, n = map(int, args.part.split("/"))
    for shard in range(k, args.shards, n):
        path = shard_path(args.out, shard)
        if not path.exists():
            save_array(path, scenes(range(shard * SHARD, (shard + 1) * SHARD), seed=args.seed).images.numpy())
            print(f"{path}", flush=True)


if __name__ == "__main__":
    main()
