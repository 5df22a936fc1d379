"""Which GPU a rank takes."""

import pytest

from gpt4moe.errors import LaunchError
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import _gpu_index


def _environment(local_rank: int, source: str, ranks_on_node: int | None = None) -> Environment:
    return Environment(
        rank=local_rank, world_size=8, local_rank=local_rank, master=("127.0.0.1", 1), source=source,
        ranks_on_node=ranks_on_node,
    )  # fmt: skip


def test_a_rank_takes_the_gpu_of_its_place_on_the_node() -> None:
    assert [_gpu_index(_environment(rank, "torchrun", 4), 4) for rank in range(4)] == [0, 1, 2, 3]


def test_a_task_that_sees_one_gpu_takes_it() -> None:
    assert [_gpu_index(_environment(rank, "srun"), 1) for rank in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize("local_rank", [0, 1])
def test_more_torchrun_ranks_than_gpus_are_refused_by_every_rank(local_rank: int) -> None:
    with pytest.raises(LaunchError, match="2 ranks on a node that has 1 GPU"):
        _gpu_index(_environment(local_rank, "torchrun", 2), 1)
