"""Where a difference began: two passes of a step are not equal; on which rank was the fault?

    with Handed() as first: a pass  ->  with Handed() as second: the same again  ->  began_here(first, second, ...)

A fault of one rank reaches others through collectives and messages alone. Handed keeps a checksum of all that this
rank gives to them. The fault was on a rank that gave something else, or has another result, while all that it had got
before was the same: who took part in an earlier collective, or sent it an earlier message, gave the same both times.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from gpt4moe.parallel.groups import ProcessGroups

_CHUNK, _CPU_CHUNK = 1 << 22, 1 << 15
"""Words of 8 bytes that are summed at once; on a CPU what stays in its cache."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GIVEN_SECOND = {
    "allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_", "alltoall_base_", "alltoall_", "scatter_", "gather_",
}  # fmt: skip
"""c10d's operations whose second argument is what a rank gives, and the first what it gets."""
_NOTHING = ("barrier", "monitored_barrier_", "recv_any_source_")


def checksum(tensor: Tensor) -> Tensor:
    """A checksum of a tensor's bits and their order, scalar int64. One flipped bit always changes it."""
    flat = tensor.detach().contiguous().view(-1)
    in_word = 8 // flat.element_size()
    if flat.storage_offset() % in_word:
        flat = flat.clone()
    num_words = flat.numel() // in_word
    words = flat[: num_words * in_word].view(torch.int64)
    rest = flat[num_words * in_word :].view(_BITS[flat.element_size()]).to(torch.int64)
    on_cpu = flat.device.type == "cpu"
    size = _CPU_CHUNK if on_cpu else _CHUNK
    odd = _odd(size, flat.device)
    # Odd factors lose no bit when the sum overflows. That of word n is 2 n + 1.
    total = (rest * (odd[: len(rest)] + 2 * num_words)).sum()
    for start in range(0, num_words, size):
        part = words[start : start + size]
        factors = odd[: len(part)]
        total += torch.dot(part, factors) if on_cpu else (part * factors).sum()
        total += part.sum() * (2 * start)
    return total


@lru_cache(maxsize=8)
def _odd(count: int, device: torch.device) -> Tensor:
    return 2 * torch.arange(count, device=device) + 1


def read_together(sums: Sequence[Tensor], device: torch.device) -> Tensor:
    """Scalars from any device as one int64 tensor on the CPU, which waits for `device` once."""
    if not sums:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([one.to(device) for one in sums]).cpu()


class Call(NamedTuple):
    """One collective or message of this rank."""

    kind: str
    """c10d's operation."""
    group: str
    """c10d's name of its group."""
    peer: int
    """The other rank of a message; -1 for a collective."""


class Handed(TorchDispatchMode):  # type: ignore[misc]
    """What this rank gives to collectives and messages from __enter__ to __exit__, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.sums: list[Tensor] = []
        self.groups: dict[str, distributed.ProcessGroup] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname not in _NOTHING:
            self._note(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _note(self, kind: str, args: Sequence[Any]) -> None:
        group = next((distributed.ProcessGroup.unbox(it) for it in args if _is_group(it)), None)
        if group is None or group.size() == 1:
            return
        peer, given = -1, args[1] if kind in _GIVEN_SECOND else args[0]
        if kind in ("send", "recv_"):
            peer = distributed.get_global_rank(group, args[2])
        is_giver = kind != "recv_" and (kind != "broadcast_" or args[2] == group.rank())
        self.groups[group.group_name] = group
        self.calls.append(Call(kind, group.group_name, peer))
        sums = [checksum(tensor) for tensor in _tensors(given)] if is_giver else []
        self.sums.append(torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64))


def began_here(first: Handed, second: Handed, has_other_result: bool, groups: ProcessGroups) -> str | None:
    """Where the difference of two passes began on this rank, in words; None: it began elsewhere. Collective: every rank
    of the world calls it.

    Args:
        has_other_result: whether what this rank has at the end (gradients, loss) differs.
    """
    calls, differs = second.calls, _differences(first, second, groups.device)
    own = next((at for at, it in enumerate(differs) if it), len(calls) if has_other_result else -1)
    tainted = min(_met(calls, differs, second.groups, groups) + _received(calls, differs, groups), default=len(calls))
    if own < 0 or tainted < own:
        return None
    if own == len(calls):
        return "after its last collective"
    return f"in what it gave to its collective {own + 1} of {len(calls)} ({calls[own].kind.strip('_')})"


def _differences(first: Handed, second: Handed, device: torch.device) -> list[bool]:
    """Of each call of the second pass whether this rank gave something else than in the first."""
    before, after = read_together(first.sums, device).tolist(), read_together(second.sums, device).tolist()
    return [
        at >= len(before) or first.calls[at] != call or before[at] != after[at] for at, call in enumerate(second.calls)
    ]


def _met(
    calls: Sequence[Call], differs: Sequence[bool], live: dict[str, distributed.ProcessGroup], groups: ProcessGroups
) -> list[int]:
    """Places of this rank's collectives in which any member gave something else."""
    of_group: dict[str, list[int]] = defaultdict(list)
    for at, call in enumerate(calls):
        if call.peer < 0:
            of_group[call.group].append(at)
    found = []
    for name in sorted(of_group):  # one order of groups on every rank
        flags = torch.tensor([differs[at] for at in of_group[name]], dtype=torch.int32, device=groups.device)
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=live[name])
        found += [at for at, flag in zip(of_group[name], flags.tolist(), strict=True) if flag]
    return found


def _received(calls: Sequence[Call], differs: Sequence[bool], groups: ProcessGroups) -> list[int]:
    """Places at which this rank received a message that differs. Messages go along the pipeline alone, and those of two
    ranks over one group keep their order."""
    pp, rank = groups.pp.size(), groups.rank
    if pp == 1:
        return []
    stage = {distributed.get_global_rank(groups.pp, at): at for at in range(pp)}
    ordered: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for at, call in enumerate(calls):
        if call.peer >= 0:
            ordered[call.group, call.kind, stage[call.peer]].append(at)
    names = sorted({group for group, _, _ in ordered})
    most = torch.tensor([max(map(len, ordered.values()), default=0)], dtype=torch.int64, device=groups.device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX, group=groups.pp)
    found = []
    for name in names:
        flags = torch.zeros(pp, pp, int(most.item()), dtype=torch.int32, device=groups.device)
        for to in range(pp):
            for number, at in enumerate(ordered[name, "send", to]):
                flags[stage[rank], to, number] = int(differs[at])
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=groups.pp)
        for source, got in enumerate(flags[:, stage[rank]].tolist()):
            found += [at for at, is_other in zip(ordered[name, "recv_", source], got, strict=False) if is_other]
    return found


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and argument._type().qualified_name().endswith(".ProcessGroup")


def _tensors(given: Any) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else [tensor for part in given for tensor in _tensors(part)]
