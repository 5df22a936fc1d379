"""refine, best-of-n and self-consistency: a candidate of each task in each round; the best so far is kept.

    round r:  each task --template--> prompt --Generator--> candidate --scorer--> score: better than the best? keep it
                          ^ the best so far (refine)                                      |
                          +---------------------------------------------------------------+

best-of-n draws every candidate from the task alone; self-consistency does so too, and its score is the majority. All
ranks hold the same candidates. The first rank alone asks scorers from outside, and writes the trace.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from gpt4moe.errors import ConfigError
from gpt4moe.inference.requests import Completion, Request
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.text import Words, cut_at_stop
from gpt4moe.refinement.tasks import DEFAULT_TEMPLATE, FIRST_TEMPLATE, Task

METHODS = ("refine", "best-of-n", "self-consistency")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How candidates are drawn."""

    method: str
    rounds: int
    max_tokens: int
    """New tokens of a candidate."""
    sampling: Sampling = field(default_factory=Sampling)
    stops: Sequence[str] = ()
    first_template: str = FIRST_TEMPLATE
    template: str = DEFAULT_TEMPLATE
    is_chat: bool = False
    answer_pattern: str | None = None
    """Regular expression that finds the answer in a text: its last match, the first group if it has one."""

    def answer_of(self, text: str) -> str:
        """What is compared with other candidates and with the right answer."""
        if self.answer_pattern is None:
            return text.strip()
        found = list(re.finditer(self.answer_pattern, text))
        return (found[-1][1 if found[-1].re.groups else 0] or "").strip() if found else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A line of the trace, without the task's id."""

    round: int
    prompt: str
    text: str
    answer: str
    score: float
    is_best: bool
    """Whether it was better than all before; the first one always is."""
    logprob: float
    """Of its tokens in the context that it was drawn in, in nats."""
    num_prompt_tokens: int
    num_tokens: int

    @property
    def tokens(self) -> int:
        """That the model processed for it."""
        return self.num_prompt_tokens + self.num_tokens


@dataclass(slots=True)
class Course:
    """A task and its candidates so far."""

    task: Task
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def best(self) -> Candidate:
        return next(one for one in reversed(self.candidates) if one.is_best)

    def prompt(self, plan: Plan) -> str:
        """What the next candidate is drawn from."""
        if plan.method == "refine" and self.candidates:
            best = self.best
            return plan.template.format(
                task=self.task.text, best=best.text, score=f"{best.score:.4g}", round=len(self.candidates)
            )
        return plan.first_template.format(task=self.task.text, best="", score="", round=len(self.candidates))


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A text before it is scored."""

    course: Course
    prompt: str
    prompt_tokens: list[int]
    text: str
    done: Completion


class Scorer(Protocol):
    """Higher is better."""

    def prepare(self, drawn: Sequence[Drawn]) -> None:
        """What all ranks compute before `score`. Collective."""

    def score(self, drawn: Drawn) -> float:
        """On the first rank. Raises: Gpt4MoeError."""

    def close(self) -> None:
        """Ends what the scorer started."""


Draw = Callable[[Sequence[Request]], list[Completion]]


def draw(
    courses: Sequence[Course], plan: Plan, words: Words, generate_all: Draw, *, banned: frozenset[int] = frozenset()
) -> list[Drawn]:
    """The next candidate of each task. Collective. Raises: ConfigError when a prompt does not fit the context.

    Args:
        banned: Sight.banned of the model.
    """
    is_stopped = words.stop_test(plan.stops)
    encoded = [_encoded(course, course.prompt(plan), plan, words) for course in courses]
    requests = [
        Request(
            prompt=prompt, max_tokens=min(plan.max_tokens, words.context_length - len(prompt)),
            sampling=plan.sampling, sample=len(course.candidates), end_ids=words.end_ids,
            is_stopped=is_stopped, banned=banned,
        )
        for course, (_, prompt) in zip(courses, encoded, strict=True)
    ]  # fmt: skip
    found = generate_all(requests)
    return [
        Drawn(course=course, prompt=prompt, prompt_tokens=list(request.prompt), done=done,
              text=cut_at_stop(words.decode(done.tokens), plan.stops))
        for course, (prompt, _), request, done in zip(courses, encoded, requests, found, strict=True)
    ]  # fmt: skip


def require_prompts(tasks: Sequence[Task], plan: Plan, words: Words) -> None:
    """Before a model is loaded. Raises: ConfigError when a task does not fit the context, alone or in the template of
    later rounds around an empty text."""
    for task in tasks:
        course = Course(task)
        _encoded(course, course.prompt(plan), plan, words)
        if plan.method == "refine" and plan.rounds > 1:
            shortest = plan.template.format(task=task.text, best="", score="0", round=1)
            _encoded(course, shortest, plan, words, " in --template")


def _encoded(course: Course, text: str, plan: Plan, words: Words, where: str = "") -> tuple[str, list[int]]:
    """What a candidate is drawn from, and its tokens. Raises: ConfigError when it does not fit the context."""
    is_later = plan.method == "refine" and bool(course.candidates)
    what = f"Task {course.task.id!r}{where}{f' with the best so far, in round {len(course.candidates)},' * is_later}"
    if plan.is_chat:
        text = words.render([{"role": "user", "content": text}])
    try:
        return text, words.encode(text, is_chat=plan.is_chat, what=what)
    except ConfigError as error:
        if not is_later:
            raise
        raise ConfigError(
            error.cause, "Give another --output, and shorter tasks, a shorter --template or fewer --tokens."
        ) from error


def keep(drawn: Drawn, score: float, plan: Plan) -> Candidate:
    """Adds a scored text to its task. Of equal scores the earlier one stays the best."""
    course = drawn.course
    candidate = Candidate(
        round=len(course.candidates), prompt=drawn.prompt, text=drawn.text, answer=plan.answer_of(drawn.text),
        score=score, is_best=not course.candidates or score > course.best.score,
        logprob=sum(drawn.done.logprobs), num_prompt_tokens=len(drawn.prompt_tokens), num_tokens=len(drawn.done.tokens),
    )  # fmt: skip
    course.candidates.append(candidate)
    return candidate


def as_line(course: Course, candidate: Candidate) -> dict[str, Any]:
    return {"id": course.task.id, **asdict(candidate)}


def from_line(line: dict[str, Any]) -> Candidate:
    return Candidate(**{key: value for key, value in line.items() if key != "id"})


def pieces(courses: Sequence[Course], start: int, rounds: int, size: int) -> Iterator[Sequence[Course]]:
    """At most `size` tasks at a time, in the order of the trace: every task of round 0, then of round 1.

    Args:
        start: candidates that are there already.
    """
    for round_ in range(start // len(courses), rounds):
        first = start - round_ * len(courses) if round_ == start // len(courses) else 0
        for at in range(first, len(courses), size):
            yield courses[at : at + size]
