"""What a step's result says, as metrics: losses of sources, auxiliary losses, router health by groups of layers."""

from collections.abc import Callable

import torch
from torch import Tensor

from gpt4moe.config.run import RunConfig
from gpt4moe.moe.statistics import LayerHealth
from gpt4moe.telemetry.metrics import Record, layer_groups
from gpt4moe.training.step import StepResult

_HEALTH: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "expert_load_max_over_mean": ("load_max_over_mean", torch.max),
    "expert_load_variation": ("load_variation", torch.max),
    "dead_experts": ("dead_experts", torch.sum),
    # Every MoE layer has the same tokens: a mean over layers is one over their assignments.
    "dropped_share": ("dropped_share", torch.mean),
    "router_entropy": ("entropy", torch.mean),
    "router_margin": ("margin", torch.mean),
}
"""Metric -> field of LayerHealth, and how several layers make one number."""


def routing_metrics(run: RunConfig, result: StepResult) -> Record:
    """Auxiliary losses (scaled, mean over MoE layers) and router health of one step, from the statistics table."""
    moe, layers = run.model.moe, [index for index, has in enumerate(run.model.moe_layers) if has]
    if moe is None:
        return {"aux_loss": 0.0, "z_loss": 0.0}
    table = result.routing[layers]
    balance, z_loss = table[:, -2:].unbind(dim=1)
    record: Record = {"aux_loss": balance.mean().item(), "z_loss": z_loss.mean().item()}
    health = LayerHealth.of(table, moe.num_experts, moe.top_k)
    for name, (field, reduce) in _HEALTH.items():
        of_layers: Tensor = getattr(health, field)
        record[name] = reduce(of_layers).item()
        record.update(
            {f"{name}/{group}": reduce(of_layers[places]).item() for group, places in layer_groups(layers).items()}
        )
    return record


def source_losses(name: str, result: StepResult, source_names: list[str]) -> Record:
    """Token mean of each data source that has tokens in this result; nothing where there is one source alone."""
    if not result.sources.numel():
        return {}
    sums = zip(source_names, *result.sources.tolist(), strict=True)
    return {f"{name}/{source}": loss / tokens for source, loss, tokens in sums if tokens}
