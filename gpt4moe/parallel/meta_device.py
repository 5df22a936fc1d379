"""Megatron without memory: modules, gradient buffers and optimizers of any size on torch's meta device.

It counts what one rank of any world would hold. The process group is fake (torch's FakeStore): its collectives do
nothing. Tensors have shapes and no values. Use a process of its own: it cannot train afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt4moe.parallel import cpu_device, megatron_state
from gpt4moe.parallel.groups import TIMEOUT, ProcessGroups
from gpt4moe.parallel.layout import Layout


def install() -> None:
    """Makes Megatron use the meta device in this process. A second call changes nothing."""
    cpu_device.install()
    if torch.cuda.current_device() == torch.device("meta"):
        return
    torch.cuda.current_device = lambda: torch.device("meta")
    original = torch.Tensor.type
    # Megatron's optimizer accepts only the names of CUDA tensors.
    torch.Tensor.type = lambda self, *args, **kwargs: _without_meta(original(self, *args, **kwargs))


def _without_meta(answer: str | torch.Tensor) -> str | torch.Tensor:
    return answer.replace("meta.", "") if isinstance(answer, str) else answer


@contextmanager
def pretended_rank(layout: Layout, rank: int) -> Iterator[ProcessGroups]:
    """The groups of one rank of a world whose other ranks do not exist."""
    install()
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        groups = megatron_state.start(layout, seed=1, timeout=TIMEOUT)
        yield ProcessGroups(layout=layout, rank=rank, device=torch.device("meta"), **groups)
    finally:
        megatron_state.stop()
        distributed.destroy_process_group()
