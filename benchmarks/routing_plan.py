"""What the planner says of a routing: bytes of every rank and step, and time as a multiple of the balanced one's."""

from dataclasses import dataclass, replace
from statistics import mean

from benchmarks.routing_ranks import Steps
from benchmarks.routing_workloads import Routed
from gpt4moe.architecture.rows import Component
from gpt4moe.config.load import load_plan_config
from gpt4moe.config.plan import PlanConfig
from gpt4moe.planner.estimate import timed_work
from gpt4moe.planner.layer_time import layer_seconds
from gpt4moe.planner.routed import Counts, computed_rows, exchanged_bytes
from gpt4moe.planner.step_time import step_time
from gpt4moe.planner.work import Work

FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """Of one workload."""

    bytes_sent: list[list[int]]
    """[ranks, steps], over the expert-parallel group."""
    multiple: float
    """Time over that of the balanced workload, mean over steps."""


def planned(
    subject: str, overrides: tuple[str, ...], workloads: dict[str, Steps], ranks: int, balanced: str
) -> dict[str, Planned]:
    """Of "layer" or "step", each workload."""
    plan = load_plan_config([one for one in overrides if not one.startswith("run.")] + [f"gpus={ranks}"])
    work, seconds_of = timed_work(plan), _layer_seconds if subject == "layer" else _step_seconds
    num_layers = 1 if subject == "layer" else plan.model.num_layers
    seconds, sent = {}, {}
    for name, steps in workloads.items():
        counts = [_counts(plan, step, num_layers, ranks) for step in steps]
        seconds[name] = mean(seconds_of(plan, work, of_layers) for of_layers in counts)
        sent[name] = [list(of_rank) for of_rank in zip(*(_bytes_sent(plan, it) for it in counts), strict=True)]
    return {name: Planned(bytes_sent=sent[name], multiple=seconds[name] / seconds[balanced]) for name in workloads}


def _counts(plan: PlanConfig, step: list[Routed], num_layers: int, ranks: int) -> list[Counts]:
    """Of every MoE layer, as benchmarks.routing_ranks deals them."""
    assert plan.model.moe is not None
    return [step[place % len(step)].counts(plan.model.moe.num_experts, ranks) for place in range(num_layers)]


def _bytes_sent(plan: PlanConfig, layers: list[Counts]) -> list[int]:
    """[ranks]"""
    of_layers = [exchanged_bytes(counts, FP32 * plan.model.hidden_size) for counts in layers]
    return [sum(of_rank) for of_rank in zip(*of_layers, strict=True)]


def _busiest(plan: PlanConfig, layers: list[Counts]) -> float:
    """Rows that the busiest rank computes over what an even routing without padding would give it, mean over layers."""
    assert plan.model.moe is not None
    tokens = plan.training.micro_batch_size * plan.model.seq_length
    return mean(max(computed_rows(counts)) for counts in layers) / (tokens * plan.model.moe.top_k)


def _step_seconds(plan: PlanConfig, work: Work, layers: list[Counts]) -> float:
    return step_time(replace(work, imbalance=_busiest(plan, layers)), plan.training, len(layers[0])).seconds


def _layer_seconds(plan: PlanConfig, work: Work, layers: list[Counts]) -> float:
    """Of a MoE layer without its attention."""
    kind = work.kinds[0]
    experts = tuple(tensor for tensor in kind.tensors if tensor.component is not Component.attention)
    parts = layer_seconds(replace(work, imbalance=_busiest(plan, layers)), replace(kind, tensors=experts))
    return sum(seconds for part, seconds in parts.items() if part != "attention")
