"""Measure what guidance does to mini: pictures of every setting, then distances and agreements as a table.

    python -m experiments.mini.effects images --part 0/2    # and 1/2 beside it: one thread each
    python -m experiments.mini.effects table                # docs/effects.md and docs/effects/

Picture i has the noise of seed i and, where there is text or a control image, the caption and the exact maps of
held-out scene FIRST + i, whatever the setting. Pictures lie in <runs>/effects/<setting>-<digest>/<batch>.npz (uint8,
with the seconds they took); the digest is that of the setting, the weights and the sampling, so the same command goes
on where it was stopped, and new weights begin anew. SETTINGS is in order of priority: what is first is made first.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.mini.common import replace_file
from experiments.mini.train_vae import HELD_OUT
from segresearch.data.maps import depth_image, edge_image
from segresearch.data.scenes import captions, scenes
from segresearch.guidance import PAG, SEG, GuidedDenoiser, SelfAttentionGuidance, cfg, perturbed
from segresearch.models import load_sdxl
from segresearch.models.load import SDXL
from segresearch.models.locate import located
from segresearch.runs import digest, fingerprint
from segresearch.sampling import initial_noise, sample

FIRST = HELD_OUT + 200_000  # the scene of picture 0
BATCH = 50
STEPS = 10  # Euler, leading
INF = math.inf
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Setting:
    """One way to make pictures. seg, pag, sag: scales, 0 is off; sigma: SEG's blur; weight: CFG's; control: a
    ControlNet's name."""

    text: bool = False
    weight: float = 1.0
    seg: float = 0.0
    sigma: float = INF
    pag: float = 0.0
    sag: float = 0.0
    control: str = ""

    @property
    def group(self) -> str:
        """What it is conditioned on; settings of a group compare with its vanilla."""
        text = "text" if self.text else "no text"
        return f"{self.control}, {text}" if self.control else text

    @property
    def guidance(self) -> str:
        parts = [f"CFG {self.weight:g}"] if self.weight != 1 else []
        parts += [f"SEG σ={'∞' if self.sigma == INF else format(self.sigma, 'g')} s={self.seg:g}"] if self.seg else []
        parts += [f"{name} s={s:g}" for name, s in (("PAG", self.pag), ("SAG", self.sag)) if s]
        return " + ".join(parts) or "vanilla"

    @property
    def name(self) -> str:
        words = f"{self.group} {self.guidance}".replace("∞", "inf").replace("σ", "sigma").replace(",", "")
        return words.replace(" + ", " ").replace("=", "").replace(" ", "-")

    @property
    def vanilla(self) -> "Setting":
        return Setting(text=self.text, control=self.control)


def S(**given: Any) -> Setting:
    return Setting(**given)


SETTINGS = [
    S(), S(seg=1), S(pag=1), S(sag=0.75), S(seg=2), S(seg=3), S(pag=2), S(seg=0.5), S(pag=0.5),
    S(text=True), S(text=True, seg=1), S(text=True, weight=4),
    S(seg=1, sigma=1), S(seg=1, sigma=2), S(seg=1, sigma=10),
    S(control="canny"), S(control="canny", seg=1), S(control="depth"), S(control="depth", seg=1),
    S(text=True, weight=4, seg=1), S(text=True, pag=1), S(text=True, sag=0.75), S(text=True, weight=2),
    S(text=True, seg=1, sigma=1), S(text=True, seg=1, sigma=2), S(text=True, seg=1, sigma=10),
    S(control="canny", text=True), S(control="canny", text=True, seg=1),
    S(control="depth", text=True), S(control="depth", text=True, seg=1),
    S(control="canny", pag=1), S(control="depth", pag=1),
    S(control="canny", text=True, pag=1), S(control="depth", text=True, pag=1),
    S(seg=1, sigma=5), S(text=True, seg=1, sigma=5), S(sag=0.25),
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where pictures lie and what they depend on besides the setting."""

    model: str
    runs: Path
    steps: int = STEPS
    dtype: str = "bfloat16"

    def identity(self, setting: Setting) -> dict[str, Any]:
        folder = located(self.model)
        parts = [*PARTS, *([f"controlnet/{setting.control}"] if setting.control else [])]
        weights = {part: fingerprint(folder / part) for part in parts}
        return {"setting": setting, "weights": weights, "steps": self.steps, "dtype": self.dtype, "first": FIRST}

    def folder(self, setting: Setting) -> Path:
        return self.runs / "effects" / f"{setting.name}-{digest(self.identity(setting))}"

    def available(self, setting: Setting) -> bool:
        return not setting.control or (located(self.model) / "controlnet" / setting.control).is_dir()


def batches(count: int) -> list[range]:
    return [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]


def batch_path(folder: Path, rows: range) -> Path:
    return folder / f"{rows.start:06d}-{rows.stop:06d}.npz"


def load(place: Place, controls: list[str]) -> SDXL:
    """The UNet (and ControlNets) in the place's dtype, text encoders and VAE in fp32."""
    half = getattr(torch, place.dtype)
    extra: dict[str, Any] = {"controlnet": controls} if controls else {}
    whole, quick = load_sdxl(place.model), load_sdxl(place.model, dtype=half, **extra)
    return dataclasses.replace(quick, vae=whole.vae, text=whole.text)


def guided(model: SDXL, setting: Setting) -> GuidedDenoiser | SelfAttentionGuidance:
    terms = {"cfg": cfg(setting.weight)} if setting.weight != 1 else {}
    if setting.seg:
        terms["seg"] = perturbed("seg", SEG(sigma=setting.sigma), setting.seg)
    if setting.pag:
        terms["pag"] = perturbed("pag", PAG(), setting.pag)
    inner = GuidedDenoiser(model.denoiser, terms)
    return SelfAttentionGuidance(inner, setting.sag) if setting.sag else inner


def control_images(kind: str, rows: range) -> Tensor:
    """Exact edge or depth maps of the scenes of pictures `rows`, as control images (b, 3, 64, 64) in [0, 1]."""
    held = scenes(range(FIRST + rows.start, FIRST + rows.stop))
    return edge_image(held.edges) if kind == "canny" else depth_image(held.depth)


@torch.no_grad()
def pictures(model: SDXL, setting: Setting, rows: range, steps: int = STEPS) -> Tensor:
    """Pictures of `rows`, uint8 (b, 3, 64, 64)."""
    prompts = captions(range(FIRST + rows.start, FIRST + rows.stop)) if setting.text else [""]
    extra: dict[str, Any] = {}
    if setting.control:
        from segresearch.models.controlnet import controlled

        extra["control"] = [controlled(model.controlnets[setting.control], control_images(setting.control, rows))]
    noise = initial_noise(list(rows), model.latent_shape())
    x0 = sample(guided(model, setting), noise, steps=steps, conds=model.encode(prompts), **extra)
    decoded = torch.cat([model.vae.decode(part) for part in x0.split(10)])  # small parts stay in the cache
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def make_images(place: Place, settings: list[Setting], count: int, part: tuple[int, int]) -> None:
    """Every batch of every setting that is not there yet; of them, each `part[1]`-th from `part[0]` on."""
    todo = [
        (setting, rows, batch_path(place.folder(setting), rows))
        for setting in settings
        for n, rows in enumerate(batches(count))
        if n % part[1] == part[0]
    ]
    todo = [(setting, rows, path) for setting, rows, path in todo if not path.exists()]
    if not todo:
        return
    model = load(place, sorted({setting.control for setting, _, _ in todo} - {""}))
    began, made = time.monotonic(), 0
    for setting, rows, path in todo:
        wall, cpu = time.monotonic(), time.process_time()
        images = pictures(model, setting, rows, place.steps)
        seconds = np.array([time.monotonic() - wall, time.process_time() - cpu])
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: np.savez(file, images=images.numpy(), seconds=seconds))  # noqa: B023
        made += len(rows)
        spent, left = time.monotonic() - began, sum(len(r) for _, r, _ in todo) - made
        rate = made / spent
        print(
            f"{setting.name:32s} {rows.start:5d}-{rows.stop:5d}  {len(rows) / seconds[1]:5.1f} images per CPU second, "
            f"{rate:5.1f} images/s so far, {left / rate / 60:.1f} min left",
            flush=True,
        )


def stored(folder: Path, count: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(images, seconds) of each batch; FileNotFoundError where one is missing."""
    for rows in batches(count):
        with np.load(batch_path(folder, rows)) as file:
            yield torch.from_numpy(file["images"]), file["seconds"]


def complete(folder: Path, count: int) -> bool:
    return all(batch_path(folder, rows).exists() for rows in batches(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("images", "table"))
    parser.add_argument("--model", default="mini")
    parser.add_argument("--runs", type=Path, default=Path("runs/mini"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--count", type=int, default=2000, help="pictures of each setting")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the UNet")
    parser.add_argument("--only", nargs="*", help="names of settings, or how they begin")
    parser.add_argument("--part", default="0/1", help="k/n: only batches k, k + n, ... of each setting")
    parser.add_argument("--draws", type=int, default=100, help="bootstrap resamples")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    place = Place(args.model, args.runs, args.steps, args.dtype)
    known = [s for s in SETTINGS if place.available(s)]
    chosen = [s for s in known if args.only is None or any(s.name.startswith(o) for o in args.only)]
    if not chosen:
        parser.error(f"no setting begins with {args.only}; there are {', '.join(s.name for s in known)}")
    if args.what == "images":
        k, n = map(int, args.part.split("/"))
        make_images(place, chosen, args.count, (k, n))
    else:
        from experiments.mini.effects_table import write_table

        print(write_table(place, chosen, args.count, args.draws, args.docs))


if __name__ == "__main__":
    main()
