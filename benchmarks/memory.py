"""GPU memory of a full-size SDXL, by counting tensors on the meta device. Nothing is computed.

    python benchmarks/memory.py

Attention counts as a fused kernel, which holds its output only. A GPU needs more memory: the workspaces of
convolutions, the blocks that the allocator caches, and the CUDA context. `experiments/full_size.py --device cuda`
measures.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import table
from networks import SIGMA, inputs, our_networks, terms, unguided_denoiser
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from segresearch.guidance import GuidedDenoiser
from segresearch.models.controlnet import ActiveControlNet
from segresearch.models.vae import VAE, VAEConfig

GIB = 2**30
TILES = (None, 512, 256, 128)


class Live(TorchDispatchMode):
    """`peak`: the peak of the bytes held by tensors that are created inside. Tensors in `before` do not count."""

    def __init__(self, before: Sequence[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in before}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class Fused(TorchFunctionMode):
    """Attention that allocates its output only, as the fused kernels do."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty((*q.shape[:-1], v.shape[-1]))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def counted(call: Callable[[], Any], before: Sequence[Tensor]) -> int:
    with Fused(), Live(before) as live:
        call()
    return live.peak


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def text_encoders() -> tuple[nn.Module, nn.Module]:
    """SDXL's two, on the meta device."""
    common: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77}
    first = CLIPTextConfig(**common, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                           num_attention_heads=12)  # fmt: skip
    second = CLIPTextConfig(**common, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                            num_attention_heads=20, projection_dim=1280)  # fmt: skip
    with torch.device("meta"):
        return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def weights() -> list[list[str]]:
    unet, net = our_networks(torch.bfloat16, "meta", True)
    first, second = text_encoders()
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    rows = []
    for name, module in (
        ("UNet", unet), ("text encoder 1", first), ("text encoder 2", second), ("VAE", vae), ("a ControlNet", net),
    ):  # fmt: skip
        assert module is not None
        count = sum(p.numel() for p in module.parameters())
        rows.append([name, f"{count / 1e6:.0f}", gib(2 * count), gib(4 * count)])
    return rows


def step(method: str, px: int, dtype: torch.dtype, batch: int = 1) -> int:
    """Peak of one guided step, including the cached keys and values of the text and the embedded control image."""
    unet, net = our_networks(dtype, "meta", "ControlNet" in method)
    x, sigma, conds, _ = inputs(px, dtype, "meta")
    x, sigma, conds = x[[0] * batch], sigma[[0] * batch], {n: c[[0] * batch] for n, c in conds.items()}
    model = GuidedDenoiser(unguided_denoiser(unet).to("meta"), terms(method))
    branches, nets = model.branches(SIGMA), [n for n in (unet, net) if n is not None]

    def call() -> None:
        control = []
        if net is not None:
            control = [ActiveControlNet(net, torch.empty(batch, 320, px // 8, px // 8, dtype=dtype, device="meta"))]
        prepared = {b.conditioning: conds[b.conditioning].projected(*nets) for b in branches}
        denoised = model.evaluate(x, sigma, branches, prepared, control, values=[SIGMA] * batch)
        model.combine(x, sigma, denoised, values=[SIGMA] * batch)

    return counted(call, [x, sigma, *(p for n in nets for p in n.parameters())])


def vae(method: str, px: int, dtype: torch.dtype, tile: int | None) -> int:
    with torch.device("meta"):
        net = VAE(VAEConfig()).to(dtype)
        x = torch.empty(1, 4, px // 8, px // 8) if method == "decode" else torch.empty(1, 3, px, px)
    return counted(lambda: getattr(net, method)(x, tile=tile), [x, *net.parameters()])


def main() -> None:
    kinds = (torch.float32, torch.bfloat16)
    print("## Weights\n")
    print(table(("network", "million parameters", "bf16, fp16, GiB", "fp32, GiB"), weights()))
    print("\n## The VAE above its weights, one image, GiB\n")
    head = ("call", "px", "dtype", *(f"tile {tile}" if tile else "whole" for tile in TILES))
    print(table(head, [
        [method, px, str(kind)[6:], *(gib(vae(method, px, kind, tile)) for tile in TILES)]
        for method in ("decode", "encode") for px in (1024, 2048) for kind in kinds
    ]))  # fmt: skip
    print("\n## A step above the weights, bf16, 1024 px, GiB\n")
    methods = ("unguided", "SEG", "CFG+SEG", "ControlNet+CFG+SEG")
    print(table(("step", *(f"batch {b}" for b in (1, 4, 8))), [
        [method, *(gib(step(method, 1024, torch.bfloat16, batch)) for batch in (1, 4, 8))] for method in methods
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
