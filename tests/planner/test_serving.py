"""Inference: the cache, uneven stages, and that load decides what a token costs."""

import pytest

from gpt4moe.architecture.count import count_parameters
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.plan import PlanConfig
from gpt4moe.planner.serving import ServedModel, ServingLayout, cache_bytes, most_sequences, serve, with_query_groups
from tests.planner.timed import plan_of


def served_of(plan: PlanConfig, groups: int | None = None) -> ServedModel:
    model = with_query_groups(plan.model, groups) if groups else plan.model
    return ServedModel(model=model, cluster=plan.cluster)


def kept_of_a_token(model: ModelConfig) -> float:
    return cache_bytes(model, 1)


def test_a_multi_head_cache_of_8192_tokens_takes_42_gb_over_the_cluster() -> None:
    model = plan_of("+experiment=gpt4").model
    assert kept_of_a_token(model) == pytest.approx(5.16e6, rel=1e-3)
    assert kept_of_a_token(model) * 8192 == pytest.approx(42.3e9, rel=1e-3)
    assert kept_of_a_token(with_query_groups(model, 8)) * 12 == kept_of_a_token(model)
    assert kept_of_a_token(with_query_groups(model, 1)) * 96 == kept_of_a_token(model)


def test_the_128_devices_hold_the_weights_with_uneven_stages() -> None:
    plan = plan_of("+experiment=gpt4")
    served = serve(served_of(plan), ServingLayout(tp=8, pp=16), sequences=16, context=8192)
    assert served.devices == 128
    mean = 2 * count_parameters(plan.model).total / 128
    assert mean == pytest.approx(28.6e9, rel=1e-2)
    assert served.weight_bytes == pytest.approx(mean * 8 / 7.5, rel=0.02)  # eight of 16 stages have 8 layers, not 7.5


def test_one_sequence_alone_waits_for_its_share_of_weights_to_be_read() -> None:
    plan = plan_of("model=davinci_175b", "cluster=a100_80g")
    served = serve(served_of(plan), ServingLayout(tp=8, pp=1), sequences=1, context=1)
    floor = 2 * count_parameters(plan.model).total / 8 / plan.cluster.memory_bytes_per_second
    assert floor < served.latency_seconds < 1.6 * floor


def test_a_fuller_cluster_makes_a_token_cheaper_until_products_bind() -> None:
    plan = plan_of("model=davinci_175b", "cluster=a100_80g")
    costs = [
        serve(served_of(plan), ServingLayout(tp=8, pp=1), sequences=n, context=1).usd_per_1000_tokens(plan.cluster)
        for n in (1, 8, 64, 4096, 8192)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 7 * costs[1] and costs[3] < 1.2 * costs[4]
    half = serve(served_of(plan), ServingLayout(tp=8, pp=1), sequences=1, context=1).usd_per_1000_tokens(
        plan.cluster, 0.5
    )
    assert half == pytest.approx(2 * costs[0])


def test_fewer_groups_leave_room_for_more_sequences() -> None:
    plan = plan_of("+experiment=gpt4")
    rooms = [most_sequences(served_of(plan, groups), ServingLayout(tp=8, pp=16), context=8192) for groups in (96, 8)]
    assert rooms[1] > 11 * rooms[0] > 0


@pytest.mark.parametrize(("name", "published"), [("deepseek_v3", 70_272), ("llama3_405b", 516_096)])
def test_caches_of_published_models_are_as_published(name: str, published: int) -> None:
    """arXiv:2505.09343, table 1: bytes of a token in bf16, DeepSeek-V3's latent against grouped queries."""
    assert kept_of_a_token(plan_of(f"model={name}").model) == published


def test_a_latent_is_whole_on_every_rank_and_grouped_keys_are_cut() -> None:
    for name, cut in (("deepseek_v3", 1), ("llama3_405b", 8)):
        plan = plan_of(f"model={name}", "cluster=h200_141g")
        served = serve(served_of(plan), ServingLayout(tp=8, pp=1), sequences=3, context=1000)
        assert served.cache_bytes == pytest.approx(3 * 1000 * kept_of_a_token(plan.model) / cut)


def test_a_layer_with_a_window_keeps_and_reads_no_more_than_it() -> None:
    """gpt-oss: every second layer sees 128 tokens."""
    plan = plan_of("model=gpt_oss_120b", "cluster=h100_80g")
    a_token = 36 * 2 * 8 * 64 * 2
    assert cache_bytes(plan.model, 128) == 128 * a_token
    assert cache_bytes(plan.model, 8192) == (8192 + 128) / 2 * a_token
    rooms, seconds = [], []
    for window in (128, None):
        assert plan.model.planned is not None
        plan.model.planned.sliding_window = window
        rooms.append(most_sequences(served_of(plan), ServingLayout(tp=2, pp=1), context=8192))
        served = serve(served_of(plan), ServingLayout(tp=2, pp=1), sequences=64, context=8192)
        seconds.append(served.latency_seconds)
    assert rooms[0] == pytest.approx(2 * rooms[1], rel=0.02)
    assert seconds[0] < seconds[1]
