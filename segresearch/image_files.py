"""Images from files of any mode, upright and fitted to a size, or an error of one line. Light: no torch."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from segresearch.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
DEEP = ("F", "I")  # modes of grey with more than 8 bits begin so


def open_image(path: str | Path, behind: str = "white") -> Image.Image:
    """The first image in a file, of any mode, as 8-bit RGB, turned as its EXIF says; transparent parts show `behind`.
    InputError with the file's name for what is missing, a folder, of another format, truncated, or larger than Pillow's
    limit against decompression bombs, for integers beyond 16 bits and for floats outside [0, 1]."""
    image = _upright(Path(path).expanduser())
    if image.mode.startswith(DEEP):
        image = Image.fromarray(np.rint(255 * np.asarray(_scaled(image, path))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(f"{path}: colours of mode {image.mode} cannot be converted; save it as RGB") from error


def open_map(path: str | Path) -> Image.Image:
    """A ready-made edge or depth map: as `open_image`, but 16-bit grey keeps its precision (mode "F" in [0, 1], white
    is 65535), and transparent parts are black, which means no edge, or far."""
    image = _upright(Path(path).expanduser())
    return _scaled(image, path) if image.mode.startswith(DEEP) else open_image(path, behind="black")


def fit(image: Image.Image, size: tuple[int, int], aspect: float | None = None) -> Image.Image:
    """`image` at size = (height, width): its largest centred part of that aspect, resized once (Lanczos). aspect: width
    over height of what the image shows, where its pixels are not square. InputError for a side below 1."""
    height, width = size
    if min(height, width) < 1:
        raise InputError(f"size={(height, width)}: height and width must be at least 1 pixel")
    old, new = aspect or image.width / image.height, width / height
    w, h = image.width * min(1, new / old), image.height * min(1, old / new)
    left, top = (image.width - w) / 2, (image.height - h) / 2
    return image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + w, top + h))


def _scaled(image: Image.Image, path: str | Path) -> Image.Image:
    """More than 8 bits of grey as mode "F" in [0, 1]."""
    values = np.asarray(image, dtype=np.float32)
    kind, top = ("float", 1) if image.mode == "F" else ("integer", 65535)  # white in 16 bits
    if not np.isfinite(values).all():
        raise InputError(f"{path}: values that are not finite; save it as 8- or 16-bit grey")
    if values.min() < 0 or values.max() > top:
        problem = f"{kind} values from {values.min():g} to {values.max():g}, which could mean anything"
        raise InputError(f"{path}: {problem}; save it as 8- or 16-bit grey, or scale it to 0 ... {top}")
    return Image.fromarray(values / np.float32(top))


def _upright(path: Path) -> Image.Image:
    """The decoded first frame, turned as its EXIF says."""
    web = str(path).startswith(("http:", "https:"))
    hint = "nothing is fetched from the network: download it first" if web else "give the path of an image"
    for fails, message in (
        (not path.exists(), f"no such file; {hint}"),
        (path.is_dir(), "a folder, not an image; list its files: [a.png, b.png]"),
        (not path.is_file(), "not a file; give the path of an image"),
        (path.is_file() and not path.stat().st_size, "empty (0 bytes); save or download it again"),
    ):
        if fails:
            raise InputError(f"{path}: {message}")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of EXIF or TIFF tags that are odd
        try:
            with Image.open(path, formats=formats) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            limit = f"{Image.MAX_IMAGE_PIXELS:,}"
            raise InputError(f"{path}: more pixels than the limit of {limit}; save it smaller") from error
        except Image.UnidentifiedImageError as error:
            raise InputError(f"{path}: not an image of a known format ({', '.join(formats)}); convert it") from error
        except PermissionError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); change its permissions") from error
        except Exception as error:  # decoders raise all kinds on damaged data
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{path}: damaged or incomplete ({reason}); save or download it again") from error
