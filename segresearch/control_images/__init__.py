"""Control images of ControlNets: pictures of any kind, their edges and their depth, or exact maps of scenes.

    from segresearch.control_images import canny, fit, open_image
    image = canny(fit(open_image("photo.jpg"), (1024, 1024)))         # (1, 3, 1024, 1024) in [0, 1]

Names are loaded when they are first used, so that a script can look around here without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segresearch.control_images.depth_estimator import depth
    from segresearch.control_images.edges import canny, to_tensor
    from segresearch.control_images.read import fit, open_image, open_map

_HOME = dict(canny="edges", depth="depth_estimator", fit="read", open_image="read", open_map="read", to_tensor="edges")

__all__ = ["canny", "depth", "fit", "open_image", "open_map", "to_tensor"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
