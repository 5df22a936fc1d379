"""Which GPU a rank takes, and what is told CUDA and NCCL before they start. Needs no GPU."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.errors import ConfigError, LaunchError
from gpt4moe.parallel.determinism import DETERMINISTIC_VARIABLES, set_deterministic_variables
from gpt4moe.parallel.environment import CUDA_VARIABLES, Environment
from gpt4moe.parallel.groups import ProcessGroups, _gpu_index, refuse_shared_gpus, world
from gpt4moe.parallel.layout import Layout
from tests.spawn import run_ranks


def _place(local_rank: int, source: str, ranks_on_node: int | None = None, world_size: int = 8) -> Environment:
    return Environment(
        rank=local_rank, world_size=world_size, local_rank=local_rank, source=source, ranks_on_node=ranks_on_node,
        master=None if world_size == 1 else ("127.0.0.1", 1),
    )  # fmt: skip


def test_a_rank_takes_the_gpu_of_its_place_on_the_node() -> None:
    assert [_gpu_index(_place(rank, "torchrun", 4), 4) for rank in range(4)] == [0, 1, 2, 3]


def test_a_task_that_sees_one_gpu_takes_it() -> None:
    assert [_gpu_index(_place(rank, "srun"), 1) for rank in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize("local_rank", [0, 1])
def test_more_torchrun_ranks_than_gpus_are_refused_by_every_rank(local_rank: int) -> None:
    with pytest.raises(LaunchError, match="2 ranks on a node that has 1 GPU"):
        _gpu_index(_place(local_rank, "torchrun", 2), 1)


def test_a_launcher_that_gives_no_local_rank_is_refused_where_a_node_has_several_gpus() -> None:
    mpirun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with pytest.raises(LaunchError, match="LOCAL_RANK is not") as refused:
        _gpu_index(Environment.detect(mpirun), 8)
    assert "OMPI_COMM_WORLD_LOCAL_RANK" in refused.value.cure
    assert _gpu_index(Environment.detect(mpirun), 1) == 0
    assert _gpu_index(Environment.detect({**mpirun, "LOCAL_RANK": "1"}), 8) == 1


@pytest.mark.parametrize(("gpus", "refusing"), [("abcd", 0), ("abca", 4)])
def test_two_ranks_on_one_gpu_are_refused_by_every_rank(gpus: str, refusing: int) -> None:
    store = distributed.HashStore()
    store.set_timeout(timedelta(seconds=20))

    def refusal(rank: int) -> str | None:
        try:
            refuse_shared_gpus(store, _place(rank, "srun", world_size=4), gpus[rank])
        except LaunchError as error:
            return error.cause
        return None

    with ThreadPoolExecutor(4) as ranks:
        causes = [cause for cause in ranks.map(refusal, range(4)) if cause]
    assert len(causes) == refusing
    assert all("(GPU a)" in cause for cause in causes)


class _Stopped(Exception):
    """Ends `world` at the call that a test looks at."""


def _stop(*_: Any) -> Any:
    raise _Stopped


THE_USERS = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}


@pytest.mark.parametrize("given", [{}, THE_USERS])
def test_cuda_variables_are_set_before_the_first_call_of_cuda_and_keep_the_users_values(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*CUDA_VARIABLES, "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        del os.environ[name]
    os.environ.update(given)
    monkeypatch.setattr(torch.cuda, "is_available", _stop)
    with pytest.raises(_Stopped), world(_place(0, "test", world_size=1)):
        pass
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == given.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert os.environ.get("PYTORCH_ALLOC_CONF") == (None if given else "expandable_segments:True")


def _start_on_a_gpu(monkeypatch: pytest.MonkeyPatch, **asked: Any) -> dict[str, Any]:
    """What init_process_group is told on rank 2 of a node with 4 GPUs, and `chosen`: the GPUs that were set."""
    told: dict[str, Any] = {"chosen": []}

    def start(backend: str, **arguments: Any) -> None:
        told.update(arguments, backend=backend)
        raise _Stopped

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", told["chosen"].append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    monkeypatch.setattr(distributed, "init_process_group", start)
    with pytest.raises(_Stopped), world(_place(2, "srun", world_size=1), **asked):
        pass
    return told


def test_nccl_is_told_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told = _start_on_a_gpu(monkeypatch)
    assert told["backend"] == "nccl"
    assert told["chosen"] == [told["device_id"]] == [torch.device("cuda", 2)]


@pytest.fixture
def no_deterministic_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in DETERMINISTIC_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        del os.environ[name]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_a_deterministic_run_sets_torch_cublas_and_nccl_before_the_gpu_is_used(
    no_deterministic_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _start_on_a_gpu(monkeypatch)
    assert not torch.are_deterministic_algorithms_enabled() and "NCCL_ALGO" not in os.environ
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"  # the user's, which serves too
    _start_on_a_gpu(monkeypatch, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    expected = {name: serving[0] for name, serving in DETERMINISTIC_VARIABLES.items()}
    expected["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    assert {name: os.environ[name] for name in expected} == expected


def test_nccl_s_names_may_be_written_small() -> None:
    set_deterministic_variables({"NCCL_ALGO": "ring", "NCCL_PROTO": "SIMPLE"})


def test_a_variable_that_is_set_against_a_deterministic_run_is_refused(
    no_deterministic_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with (
        pytest.raises(ConfigError, match="NCCL_ALGO=Tree is set, but"),
        world(_place(0, "srun", world_size=1), deterministic=True),
    ):
        pass


def test_on_cpus_a_deterministic_run_sets_nothing(no_deterministic_variables: None) -> None:
    here = Environment(rank=0, world_size=1, local_rank=0, source="test", master=None)
    with world(here, deterministic=True) as device:
        assert device.type == "cpu" and not torch.are_deterministic_algorithms_enabled()
    assert not set(DETERMINISTIC_VARIABLES) & set(os.environ)


def _threads_of_layouts(environment: Environment) -> list[int]:
    """Threads of this rank after each of three layouts in one world."""
    found = []
    with world(environment) as device:
        for degrees in ({"tp": 2}, {"pp": 2}, {"tp": 2}):
            groups = ProcessGroups.create(
                Layout.from_config(ParallelConfig(**degrees), 2), environment.rank, device, seed=1
            )
            distributed.barrier(groups.model)
            found.append(len(os.listdir("/proc/self/task")))
    return found


def test_another_layout_in_the_same_world_leaves_no_groups_of_the_one_before() -> None:
    for first, _, again in run_ranks(2, _threads_of_layouts):
        assert again <= first
