"""Ranks of any world on the meta device, in a rank of tests/spawn.py: shapes without memory, groups without peers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt4moe.config.run import RunConfig
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel import cpu_device, megatron_state
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.layout import Layout


@contextmanager
def built(run: RunConfig, world_size: int, rank: int) -> Iterator[tuple[list[Any], ProcessGroups]]:
    """The chunks and groups of one rank."""
    cpu_device.install()
    layout = Layout.from_config(run.parallel, world_size)
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        groups = ProcessGroups.create(layout, rank, torch.device("cpu"), seed=1)
        yield build_model(run, groups, meta=True), groups
    finally:
        megatron_state.stop()
        distributed.destroy_process_group()
