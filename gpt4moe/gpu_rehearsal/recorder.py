"""Recorder: sees every operation of a step on fake tensors, and answers those that ask for a value.

operation --> counted --> fake result
         |--> asks for a value or a size that depends on values (waits.py): a host sync, answered by `Answers`
         |--> CPU and GPU tensors mixed: noted, then done on the GPU
         `--> refused: noted, and the step ends
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.distributed._meta_registrations import create_fakework
from torch.utils._python_dispatch import TorchDispatchMode

from gpt4moe.config.plan import images_per_sequence
from gpt4moe.config.run import RunConfig
from gpt4moe.gpu_rehearsal import costs, places, waits
from gpt4moe.gpu_rehearsal.places import Place
from gpt4moe.gpu_rehearsal.roofline import ENOUGH_SECONDS, Roofline
from gpt4moe.parallel.kernel_problems import DeviceKind, has_grouped_product
from gpt4moe.parallel.layout import Layout

_COALESCED = ("c10d::reduce_scatter_tensor_coalesced_", "c10d::allgather_into_tensor_coalesced_")


@dataclass(slots=True)
class Overlapped:
    """Waits of the host at one place, while the GPU has enough work."""

    count: int = 0
    least_kernels: int = 0
    """Queued behind what is waited for, at the wait that has the least work."""
    least_seconds: float = float("inf")
    """Of these, by the roofline's assumptions."""


@dataclass(slots=True)
class Notes:
    """What was seen of one step."""

    roofline: Roofline
    host_syncs: Counter[tuple[Place, str]] = field(default_factory=Counter)
    """(place, operation) -> count."""
    overlapped: dict[Place, Overlapped] = field(default_factory=dict)
    """Waits that are no host sync: the GPU is at work meanwhile."""
    copies: int = 0
    """To the host's memory that were queued and not waited for, since the start."""
    awaited: int = 0
    """The first so many of them are done: the host has waited for something behind them."""
    operations: Counter[str] = field(default_factory=Counter)
    attention: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(kernel, and why where it is not flash; bytes of the scores that it keeps) -> calls."""
    kernels: int = 0
    allocations: int = 0
    """New blocks of the GPU's memory that operations ask for. torch's allocator serves most from memory it has."""
    allocated_bytes: int = 0
    """Of all of them, freed ones too."""
    largest: tuple[int, Place | None] = (0, None)
    """The largest of them, and where it is made."""
    problems: dict[str, None] = field(default_factory=dict)
    """In the order they were found, each once. They stay when a step is cleared."""

    def clear(self) -> None:
        """Before a new step."""
        for counter in (self.host_syncs, self.operations, self.attention):
            counter.clear()
        self.kernels = self.allocations = self.allocated_bytes = 0
        self.largest = (0, None)
        self.overlapped.clear()
        self.roofline.clear()

    @property
    def collectives(self) -> Counter[str]:
        """Name in torch.distributed's dispatcher -> calls; groups of one are in it."""
        operations = self.operations.items()
        return Counter({name.removeprefix("c10d::"): count for name, count in operations if name.startswith("c10d::")})

    @property
    def attention_calls(self) -> dict[str, int]:
        """Kernel -> calls."""
        calls: dict[str, int] = {}
        for (kernel, _), number in self.attention.items():
            calls[kernel] = calls.get(kernel, 0) + number
        return calls

    @property
    def aten_operations(self) -> int:
        return sum(count for name, count in self.operations.items() if name.startswith("aten::"))

    def sync(self, operation: str) -> None:
        """The host waits for all that is queued."""
        self.host_syncs[places.here(), operation] += 1
        self.awaited = self.copies

    def wait(self, operation: str, kernels: int, seconds: float, copies: int) -> None:
        """The host waits for the GPU, which has these kernels queued behind what it waits for.

        Args:
            copies: before what it waits for.
        """
        self.awaited = max(self.awaited, copies)
        if seconds < ENOUGH_SECONDS:
            self.host_syncs[places.here(), operation] += 1
            return
        waits = self.overlapped.setdefault(places.here(), Overlapped())
        waits.count += 1
        if seconds < waits.least_seconds:
            waits.least_kernels, waits.least_seconds = kernels, seconds

    def allocate(self, memory_bytes: int) -> None:
        """Counts one new block of memory."""
        self.allocations += 1
        self.allocated_bytes += memory_bytes
        if memory_bytes > self.largest[0]:
            self.largest = (memory_bytes, places.here())

    def problem(self, place: Place, words: str) -> None:
        self.problems[f"{place}: {words}"] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Values of a step in which every expert gets the same number of tokens."""

    tokens: float
    """Of the global batch."""
    rows: int
    """That a rank sends to experts, and gets, in one micro-batch of one layer."""
    ep: int
    local_experts: int
    images: int = 0
    """Of a row of a vision model's micro-batch; each is one frame."""
    padding: float = 0.0
    """Tokens of the global batch that are padding. More than 0: padding is masked in every layer."""

    @classmethod
    def of(cls, run: RunConfig, layout: Layout) -> "Answers":
        moe, model = run.model.moe, run.model
        tokens = run.training.micro_batch_size * model.seq_length // layout.cp
        tokens = tokens // layout.tp if layout.sequence_parallel else tokens
        return cls(
            tokens=float(run.training.global_batch_size * model.seq_length),
            rows=tokens * layout.etp * moe.top_k if moe else 0,
            ep=layout.ep,
            local_experts=moe.num_experts // layout.ep if moe else 1,
            images=ceil(images_per_sequence(run)),
        )

    def value(self, place: Place, index: int) -> float:
        """Element `index` of what the host reads at a place. What has no row is 1."""
        names: dict[str, Callable[[int], float]] = {
            "_global_tokens": lambda index: self.padding if index else self.tokens,
            "listed": lambda index: self.rows / (self.ep * self.local_experts),  # moe.expert_rows
            "_shape": lambda index: self.images - 1,  # the number of a row's last image, from 0 (training.images)
        }
        return names[place.function](index) if place.function in names else 1.0


class Recorder(TorchDispatchMode):
    """Active during a step, above the fake tensors' own mode."""

    def __init__(self, notes: Notes, answers: Answers, run: RunConfig, layout: Layout):
        super().__init__()
        self.notes, self.answers, self.run, self.layout = notes, answers, run, layout
        self.has_grouped_product = has_grouped_product(DeviceKind.of_cluster(run.cluster).capability)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = f"{func.namespace}::{func._opname}"
        if not name.startswith("prim"):
            self.notes.operations[name] += 1
        if torch.are_deterministic_algorithms_enabled() and _adds_in_any_order(func, args, kwargs):
            self.notes.problem(places.here(), f"{func._opname} adds in any order, which training.deterministic refuses")
        if name in _COALESCED:  # torch has no fake rule for them
            return create_fakework([], return_first_arg=False)
        if func in waits.VALUES:
            return waits.VALUES[func](self, args, kwargs)
        if waits.copies_to_host(func, args, kwargs):
            self.notes.sync("copy to the host")
        if waits.puts_by_mask(func, args):
            self.notes.sync("assignment by a mask")
        if _mixes_dtypes(func._opname, args):
            dtypes = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in costs.tensors(args))
            self.notes.problem(places.here(), f"{func._opname} mixes dtypes: {dtypes}")
        result = self._result(func, args, kwargs)
        if waits.queues_copy_to_host(func, args, kwargs):
            self.notes.copies += 1
            args[0].copy_to_host = self.notes.copies
        if name.startswith("aten::"):
            inputs, outputs = list(costs.tensors([*args, *kwargs.values()])), list(costs.tensors(result))
            self._count_allocations(inputs, outputs)
            self._count_kernel(func._opname, args, inputs, outputs)
        return result

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            given = list(costs.tensors([*args, *kwargs.values()]))
            if len({tensor.device.type for tensor in given if tensor.dim()}) < 2:
                raise
            shapes = ", ".join(f"{tensor.device.type} {tuple(tensor.shape)}" for tensor in given)
            self.notes.problem(places.here(), f"{func._opname} mixes devices: {shapes} ({_first_line(error)})")
            return func(*map(_on_gpu, args), **{key: _on_gpu(value) for key, value in kwargs.items()})

    def _count_allocations(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """A view and a result in place lie in the memory of an input."""
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            memory = tensor.untyped_storage()
            if memory._cdata not in known and tensor.device.type == "cuda":
                known.add(memory._cdata)
                self.notes.allocate(memory.nbytes())

    def _count_kernel(self, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if name in costs.NO_KERNEL or not any(tensor.device.type == "cuda" for tensor in inputs + outputs):
            return
        shapes = [tuple(tensor.shape) for tensor in inputs + outputs]
        part = costs.part_of(name, places.functions(), shapes, self.run, self.layout)
        moved, flops = costs.memory_bytes(name, args, inputs, outputs), costs.flops(name, inputs)
        if name == "_grouped_mm" and not self.has_grouped_product:
            self.notes.sync("copy to the host by grouped_mm")
            groups = len(inputs[-1])  # their ends
            for _ in range(groups):
                self.count("mm", part, moved / groups, flops / groups)
        else:
            self.count(name, part, moved, flops)

    def count(self, name: str, part: str, memory_bytes: float, flops: float = 0.0) -> None:
        """Counts one kernel."""
        self.notes.kernels += 1
        self.notes.roofline.add(name, part, memory_bytes, flops)

    def read(self, tensor: Tensor, index: int = 0) -> float | int | bool:
        """The value of one element, as the host would see it."""
        if getattr(tensor, "copy_to_host", 0) > self.notes.awaited:
            self.notes.problem(places.here(), "the host reads a copy from the GPU that it has not waited for")
        value = self.answers.value(places.here(), index)
        if tensor.dtype == torch.bool:
            return bool(value)
        return value if tensor.dtype.is_floating_point else int(value)


def _adds_in_any_order(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether torch has no deterministic CUDA kernel for a call, and raises (its documentation, 2.13). What never is in
    a step is left out: pooling, padding, interpolation."""
    name = func._opname
    if name not in _NO_ORDER or not any(tensor.device.type == "cuda" for tensor in costs.tensors(args)):
        return False
    if name in ("cumsum", "cumsum_"):
        return bool((kwargs.get("dtype") or args[0].dtype).is_floating_point)
    if name == "bincount":
        return (args[1] if len(args) > 1 else kwargs.get("weights")) is not None
    return True


_NO_ORDER = ("cumsum", "cumsum_", "bincount", "histc", "median", "put_", "nll_loss_forward", "nll_loss2d_forward")


def _mixes_dtypes(name: str, args: Any) -> bool:
    """Of a matrix product: torch's rules for fake tensors do not ask. A product that is given its result's dtype adds
    to a matrix of that one."""
    if name not in ("mm", "bmm", "addmm", "baddbmm"):
        return False
    given, wide = list(costs.tensors(args)), [arg for arg in args if isinstance(arg, torch.dtype)]
    factors = given[-2:]
    added = {tensor.dtype for tensor in given[:-2]} - set(wide)
    return len(added | {tensor.dtype for tensor in factors}) > 1


def _on_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("cuda:0") if value.dim() else value
    return [_on_gpu(item) for item in value] if isinstance(value, list | tuple) else value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
