"""Faults that a GPU would punish and a CPU does not, planted for as long as one rehearsal lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.model import specs
from gpt4moe.model.attention import SdpaAttention
from gpt4moe.moe import experts
from gpt4moe.moe.expert_rows import HostCopy


def item_in_a_layer(self: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    assert query.sum().item() == query.sum().item()  # two waits for the GPU
    row = query.detach()[0, 0, 0].clone()
    row[row > 0] = row[:1]  # one
    row[row > 0] = 0.0  # none
    torch.distributed.all_gather_object([None], 0)  # one
    return _attention(self, query, *args, **kwargs)


def tensor_on_the_cpu(self: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    query.detach() @ torch.ones(query.shape[-1], 1, device=query.device)  # bf16 and fp32
    return _attention(self, query * torch.ones(query.shape[-1], device="cpu"), *args, **kwargs)


def offsets_of_a_wrong_dtype(x: Any, weight: Any, rows: Any, gate_up: Any, down: Any, **_: Any) -> Any:
    return torch.nn.functional.grouped_mm(x, gate_up.transpose(1, 2), offs=torch.cumsum(rows.counts, 0))


def awaited_at_once(self: HostCopy, values: torch.Tensor) -> None:
    _host_copy(self, values)
    assert self.listed


def never_awaited(self: HostCopy, values: torch.Tensor) -> None:
    _host_copy(self, values)
    self.copied = None


def event_before_the_copy(self: HostCopy, values: torch.Tensor) -> None:
    event = torch.cuda.Event()
    _host_copy(self, values)
    self.copied = event


def mask_in_attention(self: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def large_copy(self: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    copies = query.detach().double().repeat(16, 1, 1, 1)
    return _attention(self, query + 0 * copies[: query.shape[0]].to(query.dtype), *args, **kwargs)


def floats_added_up(self: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _attention(self, query + 0 * query.detach().cumsum(0), *args, **kwargs)


def norm_on_the_cpu(kernel: Any) -> Any:
    class Norm(_norm_class(kernel)):  # type: ignore[misc]
        def __init__(self, **given: Any):
            with torch.device("cpu"):
                super().__init__(**given)

    return Norm


_attention = SdpaAttention.forward
_host_copy = HostCopy.__init__
_norm_class = specs.norm_class
PATCHES: dict[str, Callable[[], Any]] = {
    "item in a layer": lambda: mock.patch.object(SdpaAttention, "forward", item_in_a_layer),
    "tensor on the CPU": lambda: mock.patch.object(SdpaAttention, "forward", tensor_on_the_cpu),
    "offsets of a wrong dtype": lambda: mock.patch.dict(
        experts.KERNELS, {ExpertKernel.grouped_mm: offsets_of_a_wrong_dtype}
    ),
    "counts awaited at once": lambda: mock.patch.object(HostCopy, "__init__", awaited_at_once),
    "counts never awaited, large": lambda: mock.patch.object(HostCopy, "__init__", never_awaited),
    "event before the copy, large": lambda: mock.patch.object(HostCopy, "__init__", event_before_the_copy),
    "mask in attention": lambda: mock.patch.object(SdpaAttention, "_attend", mask_in_attention),
    "large copy": lambda: mock.patch.object(SdpaAttention, "forward", large_copy),
    "floats added up, deterministic": lambda: mock.patch.object(SdpaAttention, "forward", floats_added_up),
    "norm on the CPU, generating": lambda: mock.patch.object(specs, "norm_class", norm_on_the_cpu),
}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    with PATCHES[fault]():
        yield
