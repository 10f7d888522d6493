"""Images as the networks of scores see them: squares of some side, less OpenAI's mean and over its deviation."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from segresearch.metrics.features import OPENAI


def normalized(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Of images in [0, 1]."""
    mean, std = torch.tensor(OPENAI, dtype=x.dtype, device=x.device)[:, :, None, None]  # (2, 3) -> 2 of (3, 1, 1)
    return (x - mean) / std


def cropped_squares(images: UInt8[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 side side"]:
    """The shorter side by Pillow's bicubic to `side`, then the middle square, as torchvision's Resize and CenterCrop do
    it to Pillow images; on the images' device. OpenAI's preprocessing, and ImageReward's."""
    squares = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():  # (b, 3, h, w) -> b of (h, w, 3)
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        w, h = (side * length // min(picture.size) for length in picture.size)
        if picture.size != (w, h):
            picture = picture.resize((w, h), Image.Resampling.BICUBIC)
        left, top = round((w - side) / 2), round((h - side) / 2)
        squares.append(np.asarray(picture.crop((left, top, left + side, top + side))))
    stacked = torch.from_numpy(np.stack(squares)).to(images.device)
    return normalized(stacked.permute(0, 3, 1, 2).float() / 255)


def padded_squares(images: UInt8[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 side side"]:
    """The longer side to `side`, bicubic with antialiasing, neither rounded nor clamped, then black on either side of
    the shorter, as HPSv2's package does it."""
    h, w = images.shape[2:]
    x = images.float() / 255
    if max(h, w) != side:
        scale = side / max(h, w)
        x = F.interpolate(x, (round(h * scale), round(w * scale)), mode="bicubic", antialias=True)
    below, right = side - x.shape[2], side - x.shape[3]
    return normalized(F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2)))
