"""Inference: the cache, uneven stages, and that load decides what a token costs."""

import pytest

from gpt4moe.planner.inference import cache_bytes_per_token, most_sequences, serve, with_query_groups
from gpt4moe.planner.params import count_parameters
from tests.planner.timed import plan_of


def test_a_multi_head_cache_of_8192_tokens_takes_42_gb_over_the_cluster() -> None:
    model = plan_of("+experiment=gpt4").model
    assert cache_bytes_per_token(model) == pytest.approx(5.16e6, rel=1e-3)
    assert cache_bytes_per_token(model) * 8192 == pytest.approx(42.3e9, rel=1e-3)
    assert cache_bytes_per_token(with_query_groups(model, 8)) * 12 == cache_bytes_per_token(model)
    assert cache_bytes_per_token(with_query_groups(model, 1)) * 96 == cache_bytes_per_token(model)


def test_the_128_devices_hold_the_weights_with_uneven_stages() -> None:
    plan = plan_of("+experiment=gpt4")
    served = serve(plan.model, plan.cluster, tp=8, pp=16, sequences=16, context=8192)
    assert served.devices == 128
    mean = 2 * count_parameters(plan.model).total / 128
    assert mean == pytest.approx(28.6e9, rel=1e-2)
    assert served.weight_bytes == pytest.approx(mean * 8 / 7.5, rel=0.02)  # eight of 16 stages have 8 layers, not 7.5


def test_one_sequence_alone_waits_for_its_share_of_weights_to_be_read() -> None:
    plan = plan_of("model=davinci_175b", "cluster=a100_80g")
    served = serve(plan.model, plan.cluster, tp=8, pp=1, sequences=1, context=1)
    floor = 2 * count_parameters(plan.model).total / 8 / plan.cluster.memory_bytes_per_second
    assert floor < served.latency_seconds < 1.6 * floor


def test_a_fuller_cluster_makes_a_token_cheaper_until_products_bind() -> None:
    plan = plan_of("model=davinci_175b", "cluster=a100_80g")
    costs = [
        serve(plan.model, plan.cluster, tp=8, pp=1, sequences=n, context=1).usd_per_1000_tokens(plan.cluster)
        for n in (1, 8, 64, 4096, 8192)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 7 * costs[1] and costs[3] < 1.2 * costs[4]
    half = serve(plan.model, plan.cluster, tp=8, pp=1, sequences=1, context=1).usd_per_1000_tokens(plan.cluster, 0.5)
    assert half == pytest.approx(2 * costs[0])


def test_fewer_groups_leave_room_for_more_sequences() -> None:
    plan = plan_of("+experiment=gpt4")
    rooms = [
        most_sequences(with_query_groups(plan.model, groups), plan.cluster, tp=8, pp=16, context=8192)
        for groups in (96, 8)
    ]
    assert rooms[1] > 11 * rooms[0] > 0
