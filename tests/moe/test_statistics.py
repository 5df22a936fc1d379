"""Columns of the routing table by name, and groups of layers; tests/training/test_step_metrics.py has the metrics."""

import pytest
import torch

from gpt4moe.moe.statistics import COLUMNS, column, layer_groups, row_width, to_means, tokens_of_experts

E = 3


def test_a_column_is_a_view_of_its_own_place_behind_the_experts() -> None:
    table = torch.zeros(2, row_width(E), dtype=torch.float64)
    tokens_of_experts(table).fill_(1)
    for number, name in enumerate(COLUMNS, start=2):
        column(table, name).fill_(number)
    assert table[0].tolist() == [1, 1, 1, 2, 3, 4, 5, 6]


def test_losses_alone_become_means_over_micro_batches() -> None:
    table = torch.ones(2, row_width(E), dtype=torch.float64)
    to_means(table, 4)
    assert {name: column(table, name).tolist() for name in COLUMNS if column(table, name)[0] != 1} == {
        "load_balancing_loss": [0.25, 0.25], "z_loss": [0.25, 0.25],
    }  # fmt: skip
    assert tokens_of_experts(table).eq(1).all()


@pytest.mark.parametrize("num_layers", [1, 2, 8, 9, 61, 120])
def test_layer_groups_hold_every_layer_once_and_are_few(num_layers: int) -> None:
    layers = list(range(3, 3 + num_layers))
    groups = layer_groups(layers)
    assert len(groups) == min(8, num_layers)
    assert [place for places in groups.values() for place in places] == list(range(num_layers))
    sizes = {len(places) for places in groups.values()}
    assert max(sizes) - min(sizes) <= 1
    assert list(groups) == sorted(groups), "curves must stand in the order of layers"


def test_a_group_is_named_by_its_global_layers() -> None:
    assert list(layer_groups([1, 3])) == ["layer_1", "layer_3"]
    names = list(layer_groups(list(range(120))))
    assert (names[0], names[-1]) == ("layers_000_014", "layers_105_119")
