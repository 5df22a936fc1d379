"""Plain data of a file -> a dataclass whose every field has the type that it says; manifests are read by it. The seal.

A manifest's hash says that it is what was written, not that whoever wrote it was right. So what is used as a number, a
name or a list is one, before anything relies on it.
"""

import dataclasses
import hashlib
import types
from collections.abc import Mapping, Sequence
from functools import cache
from math import isfinite
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

_LARGEST = 2**63 - 1
_SHOWN = 40


class FieldError(ValueError):
    """A field that is missing, unknown or of another type: its name, its value, what it should be."""


def from_plain(kind: type[T], raw: Any, where: str = "") -> T:
    """A dataclass from what JSON gives.

    Whole numbers are counts: from 0 to 2^63 - 1. Fractions are finite. Texts can be written as UTF-8 and have no NUL.

    Args:
        kind: a dataclass of int, float, bool, str, Any, lists and sequences, dictionaries and mappings with texts as
            keys, dataclasses, and what may be None. A list of a field `tuple` comes back as a tuple.
        where: what stands before a field's name in errors.
    Raises: FieldError.
    """
    if not isinstance(raw, dict):
        raise FieldError(f"{where or 'the whole'} is {_shown(raw)}, not an object")
    prefix = f"{where}." if where else ""
    hints, fields = _fields_of(cast(Any, kind))
    unknown = next((key for key in raw if key not in fields), None)
    if unknown is not None:
        raise FieldError(f"{prefix}{_shown(unknown)} is an unknown key")
    missing = next((name for name, one in fields.items() if name not in raw and not _has_default(one)), None)
    if missing is not None:
        raise FieldError(f"{prefix}{missing} is missing")
    return kind(**{name: _checked(hints[name], value, f"{prefix}{name}") for name, value in raw.items()})


@cache
def _fields_of(kind: Any) -> "tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]":
    return get_type_hints(kind), {field.name: field for field in dataclasses.fields(cast(Any, kind))}


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _checked(kind: Any, value: Any, where: str) -> Any:
    if kind in (int, float, bool, str):  # first: a manifest of thousands of shards has little else
        wanted = _wrong(kind, value)
        if wanted is not None:
            raise FieldError(f"{where} is {_shown(value)}, not {wanted}")
        return value
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        options = [one for one in get_args(kind) if one is not type(None)]
        return None if value is None and len(options) < len(get_args(kind)) else _checked(options[0], value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return from_plain(kind, value, where)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list):
            raise FieldError(f"{where} is {_shown(value)}, not a list")
        found = [_checked(get_args(kind)[0], one, f"{where}[{number}]") for number, one in enumerate(value)]
        return found if origin is list else tuple(found)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise FieldError(f"{where} is {_shown(value)}, not an object")
        return {
            _checked(str, key, f"a key of {where}"): _checked(get_args(kind)[1], one, f"{where}.{_shown(key)}")
            for key, one in value.items()
        }
    raise AssertionError(f"{kind} is no type of a field that is read")


def _wrong(kind: Any, value: Any) -> str | None:
    """What a single value should be; None: it is."""
    is_bool = isinstance(value, bool)
    if kind is int:
        is_good = isinstance(value, int) and not is_bool and 0 <= value <= _LARGEST
        return None if is_good else "a whole number from 0"
    if kind is float:
        return None if isinstance(value, int | float) and not is_bool and isfinite(value) else "a finite number"
    if kind is bool:
        return None if is_bool else "true or false"
    return None if isinstance(value, str) and _is_writable(value) else "a text"


def _is_writable(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def sealed(body: str) -> str:
    """A JSON object with the sha256 of its own text as first member, so that any changed bit is noticed."""
    return f'{{"sha256": "{hashlib.sha256(body.encode()).hexdigest()}",{body[1:]}'


def unsealed(text: str) -> str | None:
    """The JSON object that was sealed, or None when a bit of the text has changed."""
    body = "{" + text[len(sealed("{")) :]
    return body if text == sealed(body) else None
