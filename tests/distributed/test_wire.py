"""Bytes counted at the collective equal the papers' formulas to the byte; what is added is named item by item."""

from collections import Counter
from functools import cache
from typing import Any

import pytest

from gpt4moe.architecture.count import rank_parameters
from gpt4moe.config.load import load_run_config
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import Recompute
from gpt4moe.config.run import RunConfig
from gpt4moe.model.gpt import build_model
from gpt4moe.moe.dispatch import Dispatcher
from gpt4moe.moe.layer import is_second_forward
from gpt4moe.moe.plan import Plan
from gpt4moe.moe.statistics import EXTRAS
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.placement import rank_chunks
from gpt4moe.parallel.wire import WireCounter
from gpt4moe.planner.communication import RoutedRows, bytes_per_step
from gpt4moe.training.build import ENGINES
from gpt4moe.training.engine_deepspeed import DeepSpeedEngine
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step
from tests.distributed.case import BASE, synthetic_batches
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

Sent = Counter[tuple[str, str]]
Splits = tuple[list[int], list[int]]
# Two layers, the first one dense; four micro-batches.
SMALL = (
    "model.num_layers=2", "model.moe.layer_pattern=[0,1]", "model.ffn_hidden_size=48", "training.global_batch_size=8",
)  # fmt: skip
TIED, BF16 = "model.tied_embeddings=true", "precision=bf16"
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2-shared": (2, ("parallel.tp=2", "model.moe.shared_expert_ffn_hidden_size=16")),
    "pp2-tied": (2, ("parallel.pp=2", TIED)),
    "pp2-vpp2": (2, ("parallel.pp=2", "parallel.vpp=2", "model.num_layers=4", "model.moe.layer_pattern=[0,1,1,1]")),
    "dp2-bf16": (2, (BF16,)),
    "dp2-ep2": (2, ("parallel.ep=2",)),
    "tp2-etp2": (2, ("parallel.tp=2", "parallel.etp=2")),
    "cp2": (2, ("parallel.cp=2",)),
    "tp2-pp2-ep2": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
    "dp2-ep2-bf16, deepspeed": (2, ("parallel.ep=2", BF16, "engine=deepspeed")),
    "tp2-pp2-ep2, deepspeed": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "engine=deepspeed")),
    "tp2-pp2-ep2, the first of a stage's two layers recomputed": (
        4,
        (
            "parallel.tp=2",
            "parallel.pp=2",
            "parallel.ep=2",
            "model.num_layers=4",
            "model.moe.layer_pattern=[0,1,1,1]",
            "parallel.recompute=full",
            "parallel.recompute_layers=1",
        ),
    ),
    "tp2-etp2, recompute moe": (2, ("parallel.tp=2", "parallel.etp=2", "parallel.recompute=moe")),
    "cp2-ep2, recompute moe": (2, ("parallel.cp=2", "parallel.ep=2", "parallel.recompute=moe")),
    "cp2-etp2, recompute full": (2, ("parallel.cp=2", "parallel.etp=2", "parallel.recompute=full")),
    "cp2, recompute selective": (2, ("parallel.cp=2", "parallel.recompute=selective")),
}


def counted(environment: Environment, overrides: tuple[str, ...]) -> tuple[Sent, RoutedRows, Sent]:
    """One whole step of a rank: bytes counted, rows that crossed, and what the formula leaves out."""
    run = load_run_config([*BASE, *SMALL, *overrides])
    with world(environment) as device, pytest.MonkeyPatch.context() as patch:
        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        engine = ENGINES[run.engine.kind](build_model(run, groups), run, groups)
        runner = StepRunner(run, engine, groups)
        splits = _watch_splits(patch)
        with WireCounter(groups) as wire:
            train_step(runner, 1, synthetic_batches(run, 1, layout.dp, groups.coordinate["dp"]))
        rows, again = (_crossed(splits[is_second], groups.coordinate["ep"]) for is_second in (False, True))
        if run.parallel.recompute is Recompute.moe:  # which keeps the plan
            again = rows
        more = surplus(run, groups, engine, rows) + computed_again(run, layout, groups.coordinate["pp"], again)
        return wire.sent, rows, more


def _crossed(splits: list[Splits], own: int) -> RoutedRows:
    sent, received = (sum(sum(one[side]) - one[side][own] for one in splits) for side in (0, 1))
    return RoutedRows(sent=sent, received=received)


def _watch_splits(patch: pytest.MonkeyPatch) -> dict[bool, list[Splits]]:
    """Of every plan; True: made in a second forward pass."""
    splits: dict[bool, list[Splits]] = {False: [], True: []}
    original = Dispatcher.plan

    def plan(self: Dispatcher, *given: Any) -> Plan:
        made = original(self, *given)
        splits[is_second_forward()].append(made.splits)
        return made

    patch.setattr(Dispatcher, "plan", plan)
    return splits


def surplus(run: RunConfig, groups: ProcessGroups, engine: Any, rows: RoutedRows) -> Sent:
    """What a step sends besides, item by item."""
    layout, stage, model = groups.layout, groups.coordinate["pp"], run.model
    assert model.moe is not None
    sent: Sent = Counter()

    def all_reduced(group: str, ranks: int, size: int) -> None:
        sent[group, "all_reduce"] += round(2 * (ranks - 1) * size / ranks)

    all_reduced("dp", layout.dp, 2 * 8)  # how many tokens the loss counts, how many are padding
    all_reduced("world", layout.world_size, 8)  # the gradient norm
    # The loss and every layer's routing, for the log.
    all_reduced("world", layout.world_size, 8 * (model.num_layers + 1) * (model.moe.num_experts + len(EXTRAS)))
    experts, micro_batches = model.moe.num_experts, run.training.global_batch_size // 2 // layout.dp
    layers = [layer for chunk in rank_chunks(model.num_layers, run.parallel, stage) for layer in chunk]
    passes = micro_batches * sum(model.moe_layers[layer] for layer in layers)
    # What the load-balancing and z-losses pool: probabilities and assignments of each expert, tokens, z.
    all_reduced("tp_cp", layout.tp * layout.cp, passes * 4 * (2 * experts + 2))
    # How many rows come; and every row's router weight, in fp32.
    sent["ep", "all_to_all"] += passes * 4 * experts * (layout.ep - 1) // layout.ep + 4 * int(rows.sent + rows.received)
    tokens = model.seq_length // layout.cp * run.training.micro_batch_size // layout.tp
    gathered = passes * (layout.etp - 1) * tokens * model.moe.top_k
    sent["etp", "all_gather"] += gathered * (4 + 8)  # router weights and expert numbers
    sent["etp", "reduce_scatter"] += gathered * 4
    sizes = rank_parameters(model, run.parallel, stage)
    element = element_bytes(run)
    for group, ranks, size in (
        ("dp_cp", layout.dp * layout.cp, sizes.dense), ("expert_dp", layout.expert_dp, sizes.expert),
    ):  # fmt: skip
        padding = _flat_elements(engine, of_experts=group == "expert_dp") - size
        sent[group, "reduce_scatter"] += padding * 4 * (ranks - 1) // ranks
        sent[group, "all_gather"] += padding * element * (ranks - 1) // ranks
    return +sent


def _flat_elements(engine: Any, *, of_experts: bool) -> int:
    """Of the flat gradients that an engine reduces, padding included."""
    if isinstance(engine, DeepSpeedEngine):
        flat = [part for part in engine.partitions if getattr(part.parameters[0], "allreduce", True) != of_experts]
        return sum(part.gradients.numel() for part in flat)
    name = "expert_parallel_buffers" if of_experts else "buffers"
    return sum(buffer.numel for chunk in engine.chunks for buffer in getattr(chunk, name))


def computed_again(run: RunConfig, layout: Layout, stage: int, rows: RoutedRows) -> Sent:
    """What recompute sends a second time, of a rank of pipeline rank `stage`.

    Args:
        rows: that crossed the second time.
    """
    sent: Sent = Counter()
    kind, model, moe = run.parallel.recompute, run.model, run.model.moe
    if kind is Recompute.none:
        return sent
    assert moe is not None
    first = run.parallel.recompute_layers if kind is Recompute.full else None
    layers = [layer for chunk in rank_chunks(model.num_layers, run.parallel, stage) for layer in chunk[:first]]
    num_moe = sum(model.moe_layers[layer] for layer in layers)
    micro_batches, element = run.training.global_batch_size // 2 // layout.dp, element_bytes(run)
    tokens = micro_batches * model.seq_length * run.training.micro_batch_size // layout.cp // layout.tp
    width, weights = model.hidden_size * element, 4 * moe.top_k
    if kind in (Recompute.selective, Recompute.full):  # the core attention's keys and values
        kept = 2 * model.query_groups * model.head_size * element
        sent["cp", "all_gather"] += len(layers) * (layout.cp - 1) * tokens * kept
    if kind in (Recompute.moe, Recompute.full):  # tokens and their router's weights, to the experts
        sent["ep", "all_to_all"] += int(rows.sent) * (width + 4)
        sent["etp", "all_gather"] += num_moe * (layout.etp - 1) * tokens * (width + weights)
    if kind is Recompute.full:
        # Back from the experts; which experts, and how many rows come; what the losses pool.
        sent["ep", "all_to_all"] += int(rows.received) * width
        sent["ep", "all_to_all"] += num_moe * micro_batches * 4 * moe.num_experts * (layout.ep - 1) // layout.ep
        sent["etp", "reduce_scatter"] += num_moe * (layout.etp - 1) * tokens * width
        sent["etp", "all_gather"] += num_moe * (layout.etp - 1) * tokens * 8 * moe.top_k
        pool, pooled = layout.tp * layout.cp, 4 * (2 * moe.num_experts + 2)
        sent["tp_cp", "all_reduce"] += num_moe * micro_batches * round(2 * (pool - 1) * pooled / pool)
        # An attention, a dense MLP and shared experts each gather and scatter.
        blocks = len(layers) + (len(layers) if moe.shared_expert_ffn_hidden_size else len(layers) - num_moe)
        for operation in ("all_gather", "reduce_scatter"):
            sent["tp", operation] += blocks * (layout.tp - 1) * tokens * width
    return +sent


def element_bytes(run: RunConfig) -> int:
    return 2 if run.precision.dtype is Dtype.bf16 else 4


@cache
def answers(name: str) -> list[tuple[Sent, RoutedRows, Sent]]:
    world_size, overrides = CASES[name]
    return run_ranks(world_size, counted, overrides)


@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_what_the_formulas_say_and_a_known_surplus(name: str) -> None:
    world_size, overrides = CASES[name]
    run = load_run_config([*BASE, *SMALL, *overrides])
    layout = Layout.from_config(run.parallel, world_size)
    for rank, (sent, rows, more) in enumerate(answers(name)):
        formula: Sent = Counter()
        for group, kinds in bytes_per_step(run, layout, stage=layout.coordinate(rank)["pp"], routed=rows).items():
            for kind, size in kinds.items():
                assert size == int(size)
                formula[group, kind] += int(size)
        assert sent == formula + more, (rank, sent, formula, more)


def test_rows_that_leave_a_rank_arrive_on_another_and_are_near_the_even_share() -> None:
    sent = sum(rows.sent for _, rows, _ in answers("dp2-ep2"))
    assert sent == sum(rows.received for _, rows, _ in answers("dp2-ep2"))
    run = load_run_config([*BASE, *SMALL, "parallel.ep=2"])
    layout = Layout.from_config(run.parallel, 2)
    # 8 sequences x 16 tokens x top 2, half of which an even router sends to the other rank.
    even: dict[str, Any] = bytes_per_step(run, layout, stage=0)["ep"]
    assert even["all_to_all"] == 4 * (8 * 16 * 2 / 2 / 2) * run.model.hidden_size * 4
    assert 0.5 < sent / (8 * 16 * 2 / 2) < 1.5
