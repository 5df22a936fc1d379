"""The engine's state <-> a checkpoint: the table of parameters gives each owned range its logical place."""

import logging
import shutil
import time
from collections.abc import Collection, Iterable
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from gpt4moe.checkpoint.manifest import NAME, Manifest
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.retention import step_folder
from gpt4moe.checkpoint.saving import Save, SaveJob
from gpt4moe.checkpoint.selection import Selection, select
from gpt4moe.checkpoint.staging import Staging
from gpt4moe.checkpoint.storage import BUFFER, WEIGHT, Piece
from gpt4moe.config.load import config_to_dict
from gpt4moe.config.model import ModelConfig
from gpt4moe.errors import CheckpointError, Gpt4MoeError
from gpt4moe.model.parameters import buffers, shards
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.shard import Shard, flat_rectangles
from gpt4moe.training.engine import Engine, OwnedRange
from gpt4moe.training.run_folder import identity_of
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.stored_names import stored_names

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.01
_LONGEST_WAIT_SECONDS = 0.5


class Saver:
    """Saves one checkpoint at a time, in the background.

    Threads write and commit without any collective (checkpoint.saving). That a save has ended, well or not, the ranks
    agree on in the training thread, by a tiny all-reduce in each `poll`: so a failure ends all of them at the same
    step, none left alone in a collective.
    """

    def __init__(self) -> None:
        self.staging = Staging()
        self.save: Save | None = None

    def start(self, context: TrainingContext, *, staged: bool) -> None:
        """Begins to save the state's step. Collective; waits for the save before, if one is under way.

        Args:
            staged: the state is copied to host memory first, so training may go on; else call `wait` next.
        Raises: Gpt4MoeError on every rank when the folder cannot be made, the save before failed, or any rank cannot go
            on after this step.
        """
        self.wait(context.groups)
        run, state, groups = context.run, context.state, context.groups
        folder = step_folder(context.folder.checkpoints, state.step)
        with raise_together(groups):
            context.refuse()
            if groups.is_first_rank:
                _make_empty(folder)
        pieces = owned_pieces(context.engine, groups)
        self.save = Save(
            SaveJob(
                folder=folder,
                pieces=self.staging.copy(pieces) if staged else pieces,
                manifest=manifest_of(context),
                rank=groups.rank,
                world_size=groups.layout.world_size,
                keep=run.checkpoint.keep,
                keep_every=run.checkpoint.keep_every,
            )
        )

    def poll(self, groups: ProcessGroups) -> None:
        """Takes note of the end of the save under way, when all ranks are done. Collective while one is under way.

        Raises: Gpt4MoeError on every rank, with the failing one's words, when any could not save; what it wrote is
            removed then, unless it was committed; earlier checkpoints are untouched.
        """
        if self.save is None:
            return
        save, folder = self.save, self.save.job.folder
        unfinished = torch.tensor([int(not save.is_done)], dtype=torch.int32, device=groups.device)
        try:
            with raise_together(groups):
                if save.problem:
                    raise save.problem
        except Gpt4MoeError:
            self.save = None
            save.abandon()
            distributed.barrier()  # nobody writes into the folder any more
            if groups.is_first_rank and not (folder / NAME).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        distributed.all_reduce(unfinished, op=distributed.ReduceOp.MAX)
        if unfinished.item():
            return
        self.save = None
        if groups.is_first_rank:
            logger.info("checkpoint %s", folder)

    def wait(self, groups: ProcessGroups) -> None:
        """Polls until no save is under way. Collective."""
        wait_seconds = _WAIT_SECONDS
        self.poll(groups)
        while self.save is not None:
            time.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
            self.poll(groups)

    def leave(self) -> None:
        """The process ends, perhaps by an error: finishes what can be finished. No collective."""
        if self.save is not None:
            self.save.leave()
            self.save = None


def _make_empty(folder: Path) -> None:
    """A new folder; what a killed save left there is removed."""
    if (folder / NAME).exists():
        raise CheckpointError(f"{folder} holds a checkpoint already.", "Move it away: the run did not start from it.")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made: {error.strerror}.",
            "Earlier checkpoints are whole; make room or mend the cause, then start the run again.",
        ) from error


def manifest_of(context: TrainingContext) -> Manifest:
    """The manifest of the state's step, its files still to come."""
    run, state = context.run, context.state
    return Manifest(
        step=state.step,
        consumed_samples=state.consumed_samples,
        consumed_per_source=context.data.consumed_per_source(state.consumed_samples),
        optimizer_step=state.optimizer_step,
        run_id=context.folder.run_id,
        identity=identity_of(run, context.data.identity),
        config=config_to_dict(run),
        layout=context.groups.layout.describe(),
        versions={name: version(name) for name in ("torch", "megatron-core", "deepspeed")},
        files=[],
        tensor_names=stored_names(run.model),
    )


def owned_pieces(engine: Engine, groups: ProcessGroups) -> list[Piece]:
    """What this rank owns and writes, as rectangles of logical tensors."""
    places = {id(parameter): shard for parameter, shard, _ in shards(engine.chunks, groups)}
    return pieces_of(engine.owned(), places) + buffer_pieces(engine.chunks, groups)


def pieces_of(ranges: Iterable[OwnedRange], places: dict[int, Shard]) -> list[Piece]:
    """Those of the ranges that this rank writes; `places` has the shard of each parameter, by id."""
    pieces = []
    owned_shards = [(owned, places[id(owned.parameter)]) for owned in ranges]
    # Kind by kind, so that a conversion, which wants the weights alone, reads no blocks of states.
    kinds = dict.fromkeys(kind for owned, _ in owned_shards for kind in (WEIGHT, *owned.states))
    for kind in kinds:
        for owned, shard in owned_shards:
            if not shard.is_writer:
                continue
            flat = owned.master if kind == WEIGHT else owned.states[kind]
            for part in flat_rectangles(owned.start, owned.end, shard.shape):
                values = flat[part.start - owned.start :][: prod(part.shape)]
                offset = tuple(a + b for a, b in zip(shard.offset, part.offset, strict=True))
                pieces.append(Piece(f"{kind}/{shard.name}", shard.global_shape, offset, part.shape, values))
    return pieces


def buffer_pieces(chunks: list[Any], groups: ProcessGroups) -> list[Piece]:
    """The model's buffers that this rank writes."""
    return [
        Piece(f"{BUFFER}/{shard.name}", shard.global_shape, shard.offset, shard.shape, tensor.detach().reshape(-1))
        for tensor, shard in buffers(chunks, groups)
        if shard.is_writer
    ]


def selection_of(reader: CheckpointReader, model: ModelConfig, patterns: list[str]) -> Selection:
    """What a run with `model` takes from a checkpoint; the same on every rank. Raises: CheckpointError."""
    stored = [name for name in reader.shapes if name.partition("/")[0] in (WEIGHT, BUFFER)]
    return select(reader.folder, stored, stored_names(model), patterns)


def fill(
    reader: CheckpointReader, engine: Engine, groups: ProcessGroups, *, weights_only: bool, names: Collection[str]
) -> None:
    """Fills what this rank's optimizer owns and the model's buffers, whatever layout wrote them. Call
    engine.finish_load on every rank after.

    Args:
        weights_only: moments stay as they are: a new run from old weights.
        names: the weights and buffers to fill (selection_of); the others stay as they are, moments too.
    Raises: CheckpointError, on this rank alone, when the checkpoint is of another model or damaged.
    """
    places = {id(parameter): shard for parameter, shard, _ in shards(engine.chunks, groups)}
    for owned in engine.owned():
        shard = places[id(owned.parameter)]
        if f"{WEIGHT}/{shard.name}" not in names:
            continue
        for kind, flat in {WEIGHT: owned.master, **({} if weights_only else owned.states)}.items():
            reader.fill(f"{kind}/{shard.name}", shard, owned.start, owned.end, flat.detach())
    for tensor, shard in buffers(engine.chunks, groups):
        if f"{BUFFER}/{shard.name}" in names:
            reader.fill(f"{BUFFER}/{shard.name}", shard, 0, shard.size, tensor.detach().view(-1))
