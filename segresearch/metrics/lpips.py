"""LPIPS v0.1 (arXiv 1801.03924): distance of pictures in the features of VGG-16 or AlexNet.

At each of five layers the channels of every place are scaled to unit length; squared differences are weighted by
channel (weights fitted to human judgements), averaged over places, and summed over layers. The trunk is torchvision's
ImageNet network, the weights are the official file; both load under their own names.
"""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from segresearch.errors import InputError
from segresearch.metrics.mini_vision import unit_range
from segresearch.metrics.weight_files import Asset, frozen, put, tensors

HOME = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
TRUNKS = {
    "vgg": Asset("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "alex": Asset(
        "alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"
    ),
}
HEADS = {
    "vgg": Asset(
        "vgg.pth",
        f"{HOME}/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        ("lpips", "weights/v0.1"),
    ),
    "alex": Asset(
        "alex.pth",
        f"{HOME}/alex.pth",
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        ("lpips", "weights/v0.1"),
    ),
}
LEAST = {"vgg": 16, "alex": 31}  # pixels of the shorter side
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [−1, 1]
TINY = 1e-10


def _vgg() -> tuple[nn.Sequential, tuple[int, ...], tuple[int, ...]]:
    layers: list[nn.Module] = []
    ends, wide = [], 3
    for stage, (width, times) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        layers += [nn.MaxPool2d(2)] if stage else []
        for _ in range(times):
            layers += [nn.Conv2d(wide, width, 3, padding=1), nn.ReLU()]
            wide = width
        ends.append(len(layers) - 1)
    return nn.Sequential(*layers), tuple(ends), (64, 128, 256, 512, 512)


def _alex() -> tuple[nn.Sequential, tuple[int, ...], tuple[int, ...]]:
    layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers), (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)


class LPIPS(nn.Module):
    """net: "vgg" or "alex". Keys: features.* as torchvision's trunk, lin0.model.1.weight .. as the official weights."""

    def __init__(self, net: str = "vgg"):
        super().__init__()
        if net not in TRUNKS:
            raise InputError(f"LPIPS net={net!r}: choose one of {', '.join(TRUNKS)}")
        self.net = net
        self.features, self.ends, widths = _vgg() if net == "vgg" else _alex()
        for i, width in enumerate(widths):
            model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": model}))

    def stages(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """The five layers' features, channels scaled to unit length."""
        shift, scale = (images.new_tensor(v)[:, None, None] for v in (SHIFT, SCALE))
        x, found = (images - shift) / scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)  # (b, c, h, w) -> (b, c', h', w')
            if i in self.ends:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + TINY))
        return found

    def forward(self, a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "c 3 y x"]) -> Float[Tensor, " b"]:
        """Distance of each picture of `a` to the one of `b` in its place; pictures in [−1, 1], of any size.

        ValueError for pictures smaller than the network can see, or of two shapes.
        """
        if a.shape != b.shape:
            raise InputError(f"pictures of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared one by one")
        if min(a.shape[2:]) < LEAST[self.net]:
            raise InputError(
                f"pictures of {a.shape[2]}×{a.shape[3]}: LPIPS with {self.net} needs sides of {LEAST[self.net]} pixels"
            )
        apart = [(x - y).square() for x, y in zip(self.stages(a), self.stages(b), strict=True)]
        heads = [self.get_submodule(f"lin{i}.model") for i in range(len(self.ends))]
        parts = [head(x).mean(dim=(1, 2, 3)) for head, x in zip(heads, apart, strict=True)]  # (b, c, h, w) -> (b,)
        return torch.stack(parts).sum(0)


def load_lpips(
    net: str = "vgg",
    trunk: str | Path | None = None,
    heads: str | Path | None = None,
    sha256: tuple[str | None, str | None] = (None, None),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LPIPS:
    """LPIPS with weights of local files (.pth or .safetensors), else of torch.hub's cache (trunk) and the lpips package
    (heads).

    sha256: of trunk and heads, where not the published ones are meant. Nothing is fetched: CheckpointError says which
    file is wanted and where it is to be had.
    """
    with torch.device("meta"):
        module = LPIPS(net)
    layers, _ = tensors(TRUNKS[net], trunk, sha256[0])
    linear, _ = tensors(HEADS[net], heads, sha256[1])
    wanted = module.state_dict().keys()
    kept = {name: value for name, value in layers.items() if not name.startswith("classifier.")}
    put(module, kept | linear, f"LPIPS {net}, {len(wanted)} tensors wanted")
    frozen(module, device, dtype)
    return module


@torch.inference_mode()
def lpips_distances(
    net: LPIPS, a: UInt8[Tensor, "n 3 h w"], b: UInt8[Tensor, "m 3 y x"], batch: int = 16
) -> Float[Tensor, " n"]:
    """LPIPS of uint8 pictures, pair by pair, `batch` at a time, on the CPU. ValueError for two shapes, as LPIPS."""
    if len(a) != len(b):
        raise InputError(f"{len(a)} and {len(b)} pictures cannot be compared one by one")
    weight = next(net.parameters())

    def ready(images: Tensor) -> Tensor:
        return unit_range(images.to(weight.device)).to(weight.dtype)

    return torch.cat([net(ready(x), ready(y)).cpu() for x, y in zip(a.split(batch), b.split(batch), strict=True)])
