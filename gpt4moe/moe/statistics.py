"""Routing statistics: what a step counts in every MoE layer, and the metrics made of it. Each is declared here, once.

    micro-batch --RoutingStatistics.add--> a row of sums --training.step, one all-reduce--> table [layers, E + columns]
    table --to_means, routing_metrics--> `router_entropy`, `router_entropy/layers_000_014`, ... of metrics.jsonl

A row is fp64 and has the tokens of each expert (before drops), then COLUMNS. Every layer has one, dense layers a row of
zeros, so that all ranks reduce a table of the same shape. Padding tokens are in none of it.

To add a statistic: a column (how one micro-batch is measured) and a metric made of it (unit, meaning, how layers become
one number). The log, docs/metrics.md and its check follow; configs/dashboard.yaml gets a panel.

No torch is imported here: the reading side (runlog.metrics_table, tools/runs.py) knows the metrics from this file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt4moe.config.model import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, device

    from gpt4moe.moe.routers.base import Routing

MAX_LAYER_GROUPS = 8
"""Of one metric: neighbouring MoE layers share a key, so that 120 layers make 8 curves and not 120."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedBatch:
    """One micro-batch of one layer, on one rank: what a column is measured on. Tensors without gradient."""

    routing: "Routing"
    load: "Tensor"
    """[E] assignments of this rank's real tokens, before drops."""
    keep: "Tensor | None"
    """[T, K] bool, assignments that are sent; None: all."""
    real_T: "Tensor | None"
    """False for padding; None: every token is real."""
    losses: "tuple[Tensor, Tensor]"
    """Load-balancing and z-loss, scaled by their coefficients, the same on every rank of the pool."""
    pool_size: int
    """Ranks of the pool (tp x cp)."""

    def real(self, value_T: "Tensor") -> "Tensor":
        """[T], with 0 for padding."""
        return value_T if self.real_T is None else value_T * self.real_T

    def part(self, loss: "Tensor") -> "Tensor":
        """This rank's part of a loss that all ranks of the pool have, so that the sum over ranks counts it once."""
        return loss if self.pool_size == 1 else loss.double() * (1 / self.pool_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One number that a step sums up for each layer, over ranks and micro-batches."""

    measure: "Callable[[RoutedBatch], Tensor | None]"
    """This rank's part of one micro-batch; None: 0."""
    is_mean: bool = False
    """The sum is divided by the number of micro-batches of the global batch."""


def _dropped(batch: RoutedBatch) -> "Tensor | None":
    return None if batch.keep is None else batch.load.sum() - batch.keep.sum()


def _entropy(batch: RoutedBatch) -> "Tensor":
    from torch.special import entr

    if batch.routing.sums is not None:
        return batch.routing.sums.entropy
    return batch.real(entr(batch.routing.probability).sum(dim=1)).sum()


def _margin(batch: RoutedBatch) -> "Tensor":
    import torch

    if batch.routing.sums is not None:
        return batch.routing.sums.margin
    return batch.real(batch.routing.margin).sum(dtype=torch.float64)


COLUMNS: dict[str, Column] = {
    "dropped": Column(measure=_dropped),
    "entropy": Column(measure=_entropy),
    "margin": Column(measure=_margin),
    "load_balancing_loss": Column(measure=lambda it: it.part(it.losses[0]), is_mean=True),
    "z_loss": Column(measure=lambda it: it.part(it.losses[1]), is_mean=True),
}
EXTRAS: tuple[str, ...] = tuple(COLUMNS)
"""What follows the tokens of the experts in a row, in this order."""


class RoutingStatistics:
    """Owns what one layer counts from one reset to the next: in the micro-batches of a step, on this rank. They are
    summed when they are read, which takes fewer kernels than a sum for each micro-batch."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.loads: list[Tensor] = []
        self.measured: dict[str, list[Tensor]] = {}

    def reset(self) -> None:
        self.loads, self.measured = [], {}

    def add(self, batch: RoutedBatch) -> None:
        """Adds one micro-batch."""
        self.loads.append(batch.load)
        for name, of in COLUMNS.items():
            if (value := of.measure(batch)) is not None:
                self.measured.setdefault(name, []).append(value.detach())

    def read(self, device: "device") -> "Tensor":
        """The row so far, [E + columns] fp64; zeros where nothing was added."""
        import torch

        row = torch.zeros(row_width(self.num_experts), dtype=torch.float64, device=device)
        if self.loads:
            tokens_of_experts(row).copy_(torch.stack(self.loads).sum(dim=0))
        for name, values in self.measured.items():
            column(row, name).copy_(torch.stack(values).double().sum())
        return row


def row_width(num_experts: int) -> int:
    return num_experts + len(COLUMNS)


def tokens_of_experts(table: "Tensor") -> "Tensor":
    """[..., E] of rows [..., E + columns], a view."""
    return table[..., : -len(COLUMNS)]


def column(table: "Tensor", name: str) -> "Tensor":
    """[...] of rows [..., E + columns], a view."""
    return table[..., EXTRAS.index(name) - len(COLUMNS)]


def to_means(table: "Tensor", num_micro_batches: int) -> None:
    """Divides, in place, the columns that are means over the micro-batches of the global batch."""
    for name, of in COLUMNS.items():
        if of.is_mean:
            column(table, name).div_(num_micro_batches)


class LayerTable:
    """The rows of all MoE layers, summed over ranks, and what metrics compute from them: [layers] fp64 each.

    Args:
        rows: [layers, E + columns]. A layer that saw no token is all zeros.
    """

    def __init__(self, rows: "Tensor", top_k: int):
        self.rows = rows
        self.top_k = top_k
        self.load = tokens_of_experts(rows)
        self.assigned = self.load.sum(dim=1).clamp_min(1)
        self.mean_load = self.assigned / self.load.shape[1]

    def of(self, name: str) -> "Tensor":
        return column(self.rows, name)

    def per_token(self, name: str) -> "Tensor":
        return self.of(name) * self.top_k / self.assigned


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMetric:
    """A number of metrics.jsonl that is made of the table."""

    unit: str
    meaning: str
    value: "Callable[[LayerTable], Tensor]"
    """[layers]; without `over_layers` one number of all layers."""
    over_layers: Callable[[list[float]], float] | None = None
    """How several layers become one number, for the whole model and for each group of layers; None: the metric has no
    groups."""


def _mean(values: list[float]) -> float:
    # Every MoE layer has the same tokens: a mean over layers is one over their assignments.
    return sum(values) / len(values)


LAYER_METRICS: dict[str, LayerMetric] = {
    "aux_loss": LayerMetric(
        unit="",
        meaning="load-balancing loss times its coefficient, mean over MoE layers",
        value=lambda it: it.of("load_balancing_loss").mean(),
    ),
    "z_loss": LayerMetric(
        unit="",
        meaning="router z-loss times its coefficient, mean over MoE layers",
        value=lambda it: it.of("z_loss").mean(),
    ),
    "expert_load_max_over_mean": LayerMetric(
        unit="ratio",
        meaning="tokens of the busiest expert over the mean, worst layer; 1 is even",
        value=lambda it: it.load.max(dim=1).values / it.mean_load,
        over_layers=max,
    ),
    "expert_load_variation": LayerMetric(
        unit="ratio",
        meaning="standard deviation of the experts' tokens over their mean, worst layer; 0 is even",
        value=lambda it: it.load.std(dim=1, correction=0) / it.mean_load,
        over_layers=max,
    ),
    "dead_experts": LayerMetric(
        unit="experts",
        meaning="experts that got no token in this step, counted over the layers",
        value=lambda it: (it.load == 0).sum(dim=1),
        over_layers=lambda values: int(sum(values)),
    ),
    "dropped_share": LayerMetric(
        unit="share",
        meaning="routed copies of tokens dropped for lack of capacity, over all of them; 0 to 1",
        value=lambda it: it.of("dropped") / it.assigned,
        over_layers=_mean,
    ),
    "router_entropy": LayerMetric(
        unit="nats",
        meaning="entropy of the router's probabilities, mean over tokens and layers",
        value=lambda it: it.per_token("entropy"),
        over_layers=_mean,
    ),
    "router_margin": LayerMetric(
        unit="score",
        meaning="score gap between the last chosen expert and the next one, mean over tokens and layers",
        value=lambda it: it.per_token("margin"),
        over_layers=_mean,
    ),
}


def routing_metrics(table: "Tensor", model: ModelConfig) -> Mapping[str, float]:
    """LAYER_METRICS of a step: `name` over all MoE layers, `name/group` for each group of them.

    A dense model has the metrics without groups, and they are 0.

    Args:
        table: [layers of the model, E + columns], summed over ranks, after to_means.
    """
    layers = [index for index, is_moe in enumerate(model.moe_layers) if is_moe]
    if model.moe is None:
        return {name: 0.0 for name, metric in LAYER_METRICS.items() if metric.over_layers is None}
    rows, groups = LayerTable(table[layers], model.moe.top_k), layer_groups(layers)
    found: dict[str, float] = {}
    for name, metric in LAYER_METRICS.items():
        value = metric.value(rows)
        if metric.over_layers is None:
            found[name] = value.item()
            continue
        # Lists from here on: 60 reductions of a few numbers cost torch milliseconds.
        of_layers: list[float] = value.tolist()
        found[name] = metric.over_layers(of_layers)
        for group, places in groups.items():
            found[f"{name}/{group}"] = metric.over_layers([of_layers[place] for place in places])
    return found


def layer_groups(layers: list[int]) -> dict[str, list[int]]:
    """Key's last part -> places in `layers`: groups of neighbours, equal to within one, MAX_LAYER_GROUPS at most.

    Args: layers: global indices of the MoE layers, from 0, ascending.
    """
    count = min(len(layers), MAX_LAYER_GROUPS)
    width = len(str(layers[-1])) if layers else 1
    groups = {}
    for group in range(count):
        places = list(range(len(layers) * group // count, len(layers) * (group + 1) // count))
        first, last = layers[places[0]], layers[places[-1]]
        name = f"layers_{first:0{width}}_{last:0{width}}" if first < last else f"layer_{first:0{width}}"
        groups[name] = places
    return groups
