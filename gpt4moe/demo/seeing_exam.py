"""Examines a vision model on held-out items of the drawn set: what it answers, and what it would answer unseeing.

    seen        each item with its own pictures
    shuffled    each with those of the next item of its kind
    closed      its own pictures, all gates at 0: the text model
    no example  few_shot without its examples

An item of few_shot is a choice of two answers, so 50% is chance. The others are answered in words, greedily.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gpt4moe.data.pictures import decode
from gpt4moe.demo.pictures.drawing import SIDE
from gpt4moe.demo.pictures.items import FEW_SHOT, Item, without_examples
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
                 fields=line["fields"], choices=tuple(line["choices"]))
        )  # fmt: skip
    return found


def shuffled(items: Sequence[Item]) -> list[Item]:
    """Each item with the pictures of the next one of its kind, the last with those of the first."""
    return [replace(item, images=items[(at + 1) % len(items)].images) for at, item in enumerate(items)]


def examine(step: Path, items: Sequence[Item], sheet: Path | None = None) -> dict[str, dict[str, Answers]]:
    """Kind -> way -> answers.

    Args:
        sheet: gets a picture of some answers, and of where each word came from.
    Raises: CheckpointError, ConfigError.
    """
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
