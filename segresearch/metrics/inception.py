"""Inception-v3 as the Fréchet inception distance uses it: TensorFlow's network of December 2015, by torch-fidelity.

It differs from torchvision's: average pools leave the border out of their count, the last block pools by maximum, and
the image is resized as TensorFlow 1 did it (corners of pixels at whole numbers, no antialiasing) and scaled as
(x − 128) / 128.
"""

import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

from segresearch.errors import PackageError
from segresearch.metrics.weight_files import INSTALL, Asset, Device, fitting, frozen

WEIGHTS = Asset(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
    "6726825d",
)
SIDE, FEATURES = 299, 2048


def load_inception(weights: dict[str, Tensor], device: Device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """uint8 images (b, 3, h, w) of any size to the features (b, 2048) of the last average pool, in `dtype`.

    Raises CheckpointError where the weights do not fit, PackageError without torch-fidelity.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize
    except ImportError as error:
        raise PackageError(f"features of Inception need torch-fidelity: {INSTALL}") from error
    file = io.BytesIO()  # torch-fidelity opens a path by the reader that runs a pickle's code, so it gets these tensors
    torch.save(weights, file)
    file.seek(0)
    with fitting("Inception"), torch.random.fork_rng(devices=[]):
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
    parts = [part for name, part in network.named_children() if name != "fc"]  # its own forward returns fp32 alone
    layers = frozen(nn.Sequential(*parts), device, dtype)

    def features(images: Tensor) -> Tensor:
        x = images.to(torch.promote_types(dtype, torch.float32))  # half precisions would round the places of pixels
        x = (resize(x, (SIDE, SIDE), align_corners=False) - 128) / 128  # (b, 3, h, w) -> (b, 3, 299, 299)
        return layers(x.to(dtype)).flatten(1)  # -> (b, 2048, 1, 1) -> (b, 2048)

    return features
