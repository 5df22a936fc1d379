"""What tools/evaluate.py prints: a table for people, or one JSON object."""

from collections.abc import Sequence
from typing import Any

from gpt4moe.evaluation.corpus import SourceText, summed


def of_lines(lines: Sequence[dict[str, Any]], sources: Sequence[SourceText]) -> dict[str, Any]:
    """Whatever there is of `sources`, `choices`, `exact` and `tasks`, from the lines of everything that was asked."""
    found: dict[str, Any] = {}
    if sources:
        texts = [line for line in lines if line["kind"] == "source"]
        found["sources"] = [source.facts() for source in summed(sources, texts)]
    found |= of_answers(lines)
    tasks = {name: values for line in lines if line["kind"] == "task" for name, values in line["results"].items()}
    return found | ({"tasks": tasks} if tasks else {})


def of_answers(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right answers, of each kind of questions that there is."""
    found: dict[str, Any] = {}
    choices = [line for line in lines if line["kind"] == "choices"]
    exact = [line for line in lines if line["kind"] == "exact"]
    if choices:
        right, normalised = (sum(line[name] for line in choices) for name in ("is_right", "is_right_normalised"))
        found["choices"] = {
            "questions": len(choices), "right": right, "right_normalised": normalised,
            "accuracy": right / len(choices), "accuracy_normalised": normalised / len(choices),
        }  # fmt: skip
    if exact:
        right = sum(line["is_right"] for line in exact)
        found["exact"] = {"questions": len(exact), "right": right, "exact_match": right / len(exact)}
    return found


def as_text(results: dict[str, Any]) -> str:
    """Tables of `sources` (corpus.SourceResult.facts), `choices`, `exact` and `tasks`, whichever there are."""
    blocks = []
    rows: list[tuple[str, ...]]
    if results.get("sources"):
        rows = [
            (one["source"], str(one["tokens"]), str(one["bytes"]), f"{one['loss']:.4f}", f"{one['perplexity']:.3f}",
             f"{one['bits_per_byte']:.4f}")
            for one in results["sources"]
        ]  # fmt: skip
        blocks.append(_table(("source", "tokens", "bytes", "loss", "perplexity", "bits per byte"), rows))
    for kind, names in (("choices", ("accuracy", "accuracy_normalised")), ("exact", ("exact_match",))):
        if kind in results:
            facts = results[kind]
            rows = [(kind, str(facts["questions"]), *(f"{100 * facts[name]:.2f} %" for name in names))]
            blocks.append(_table(("kind", "questions", *(name.replace("_", " ") for name in names)), rows))
    if results.get("tasks"):
        rows = [
            (task, name, f"{value:.4f}")
            for task, values in results["tasks"].items()
            for name, value in values.items()
            if isinstance(value, float | int)
        ]
        blocks.append(_table(("task", "metric", "value"), rows))
    return "\n\n".join(blocks) + "\n"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[at]) for row in (heading, *rows)) for at in range(len(heading))]
    lines = [
        "  ".join(cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in
                  enumerate(zip(row, widths, strict=True)))
        for row in (heading, *rows)
    ]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)
