"""Plain data (of a YAML file, say) as instances of the schema's dataclasses, and every error as one line.

The line has the full key, the value, what was possible, and a "did you mean". Light: no torch.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, get_type_hints

from pydantic import BeforeValidator, PlainValidator, TypeAdapter, ValidationError

from segresearch.config.names import nearest, unknown
from segresearch.errors import ConfigError
from segresearch.fields import Misfit

LIGHT = "light"  # the context of a validation that imports no torch
TYPES = {  # pydantic's names of errors, and what the value must be
    "string_type": "text", "bool_type": "true or false", "int_type": "a whole number", "tuple_type": "a list",
    "dict_type": "a mapping", "is_instance_of": "a list", "missing": "a list of 2", "too_long": "a list of 2",
}  # fmt: skip


def typed(kind: Any, value: Any, at: str = "") -> Any:
    """`value` (numbers, text, lists and mappings, as YAML gives them) as an instance of the type `kind`.

    `at` is the key of the value in messages. Raises ConfigError (one line) if it does not fit. Everything that needs no
    torch is checked first.
    """
    adapter: Any = TypeAdapter(Annotated[kind, Record] if dataclasses.is_dataclass(kind) else kind)
    try:
        adapter.validate_python(value, context=LIGHT)
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ConfigError(_line(error, value, at)) from None


class Record:
    """The base of the schema's dataclasses, and a mark for others: the names of the fields are checked first."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return BeforeValidator(lambda value: _named(source, value)).__get_pydantic_core_schema__(source, handler)


def of_guidance(name: str) -> PlainValidator:
    """The check of a dataclass of segresearch.guidance, which is imported, and torch with it, once a value is there."""

    def check(value: Any, info: Any) -> Any:
        if info.context == LIGHT:
            return value
        import segresearch.guidance

        kind = getattr(segresearch.guidance, name)
        return TypeAdapter(kind).validate_python(_named(kind, value))

    return PlainValidator(check)


def _named(kind: Any, value: Any) -> Any:
    """The mapping `value`, if its keys are the fields of the dataclass `kind`."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise Misfit("type", f"a mapping of {', '.join(fields)}")
    value = {"on" if key is True else key: item for key, item in value.items()}  # YAML reads a bare `on` as true
    for key in value:
        if key not in fields:
            raise Misfit("unknown", key=key, choices=list(fields))
    for key, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if value.get(key, "???" if required else None) == "???":
            raise Misfit("missing", _expected(get_type_hints(kind, include_extras=True)[key]), key)
    return value


def _expected(hint: Any) -> str:
    """The values of a type in words: "a number or a mapping of start, stop"."""
    try:
        TypeAdapter(hint).validate_python(object())
    except ValidationError as error:
        return " or ".join(dict.fromkeys(misfit.text for _, misfit, _ in _flat(error, None)))
    return "given"


def _flat(error: ValidationError, value: Any) -> Iterator[tuple[tuple[str, ...], Misfit, Any]]:
    """The errors of all fields: keys, what is wrong, and the value."""
    for details in error.errors(include_url=False):
        keys, node = [], value
        for key in details["loc"]:  # the members of unions are in it too
            if isinstance(node, Mapping) and key in node or isinstance(node, Sequence) and key in range(len(node)):
                keys.append(str(key))
                node = node[key]  # type: ignore[index]
        context, kind = details.get("ctx", {}), details["type"]
        choices = re.findall(r"'(.*?)'", str(context.get("expected") or context.get("expected_tags")))
        text = f"one of {', '.join(choices)}" if len(choices) > 1 else "".join(choices)
        match context.get("error"):
            case ValidationError() as inner:
                yield from (((*keys, *below), misfit, part) for below, misfit, part in _flat(inner, node))
            case Misfit() as misfit:
                yield tuple(keys), misfit, details["input"]
            case Exception() as raised:
                yield tuple(keys), Misfit("raised", str(raised)), details["input"]
            case _ if kind == "union_tag_invalid" and not context["tag"]:
                yield tuple(keys), Misfit("missing", text, "kind"), details["input"]
            case _ if kind == "union_tag_invalid":
                yield (*keys, "kind"), Misfit("type", text, choices=choices), context["tag"]
            case _:
                text = text or TYPES.get(kind, details["msg"])
                yield tuple(keys), Misfit("type", text, choices=choices), details["input"]


def _line(error: ValidationError, value: Any, at: str) -> str:
    """The most specific of the errors as one line."""
    flat = list(_flat(error, value))
    keys, misfit, value = max(flat, key=lambda entry: len(entry[0]) + (entry[1].kind != "type"))
    name = ".".join([at, *keys] if at else keys)
    key = f"{name}.{misfit.key}".removeprefix(".")
    match misfit.kind:
        case "unknown":
            return str(unknown(key, misfit.choices))
        case "missing":
            return f"{key}: missing; it must be {misfit.text}"
        case "range":
            return f"{name}: {value!r} is out of range; it must be {misfit.text}"
        case "raised":
            return f"{name}: {misfit.text}".removeprefix(": ")
    same = [other for path, other, _ in flat if path == keys]
    words = " or ".join(dict.fromkeys(other.text for other in same))
    choices = [choice for other in same for choice in other.choices]
    return f"{name or 'the config'}: {value!r} is not {words}{nearest(str(value), choices)}"
