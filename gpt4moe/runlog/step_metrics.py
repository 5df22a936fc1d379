"""The metrics of one step that training measures itself: losses, update, times. Declared and made.

What an objective logs beside its loss is declared here too, in OBJECTIVE_METRICS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt4moe.runlog.metrics import Metric, Parts, Record

STEP_METRICS: dict[str, Metric] = {
    "step": Metric(unit="steps", meaning="optimizer steps done, from 1; after step N the checkpoint is step N"),
    "loss": Metric(
        unit="nats/token",
        meaning="cross-entropy, mean over the unmasked tokens of all ranks, no auxiliary terms; of a source: over its "
        "tokens in this step, where there are several sources and the step has one of its samples",
        parts=Parts.sources,
    ),
    "grad_norm": Metric(unit="", meaning="global L2 norm of the gradient, before clipping"),
    "learning_rate": Metric(unit="", meaning="learning rate this step was taken with"),
    "consumed_tokens": Metric(unit="tokens", meaning="tokens since the run's beginning, this step included"),
    "seq_length": Metric(
        unit="tokens",
        meaning="of a sample of this step, where training.length_ramp changes it; held-out samples have "
        "model.seq_length throughout",
    ),
    "eval_loss": Metric(
        unit="nats/token",
        meaning="loss on held-out text, only on steps that evaluate; of a source: over its held-out tokens",
        parts=Parts.sources,
    ),
    "task_score": Metric(
        unit="",
        meaning="only as `task_score/TASK/SCORE`, on steps that get a checkpoint: of questions in "
        "training.evaluate_tasks the share of right answers (accuracy, accuracy_normalised, exact_match), of "
        "lm-evaluation-harness its own numbers",
        parts=Parts.tasks,
    ),
    "task_loss": Metric(
        unit="nats/token",
        meaning="only as `task_loss/TASK/SOURCE`, on steps that get a checkpoint: loss on the texts of "
        "training.evaluate_tasks",
        parts=Parts.tasks,
    ),
}
OBJECTIVE_METRICS: dict[str, Metric] = {}
"""What objectives log, by their `logged_names`; StepRunner refuses other names."""
TIME_METRICS: dict[str, Metric] = {
    "step_seconds": Metric(
        unit="s",
        meaning="wall time of the step, without evaluation and checkpoint; the next three add up to it",
        is_timing=True,
    ),
    "data_seconds": Metric(unit="s", meaning="waiting for the step's batches, on the slowest rank", is_timing=True),
    "forward_backward_seconds": Metric(
        unit="s",
        meaning="the pipeline schedule until the loss is known: forward, backward, waiting for other stages, and the "
        "reduction of gradients that Megatron runs in it",
        is_timing=True,
    ),
    "optimizer_seconds": Metric(
        unit="s",
        meaning="gradient norm and clipping, update, gathering of weights, and engine=deepspeed's reduction of "
        "gradients; on a GPU what is still running counts in the next step's data_seconds or forward",
        is_timing=True,
    ),
    "tokens_per_second": Metric(
        unit="tokens/s", meaning="tokens of the step over its wall time, all ranks together", is_timing=True
    ),
}
RANK_METRICS: dict[str, Metric] = {
    "busiest_rank": Metric(
        unit="rank",
        meaning="of the last minute or two the rank that waited least for others, compared with those of its pipeline "
        "stage; only on a step a minute",
        is_timing=True,
    ),
    "busiest_rank_ratio": Metric(
        unit="ratio",
        meaning="the share of time that this rank was in no collective over the median of the others of its stage; on "
        "a GPU of the host's thread, which runs ahead of the device",
        is_timing=True,
    ),
}
"""Made by the watchdog (training/callbacks/heartbeat.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Seconds of one step on the first rank; the names are TIME_METRICS'."""

    data: float
    forward_backward: float
    optimizer: float


def loss_metrics(name: str, loss: float, of_sources: Sequence[Sequence[float]], source_names: Sequence[str]) -> Record:
    """A loss (`loss` or `eval_loss`), and the token mean of each data source that has tokens.

    Args:
        of_sources: summed losses of the sources, and their tokens; empty where there is one source alone.
    """
    record: Record = {name: loss}
    if any(of_sources):
        sums = zip(source_names, *of_sources, strict=True)
        record |= {f"{name}/{source}": total / tokens for source, total, tokens in sums if tokens}
    return record


def time_metrics(times: StepTimes, num_tokens: int) -> Record:
    """TIME_METRICS of a step of `num_tokens`, those of all ranks together."""
    seconds = times.data + times.forward_backward + times.optimizer
    return {
        "step_seconds": seconds, "data_seconds": times.data, "forward_backward_seconds": times.forward_backward,
        "optimizer_seconds": times.optimizer, "tokens_per_second": num_tokens / seconds,
    }  # fmt: skip
