"""tools/refine.py: each candidate sees the best so far; the same trace on every layout; resumed; bad input."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.inference.tool import generate
from tests.numbered_lines import numbered_lines
from tests.training.command import Ended, outside, train

TOOL = Path(__file__).resolve().parents[2] / "tools" / "refine.py"
DRAWN = ("--tokens", 5, "--seed", 4, "--rounds", 3)
PROMPTS = ("word 17", "other", "and 10")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, with tasks.jsonl."""
    data = numbered_lines(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = ("model.num_attention_heads=4", "model.num_query_groups=2", "model.init_std=0.3")
    text = ("data.kind=indexed", f"data.path={data}", "model.vocab_size=300", "training.steps=1")
    (ended,) = train(folder, *model, *text)
    assert ended.status == 0, ended.err
    lines = [json.dumps({"id": f"t{at}", "prompt": text, "answer": "x"}) for at, text in enumerate(PROMPTS)]
    (folder / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def refine(run: Path, out: Path, *more: object, ranks: int = 1) -> list[Ended]:
    return generate(run, "--input", run / "tasks.jsonl", "--output", out, *DRAWN, *more, ranks=ranks, tool=TOOL)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def wanted(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wanted") / "out"
    (ended,) = refine(run, out)
    assert ended.status == 0, ended.err
    assert "3 tasks x 3 rounds" in ended.out
    return out


def test_each_candidate_sees_the_best_so_far_and_the_best_is_kept(wanted: Path) -> None:
    found = lines(wanted)
    assert [one["id"] for one in found] == ["t0", "t1", "t2"] * 3
    kept = [json.loads(line) for line in (wanted / "best.jsonl").read_text().splitlines()]
    for at, task in enumerate(PROMPTS):
        mine = found[at::3]
        best = mine[0]
        assert best["prompt"] == task and best["is_best"]
        for one in mine[1:]:
            assert one["prompt"] == f"{task}{best['text']}\n{task}"
            assert one["is_best"] == (one["score"] > best["score"])
            best = one if one["is_best"] else best
        assert (kept[at]["text"], kept[at]["score"]) == (best["text"], best["score"])
        assert mine[0]["score"] == pytest.approx(mine[0]["logprob"] / mine[0]["num_tokens"])
        # Later ones were drawn behind another prompt, and are scored behind the task alone.
        assert all(one["score"] != pytest.approx(one["logprob"] / one["num_tokens"]) for one in mine[1:])
    page = (wanted / "rounds.html").read_text()
    assert "Score" in page and page.count("<details>") == 3 and "://" not in page


@pytest.mark.parametrize(("layout", "ranks"), [(("--tp", 2, "--pp", 2), 4), (("--ep", 2), 2)])
def test_every_layout_writes_the_same_trace(
    layout: tuple[Any, ...], ranks: int, run: Path, wanted: Path, tmp_path: Path
) -> None:
    ended = refine(run, tmp_path / "out", *layout, ranks=ranks)
    assert [rank.status for rank in ended] == [0] * ranks, ended[0].err
    for one, same in zip(lines(tmp_path / "out"), lines(wanted), strict=True):
        for key in ("score", "logprob"):
            assert one.pop(key) == pytest.approx(same.pop(key), abs=1e-4)
        assert one == same


def test_a_killed_search_goes_on(run: Path, wanted: Path, tmp_path: Path) -> None:
    whole = (wanted / "trace.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "trace.jsonl").write_bytes(b"".join(whole[:5]) + whole[5][:-9])  # in the second round, a torn line
    (ended,) = refine(run, tmp_path)
    assert ended.status == 0, ended.err
    for one, same in zip(lines(tmp_path), lines(wanted), strict=True):
        assert {**one, "score": 0, "logprob": 0} == {**same, "score": 0, "logprob": 0}
    settings = json.loads(whole[0])["settings"]
    assert settings["step"] == 1 and len(settings["weights"]) == 64
    (tmp_path / "best.jsonl").unlink()
    (tmp_path / "best.jsonl").mkdir()
    (refused,) = refine(run, tmp_path)
    assert refused.status == 2 and "best.jsonl cannot be written" in refused.err, refused
    (other,) = refine(run, tmp_path, "--temperature", 2)
    assert other.status == 2 and "was begun with sampling=" in other.err


def test_other_methods_draw_from_the_task_alone(run: Path, wanted: Path, tmp_path: Path) -> None:
    (ended,) = refine(run, tmp_path, "--method", "self-consistency")
    assert ended.status == 0, ended.err
    found = lines(tmp_path)
    assert [one["prompt"] for one in found] == [*PROMPTS] * 3
    assert [one["text"] for one in found[:3]] == [one["text"] for one in lines(wanted)[:3]]
    for mine in (found[at::3] for at in range(3)):
        assert [one["score"] for one in mine] == [
            float([one["answer"] for one in mine[: at + 1]].count(mine[at]["answer"])) for at in range(3)
        ]


def test_a_scorer_that_fails_loses_nothing(run: Path, tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    code = "import json, sys\nasked = json.load(sys.stdin)\n{}\nprint(len(asked['text']))\n"
    script.write_text(code.format("assert asked['task']['id'] != 't1', 'no such task'"))
    scorer = ("--scorer", f"{sys.executable} {script}")
    ended = refine(run, tmp_path, *scorer, "--ep", 2, ranks=2)
    assert [rank.status for rank in ended] == [2, 2]
    said = [line for line in ended[0].err.splitlines() if line.startswith(("error:", "fix:"))]
    assert len(said) == 2 and "task 't1': exit status 1: AssertionError: no such task" in said[0], said
    assert [one["id"] for one in lines(tmp_path)] == ["t0"]
    script.write_text(code.format(""))
    (again,) = refine(run, tmp_path, *scorer)
    assert again.status == 0, again.err
    assert len(lines(tmp_path)) == 9 and all(one["score"] == len(one["text"]) for one in lines(tmp_path))


def test_bad_input_is_one_line_of_cause_and_one_of_cure(run: Path, tmp_path: Path) -> None:
    bad, chat = tmp_path / "bad.jsonl", tmp_path / "chat.jsonl"
    bad.write_text('{"id": 1, "text": "a"}\n')
    chat.write_text('{"id": 1, "messages": [{"role": "user", "content": "a"}]}\n')
    files = {name: tmp_path / f"{name}.jsonl" for name in ("empty", "long", "twice", "grows")}
    for (name, path), prompt in zip(files.items(), ("", "word " * 60, "word " * 9, "word " * 6), strict=True):
        path.write_text(json.dumps({"id": name, "prompt": prompt}) + "\n")
    cases: dict[str, tuple[object, ...]] = {
        'line 1 has no \'prompt\': {"id": 1, "text"': ("--input", bad),
        'line 1 has no \'prompt\': {"id": 1, "messages"': ("--input", chat),
        "no template ({task.__class__})": ("--template", "{task.__class__}{best}"),
        "inf is no time": ("--scorer-seconds", "inf"),
        "No closing quotation": ("--scorer", 'python "x'),
        "is no template": ("--template", "{best} {"),
        "does not show {best}": ("--template", "{task}"),
        "is no scorer": ("--scorer", "likelyhood"),
        "would have no effect": ("--method", "self-consistency", "--scorer", "a:b"),
        "no regular expression": ("--answer", "("),
        "--rounds 0 is below 1": ("--rounds", 0),
        "cannot be imported": ("--scorer", "nowhere.at.all:score"),
        "line 1 has an empty prompt": ("--input", files["empty"]),
        "Task 'long' 'word": ("--input", files["long"], "--method", "best-of-n"),
        "Task 'twice' in --template 'word": ("--input", files["twice"]),
        "Task 'grows' with the best so far, in round 1, 'word": (
            "--input", files["grows"], "--tokens", 20, "--output", tmp_path / "grows",
        ),
    }  # fmt: skip
    for words, arguments in cases.items():
        (ended,) = refine(run, tmp_path / "out", *arguments)
        said = [line for line in ended.err.splitlines() if line.startswith(("error:", "fix:"))]
        assert ended.status == 2 and len(said) == 2 and words in said[0], (words, ended)
        assert "Traceback" not in ended.err and ended.out == ""


def test_stdout_has_the_summary_alone_and_may_be_closed(run: Path, wanted: Path, tmp_path: Path) -> None:
    out = shutil.copytree(wanted, tmp_path / "out")
    command = [sys.executable, TOOL, run, "--input", run / "tasks.jsonl", "--output", out, *DRAWN]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=True, env=outside())
    assert done.stdout.startswith("refine by likelihood: 3 tasks x 3 rounds")
    assert done.stdout.splitlines()[-1] == str(out / "rounds.html")
    piped = ["bash", "-o", "pipefail", "-c", f"{shlex.join(map(str, command))} | true"]
    done = subprocess.run(piped, capture_output=True, text=True, timeout=300, check=False, env=outside())
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error: stdout was closed before the summary" in done.stderr
