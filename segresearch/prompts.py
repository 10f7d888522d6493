"""Prompts from files: one a line, or the captions of a COCO annotation file. Light: no torch."""

import json
import unicodedata
from pathlib import Path
from typing import Any

from segresearch.errors import ConfigError


def _bytes(path: Path, at: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{at}: cannot read {path}: {error.strerror}") from error


def from_text(path: Path, at: str = "prompts") -> tuple[str, ...]:
    """One prompt a line, UTF-8; blank lines are left out. ConfigError with the number of the line that is wrong."""
    found = []
    for number, line in enumerate(_bytes(path, at).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{at}: {path}, line {number}: not UTF-8 text (byte {error.start + 1})") from error
        odd = next((c for c in text if unicodedata.category(c) == "Cc" and c != "\t"), None)
        if odd is not None:
            raise ConfigError(f"{at}: {path}, line {number}: holds the control character {odd!r}")
        if text:
            found.append(text)
    return tuple(found)


def from_coco(path: Path, at: str = "prompts") -> tuple[str, ...]:
    """Captions of a COCO file (captions_val2014.json): the first of each image by image id, then the second of each,
    and so on, "first" by annotation id. ConfigError says the line or the annotation that is wrong."""
    try:
        given = json.loads(_bytes(path, at).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{at}: {path}: not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{at}: {path}, line {error.lineno}: not JSON ({error.msg})") from error
    entries = given.get("annotations") if isinstance(given, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f"{at}: {path}: no list `annotations` in it, which COCO's captions_*.json have")
    turns: dict[int, int] = {}
    order: list[tuple[int, int, str]] = []
    for _, image, caption in sorted(_entry(entry, f"{at}: {path}: annotations.{i}") for i, entry in enumerate(entries)):
        order.append((turns.setdefault(image, 0), image, caption))
        turns[image] += 1
    return tuple(caption for _, _, caption in sorted(order))


def _entry(entry: Any, where: str) -> tuple[int, int, str]:
    """(annotation id, image id, caption on one line)."""
    for key, kind in (("id", int), ("image_id", int), ("caption", str)):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            raise ConfigError(f"{where}: no {key}, or it is not {'a whole number' if kind is int else 'text'}")
    caption = " ".join(entry["caption"].split())
    if not caption:
        raise ConfigError(f"{where}: the caption is empty")
    return entry["id"], entry["image_id"], caption
