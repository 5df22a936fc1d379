"""A scorer from outside: its number counts; one that raises, hangs, exits or prints words is refused in two lines."""

import sys
import time
from pathlib import Path

import pytest

from gpt4moe.errors import ConfigError
from gpt4moe.refinement.outside import CheckerScorer, CommandScorer
from gpt4moe.refinement.scorers import is_checker, require_scorer
from gpt4moe.refinement.tasks import Task

TASK = Task(id="t", text="2+2=", fields={"id": "t", "prompt": "2+2=", "answer": 4})
CHECKS = """
import os, sys, time
def good(task, text): print("noise"); return text == str(task["answer"])
def raises(task, text): raise KeyError("gone")
def hangs(task, text): time.sleep(60)
def exits(task, text): os._exit(3)
def nan(task, text): return float("nan")
"""


@pytest.fixture(autouse=True)
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    monkeypatch.chdir(tmp_path)


def test_a_checker_scores_many_texts() -> None:
    scorer = CheckerScorer("checks:good", 10)
    assert [scorer.score(TASK, text) for text in ("4", "5", "4")] == [1.0, 0.0, 1.0]
    scorer.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [("raises", "KeyError: 'gone'"), ("hangs", "no score in 0.5 s"), ("exits", "has ended"), ("nan", "is nan")],
)
def test_a_checker_that_fails_is_refused(name: str, words: str) -> None:
    scorer = CheckerScorer(f"checks:{name}", 0.5)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=words):
        scorer.score(TASK, "4")
    assert time.monotonic() - start < 10
    scorer.close()
    assert scorer.process.returncode is not None


def test_a_checker_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        CheckerScorer("checks:nobody", 1)


def test_a_command_scores_by_what_it_prints() -> None:
    code = "import json, sys; asked = json.load(sys.stdin); print(asked['task']['answer'] + len(asked['text']))"
    assert CommandScorer(f'{sys.executable} -c "{code}"', 20).score(TASK, "abc") == 7.0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sleep 60", "no score in 0.5 s"), ("echo good", "no number"), ("echo inf", "is inf"),
        ("sh -c 'echo broken >&2; exit 3'", "exit status 3: broken"), ("./nowhere", "cannot be started"),
    ],
)  # fmt: skip
def test_a_command_that_fails_is_refused(command: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CommandScorer(command, 0.5).score(TASK, "4")


def test_a_name_says_which_scorer() -> None:
    assert is_checker("a.b:c") and not is_checker("python a:b") and not is_checker("likelihood")
    for name in ("likelihood", "majority", "a:b", "./score", "python score.py"):
        require_scorer(name)
    with pytest.raises(ConfigError, match="no scorer"):
        require_scorer("likelyhood")
