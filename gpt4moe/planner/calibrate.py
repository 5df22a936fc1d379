"""Predicted against measured: where the plan of a run was off, from what the run itself wrote.

<run folder>/resolved.yaml -> estimate      <run folder>/metrics.jsonl -> median step      -> a row each
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from gpt4moe.config.plan import PlanConfig
from gpt4moe.errors import DataError
from gpt4moe.planner.estimate import Estimate, estimate

WARM_UP = 0.2
"""Share of a run's steps, its first ones, that say nothing of its speed."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One number of a run."""

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


def calibrate(plan: PlanConfig, records: Sequence[Mapping[str, float]]) -> list[Compared]:
    """The plan of a run on plan.gpus devices against its metrics.

    Raises: DataError where the run has no timed step; as estimate does.
    """
    timed = [record for record in records if record.get("step_seconds", 0) > 0]
    if not timed:
        raise DataError("The run's metrics.jsonl has no step with step_seconds.", "Let the run take a few steps first.")
    steady = timed[int(WARM_UP * len(timed)) :]
    seconds = median(record["step_seconds"] for record in steady)
    result = estimate(plan)
    rows = [
        Compared("step", "s", result.step.seconds, seconds),
        Compared("throughput", "tokens/s", result.tokens_per_second, result.tokens_per_step / seconds),
        Compared("MFU", "% of the dense peak", 100 * result.mfu, 100 * _mfu(result, seconds)),
    ]
    peaks = [record["peak_memory_bytes"] for record in timed if "peak_memory_bytes" in record]
    if peaks:
        rows.append(Compared("peak memory", "GB", result.peak_memory_bytes / 1e9, max(peaks) / 1e9))
    return rows


def advice(rows: Sequence[Compared]) -> str:
    """What to do with the difference."""
    factor = rows[0].measured / rows[0].predicted
    if abs(factor - 1) < 0.1:
        return "The plan was within 10%: use it as it is."
    return (
        f"The run took {factor:.3g} times the planned time: multiply days and cost of plans for this cluster by it, or "
        f"set cluster.peak_flops_bf16 and cluster.memory_bytes_per_second to {1 / factor:.3g} times theirs."
    )


def _mfu(result: Estimate, seconds: float) -> float:
    return result.mfu * result.step.seconds / seconds
