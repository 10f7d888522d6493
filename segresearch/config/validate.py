"""Plain data (of a YAML file, say) as instances of the schema's dataclasses, and every error as one line.

The line has the full key, the value, what was possible, and a "did you mean". Light: no torch.
"""

import dataclasses
import difflib
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from segresearch.errors import ConfigError

LIGHT = "light"  # the context of a validation that imports no torch
RENAMED = {  # keys, groups and experiments by their old names
    "judges": "metrics", "pace": "preset", "window": "interval", "windows": "intervals", "strengths": "scales",
    "draws": "n_bootstrap", "subsets": "n_subsets", "shown": "n_examples", "only": "stage",
    "caption": "text_alignment", "at": "measured_steps",
}  # fmt: skip
TYPES = {  # pydantic's names of errors, and what the value must be
    "string_type": "text", "bool_type": "true or false", "int_type": "a whole number", "tuple_type": "a list",
    "dict_type": "a mapping", "is_instance_of": "a list", "missing": "a list of 2", "too_long": "a list of 2",
}  # fmt: skip


_adapter: Any = functools.cache(TypeAdapter)


@dataclasses.dataclass(frozen=True)
class Missing:
    """The value of a required field that a mapping lacks."""

    key: str


def nearest(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean X?", or "" if nothing in `choices` is like `word`."""
    close = difflib.get_close_matches(word, list(choices), n=5, cutoff=0.5)
    alike = [(difflib.SequenceMatcher(None, choice, word).ratio(), word.startswith(choice), choice) for choice in close]
    return f"; did you mean {max(alike)[2]}?" if alike else ""


def unknown(key: str, siblings: Iterable[str]) -> str:
    """What is wrong with a setting called `key` that is none of `siblings`."""
    if key in RENAMED:
        return f"now called {RENAMED[key]}"
    here = f" (settings here: {', '.join(siblings)})" if siblings else ""
    return f"no such setting{nearest(key, siblings)}{here}"


def modern(settings: Any) -> Any:
    """Recorded settings with keys of today, at any depth; `options` are a function's own keywords and stay."""
    if isinstance(settings, Mapping):
        return {RENAMED.get(key, key): item if key == "options" else modern(item) for key, item in settings.items()}
    return [modern(item) for item in settings] if isinstance(settings, list) else settings


def typed(kind: Any, value: Any, at: str = "") -> Any:
    """`value` (numbers, text, lists and mappings, as YAML gives them) as an instance of the type `kind`.

    at: its key in messages. Raises ConfigError (one line). What needs no torch is checked first.
    """
    refuse_broken_text(value, at)
    adapter = _adapter(Annotated[kind, Record] if dataclasses.is_dataclass(kind) else kind)
    try:
        adapter.validate_python(value, context=LIGHT)
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ConfigError(_line(error, value, at)) from None


def refuse_broken_text(value: Any, at: str) -> None:
    """ConfigError for text that no file can hold: half of a surrogate pair, as of bytes that are not UTF-8."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_broken_text(str(key), at)
            refuse_broken_text(item, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            refuse_broken_text(item, f"{at}.{i}" if at else str(i))
    elif isinstance(value, str) and re.search(r"[\ud800-\udfff]", value):
        raise ConfigError(ascii(f"{at or 'the config'}: {value[:60]}: not valid Unicode; write it in UTF-8")[1:-1])


class Record:
    """The base of the schema's dataclasses, and a mark for others: the names of the fields are checked first."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return BeforeValidator(lambda value: _fields(source, value)).__get_pydantic_core_schema__(source, handler)


def of_guidance(path: str) -> PlainValidator:
    """The check of a dataclass of segresearch.guidance ("module.Class"), which is imported, and torch with it, once a
    value is there."""
    module, _, name = path.rpartition(".")

    def check(value: Any, info: Any) -> Any:
        if info.context == LIGHT:
            return value
        kind = getattr(importlib.import_module(f"segresearch.guidance.{module}"), name)
        return _adapter(Annotated[kind, Record]).validate_python(value)

    return PlainValidator(check)


def of_record(kind: Any, parse: Callable[[str], Any] | None = None) -> PlainValidator:
    """The check of a dataclass of the schema that occurs in several places: pydantic keeps `Record` at the first.
    parse: makes one from text, where it has a short form."""

    def check(value: Any) -> Any:
        short = parse is not None and isinstance(value, str)
        return _adapter(Annotated[kind, Record]).validate_python(parse(value) if short else value)  # type: ignore[misc]

    return PlainValidator(check)


def _fields(kind: Any, value: Any) -> Any:
    """The mapping `value`, if its keys are fields of the dataclass `kind`; a required one that it lacks is Missing."""
    if isinstance(value, kind):
        return value
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(value, Mapping):
        raise PydanticCustomError("type", f"a mapping of {', '.join(fields)}")  # type: ignore[arg-type]
    value = {"on" if key is True else key: item for key, item in value.items()}  # YAML reads a bare `on` as true
    for key in value:
        if key not in fields:
            raise ConfigError(f"{key}: {unknown(str(key), fields)}")
    for key, field in fields.items():
        if value.get(key, "???" if field.default is field.default_factory else None) == "???":  # without a default
            value[key] = Missing(key)
    return value


def _errors(error: ValidationError, value: Any) -> Iterator[tuple[tuple[str, ...], Any, bool, str, list[str]]]:
    """Of each wrong field its keys, its value, whether the next is a whole message, what it must be, its choices."""
    for details in error.errors(include_url=False):
        keys, node = [], value
        for key in details["loc"]:  # the members of unions are in it too
            if isinstance(node, Mapping) and key in node or isinstance(node, Sequence) and key in range(len(node)):
                keys.append(str(key))
                node = node[key]  # type: ignore[index]
        context, wrong = details.get("ctx", {}), details["input"]
        if isinstance(cause := context.get("error"), ValidationError):
            yield from (((*keys, *below), *rest) for below, *rest in _errors(cause, node))
            continue
        choices = re.findall(r"'(.*?)'", str(context.get("expected") or context.get("expected_tags")))
        text = f"one of {', '.join(choices)}" if len(choices) > 1 else "".join(choices)
        if isinstance(wrong, Missing):
            keys += [wrong.key] * isinstance(node, Mapping)  # where the key is not there at all
        elif details["type"] == "union_tag_invalid":
            keys, wrong = [*keys, "kind"], context["tag"] or Missing("kind")
        elif cause:  # a ConfigError begins with the name of a field
            text = f".{cause}" if isinstance(cause, ConfigError) else f": {cause}"
        yield tuple(keys), wrong, bool(cause), text or TYPES.get(details["type"], details["msg"]), choices


def _line(error: ValidationError, value: Any, at: str) -> str:
    """The most specific of the errors as one line."""
    errors = list(_errors(error, value))
    keys, wrong, whole, text, _ = max(errors, key=lambda entry: len(entry[0]) + entry[2])
    name = ".".join([at, *keys] if at else keys)
    if whole:
        return f"{name}{text}".lstrip(".: ")
    same = [entry for entry in errors if entry[0] == keys]
    words = " or ".join(dict.fromkeys(text for *_, text, _ in same))
    if isinstance(wrong, Missing):
        return f"{name}: missing; it must be {words}"
    choices = [choice for entry in same for choice in entry[4]]
    return f"{name or 'the config'}: {wrong!r} is not {words}{nearest(str(wrong), choices)}"
