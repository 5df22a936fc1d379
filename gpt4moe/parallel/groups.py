"""ProcessGroups: the process groups of one rank, made once from a Layout and passed as an argument."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import inf
from typing import Any

import torch
from torch import distributed

from gpt4moe.errors import Gpt4MoeError, LaunchError
from gpt4moe.parallel.determinism import set_deterministic_variables, use_deterministic_kernels
from gpt4moe.parallel.environment import Environment, set_cuda_variables
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.rendezvous import store_at

# Longer than the slowest first step. Training has a key of its own: resilience.collective_timeout_minutes.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessGroups:
    """Every group this rank belongs to. `megatron` is the same set as Megatron's own collection."""

    layout: Layout
    rank: int
    device: torch.device
    tp: distributed.ProcessGroup
    cp: distributed.ProcessGroup
    dp: distributed.ProcessGroup
    pp: distributed.ProcessGroup
    ep: distributed.ProcessGroup
    etp: distributed.ProcessGroup
    expert_dp: distributed.ProcessGroup
    dp_cp: distributed.ProcessGroup
    tp_cp: distributed.ProcessGroup
    model: distributed.ProcessGroup
    megatron: Any

    @property
    def coordinate(self) -> dict[str, int]:
        return self.layout.coordinate(self.rank)

    @property
    def by_name(self) -> dict[str, distributed.ProcessGroup]:
        names = ("tp", "cp", "dp", "pp", "ep", "etp", "expert_dp", "dp_cp", "tp_cp", "model")
        return {name: getattr(self, name) for name in names}

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0, which writes logs, manifests and the run folder."""
        return self.rank == 0

    @classmethod
    def create(
        cls, layout: Layout, rank: int, device: torch.device, seed: int, *, timeout: timedelta = TIMEOUT
    ) -> "ProcessGroups":
        """The groups of `layout`. torch.distributed must be initialised (`world` does it). Collective.

        Args:
            timeout: of a collective in any of them.
        """
        from gpt4moe.parallel import megatron_state

        groups = megatron_state.start(layout, seed, timeout)
        for name, group in groups.items():
            if name != "megatron":  # Megatron and Layout must order ranks alike
                members = distributed.get_process_group_ranks(group)
                assert members == layout.members(name, rank), (name, members, layout.members(name, rank))
        return cls(layout=layout, rank=rank, device=device, **groups)


@contextmanager
def world(
    environment: Environment,
    *,
    store: distributed.Store | None = None,
    timeout: timedelta = TIMEOUT,
    patience_seconds: float = inf,
    deterministic: bool = False,
) -> Iterator[torch.device]:
    """Initialises torch.distributed, DeepSpeed's communication and, without a GPU, cpu_device. Yields the device.

    Args:
        store: the store by which the ranks find each other; by default one at the environment's address.
        timeout: of a collective.
        patience_seconds: how long ranks wait for others to come; at most the timeout.
        deterministic: on GPUs, what parallel.determinism does; without meaning on CPUs.
    Raises: ConfigError for an environment variable that is set against it; LaunchError for ranks without a GPU of
        their own, or for ranks that did not come.
    """
    from gpt4moe.parallel import cpu_device, deepspeed_groups

    set_cuda_variables()  # before the first call of CUDA, which is the next line
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", _gpu_index(environment, torch.cuda.device_count())), "nccl"
        if deterministic:
            set_deterministic_variables()
            use_deterministic_kernels()
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        cpu_device.install()
    place: dict[str, Any] = {"rank": environment.rank, "world_size": environment.world_size, "timeout": timeout}
    if store is None and environment.master is None:
        store = distributed.HashStore()
    elif store is None:
        store = store_at(environment, timeout, min(patience_seconds, timeout.total_seconds()))
    if backend == "nccl":
        refuse_shared_gpus(store, environment, str(torch.cuda.get_device_properties(device).uuid))
        # Communicators are made now and on this GPU. Otherwise the first collective of each group makes its own, and a
        # barrier guesses the GPU from the rank.
        place["device_id"] = device
    distributed.init_process_group(backend, store=store, **place)
    try:
        deepspeed_groups.start(backend)
        yield device
    except Gpt4MoeError as error:
        error.have_met = True
        raise
    finally:
        if distributed.is_initialized():
            from gpt4moe.parallel import megatron_state

            megatron_state.stop()
            distributed.destroy_process_group()


def refuse_shared_gpus(store: distributed.Store, environment: Environment, gpu: str) -> None:
    """NCCL refuses two ranks on one GPU, in words that name neither rank nor cure. Collective over the store.

    Args:
        gpu: what identifies this rank's GPU in the world, its UUID.
    Raises: LaunchError on every rank when any two have the same GPU.
    """
    if store.add(f"gpu/{gpu}", 1) > 1:
        store.set("gpu/shared", f"rank {environment.rank} on {os.uname().nodename} (GPU {gpu})")
    if store.add("gpu/counted", 1) == environment.world_size:
        store.set("gpu/all counted", "")
    store.wait(["gpu/all counted"])
    if store.check(["gpu/shared"]):
        raise LaunchError(
            f"Two ranks have one GPU: {store.get('gpu/shared').decode()} has that of another rank.",
            "Start one rank for each GPU of a node (sbatch --ntasks-per-node, torchrun --nproc-per-node), or hide the "
            "GPUs to train on CPUs: CUDA_VISIBLE_DEVICES= .",
        )


def _gpu_index(environment: Environment, num_gpus: int) -> int:
    """The index of this rank's GPU among those it sees. srun may bind one GPU to each task, which then sees only that.

    Raises: LaunchError when torchrun started more ranks on a node than it has GPUs, or the launcher did not say which
        rank of the node this is.
    """
    if not environment.has_local_rank and environment.world_size > 1 and num_gpus > 1:
        raise LaunchError(
            f"RANK and WORLD_SIZE are set but LOCAL_RANK is not: its ranks on a node would take GPU 0 of {num_gpus}.",
            "Set LOCAL_RANK to the number of the rank on its node (Open MPI has it in OMPI_COMM_WORLD_LOCAL_RANK), or "
            "start through torchrun or srun.",
        )
    if environment.source == "torchrun" and (environment.ranks_on_node or 1) > num_gpus:  # every rank comes to this
        raise LaunchError(
            f"{environment.ranks_on_node} ranks on a node that has {num_gpus} GPU{'s' * (num_gpus > 1)}.",
            f"Start at most {num_gpus} ranks a node, or hide the GPUs to train on CPUs: CUDA_VISIBLE_DEVICES= .",
        )
    return environment.local_rank % num_gpus
