"""What a key may be, in words: the cure of a value of a wrong type."""

import dataclasses
import types
from collections.abc import Collection
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

REFUSED = "refused"
"""In a field's metadata: the values of its enum that its group refuses."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def type_cure(schema: type, full_key: str) -> str | None:
    """`KEY is a whole number; its default is 3.`; None: the schema has no such key.

    Args:
        full_key: as OmegaConf writes it: training.steps, data.phases[0].weights.
    """
    kind: Any = schema
    field: dataclasses.Field[Any] | None = None
    for part in full_key.replace("]", "").replace("[", ".").split("."):
        owner = _dataclass_in(kind)
        if part.isdecimal() and owner is None:
            kind = (get_args(kind) or (Any,))[0]  # an entry of a list
            continue
        if part.isdecimal():
            continue
        if owner is None:
            kind, field = (get_args(kind) or (Any, Any))[-1], None  # an entry of a dictionary
            continue
        hints = get_type_hints(owner)
        if part not in hints:
            return None
        kind, field = hints[part], next(one for one in dataclasses.fields(owner) if one.name == part)
    refused = () if field is None else field.metadata.get(REFUSED, ())
    return f"{full_key} is {_words(kind, refused)}{_default(field)}."


def _dataclass_in(kind: Any) -> Any:
    """The class of a group, of a group that may be null, or of a list's entries."""
    return next(
        (one for one in (kind, *get_args(kind)) if isinstance(one, type) and dataclasses.is_dataclass(one)), None
    )


def _words(kind: Any, refused: Collection[Enum] = ()) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _words(one) for one in inner)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(str(one.value) for one in kind if one not in refused)}"
    if origin is list:
        return f"a list ([A,B]), each entry {_words(inner[0])}"
    if origin is dict:
        return f"a dictionary ({{a: 1}}), each value {_words(inner[1])}"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return f"a group with the keys {', '.join(get_type_hints(kind))}"
    return _WORDS.get(kind, "a value")


def _default(field: "dataclasses.Field[Any] | None") -> str:
    if field is None or field.default in (dataclasses.MISSING, "???"):
        return ""
    value = field.default.value if isinstance(field.default, Enum) else field.default
    shown = {None: "null", True: "true", False: "false"}.get(value, value) if isinstance(value, bool | None) else value
    return f"; its default is {shown if shown != '' else 'empty'}"
