"""The table of metrics is the docs' table, and no model makes it long."""

from pathlib import Path

from gpt4moe.moe.statistics import layer_groups
from gpt4moe.runlog.metrics import Parts
from gpt4moe.runlog.metrics_table import METRICS, markdown, renew

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()


def test_the_docs_hold_the_table_as_it_is() -> None:
    assert markdown() in PAGE, "python -m gpt4moe.runlog.metrics_table --write renews it"


def test_a_stale_table_is_renewed_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "metrics.md"
    page.write_text(PAGE.replace(markdown(), "\n".join(markdown().splitlines()[:4])))
    renew(page)
    assert page.read_text() == PAGE


def test_every_metric_says_what_it_means() -> None:
    assert all(len(metric.meaning) > 10 for metric in METRICS.values())


def test_120_layers_and_ten_sources_make_fewer_than_100_keys() -> None:
    per_layer = sum(metric.parts is Parts.layers for metric in METRICS.values())
    per_source = sum(metric.parts is Parts.sources for metric in METRICS.values())
    assert len(METRICS) + per_layer * len(layer_groups(list(range(120)))) + 10 * per_source < 100
