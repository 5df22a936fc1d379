"""How a fault is planted inside the ranks: by patching the product there. Nothing in the product knows of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

from gpt4moe.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class Fault:
    """What goes wrong, on the smallest mesh that shows it, and the words by which the suspects must name it."""

    layout: tuple[str, ...]
    """And the engine, where it is not the default."""
    suspect: str
    plant: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Callable[[list[Any], ProcessGroups], None] | None = None
    ranks: int = 2
    model: tuple[str, ...] = ()
    """What one process gets too."""


def after(module: Any, name: str, change: Callable[..., None]) -> AbstractContextManager[Any]:
    """`change(result, *args)` after each call of module.name."""
    original = getattr(module, name)

    @wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        change(result, *args)
        return result

    return patch.object(module, name, changed)
