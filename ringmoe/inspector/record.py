"""JSON of dataclasses back to dataclasses. The text is untrusted: every value is checked against its field's type."""

import dataclasses
import json
import types
import typing
from typing import Any

_LARGEST = 1e30  # no figure of a program comes near it, and products of two don't overflow


def load(text: str) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): it begins {text[:40]!r}, expected what to_json() wrote") from error


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind`: a dataclass, tuple[T, ...], tuple[T, U], dict[str, T], a union with None, or a plain type.

    Args:
      where: the place in the text, for the message.

    Raises:
      ValueError: it is something else. Keys that a dataclass does not know are left out.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else decode(arguments[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, value, where)
    if origin is tuple and isinstance(value, list) and arguments[-1] is not ... and len(arguments) == len(value):
        return tuple(decode(one, entry, where) for one, entry in zip(arguments, value, strict=True))
    if origin is tuple and isinstance(value, list) and arguments[-1] is ...:
        return tuple(decode(arguments[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], entry, f"{where}[{key[:40]!r}]") for key, entry in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST:
        value = float(value)
    if type(value) is not kind or (isinstance(value, (int, float)) and not abs(value) < _LARGEST):
        raise ValueError(f"{where} is {shown(value)}, expected {_described(kind)}: the text was cut or edited")
    return value


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}, expected an object: the text was cut or edited")
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            found[field.name] = decode(hints[field.name], value[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} has no {field.name!r}, expected {_described(hints[field.name])}")
    return kind(**found)


def shown(value: Any) -> str:
    """A value of a JSON text, short enough for a message."""
    return {list: "a list", dict: "an object"}.get(type(value)) or repr(value)[:60]


def _described(kind: Any) -> str:
    """A type in the words of JSON."""
    plain = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    names = {tuple: "a list", dict: "an object", types.UnionType: "a value or null"}
    return plain.get(kind) or names.get(typing.get_origin(kind) or kind, "an object")
