"""The planner's page and a run held against its plan."""

import json
import re
from pathlib import Path

import pytest
import yaml

from gpt4moe.config.load import config_to_dict, load_run_config
from gpt4moe.config.plan import PlanOutput
from gpt4moe.errors import ConfigError, DataError
from gpt4moe.pages.plan_answer import plan_answer
from gpt4moe.pages.plan_page import stacked_bars
from gpt4moe.planner.estimate import estimate
from tests.planner.timed import plan_of


def test_the_page_holds_every_stage_every_part_and_asks_for_nothing(tmp_path: Path) -> None:
    plan = plan_of("+experiment=gpt4")
    plan.output, plan.file = PlanOutput.html, str(tmp_path / "plan.html")
    assert plan_answer(plan) == f"{tmp_path / 'plan.html'}\n"
    page = (tmp_path / "plan.html").read_text()
    assert not re.search(r"(src|href)=|<script|url\(", page)
    assert page.count("activations: ") == 15
    for words in ('class="gantt"', "step, bubble", "a device has 84.98 GB", "USD"):
        assert words in page, words


@pytest.mark.parametrize(
    "words",
    [("cluster.devices=4", "precision=fp32"), ("report=inference", "inference.tp=1", "inference.pp=1")],
    ids=str,
)
def test_hostile_names_stay_text(words: tuple[str, ...], tmp_path: Path) -> None:
    plan = plan_of("+experiment=tiny", *words)
    plan.model.name = plan.cluster.name = "</title></script><script>x</script><b>"
    plan.output, plan.file = PlanOutput.html, str(tmp_path / "plan.html")
    plan_answer(plan)
    page = (tmp_path / "plan.html").read_text()
    assert "&lt;script&gt;x&lt;/script&gt;&lt;b&gt;" in page and "<script>x" not in page and "<b>" not in page


def test_a_page_that_cannot_be_written_is_refused_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("no folder")
    plan = plan_of("model=mixtral_8x7b", "cluster=h100_80g", "gpus=8", "parallel.ep=8")
    plan.output, plan.file = PlanOutput.html, str(tmp_path / "a" / "plan.html")
    with pytest.raises(ConfigError, match=r"^file=.*plan.html cannot be written: ") as caught:
        plan_answer(plan)
    assert "where you may write" in caught.value.cure


def test_bars_are_as_long_as_their_values() -> None:
    drawn = stacked_bars({"a": {"x": 1.0, "y": 3.0}, "b": {"x": 2.0, "y": 0.0}}, unit="GB", limit=5.0)
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="18"', drawn)]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.2)


def run_folder(folder: Path, seconds: float) -> None:
    run = load_run_config(["+experiment=tiny", "run.name=x", "parallel.tp=2"])
    (folder / "starts").mkdir()
    (folder / "starts" / "001.yaml").write_text(yaml.safe_dump({"ranks": 4, "config": config_to_dict(run)}))
    slow_first = [{"step": n, "step_seconds": 50.0 if n < 3 else seconds, "mfu": 0.1} for n in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in slow_first))


def test_a_run_is_compared_with_the_plan_of_its_own_layout(tmp_path: Path) -> None:
    planned = estimate(plan_of("+experiment=tiny", "precision=fp32", "data=mock", "parallel.tp=2", "cluster.devices=4"))
    run_folder(tmp_path, 2 * planned.step.seconds)
    plan = plan_of("cluster=cpu")
    plan.calibrate, plan.output = str(tmp_path), PlanOutput.json
    answer = plan_answer(plan)
    assert isinstance(answer, dict) and set(answer) == {"step", "throughput", "MFU", "advice"}
    for name, factor in (("step", 2), ("throughput", 0.5), ("MFU", 0.5)):
        assert answer[name]["measured"] / answer[name]["predicted"] == pytest.approx(factor)  # type: ignore[index]
    plan.output = PlanOutput.table
    table = plan_answer(plan)
    assert isinstance(table, list) and "2 times the planned time" in str(table[1])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    plan = plan_of("cluster=cpu")
    plan.calibrate = str(tmp_path)
    with pytest.raises(DataError, match="no run folder"):
        plan_answer(plan)
