"""Which choice is taken, of given log-likelihoods."""

import pytest

from gpt4moe.evaluation.questions import ChoiceQuestion, _answered


def chosen(choices: list[str], totals: list[float]) -> tuple[int, int]:
    """(by log-likelihood, by log-likelihood a character)."""
    line = _answered(ChoiceQuestion(id=1, choices=choices, answer=0, pieces=[]), totals)
    return line["chosen"], line["chosen_normalised"]


def test_of_equally_likely_choices_the_first_is_taken() -> None:
    assert chosen(["aa", "bb", "cc"], [-2.0, -1.0, -1.0]) == (1, 1)


@pytest.mark.parametrize(
    ("choices", "totals", "wanted"),
    [
        (["abcd", "ab"], [-4.0, -3.0], (1, 0)),
        (["\u00e9\u00e9", "abc"], [-2.0, -2.7], (0, 1)),  # 2 characters of 4 bytes: -1.0, or -0.5 a byte
        ([" ab", "abcd"], [-2.4, -3.6], (0, 1)),  # the space is the delimiter: -1.2, not -0.8
        ([" ", "ab"], [-1.0, -3.0], (0, 0)),
    ],
)  # fmt: skip
def test_a_choice_has_the_characters_that_the_harness_counts(
    choices: list[str], totals: list[float], wanted: tuple[int, int]
) -> None:
    assert chosen(choices, totals) == wanted
