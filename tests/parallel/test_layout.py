"""Layout's arithmetic is Megatron's: the same groups, rank for rank."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.parallel.layout import Layout

# Our axis -> (Megatron's grid, Megatron's name of it). "tp-cp-ep-dp-pp" is the order both use.
DENSE = {"tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp", "dp_cp": "dp-cp", "tp_cp": "tp-cp", "model": "tp-pp"}
EXPERT = {"etp": "tp", "ep": "ep", "expert_dp": "dp"}

sizes = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any legal layout of at most 96 ranks: experts over any divisor of a stage."""
    tp, cp, dp, pp = (draw(sizes) for _ in range(4))
    stage = tp * cp * dp
    etp = draw(st.sampled_from([d for d in (1, 2) if stage % d == 0]))
    ep = draw(st.sampled_from([d for d in range(1, stage // etp + 1) if (stage // etp) % d == 0]))
    if stage * pp > 96:
        pp = 1
    return Layout.from_config(ParallelConfig(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp), stage * pp)


@cache
def rank_generator() -> type:
    """Megatron's own, imported once: it takes seconds."""
    from megatron.core.parallel_state import RankGenerator

    return RankGenerator


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_every_group_is_megatrons(layout: Layout) -> None:
    order = "tp-cp-ep-dp-pp"
    dense = rank_generator()(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
    expert = rank_generator()(tp=layout.etp, ep=layout.ep, dp=layout.expert_dp, pp=layout.pp, cp=1, order=order)
    for grid, names in ((dense, DENSE), (expert, EXPERT)):
        for ours, theirs in names.items():
            for group in grid.get_ranks(theirs):
                assert layout.members(ours, group[-1]) == sorted(group), ours


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_a_coordinate_is_the_place_in_its_group(layout: Layout) -> None:
    for rank in range(layout.world_size):
        coordinate = layout.coordinate(rank)
        for axis in ("tp", "cp", "dp", "pp", "etp", "ep", "expert_dp"):
            assert layout.members(axis, rank)[coordinate[axis]] == rank


def test_experts_may_span_tensor_ranks_of_one_stage() -> None:
    layout = Layout.from_config(ParallelConfig(tp=2, pp=2, ep=2), 4)
    assert layout.members("ep", 2) == layout.members("tp", 2) == [2, 3]
    assert layout.members("expert_dp", 2) == [2]


def test_copies_of_an_expert_are_fewer_than_copies_of_the_rest() -> None:
    layout = Layout.from_config(ParallelConfig(tp=8, pp=15, ep=16), 24960)
    assert (layout.dp, layout.stage_size, layout.expert_dp) == (208, 1664, 104)


@pytest.mark.parametrize(
    ("parallel", "world", "text"),
    [
        (ParallelConfig(), 3, "3 ranks = dp 3"),
        (ParallelConfig(tp=2, pp=2, vpp=2, ep=2), 8, "8 ranks = tp 2 x pp 2 x dp 2, vpp 2, ep 2, sequence parallel"),
    ],
)
def test_a_layout_describes_itself_in_one_line(parallel: ParallelConfig, world: int, text: str) -> None:
    assert Layout.from_config(parallel, world).describe() == text
