"""What each method of conf/guidance costs: rows, where they fork, and floating-point operations over a plain step.

    python benchmarks/methods.py                      # SDXL at 1024 px, counted on tensors without contents
    python benchmarks/methods.py --px 512 --methods seg tpg
    python benchmarks/methods.py --write docs/guidance.md

One step of one image at a sigma at which the method acts, with a prompt. The weak network of autoguidance counts as one
of SDXL's size. Only matrix products and convolutions are counted. Keys and values of a text are computed once a run and
not counted, but for conditionings that are made from others.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segresearch.config.build import build_guidance  # noqa: E402
from segresearch.config.compose import conf_dir, settings  # noqa: E402
from segresearch.config.method import GuidanceConfig  # noqa: E402
from segresearch.models.conditioning import Cond  # noqa: E402
from segresearch.models.denoiser import Denoiser, alphas_cumprod  # noqa: E402
from segresearch.models.unet import UNet, UNetConfig  # noqa: E402
from segresearch.sampling.memory import Run  # noqa: E402

SIGMAS = (1.5, 2.5, 6.0)  # of which the first that a method acts at is counted
START, END = "<!-- cost: begin -->\n", "<!-- cost: end -->\n"


class Model:
    """As much of an SDXL as a method needs: a denoiser with a network of its size, as its own weak network too."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.unet = denoiser.unet


def counted(guided: Any, x: torch.Tensor, conds: dict[str, Cond], sigma: float, after: float) -> int:
    """Operations of one evaluation."""
    run = Run(torch.zeros(1, dtype=torch.int64), "euler", (sigma, after, 0.0))
    projected = {name: cond.projected(guided.unet) for name, cond in conds.items()}  # once a run, not once a step
    with FlopCounterMode(display=False) as counter:
        guided(x, torch.tensor([sigma]), projected, run=run)
    return counter.get_total_flops()


def rows_of(guided: Any) -> str:
    """Rows and fork, as `print(model)` gives them."""
    lines = [line for line in repr(guided).splitlines() if "rows per image" in line or "second" in line]
    return "; ".join(line.strip().removeprefix("rows per image: ") for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--write", type=Path, help="a page with the marks of this table")
    options = parser.parse_args()
    names = options.methods or sorted(path.stem for path in (conf_dir() / "guidance").glob("*.yaml"))
    methods: dict[str, GuidanceConfig] = {}
    with initialize_config_dir(str(conf_dir()), version_base=None):
        for name in names:
            if name != "custom":
                overrides = [f"guidance={name}", "model=sdxl", "model.networks.weak=weak"]
                methods[name] = settings(compose("generate", overrides)).guidance
    lines = ["| method | rows, and the site where they fork | operations over a plain step |", "| --- | --- | ---: |"]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        unet = UNet(UNetConfig())
    denoiser = Denoiser(unet, alphas_cumprod({}))  # whose numbers are read, so they are there
    with mode, torch.no_grad():
        side = options.px // 8
        x, context, pooled = torch.randn(1, 4, side, side), torch.randn(1, 77, 2048), torch.randn(1, 1280)
        ids = torch.tensor([[float(options.px)] * 6])
        plain = 0
        for name, guidance in {"none": GuidanceConfig(), **methods}.items():
            makers = guidance.conditionings
            conds = {n: Cond(context, pooled, ids) for n in ("cond", "uncond", *makers)}
            conds = {n: Cond(context + i, pooled, ids) for i, n in enumerate(conds)}
            networks = {n: denoiser for n in guidance.networks}
            guided = built(guidance, denoiser, networks)
            sigma = next((s for s in SIGMAS if len(branches(guided, s)) > 1), SIGMAS[0])
            cost = counted(guided, x, conds, sigma, sigma / 1.2)
            plain = plain or cost
            lines.append(f"| `{name}` | {rows_of(guided)} | {cost / plain:.2f} |")
            print(lines[-1], flush=True)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split(START)
        table = "\n".join([*lines, ""])
        options.write.write_text(before + START + table + END + rest.split(END, 1)[1], encoding="utf-8")


def branches(guided: Any, sigma: float) -> list[Any]:
    return getattr(guided, "inner", guided).branches(sigma, Run(torch.zeros(1), "euler", (sigma, sigma / 1.2, 0.0)))


def built(guidance: GuidanceConfig, denoiser: Denoiser, networks: dict[str, Denoiser]) -> Any:
    """The guided denoiser, with stand-ins for networks that are not there."""
    import segresearch.config.build as build

    own = build.build_networks
    build.build_networks = lambda config, sd: networks
    try:
        with unset_fake_temporarily():  # the checks of intervals read the denoiser's sigmas
            return build_guidance(guidance, Model(denoiser))
    finally:
        build.build_networks = own


if __name__ == "__main__":
    main()
