"""What a run needs of its cluster, from the planner: device memory, state to save, space, time. No torch."""

from dataclasses import dataclass, fields

from gpt4moe.architecture.count import count_parameters
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.estimate import STATE_BYTES, saved_bytes, timed_work
from gpt4moe.planner.memory import StageMemory, memory_per_stage
from gpt4moe.planner.step_time import step_time


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Of a legal layout."""

    fullest: StageMemory
    step_seconds: float
    rank_state_bytes: float
    """What a rank of the heaviest stage writes into a checkpoint, and copies to host memory before."""
    checkpoint_bytes: float
    """One checkpoint, of all ranks."""
    num_checkpoints: int
    """The most that lie in the run folder at once."""


def needs(run: RunConfig, layout: Layout) -> Needs:
    """Call legality.layout_problems before. The time of a step on cluster=cpu is a trend, not a promise."""
    plan = PlanConfig(**{field.name: getattr(run, field.name) for field in fields(RunConfig)})
    work = timed_work(plan)
    return Needs(
        fullest=max(memory_per_stage(run, layout), key=lambda stage: stage.total_bytes),
        step_seconds=step_time(work, run.training, layout.world_size).seconds,
        rank_state_bytes=saved_bytes(work, layout.world_size),
        checkpoint_bytes=float(STATE_BYTES * count_parameters(run.model).total),
        num_checkpoints=checkpoints_at_once(run),
    )


def checkpoints_at_once(run: RunConfig) -> int:
    """The newest checkpoint.keep, those kept for good, and the one being written: it comes before an old one goes."""
    steps, kept = run.training.steps, run.checkpoint
    written = -(-steps // kept.every) if kept.every else 1
    if not kept.keep:
        return written
    for_good = steps // kept.keep_every if kept.keep_every else 0
    return min(written, kept.keep + 1 + for_good)
