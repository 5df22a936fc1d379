"""Texts out in the form of OpenAI's API: one object, or the pieces of a stream."""

import time
import uuid
from typing import Any

from gpt4moe.inference.requests import Completion
from gpt4moe.inference.text import Growing, Words, cut_at_stop, settled
from gpt4moe.serving.desk import Event
from gpt4moe.serving.fields import Question


class Answer:
    """The answer to one HTTP request while it grows."""

    def __init__(self, question: Question, words: Words, model: str):
        self.question, self.words = question, words
        self.kind = "chat.completion" if question.is_chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if question.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
                     "created": int(time.time()), "model": model}  # fmt: skip
        count = len(question.wanted)
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.texts = [Growing(words) for _ in range(count)]
        self.held = [""] * count
        """The end of each text that no piece has shown."""
        self.offsets: list[list[int]] = [[] for _ in range(count)]
        """Where in its text each token's character begins."""
        self.num_told = [0] * count
        """Tokens whose log-probabilities a piece has had."""
        self.done: dict[int, Completion] = {}

    @property
    def is_done(self) -> bool:
        return len(self.done) == len(self.question.wanted)

    def add(self, event: Event) -> None:
        if event.done is not None:
            self.done[event.index] = event.done
        elif event.token is not None:
            self.tokens[event.index].append(event.token)
            self.offsets[event.index].append(self.texts[event.index].length)
            self.held[event.index] += self.texts[event.index].add(event.token)
            self.logprobs[event.index].append(event.logprob)

    def whole(self) -> dict[str, Any]:
        """When all texts are done."""
        choices = []
        for index, wanted in enumerate(self.question.wanted):
            done = self.done[index]
            text = cut_at_stop(self.words.decode(done.tokens), wanted.stops)
            said = {"message": {"role": "assistant", "content": text}} if self.question.is_chat else {"text": text}
            choices.append(self._choice(index, said, done.finish_reason, 0))
        return {**self.head, "object": self.kind, "choices": choices, "usage": self._usage()}

    def begin(self) -> list[dict[str, Any]]:
        """The first pieces of a stream."""
        if not self.question.is_chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._piece([self._choice(index, said, None, None)]) for index in range(len(self.question.wanted))]

    def piece(self, index: int) -> dict[str, Any] | None:
        """What is new in a text; None: nothing that further tokens could not change."""
        stops, done = self.question.wanted[index].stops, self.done.get(index)
        if done is None:
            new = settled(cut_at_stop(self.held[index], stops), stops)
            if not new:
                return None
        else:
            new = cut_at_stop(self.held[index] + self.texts[index].rest(), stops)
        self.held[index] = self.held[index][len(new) :]
        said = {"delta": {"content": new}} if self.question.is_chat else {"text": new}
        first, self.num_told[index] = self.num_told[index], len(self.tokens[index])
        return self._piece([self._choice(index, said, done.finish_reason if done else None, first)])

    def end(self) -> list[dict[str, Any]]:
        """The last pieces of a stream."""
        return [{**self._piece([]), "usage": self._usage()}] if self.question.has_usage else []

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if self.question.is_chat else self.kind
        return {**self.head, "object": kind, "choices": choices}

    def _choice(self, index: int, said: dict[str, Any], reason: str | None, first: int | None) -> dict[str, Any]:
        """Args: first: log-probabilities from this token on; None: none."""
        logprobs = self._logprobs(index, first) if self.question.has_logprobs and first is not None else None
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, first: int) -> dict[str, Any]:
        pairs = list(zip(self.tokens[index], self.logprobs[index], strict=True))[first:]
        texts = [self.words.decode([token]) for token, _ in pairs]
        if self.question.is_chat:
            content = [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, (_, logprob) in zip(texts, pairs, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {"tokens": texts, "token_logprobs": [logprob for _, logprob in pairs], "top_logprobs": None,
                "text_offset": self.offsets[index][first:]}  # fmt: skip

    def _usage(self) -> dict[str, int]:
        count = len(self.question.wanted) // self.question.num_prompts
        prompt = sum(len(wanted.prompt) for wanted in self.question.wanted[::count])
        completion = sum(map(len, self.tokens))
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
