"""Which choice is taken, of given log-likelihoods."""

import json
from pathlib import Path

import pytest
import tokenizers

from gpt4moe.data.tokenizer import train_tokenizer
from gpt4moe.errors import DataError
from gpt4moe.evaluation.questions import ChoiceQuestion, _answered, read_choices, read_exact
from gpt4moe.inference.text import Words


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


def test_a_question_may_be_a_chat_and_is_asked_through_the_template(tmp_path: Path) -> None:
    words = Words(
        backend=tokenizers.Tokenizer.from_str(train_tokenizer(["1 + 1"], vocab_size=257).backend.to_str()),
        end_ids=frozenset({0}), vocab_size=257, context_length=64,
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %} ->",
    )  # fmt: skip
    path, messages = tmp_path / "items.jsonl", [{"role": "user", "content": "1 + 1"}]
    path.write_text(json.dumps({"messages": messages, "answer": "2"}) + "\n")
    (question,) = read_exact(path, words, 4)
    assert words.decode(list(question.request.prompt), is_whole=True) == "user: 1 + 1 ->"
    for wrong in ({"answer": "2"}, {"prompt": "x", "messages": messages, "answer": "2"}):
        path.write_text(json.dumps(wrong) + "\n")
        with pytest.raises(DataError, match="of prompt and messages"):
            read_exact(path, words, 4)
    path.write_text(json.dumps({"prompt": "1", "answer": "2", "choices": ["1", "2"], "images": ["a.png"]}) + "\n")
    for read in (lambda: read_exact(path, words, 4), lambda: read_choices(path, words)):
        with pytest.raises(DataError, match="has images, and questions are read as text alone"):
            read()
