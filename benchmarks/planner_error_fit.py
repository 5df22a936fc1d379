"""Fits the constants of a stack to published rows, and predicts rows that they were not fitted to.

fit               constants of a stack from its rows
left_out          each row, predicted by constants of the other rows of its stack
source_left_out   each source, predicted by constants of all other sources: rows of one paper are too similar for a test
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import log
from typing import TypeVar

from benchmarks.planner_error_rows import Row, rows
from gpt4moe.config.cluster import Generation
from gpt4moe.planner.efficiency import GENERATIONS, PROFILES, Efficiency
from gpt4moe.planner.step_time import step_time
from gpt4moe.planner.work import Work

State = TypeVar("State")
Knob = TypeVar("Knob")

FITTED = {
    "megatron-lm-2022": ["matrix", "exposed"],
    "llama3-2024": ["matrix"],
    "megatron-core-2025": ["matrix", "exposed", "copy_passes", "moe_layer_seconds"],
    "megatron-bridge-26.04": ["matrix", "exposed", "copy_passes", "moe_layer_seconds"],
}
"""Stack -> the constants that its rows decide."""
HELD_OUT = {"modelzoo"}
"""Sources that no constant was fitted to."""
POOLED = {"matrix": 0.62, "exposed": 0.5, "copy_passes": 9.0, "moe_layer_seconds": 6e-4}
"""Constants that sources share when one of them is left out, and where their fit starts."""
LEAST_EXPOSED = 0.05
"""Where a fit stops: at 0 a search would take any amount of communication for free. A bound, not a measurement."""
PLANNED_FROM = "folding"
"""The source of the constants that a plan takes on most generations (efficiency.NEAREST)."""


def predict(row: Row, efficiency: Efficiency) -> float:
    """Seconds of the row's step."""
    peak = row.cluster.peak_flops_bf16 if row.precision == "bf16" else row.cluster.peak_flops_fp8
    assert peak is not None
    work = Work(
        model=row.model, kinds=list(row.kinds), parallel=row.parallel,
        micro_batch_size=row.training.micro_batch_size, cluster=row.cluster, matrix_peak=peak,
        efficiency=_dispatched(efficiency, row.note), modules=row.modules,
    )  # fmt: skip
    return step_time(work, row.training, row.devices, balanced=True).seconds


def _dispatched(efficiency: Efficiency, note: str) -> Efficiency:
    """A row whose dispatcher is not its stack's, as the source says."""
    dispatcher, _, is_overlapped = note.partition("_")
    if dispatcher == "alltoall":
        plain = PROFILES["megatron-core-2025/hopper"]  # fitted to other rows
        efficiency = replace(efficiency, copy_passes=plain.copy_passes, is_tuned=False)
    elif dispatcher == "deepep":
        efficiency = replace(efficiency, is_tuned=True)
    return replace(efficiency, hides_experts=is_overlapped == "overlapped")


def errors(of: list[Row], profiles: dict[str, Efficiency]) -> list[float]:
    """predicted / published - 1 of each row."""
    return [predict(row, profiles[row.profile]) / row.seconds - 1 for row in of]


def fit(stack: str, of: list[Row], *, step: float = 1.3) -> dict[str, Efficiency]:
    """The stack's constants that make the mean and the root mean square of the log errors smallest, by coordinates."""
    profiles = {name: profile for name, profile in PROFILES.items() if name.split("/")[0] == stack}
    knobs = [(name, "matrix") for name in profiles] + [("", field) for field in FITTED[stack] if field != "matrix"]
    return _descended(profiles, knobs, _turned, lambda tried: _loss(of, tried), step=step, until=1.01, gain=1e-7)


def _descended(
    start: State, knobs: Sequence[Knob], turned: Callable[[State, Knob, float], State],
    loss: Callable[[State], float], *, step: float, until: float, gain: float,
) -> State:  # fmt: skip
    """Minimises the loss from `start` by coordinates: multiplies or divides one constant at a time by `step`.

    When no change helps, `step` is halved towards 1, down to `until`.
    """
    state, steps, best = start, dict.fromkeys(knobs, step), loss(start)
    while max(steps.values()) > until:
        has_moved = False
        for knob in knobs:
            for factor in (steps[knob], 1 / steps[knob]):
                tried = turned(state, knob, factor)
                lost = loss(tried)
                if lost < best - gain:
                    state, best, has_moved = tried, lost, True
        if not has_moved:
            steps = {knob: 1 + (size - 1) / 2 for knob, size in steps.items()}
    return state


def _turned(profiles: dict[str, Efficiency], knob: tuple[str, str], factor: float) -> dict[str, Efficiency]:
    """One constant multiplied: of one profile (matrix), or of the whole stack."""
    only, field = knob

    def turn(profile: Efficiency) -> Efficiency:
        return replace(profile, **{field: _in_range(field, getattr(profile, field) * factor)})

    return {name: turn(profile) if only in ("", name) else profile for name, profile in profiles.items()}


def _in_range(field: str, value: float) -> float:
    """Shares end at 1; no stack hides all that it sends."""
    value = max(LEAST_EXPOSED, value) if field == "exposed" else value
    return min(1.0, value) if field in ("matrix", "exposed") else value


def _loss(of: list[Row], profiles: dict[str, Efficiency]) -> float:
    return _spread([log(1 + error) for error in errors(of, profiles)])


def _spread(logs: list[float]) -> float:
    return sum(map(abs, logs)) / len(logs) + 0.5 * (sum(value**2 for value in logs) / len(logs)) ** 0.5


def fitted_rows(stack: str) -> list[Row]:
    return [row for row in rows() if row.stack == stack and row.source not in HELD_OUT]


def left_out(stack: str) -> dict[str, float]:
    """Each row's error under constants fitted to the other rows of its stack."""
    mine = fitted_rows(stack)
    return {
        row.name: errors([row], fit(stack, [other for other in mine if other is not row], step=1.05))[0] for row in mine
    }


def source_left_out(source: str) -> dict[str, float]:
    """Each row's error under constants fitted to the rows of all other sources.

    Only facts that the source states about its stack are kept (fused kernels, dispatcher, bytes of a gradient).
    """
    constants = _pooled([row for row in rows() if row.source != source])
    return {row.name: _strange(row, constants) for row in rows() if row.source == source}


def sources() -> list[str]:
    return list(dict.fromkeys(row.source for row in rows()))


Cell = tuple[Generation, str, str]
"""Generation, kind of model (dense, experts), precision."""


def planned_elsewhere() -> dict[Cell, list[float]]:
    """The signed errors that a plan may have, by cell: of published rows under the plan's constants.

    Rows of the source that the constants come from are left out.
    """
    nearest = PROFILES[GENERATIONS[Generation.hopper].profile]
    constants = {name: getattr(nearest, name) for name in POOLED}
    found: dict[Cell, list[float]] = {}
    for row in (row for row in rows() if row.source != PLANNED_FROM):
        cell = (row.cluster.generation, "experts" if row.model.moe else "dense", row.precision)
        found.setdefault(cell, []).append(_strange(row, constants))
    return found


def _strange(row: Row, constants: dict[str, float]) -> float:
    return predict(row, replace(PROFILES[row.profile], **constants)) / row.seconds - 1


def _pooled(of: list[Row]) -> dict[str, float]:
    """One set of constants for rows of any stack, by coordinates."""

    def turned(constants: dict[str, float], name: str, factor: float) -> dict[str, float]:
        return {**constants, name: _in_range(name, constants[name] * factor)}

    loss = partial(_pooled_loss, of)
    return _descended(dict(POOLED), list(POOLED), turned, loss, step=1.3, until=1.02, gain=1e-6)


def _pooled_loss(of: list[Row], constants: dict[str, float]) -> float:
    return _spread([log(1 + _strange(row, constants)) for row in of])
