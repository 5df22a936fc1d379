"""A hop: some ranks load a checkpoint (or start anew), take a few steps and save, on a layout of their own."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.saving import Save, SaveJob
from gpt4moe.config.load import load_run_config
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import buffers, shards
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal
from gpt4moe.training.build import ENGINES
from gpt4moe.training.checkpointing import Staging, fill
from gpt4moe.training.engine import Engine
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.pieces import owned_pieces
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step
from tests.checkpoint.builders import manifest
from tests.distributed.case import BASE, synthetic_batches
from tests.spawn import run_ranks

State = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Hop:
    """What the ranks of one hop saw."""

    losses: list[float]
    loaded: State
    """Logical tensors of all ranks right after loading; empty without."""
    final: State
    """After the last step."""
    optimizer_steps: set[float]
    """Adam's own counts right after loading, of all parameters of all ranks."""


def hop(
    world_size: int, overrides: Iterable[str], *, steps: range, load: Path | None = None, save: Path | None = None
) -> Hop:
    """Takes the steps `steps` (numbered from 1) on `world_size` ranks, from `load`, and saves into `save`."""
    if save is not None:
        save.mkdir(parents=True)
    answers = run_ranks(world_size, _rank, (*BASE, *overrides), steps, load, save)
    assert all(answer["losses"] == answers[0]["losses"] for answer in answers)
    return Hop(
        losses=answers[0]["losses"],
        loaded=_assembled(answer["loaded"] for answer in answers),
        final=_assembled(answer["final"] for answer in answers),
        optimizer_steps={count for answer in answers for count in answer["optimizer_steps"]},
    )


def _assembled(parts: Iterable[list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]]) -> State:
    """Every element must come from exactly one rank."""
    whole: State = {}
    count: dict[str, np.ndarray] = {}
    for part in parts:
        for name, shape, offset, values in part:
            where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            whole.setdefault(name, np.empty(shape, dtype=np.float32))[where] = values
            count.setdefault(name, np.zeros(shape, dtype=int))[where] += 1
    assert all((number == 1).all() for number in count.values())
    return whole


def _rank(
    environment: Environment, overrides: tuple[str, ...], steps: range, load: Path | None, save: Path | None
) -> dict[str, Any]:
    run = load_run_config(list(overrides))
    require_legal(run.model, run.parallel, run.training, environment.world_size)
    answer: dict[str, Any] = {"losses": [], "loaded": [], "optimizer_steps": []}
    with world(environment) as device:
        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        engine = ENGINES[run.engine.kind](build_model(run, groups), run, groups)
        runner = StepRunner(run, engine, groups)
        if load is not None:
            reader = CheckpointReader(load)
            fill(reader, engine, groups, weights_only=False, names=reader.shapes)
            engine.finish_load(reader.manifest.optimizer_step)
            answer |= {"loaded": _pieces(engine, groups), "optimizer_steps": _optimizer_steps(engine)}
            _assert_every_copy_is_loaded(reader, engine, groups)
        for step in steps:
            done = train_step(runner, step, synthetic_batches(run, step, layout.dp, groups.coordinate["dp"]))
            answer["losses"].append(done.result.loss)
        answer["final"] = _pieces(engine, groups)
        if save is not None:
            _save(save, engine, groups, steps.stop - 1)
    return answer


def _save(folder: Path, engine: Engine, groups: ProcessGroups, step: int) -> None:
    saving = Save(
        SaveJob(
            folder=folder,
            pieces=Staging().copy(owned_pieces(engine, groups)),
            manifest=manifest(step=step, optimizer_step=step),
            rank=groups.rank,
            world_size=groups.layout.world_size,
            keep=0,
            keep_every=0,
        )
    )
    while not saving.is_done:
        time.sleep(0.01)
    assert saving.problem is None, saving.problem


def _pieces(engine: Engine, groups: ProcessGroups) -> list[tuple[Any, ...]]:
    return [
        (piece.tensor, piece.global_shape, piece.offset, piece.values.detach().clone().view(piece.shape).numpy())
        for piece in owned_pieces(engine, groups)
    ]


def _optimizer_steps(engine: Engine) -> list[float]:
    inner = engine._inner() if isinstance(engine, MegatronEngine) else [engine.optimizer]
    states = [each.optimizer.state for each in inner]
    return [entry["step"].item() for state in states for entry in state.values()]


def _assert_every_copy_is_loaded(reader: CheckpointReader, engine: Engine, groups: ProcessGroups) -> None:
    """The weights that the model computes with, also those that another rank writes, are the cast of the masters."""
    for parameter, shard, _ in shards(engine.chunks, groups):
        stored = torch.empty(shard.size)
        reader.fill(f"weight/{shard.name}", shard, 0, shard.size, stored)
        assert parameter.detach().reshape(-1).equal(stored.to(parameter.dtype)), shard.name
    for buffer, shard in buffers(engine.chunks, groups):
        assert buffer.equal(reader.tensor(f"buffer/{shard.name}")), shard.name
