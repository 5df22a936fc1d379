"""What one rank of benchmarks/routing.py does: a MoE layer and a whole step under prescribed routings, timed, counted.

    for each workload and step: its part of the table -> the router chooses these experts -> forward, backward (update)

Ranks are one expert-parallel group, and each has its own tokens. The router's product, softmax and losses stay; only
which experts it chooses is prescribed.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from benchmarks.routing_workloads import Routed
from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.model.gpt import build_model
from gpt4moe.moe.layer import ExpertParallelMLP
from gpt4moe.moe.routers.base import Choice
from gpt4moe.moe.routers.topk import TopK
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.wire import WireCounter
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step

Steps = list[list[Routed]]
"""[steps, MoE layers] of one workload."""
Subject = Callable[[list[Routed]], Callable[[], None]]
"""Prescribes this rank's part of a step; the returned call runs it."""


@dataclass(slots=True)
class Seen:
    """One workload on one rank."""

    seconds: list[list[float]] = field(default_factory=list)
    """[rounds, steps]."""
    bytes_sent: list[int] = field(default_factory=list)
    """[steps], over the expert-parallel group."""


def measure(
    environment: Environment, overrides: tuple[str, ...], workloads: dict[str, Steps], rounds: int, alone: bool
) -> dict[str, dict[str, Seen]]:
    """ "layer", "step" -> workload -> what this rank saw. Collective.

    Args:
        rounds: 0: bytes are counted, nothing is timed.
        alone: seconds by the clock, from a barrier on; False: seconds this process was given.
    """
    logging.getLogger().setLevel(logging.ERROR)
    run = load_run_config(list(overrides))
    with world(environment) as device:
        groups = ProcessGroups.create(
            Layout.from_config(run.parallel, environment.world_size), environment.rank, device, 1
        )
        found = {}
        for name, build in (("layer", _layer), ("step", _whole_step)):
            torch.manual_seed(environment.rank)
            found[name] = _seen(build(run, groups), workloads, groups, rounds, alone)
        return found


def _seen(
    subject: Subject, workloads: dict[str, Steps], groups: ProcessGroups, rounds: int, alone: bool
) -> dict[str, Seen]:
    seen = {name: Seen() for name in workloads}
    for name, steps in workloads.items():
        for step in steps:
            run = subject(step)
            with WireCounter(groups) as wire:
                run()
            seen[name].bytes_sent.append(wire.sent["ep", "all_to_all"])
    clock = time.perf_counter if alone else time.process_time
    for turn in range(rounds):
        for name in list(workloads)[:: -1 if turn % 2 else 1]:
            subject(workloads[name][-1])()  # finds caches and memory as the workload before left them: not counted
            seen[name].seconds.append([_timed(subject(step), clock) for step in workloads[name]])
    return seen


def _timed(run: Callable[[], None], clock: Callable[[], float]) -> float:
    distributed.barrier()
    begin = clock()
    run()
    return clock() - begin


def _layer(run: RunConfig, groups: ProcessGroups) -> Subject:
    """The first recorded layer of a step, forward and backward."""
    model, moe = run.model, run.model.moe
    assert moe is not None
    config = SimpleNamespace(hidden_size=model.hidden_size, params_dtype=torch.float32, use_cpu_initialization=True)
    layer = ExpertParallelMLP(config, moe, ExpertKernel.auto, groups)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    size = (run.training.micro_batch_size * model.seq_length, 1, model.hidden_size)
    x, gradient = torch.randn(size, requires_grad=True), torch.randn(size)

    def prescribed(step: list[Routed]) -> Callable[[], None]:
        part = step[0].part(groups.rank, groups.layout.world_size)
        prescribe(layer, part.expert_TK)
        padding_mask = None if all(it.real_T.all() for it in step) else _token_ids(part.real_T, 1)

        def once() -> None:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            layer(x, padding_mask=padding_mask)[0].backward(gradient)

        return once

    return prescribed


def _whole_step(run: RunConfig, groups: ProcessGroups) -> Subject:
    """A training step of one micro-batch; layer l has the routing of recorded layer l."""
    engine = MegatronEngine(build_model(run, groups), run, groups)
    runner = StepRunner(run, engine, groups)

    def prescribed(step: list[Routed]) -> Callable[[], None]:
        parts = [routed.part(groups.rank, groups.layout.world_size) for routed in step]
        for place, layer in enumerate(runner.moe_layers.values()):
            prescribe(layer, parts[place % len(parts)].expert_TK)
        batch = _batch(run, parts[0].real_T)
        return lambda: _discard(train_step(runner, 1, [batch]))

    return prescribed


def _discard(_: Any) -> None:
    return None


def prescribe(layer: ExpertParallelMLP, expert_TK: Tensor) -> None:
    """From now on the layer's tokens go to these experts, with weights as a top-k router would give them."""
    router = layer.router

    def choose(logits: Tensor) -> Choice:
        choice = TopK.choose(router, logits)  # type: ignore[arg-type]
        chosen = choice.probability.gather(1, expert_TK)
        return replace(choice, expert_index=expert_TK, weight=chosen / chosen.sum(dim=-1, keepdim=True))

    router.choose = choose  # type: ignore[method-assign]
    router.choose_fused = None


def _token_ids(real_T: Tensor, batch: int) -> Tensor:
    """[B, S], below 0 for padding. A layer's tokens stand sequence by sequence within a position."""
    return torch.where(real_T, torch.arange(len(real_T)), -1).view(-1, batch).t().contiguous()


def _batch(run: RunConfig, real_T: Tensor) -> Batch:
    rows, length = run.training.micro_batch_size, run.model.seq_length
    text = torch.randint(0, run.model.vocab_size, (rows, length + 1))
    token_ids = _token_ids(real_T, rows)
    return Batch(
        tokens=text[:, :-1].contiguous(),
        labels=text[:, 1:].contiguous(),
        position_ids=torch.arange(length).repeat(rows, 1),
        loss_mask=(token_ids >= 0).float(),
        token_ids=token_ids,
    )


def routings(steps: Iterable[Routed]) -> Steps:
    """Of a workload that is the same in every layer."""
    return [[step] for step in steps]
