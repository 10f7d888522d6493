"""Control images of ControlNets: pictures of any kind, their edges and their depth, or exact maps of scenes.

    from segresearch.control import canny, fit, open_image
    image = canny(fit(open_image("photo.jpg"), (1024, 1024)))         # (1, 3, 1024, 1024) in [0, 1]

Names are loaded when they are first used, so that a script can look around here without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segresearch.control.estimate import depth
    from segresearch.control.images import fit, open_image, open_map
    from segresearch.control.maps import canny, to_tensor

_HOME = dict(canny="maps", depth="estimate", fit="images", open_image="images", open_map="images", to_tensor="maps")

__all__ = ["canny", "depth", "fit", "open_image", "open_map", "to_tensor"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
