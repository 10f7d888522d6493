"""Write mini from its trained parts, in the diffusers SDXL folder layout, with weights in fp16.

In addition to the parts of the pipeline: controlnet/<name> for each trained ControlNet and, for evaluation, vision (the
CLIPs' vision tower) and attributes (the attribute classifier).

python -m experiments.mini.export --out segresearch/weights/mini

Beside them unet_weak, the smaller UNet of autoguidance; with --weak-only nothing else.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from experiments.mini.common import load_state, replace_file
from experiments.mini.train_clip import load_clips
from experiments.mini.train_controlnet import CONFIG as CONTROLNET_CONFIG
from experiments.mini.train_unet import CONFIG as UNET_CONFIG
from experiments.mini.train_vae import load_vae
from segresearch.cli import one_line_errors
from segresearch.metrics.mini_vision import VisionTower
from segresearch.models.unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.42.1",
    "add_watermarker": False,
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    replace_file(path, text.encode())


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """fp16 safetensors. Raises ValueError for a weight that is not finite in fp16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
    overflowing = [name for name, value in half.items() if not value.isfinite().all()]
    if overflowing:
        raise ValueError(f"{path}: not finite in fp16: {overflowing[:3]}")
    data = to_safetensors(half, metadata={"format": "pt"})
    replace_file(path, data)


def copy_folder(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        replace_file(target / path.name, path.read_bytes())


def write_part(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    write_weights(folder / "model.safetensors", weights)
    write_json(folder / "config.json", config)


def export_vision(out: Path, clip_file: Path) -> None:
    """Write <out>/vision from the vision tower of a trained clip.pt."""
    trained: dict[str, Tensor] = load_state(clip_file)["weights"]
    weights = {k: v for k, v in trained.items() if k.split(".")[0] in ("vision", "vision_projections")}
    projections = [len(weights[f"vision_projections.{i}.weight"]) for i in range(2)]
    config: dict[str, Any] = {
        "width": len(weights["vision.convs.0.weight"]),
        "features": len(weights["vision.head.weight"]),
        "projections": projections,
    }
    VisionTower(**config).load_state_dict(weights)
    write_part(out / "vision", weights, config)


def export_attributes(out: Path, classifier_file: Path) -> None:
    """Write <out>/attributes from a trained classifier.pt."""
    packed = load_state(classifier_file)
    write_part(out / "attributes", packed["weights"], json.loads(packed["config"]))


def export_weak(out: Path, unet_file: Path) -> int:
    """Write <out>/unet_weak from a trained unet.pt with its config; the steps of its training."""
    packed = load_state(unet_file)
    write_weights(out / "unet_weak" / WEIGHTS, packed["weights"])
    write_json(out / "unet_weak" / "config.json", json.loads(packed["config"]))
    return packed["step"]


def export(out: Path, runs: Path) -> dict[str, Any]:
    """Write the folder from runs/{tokenizers,vae,clip,unet}; without a trained unet, with its initial weights."""
    vae, vae_config = load_vae(runs / "vae" / "vae.pt")
    clips, _ = load_clips(runs / "clip" / "clip.pt")
    unet_file = runs / "unet" / "unet.pt"
    if unet_file.exists():
        packed = load_state(unet_file)
    else:
        packed = {"step": 0, "weights": UNet(UNetConfig.from_dict(UNET_CONFIG)).state_dict()}
    for name in ("tokenizer", "tokenizer_2"):
        copy_folder(runs / "tokenizers" / name, out / name)
    for name in ("text_encoder", "text_encoder_2"):
        with tempfile.TemporaryDirectory() as folder:  # transformers writes its own names and config
            getattr(clips, name).half().save_pretrained(folder)
            copy_folder(Path(folder), out / name)
        config = json.loads((out / name / "config.json").read_text())
        # transformers loads in the dtype named here, diffusers the other parts in fp32: fp32 for all, stored in fp16
        write_json(out / name / "config.json", {**config, "dtype": "float32"})
    for name in ("canny", "depth"):
        trained = runs / f"controlnet_{name}" / "controlnet.pt"
        if trained.exists():
            target = out / "controlnet" / name
            write_weights(target / WEIGHTS, load_state(trained)["weights"])
            write_json(target / "config.json", CONTROLNET_CONFIG)
    export_vision(out, runs / "clip" / "clip.pt")
    classifier = runs / "attributes" / "classifier.pt"
    if classifier.exists():
        export_attributes(out, classifier)
    weak = runs / "unet_weak" / "unet.pt"
    if weak.exists():
        export_weak(out, weak)
    write_weights(out / "unet" / WEIGHTS, packed["weights"])
    write_json(out / "unet" / "config.json", UNET_CONFIG)
    write_weights(out / "vae" / WEIGHTS, vae.state_dict())
    write_json(out / "vae" / "config.json", vae_config)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", INDEX)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return {"out": str(out), "unet_step": packed["step"], "megabytes": round(size / 1e6, 2)}


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/mini"))
    parser.add_argument("--out", type=Path, default=Path("segresearch/weights/mini"))
    parser.add_argument("--weak-only", action="store_true", help="write <runs>/unet_weak alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.weak_only:
        print(json.dumps({"out": str(args.out), "step": export_weak(args.out, args.runs / "unet_weak" / "unet.pt")}))
    else:
        print(json.dumps(export(args.out, args.runs)))


if __name__ == "__main__":
    main()
