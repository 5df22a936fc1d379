"""What the built objects of one rank hold, in bytes: read off tensors' storages, whatever any formula says."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the process that collects reports needs no torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """One rank's states."""

    weights: int
    gradients: int
    optimizer: int


@dataclass(kw_only=True, slots=True)
class RankReport:
    """What was built of one rank of a rehearsal."""

    rank: int
    held: HeldBytes
    parameters: int
    problems: list[str] = field(default_factory=list)
    stage_files: int = 0
    """Checkpoint files written for its stage."""


def held_bytes(engine: Any) -> HeldBytes:
    """Of engine=megatron: parameter buffers, gradient buffers, and the optimizer's own tensors."""
    from torch import Tensor

    chunks = engine.chunks
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    weights = _storages(
        [parameter for chunk in chunks for parameter in chunk.parameters()] + [b.param_data for b in buffers]
    )
    gradients = _storages(buffer.grad_data for buffer in buffers)
    states: list[Tensor] = []
    for inner in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        for group in inner.optimizer.param_groups:
            states += group["params"]
        for state in inner.optimizer.state.values():
            states += [value for value in state.values() if isinstance(value, Tensor)]
    optimizer = _storages(states)
    for seen in weights.keys() | gradients.keys():  # masters of fp32 weights are the weights
        optimizer.pop(seen, None)
    return HeldBytes(sum(weights.values()), sum(gradients.values()), sum(optimizer.values()))


def zero_held_bytes(engine: Any) -> HeldBytes:
    """Of engine=deepspeed: parameters, their fp32 gradients, and the tensors of DeepSpeed's inner optimizer that are on
    the parameters' device."""
    weights = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    inner = engine.optimizer.optimizer
    states = [tensor for group in inner.param_groups for tensor in group["params"]]
    states += [tensor for state in inner.state.values() for tensor in state.values()]
    parts = (weights, [partition.gradients for partition in engine.partitions], states)
    return HeldBytes(*(sum(_storages(part).values()) for part in parts))


def _storages(tensors: "Iterable[Tensor]") -> dict[int, int]:
    """Bytes of every storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}
