"""A step's matrix products, found as it runs, then run alone: less than that no step of it takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
PRODUCTS = frozenset((_aten.mm, _aten.addmm, _aten.addmm_, _aten.bmm, _aten.baddbmm, _aten.baddbmm_, _aten._grouped_mm))
ATTENTION = frozenset(
    (_aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_flash_attention_for_cpu_backward)
)
"""Torch's own kernels of attention: two and five products each."""


def products_of(step: Callable[[], object]) -> Callable[[], None]:
    """Runs `step` once. Returns: its products again, in their order, on the same tensors; it keeps them in memory."""
    with _Recorder() as found:
        step()
    calls = found.calls
    assert calls, "the step has no matrix product"

    def again() -> None:
        with torch.no_grad():
            for function, given, named in calls:
                function(*given, **named)

    return again


class _Recorder(TorchDispatchMode):
    """Keeps the calls of PRODUCTS and ATTENTION, with outputs given to them that have none: memory that is there."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        named = named or {}
        out = function(*given, **named)
        packet = function.overloadpacket
        if packet in PRODUCTS and "out" in packet.overloads() and "out" not in named:
            self.calls.append((packet.out, given, {**named, "out": torch.empty_like(out)}))
        elif packet in PRODUCTS | ATTENTION:
            self.calls.append((function, given, named))
        return out
