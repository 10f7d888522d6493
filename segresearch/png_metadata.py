"""PNGs that carry their record: a text chunk "segresearch" of JSON, so that a file that was mailed around says how it
was sampled. Light: Pillow only, no torch."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from segresearch.runs import plain, replacing

KEY = "segresearch"
END = b"IEND\xaeB`\x82"  # of a whole PNG


def png(image: Image.Image, record: Mapping[str, Any]) -> bytes:
    """`image` as a PNG with `record` in its text chunk; the same input gives the same bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(plain(record), ensure_ascii=False, sort_keys=True))
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def save_png(image: Image.Image, path: Path, record: Mapping[str, Any]) -> None:
    """Write `image` to `path` atomically, as `png` encodes it."""
    data = png(image, record)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a PNG, or None where there is no such file, it is damaged, or it carries none."""
    try:
        data = path.read_bytes()
        if not data.endswith(END):  # Pillow reads a cut file as far as it goes
            return None
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            text = image.info.get(KEY)
        return json.loads(text) if text else None
    except (OSError, SyntaxError, ValueError):
        return None
