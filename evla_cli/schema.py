"""Frozen dataclasses from mappings: unknown keys, missing keys and wrong types are errors that name the key."""

import dataclasses
import re
import types
from collections.abc import Mapping
from reprlib import repr as short_repr
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from evla_cli.errors import EvlaError, suggest

T = TypeVar("T")

SCHEMA_VERSION = 1  # of every file of evla's own


def check_schema_version(found: Any) -> None:
    if type(found) is not int or found != SCHEMA_VERSION:
        raise EvlaError(f"schema_version is {short_repr(found)}; this evla reads {SCHEMA_VERSION}.")


def check_sha256(name: str, value: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise EvlaError(f"{name} must be a SHA-256, 64 hexadecimal digits, found {short_repr(value)}.")


def from_mapping(cls: type[T], mapping: Any, where: str) -> T:
    """Build the dataclass `cls`. `where` opens every error: the file and the section, such as `inference.yaml`.

    Sections may nest: a field whose type is a dataclass takes a mapping. Integers pass for floats, nothing else is
    converted.
    """
    if not isinstance(mapping, Mapping):
        raise EvlaError(f"{where} must be a mapping, found {type(mapping).__name__}.")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            raise EvlaError(f"{where}: unknown key {short_repr(key)}. {suggest(key, fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in mapping and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise EvlaError(f"{where}: missing key '{missing[0]}'.")
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except EvlaError as error:  # the record checks its values; only here it is known where they stood
        raise EvlaError(f"{where}: {error}") from error


def to_mapping(record: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`, with lists for tuples."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return value

    return plain(record)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        if value is None and len(options) < len(arguments):
            return None
        return _convert(options[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise EvlaError(f"{where} must be a list, found {_described(value)}.")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise EvlaError(f"{where} must be a mapping, found {_described(value)}.")
        items = [(_convert(arguments[0], key, where), item) for key, item in value.items()]
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in items}
    if hint is Any:
        return value
    if hint is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if type(value) is not hint:
        raise EvlaError(f"{where} must be {_NAMES.get(hint, hint.__name__)}, found {_described(value)}.")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _described(value: Any) -> str:
    return f"{short_repr(value)} ({type(value).__name__})"
