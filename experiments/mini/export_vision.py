"""Write the small networks that evaluation needs into the model folder, weights in fp16: vision/, attributes/.

python -m experiments.mini.export_vision --clip runs/mini/clip2/clip.pt --out segresearch/weights/mini
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segresearch.evaluation.vision import VisionTower


def write_part(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    from experiments.mini.export import write_json, write_weights  # which in turn may call this module

    write_weights(folder / "model.safetensors", weights)
    write_json(folder / "config.json", config)


def export_vision(out: Path, clip_file: Path) -> None:
    """Write <out>/vision from the vision tower of a trained clip.pt."""
    trained: dict[str, Tensor] = torch.load(clip_file, weights_only=True)["weights"]
    weights = {k: v for k, v in trained.items() if k.split(".")[0] in ("vision", "vision_projections")}
    projections = [len(weights[f"vision_projections.{i}.weight"]) for i in range(2)]
    config: dict[str, Any] = {
        "width": len(weights["vision.convs.0.weight"]),
        "features": len(weights["vision.head.weight"]),
        "projections": projections,
    }
    VisionTower(**config).load_state_dict(weights)
    write_part(out / "vision", weights, config)


def export_attributes(out: Path, namer_file: Path) -> None:
    """Write <out>/attributes from a trained namer.pt."""
    packed = torch.load(namer_file, weights_only=True)
    write_part(out / "attributes", packed["weights"], json.loads(packed["config"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, default=Path("runs/mini/clip/clip.pt"))
    parser.add_argument("--attributes", type=Path, default=Path("runs/mini/attributes/namer.pt"))
    parser.add_argument("--out", type=Path, default=Path("segresearch/weights/mini"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part, source, write in (
        ("vision", args.clip, export_vision),
        ("attributes", args.attributes, export_attributes),
    ):
        if source.exists():
            write(args.out, source)
        print(f"{args.out / part}: {'written' if source.exists() else f'left alone, no {source}'}")


if __name__ == "__main__":
    main()
