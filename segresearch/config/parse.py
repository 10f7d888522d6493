"""Seeds, scenes and prompts from their short forms and files. Light: no torch, except for the captions of scenes."""

import collections
import itertools
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from segresearch.errors import ConfigError

SCENE = "scene:"  # the prefix of procedural scenes, among names of files
COCO = {"id": (int, "a whole number"), "image_id": (int, "a whole number"), "caption": (str, "text")}  # an annotation
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
    for seed, count in collections.Counter(numbers).most_common(1):
        if count > 1:
            raise ConfigError(f"{at}: seed {seed} is given twice")
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
    lines = [line.strip() for line in _text(path, at).split("\n")]
    for number, line in enumerate(lines, 1):
        for character in line:
            if unicodedata.category(character) == "Cc" and character != "\t":
                raise ConfigError(f"{at}: {path}, line {number}: holds the control character {character!r}")
    return tuple(filter(None, lines))


def from_coco(path: Path, at: str = "prompts") -> tuple[str, ...]:
    """Captions of a COCO file (captions_val2014.json): the first of each image by image id, then the second of each,
    and so on, "first" by annotation id. ConfigError has the line or the annotation that is wrong."""
    try:
        content = json.loads(_text(path, at))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{at}: {path}, line {error.lineno}: not JSON ({error.msg})") from error
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f"{at}: {path}: no list `annotations` in it, which COCO's captions_*.json have")
    captions = []
    for i, entry in enumerate(entries):
        for key, (kind, noun) in COCO.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise ConfigError(f"{at}: {path}: annotations.{i}: no {key}, or it is not {noun}")
        captions.append((entry["id"], entry["image_id"], " ".join(entry["caption"].split())))
        if not captions[-1][2]:
            raise ConfigError(f"{at}: {path}: annotations.{i}: the caption is empty")
    by_image = collections.defaultdict(list)
    for _, image, caption in sorted(captions):
        by_image[image].append(caption)
    turns = itertools.zip_longest(*(by_image[image] for image in sorted(by_image)))
    return tuple(caption for turn in turns for caption in turn if caption)


def _text(path: Path, at: str) -> str:
    """The text of a UTF-8 file. ConfigError with the line and the byte in it that is wrong."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{at}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        *lines, last = error.object[: error.start + 1].splitlines()
        raise ConfigError(f"{at}: {path}, line {len(lines) + 1}: not UTF-8 text (byte {len(last)})") from error
