"""What the command line says and hears: sizes like 5GB, answers in lines. No torch."""

import argparse
import re
from collections.abc import Iterator
from typing import Any

from gpt4moe.checkpoint.inspection_text import size, table

Answer = dict[str, Any]

_SHOWN = 20  # rows; --json has all
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def byte_size(text: str) -> int:
    """5GB, 500 MB, 1.5GB or plain bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?B?)", text.strip().upper())
    size_bytes = int(float(match.group(1)) * _UNITS[match.group(2)]) if match and match.group(2) in _UNITS else 0
    if size_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 5GB or 500MB")
    return size_bytes


def whole_numbers(text: str) -> list[int]:
    """8,8,7."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list like 8,8,7") from error


def conversion_lines(answer: Answer) -> Iterator[str]:
    """Sizes of what was written, or would be."""
    rows = [(file["name"], size(file["size_bytes"])) for file in answer["files"]]
    yield from table(("FILE", "SIZE"), rows[:_SHOWN])
    if len(rows) > _SHOWN:
        yield f"... and {len(rows) - _SHOWN} more (--json lists all)"
    yield from answer.get("notes", [])
    verb, tempo = ("would write", "") if answer["dry_run"] else ("wrote", f", {_tempo(answer)}")
    yield f"{verb} {answer['out']}: {len(rows)} files, {size(answer['size_bytes'])}{tempo}"


def verification_lines(answer: Answer) -> Iterator[str]:
    """What differs, or that nothing does."""
    for side in ("a", "b"):
        yield from (f"only in {answer[side]}: {name}" for name in answer[f"only_in_{side}"])
    yield from (f"{row['tensor']}: shape {row['a']} and {row['b']}" for row in answer["other_shape"])
    yield from (f"model.{row['setting']}: {row['a']} and {row['b']}" for row in answer["settings"])
    yield from (f"another value than its copies: {copy}" for copy in answer["copies"])
    rows = [
        (row["tensor"], f"{row['elements']} of {row['of']}",
         "not finite" if row["max_abs"] is None else f"{row['max_abs']:.3g}")
        for row in answer["different"]
    ]  # fmt: skip
    if rows:
        yield from table(("TENSOR", "ELEMENTS", "MAX |A-B|"), rows[:_SHOWN])
    if len(rows) > _SHOWN:
        yield f"... and {len(rows) - _SHOWN} more (--json lists all)"
    rounded = " after rounding both to bf16" if answer["rounded_to_bf16"] else ""
    yield f"{len(rows)} of {answer['compared']} tensors differ{rounded}."
    if "logits" in answer:
        logits = answer["logits"]
        yield (
            f"logits of {logits['prompts']} prompts differ by at most {logits['max_abs']:.3g} "
            f"(tolerance {logits['tolerance']:g})."
        )


def _tempo(answer: Answer) -> str:
    seconds = max(answer["seconds"], 1e-9)
    return f"{seconds:.1f} s, {answer['size_bytes'] / seconds / 1e9:.2f} GB/s"
