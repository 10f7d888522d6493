"""Seeds, scenes and prompts from their short forms and files. Light: no torch, except for the captions of scenes."""

import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from segresearch.errors import ConfigError

SCENE = "scene:"  # the prefix of procedural scenes, among names of files
HELD_OUT = 10_000_000  # scene:0 is the procedural scene of this index; below it are those of the training


def parse_seeds(seeds: Any, at: str = "seeds") -> tuple[int, ...]:
    """5, "0-15", "1,4,7-9" or a list of such, in the order given. Raises ConfigError: not of this form, twice, none."""
    parts = [part for item in ([seeds] if isinstance(seeds, int | str) else seeds) for part in str(item).split(",")]
    numbers: list[int] = []
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f'{at}: {part!r} is not a seed or a rising range; write 3, "0-15", "1,4,7-9" or [1, 4]')
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= 2**63 or last - first >= 1_000_000:
            raise ConfigError(f"{at}: {part!r}: seeds go up to 2^63 - 1, a range holds at most a million")
        numbers.extend(range(first, last + 1))
    if len(set(numbers)) < len(numbers):
        again = next(n for i, n in enumerate(numbers) if n in numbers[:i])
        raise ConfigError(f"{at}: seed {again} is given twice")
    return tuple(numbers)


def scene_numbers(text: str, count: int, at: str) -> tuple[int, ...] | None:
    """The scenes of "scene:12", "scene:0-7", "scene:1,4" or "scene:5-" (`count` of them); None for other text."""
    if not text.startswith(SCENE):
        return None
    numerals = text.removeprefix(SCENE).strip()
    first = re.fullmatch(r"(\d+)\s*-", numerals)
    try:
        numbers = tuple(range(int(first[1]), int(first[1]) + count)) if first else parse_seeds(numerals, at)
    except ConfigError:
        numbers = ()
    if not numbers or max(numbers) >= 2**31:
        forms = 'write "scene:12", "scene:0-7", "scene:1,4" or "scene:0-" (one for each seed), with numbers below 2^31'
        raise ConfigError(f"{at}: {text!r} names no scenes; {forms}")
    return numbers


def control_images(image: str | tuple[str, ...], count: int, at: str) -> tuple[str, ...]:
    """A file or a scene ("scene:12") for each of `count` seeds: those that `image` names, repeating in turn."""
    names: list[str] = []
    for item in (image,) if isinstance(image, str) else image:
        numbers = scene_numbers(item, count, at)
        names += [item] if numbers is None else [f"{SCENE}{number}" for number in numbers]
    if not names or "" in names:
        raise ConfigError(f'{at}: no image; give a file, a list of files, or scenes such as "scene:0-7"')
    if len(names) > count:
        counts = f"{len(names)} images, {count} seeds"
        raise ConfigError(f"{at}: each seed takes one image, so some would be left: {counts}; give as many seeds")
    return tuple(names[i % len(names)] for i in range(count))


def read_prompts(prompts: str | tuple[str, ...], at: str = "prompts", count: int = 1) -> tuple[str, ...]:
    """A list of prompts as it is; text ending in .txt is a file of one prompt a line, in .json one of COCO's captions;
    "scene:0-7" are the captions of these scenes, and "scene:0-" of `count`; other text is one prompt."""
    if isinstance(prompts, tuple):
        texts = prompts
    elif numbers := scene_numbers(prompts, count, at):
        from segresearch.scenes.scenes import captions

        texts = tuple(captions([HELD_OUT + number for number in numbers]))
    elif prompts.lower().endswith((".txt", ".json")):
        texts = (from_text if prompts.lower().endswith(".txt") else from_coco)(Path(prompts), at)
    elif os.sep in prompts and Path(prompts).expanduser().exists():
        raise ConfigError(f"{at}: {prompts} is not a .txt or .json file; a text that is meant as one goes into a list")
    else:
        texts = (prompts,)
    if not texts:
        raise ConfigError(f'{at}: no prompt in {prompts!r}; "" is the one for images without a prompt')
    return texts


def from_text(path: Path, at: str = "prompts") -> tuple[str, ...]:
    """One prompt a line, UTF-8; blank lines are left out. ConfigError with the number of the line that is wrong."""
    prompts = []
    for number, line in enumerate(_bytes(path, at).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{at}: {path}, line {number}: not UTF-8 text (byte {error.start + 1})") from error
        odd = next((c for c in text if unicodedata.category(c) == "Cc" and c != "\t"), None)
        if odd is not None:
            raise ConfigError(f"{at}: {path}, line {number}: holds the control character {odd!r}")
        if text:
            prompts.append(text)
    return tuple(prompts)


def from_coco(path: Path, at: str = "prompts") -> tuple[str, ...]:
    """Captions of a COCO file (captions_val2014.json): the first of each image by image id, then the second of each,
    and so on, "first" by annotation id. ConfigError has the line or the annotation that is wrong."""
    try:
        content = json.loads(_bytes(path, at).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{at}: {path}: not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{at}: {path}, line {error.lineno}: not JSON ({error.msg})") from error
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f"{at}: {path}: no list `annotations` in it, which COCO's captions_*.json have")
    turns: dict[int, int] = {}
    order: list[tuple[int, int, str]] = []
    for _, image, caption in sorted(_entry(entry, f"{at}: {path}: annotations.{i}") for i, entry in enumerate(entries)):
        turns[image] = turns.get(image, -1) + 1
        order.append((turns[image], image, caption))
    return tuple(caption for _, _, caption in sorted(order))


def _bytes(path: Path, at: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{at}: cannot read {path}: {error.strerror}") from error


def _entry(entry: Any, where: str) -> tuple[int, int, str]:
    """(annotation id, image id, caption on one line)."""
    for key, kind in (("id", int), ("image_id", int), ("caption", str)):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            raise ConfigError(f"{where}: no {key}, or it is not {'a whole number' if kind is int else 'text'}")
    caption = " ".join(entry["caption"].split())
    if not caption:
        raise ConfigError(f"{where}: the caption is empty")
    return entry["id"], entry["image_id"], caption
