"""The only file that calls DeepSpeed's communication layer and writes its tables of groups."""

import importlib
import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import distributed

if TYPE_CHECKING:
    from gpt4moe.parallel.groups import ProcessGroups


def start(backend: str) -> None:
    """Initialises deepspeed.comm on torch.distributed, which is initialised already. Backend: "gloo" or "nccl"."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # On a CPU DeepSpeed would first compile a C++ all-reduce: 1-2 minutes, and a lock between jobs. gloo replaces it.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # after the import, which sets its own level
    deepspeed.init_distributed(backend, verbose=False)


def expert_group_name(groups: "ProcessGroups") -> str:
    """The name of our expert groups in DeepSpeed's tables; an expert's parameter has it as `group_name`."""
    return f"ep_size_{groups.layout.ep}"


def lend(groups: "ProcessGroups") -> "ParallelUnit":
    """Writes our expert groups into DeepSpeed's tables. Returns the `mpu` for DeepSpeed's engine. No collective."""
    from deepspeed.utils import groups as tables

    name = expert_group_name(groups)
    for table, group in (
        (tables._EXPERT_PARALLEL_GROUP, groups.ep),
        (tables._EXPERT_DATA_PARALLEL_GROUP, groups.expert_dp),
    ):
        table.clear()
        table[name] = group
    os.environ.setdefault("LOCAL_RANK", "0")  # its engine requires it; the device is an argument
    return ParallelUnit(groups)


class ParallelUnit:
    """The `mpu` from which DeepSpeed reads groups. Data parallel is dp x cp, model parallel is tp x pp."""

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
