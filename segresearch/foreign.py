"""What the record of a PNG of unknown origin may name. Light: no torch.

A record names files (a model, texts, control images) and functions. Following it reads the files and calls the
functions, so each needs the word of the user.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from segresearch.config.build import refuse_foreign
from segresearch.errors import ConfigError

DEEPEST = 60  # levels of a record; ours have at most 12
MAPPINGS = ("model", "compute", "settings", "generate", "evaluate", "analyze", "contents", "controls", "guidance",
            "init", "init_contents")  # fmt: skip
WORDS = ("figure", "control", "code", "torch", "run", "method", "prompt")
OPTIONAL = ("controls", *WORDS)
TEXTS = ("prompt", "negative", "label", "title", "text", "texts", "method", "name", "run", "code", "torch", "figure")
FILES = ("path", "config", "tokenizer", "vae", "unet", "text_encoder", "loras", "embeddings", "image", "mask",
         "depth_model", "reference", "prompts")  # perhaps bare words  # fmt: skip


def check_shape(record: Any, at: str = "") -> None:
    """ConfigError for a record whose known parts are of other types than ours, or that is nested too deep."""
    for keys, _ in _leaves(record):
        if len(keys) > DEEPEST:
            raise ConfigError(f"{'.'.join(keys[:3])}: nested in more than {DEEPEST} levels")
    for kind, noun, names in ((dict, "a mapping", MAPPINGS), (str, "text", WORDS)):
        for key in names:
            if key in record and not isinstance(record[key], kind | type(None) if key in OPTIONAL else kind):
                raise ConfigError(f"{at}{key}: {str(record[key])[:60]!r} is not {noun}")
    if "generate" in record and not isinstance(record.get("settings"), dict):
        raise ConfigError(f"{at}settings: missing")
    if not at:
        check_shape({k: item for k, item in (record.get("settings") or {}).items() if k != "figure"}, "settings.")
    panels = record.get("panels", [])
    if not isinstance(panels, list) or not all(isinstance(panel, dict) for panel in panels):
        raise ConfigError(f"{at}panels: not a list of mappings")


def refuse_foreign_targets(record: Any, path: Path, trust: bool) -> None:
    """ConfigError for a record that would import a function from outside segresearch, if `trust` does not allow it, or
    from outside segresearch and the user's own files."""
    if isinstance(record, Mapping) and record.get("kind") == "custom":
        target = str(record.get("target"))
        if not trust:
            raise ConfigError(f"{path}: its record calls {target[:200]}; look at that function, then add --trust")
        refuse_foreign(target, f"{path}: its record")
    children = record.values() if isinstance(record, Mapping) else record if isinstance(record, list) else ()
    for child in children:
        refuse_foreign_targets(child, path, trust)


def refuse_foreign_files(record: Any, path: Path, given: str | None) -> None:
    """ConfigError for a record that names a file or a folder of this machine. given: the model that the user named."""
    for keys, value in _leaves(record):
        key = next((key for key in reversed(keys) if not key.isdecimal()), "")
        if isinstance(value, str) and value != given and not _is_text(key, keys, value) and _names_a_file(key, value):
            hint = "give --model" if keys[-2:] == ("model", "path") else "look at it, then add --trust"
            raise ConfigError(f"{path}: its record names the file {value[:200]} ({'.'.join(keys)}); {hint}")


def _is_text(key: str, keys: tuple[str, ...], value: str) -> bool:
    if key == "negative" and keys[-1] == key and len(keys) > 1:  # of a config, where it may be a file of texts
        return not value.lower().endswith(".txt")
    return key in TEXTS or key == "prompts" and keys[-1] != key


def _names_a_file(key: str, value: str) -> bool:
    """Whether `value` is a path that could lead anywhere, or is there relative to the current folder."""
    path = PurePath(value.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or value.startswith("~"):
        return True
    if key not in FILES and not any(mark in value for mark in "/."):
        return False
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # too long, or with a null byte: nothing that can be opened
        return False


def _leaves(node: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that holds no others, with its keys; iterative, since a record may be of any depth."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), node)]
    while waiting:
        keys, value = waiting.pop()
        if isinstance(value, Mapping | list) and len(keys) <= DEEPEST:
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [((*keys, str(key)), item) for key, item in items]
        else:
            yield keys, value
