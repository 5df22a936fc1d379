"""Does refinement pay? pass@1, pass@16, majority, best-of-16 and refine-16 on tasks with answers, also at equal tokens.

    a trace of best-of-n, a trace of each refinement -> for each task, right or not -> mean, 95% interval over the tasks

Equal tokens: a refining prompt is longer, so on each task the other methods get as many samples as fit in the tokens
(prompts and new ones) that the refinement took there. Intervals are of a bootstrap over tasks; that of a difference is
paired.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gpt4moe.errors import DataError
from gpt4moe.refinement.page import table
from gpt4moe.refinement.search import Candidate, Course
from gpt4moe.refinement.summary import best_after, is_right, mean

RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A method, over all tasks."""

    name: str
    share: float
    """Right; for pass@n, right at least once among n."""
    low: float
    high: float
    num_samples: float
    """Of a task, on average."""
    num_tokens: float
    """Of a task, on average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A refinement less another method at equal tokens, in shares of tasks."""

    name: str
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "refinement wins"
        return "refinement loses" if self.high < 0 else "no difference that these tasks show"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% of the means of bootstrap samples of tasks; the same on every call."""
    numbers = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(0).integers(0, len(numbers), size=(RESAMPLES, len(numbers)))
    low, high = np.quantile(numbers[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def majority(candidates: Sequence[Candidate]) -> int:
    """Index of the first candidate with the most frequent answer; of equally frequent ones the earliest."""
    counts = Counter(one.answer for one in candidates if one.answer)
    wanted = counts.most_common(1)[0][0] if counts else ""
    return next(at for at, one in enumerate(candidates) if one.answer == wanted)


def most_likely(candidates: Sequence[Candidate]) -> int:
    """Index of the text with the highest mean log-probability of its tokens."""
    return max(range(len(candidates)), key=lambda at: candidates[at].logprob / max(candidates[at].num_tokens, 1e-9))


Rule = Callable[[Course, int], float]
"""(task with samples, how many of them) -> share of right."""
RULES: dict[str, Rule] = {
    "pass@{n}": lambda course, n: float(any(is_right(course, at) for at in range(n))),
    "majority of {n}": lambda course, n: float(is_right(course, majority(course.candidates[:n]))),
    "best of {n} by likelihood": lambda course, n: float(is_right(course, most_likely(course.candidates[:n]))),
}

_WITHOUT_CHECKER = ("majority of {n}", "best of {n} by likelihood")
LIKE_WITH_LIKE = {"likelihood": _WITHOUT_CHECKER, "majority": _WITHOUT_CHECKER}
"""Scorer of a refinement -> the rules that know no more and no less. A checker finds the right one among n samples, so
a refinement with a checker is compared with pass@n."""


def compare(
    samples: Sequence[Course], refined: Mapping[str, Sequence[Course]], rounds: int
) -> tuple[list[Row], list[Difference]]:
    """Rows of all methods; differences of each refinement to the rules that know as much, at its tokens.

    Args:
        samples: tasks with their candidates of best-of-n, at least `rounds` of each.
        refined: name of the scorer -> the same tasks with `rounds` candidates of a refinement.
    Raises: DataError when a task has no answer, or too few candidates.
    """
    for course in [*samples, *(one for courses in refined.values() for one in courses)]:
        if course.task.answer is None or len(course.candidates) < rounds:
            raise DataError(
                f"Task {course.task.id!r} has {len(course.candidates)} candidates and the answer {course.task.answer}.",
                f'Compare tasks with an "answer" and at least {rounds} candidates of every method.',
            )
    even = [rounds] * len(samples)
    ones = [mean([float(is_right(course, at)) for at in range(rounds)]) for course in samples]
    rows = [_row("pass@1", ones, samples, [1] * len(samples))]
    rows += [_row(name.format(n=rounds), _by(rule, samples, even), samples, even) for name, rule in RULES.items()]
    differences = []
    for scorer, courses in refined.items():
        right = [float(is_right(course, best_after(course, rounds))) for course in courses]
        rows.append(_row(f"refine-{rounds} by {scorer}", right, courses, even))
        fitting = [
            _fitting(course, sum(c.tokens for c in one.candidates[:rounds]))
            for course, one in zip(samples, courses, strict=True)
        ]
        for name in LIKE_WITH_LIKE.get(scorer, ("pass@{n}",)):
            rule = RULES[name]
            other = _by(rule, samples, fitting)
            rows.append(_row(f"  {name.format(n='n')}, at its tokens", other, samples, fitting))
            gap = [a - b for a, b in zip(right, other, strict=True)]
            low, high = interval(gap)
            said = f"refine-{rounds} by {scorer} less {name.format(n='n')} at equal tokens"
            differences.append(Difference(name=said, mean=mean(gap), low=low, high=high))
    return rows, differences


def _by(rule: Rule, samples: Sequence[Course], counts: Sequence[int]) -> list[float]:
    return [rule(course, count) for course, count in zip(samples, counts, strict=True)]


def _fitting(course: Course, num_tokens: int) -> int:
    """How many candidates fit in that many tokens, at least one."""
    total, count = 0, 0
    for one in course.candidates:
        total += one.tokens
        if total > num_tokens:
            break
        count += 1
    return max(count, 1)


def _row(name: str, right: Sequence[float], courses: Sequence[Course], counts: Sequence[int]) -> Row:
    used = [sum(one.tokens for one in course.candidates[:n]) for course, n in zip(courses, counts, strict=True)]
    low, high = interval(right)
    return Row(
        name=name, share=mean(right), low=low, high=high, num_samples=mean(list(map(float, counts))),
        num_tokens=mean(list(map(float, used))),
    )  # fmt: skip


HEAD = ("method", "right", "95% interval", "samples", "tokens a task")
DIFFERENCE_HEAD = ("difference", "points", "95% interval", "")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [
        (r.name, f"{r.share:.1%}", f"{r.low:.1%} to {r.high:.1%}", f"{r.num_samples:.1f}", f"{r.num_tokens:.0f}")
        for r in rows
    ]


def difference_cells(differences: Sequence[Difference]) -> list[tuple[str, ...]]:
    return [
        (d.name, f"{100 * d.mean:+.1f}", f"{100 * d.low:+.1f} to {100 * d.high:+.1f}", d.verdict) for d in differences
    ]


def as_text(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal."""
    widths = [max(len(line[at]) for line in [head, *lines]) for at in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    )


def as_html(rows: Sequence[Row], differences: Sequence[Difference]) -> str:
    """The body of page.write_page."""
    lost = [one for one in differences if one.high < 0]
    said = (
        f"Refinement loses {len(lost)} of {len(differences)} comparisons at equal tokens."
        if lost else "Refinement loses no comparison at equal tokens by more than its interval."
    )  # fmt: skip
    return (
        f'<p class="verdict">{said}</p><section><h2>Methods</h2>{table(HEAD, cells(rows))}</section>'
        f"<section><h2>Refinement against the others</h2>"
        f"{table(DIFFERENCE_HEAD, difference_cells(differences))}</section>"
    )
