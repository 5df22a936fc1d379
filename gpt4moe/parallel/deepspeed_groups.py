"""Embassy to DeepSpeed: its communication layer, which its expert-parallel parts call, and its tables of groups."""

import importlib
import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import distributed

if TYPE_CHECKING:
    from gpt4moe.parallel.groups import ProcessGroups


def start(backend: str) -> None:
    """Puts deepspeed.comm over the torch.distributed world that is already up. Backend: "gloo" or "nccl"."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # On CPU DeepSpeed would compile a C++ all-reduce at start (1-2 minutes, a lock between jobs); gloo does the work.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # after the import, which sets its own level
    deepspeed.init_distributed(backend, verbose=False)


def expert_group_name(groups: "ProcessGroups") -> str:
    """What DeepSpeed's tables call our expert groups; expert parameters carry it as `group_name`."""
    return f"ep_size_{groups.layout.ep}"


def lend(groups: "ProcessGroups") -> "ParallelUnit":
    """Puts our expert groups into DeepSpeed's tables; returns the `mpu` for DeepSpeed's engine. No collective."""
    from deepspeed.utils import groups as tables

    name = expert_group_name(groups)
    for table, group in (
        (tables._EXPERT_PARALLEL_GROUP, groups.ep),
        (tables._EXPERT_DATA_PARALLEL_GROUP, groups.expert_dp),
    ):
        table.clear()
        table[name] = group
    os.environ.setdefault("LOCAL_RANK", "0")  # its engine insists; the device it is told by argument
    return ParallelUnit(groups)


class ParallelUnit:
    """The `mpu` that DeepSpeed asks for groups: data parallel is dp x cp, model parallel is tp x pp."""

    def __init__(self, groups: "ProcessGroups"):
        self._groups = groups

    def get_data_parallel_group(self) -> distributed.ProcessGroup:
        return self._groups.dp_cp

    def get_data_parallel_world_size(self) -> int:
        return self._groups.dp_cp.size()

    def get_data_parallel_rank(self) -> int:
        return self._groups.dp_cp.rank()

    def get_model_parallel_group(self) -> distributed.ProcessGroup:
        return self._groups.model

    def get_model_parallel_world_size(self) -> int:
        return self._groups.model.size()

    def get_model_parallel_rank(self) -> int:
        return self._groups.model.rank()
