"""A search in numbers: the score over rounds, tokens, and what is right where tasks have an answer."""

from collections.abc import Sequence

from gpt4moe.refinement.search import Course, Plan


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def best_after(course: Course, rounds: int) -> int:
    """Index of the best candidate of the first `rounds`."""
    return max(at for at, one in enumerate(course.candidates[:rounds]) if one.is_best)


def best_scores(courses: Sequence[Course], rounds: int) -> list[float]:
    """Mean score over tasks of the best so far, after each round."""
    return [mean([c.candidates[best_after(c, r)].score for c in courses]) for r in range(1, rounds + 1)]


def is_right(course: Course, index: int) -> bool:
    """Whether a candidate has the task's answer."""
    return course.candidates[index].answer == course.task.answer


def right_shares(courses: Sequence[Course], rounds: int) -> list[float] | None:
    """Share of tasks whose best so far is right, after each round; None where a task has no answer."""
    if any(course.task.answer is None for course in courses):
        return None
    return [mean([is_right(c, best_after(c, r)) for c in courses]) for r in range(1, rounds + 1)]


def summary(courses: Sequence[Course], plan: Plan, scorer: str) -> str:
    """Lines for a terminal."""
    scores, shares = best_scores(courses, plan.rounds), right_shares(courses, plan.rounds)
    lines = [
        f"{plan.method} by {scorer}: {len(courses)} tasks x {plan.rounds} rounds, "
        f"{sum(one.tokens for course in courses for one in course.candidates):,} tokens (prompts and new ones)",
        f"score of the best: {scores[0]:.4g} after round 1, {scores[-1]:.4g} after round {plan.rounds}",
    ]
    if shares is not None:
        lines.append(f"right: {shares[0]:.1%} after round 1, {shares[-1]:.1%} after round {plan.rounds}")
        if shares[-1] < shares[0]:
            lines.append("The search lost: its best texts are right less often than its first ones.")
    return "\n".join(lines)
