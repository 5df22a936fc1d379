"""Tells torch, Megatron and DeepSpeed that this process has one GPU. Its tensors are fake: shapes and no values.

install() does it, after guard.load(). Use a process of its own: it cannot train afterwards. The places are those of
torch 2.13, megatron-core 0.16.1 and 0.19.2, and deepspeed 0.19.8.
"""

import contextlib
import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.gpu_rehearsal import gpu_kernels
from gpt4moe.gpu_rehearsal.recorder import Notes
from gpt4moe.gpu_rehearsal.waits import known
from gpt4moe.parallel.kernel_problems import DeviceKind, is_installed

GPU = torch.device("cuda", 0)


class Event:
    """torch.cuda.Event on nothing."""

    notes: Notes

    def __init__(self, *args: Any, **kwargs: Any):
        self.record()

    def record(self, *args: Any) -> None:
        self.kernels, self.seconds = self._queued()
        self.copies = self.notes.copies

    def _queued(self) -> tuple[int, float]:
        """So far."""
        return self.notes.kernels, self.notes.roofline.bound_seconds

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        kernels, seconds = self._queued()
        self.notes.wait("event.synchronize", kernels - self.kernels, seconds - self.seconds, self.copies)


class Stream:
    """torch.cuda.Stream on nothing."""

    notes: Notes
    device, device_index = GPU, 0

    def __init__(self, *args: Any, **kwargs: Any): ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.notes.sync("stream.synchronize")


class _RngTracker:
    """Megatron's tracker of named random states: fake tensors need none."""

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None: ...

    def add(self, name: str, seed: int) -> None: ...

    def get_states(self) -> dict[str, Tensor]:
        return {}

    def set_states(self, states: dict[str, Tensor]) -> None: ...

    def fork(self, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext()


class _Unpinned(ModuleType):
    """The torch module for a module of Megatron that pins memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(*args, **{**kwargs, "pin_memory": False})


def install(notes: Notes, cluster: ClusterConfig) -> None:
    """Replaces them for the rest of this process.

    Args:
        notes: gets host syncs, attention kernels and mixed devices of all that runs.
    """
    _torch(notes)
    _torch_cuda(notes, cluster)
    _megatron(notes)


def _put(owner: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _torch(notes: Notes) -> None:
    _put(FakeTensorMode, avoid_device_init=property(lambda mode: True))  # else torch.tensor(device="cuda") starts CUDA
    _put(torch._C, _ensureCUDADeviceGuardSet=_nothing)
    _put(nn.functional, scaled_dot_product_attention=gpu_kernels.attention(notes))
    _put(nn.RMSNorm, forward=gpu_kernels.rms_norm(notes))
    _put(Tensor, pin_memory=lambda tensor, *_: tensor, is_pinned=lambda tensor, *_: False)
    _put(FakeTensor, tolist=_tolist)
    _put(nn.Module, _apply=_apply)

    def all_gather_object(gathered: list[Any], value: Any, group: Any = None) -> None:
        notes.sync("all_gather_object")
        gathered[:] = [value] * len(gathered)

    _put(distributed, all_gather_object=all_gather_object)


def _apply(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """Module.to, which on fake parameters would swap their data, and fail: new parameters where it changes them."""
    for child in module.children() if recurse else ():
        _apply(child, change)
    for name, parameter in module._parameters.items():
        if parameter is not None and (changed := change(parameter)) is not parameter:
            new = nn.Parameter(changed.detach(), parameter.requires_grad)
            new.__dict__.update(parameter.__dict__)
            module._parameters[name] = new
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else change(buffer)
    return module


def _tolist(tensor: FakeTensor) -> Any:
    """One wait for the whole list. Outside a step there is no recorder, and no wait is counted."""
    recorder = gpu_kernels.active()
    if (constant := tensor.constant) is not None:
        return known(constant)
    if recorder is None:
        return _nested(tensor.shape, [1] * tensor.numel())
    if tensor.device.type == "cuda":
        recorder.notes.sync("tolist")
    return _nested(tensor.shape, [recorder.read(tensor, index) for index in range(tensor.numel())])


def _nested(shape: Any, values: list[Any]) -> Any:
    if not shape:
        return values[0]
    step = len(values) // shape[0] if shape[0] else 0
    return [_nested(shape[1:], values[place * step : (place + 1) * step]) for place in range(shape[0])]


def _torch_cuda(notes: Notes, cluster: ClusterConfig) -> None:
    cuda = torch.cuda
    Event.notes = Stream.notes = notes
    capability = DeviceKind.of_cluster(cluster).capability
    properties = SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        name=cluster.name,
        total_memory=int(cluster.memory_bytes),
        multi_processor_count=132,
    )
    state = torch.zeros(16, dtype=torch.uint8)
    _put(
        cuda, is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, set_device=_nothing,
        synchronize=lambda device=None: notes.sync("cuda.synchronize"), Stream=Stream, Event=Event,
        current_stream=Stream, default_stream=Stream, stream=lambda stream: contextlib.nullcontext(),
        manual_seed=_nothing, get_rng_state=lambda *_: state, set_rng_state=_nothing,
        get_device_capability=lambda *_: capability, get_device_name=lambda *_: cluster.name,
        is_bf16_supported=lambda *_, **__: True, get_device_properties=lambda *_: properties,
        is_current_stream_capturing=lambda: False, memory_stats=lambda *_: {},
    )  # fmt: skip
    _put(cuda.random, get_rng_state=lambda *_: state)
    for name in ("reset_peak_memory_stats", "empty_cache", "reset_max_memory_allocated", "reset_max_memory_cached"):
        _put(cuda, **{name: _nothing})
    for name in (
        "memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved", "memory_cached",
        "max_memory_cached",
    ):  # fmt: skip
        _put(cuda, **{name: lambda *_: 0})


def _megatron(notes: Notes) -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    _put(
        random, _set_cuda_rng_state=_nothing, _get_cuda_rng_state=_nothing, _CUDA_RNG_STATE_TRACKER=_RngTracker(),
        _CUDA_RNG_STATE_TRACKER_INITIALIZED=True,
    )  # fmt: skip
    rope = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    _put(rope, torch=_Unpinned("torch"))
    attention = importlib.import_module("gpt4moe.model.attention")
    _put(attention, can_use_flash_attention=gpu_kernels.can_use_flash_attention(notes))
    documents = importlib.import_module("gpt4moe.model.documents")
    _put(documents, document_lengths=gpu_kernels.quarters)
    for module, kernels in gpu_kernels.OURS.items():
        _put(importlib.import_module(f"gpt4moe.{module}"), kernels=lambda kernels=kernels: kernels)
    model = importlib.import_module("gpt4moe.model.gpt")
    _put(model, initialize=_nothing)  # draws values, which nobody reads
    problems = importlib.import_module("gpt4moe.parallel.kernel_problems")
    # A CUDA build of torch brings triton.
    _put(problems, is_installed=lambda package, folder="": package == "triton" or is_installed(package, folder))
    _put(problems, missing_build_tool=lambda: None)
