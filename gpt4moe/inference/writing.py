"""write: prompts of a command in, answers out, on all ranks of a launch; rank 0 alone writes.

    prompts x samples -> requests -> Generator, on each copy of the model -> answers in order -> file, terminal or JSON

One copy gives each answer as soon as those before it are there. Several copies generate some requests for each round,
and meet at its end.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpt4moe.inference.batch import Row
from gpt4moe.inference.files import AnswerFile, Prompt
from gpt4moe.inference.load import LoadedModel
from gpt4moe.inference.pictures import Picture
from gpt4moe.inference.requests import Completion, Limits, Request
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.text import Growing, Words, cut_at_stop, settled
from gpt4moe.parallel.agreement import broadcast_int, raise_together
from gpt4moe.parallel.groups import ProcessGroups

Show = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What a command generates."""

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    """Of each prompt, what the model continues (a chat is rendered)."""
    tokens: Sequence[list[int]]
    """Of each prompt."""
    num_tokens: int
    """New tokens at most."""
    num_samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stops: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    images: Sequence[Sequence[Picture]] = ()
    """Of each prompt; empty: no prompt has any."""
    banned: frozenset[int] = frozenset()
    """Tokens that are never drawn."""

    def settings(self) -> dict[str, Any]:
        """What the answers follow from beside the weights, by the names of a command's options."""
        asked: list[Any] = [(prompt.id, tokens) for prompt, tokens in zip(self.prompts, self.tokens, strict=True)]
        asked += [[image.digest for image in images] for images in self.images]
        return {
            "tokens": self.num_tokens, "num_samples": self.num_samples, **asdict(self.sampling),
            "stop": list(self.stops), "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        }  # fmt: skip

    def requests(self, words: Words) -> list[Request]:
        """All of them, in order: every sample of the first prompt, then of the second."""
        is_stopped = words.stop_test(self.stops)
        return [
            Request(
                prompt=tokens, max_tokens=min(self.num_tokens, words.context_length - len(tokens)),
                sampling=self.sampling, sample=sample, end_ids=words.end_ids,
                is_stopped=is_stopped, images=images, banned=self.banned,
            )
            for tokens, images in zip(self.tokens, self.images or [()] * len(self.tokens), strict=True)
            for sample in range(self.num_samples)
        ]  # fmt: skip

    def answer(self, number: int, done: Completion, words: Words) -> dict[str, Any]:
        """The line of request `number`."""
        prompt = self.prompts[number // self.num_samples]
        sample = {"sample": number % self.num_samples} if self.num_samples > 1 else {}
        text = cut_at_stop(words.decode(done.tokens), self.stops)
        return {
            "id": prompt.id, **sample, "text": text, "tokens": done.tokens, "logprobs": done.logprobs,
            "finish_reason": done.finish_reason,
        }  # fmt: skip


class SharedFile:
    """An AnswerFile for all ranks, of which the first alone opens it. Every method is collective over the world.

    Args:
        path: None: nothing is kept.
        ids, settings: as of AnswerFile.
    Raises: LaunchError or DataError on every rank, as AnswerFile.
    """

    def __init__(self, groups: ProcessGroups, path: Path | None, ids: Sequence[str | int], settings: Mapping[str, Any]):
        self.groups = groups
        self.file: AnswerFile | None = None
        self.found: list[dict[str, Any]] = []
        """On the first rank: the answers that were there already."""
        with raise_together(groups):
            if path is not None and groups.is_first_rank:
                self.file = AnswerFile(path, ids, settings)
                self.found = self.file.read()
        self.num_done = broadcast_int(len(self.found), groups)
        """Answers that were there already."""

    def append(self, answers: Sequence[dict[str, Any]]) -> None:
        with raise_together(self.groups):
            if self.file is not None:
                self.file.append(answers)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def write_file(model: LoadedModel, words: Words, wish: Wish, path: Path, *, weights: Mapping[str, Any]) -> None:
    """Appends the answers that `path` lacks. Collective.

    Args:
        weights: settings that tell one model from another.
    Raises: LaunchError or DataError, on every rank, when the file is in use, of other prompts or settings, or cannot be
        written.
    """
    ids = [prompt.id for prompt in wish.prompts for _ in range(wish.num_samples)]
    file = SharedFile(model.groups, path, ids, {**weights, **wish.settings()})
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[speed]}"))  # fmt: skip
    quiet = not model.groups.is_first_rank
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        bar = progress.add_task("", total=len(ids), completed=file.num_done, speed="")
        num_tokens = 0
        for answer in answers(model, words, wish, skipped=file.num_done):
            file.append([answer])
            num_tokens += len(answer["tokens"])
            elapsed = progress.tasks[0].elapsed or 1
            progress.update(bar, advance=1, speed=f"{num_tokens / max(elapsed, 1e-3):.0f} tokens/s")
    file.close()


def answers(
    model: LoadedModel, words: Words, wish: Wish, *, skipped: int = 0, show: Show | None = None
) -> Iterator[dict[str, Any]]:
    """The answers, in order, on every rank. Collective.

    Args:
        skipped: that many of the first are there already.
        show: gets the text of the first answer that is not done, piece by piece; only where there is one copy.
    """
    # Imported here: it imports DeepSpeed, which looks for an accelerator then (load.placed).
    from gpt4moe.inference.generation import Generator

    requests = wish.requests(words)[skipped:]
    stream = None if show is None else _Stream(words, wish.stops, show)
    maker = model.latent_maker() if wish.images else None
    generator = Generator(model.chunks, model.run, model.groups, limits=wish.limits, read=stream, maker=maker)
    if generator.num_copies == 1:
        found = _in_order(generator.generate(requests), stream)
    else:
        # Each copy's rows change twice in a round, so that short texts make room for others.
        found = _rounds(generator.generate_all, requests, 2 * wish.limits.max_rows * generator.num_copies)
    for number, done in enumerate(found, start=skipped):
        yield wish.answer(number, done, words)


def _in_order(found: Iterator[Completion], stream: "_Stream | None") -> Iterator[Completion]:
    """Completions by their number; one waits for those before it."""
    early: dict[int, Completion] = {}
    number = 0
    for done in found:
        early[done.number] = done
        while number in early:
            if stream is not None:
                stream.finish(early[number])
            yield early.pop(number)
            number += 1


def _rounds(
    generate_all: Callable[[Sequence[Request]], list[Completion]], requests: Sequence[Request], size: int
) -> Iterator[Completion]:
    for start in range(0, len(requests), size):
        yield from generate_all(requests[start : start + size])


class _Stream:
    """Shows one text after the other: of the first that is not done, what is new; of the next, all so far."""

    def __init__(self, words: Words, stops: Sequence[str], show: Show):
        self.words, self.stops, self.show = words, stops, show
        self.number = 0
        self._begin()

    def __call__(self, row: Row) -> None:
        if row.number == self.number:
            self._read(row.generated)
            self._show(settled(cut_at_stop(self.text, self.stops), self.stops))

    def finish(self, done: Completion) -> None:
        """The text of this number is done; it is shown to its end."""
        self._read(done.tokens)
        self._show(cut_at_stop(self.text + self.growing.rest(), self.stops))
        self.number += 1
        self._begin()

    def _begin(self) -> None:
        self.growing = Growing(self.words)
        self.text = ""
        self.num_read = self.num_shown = 0

    def _read(self, tokens: list[int]) -> None:
        self.text += "".join(map(self.growing.add, tokens[self.num_read :]))
        self.num_read = len(tokens)

    def _show(self, text: str) -> None:
        if len(text) > self.num_shown:
            self.show(text[self.num_shown :])
            self.num_shown = len(text)
