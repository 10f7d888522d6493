"""Render the training scenes once, into shards that the other scripts read, uint8 (scenes, 3, 64, 64).

    <out>/00000.npy         images
    <out>/maps/00000.npy    of the first --maps scenes: exact edges, Canny's edges, exact inverse depth; 0 to 255

Scene i is scenes([i], seed), so the shard number and the seed fix every pixel. The last shard may hold fewer scenes
than SHARD. Shards that hold enough are kept: the same command resumes. Several processes share the work with
--part k/n.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from experiments.mini.common import save_array
from segresearch.control_images.prepare import canny
from segresearch.scenes.scenes import Scenes, depth_image, scenes

SHARD = 4096
MAPS = ("edges", "canny", "depth")


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.npy"


def open_images(folder: Path, count: int) -> list[np.ndarray]:
    """The shards of the first `count` scenes, memory-mapped. Raises ValueError if one is missing or too short."""
    paths = {shard_path(folder, k): rows for k, rows in shard_rows(count)}
    if missing := [path.name for path, rows in paths.items() if held(path, axis=0) < len(rows)]:
        few = f"shards {missing[0]} … ({len(missing)} in all) are missing, or hold too few"
        raise ValueError(f"{folder}: {few}: run experiments.mini.render")
    return [np.load(path, mmap_mode="r") for path in paths]


def shard_rows(count: int) -> list[tuple[int, range]]:
    """The shards of the first `count` scenes, and which scenes each must hold."""
    return [(start // SHARD, range(start, min(start + SHARD, count))) for start in range(0, count, SHARD)]


def held(path: Path, axis: int) -> int:
    """How many scenes a shard holds, which lie along this axis; 0 for a shard that is not there."""
    return np.load(path, mmap_mode="r").shape[axis] if path.exists() else 0


def take(shards: list[np.ndarray], index: torch.Tensor) -> torch.Tensor:
    """Images (len(index), 3, 64, 64) in [−1, 1], fp32."""
    return pick(shards, index).float() / 127.5 - 1


def pick(shards: list[np.ndarray], index: torch.Tensor) -> torch.Tensor:
    """What the shards hold of these scenes, (len(index), 3, 64, 64) uint8."""
    return torch.from_numpy(np.stack([shards[i // SHARD][i % SHARD] for i in index.tolist()]))


def control_maps(batch: Scenes) -> np.ndarray:
    """The control images of scenes, one channel for each of MAPS: uint8 (scenes, 3, h, w)."""
    images = batch.images.permute(0, 2, 3, 1).numpy()  # (b, 3, h, w) -> (b, h, w, 3)
    found = torch.cat([canny(Image.fromarray(image))[:, 0] for image in images])  # (b, h, w)
    maps = torch.stack([batch.edges.float(), found, depth_image(batch.depth)[:, 0]], dim=1)
    return (maps * 255).round().to(torch.uint8).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mini/scenes"))
    parser.add_argument("--images", type=int, default=40 * SHARD, help="scenes 0 … are rendered")
    parser.add_argument("--maps", type=int, default=32 * SHARD, help="scenes 0 … with control images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1", help="k/n: only shards k, k + n, ...")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (args.out / "maps").mkdir(parents=True, exist_ok=True)
    k, n = map(int, args.part.split("/"))
    for shard, rows in shard_rows(args.images)[k::n]:
        path, maps = shard_path(args.out, shard), shard_path(args.out / "maps", shard)
        mapped = len(rows) if rows.start < args.maps else 0
        if held(path, axis=0) >= len(rows) and held(maps, axis=0) >= mapped:
            continue
        batch = scenes(rows, seed=args.seed)
        if mapped:
            save_array(maps, control_maps(batch))
        save_array(path, batch.images.numpy())
        print(path, flush=True)


if __name__ == "__main__":
    main()
