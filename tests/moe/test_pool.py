"""Capacity: who gets a slot, and that splitting the pool over ranks changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4moe.config.moe import DropPolicy
from gpt4moe.moe.pool import capacity, kept_assignments
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

EXPERTS = 4
BOTH = pytest.mark.parametrize("policy", list(DropPolicy))


@pytest.mark.parametrize(("factor", "slots"), [(1.0, 16), (1.25, 20), (1.01, 17), (0.5, 8)])
def test_slots_are_the_even_share_times_the_factor_rounded_up(factor: float, slots: int) -> None:
    assert capacity(num_tokens=32, num_experts=4, top_k=2, factor=factor) == slots


def test_overflowing_tokens_are_dropped_in_arrival_order() -> None:
    expert = torch.tensor([[0], [1], [0], [0], [1], [0]])
    probability = torch.tensor([[0.1], [0.5], [0.2], [0.9], [0.6], [0.8]])
    keep = kept_assignments(expert, probability, 2, DropPolicy.position, EXPERTS)
    assert keep.flatten().tolist() == [True, True, True, False, True, False]


def test_the_least_probable_tokens_are_dropped() -> None:
    expert = torch.tensor([[0], [1], [0], [0], [1], [0]])
    probability = torch.tensor([[0.1], [0.5], [0.2], [0.9], [0.6], [0.8]])
    keep = kept_assignments(expert, probability, 2, DropPolicy.probability, EXPERTS)
    assert keep.flatten().tolist() == [False, True, False, True, True, True]


def test_of_equally_probable_tokens_the_earlier_one_stays() -> None:
    keep = kept_assignments(
        torch.zeros(5, 1, dtype=torch.int64), torch.full((5, 1), 0.5), 3, DropPolicy.probability, EXPERTS
    )
    assert keep.flatten().tolist() == [True, True, True, False, False]


@BOTH
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_an_expert_keeps_as_many_as_it_has_slots_and_never_more(policy: DropPolicy, data: st.DataObject) -> None:
    pairs = st.tuples(st.integers(0, EXPERTS - 1), st.integers(0, EXPERTS - 1), st.integers(0, 7), st.integers(0, 7))
    rows = data.draw(st.lists(pairs, max_size=30))
    slots = data.draw(st.integers(0, 12))
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 4)
    expert, probability = table[:, :2].contiguous(), table[:, 2:] / 8  # eighths: many ties
    keep = kept_assignments(expert, probability, slots, policy, EXPERTS)
    asked = torch.bincount(expert.flatten(), minlength=EXPERTS)
    assert torch.equal(torch.bincount(expert[keep], minlength=EXPERTS), asked.clamp_max(slots))


@BOTH
def test_the_same_assignments_are_dropped_when_ranks_share_the_pool(policy: DropPolicy) -> None:
    (whole,) = run_ranks(1, _kept, policy.value)
    halves = run_ranks(2, _kept, policy.value)
    assert halves[0] + halves[1] == whole
    assert 0 < sum(map(sum, whole)) < 2 * len(whole)


def _kept(environment: Environment, policy: str) -> list[list[bool]]:
    from gpt4moe.moe.pool import TokenPool, kept_of_rank
    from tests.moe.case import rank_groups

    generator = torch.Generator().manual_seed(5)
    probability = torch.rand(24, EXPERTS, generator=generator).softmax(dim=-1)
    chance, expert = torch.topk(probability + torch.tensor([0.2, 0.0, 0.0, 0.0]), 2)  # expert 0 overflows
    with rank_groups(environment, tp=environment.world_size) as groups:
        mine = slice(
            24 // environment.world_size * environment.rank, 24 // environment.world_size * (environment.rank + 1)
        )
        return kept_of_rank(
            expert[mine], chance[mine], num_experts=EXPERTS, factor=0.8, policy=DropPolicy(policy),
            pool=TokenPool(groups), batch=2,
        ).tolist()  # fmt: skip
