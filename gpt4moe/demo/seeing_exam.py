"""Examines a vision model on held-out items of the drawn set: what it answers, and what it would answer unseeing.

    seen      each item with its own pictures
    shuffled  each with those of the next item of its kind
    closed    its own pictures, all gates at 0: the text model
    0 shots   few_shot without its examples

An item of few_shot is a choice of two answers, so 50% is chance. The others are answered in words, greedily.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt4moe.checkpoint.selection import stored_names
from gpt4moe.data.image_tokens import IMAGE_TOKEN, encode_parts, image_id_of, split_tags
from gpt4moe.data.pictures import decode
from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer
from gpt4moe.demo.pictures.items import Item, read_fields, without_examples
from gpt4moe.inference.load import open_checkpoint, placed_run, read_chunks
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout

FEW_SHOT = "few_shot"
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
    return middle - half, middle + half


def read_items(folder: Path) -> list[Item]:
    """The held-out items of a set, with their pictures."""
    found = []
    for line in map(json.loads, (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()):
        names = [[image] if isinstance(image, str) else image for image in line["images"]]
        pictures = [[decode((folder / name).read_bytes(), 32) for name in frames] for frames in names]
        found.append(
            Item(kind=line["kind"], key=line["key"], images=pictures, prompt=line["prompt"], answer=line["answer"],
                 fields=line["fields"], choices=tuple(line["choices"]))
        )  # fmt: skip
    return found


def shuffled(items: Sequence[Item]) -> list[Item]:
    """Each item with the pictures of the next one of its kind, the last with those of the first."""
    return [replace(item, images=items[(at + 1) % len(items)].images) for at, item in enumerate(items)]


def examine(step: Path, items: Sequence[Item]) -> dict[str, dict[str, Answers]]:
    """Kind -> way -> answers. Raises: CheckpointError."""
    found: dict[str, dict[str, Answers]] = {}
    with opened_eyes(step) as model:
        kinds = list(dict.fromkeys(item.kind for item in items))
        for kind in kinds:
            some = [item for item in items if item.kind == kind]
            found[kind] = {"seen": model.ask(some), "shuffled": model.ask(shuffled(some))}
            if kind == FEW_SHOT:
                found[kind]["0 shots"] = model.ask([without_examples(item) for item in some])
        model.close_gates()
        for kind in kinds:
            found[kind]["closed"] = model.ask([item for item in items if item.kind == kind])
    return found


class Eyes:
    """A vision model in this process."""

    def __init__(self, chunks: list[Any], encoder: Any, tokenizer: Tokenizer, image_id: int):
        from gpt4moe.model.parameters import language_chunks, vision_chunk

        self.language, self.resampler = language_chunks(chunks)[0].eval(), vision_chunk(chunks).eval()
        self.encoder, self.tokenizer, self.image_id = encoder, tokenizer, image_id

    def close_gates(self) -> None:
        with torch.no_grad():
            for name, parameter in self.language.named_parameters():
                if name.endswith("_gate"):
                    parameter.zero_()

    def ask(self, items: Sequence[Item]) -> Answers:
        """Items of one kind."""
        answers = Answers()
        for start in range(0, len(items), _TOGETHER):
            some = items[start : start + _TOGETHER]
            if some[0].kind == FEW_SHOT:
                said = self._chosen(some)
            else:
                said = [f"{text.split('.')[0]}." for text in self._greedy(some)]
            for item, text in zip(some, said, strict=True):
                answers.texts.append(text)
                answers.is_right.append(text == item.answer)
                for name, is_right in read_fields(item, text).items():
                    answers.fields.setdefault(name, []).append(is_right)
        return answers

    def _encode(self, text: str) -> list[int]:
        return encode_parts(self.tokenizer, split_tags(text), self.image_id).tolist()

    def _greedy(self, items: Sequence[Item]) -> list[str]:
        rows = [self._encode(item.prompt) for item in items]
        new: list[list[int]] = [[] for _ in items]
        for _ in range(_MOST_TOKENS):
            logits = self._logits(rows, items)
            for number, row in enumerate(rows):
                token = int(logits[number, len(row) - 1].argmax())
                row.append(token)
                new[number].append(token)
        return [self.tokenizer.decode(tokens) for tokens in new]

    def _chosen(self, items: Sequence[Item]) -> list[str]:
        totals = []
        for choice in range(2):
            prompts = [self._encode(item.prompt) for item in items]
            rows = [self._encode(item.prompt + item.choices[choice]) for item in items]
            scores = self._logits(rows, items).log_softmax(-1)
            totals.append([
                sum(float(scores[number, at - 1, row[at]]) for at in range(len(prompt), len(row)))
                for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
            ])  # fmt: skip
        return [item.choices[int(second > first)] for item, first, second in zip(items, *totals, strict=True)]

    @torch.no_grad()
    def _logits(self, rows: list[list[int]], items: Sequence[Item]) -> Tensor:
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        frames = [torch.from_numpy(frame.copy()) for item in items for image in item.images for frame in image]
        pixels = torch.stack(frames).permute(0, 3, 1, 2)
        counts = [len(image) for item in items for image in item.images]
        latents = self.resampler(self.encoder.features(pixels), counts)
        whole = latents.unflatten(0, (len(items), -1)).permute(1, 2, 0, 3).flatten(0, 1)
        media = (tokens == self.image_id).cumsum(1)
        positions = torch.arange(tokens.shape[1]).expand(len(rows), -1)
        return self.language(tokens, positions, None, extra_block_kwargs={"context": whole, "context_mask": media})


@contextmanager
def opened_eyes(step: Path) -> Iterator[Eyes]:
    opened = open_checkpoint(step)
    run = placed_run(opened)
    assert run.model.vision is not None
    here = Environment(rank=0, world_size=1, local_rank=0, master=None, source="one process")
    with world(here) as device:
        from gpt4moe.model.gpt import build_model
        from gpt4moe.model.vision_encoder import FrozenEncoder

        groups = ProcessGroups.create(Layout.from_config(run.parallel, 1), 0, device, run.run.seed)
        chunks = build_model(run, groups, loaded=frozenset(stored_names(run.model)))
        read_chunks(opened, chunks, groups)
        encoder = FrozenEncoder(run.model.vision.encoder, run.run.seed, device, torch.float32)
        path = Path(run.data.path) / "tokenizer.json"
        tokenizer = load_tokenizer(path)
        yield Eyes(chunks, encoder, tokenizer, image_id_of(tokenizer, path, IMAGE_TOKEN))
