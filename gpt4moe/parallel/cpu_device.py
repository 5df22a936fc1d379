"""Megatron on a machine without a GPU: replaces the few places where Megatron names CUDA.

install() does it, and is called only if torch sees no GPU. The places, with megatron-core 0.16.1 and 0.19.2:
- schedules, layers and the optimizer make tensors with device="cuda" or torch.cuda.current_device();
- the optimizer reads a dtype from `tensor.type()` and accepts only torch.cuda.* names;
- DDP asks for CUDA's current stream at every gradient reduction (0.19), which fails without a driver;
- layers fork a CUDA random-number tracker, and recompute keeps CUDA's random state;
- rotary embeddings under context parallelism pin host memory and call .cuda().

For tensors that are made in a step, a few of Megatron's modules get a stand-in for `torch` that makes them on the CPU.
A TorchFunctionMode (BuildOnCpu) would cost up to 7% of a small step, so it is used only while the model is built.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Modules that make tensors with device="cuda" while training.
_STEP_MODULES = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.utils",
    "megatron.core.models.common.embeddings.rope_utils",
)


class BuildOnCpu(TorchFunctionMode):
    """While it is active, device="cuda" means the CPU. For building Megatron's modules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **_on_cpu(kwargs or {}))


class _CpuTorch(ModuleType):
    """The torch module, whose tensor makers read device="cuda" as the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _CpuRngTracker:
    """Megatron's tracker of named random states, over the CPU generator."""

    def __init__(self) -> None:
        self.states: dict[str, torch.Tensor] = {}

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        self.states = {}

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states = dict(states)

    def add(self, name: str, seed: int) -> None:
        self.states[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def install() -> None:
    """Makes Megatron use the CPU in this process. A second call changes nothing."""
    from megatron.core.tensor_parallel import random as megatron_random

    if isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, _CpuRngTracker):
        return
    assert not torch.cuda.is_available()
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    # Only handed on; a call on it would be a GPU path that this process cannot take, and fails.
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment,return-value]
    megatron_random._CUDA_RNG_STATE_TRACKER = _CpuRngTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: None
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign,assignment]
    torch.Tensor.type = _type_as_on_gpu(torch.Tensor.type)  # type: ignore[method-assign,assignment]
    stand_in = _CpuTorch("torch")
    for maker in ("zeros", "ones", "empty", "tensor", "full"):
        setattr(stand_in, maker, _made_on_cpu(getattr(torch, maker)))
    for name in _STEP_MODULES:
        importlib.import_module(name).torch = stand_in  # type: ignore[attr-defined]


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    device = kwargs.get("device")
    if isinstance(device, str) and device.startswith("cuda"):
        kwargs = {**kwargs, "device": "cpu"}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    return kwargs


def _made_on_cpu(maker: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: maker(*args, **_on_cpu(kwargs))


def _type_as_on_gpu(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        if args or kwargs or "cuda" in answer:
            return answer
        return answer.replace("torch.", "torch.cuda.", 1)

    return type_name
