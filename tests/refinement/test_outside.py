"""A scorer from outside: its number counts; one that raises, hangs, exits or prints words is refused in two lines."""

import sys
import time
from pathlib import Path

import pytest

from gpt4moe.errors import ConfigError
from gpt4moe.refinement.outside import MOST_BYTES, CheckerScorer, CommandScorer
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
def floods(task, text): print("x" * 3_000_000, "end"); return 1
def forges(task, text):
    for number in range(3, 20):
        try: os.write(number, b'{"score": 99}' + b"\\n")
        except OSError: pass
    return 1
"""


@pytest.fixture(autouse=True)
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    monkeypatch.chdir(tmp_path)


def test_a_checker_scores_many_texts() -> None:
    scorer = CheckerScorer("checks:good", 10)
    assert [scorer.score(TASK, text) for text in ("4", "5", "4")] == [1.0, 0.0, 1.0]
    scorer.close()


def test_of_what_a_checker_prints_a_bounded_part_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    scorer = CheckerScorer("checks:floods", 20)
    assert [scorer.score(TASK, "4") for _ in range(2)] == [1.0, 1.0]
    scorer.close()
    assert 0 < len(capsys.readouterr().err) <= MOST_BYTES


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "KeyError: 'gone'"),
        ("hangs", r"no score in 1 s: it is at line 5 of .*checks.py, in hangs\."),
        ("exits", "has ended"),
        ("nan", "is nan"),
        ("forges", "where its score belongs"),
    ],
)
def test_a_checker_that_fails_is_refused(name: str, words: str) -> None:
    scorer = CheckerScorer(f"checks:{name}", 1)
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
        ("sleep 60", "no score in 1 s, and said nothing"),
        ("sh -c 'echo waiting for a key >&2; exec sleep 60'", "no score in 1 s: it said last 'waiting for a key'"),
        ("sh -c 'echo 3; echo late >&2; exec sleep 60 >&- 2>&-'", "no score in 1 s: it said last 'late'"),
        ("echo good", "no number"), ("echo inf", "is inf"),
        ("sh -c 'echo broken >&2; exit 3'", "exit status 3: broken"), ("./nowhere", "cannot be started"),
        (r"printf '\xff'", "no number"), ("yes", "printed more than"),
    ],
)  # fmt: skip
def test_a_command_that_fails_is_refused(command: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CommandScorer(command, 1 if "sleep" in command else 20).score(TASK, "4")


def test_a_command_need_not_read_a_long_text_and_leaves_no_child() -> None:
    assert CommandScorer("echo 3", 20).score(TASK, "x" * 1_000_000) == 3.0
    scorer = CommandScorer("sh -c 'sleep 77 >/dev/null 2>&1 & echo $!'", 20)
    child, end = Path(f"/proc/{scorer.score(TASK, 'x'):.0f}/status"), time.monotonic() + 10
    # Nobody may have collected it yet.
    while child.exists() and "zombie" not in child.read_text():
        assert time.monotonic() < end, child.read_text()
        time.sleep(0.05)


def test_a_name_says_which_scorer() -> None:
    assert is_checker("a.b:c") and not is_checker("python a:b") and not is_checker("likelihood")
    for name in ("likelihood", "majority", "a:b", "./score", "python score.py"):
        require_scorer(name)
    for name, why in {"likelyhood": "no scorer", 'python "x': "No closing quotation", "  ": "no scorer"}.items():
        with pytest.raises(ConfigError, match=why):
            require_scorer(name)
