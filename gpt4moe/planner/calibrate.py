"""Calibrate: compares the plan of a run with the run's own measurements.

config of its last launch -> estimate; metrics.jsonl -> median step, peak memory, busiest expert
-> Compared, a row each -> advice: time, memory and load are judged separately
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from gpt4moe.config.cluster import Generation
from gpt4moe.config.plan import PlanConfig
from gpt4moe.errors import DataError
from gpt4moe.planner.estimate import Estimate, estimate

WARM_UP = 0.2
"""Share of the run's first steps that do not count in its speed."""


NEAR = 0.1
"""Up to this relative difference, the advice calls a plan right."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One quantity of a run, predicted and measured."""

    name: str
    unit: str
    predicted: float
    measured: float
    unlike: str = ""
    """Why prediction and measurement cannot be compared; empty if they can."""
    time_factor: float = 1.0
    """The time_factor of the plan that predicted the step."""

    @property
    def error(self) -> float | None:
        """predicted / measured - 1; None if they cannot be compared."""
        return None if self.unlike else self.predicted / self.measured - 1


def calibrate(plan: PlanConfig, records: Sequence[Mapping[str, float]]) -> list[Compared]:
    """The plan of a run on plan.gpus devices against its metrics; where the steps' size changes, against those of
    the last size.

    Raises: DataError if the run has no timed step; the errors of estimate.
    """
    timed = [record for record in records if record.get("step_seconds", 0) > 0]
    if not timed:
        raise DataError("The run's metrics.jsonl has no step with step_seconds.", "Let the run take a few steps first.")
    if plan.training.batch_ramp or plan.training.length_ramp:
        sizes, last = plan.step_sizes, int(timed[-1]["step"])
        timed = [record for record in timed if sizes.at_step(int(record["step"])) == sizes.at_step(last)]
        plan = plan.at_step(last)
    steady = timed[int(WARM_UP * len(timed)) :]
    seconds = median(record["step_seconds"] for record in steady)
    result = estimate(plan)
    # A run records mfu only if its devices are those of its cluster config.
    is_planned_device = "mfu" in timed[-1]
    elsewhere = "" if is_planned_device else f"the run was not on cluster={plan.cluster.name}, which the plan is of"
    used = result.mfu * result.step.seconds / seconds
    rows = [
        Compared("step", "s", result.step.seconds, seconds, elsewhere, plan.time_factor),
        Compared("throughput", "tokens/s", result.tokens_per_second, result.tokens_per_step / seconds, elsewhere),
        Compared("MFU", "% of the dense peak", 100 * result.mfu, 100 * used, elsewhere),
    ]
    if any("peak_memory_bytes" in record for record in timed):
        on_cpu = is_planned_device == (plan.cluster.generation is Generation.cpu)
        rows.append(_memory(result, timed, on_cpu=on_cpu))
    if plan.parallel.ep > 1 and any("expert_load_max_over_mean" in record for record in steady):
        rows.append(_load(plan, steady))
    return rows


def _memory(result: Estimate, records: Sequence[Mapping[str, float]], *, on_cpu: bool) -> Compared:
    """Memory of the tensors of the fullest rank. The reserve is left out, because no allocator counts it."""
    planned = max(stage.total_bytes - stage.reserve_bytes for stage in result.memory)
    measured = max(record.get("peak_memory_bytes", 0.0) for record in records)
    unlike = "measured is the resident set of a host process (Python, libraries, data), planned a device's tensors"
    return Compared("peak memory", "GB", planned / 1e9, measured / 1e9, unlike if on_cpu else "")


def _load(plan: PlanConfig, records: Sequence[Mapping[str, float]]) -> Compared:
    assert plan.model.moe is not None
    measured = median(record.get("expert_load_max_over_mean", 1.0) for record in records)
    is_alone = plan.model.moe.num_experts == plan.parallel.ep
    unlike = "" if is_alone else "measured is the busiest expert, planned the busiest rank, which has several"
    return Compared("busiest experts", "times the mean", plan.imbalance, measured, unlike)


def advice(rows: Sequence[Compared]) -> list[str]:
    """One sentence for each row. Throughput and MFU follow from the step time, so they get none."""
    advise = {"step": _of_time, "peak memory": _of_memory, "busiest experts": _of_load}
    sentences = [
        f"{row.name}: not judged, {row.unlike}." if row.unlike else f"{row.name}: {advise[row.name](row)}"
        for row in rows
        if row.name in advise
    ]
    missing = [name for name in ("peak memory",) if name not in {row.name for row in rows}]
    return sentences + [f"{name}: not judged, the run's metrics.jsonl has none." for name in missing]


def _is_near(row: Compared) -> bool:
    return row.error is not None and abs(row.error) <= NEAR


def _of_time(row: Compared) -> str:
    factor = row.measured / row.predicted
    if _is_near(row):
        return f"the plan was within {NEAR:.0%}; use its days and cost as they are."
    return (
        f"the run took {factor:.3g} times the planned time: set time_factor={factor * row.time_factor:.3g} in plans "
        "for this cluster."
    )


def _of_memory(row: Compared) -> str:
    factor = row.measured / row.predicted
    if _is_near(row):
        return f"the plan was within {NEAR:.0%}; use it as it is."
    if factor > 1:
        return (
            f"the run held {factor:.3g} times what was planned: a plan with less headroom than "
            f"{row.measured - row.predicted:.3g} GB may not fit; set cluster.memory_bytes to {1 / factor:.3g} "
            "times its own in plans for this cluster."
        )
    return (
        f"the run held {factor:.3g} times what was planned: plans refuse layouts that would fit; look at those with up "
        f"to {row.predicted - row.measured:.3g} GB too little."
    )


def _of_load(row: Compared) -> str:
    if _is_near(row):
        return "as the plan assumes."
    return f"the plan assumes {row.predicted:.3g}, the run had {row.measured:.3g}: set imbalance={row.measured:.3g}."
