"""What a step's result says, as metrics: losses of sources, auxiliary losses, router health by groups of layers."""

from collections.abc import Callable

from gpt4moe.config.run import RunConfig
from gpt4moe.moe.statistics import LayerHealth
from gpt4moe.runlog.metrics import Record, layer_groups
from gpt4moe.training.step import StepResult


def _mean(values: list[float]) -> float:
    # Every MoE layer has the same tokens: a mean over layers is one over their assignments.
    return sum(values) / len(values)


_HEALTH: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "expert_load_max_over_mean": ("load_max_over_mean", max),
    "expert_load_variation": ("load_variation", max),
    "dead_experts": ("dead_experts", lambda values: int(sum(values))),
    "dropped_share": ("dropped_share", _mean),
    "router_entropy": ("entropy", _mean),
    "router_margin": ("margin", _mean),
}
"""Metric -> field of LayerHealth, and how several layers make one number."""


def routing_metrics(run: RunConfig, result: StepResult) -> Record:
    """Auxiliary losses (scaled, mean over MoE layers) and router health of one step, from the statistics table."""
    moe, layers = run.model.moe, [index for index, has in enumerate(run.model.moe_layers) if has]
    if moe is None:
        return {"aux_loss": 0.0, "z_loss": 0.0}
    table = result.routing[layers]
    aux_loss, z_loss = table[:, -2:].mean(dim=0).tolist()
    record: Record = {"aux_loss": aux_loss, "z_loss": z_loss}
    health, groups = LayerHealth.of(table, moe.num_experts, moe.top_k), layer_groups(layers)
    for name, (field, reduce) in _HEALTH.items():
        # Lists from here on: 60 reductions of a few numbers cost torch milliseconds.
        of_layers: list[float] = getattr(health, field).tolist()
        record[name] = reduce(of_layers)
        for group, places in groups.items():
            record[f"{name}/{group}"] = reduce([of_layers[place] for place in places])
    return record


def source_losses(name: str, result: StepResult, source_names: list[str]) -> Record:
    """Token mean of each data source that has tokens in this result; nothing where there is one source alone."""
    if not result.sources.numel():
        return {}
    sums = zip(source_names, *result.sources.tolist(), strict=True)
    return {f"{name}/{source}": loss / tokens for source, loss, tokens in sums if tokens}
