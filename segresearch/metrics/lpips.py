"""LPIPS v0.1 (arXiv 1801.03924): distance of images in the features of VGG-16 or AlexNet, by the package lpips.
At each of five layers the channels of every place are scaled to unit length. Squared differences are weighted by
channel (heads, fitted to human judgements), averaged over places, and summed over layers. The trunk is torchvision's
ImageNet network; the heads come with the package."""

import re
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from segresearch.errors import InputError, PackageError
from segresearch.metrics.mini_vision import unit_range
from segresearch.pretrained import INSTALL, Asset, Device, fitting, frozen, load_tensors

TORCHVISION = "https://download.pytorch.org/models/"
PUBLISHED = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
TRUNKS = {
    "vgg": Asset("vgg16-397923af.pth", TORCHVISION, "397923af"),
    "alex": Asset("alexnet-owt-7be5be79.pth", TORCHVISION, "7be5be79"),
}
HEADS = {
    "vgg": Asset("vgg.pth", PUBLISHED, "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "alex": Asset("alex.pth", PUBLISHED, "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
}
SMALLEST = {"vgg": 16, "alex": 31}  # pixels of the shorter side


def load_lpips(
    net: str = "vgg", trunk: str | Path | None = None, heads: str | Path | None = None,
    sha256: tuple[str | None, str | None] = (None, None), device: Device = "cpu",
) -> nn.Module:  # fmt: skip
    """lpips.LPIPS with weights of local files (.pth or .safetensors), else of torch.hub's cache (trunk) and of the
    package (heads). net: "vgg" or "alex". sha256: of trunk and heads, where not the published ones are meant.
    CheckpointError names a file that is missing and its address. PackageError without the package lpips."""
    if net not in TRUNKS:
        raise InputError(f"LPIPS net={net!r}: choose one of {', '.join(TRUNKS)}")
    try:
        import lpips
    except ImportError as error:
        raise PackageError(f"LPIPS needs the package lpips: {INSTALL}") from error
    layers, _ = load_tensors(TRUNKS[net], trunk, sha256[0])
    packaged = Path(lpips.__file__).parent / "weights" / "v0.1" / HEADS[net].file
    linear, _ = load_tensors(HEADS[net], heads or packaged, sha256[1])
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # it asks torchvision for no weights by an argument of older releases
        network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    names = {key: re.sub(r"^net\.slice\d", "features", re.sub(r"^lins\.", "lin", key)) for key in network.state_dict()}
    weights = {name: value for name, value in layers.items() if not name.startswith("classifier.")} | linear
    weights |= {f"scaling_layer.{name}": value for name, value in network.scaling_layer.state_dict().items()}
    with fitting(f"LPIPS {net}"):
        known = {key: weights[name] for key, name in names.items() if name in weights}  # the network has heads twice
        unknown = {name: value for name, value in weights.items() if name not in names.values()}
        network.load_state_dict(known | unknown, assign=True)
    return frozen(network, device)


@torch.inference_mode()
def lpips_distances(
    network: nn.Module, a: UInt8[Tensor, "n 3 h w"], b: UInt8[Tensor, "m 3 y x"], batch: int = 16
) -> Float[Tensor, " n"]:
    """LPIPS of uint8 images of any size, pair by pair, `batch` at a time, on the CPU. network: of `load_lpips`.
    InputError for images of two shapes, or smaller than the network can see."""
    if a.shape != b.shape:
        raise InputError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared one by one")
    kind, (h, w) = str(network.pnet_type), a.shape[2:]
    if min(h, w) < SMALLEST[kind]:
        raise InputError(f"images of {h}×{w}: LPIPS with {kind} needs sides of {SMALLEST[kind]} pixels")
    device = next(network.parameters()).device
    pairs = zip(a.split(batch), b.split(batch))
    return torch.cat([network(*(unit_range(z.to(device)) for z in pair)) for pair in pairs]).flatten().cpu()
