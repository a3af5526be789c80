"""The part of JSON schema that tool arguments are checked with.

Checked: type (one or several), enum, required, properties, additionalProperties, items. Names that `properties`
does not list are refused unless `additionalProperties` is true, because arguments become keywords of a function.
Other keywords are for the model to read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizer.errors import RequestError


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_IS_TYPE: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": _is_number,
    "integer": lambda value: _is_number(value) and value == value // 1,
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def check_schema(schema: Any, where: str) -> None:
    """Raises RequestError for a schema whose checked keywords are not written as they must be."""
    if not isinstance(schema, Mapping):
        raise RequestError(f"{where} must be a JSON schema, an object, not {type(schema).__name__}")
    unknown = [name for name in _types(schema) if name not in _IS_TYPE]
    if unknown:
        raise RequestError(f"{where}: unknown type {unknown[0]!r}: use {', '.join(_IS_TYPE)}")
    for key, kind in (("properties", Mapping), ("required", list), ("enum", list), ("items", Mapping)):
        if key in schema and not isinstance(schema[key], kind):
            raise RequestError(f"{where}: {key!r} must be {'a list' if kind is list else 'an object'}")
    properties = schema.get("properties", {})
    missing = [name for name in schema.get("required", []) if properties and name not in properties]
    if missing:
        raise RequestError(f"{where}: {missing[0]!r} is required but not among the properties")
    for name, inner in properties.items():
        check_schema(inner, f"{where}.{name}")
    if "items" in schema:
        check_schema(schema["items"], f"{where}[]")
    try:
        json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where} cannot be written as JSON: {error}") from None


def find_fault(value: Any, schema: Mapping[str, Any], where: str) -> str | None:
    """The first thing about a JSON value that its schema does not allow; None if all is well."""
    types = _types(schema)
    if types and not any(_IS_TYPE[name](value) for name in types):
        return f"{where} must be {' or '.join(types)}, not {json.dumps(value, ensure_ascii=False)[:60]}"
    if "enum" in schema and value not in schema["enum"]:
        allowed = ", ".join(json.dumps(choice, ensure_ascii=False) for choice in schema["enum"])
        return f"{where} must be one of {allowed}, not {json.dumps(value, ensure_ascii=False)[:60]}"
    if isinstance(value, dict):
        return _find_fault_in_object(value, schema, where)
    if isinstance(value, list) and "items" in schema:
        faults = (find_fault(item, schema["items"], f"{where}[{i}]") for i, item in enumerate(value))
        return next(filter(None, faults), None)
    return None


def _find_fault_in_object(value: dict[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    properties = schema.get("properties", {})
    missing = [name for name in schema.get("required", []) if name not in value]
    if missing:
        return f"{where} lack {', '.join(map(repr, missing))}"
    unknown = [name for name in value if name not in properties]
    if unknown and schema.get("additionalProperties", "properties" not in schema) is False:
        return f"{where} have no {unknown[0]!r}, only {', '.join(map(repr, properties)) or 'none at all'}"
    faults = (find_fault(value[name], inner, f"{where}.{name}") for name, inner in properties.items() if name in value)
    return next(filter(None, faults), None)


def _types(schema: Mapping[str, Any]) -> list[str]:
    names = schema.get("type", [])
    return [names] if isinstance(names, str) else list(names)
