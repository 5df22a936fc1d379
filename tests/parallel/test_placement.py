"""Every layer and every expert has exactly one place."""

import pytest

from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.parallel.placement import local_experts, rank_chunks, stage_layers


def test_120_layers_over_16_stages_are_eight_of_8_and_eight_of_7() -> None:
    stages = stage_layers(120, ParallelConfig(pp=16))
    assert [len(stage) for stage in stages] == [8] * 8 + [7] * 8


def test_an_embedding_and_a_head_that_count_as_layers_take_the_place_of_one_each() -> None:
    both = ParallelConfig(pp=16, embedding_counts_as_layer=True, head_counts_as_layer=True)
    assert [len(stage) for stage in stage_layers(120, both)] == [7] + [8] * 9 + [7] * 5 + [6]
    head = ParallelConfig(pp=2, vpp=2, head_counts_as_layer=True)
    assert [len(stage) for stage in stage_layers(7, head)] == [2, 2, 2, 1]


@pytest.mark.parametrize(("num_layers", "pp", "vpp"), [(4, 1, 1), (5, 2, 1), (8, 2, 2), (13, 3, 4), (120, 15, 2)])
def test_every_layer_is_in_one_chunk_and_in_order(num_layers: int, pp: int, vpp: int) -> None:
    stages = stage_layers(num_layers, ParallelConfig(pp=pp, vpp=vpp))
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    lengths = [len(stage) for stage in stages]
    assert len(lengths) == pp * vpp
    assert max(lengths) - min(lengths) <= 1


def test_listed_stage_sizes_are_kept() -> None:
    stages = stage_layers(6, ParallelConfig(pp=2, layers_per_stage=[2, 4]))
    assert stages == [[0, 1], [2, 3, 4, 5]]


def test_virtual_stages_go_round_the_pipeline_ranks() -> None:
    parallel = ParallelConfig(pp=2, vpp=2)
    assert rank_chunks(8, parallel, 0) == [[0, 1], [4, 5]]
    assert rank_chunks(8, parallel, 1) == [[2, 3], [6, 7]]


def test_experts_are_contiguous_blocks_that_cover_all() -> None:
    blocks = [local_experts(16, 4, index) for index in range(4)]
    assert blocks[1] == range(4, 8)
    assert [expert for block in blocks for expert in block] == list(range(16))
