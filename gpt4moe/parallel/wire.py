"""Bytes on the wire, counted at the collective: what this rank sends, by group and kind of operation.

    with WireCounter(groups) as wire: one step  ->  wire.sent["dp_cp", "reduce_scatter"] bytes

A dispatch mode sees every c10d operation of Megatron, DeepSpeed and this package, forward and backward. It counts what
a ring algorithm sends, which is the minimum: for an all-gather or reduce-scatter over p ranks p - 1 times one rank's
part, for an all-reduce the sum of both. The padding of a tensor counts. A group of one rank sends nothing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from gpt4moe.parallel.groups import ProcessGroups

GROUPS = ("tp", "cp", "tp_cp", "ep", "etp", "expert_dp", "dp", "dp_cp", "model", "pp", "embedding", "world", "other")
"""If several names mean the same group, the first of this order is used."""
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "broadcast", "other")


class WireCounter(TorchDispatchMode):  # type: ignore[misc]
    """Counts from __enter__ to __exit__. Several uses add up."""

    def __init__(self, groups: ProcessGroups):
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.names = _names(groups)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: Sequence[Any]) -> None:
        if operation in _SILENT:
            return
        groups = [distributed.ProcessGroup.unbox(argument) for argument in args if _is_group(argument)]
        if not groups or groups[0].size() == 1:
            return
        group = groups[0]
        kind, bytes_sent = _OPERATIONS.get(operation, ("other", _handed_in))
        # In a pipeline of two stages Megatron sends half the messages over the world's group. All messages count as pp.
        name = "pp" if kind == "send" else self.names.get(group.group_name, "other")
        self.sent[name, kind] += bytes_sent(args, group.size(), group.rank())

    def table(self) -> Tensor:
        """[groups, kinds] int64, the same shape on every rank."""
        return torch.tensor([[self.sent[group, kind] for kind in KINDS] for group in GROUPS], dtype=torch.int64)


def _names(groups: ProcessGroups) -> dict[str, str]:
    """c10d's name of each group -> ours."""
    live: dict[str, Any] = {name: getattr(groups, name, None) for name in GROUPS}
    live |= {"embedding": groups.megatron.embd, "world": distributed.group.WORLD}
    names: dict[str, str] = {}
    for name in GROUPS:
        if live[name] is not None:
            names.setdefault(live[name].group_name, name)
    return names


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and argument._type().qualified_name().endswith(".ProcessGroup")


def _bytes(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return int(tensors.numel() * tensors.element_size())
    return sum(map(_bytes, tensors))


# Each: the operation's arguments, the ranks of its group and this rank's place in it -> bytes this rank sends.


def _gathered(args: Sequence[Any], ranks: int, place: int) -> int:
    return (ranks - 1) * _bytes(args[1])


def _scattered(args: Sequence[Any], ranks: int, place: int) -> int:
    return (ranks - 1) * _bytes(args[0])


def _reduced(args: Sequence[Any], ranks: int, place: int) -> int:
    return round(2 * (ranks - 1) * _bytes(args[0]) / ranks)


def _broadcast(args: Sequence[Any], ranks: int, place: int) -> int:
    return round((ranks - 1) * _bytes(args[0]) / ranks)


def _exchanged(args: Sequence[Any], ranks: int, place: int) -> int:
    """All rows but those that stay on this rank. Without sizes the parts are equal."""
    given, sizes = args[1], args[4]
    rows = given.shape[0]
    own = sizes[place] if sizes else rows // ranks
    return (rows - own) * (_bytes(given) // rows) if rows else 0


def _exchanged_lists(args: Sequence[Any], ranks: int, place: int) -> int:
    return _bytes(args[1]) - _bytes(args[1][place])


def _handed_in(args: Sequence[Any], ranks: int, place: int) -> int:
    return _bytes(args[0])


_SILENT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")
_OPERATIONS: dict[str, tuple[str, Callable[[Sequence[Any], int, int], int]]] = {
    "allgather_": ("all_gather", _gathered),
    "_allgather_base_": ("all_gather", _gathered),
    "allgather_into_tensor_coalesced_": ("all_gather", _gathered),
    "reduce_scatter_": ("reduce_scatter", _scattered),
    "_reduce_scatter_base_": ("reduce_scatter", _scattered),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _scattered),
    "allreduce_": ("all_reduce", _reduced),
    "allreduce_coalesced_": ("all_reduce", _reduced),
    "alltoall_base_": ("all_to_all", _exchanged),
    "alltoall_": ("all_to_all", _exchanged_lists),
    "broadcast_": ("broadcast", _broadcast),
    "send": ("send", _handed_in),
}
