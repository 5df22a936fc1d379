"""The comparison, on candidates with known answers; what the best is; templates."""

from dataclasses import replace

import pytest

from gpt4moe.errors import ConfigError, DataError
from gpt4moe.refinement.comparison import as_html, compare, interval, majority, most_likely
from gpt4moe.refinement.search import Candidate, Course, Plan, pieces
from gpt4moe.refinement.summary import best_scores, right_shares, summary
from gpt4moe.refinement.tasks import Task, require_template


def course(answers: str, *, right: str = "a", scores: str = "", tokens: int = 10) -> Course:
    """A task with one candidate for each letter; a score is a digit."""
    found = Course(Task(id=answers, text="?", fields={"answer": right}))
    best = -1.0
    for at, answer in enumerate(answers):
        score = float(scores[at]) if scores else 0.0
        found.candidates.append(
            Candidate(round=at, prompt="?", text=answer, answer=answer, score=score, is_best=score > best,
                      logprob=-float(at), num_prompt_tokens=tokens - 1, num_tokens=1)
        )  # fmt: skip
        best = max(best, score)
    return found


def test_shares_are_those_counted_by_hand() -> None:
    samples = [course("abbb"), course("bbaa"), course("cccc"), course("aaaa")]
    refined = [course(s.task.id, scores="0123", tokens=20) for s in samples]
    rows, differences = compare(samples, {"checker": refined, "majority": refined}, 2)
    shares = {row.name: row.share for row in rows}
    assert shares["pass@1"] == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert shares["pass@2"] == 0.5 and shares["majority of 2"] == 0.5
    assert shares["refine-2 by checker"] == 0.25  # the last of two: b, b, c, a
    twice = {row.name.strip(): row for row in rows if row.name.startswith("  ")}
    # Its prompts are twice as long, so four samples fit where it has two.
    assert twice["pass@n, at its tokens"].num_samples == 4 and twice["pass@n, at its tokens"].share == 0.75
    assert [one.mean for one in differences] == pytest.approx([0.25 - 0.75, 0.25 - 0.25, 0.25 - 0.5])
    assert "loses" in as_html(rows, differences)


def test_the_majority_is_the_earliest_of_the_most_frequent() -> None:
    assert majority(course("abba").candidates) == 0
    assert majority(course("cabab").candidates) == 1
    assert most_likely(course("cab").candidates) == 0


def test_the_most_likely_text_has_the_highest_mean() -> None:
    short, long = course("ab").candidates
    found = [replace(short, logprob=-2.0, num_tokens=1), replace(long, logprob=-3.0, num_tokens=3)]
    assert most_likely(found) == 1


def test_an_interval_holds_the_mean_and_shrinks_with_tasks() -> None:
    low, high = interval([0.0, 1.0] * 10)
    wide = high - low
    low, high = interval([0.0, 1.0] * 1000)
    assert low < 0.5 < high and high - low < wide / 5
    assert interval([1.0] * 9) == (1.0, 1.0)


def test_tasks_without_an_answer_are_not_compared() -> None:
    bare = Course(Task(id=1, text="?", fields={}), course("ab").candidates)
    with pytest.raises(DataError, match="answer None"):
        compare([bare], {}, 2)
    assert right_shares([bare], 2) is None


def test_a_search_that_lost_says_so() -> None:
    found = [course("ab", scores="12"), course("ca", scores="11")]
    assert best_scores(found, 2) == [1.0, 1.5] and right_shares(found, 2) == [0.5, 0.0]
    assert "lost" in summary(found, Plan(method="refine", rounds=2, max_tokens=1), "x")


def test_rounds_go_on_in_the_middle_of_one() -> None:
    tasks = [course("")] * 3
    assert [len(some) for some in pieces(tasks, 0, 2, 2)] == [2, 1, 2, 1]
    assert [len(some) for some in pieces(tasks, 4, 3, 9)] == [2, 3]
    assert list(pieces(tasks, 6, 2, 2)) == []


def test_an_answer_is_the_last_match() -> None:
    plan = Plan(method="refine", rounds=1, max_tokens=1, answer_pattern=r"= *(\w+)")
    assert [plan.answer_of(text) for text in ("1 = 2, so x = 7.", "none")] == ["7", ""]


@pytest.mark.parametrize("template", ["{task}", "{best} {gone}", "{best", "{} {best}", "{best.x}",
                                      "{task.__class__}{best}", "{best:>99999999999}", "{best!r}", "{best:{task}}",
                                      "{best}\udcff"])  # fmt: skip
def test_a_template_that_means_nothing_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="--template"):
        require_template("--template", template, "best")


def test_a_template_takes_plain_names_and_doubled_braces() -> None:
    require_template("--template", "{{x}} {task} {round}: {best} ({score})", "best")
