"""The table of metrics is the docs' table, and no model makes it long."""

from pathlib import Path

import pytest

from gpt4moe.moe.statistics import layer_groups
from gpt4moe.runlog.metrics import Parts
from gpt4moe.runlog.metrics_table import METRICS, markdown

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()


def test_the_docs_hold_the_table_as_it_is() -> None:
    assert markdown() in PAGE, "python -m gpt4moe.runlog.metrics_table prints the new one"


def test_every_metric_says_what_it_means() -> None:
    assert all(len(metric.meaning) > 10 for metric in METRICS.values())


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


def test_120_layers_and_ten_sources_make_fewer_than_100_keys() -> None:
    per_layer = sum(metric.parts is Parts.layers for metric in METRICS.values())
    per_source = sum(metric.parts is Parts.sources for metric in METRICS.values())
    assert len(METRICS) + per_layer * len(layer_groups(list(range(120)))) + 10 * per_source < 100
