"""What is kept of a drawn text, and how the model's own likelihood scores it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
import torch

from gpt4moe.errors import CheckpointError, DataError
from gpt4moe.evaluation import scoring
from gpt4moe.evaluation.pieces import Piece
from gpt4moe.inference.requests import Completion, Request
from gpt4moe.inference.text import Words
from gpt4moe.refinement.scorers import Likelihood
from gpt4moe.refinement.search import Course, Drawn, Plan, as_line, draw, keep
from gpt4moe.refinement.tasks import Task, read_tasks
from gpt4moe.refinement.trace import Trace, read_trace
from tests.inference.test_text import llama
from tests.numbered_lines import numbered_lines

PLAN = Plan(method="refine", rounds=3, max_tokens=4)


def drawn(course: Course, tokens: list[int], *, logprob: float = -1.0, prompt: str = "?") -> Drawn:
    done = Completion(number=0, tokens=tokens, logprobs=[logprob] * len(tokens), finish_reason="length")
    return Drawn(course=course, prompt=prompt, prompt_tokens=[7, 8, 9], text="x", done=done)


def new_course() -> Course:
    return Course(Task(id="t", text="word 3", fields={"id": "t", "prompt": "word 3"}))


def test_of_equal_scores_the_earlier_text_stays_the_best() -> None:
    course = new_course()
    for score in (1.0, 1.0, 2.0, 2.0):
        keep(drawn(course, [1]), score, PLAN)
    assert [one.is_best for one in course.candidates] == [True, False, True, False]


def test_tokens_are_those_of_the_prompt_and_the_new_ones() -> None:
    candidate = keep(drawn(new_course(), [1, 2]), 0.0, PLAN)
    assert (candidate.num_prompt_tokens, candidate.num_tokens, candidate.tokens) == (3, 2, 5)


class Scored:
    """Stands where evaluation.scoring.Scorer does, and notes what it is asked."""

    def __init__(self, *model: object):
        self.asked: list[Piece] = []
        self.each = -0.5

    def score(self, pieces: list[Piece]) -> list[scoring.Score]:
        self.asked += pieces
        return [
            scoring.Score(torch.full((piece.num_scored,), self.each).double(), torch.zeros(piece.num_scored).bool())
            for piece in pieces
        ]


class Model:
    chunks = run = groups = None


def test_a_likelihood_is_the_mean_behind_the_task_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "Scorer", Scored)
    backend = tokenizers.Tokenizer.from_file(str(numbered_lines(tmp_path) / "tokenizer.json"))
    words = Words(backend=backend, end_ids=frozenset(), vocab_size=300, context_length=32)
    scorer = Likelihood(Model(), words, PLAN)  # type: ignore[arg-type]
    course = new_course()

    def score(one: Drawn) -> float:
        scorer.prepare([one])
        return scorer.score(one)

    first = drawn(course, [1, 2], logprob=-3.0)
    assert score(first) == -3.0  # it was drawn behind the task
    keep(first, -3.0, PLAN)
    assert score(drawn(course, [4, 5, 6], logprob=-0.1, prompt="word 3x\nword 3")) == -0.5
    (asked,) = scorer.scorer.asked  # type: ignore[attr-defined]
    assert asked.tokens == [*words.encode("word 3"), 4, 5, 6] and asked.num_scored == 3
    scorer.scorer.each = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="is nan"):
        score(drawn(course, [4]))


def test_a_trace_is_read_back_whatever_its_texts_hold(tmp_path: Path) -> None:
    file, path = tmp_path / "tasks.jsonl", tmp_path / "trace.jsonl"
    file.write_text('{"prompt": "a\u2028b\u0085c", "more": {"x": 1}}\n')
    (task,) = tasks = read_tasks(file)
    assert task.id == 1 and task.fields == {"prompt": "a\u2028b\u0085c", "more": {"x": 1}}
    course = Course(task)
    keep(drawn(course, [1], prompt=task.text), 1.0, PLAN)
    trace = Trace(path, tasks, 3, {"weights": "x"})
    trace.append(course, course.best)
    trace.close()
    settings, (found,) = read_trace(path, tasks)
    assert settings == {"weights": "x"} and as_line(course, found.best) == as_line(course, course.best)
    with pytest.raises(DataError, match="begun with weights='x'"):
        Trace(path, tasks, 3, {"weights": "y"})
    path.write_text(path.read_text().replace('"score": 1.0', '"score": NaN'))
    with pytest.raises(DataError, match="the score nan"):
        Trace(path, tasks, 3, {"weights": "x"})
    path.write_text('{"id": "settings", "text": "an answer"}\n')
    with pytest.raises(DataError, match="is no trace"):
        Trace(path, tasks, 3, {"weights": "x"})


def test_tasks_with_images_are_refused_and_no_candidate_draws_what_is_banned(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "<image>", "images": ["a.png"]}\n')
    with pytest.raises(DataError, match="line 2 has images, and tasks are read as text alone"):
        read_tasks(path)
    asked: list[Request] = []

    def generate_all(requests: Sequence[Request]) -> list[Completion]:
        asked.extend(requests)
        return [Completion(number=0, tokens=[1], logprobs=[0.0], finish_reason="length")]

    draw([new_course()], PLAN, llama(), generate_all, banned=frozenset({5}))
    assert [one.banned for one in asked] == [{5}]
