"""Questions with known answers: multiple choice by log-likelihood, exact match by greedy generation.

    choices  {"prompt": ..., "choices": [...], "answer": its number from 0, or its text}
    exact    {"prompt": ..., "answer": a text or several that are right, "stop": texts that end the answer}
             {"messages": [{"role": "user", "content": ...}], "answer": ...} through the chat template
    both     "images": a file for each <image> of the prompt, or a list of files: the frames of a clip

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
from gpt4moe.data.image_tokens import split_tags
from gpt4moe.data.lines import Types, read_lines, require_own_ids
from gpt4moe.errors import DataError
from gpt4moe.evaluation.pieces import Piece, answer_piece, encode_pair, encode_text, first_token
from gpt4moe.inference.files import clips_of_line, has_image_parts
from gpt4moe.inference.pictures import Picture
from gpt4moe.inference.requests import Request
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.sight import Clip, Sight, sight_of
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

    @property
    def images(self) -> Sequence[Picture]:
        return self.pieces[0].images


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactQuestion:
    """A line of --exact."""

    id: str | int
    answers: list[str]
    """Any of them is right."""
    stops: list[str]
    request: Request

    @property
    def images(self) -> Sequence[Picture]:
        return self.request.images


Question = ChoiceQuestion | ExactQuestion


def read_choices(path: Path, words: Words, sight: Sight | None = None) -> list[ChoiceQuestion]:
    """
    Args:
        sight: how the model reads prompts with images; None: questions with images are refused.
    Raises: DataError with the first line that is none, has no such answer, or does not fit the context; DataError or
        ConfigError for images that are none, or that the model does not read.
    """
    types: Types = {"prompt": str, "choices": list, "answer": (int, str)}
    found = read_lines(path, types, needed=list(types), example=_CHOICES)
    require_own_ids(path, found)
    return [_choice(path, line, words, sight) for line in found]


def _clips(path: Path, line: dict[str, Any], sight: Sight | None) -> list[Clip]:
    """The images of a question. Raises: DataError, as read_choices."""
    where = _where(path, line)
    if sight is not None:
        return clips_of_line(where, line["whole"], path.parent)
    # A model would answer as one that sees no images.
    if line["whole"].get("images") or has_image_parts(line["whole"].get("messages")):
        raise DataError(
            f"{where} has images, and questions are read as text alone.",
            "Leave them out, or ask a checkpoint with tools/evaluate.py, which reads images.",
        )
    return []


def _where(path: Path, line: dict[str, Any]) -> str:
    return f"{path}, line {line['line']}"


def _choice(path: Path, line: dict[str, Any], words: Words, sight: Sight | None) -> ChoiceQuestion:
    where, clips = _where(path, line), _clips(path, line, sight)
    if sight is not None:
        sight.require_tags(line["prompt"], len(clips), is_chat=False, what=where)
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
    seen: Sequence[Picture] | None = None
    for choice in choices:
        before, after = _encoded(words, line["prompt"], choice, sight if clips else None)
        _require_fit(where, "prompt and choice have", len(before) + len(after), words.context_length + 1)
        if seen is None:  # all choices stand behind the same images
            seen = sight.pictures(before, clips) if sight is not None else ()
        pieces.append(replace(answer_piece(before, after, words.context_length), images=seen))
    return ChoiceQuestion(id=line["id"], choices=choices, answer=answer, pieces=pieces)


def _encoded(words: Words, prompt: str, choice: str, sight: Sight | None) -> tuple[list[int], list[int]]:
    """Tokens of prompt and choice. sight: of a prompt with images, whose texts are encoded each by itself as in
    training: the choice continues the last one."""
    if sight is None:
        before, after = encode_pair(partial(encode_text, words), prompt, choice)
        return before or [first_token(words)], after
    assert sight.image_id is not None  # require_tags
    head, _, tail = prompt.rpartition(sight.token)
    first = words.encode_parts([*split_tags(head, sight.token), None], sight.image_id)
    before, after = encode_pair(partial(encode_text, words), tail, choice)
    return [*first, *before], after


def _require_fit(where: str, what: str, num_tokens: int, most: int) -> None:
    if num_tokens > most:
        raise DataError(f"{where}: {what} {num_tokens} tokens, the context takes {most}.", "Shorten the prompt.")


def read_exact(path: Path, words: Words, num_tokens: int, sight: Sight | None = None) -> list[ExactQuestion]:
    """Args: num_tokens: of an answer at most; sight: as of read_choices. Raises: as read_choices."""
    types: Types = {"prompt": str, "answer": (str, list), "stop": (str, list)}
    found = read_lines(path, types, needed=("answer",), example=_EXACT)
    require_own_ids(path, found)
    return [_exact(path, line, words, num_tokens, sight) for line in found]


def _exact(path: Path, line: dict[str, Any], words: Words, num_tokens: int, sight: Sight | None) -> ExactQuestion:
    where, clips = _where(path, line), _clips(path, line, sight)
    answers, stops = (value if isinstance(value, list) else [value] for value in (line["answer"], line.get("stop", [])))
    if not answers or "" in stops:
        raise DataError(f"{where} has answers {answers!r} and stops {stops!r}.",
                        "Give one answer or more; leave stop out, or give texts that are not empty.")  # fmt: skip
    messages = line["whole"].get("messages")
    if ("prompt" in line) == (messages is not None):
        raise DataError(f"{where} has {'both' if messages else 'neither'} of prompt and messages.", f"Write {_EXACT}.")
    text, is_chat = (line["prompt"], False) if messages is None else (words.render(messages), True)
    if sight is not None:
        sight.require_tags(text, len(clips), is_chat=is_chat, what=where)
    if sight is not None and clips:
        prompt = sight.encode(text, len(clips), is_chat=is_chat, what=where)
    elif is_chat:
        prompt = words.encode(text, is_chat=True)
    else:
        prompt = encode_text(words, text) or [first_token(words)]
    _require_fit(where, "the prompt has", len(prompt), words.context_length - 1)
    request = greedy_request(words, prompt, min(num_tokens, words.context_length - len(prompt)), stops)
    if sight is not None:
        request = replace(request, images=sight.pictures(prompt, clips), banned=sight.banned)
    return ExactQuestion(id=line["id"], answers=answers, stops=stops, request=request)


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
    """Answers questions on the ranks of a model. Their images' latents are made by the scorer's maker."""

    def __init__(self, scorer: "Scorer", run: RunConfig, words: Words):
        # Imported here: it imports DeepSpeed, which looks for an accelerator then (inference.load.placed).
        from gpt4moe.inference.generation import Generator

        self.scorer, self.words = scorer, words
        self.banned = sight_of(run, words, None).banned
        self.generator = Generator(scorer.chunks, run, scorer.groups, maker=scorer.images.maker)

    def answer(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """A line of answers for each question, in their order, on every rank. Collective over the world."""
        choices = [question for question in questions if isinstance(question, ChoiceQuestion)]
        exact = [question for question in questions if isinstance(question, ExactQuestion)]
        scores = iter(self.scorer.score([piece for question in choices for piece in question.pieces]))
        requests = [replace(one.request, banned=self.banned | one.request.banned) for one in exact]
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
