"""Asks a vision model in this process, in the way of tools/generate.py. Part of the room demo."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt4moe.demo.pictures.items import Item, read_fields
from gpt4moe.inference.load import LoadedModel
from gpt4moe.inference.pictures import picture
from gpt4moe.inference.requests import Limits, Request
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.sight import sight_of
from gpt4moe.inference.text import Words

_MOST_TOKENS, _TOGETHER = 12, 50
_Z_95 = 1.96


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Of the items of one kind, asked in one way."""

    texts: list[str] = field(default_factory=list)
    is_right: list[bool] = field(default_factory=list)
    fields: dict[str, list[bool]] = field(default_factory=dict)

    def score(self) -> dict[str, Any]:
        """Shares that are right, and the 95% interval of the whole answers' (Wilson)."""
        low, high = wilson(sum(self.is_right), len(self.is_right))
        shares = {name: sum(some) / len(some) for name, some in self.fields.items()}
        return {"number": len(self.is_right), "right": sum(self.is_right) / len(self.is_right), "low": low,
                "high": high, "fields": shares}  # fmt: skip


def wilson(right: int, number: int) -> tuple[float, float]:
    """95% interval of a share, by Wilson's score."""
    share, z2 = right / number, _Z_95**2
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = _Z_95 / (1 + z2 / number) * math.sqrt(share * (1 - share) / number + z2 / (4 * number**2))
    return max(0.0, middle - half), min(1.0, middle + half)


class Examiner:
    """Asks a vision model in this process, in the way of tools/generate.py."""

    def __init__(self, model: LoadedModel, words: Words):
        # Imported here: it imports DeepSpeed, which looks for an accelerator then (inference.load.placed).
        from gpt4moe.inference.generation import Generator

        self.sight = sight_of(model.run, words, None)
        limits = Limits(max_rows=_TOGETHER)
        self.generator = Generator(
            model.chunks, model.run, model.groups, limits=limits, maker=model.latent_maker()
        )  # fmt: skip

    def ask(self, items: Sequence[Item]) -> Answers:
        answers = Answers()
        texts = self.generator.generate_all([self._request(item) for item in items])
        for item, text in zip(items, texts, strict=True):
            said = self.sight.words.decode(text.tokens)
            answers.texts.append(said)
            answers.is_right.append(said.split(".")[0] == item.answer.split(".")[0])
            for name, is_right in read_fields(item, said).items():
                answers.fields.setdefault(name, []).append(is_right)
        return answers

    def _request(self, item: Item) -> Request:
        """The most probable answer, up to its full stop."""
        words = self.sight.words
        prompt = self.sight.encode(item.prompt, len(item.images), is_chat=False, what=item.key)
        places = [place for place, token in enumerate(prompt) if token == self.sight.image_id]
        images = [picture(np.stack(frames), place) for frames, place in zip(item.images, places, strict=True)]
        return Request(
            prompt=prompt, max_tokens=_MOST_TOKENS, sampling=Sampling(temperature=0),
            end_ids=words.end_ids, is_stopped=words.stop_test(["."]), images=images, banned=self.sight.banned,
        )  # fmt: skip
