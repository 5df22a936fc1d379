"""The metrics of a training step: one table of name, unit and meaning. Log, console, wandb and report read it."""

from collections.abc import Mapping

Number = int | float
Record = dict[str, Number]

METRICS: dict[str, tuple[str, str]] = {
    "step": ("steps", "optimizer steps done, from 1; after step N the checkpoint is step N"),
    "loss": ("nats/token", "cross-entropy, mean over the unmasked tokens of all ranks; no auxiliary terms"),
    "aux_loss": ("", "load-balancing loss times its coefficient, mean over MoE layers"),
    "z_loss": ("", "router z-loss times its coefficient, mean over MoE layers"),
    "grad_norm": ("", "global L2 norm of the gradient, before clipping"),
    "learning_rate": ("", "learning rate this step was taken with"),
    "consumed_tokens": ("tokens", "tokens since the run's beginning, this step included"),
    "step_seconds": ("s", "wall time of the step, without evaluation and checkpoint"),
    "tokens_per_second": ("tokens/s", "tokens of the step over its wall time, all ranks together"),
    "eval_loss": ("nats/token", "loss on held-out text; only on steps that evaluate"),
    "expert_load_max_over_mean": ("ratio", "tokens of the busiest expert over the mean, worst MoE layer; 1 is even"),
    "dead_experts": ("experts", "experts that got no token in this step, counted over all MoE layers"),
    "dropped_share": ("share", "routed copies of tokens dropped for lack of capacity, over all of them; 0 to 1"),
    "router_entropy": ("nats", "entropy of the router's probabilities, mean over tokens and MoE layers"),
    "router_margin": ("score", "last chosen expert's score minus the next one's, mean over tokens and MoE layers"),
}

TIMINGS = frozenset({"step_seconds", "tokens_per_second"})
"""What may differ between two runs of one config; every other metric is equal to the last bit on a CPU."""


def check_record(record: Mapping[str, Number]) -> None:
    """Raises ValueError when a record lacks its step or has a name or a type the table does not allow.

    For programmers: a user cannot cause it.
    """
    unknown = sorted(set(record) - set(METRICS))
    if unknown:
        raise ValueError(f"metrics {unknown} are not in telemetry/metrics.py METRICS; add them there first")
    # bool is an int to isinstance; a numpy or torch scalar is neither int nor float and would not be written exactly.
    odd = sorted(name for name, value in record.items() if isinstance(value, bool) or not isinstance(value, Number))
    if odd:
        raise ValueError(f"metrics {odd} are not plain int or float")
    step = record.get("step")
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"a record needs its step, an int from 1, not {step!r}")
