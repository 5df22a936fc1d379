"""Published layouts that ran: does the planner say that they fit?

    python -m benchmarks.planner_memory      every row of planner_error.yaml that is said not to fit, then the counts

planner_error.yaml -> the plan of a row on its stack (stack=, beyond.*) -> memory of its fullest rank.
A row counts twice: as a layout of this trainer, and as one of the stack that ran it, with what that stack computes
again and keeps in 16 bits. Experts are balanced, as in the sources.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.planner_error_rows import Row, recipe, rows
from gpt4moe.config.beyond import BeyondConfig, Module
from gpt4moe.config.load import load_plan_config
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.plan import PlanConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.memory import StageMemory, memory_per_stage


@dataclass(frozen=True, slots=True)
class Fit:
    """One published layout, on the stack that ran it and as this trainer's."""

    row: Row
    on_its_stack: StageMemory
    """Of the fullest rank."""
    as_ours: StageMemory

    @property
    def is_alarm(self) -> bool:
        """Whether the planner says that it does not fit, though it ran."""
        return self.on_its_stack.total_bytes > self.row.cluster.memory_bytes


def fits() -> list[Fit]:
    return [fit_of(row) for row in rows()]


def fit_of(row: Row) -> Fit:
    return Fit(row, _fullest(row, _plan_of(row)), _fullest(row, _ours(row)))


def _fullest(row: Row, plan: PlanConfig) -> StageMemory:
    stages = memory_per_stage(plan, Layout.from_config(row.parallel, row.devices), imbalance=1.0)
    return max(stages, key=lambda stage: stage.total_bytes)


@cache
def _base() -> PlanConfig:
    return load_plan_config(["model=mixtral_8x7b", "cluster=h100_80g", "precision=bf16"])


def _ours(row: Row) -> PlanConfig:
    return replace(
        _base(), model=row.model, parallel=row.parallel, cluster=row.cluster,
        training=replace(
            _base().training, global_batch_size=row.training.global_batch_size,
            micro_batch_size=row.training.micro_batch_size,
        ),
    )  # fmt: skip


def _plan_of(row: Row) -> PlanConfig:
    """The row on its stack."""
    moments = recipe(row.source, row.model.name).get("moments")
    beyond = BeyondConfig(
        products=row.products,
        moments=None if moments is None else Dtype(moments),
        recompute=sorted(row.modules, key=list(Module).index),
        dispatch=row.dispatch,
    )
    return replace(_ours(row), stack=row.stack, beyond=beyond)


def table() -> str:
    """Markdown: the alarms, then the counts."""
    found = fits()
    lines = ["| published, and said not to fit | needs GB | has GB | states | activations |", "|---|---|---|---|---|"]
    for fit in (fit for fit in found if fit.is_alarm):
        held = fit.on_its_stack
        sizes = (held.total_bytes, fit.row.cluster.memory_bytes, held.states_bytes, held.activations_bytes)
        lines.append(f"| {fit.row.source}: {fit.row.name} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} |")
    ours = sum(fit.as_ours.total_bytes > fit.row.cluster.memory_bytes for fit in found)
    alarms = sum(fit.is_alarm for fit in found)
    counts = f"Of {len(found)} published layouts {alarms} are said not to fit on their stack, {ours} as this trainer's."
    return "\n".join([*lines, "", counts])


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
