"""YAML of a file -> plain data, whatever the file: the library's C loader dies of depth, aliases can grow without end.

The parser's events are counted before anything is built from them: they come one by one, without recursion.
"""

from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DEEPEST = 100
_MOST_NODES = 1_000_000


def load_yaml(text: str) -> Any:
    """Raises: ValueError for what is no YAML, needs code to be made, is nested more than 100 deep, or has more than a
    million nodes when its aliases are written out."""
    try:
        _require_small(text)
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _require_small(text: str) -> None:
    open_nodes: list[tuple[str | None, int]] = []
    """Of each node that is open its anchor and the nodes in it."""
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(event.anchor or "", _MOST_NODES)  # an alias inside its own node has no end
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if size >= _MOST_NODES:
            raise ValueError(f"it has {_MOST_NODES:,} nodes or more, or one that is in itself")
        if open_nodes:
            outer, before = open_nodes[-1]
            open_nodes[-1] = (outer, before + size)
