"""How far a plan of inference is off published throughputs: one line a row, or one a deployment.

  python -m benchmarks.inference_error             # every request
  python -m benchmarks.inference_error summary     # the table of docs/planner.md

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

from gpt4moe.config.load import load_plan_config
from gpt4moe.planner.inference import Deployment, asked_layout, deployed, served_model

MEASURES: dict[str, Callable[[Deployment, int], float]] = {
    "request": lambda found, new: new * found.requests_per_second,
    "prefill": lambda found, _: found.prefill.steady_tokens_per_second,
    "decode": lambda found, _: found.decode.tokens_per_second,
}
"""What was published -> tokens per second of a deployment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One published throughput and ours, tokens/s of all devices."""

    source: str
    deployment: str
    prompt: int
    new: int
    published: float
    ours: float

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
            for prompt, new, published in row["requests"]:
                config = replace(plan.inference, prompt_tokens=prompt, new_tokens=new)
                found = deployed(config, served_model(plan), asked_layout(plan))
                assert found is not None, keys
                ours = MEASURES[source["measures"]](found, new)
                layout = f"tp {found.layout.tp}, ep {found.layout.ep}" if plan.model.moe else f"tp {found.layout.tp}"
                where = f"{plan.model.name}, {found.layout.devices} x {plan.cluster.name}, {layout}"
                yield Row(source=name, deployment=where, prompt=prompt, new=new, published=published, ours=ours)


def listed() -> str:
    """Every row."""
    head = "| source | deployment | prompt, new tokens | published tokens/s | ours | error |"
    lines = [head, "|---|---|---|---|---|---|"]
    for r in rows():
        cells = (f"{r.prompt:,}, {r.new:,}", f"{r.published:,.0f}", f"{r.ours:,.0f}", f"{r.error:+.0%}")
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


if __name__ == "__main__":
    sys.stdout.write((summary() if sys.argv[1:] == ["summary"] else listed()) + "\n")
