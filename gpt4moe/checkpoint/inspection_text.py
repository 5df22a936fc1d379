"""The answers of inspection as lines of text, and the tables and sizes that other commands print too."""

from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from math import inf, log10
from typing import Any

Answer = dict[str, Any]

_SHOWN = 20  # rows of a diff; --json has all


def tolerance(text: str) -> float:
    """Parses a number of 0 or more. NaN is refused, because any difference would pass it."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise ArgumentTypeError(f"{text!r} is no tolerance: give a number of 0 or more, such as 1e-6")
    return value


def listing_lines(answer: Answer) -> Iterator[str]:
    head = ("STEP", "SAVED", "SUSPECT", "SIZE", "FILES", "SAMPLES", "LAYOUT")
    rows = []
    for row in answer["checkpoints"]:
        if row["state"] == "committed":
            rest = (size(row["size_bytes"]), row["files"], row["consumed_samples"], row["layout"])
            rows.append((row["step"], row["saved"], "yes" if row["suspect"] else "no", *rest))
        else:
            rows.append((row["step"], row["state"], "", "", "", "", ""))
    yield from table(head, rows)
    for row in answer["checkpoints"]:
        yield from (f"step {row['step']} is suspect: {reason}" for reason in row.get("suspect", ()))


def description_lines(answer: Answer) -> Iterator[str]:
    model = answer["config"].get("model", {})
    shape = ", ".join(
        f"{key} {model[key]}"
        for key in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
        if key in model
    )
    sources = ", ".join(f"{name} {count}" for name, count in answer["consumed_per_source"].items())
    count = sum(samples for _, samples in answer.get("passed_over") or ())
    passed_over = f", {count} passed over" if count else ""
    rows = {
        "folder": answer["folder"],
        "step": answer["step"],
        "samples": f"{answer['consumed_samples']} ({sources}){passed_over}",
        "suspect": "; ".join(answer["suspect"]) or "no, by what was noted; verify reads every byte",
        "run": answer["run_id"],
        "model": f"{model.get('name', '?')}: {shape}",
        "seed": answer["identity"].get("seed"),
        "written by": answer["layout"],
        "versions": ", ".join(f"{name} {number}" for name, number in answer["versions"].items()),
        "files": f"{len(answer['files'])}, {size(sum(file['size_bytes'] for file in answer['files']))}",
    }
    yield from (f"{key:<12}{value}" for key, value in rows.items())
    if "tensors" in answer:
        yield ""
        shapes = [
            (name, " x ".join(map(str, entry["shape"])), entry["slices"]) for name, entry in answer["tensors"].items()
        ]
        yield from table(("TENSOR", "SHAPE", "SLICES"), shapes)


def verification_lines(answer: Answer) -> Iterator[str]:
    if answer["problems"]:
        yield f"{answer['folder']} is damaged:"
        yield from (f"  {problem}" for problem in answer["problems"])
        yield "Its run renames it when it is started again, and goes on from the checkpoint before it."
    else:
        yield (
            f"{answer['folder']} is whole: {answer['tensors']} tensors in {answer['slices']} slices, "
            f"{size(answer['size_bytes'])}, every block's hash right."
        )


def difference_lines(answer: Answer) -> Iterator[str]:
    for side in ("a", "b"):
        yield from (f"only in {answer[side]}: {name}" for name in answer[f"only_in_{side}"])
    yield from (f"{row['tensor']}: shape {row['a']} and {row['b']}" for row in answer["other_shape"])
    rows = sorted(answer["different"], key=lambda row: -inf if row["relative"] is None else -row["relative"])
    if rows:
        shown = [
            (row["tensor"], f"{row['elements']} of {row['of']}", _number(row["max_abs"]), _number(row["relative"]))
            for row in rows[:_SHOWN]
        ]
        yield from table(("TENSOR", "ELEMENTS", "MAX |A-B|", "|A-B|/|A|"), shown)
    if len(rows) > _SHOWN:
        yield f"... and {len(rows) - _SHOWN} more (--json lists all)"
    yield f"{len(rows)} of {answer['compared']} tensors differ."


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Columns as wide as their widest entry."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    yield from ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def size(number_bytes: float) -> str:
    """1.5 GB."""
    power = min(4, int(log10(number_bytes) // 3)) if number_bytes >= 1 else 0
    return f"{number_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
