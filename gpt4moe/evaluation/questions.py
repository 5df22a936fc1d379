"""Questions with known answers: multiple choice by log-likelihood, exact match by greedy generation.

    choices  {"prompt": ..., "choices": [...], "answer": its number from 0, or its text}
    exact    {"prompt": ..., "answer": a text or several that are right, "stop": texts that end the answer}
             {"messages": [{"role": "user", "content": ...}], "answer": ...} through the chat template

Multiple choice takes the choice of the largest log-likelihood after the prompt; length-normalised, of the largest
log-likelihood divided by the choice's characters, as lm-evaluation-harness does (acc and acc_norm). There the space
between prompt and choice is the task's delimiter, no part of the choice; here it begins the choice, and is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt4moe.config.run import RunConfig
from gpt4moe.data.lines import Types, read_lines, require_own_ids
from gpt4moe.errors import DataError
from gpt4moe.evaluation.pieces import Piece, answer_piece, encode_pair, encode_text, first_token
from gpt4moe.inference.files import has_image_parts
from gpt4moe.inference.requests import Request
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.sight import sight_of
from gpt4moe.inference.text import Words, cut_at_stop

if TYPE_CHECKING:  # it imports DeepSpeed, which looks for an accelerator then (inference.load.placed)
    from gpt4moe.evaluation.scoring import Scorer

_CHOICES = '{"prompt": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0}'
_EXACT = '{"prompt": "1 + 1 =", "answer": "2", "stop": "\\n"}'


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceQuestion:
    """A line of --choices."""

    id: str | int
    choices: list[str]
    answer: int
    pieces: list[Piece]
    """Of each choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactQuestion:
    """A line of --exact."""

    id: str | int
    answers: list[str]
    """Any of them is right."""
    stops: list[str]
    request: Request


Question = ChoiceQuestion | ExactQuestion


def read_choices(path: Path, words: Words) -> list[ChoiceQuestion]:
    """Raises: DataError with the first line that is none, has no such answer, or does not fit the context."""
    types: Types = {"prompt": str, "choices": list, "answer": (int, str)}
    found = read_lines(path, types, needed=list(types), example=_CHOICES)
    require_own_ids(path, found)
    return [_choice(f"{path}, line {line['line']}", line, words) for line in found]


def _require_text(where: str, line: dict[str, Any]) -> None:
    """A model would answer as one that sees no images."""
    if line["whole"].get("images") or has_image_parts(line["whole"].get("messages")):
        raise DataError(
            f"{where} has images, and questions are read as text alone.",
            "Leave them out, or ask with tools/generate.py --input, which reads images.",
        )


def _choice(where: str, line: dict[str, Any], words: Words) -> ChoiceQuestion:
    _require_text(where, line)
    choices, answer = line["choices"], line["answer"]
    if len(choices) < 2 or "" in choices:
        raise DataError(f"{where} has choices {choices!r}.", "Give two or more, none of them empty.")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, str) or not 0 <= answer < len(choices):
        raise DataError(
            f"{where} has answer {answer!r}, which is none of its {len(choices)} choices.",
            f"Give a number from 0 to {len(choices) - 1}, or the text of a choice.",
        )
    pieces = []
    for choice in choices:
        before, after = _encoded(words, line["prompt"], choice)
        _require_fit(where, "prompt and choice have", len(before) + len(after), words.context_length + 1)
        pieces.append(answer_piece(before, after, words.context_length))
    return ChoiceQuestion(id=line["id"], choices=choices, answer=answer, pieces=pieces)


def _encoded(words: Words, prompt: str, choice: str) -> tuple[list[int], list[int]]:
    before, after = encode_pair(partial(encode_text, words), prompt, choice)
    return before or [first_token(words)], after


def _require_fit(where: str, what: str, num_tokens: int, most: int) -> None:
    if num_tokens > most:
        raise DataError(f"{where}: {what} {num_tokens} tokens, the context takes {most}.", "Shorten the prompt.")


def read_exact(path: Path, words: Words, num_tokens: int) -> list[ExactQuestion]:
    """Args: num_tokens: of an answer at most. Raises: DataError, as read_choices."""
    types: Types = {"prompt": str, "answer": (str, list), "stop": (str, list)}
    found = read_lines(path, types, needed=("answer",), example=_EXACT)
    require_own_ids(path, found)
    return [_exact(f"{path}, line {line['line']}", line, words, num_tokens) for line in found]


def _exact(where: str, line: dict[str, Any], words: Words, num_tokens: int) -> ExactQuestion:
    _require_text(where, line)
    answers, stops = (value if isinstance(value, list) else [value] for value in (line["answer"], line.get("stop", [])))
    if not answers or "" in stops:
        raise DataError(f"{where} has answers {answers!r} and stops {stops!r}.",
                        "Give one answer or more; leave stop out, or give texts that are not empty.")  # fmt: skip
    messages = line["whole"].get("messages")
    if ("prompt" in line) == (messages is not None):
        raise DataError(f"{where} has {'both' if messages else 'neither'} of prompt and messages.", f"Write {_EXACT}.")
    if messages is not None:
        prompt = words.encode(words.render(messages), is_chat=True)
    else:
        prompt = encode_text(words, line["prompt"]) or [first_token(words)]
    _require_fit(where, "the prompt has", len(prompt), words.context_length - 1)
    return ExactQuestion(
        id=line["id"], answers=answers, stops=stops,
        request=greedy_request(words, prompt, min(num_tokens, words.context_length - len(prompt)), stops),
    )  # fmt: skip


def greedy_request(
    words: Words, prompt: list[int], num_tokens: int, stops: Sequence[str], banned: frozenset[int] = frozenset()
) -> Request:
    """The most probable text after a prompt, until an end token or one of `stops`.

    Args:
        banned: Sight.banned of the model.
    """
    return Request(
        prompt=prompt, max_tokens=num_tokens, sampling=Sampling(temperature=0), end_ids=words.end_ids,
        is_stopped=words.stop_test(stops), banned=banned,
    )  # fmt: skip


class Examiner:
    """Answers questions on the ranks of a model."""

    def __init__(self, scorer: "Scorer", run: RunConfig, words: Words):
        # Imported here: it imports DeepSpeed, which looks for an accelerator then (inference.load.placed).
        from gpt4moe.inference.generation import Generator

        self.scorer, self.words = scorer, words
        self.banned = sight_of(run, words, None).banned
        self.generator = Generator(scorer.chunks, run, scorer.groups)

    def answer(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """A line of answers for each question, in their order, on every rank. Collective over the world."""
        choices = [question for question in questions if isinstance(question, ChoiceQuestion)]
        exact = [question for question in questions if isinstance(question, ExactQuestion)]
        scores = iter(self.scorer.score([piece for question in choices for piece in question.pieces]))
        requests = [replace(question.request, banned=self.banned) for question in exact]
        texts = iter(self.generator.generate_all(requests))
        found = []
        for question in questions:
            if isinstance(question, ChoiceQuestion):
                found.append(_answered(question, [next(scores).total for _ in question.pieces]))
            else:
                found.append(_matched(question, self.words.decode(next(texts).tokens)))
        return found


def _answered(question: ChoiceQuestion, totals: list[float]) -> dict[str, Any]:
    mean = [
        total / max(len(choice.removeprefix(" ")), 1) for total, choice in zip(totals, question.choices, strict=True)
    ]
    chosen, normalised = (values.index(max(values)) for values in (totals, mean))
    return {
        "id": question.id, "kind": "choices", "loglikelihoods": totals, "chosen": chosen,
        "chosen_normalised": normalised, "answer": question.answer, "is_right": chosen == question.answer,
        "is_right_normalised": normalised == question.answer,
    }  # fmt: skip


def _matched(question: ExactQuestion, whole: str) -> dict[str, Any]:
    text = cut_at_stop(whole, question.stops).strip()
    is_right = text in [answer.strip() for answer in question.answers]
    return {"id": question.id, "kind": "exact", "text": text, "answers": question.answers, "is_right": is_right}
