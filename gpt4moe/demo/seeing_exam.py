"""Examines a vision model on held-out items of the drawn set: what it answers, and what it would answer unseeing.

    seen        each item with its own pictures
    shuffled    each with those of another item of its kind, for which its answer is wrong, if possible in every field
    closed      its own pictures, all gates at 0: the text model
    no example  few_shot without its examples
    constant    no model: the same answer to all items, the one that is right most often; of each field by itself

Who goes by the pictures has 0% shuffled; who answers without looking has as much there as seen. All are answered in
words, greedily. Of few_shot the examples have two words: who takes one of them has half of the items right.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt4moe.data.pictures import decode
from gpt4moe.demo.pictures.drawing import SIDE
from gpt4moe.demo.pictures.items import FEW_SHOT, Item, fields_denied, without_examples
from gpt4moe.demo.seeing_answers import Answers, Examiner
from gpt4moe.demo.seeing_sheet import write_answers
from gpt4moe.inference.load import LoadedModel, loaded_model, open_checkpoint

NO_EXAMPLE = "no example"
_SHOWN = 3
"""Items of each kind in a sheet."""


def read_items(folder: Path) -> list[Item]:
    """The held-out items of a set, with their pictures."""
    found = []
    for line in map(json.loads, (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()):
        names = [[image] if isinstance(image, str) else image for image in line["images"]]
        pictures = [[decode((folder / name).read_bytes(), SIDE) for name in frames] for frames in names]
        found.append(
            Item(kind=line["kind"], key=line["key"], images=pictures, prompt=line["prompt"], answer=line["answer"],
                 fields=line["fields"])
        )  # fmt: skip
    return found


def shuffled(items: Sequence[Item]) -> list[Item]:
    """Each item of one kind with the pictures of the next one, in a circle, that deny most fields of its answer."""
    found = []
    for at, item in enumerate(items):
        others = [*items[at + 1 :], *items[:at]]
        found.append(replace(item, images=max(others, key=lambda other: fields_denied(item, other)).images))
    return found


def constant(items: Sequence[Item]) -> dict[str, Any]:
    """What one answer to all items of a kind gets, and how many keys they have."""
    return {
        "keys": len({item.key for item in items}),
        "right": _most([item.answer for item in items]),
        "fields": {name: _most([item.fields[name] for item in items]) for name in items[0].fields},
    }  # fmt: skip


def _most(answers: Sequence[str]) -> float:
    return max(Counter(answers).values()) / len(answers)


def examine(step: Path, items: Sequence[Item], sheet: Path | None = None) -> dict[str, dict[str, Answers]]:
    """Kind -> way -> answers.

    Args:
        items: at least two of each kind.
        sheet: gets a picture of some answers, and of where each word came from.
    Raises: CheckpointError, ConfigError.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of matrices as small as these more threads cost more than they give
    try:
        return _examine(step, items, sheet)
    finally:
        torch.set_num_threads(threads)


def _examine(step: Path, items: Sequence[Item], sheet: Path | None) -> dict[str, dict[str, Answers]]:
    kinds = {item.kind: [other for other in items if other.kind == item.kind] for item in items}
    found: dict[str, dict[str, Answers]] = {}
    with loaded_model(step) as model:
        examiner = Examiner(model, open_checkpoint(step).words())
        if sheet is not None:
            shown = [item for some in kinds.values() for item in some[:_SHOWN] if len(item.images) == 1]
            write_answers(sheet, model, examiner, shown)
        for kind, some in kinds.items():
            found[kind] = {"seen": examiner.ask(some), "shuffled": examiner.ask(shuffled(some))}
            if kind == FEW_SHOT:
                found[kind][NO_EXAMPLE] = examiner.ask([without_examples(item) for item in some])
        close_gates(model)
        for kind, some in kinds.items():
            found[kind]["closed"] = examiner.ask(some)
    return found


@torch.no_grad()
def close_gates(model: LoadedModel) -> None:
    """The model answers as its text model does."""
    for name, parameter in model.chunk.named_parameters():
        if name.endswith("_gate"):
            parameter.zero_()
