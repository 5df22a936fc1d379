"""Texts and tasks while a run trains: the same numbers as without, the same texts on every layout, each once."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.parallel.environment import Environment
from tests.inference.tool import TOOL, generate
from tests.numbered_lines import VOCABULARY, numbered_lines
from tests.spawn import run_ranks
from tests.training.command import SMALL, Ended, Event, metrics, run_rank, saved_state, train

PROMPTS = ["word 7 and", "other things", ""]
MODEL = ("model.num_attention_heads=4", "model.num_query_groups=2", "model.init_std=0.3", "training.steps=6",
         f"model.vocab_size={VOCABULARY}", "data.kind=indexed", "checkpoint.every=3", "checkpoint.keep=0")  # fmt: skip
QUESTIONS = {
    "sums": [{"prompt": f"word {n} and", "choices": [f" {n * n} other", " 0"], "answer": n % 2} for n in range(6)],
    "squares": [{"prompt": f"word {n} and", "answer": str(n * n), "stop": " other"} for n in range(3)],
    "prose": [{"text": f"word {n} and {n} things\n" * n, "source": f"part{n % 2}"} for n in range(1, 4)],
}
"""Of each jsonl file, beside the data folder."""
ASKED = ("training.sample_every=2", f"training.sample_prompts={json.dumps(PROMPTS)}", "training.sample_tokens=6",
         "training.evaluate_tasks=[ROOT/sums.jsonl,ROOT/squares.jsonl,ROOT/prose.jsonl,ROOT/data]")  # fmt: skip
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2-pp2-ep2": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
    "dp2-deepspeed": (2, ("engine=deepspeed", "parallel.ep=2")),
}
Lines = list[dict[str, Any]]


def lines_of(folder: Path, name: str = "samples") -> Lines:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def without_tasks(folder: Path) -> Lines:
    return [{key: it for key, it in one.items() if not key.startswith("task_")} for one in metrics(folder)]


def _several(environment: Environment, runs: list[list[str]]) -> list[Ended]:
    """One command after the other, on the same ranks."""
    return [run_rank(environment, arguments, (), {}) for arguments in runs]


class Runs:
    """Run folders LAYOUT (asked) and LAYOUT-plain (not asked), trained when first wanted."""

    def __init__(self, root: Path):
        self.root = root
        (root / "data").mkdir()
        self.data = numbered_lines(root / "data")
        for name, lines in QUESTIONS.items():
            (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.base = (*MODEL, f"data.path={self.data}")
        self.asked = [it.replace("ROOT", str(root)) for it in ASKED]

    def pair(self, name: str) -> tuple[Path, Path]:
        asked, plain = self.root / name, self.root / f"{name}-plain"
        if not asked.exists():
            ranks, layout = LAYOUTS[name]
            tracked = "tracking.wandb=offline" if name == "one" else "tracking.wandb=disabled"
            for folder, more in ((asked, (*self.asked, tracked)), (plain, ())):
                for ended in train(folder, *self.base, *layout, *more, ranks=ranks):
                    assert ended.status == 0, ended.err
        return asked, plain


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_equal_to_the_bit_to_a_run_that_is_not_asked(name: str, runs: Runs) -> None:
    asked, plain = runs.pair(name)
    assert without_tasks(asked) == metrics(plain) != []
    assert saved_state(asked, 6) == saved_state(plain, 6) != {}


@pytest.mark.parametrize("name", LAYOUTS)
def test_texts_are_the_same_on_every_layout_and_change_over_steps(name: str, runs: Runs) -> None:
    got, want = lines_of(runs.pair(name)[0]), lines_of(runs.pair("one")[0])
    assert [(line["step"], line["prompt"]) for line in got] == [(step, it) for step in (2, 4, 6) for it in PROMPTS]
    assert [line["tokens"] for line in got] == [line["tokens"] for line in want]
    for line, same in zip(got, want, strict=True):
        assert line["text"] == same["text"] and len(line["logprobs"]) == len(line["tokens"]) <= 6
        assert line["logprobs"] == pytest.approx(same["logprobs"], abs=1e-3)
    assert len({line["text"] for line in got if line["prompt"] == PROMPTS[0]}) > 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_tasks_are_evaluated_at_checkpoints_with_the_same_results_on_every_layout(name: str, runs: Runs) -> None:
    folder = runs.pair(name)[0]
    got, want = lines_of(folder, "evaluations"), lines_of(runs.pair("one")[0], "evaluations")
    kinds = {"sums": "choices", "squares": "exact", "prose": "texts", "data": "texts"}
    assert [(it["step"], it["task"], it["kind"]) for it in got] == [(s, *it) for s in (3, 6) for it in kinds.items()]
    assert [{**it, "sources": None} for it in got] == [{**it, "sources": None} for it in want]
    for line, same in zip(got, want, strict=True):
        for source, its in zip(line.get("sources", ()), same.get("sources", ()), strict=True):
            assert source["tokens"] == its["tokens"] and source["loss"] == pytest.approx(its["loss"], abs=1e-4)
    records = metrics(folder)
    assert [record["step"] for record in records if "task_score/sums/accuracy" in record] == [3, 6]
    losses = {key: it for key, it in records[-1].items() if key.startswith("task_loss/")}
    assert losses == {
        f"task_loss/{it['task']}/{source['source']}": source["loss"]
        for it in got[4:]
        for source in it.get("sources", ())
    }
    assert set(losses) == {*(f"task_loss/prose/{part}" for part in ("part0", "part1", "all")), "task_loss/data/alpha"}


def test_the_tool_says_the_same_of_the_checkpoint(runs: Runs) -> None:
    folder, _ = runs.pair("one")
    asked = ("--choices", runs.root / "sums.jsonl", "--exact", runs.root / "squares.jsonl", "--data")
    (ended,) = generate(folder, *asked, runs.root / "prose.jsonl", "--json", tool=TOOL.with_name("evaluate.py"))
    found, lines = json.loads(ended.out), lines_of(folder, "evaluations")[4:]
    assert found["choices"] == {key: lines[0][key] for key in found["choices"]}
    assert found["exact"] == {key: lines[1][key] for key in found["exact"]}
    assert found["sources"] == lines[2]["sources"]


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (Event(after_step=5, sent=signal.SIGKILL), None),  # steps 4 and 5 are done again
        (Event(after_step=1, sent=signal.SIGUSR2), 85),  # step 2 is the last of its launch, and has no time for texts
    ],
    ids=["killed", "stopped"],
)
def test_after_a_resume_every_text_is_there_once(event: Event, status: int | None, tmp_path: Path, runs: Runs) -> None:
    whole, _ = runs.pair("one")
    folder = tmp_path / "x"
    if status is None:
        with pytest.raises(AssertionError, match="died"):
            train(folder, *runs.base, *runs.asked, events=(event,))
        with (folder / "samples.jsonl").open("ab") as file:
            file.write(b'{"step": 4, "pro')
    else:
        assert train(folder, *runs.base, *runs.asked, events=(event,))[0].status == status
        assert not (folder / "samples.jsonl").exists()
    (ended,) = train(folder, *runs.base, *runs.asked)
    assert ended.status == 0, ended.err
    assert lines_of(folder) == lines_of(whole)
    results = lines_of(folder, "evaluations")
    more = [line["task"] for line in results if line["step"] == 2]
    assert more == ([] if status is None else ["sums", "squares", "prose", "data"]), "step 2 got a checkpoint"
    assert [line for line in results if line["step"] != 2] == lines_of(whole, "evaluations")
    assert metrics(folder) == metrics(whole)


def test_what_a_launch_left_out_is_made_by_the_next_on_another_layout(tmp_path: Path, runs: Runs) -> None:
    whole, folder = runs.pair("tp2-pp2-ep2")[0], tmp_path / "x"
    shutil.copytree(whole, folder)
    for name, left in {"samples": 7, "evaluations": 4}.items():
        lines = (folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:left]))
    for ended in train(folder, *runs.base, *runs.asked, "training.steps=7", "parallel.pp=2", ranks=2):
        assert ended.status == 0, ended.err
    got, want = lines_of(folder), lines_of(whole)
    assert [(line["step"], line["prompt"], line["tokens"]) for line in got] == [
        (line["step"], line["prompt"], line["tokens"]) for line in want
    ]
    steps = [line["step"] for line in lines_of(folder, "evaluations")]
    assert steps == [3] * 4 + [6] * 4 + [7] * 4
    assert lines_of(folder, "evaluations")[4] == lines_of(whole, "evaluations")[4]


def test_report_and_wandb_show_how_texts_change(runs: Runs) -> None:
    folder, _ = runs.pair("one")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Samples while training" in page
    assert all(page.count(f"<tr><td>{step}</td><td><pre>") == len(PROMPTS) for step in (2, 4, 6))
    tables = [json.loads(file.read_text()) for file in folder.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert all(table["columns"] == ["step", "prompt", "text"] for table in tables)
    sent = sorted(tuple(row) for table in tables for row in table["data"])
    assert sent == sorted((line["step"], line["prompt"], line["text"]) for line in lines_of(folder))


def test_time_for_texts_is_accounted_for(runs: Runs) -> None:
    events = [json.loads(line) for line in (runs.pair("one")[0] / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "sampling"] == [2, 4, 6]


def test_results_of_tasks_are_drawn_and_accounted_for(runs: Runs) -> None:
    folder, _ = runs.pair("one")
    assert "Scores of tasks" in (folder / "report.html").read_text(encoding="utf-8")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    # At the last step there is the loss on held-out text too.
    assert [event["step"] for event in events if event["event"] == "evaluation"] == [3, 6, 6]


TEXT = (f"model.vocab_size={VOCABULARY}", "data.kind=indexed", "data.path=DATA")
TASKS = "training.evaluate_tasks="
BAD_INPUTS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "no steps": (("training.sample_every=0", "training.sample_prompts=[a]"), "sample_every=0 is below 1", "null"),
    "no prompts": (("training.sample_every=5",), "there are no prompts", "training.sample_prompts=['The ']"),
    "no tokens": (("training.sample_tokens=0",), "sample_tokens=0", "1 or more"),
    "twice": (("training.sample_prompts=[a,b,a]",), "'a' 2 times", "once"),
    "no tokenizer": (
        ("training.sample_every=5", "training.sample_prompts=[a]"), "data=mock", "Set data.tokenizer"),
    "long prompt": (
        (*TEXT, "training.sample_every=5", f"training.sample_prompts=['{'word ' * 40}']"), "context", "Shorten it to 31"
    ),
    "small vocabulary": (
        ("data.tokenizer=DATA/tokenizer.json", "model.vocab_size=64", "training.sample_every=5",
         "training.sample_prompts=[word]"), "model.vocab_size=64", "Use the tokenizer"),
    "no questions": (("training.evaluate_limit=0",), "evaluate_limit=0", "1 or more"),
    "no tokenizer for tasks": ((TASKS + "[ROOT/sums.jsonl]",), "data=mock", "Set data.tokenizer"),
    "no file": ((*TEXT, TASKS + "[ROOT/none.jsonl]"), "none.jsonl, which does not exist", "Give a jsonl"),
    "another field": ((*TEXT, TASKS + "[ROOT/odd.jsonl]"), "no question and no text", "Give"),
    "torn question": ((*TEXT, TASKS + "[ROOT/torn.jsonl]"), "torn.jsonl, line 6", "Write"),
    "long question": ((*TEXT, TASKS + "[ROOT/long.jsonl]"), "long.jsonl, line 1", "Shorten"),
    "one name twice": (
        (*TEXT, TASKS + "[ROOT/sums.jsonl,ROOT/data/sums.jsonl]"), "2 tasks named 'sums'", "Rename"),
    "no such task": ((*TEXT, TASKS + "[no_such_task]"), "'no_such_task'", ", or "),
    "other attention": (
        (*TEXT, "training.sample_every=5", "training.sample_prompts=[a]", "kernels.attention=transformer_engine"),
        "transformer_engine", "sdpa"),
}  # fmt: skip


def test_bad_input_is_refused_before_a_model_is_built(tmp_path: Path, runs: Runs) -> None:
    questions = (runs.root / "sums.jsonl").read_text()
    files = {
        "odd": '{"question": 1}',
        "torn": questions[:-9],
        "long": '{"prompt": "%s", "answer": "a"}' % ("word " * 40),
    }
    for name, text in (files | {"data/sums": questions}).items():
        (runs.root / f"{name}.jsonl").write_text(text)
    cases = [
        [*SMALL, f"run.root={tmp_path}", "run.name=x",
         *(it.replace("DATA", str(runs.data)).replace("ROOT", str(runs.root)) for it in overrides)]
        for overrides, _, _ in BAD_INPUTS.values()
    ]  # fmt: skip
    (ended,) = run_ranks(1, _several, cases)
    for (name, (_, cause_words, cure_words)), one in zip(BAD_INPUTS.items(), ended, strict=True):
        assert one.status == 2, name
        cause, cure = one.err.splitlines()
        assert cause_words in cause and cure_words in cure, (name, one.err)
    assert not (tmp_path / "x").exists()
