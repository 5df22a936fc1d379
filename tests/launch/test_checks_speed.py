"""What the cluster's figures promise a group, in numbers worked out by hand; who exchanges with whom."""

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.launch.checks_speed import bus_bytes, promised_rate
from gpt4moe.launch.speed import partners


@pytest.mark.parametrize(("operation", "sent"), [("all_reduce", 1.5), ("all_to_all", 0.75), ("send", 1.0)])
def test_bytes_that_each_of_four_ranks_sends(operation: str, sent: float) -> None:
    assert bus_bytes(operation, 1.0, 4) == sent


@pytest.mark.parametrize(
    ("operation", "hosts", "rate"),
    [
        ("all_reduce", ["a"] * 8, 0.8 * 450e9),  # NVLink
        ("all_to_all", ["a"] * 8, 0.6 * 450e9),
        ("all_reduce", ["a", "b", "c"], 0.8 * 50e9),  # a port each
        ("all_reduce", ["a"] * 4 + ["b"] * 4, 0.8 * 200e9),  # four rings through four ports
        ("all_reduce", ["a"] * 16 + ["b"] * 16, 0.8 * 450e9),  # more ports than NVLink feeds
        ("all_to_all", ["a"] * 8 + ["b"] * 8, 0.6 * 50e9 * 15 / 8),  # 8 of 15 messages leave the node
        ("send", ["a", "b"], 0.8 * 50e9),
        ("send", ["a", "a"], 0.8 * 450e9),
    ],
)
def test_a_group_is_promised_its_slowest_link(operation: str, hosts: list[str], rate: float) -> None:
    cluster = load_run_config(["+experiment=tiny", "run.name=x", "cluster=h100_80g"]).cluster
    assert promised_rate(cluster, operation, hosts) == pytest.approx(rate)


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 6])
def test_exchanges_are_mutual_and_every_node_has_a_partner_and_most_have_two(nodes: int) -> None:
    hosts = [f"node{rank // 2}" for rank in range(2 * nodes)]
    found = {rank: partners(hosts, rank) for rank in range(len(hosts))}
    assert {len(rounds) for rounds in found.values()} == {min(2, nodes - 1)}, "every rank walks as many rounds"
    for rank, rounds in found.items():
        met = [other for other in rounds if other is not None]
        assert 1 <= len(met) == len(set(met))
        for number, other in enumerate(rounds):
            if other is not None:
                assert found[other][number] == rank
                assert hosts[other] != hosts[rank] and other % 2 == rank % 2
    assert sum(None not in rounds for rounds in found.values()) >= 2 * (nodes - 2)


def test_one_node_has_no_partner_and_a_rank_too_many_has_none() -> None:
    assert partners(["a", "a"], 0) == []
    assert partners(["a", "a", "b"], 1) == [None]
