"""The metrics of a training step: one table of name, unit and meaning. Log, console, wandb, report and docs read it.

A metric with parts is written once for each of them, as name/part: loss/code, router_entropy/layers_000_014. How many
keys a record can have is therefore bounded: see moe.statistics.layer_groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from gpt4moe.moe.statistics import LAYER_METRICS

Number = int | float
Record = dict[str, Number]


class Parts(str, Enum):
    """What a metric's parts are, if it has any."""

    none = ""
    sources = "data source"
    layers = "group of MoE layers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    unit: str
    meaning: str
    parts: Parts = Parts.none
    """Written besides the whole."""
    is_timing: bool = False
    """Of the machine, not of the mathematics: may differ between two runs of one config."""


_EVERY_STEP: dict[str, Metric] = {
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
    "eval_loss": Metric(
        unit="nats/token",
        meaning="loss on held-out text, only on steps that evaluate; of a source: over its held-out tokens",
        parts=Parts.sources,
    ),
}
_ROUTER: dict[str, Metric] = {
    name: Metric(unit=of.unit, meaning=of.meaning, parts=Parts.none if of.over_layers is None else Parts.layers)
    for name, of in LAYER_METRICS.items()
}
_MACHINE: dict[str, Metric] = {
    name: Metric(unit=unit, meaning=meaning, is_timing=True)
    for name, unit, meaning in (
        ("step_seconds", "s", "wall time of the step, without evaluation and checkpoint; the next three add up to it"),
        ("data_seconds", "s", "making the step's batches"),
        ("forward_backward_seconds", "s", "the pipeline schedule until the loss is known: forward, backward, waiting "
         "for other stages, and the reduction of gradients that Megatron runs in it"),
        ("optimizer_seconds", "s", "gradient norm and clipping, update, gathering of weights, and engine=deepspeed's "
         "reduction of gradients; on a GPU what is still running counts in the next step's data_seconds or forward"),
        ("other_seconds", "s", "outside the step, since the last one was recorded: evaluation, the last step's "
         "checkpoint, logs; not on a start's first step"),
        ("tokens_per_second", "tokens/s", "tokens of the step over its wall time, all ranks together"),
        ("mfu", "share", "model FLOPs (architecture.flops: attention counted, recomputation not) over the cluster's "
         "dense peak in the run's precision; only "
         "where cluster=... describes the devices the run is on; nominal on a CPU"),
        ("peak_memory_bytes", "bytes", "most memory a rank has had so far, of the fullest rank: allocated tensors on a "
         "GPU, the process's resident set on a CPU"),
        ("device_hours", "h", "devices times hours over all starts, start-up and redone steps included; what a killed "
         "start did after its last recorded step is not; a copied run folder under a new name begins at 0"),
        ("cost_usd", "USD", "device_hours times cluster.usd_per_hour; only where cluster=... describes the devices "
         "and has a price"),
        ("eta_seconds", "s", "time to training.steps at the pace of the last 50 steps, evaluations and checkpoints "
         "included; not on a start's first step"),
    )
}  # fmt: skip
METRICS: dict[str, Metric] = {**_EVERY_STEP, **_ROUTER, **_MACHINE}

TIMINGS = frozenset(name for name, metric in METRICS.items() if metric.is_timing)
"""What may differ between two runs of one config; every other metric is equal to the last bit on a CPU."""


def known(name: str) -> bool:
    """Whether the table allows this name, a part's name included."""
    whole, _, part = name.partition("/")
    return whole in METRICS and (not part or METRICS[whole].parts is not Parts.none) and not name.endswith("/")


def metric_of(name: str) -> Metric:
    """The row of a metric or of one of its parts."""
    return METRICS[name.partition("/")[0]]


def check_record(record: Mapping[str, Number]) -> None:
    """Raises ValueError when a record lacks its step or has a name or a type the table does not allow.

    For programmers: a user cannot cause it.
    """
    unknown = sorted(name for name in record if not known(name))
    if unknown:
        raise ValueError(f"metrics {unknown} are not in runlog/metrics.py METRICS; add them there first")
    # bool is an int to isinstance; a numpy or torch scalar is neither int nor float and would not be written exactly.
    odd = sorted(name for name, value in record.items() if isinstance(value, bool) or not isinstance(value, Number))
    if odd:
        raise ValueError(f"metrics {odd} are not plain int or float")
    step = record.get("step")
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"a record needs its step, an int from 1, not {step!r}")
