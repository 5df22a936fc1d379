"""lm-evaluation-harness on tasks of a local folder: every single answer equals that of its own `hf` model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.verify import open_weights
from gpt4moe.inference.load import open_folder, placed
from gpt4moe.parallel.environment import Environment
from tests.inference.tool import TOOL, generate
from tests.numbered_lines import VOCABULARY, numbered_lines
from tests.spawn import run_ranks
from tests.training.command import metrics, outside, saved_state, train

pytest.importorskip("lm_eval", reason="no lm_eval here")
MODEL = ("model.num_attention_heads=4", "model.num_query_groups=2", "model.init_std=0.3", "data.kind=indexed",
         f"model.vocab_size={VOCABULARY}")  # fmt: skip
TASKS = ("numbers_choices", "numbers_rolling", "numbers_generated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, its export in `hf`, tasks and their data in `tasks`."""
    data = numbered_lines(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    (ended,) = train(folder, *MODEL, f"data.path={data}", "training.steps=1")
    assert ended.status == 0, ended.err
    to_huggingface(folder, folder / "hf", dtype="fp32")
    tasks = folder / "tasks"
    tasks.mkdir()
    for file in (Path(__file__).parent / "tasks").glob("*.yaml"):
        (tasks / file.name).write_text(file.read_text().replace("DATA", str(tasks)))
    lines = {
        "choices": [
            {"prompt": f"word {n} and" if n % 3 else "", "choices": [f" {n * n} other", " 0", f"{n} things"],
             "answer": n % 3} for n in range(12)
        ],
        "rolling": [
            {"text": "".join(f"word {i} and {i * i} other things\n" for i in range(n, 3 * n))} for n in (1, 4, 9)
        ],
        "generated": [{"prompt": f"word {n} and other " * n, "answer": "?"} for n in (1, 2, 9)],
    }  # fmt: skip
    for name, some in lines.items():
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
    return folder


def _offline(folder: Path) -> None:
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / f"cache-{os.getpid()}")}


def _answers(model: Any, folder: Path) -> dict[str, list[Any]]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    return {task: [one["filtered_resps"] for one in sorted(found["samples"][task], key=lambda one: one["doc_id"])]
            for task in TASKS}  # fmt: skip


def _theirs(environment: Environment, folder: Path) -> dict[str, list[Any]]:
    _offline(folder)
    from lm_eval.models.huggingface import HFLM

    return _answers(HFLM(pretrained=str(folder / "hf"), dtype="float32", device="cpu", batch_size=1), folder)


def _ours(environment: Environment, folder: Path, parallel: ParallelConfig) -> dict[str, list[Any]]:
    _offline(folder)
    from gpt4moe.evaluation.harness import HarnessModel

    opened = open_folder(folder, open_weights)
    words = opened.words()
    with placed(opened, parallel=parallel, environment=environment) as model:
        return _answers(HarnessModel(loaded=(model, words)), folder)


def test_every_answer_is_that_of_the_harness_s_own_model_on_the_export(folder: Path) -> None:
    (wanted,) = run_ranks(1, _theirs, folder)
    found = run_ranks(1, _ours, folder, ParallelConfig()) + run_ranks(
        4, _ours, folder, ParallelConfig(tp=2, pp=2, ep=2)
    )
    for rank in found:
        for one, right in zip(rank["numbers_choices"], wanted["numbers_choices"], strict=True):
            assert [pair[0] for pair in one] == pytest.approx([pair[0] for pair in right], abs=1e-4)
            assert [pair[1] for pair in one] == [pair[1] for pair in right]
        assert [one[0] for one in rank["numbers_rolling"]] == pytest.approx(
            [one[0] for one in wanted["numbers_rolling"]], rel=1e-5
        )
        assert rank["numbers_generated"] == wanted["numbers_generated"]
    assert len({str(one) for one in wanted["numbers_generated"]}) == 3
    assert [len(wanted[task]) for task in TASKS] == [12, 3, 3]


def test_the_tool_prints_the_tasks_metrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tool, mine = TOOL.with_name("evaluate.py"), ("--include-path", folder / "tasks", "--limit", 4, "--json")
    (ended,) = generate(folder, "--tasks", TASKS[0], *mine, tool=tool)
    assert ended.status == 0, ended.err
    values = json.loads(ended.out)["tasks"][TASKS[0]]
    assert 0 <= values["acc,none"] <= 1 and values["sample_len"] == 4
    (wrong,) = generate(folder, "--tasks", "no_such_task", *mine, tool=tool)
    assert wrong.status == 2 and "error: lm-evaluation-harness has no task 'no_such_task'." in wrong.err


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [("folder=nowhere", "nowhere is no folder with weights"), ("folder=RUN,tp=3", "does not divide")],
)
def test_the_harness_s_own_command_tells_a_bad_folder_or_layout_in_two_lines(
    arguments: str, cause: str, folder: Path
) -> None:
    given = (
        "--model_args",
        arguments.replace("RUN", str(folder)),
        "--tasks",
        TASKS[0],
        "--include_path",
        folder / "tasks",
    )
    command = [sys.executable, "-m", "gpt4moe.evaluation.harness", "run", "--model", "gpt4moe", *map(str, given)]
    ended = subprocess.run(command, env=outside(), capture_output=True, text=True, timeout=300, check=False)
    told = [line for line in ended.stderr.splitlines() if line.startswith(("error:", "fix:"))]
    assert ended.returncode == 2 and len(told) == 2 and cause in told[0], ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_that_trains_is_asked_the_same_and_trains_as_if_it_was_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = yaml.safe_load((folder / "resolved.yaml").read_text())["data"]["path"]
    asked = ("training.evaluate_limit=4", f"training.evaluate_include_path={folder / 'tasks'}",
             f"training.evaluate_tasks=[{TASKS[0]},{TASKS[2]}]")  # fmt: skip
    for name, more in {"asked": asked, "plain": ()}.items():
        shutil.copytree(folder, tmp_path / name)
        (ended,) = train(tmp_path / name, *MODEL, f"data.path={data}", "training.steps=2", *more)
        assert ended.status == 0, ended.err
    lines = [json.loads(line) for line in (tmp_path / "asked" / "evaluations.jsonl").read_text().splitlines()]
    # The checkpoint that was there is evaluated first.
    assert [(line["step"], line["task"]) for line in lines] == [(step, TASKS[at]) for step in (1, 2) for at in (0, 2)]
    tool, mine = TOOL.with_name("evaluate.py"), ("--include-path", folder / "tasks", "--limit", 4, "--json")
    (ended,) = generate(folder, "--tasks", TASKS[0], TASKS[2], *mine, tool=tool)
    found = json.loads(ended.out)["tasks"]
    for line in lines[:2]:
        (values,) = line["results"].values()
        assert values and values == {name: found[line["task"]][name] for name in values}
    *_, before, last = metrics(tmp_path / "asked")
    assert last.pop(f"task_score/{TASKS[0]}/acc") == lines[2]["results"][TASKS[0]]["acc,none"]
    assert not [name for name in before if name.startswith("task_")]
    assert metrics(tmp_path / "plain")[-1] == {key: it for key, it in last.items() if not key.startswith("task_")}
    assert saved_state(tmp_path / "asked", 2) == saved_state(tmp_path / "plain", 2) != {}


def test_a_finished_task_is_taken_from_the_output_and_the_others_are_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    out = tmp_path / "parts.jsonl"
    command = (folder, "--tasks", *TASKS[:2], "--include-path", folder / "tasks", "--output", out, "--json")
    (ended,) = generate(*command, tool=TOOL.with_name("evaluate.py"))
    assert ended.status == 0, ended.err
    first, second = out.read_text().splitlines(keepends=True)
    kept = json.loads(first)
    kept["results"][TASKS[0]]["acc,none"] = 7.0  # a number that no task gives
    out.write_text(json.dumps(kept) + "\n" + second[:20])
    (again,) = generate(*command, tool=TOOL.with_name("evaluate.py"))
    assert again.status == 0, again.err
    found, wanted = (json.loads(one.out)["tasks"] for one in (again, ended))
    assert found[TASKS[0]]["acc,none"] == 7.0 and list(found) == list(wanted) == list(TASKS[:2])
    assert found[TASKS[1]] == wanted[TASKS[1]]
