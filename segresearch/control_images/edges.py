"""Images as tensors, and their edges."""

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from segresearch.errors import InputError


def to_tensor(image: Image.Image) -> Float[Tensor, "1 3 h w"]:
    """An RGB image, or a map of mode "F", as a control image in [0, 1]."""
    if image.mode == "F":
        values = torch.from_numpy(np.array(image))
        return values.clamp(0, 1).repeat(1, 3, 1, 1)  # (h, w) -> (1, 3, h, w)
    values = torch.from_numpy(np.array(image.convert("RGB")))
    return values.permute(2, 0, 1)[None].float() / 255  # (h, w, 3) -> (1, 3, h, w)


def canny(image: Image.Image, low: float | int = 100, high: float | int = 200) -> Float[Tensor, "1 3 h w"]:
    """OpenCV's Canny detector on the colour image: edges white (1) on black (0).

    low, high: hysteresis thresholds on the gradient (3×3 Sobel, the strongest of the three colours), 100 and 200 as
    SDXL's canny ControlNets are commonly used. Raises ValueError unless 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise InputError(f"canny thresholds must be 0 <= low <= high, got low={low:g}, high={high:g}")
    import cv2

    edges = cv2.Canny(np.ascontiguousarray(image.convert("RGB")), low, high)
    return torch.from_numpy(edges).float().div(255).repeat(1, 3, 1, 1)  # (h, w) -> (1, 3, h, w)
