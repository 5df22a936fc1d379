"""How far a plan of inference is off published throughputs: one line a row, or one a deployment.

  python -m benchmarks.inference_error             # every request
  python -m benchmarks.inference_error summary     # the table of docs/plan-decisions.md
  python -m benchmarks.inference_error kinds       # the rows of planner/serving_error.py

benchmarks/inference_error.yaml has the rows and their sources.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from gpt4moe.config.cluster import Generation
from gpt4moe.config.load import load_plan_config
from gpt4moe.planner.inference import Deployment, deployed, served_model
from gpt4moe.planner.serving_error import Quantity, ServedKind, served_kind
from gpt4moe.planner.serving_layouts import asked_layout

MEASURES: dict[str, tuple[Quantity, str, Callable[[Deployment, int], float]]] = {
    "request": (Quantity.throughput, "tokens/s", lambda found, new: new * found.requests_per_second),
    "prefill": (Quantity.throughput, "tokens/s", lambda found, _: found.prefill.steady_tokens_per_second),
    "decode": (Quantity.throughput, "tokens/s", lambda found, _: found.decode.tokens_per_second),
    "first_token": (Quantity.first_token, "ms", lambda found, _: 1e3 * found.prefill.first_token_seconds),
    "token": (Quantity.token, "ms", lambda found, _: 1e3 * found.token_with_prompts_seconds),
}
"""What was published -> what it is an error of, unit, the number of a deployment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One published number and ours: tokens/s of all devices, or milliseconds."""

    source: str
    deployment: str
    kind: tuple[Generation, ServedKind, Quantity]
    prompt: int
    new: int
    published: float
    ours: float
    unit: str

    @property
    def error(self) -> float:
        return self.ours / self.published - 1


@cache
def rows() -> list[Row]:
    return list(_rows(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())["sources"]))


def _rows(sources: dict[str, Any]) -> Iterator[Row]:
    for name, source in sources.items():
        for row in source["rows"]:
            keys = ["report=inference", "inference.max_token_ms=1e6", *source["keys"], *row["keys"]]
            plan = load_plan_config(keys)
            for prompt, new, published, *in_flight in row["requests"]:
                sequences = in_flight[0] if in_flight else None
                config = replace(plan.inference, prompt_tokens=prompt, new_tokens=new, sequences=sequences)
                served = served_model(plan)
                found = deployed(config, served, asked_layout(plan))
                assert found is not None, keys
                quantity, unit, number = MEASURES[source["measures"]]
                layout = f"tp {found.layout.tp}, ep {found.layout.ep}" if plan.model.moe else f"tp {found.layout.tp}"
                where = f"{plan.model.name}, {found.layout.devices} x {plan.cluster.name}, {layout}"
                yield Row(
                    source=name, deployment=where,
                    kind=(plan.cluster.generation, served_kind(served, found.layout), quantity), prompt=prompt, new=new,
                    published=published, ours=number(found, new), unit=unit,
                )  # fmt: skip


def listed() -> str:
    """Every row."""
    head = "| source | deployment | prompt, new tokens | published | ours | error |"
    lines = [head, "|---|---|---|---|---|---|"]
    for r in rows():
        cells = (f"{r.prompt:,}, {r.new:,}", f"{r.published:,.0f} {r.unit}", f"{r.ours:,.0f}", f"{r.error:+.0%}")
        lines.append(f"| {r.source} | {r.deployment} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary() -> str:
    """One line a deployment."""
    lines = ["| source | deployment | rows | median error | errors |", "|---|---|---|---|---|"]
    for source, deployment in dict.fromkeys((row.source, row.deployment) for row in rows()):
        errors = [row.error for row in rows() if (row.source, row.deployment) == (source, deployment)]
        middle = median(abs(error) for error in errors)
        lines.append(
            f"| {source} | {deployment} | {len(errors)} | {middle:.0%} | {min(errors):+.0%} to {max(errors):+.0%} |"
        )
    return "\n".join(lines)


def kinds() -> dict[tuple[Generation, ServedKind, Quantity], tuple[int, float, float]]:
    """What planner.serving_error.PUBLISHED has: rows, the least and the most of their signed errors."""
    found: dict[tuple[Generation, ServedKind, Quantity], list[float]] = {}
    for row in rows():
        found.setdefault(row.kind, []).append(row.error)
    return {kind: (len(errors), round(min(errors), 3), round(max(errors), 3)) for kind, errors in found.items()}


def _kinds() -> str:
    return "\n".join(f"({', '.join(map(str, kind))}): {errors}" for kind, errors in kinds().items())


if __name__ == "__main__":
    answers: dict[str, Callable[[], str]] = {"summary": summary, "kinds": _kinds}
    sys.stdout.write(answers.get("".join(sys.argv[1:]), listed)() + "\n")
