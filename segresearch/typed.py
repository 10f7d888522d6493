"""`typed` checks plain data (of a YAML file, say) against a type and makes it of that type. Light: no torch.

It is strict: an unknown key, a wrong type, a value out of range or an unknown choice is a `ConfigError` of one line
that says where it is and what was possible. "inf" is a number wherever a number is.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from segresearch.errors import ConfigError


@dataclass(frozen=True)
class Bounds:
    """The closed range of a number: Annotated[float, Bounds(low=0)]."""

    low: float | int = -math.inf
    high: float | int = math.inf


def nearest(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean X?" or "" if nothing in `choices` is like `word`."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def typed(hint: Any, value: Any, at: str = "") -> Any:
    """`value` (numbers, text, lists and mappings, as YAML gives them) as an instance of the type `hint`.

    Dataclasses are made from mappings, a union of dataclasses is decided by their `kind` field, tuples are made from
    lists, `at` is the name of the value in messages. Raises ConfigError (one line) if it does not fit.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if isinstance(value, str) and value == "???":
        raise ConfigError(f"{at}: missing; it must be {_words(hint)}")
    if origin is Annotated:
        result, bounds = typed(args[0], value, at), args[1]
        if not bounds.low <= result <= bounds.high:
            limits = f">= {bounds.low:g}" if bounds.high == math.inf else f"from {bounds.low:g} to {bounds.high:g}"
            raise ConfigError(f"{at}: {value!r} is out of range; it must be {_words(args[0])} {limits}")
        return result
    if origin in (Union, UnionType):
        return _union(hint, [a for a in args if a is not NoneType], NoneType in args, value, at)
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, at)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{at}: {value!r} is not {_words(hint)}{nearest(str(value), map(str, args))}")
    if origin is tuple and isinstance(value, list | tuple):
        hints = (args[0],) * len(value) if args[-1] is ... else args
        if len(hints) == len(value):
            return tuple(typed(h, v, f"{at}.{i}") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    elif origin is dict and isinstance(value, Mapping):
        return {typed(args[0], k, at): typed(args[1], v, f"{at}.{k}") for k, v in value.items()}
    elif hint is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isnan(number):
            return number
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    raise ConfigError(f"{at}: {value!r} is not {_words(hint)}")


def _union(hint: Any, options: list[Any], optional: bool, value: Any, at: str) -> Any:
    if optional and value is None:
        return None
    records = [o for o in options if dataclasses.is_dataclass(o)]
    rest = [o for o in options if o not in records]
    if not isinstance(value, Mapping) and rest or not records:
        for option in rest:
            try:
                return typed(option, value, at)
            except ConfigError:
                if len(options) == 1 or get_origin(option) is tuple and isinstance(value, list | tuple):
                    raise  # its own message says more
        raise ConfigError(f"{at}: {value!r} is not {_words(hint)}")
    if len(records) == 1:
        return typed(records[0], value, at)
    kinds = {get_args(get_type_hints(r)["kind"])[0]: r for r in records}
    if not isinstance(value, Mapping) or "kind" not in value:
        raise ConfigError(f"{at}.kind: missing; it must be one of {', '.join(kinds)}")
    return typed(kinds[typed(Literal[tuple(kinds)], value["kind"], f"{at}.kind")], value, at)


def _record(cls: Any, value: Any, at: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{at or 'the config'}: {value!r} is not a mapping of {', '.join(_names(cls))}")
    dot, hints = at + "." if at else "", get_type_hints(cls, include_extras=True)
    value = {"on" if key is True else key: item for key, item in value.items()}  # YAML reads a bare `on` as true
    for key in value:
        if key not in hints:
            raise unknown(f"{dot}{key}", _names(cls))
    for f in dataclasses.fields(cls):
        if f.name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{dot}{f.name}: missing; it must be {_words(hints[f.name])}")
    return cls(**{key: typed(hints[key], item, dot + key) for key, item in value.items()})


def unknown(name: str, siblings: Sequence[str]) -> ConfigError:
    """The error for a setting called `name` (full, with dots) that is none of `siblings`."""
    *_, key = name.split(".")
    here = f" (settings here: {', '.join(siblings)})" if siblings else ""
    return ConfigError(f"{name}: no such setting{nearest(key, siblings)}{here}")


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _words(hint: Any) -> str:
    """A type in plain words: "a whole number or null"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(args[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(a) for a in args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else repr(args[0])
    if origin is tuple:
        return f"a list of {_words(args[0])} items" if args[-1] is ... else f"a list of {len(args)}"
    if dataclasses.is_dataclass(hint):
        return f"a mapping of {', '.join(_names(hint))}"
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false", NoneType: "null"}
    return "a mapping" if origin is dict else names.get(hint, str(hint))
