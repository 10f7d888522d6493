"""Prompts of published sets, from the files that their authors distribute. Light: no torch.

    PartiPrompts    PartiPrompts.tsv                 the column Prompt
    DrawBench       drawbench.csv                    the column Prompts
    GenEval         evaluation_metadata.jsonl        "prompt" of every line

Any table with a head, and any file of one JSON object a line, that has one of NAMES is read in the same way.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segresearch.errors import ConfigError, one_line

NAMES = ("prompt", "prompts", "caption", "text")  # of the column or key, in any case
SEPARATORS = {".tsv": "\t", ".csv": ","}
SUFFIXES = (*SEPARATORS, ".jsonl")


def from_set(path: Path, text: str, at: str = "prompts") -> tuple[str, ...]:
    """The prompts of a .tsv, .csv or .jsonl file with this text, in its order; blank ones are left out. ConfigError
    with the line that is wrong, or the columns where none is known."""
    suffix = path.suffix.lower()
    prompts = _objects(path, text, at) if suffix == ".jsonl" else _table(path, text, SEPARATORS[suffix], at)
    return tuple(filter(None, (" ".join(prompt.split()) for prompt in prompts)))


def _known(keys: Sequence[str], where: str) -> str:
    for name in NAMES:
        for key in keys:
            if key.strip().lower() == name:
                return key
    listed = ", ".join(map(repr, keys)) or "none"
    raise ConfigError(f"{where}: none of {', '.join(NAMES)} among {listed}; rename the one that holds the prompts")


def _table(path: Path, text: str, separator: str, at: str) -> list[str]:
    quoting: Any = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL  # quotes in a .tsv are those of a prompt
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting)
    prompts: list[str] = []
    try:
        head = next(reader, [])
        column = head.index(_known(head, f"{at}: {path}, line 1"))
        for row in reader:
            if row and len(row) <= column:
                raise ConfigError(f"{at}: {path}, line {reader.line_num}: {len(row)} columns, its head has {len(head)}")
            prompts += row[column : column + 1]
    except csv.Error as error:
        raise ConfigError(f"{at}: {path}, line {reader.line_num}: {error}") from error
    return prompts


def parsed(text: str, place: str, line: int | None = None) -> Any:
    """A text of JSON. place: of the text, for the ConfigError of one that cannot be read; line: its only line's number
    there."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}, line {line or error.lineno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or too deep
        where = place if line is None else f"{place}, line {line}"
        raise ConfigError(f"{where}: not JSON that can be read ({one_line(error)})") from error


def _objects(path: Path, text: str, at: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{at}: {path}, line {number}"
        entry = parsed(line, f"{at}: {path}", number)
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: not an object but {type(entry).__name__}")
        prompt = entry[_known([*entry], where)]
        if not isinstance(prompt, str):
            raise ConfigError(f"{where}: its prompt is {prompt!r}, not a text")
        prompts.append(prompt)
    return prompts
