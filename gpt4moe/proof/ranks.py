"""One rank of a proof: builds the run, takes a few steps, returns the numbers that it owns.

    build_model -> engine -> [ training.update.train_step, by the optimizer or by plain descent ] x steps

The same code as training from the model down to the weights; only the data and the update by descent are our own.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from math import inf, prod
from typing import Any

import numpy as np
import torch

from gpt4moe.architecture.rows import Cut, Family
from gpt4moe.config.optimizer_table import OPTIMIZERS
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import buffers, reduced_over, shards
from gpt4moe.moe.statistics import EXTRAS
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal
from gpt4moe.parallel.shard import flat_rectangles
from gpt4moe.proof.batches import ended_early, synthetic_batches
from gpt4moe.proof.outcome import (
    BUFFER,
    GRADIENT,
    START,
    WEIGHT,
    RankAnswer,
    TensorPiece,
    WeightCopy,
    gradient_kind,
)  # fmt: skip
from gpt4moe.proof.plan import Phase
from gpt4moe.proof.watch import Watch
from gpt4moe.training.build import ENGINES
from gpt4moe.training.engine import Engine, OwnedRange
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import GO_ON, train_step

Prepare = Callable[[list[Any], ProcessGroups], None]


def run_phases(
    environment: Environment,
    phases: list[Phase],
    prepare: Prepare | None = None,
    say: Callable[[str], Any] = str,
) -> list[RankAnswer]:
    """This rank's answers. Collective.

    Args:
        phases: of one layout, which the first one's run gives.
        prepare: changes the initial weights, called with chunks and groups.
        say: called after each step.
    """
    first = phases[0].run
    require_legal(first.model, first.parallel, first.training, environment.world_size)
    with world(environment) as device:
        layout = Layout.from_config(first.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, first.run.seed)
        return [_run_phase(phase, groups, prepare, say) for phase in phases]


def _run_phase(phase: Phase, groups: ProcessGroups, prepare: Prepare | None, say: Callable[[str], Any]) -> RankAnswer:
    run, answer = phase.run, RankAnswer(extras=EXTRAS)
    chunks = build_model(run, groups)
    _open_gates(chunks, groups, phase.gates)
    if prepare is not None:
        prepare(chunks, groups)
    if phase.nudge:
        _nudge(chunks, phase.nudge, phase.draw)
    engine = ENGINES[run.engine.kind](chunks, run, groups)
    answer.copies_at_start = _copies(engine, groups)
    if phase.every_gradient or phase.note_outputs:
        answer.pieces[START] = _pieces(engine, groups, (WEIGHT,))[WEIGHT]
    runner = StepRunner(run, engine, groups)
    watch = Watch(engine.chunks, run, groups)

    def keep_gradients(step: int) -> None:
        if step == 1 or phase.every_gradient:
            answer.pieces[gradient_kind(step)] = _pieces(engine, groups, (GRADIENT,))[GRADIENT]

    for step in range(1, phase.steps + 1):
        watch.begin_step(note_outputs=phase.note_outputs and step == 1)
        dp = groups.layout.dp, groups.coordinate["dp"]
        batches = synthetic_batches(run, step, *dp, phase.tokens)
        done = train_step(
            runner,
            step,
            ended_early(batches, step, *dp) if phase.ends_early else batches,
            policy=lambda numbers, run: GO_ON,  # a number that is not finite is a difference to report
            after_reduce=partial(keep_gradients, step),
            update=None if phase.descent is None else partial(_descend, engine, phase.descent, step),
        )
        answer.losses.append(done.result.loss)
        answer.routing.append(done.result.routing.numpy())
        answer.margins.append(float(np.min([inf, *watch.margins])))
        answer.drop_margins.append(float(np.min([inf, *watch.slot_margins])))
        answer.norms.append(done.grad_norm)
        say(f"step {step}")
    engine.finish_update()
    answer.pieces |= _pieces(engine, groups, (WEIGHT, *OPTIMIZERS[run.optimizer.kind].states)) | {
        BUFFER: _buffers(engine, groups)
    }
    answer.outputs, answer.loss_parts = watch.outputs, watch.loss_parts
    answer.copies = _copies(engine, groups)
    answer.stale = _stale(engine, groups)
    return answer


@torch.no_grad()
def _open_gates(chunks: list[Any], groups: ProcessGroups, value: float) -> None:
    for parameter, _, row in shards(chunks, groups):
        if row.family is Family.gates:
            parameter.fill_(value)


@torch.no_grad()
def _nudge(chunks: list[Any], share: float, seed: int) -> None:
    """Moves every weight by up to `share` of itself. For one process only: ranks would draw different numbers."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        away = 2 * torch.rand(parameter.shape, generator=generator) - 1
        parameter.copy_(parameter.float() * (1 + share * away))


@torch.no_grad()
def _descend(engine: Engine, rate: float, step: int, _: float) -> None:
    for owned in engine.owned():
        owned.master.sub_(owned.gradient, alpha=rate)
    engine.finish_load(step)


def _pieces(engine: Engine, groups: ProcessGroups, kinds: tuple[str, ...]) -> dict[str, list[TensorPiece]]:
    """Everything this rank owns and writes."""
    boxes = {id(parameter): shard for parameter, shard, _ in shards(engine.chunks, groups)}
    pieces: dict[str, list[TensorPiece]] = {kind: [] for kind in kinds}
    for owned in engine.owned():
        shard = boxes[id(owned.parameter)]
        if not shard.is_writer:
            continue
        for kind in kinds:
            values = _flat(owned, kind).detach().float().cpu().numpy()
            for part in flat_rectangles(owned.start, owned.end, shard.shape):
                box = values[part.start - owned.start :][: prod(part.shape)].reshape(part.shape).copy()
                offset = tuple(a + b for a, b in zip(shard.offset, part.offset, strict=True))
                pieces[kind].append(TensorPiece(shard.name, shard.global_shape, offset, box))
    return pieces


def _flat(owned: OwnedRange, kind: str) -> torch.Tensor:
    if kind == GRADIENT:
        return owned.gradient
    return owned.master if kind == WEIGHT else owned.states[kind]


def _stale(engine: Engine, groups: ProcessGroups) -> list[str]:
    """Parameters whose owned elements are not what their masters round to."""
    names = {id(parameter): shard.name for parameter, shard, _ in shards(engine.chunks, groups)}
    found = set()
    for owned in engine.owned():
        held = owned.parameter.detach().flatten()[owned.start : owned.end]
        if not torch.equal(held, owned.master.detach().flatten().to(held)):
            found.add(names[id(owned.parameter)])
    return sorted(found)


def _buffers(engine: Engine, groups: ProcessGroups) -> list[TensorPiece]:
    return [
        TensorPiece(shard.name, shard.global_shape, shard.offset, buffer.cpu().numpy().copy())
        for buffer, shard in buffers(engine.chunks, groups) if shard.is_writer
    ]  # fmt: skip


def _copies(engine: Engine, groups: ProcessGroups) -> list[WeightCopy]:
    """The weights and buffers this rank computes with, as digests."""
    held = [
        (parameter, shard, rule.cut, reduced_over(parameter))
        for parameter, shard, rule in shards(engine.chunks, groups)
    ]  # fmt: skip
    held += [(buffer, shard, Cut.whole, ()) for buffer, shard in buffers(engine.chunks, groups)]
    return [
        WeightCopy(
            name=shard.name, offset=shard.offset, cut=cut.words, reduced_over=reduced,
            digest=hashlib.blake2b(
                tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16
            ).digest(),
        )
        for tensor, shard, cut, reduced in held
    ]  # fmt: skip
