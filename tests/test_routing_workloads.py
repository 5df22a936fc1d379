"""Workloads of benchmarks/routing.py: tables that no layout changes, each with the imbalance of its name."""

import pytest
import torch

from benchmarks.routing_workloads import BALANCED, SOURCES, WORKLOADS, Routed, Sizes, replayed, routed

SIZES = Sizes(num_tokens=512, num_experts=16, top_k=2)
EVEN = SIZES.num_tokens * SIZES.top_k / SIZES.num_experts


def load(name: str, step: int = 0, seed: int = 1) -> torch.Tensor:
    """[E], rows of each expert."""
    return torch.tensor(routed(name, SIZES, seed=seed, step=step).counts(SIZES.num_experts, 1)[0])


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize(
    "sizes", [SIZES, Sizes(num_tokens=96, num_experts=6, top_k=4), Sizes(num_tokens=8, num_experts=2, top_k=1)]
)
def test_a_workload_is_one_table_that_layouts_cut(name: str, sizes: Sizes) -> None:
    for step in (0, 3):
        whole, again = (routed(name, sizes, seed=7, step=step) for _ in range(2))
        assert torch.equal(whole.expert_TK, again.expert_TK) and torch.equal(whole.real_T, again.real_T)
        chosen = whole.expert_TK.sort(dim=1).values
        assert (chosen.diff(dim=1) > 0).all() and chosen.min() >= 0 and chosen.max() < sizes.num_experts
        for ranks in (1, 2, 4):
            parts = [whole.part(rank, ranks) for rank in range(ranks)]
            assert torch.equal(torch.cat([part.expert_TK for part in parts]), whole.expert_TK)
            counts = torch.tensor(whole.counts(sizes.num_experts, ranks))
            assert counts.sum(dim=1).tolist() == [int(part.real_T.sum()) * sizes.top_k for part in parts]
            assert counts.sum(dim=0).tolist() == whole.counts(sizes.num_experts, 1)[0]


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != BALANCED])
def test_seed_and_step_decide_and_more_tokens_change_none(name: str) -> None:
    table = routed(name, SIZES, seed=1, step=0).expert_TK
    assert not torch.equal(table, routed(name, SIZES, seed=2, step=0).expert_TK)
    assert not torch.equal(table, routed(name, SIZES, seed=1, step=1).expert_TK)
    more = routed(name, Sizes(num_tokens=1024, num_experts=16, top_k=2), seed=1, step=0).expert_TK
    assert torch.equal(more[: SIZES.num_tokens], table)


def test_each_workload_has_the_imbalance_of_its_name() -> None:
    assert load(BALANCED).tolist() == [EVEN] * 16
    heat = {name: load(name).sort(descending=True).values[:4].sum() / load(name).sum() for name in WORKLOADS}
    # Three of four tokens go to the four hot experts, the fourth goes there by chance a quarter of the times.
    for name in ("W1_hot_expert_set", "W2_hot_rank", "W3_spread_hot_experts", "W6_rotating_hotspot"):
        assert heat[name] == pytest.approx(0.75 + 0.25 * 0.25, abs=0.03), name
    of_rank = {name: load(name).view(4, 4).sum(dim=1) for name in WORKLOADS}
    assert of_rank["W2_hot_rank"].argmax() == 0 and of_rank["W2_hot_rank"].max() > 3 * 4 * EVEN
    assert of_rank["W3_spread_hot_experts"].max() < 1.1 * 4 * EVEN
    assert (load("W5_zero_expert_rank")[:8] == 0).all() and (load("W5_zero_expert_rank")[8:] > 0).all()


def test_sources_are_ragged_where_destinations_are_even() -> None:
    made = routed("W4_source_ragged", SIZES, seed=1, step=0)
    block = SIZES.num_tokens // SOURCES
    assert [int(part.sum()) for part in made.real_T.chunk(SOURCES)] == [block * (b + 1) // SOURCES for b in range(8)]
    assert load("W4_source_ragged").max() < 1.5 * load("W4_source_ragged").float().mean()


def test_a_hotspot_moves_every_third_step_and_a_burst_comes_every_fourth() -> None:
    hot = [load("W6_rotating_hotspot", step).view(4, 4).sum(dim=1).argmax().item() for step in range(12)]
    assert hot == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    burst = [bool(load("W7_burst", step)[:4].sum() > 1.5 * 4 * EVEN) for step in range(8)]
    assert burst == [False, False, False, True] * 2


def test_a_replay_has_the_recorded_counts_of_every_source() -> None:
    counts = [[5, 0, 2, 3], [4, 4, 4, 0]]
    made: Routed = replayed(counts, 2)
    assert torch.bincount(made.expert_TK[:5].flatten(), minlength=4).tolist() == counts[0]
    assert torch.bincount(made.expert_TK[5:].flatten(), minlength=4).tolist() == counts[1]
    assert (made.expert_TK[:, 0] != made.expert_TK[:, 1]).all()


@pytest.mark.parametrize("row", [[6, 2, 2], [3, 2, 2], [5, -1, 4]])
def test_counts_that_no_routing_has_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="source 1"):
        replayed([[2, 1, 1], row], 2)


def test_fewer_experts_than_a_token_needs_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k 3 of 2 experts"):
        routed(BALANCED, Sizes(num_tokens=8, num_experts=2, top_k=3), seed=1, step=0)
