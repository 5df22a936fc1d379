"""Objects of dataclasses -> plain nested data, for YAML, JSON and the identity of a run."""

import dataclasses
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints


def plain_data(value: Any, types: frozenset[type] = frozenset()) -> Any:
    """What OmegaConf.to_container(OmegaConf.structured(value), enum_to_str=True) gives, in a hundredth of its time.

    Args:
        value: an object of a dataclass, or what such an object holds.
        types: in the annotation of its key. An int where they want a float becomes one.
    """
    if dataclasses.is_dataclass(value):
        schema: Any = type(value)
        return {name: plain_data(getattr(value, name), of) for name, of in _types_of_keys(schema).items()}
    if isinstance(value, dict):
        return {key: plain_data(one, types) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(one, types) for one in value]
    if isinstance(value, Enum):
        return value.name
    return float(value) if type(value) is int and float in types and int not in types else value


@cache
def _types_of_keys(schema: Any) -> dict[str, frozenset[type]]:
    def inside(annotation: Any) -> Iterator[type]:
        yield annotation
        for one in get_args(annotation):
            yield from inside(one)

    return {key: frozenset(inside(hint)) for key, hint in get_type_hints(schema).items()}
