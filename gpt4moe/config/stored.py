"""A config as config_to_dict writes it -> its objects, without OmegaConf: in a fiftieth of its time.

Each rank that resumes and each tool that opens a checkpoint reads one. Any other form is OmegaConf's to read or refuse.
"""

import dataclasses
import types
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


class _OtherForm(Exception):
    """It has a key too many or too few, a value of another type, or one that stands for another."""


def from_stored(schema: type[T], raw: Any) -> T | None:
    """The object that plain_data made `raw` of, before any check of its values; None: it did not make it."""
    try:
        return cast(T, _read(schema, raw))
    except _OtherForm:
        return None


def _read(annotation: Any, raw: Any) -> Any:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if raw is None and type(None) in inside:
            return None
        (annotation,) = (one for one in inside if one is not type(None))
        return _read(annotation, raw)
    if annotation is Any:
        origin, inside = type(raw), (str, Any) if type(raw) is dict else (Any,)
        if origin in (int, float, bool, type(None)):
            return raw
    if origin is list and type(raw) is list:
        return [_read(inside[0], one) for one in raw]
    if origin is dict and type(raw) is dict:
        return {_read(inside[0], key): _read(inside[1], one) for key, one in raw.items()}
    if isinstance(annotation, type):
        if dataclasses.is_dataclass(annotation) and type(raw) is dict and raw.keys() == _hints(annotation).keys():
            return annotation(**{key: _read(hint, raw[key]) for key, hint in _hints(annotation).items()})
        if issubclass(annotation, Enum) and type(raw) is str and raw in annotation.__members__:
            return annotation[raw]
        if annotation in (str, Any) and type(raw) is str and raw != "???" and "${" not in raw:
            return raw
        if annotation in (int, float, bool) and type(raw) is annotation:
            return raw
    raise _OtherForm


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)
