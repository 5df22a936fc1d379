"""The engine's state <-> a checkpoint: the table of parameters gives each owned range its logical place."""

from importlib.metadata import version
from math import prod
from pathlib import Path

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.retention import prune, step_folder
from gpt4moe.checkpoint.storage import Piece
from gpt4moe.checkpoint.writer import save_checkpoint
from gpt4moe.config.load import config_to_dict
from gpt4moe.model.parameters import shards
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.shard import flat_rectangles
from gpt4moe.training.engine import Engine
from gpt4moe.training.run_folder import identity_of
from gpt4moe.training.state import TrainingContext

WEIGHT = "weight"
"""Kind of the fp32 master weights; the model's own weights are their cast and are not stored."""


def save(context: TrainingContext) -> Path:
    """Writes the checkpoint of the state's step and applies retention. Collective.

    Raises: CheckpointError on every rank when it could not be saved.
    """
    run, state, groups = context.run, context.state, context.groups
    folder = step_folder(context.folder.checkpoints, state.step)
    manifest = Manifest(
        step=state.step,
        consumed_samples=state.consumed_samples,
        consumed_per_source=context.data.consumed_per_source(state.consumed_samples),
        optimizer_step=state.step,
        run_id=context.folder.run_id,
        identity=identity_of(run, context.data.identity),
        config=config_to_dict(run),
        layout=groups.layout.describe(),
        versions={name: version(name) for name in ("torch", "megatron-core", "deepspeed")},
        files=[],
    )
    save_checkpoint(folder, owned_pieces(context.engine, groups), manifest, groups)
    if groups.is_first_rank:
        prune(context.folder.checkpoints, keep=run.checkpoint.keep, keep_every=run.checkpoint.keep_every)
    return folder


def owned_pieces(engine: Engine, groups: ProcessGroups) -> list[Piece]:
    """What this rank owns and writes, as rectangles of logical tensors."""
    places = {id(parameter): shard for parameter, shard, _ in shards(engine.chunks, groups)}
    pieces = []
    for owned in engine.owned():
        shard = places[id(owned.parameter)]
        if not shard.is_writer:
            continue
        for kind, flat in {WEIGHT: owned.master, **owned.moments}.items():
            for part in flat_rectangles(owned.start, owned.end, shard.shape):
                values = flat[part.start - owned.start :][: prod(part.shape)]
                offset = tuple(a + b for a, b in zip(shard.offset, part.offset, strict=True))
                pieces.append(Piece(f"{kind}/{shard.name}", shard.global_shape, offset, part.shape, values))
    return pieces


def fill(reader: CheckpointReader, engine: Engine, groups: ProcessGroups, *, weights_only: bool) -> None:
    """Fills what this rank's optimizer owns, whatever layout wrote it. Call engine.finish_load on every rank after.

    Args:
        weights_only: moments stay as they are: a new run from old weights.
    Raises: CheckpointError, on this rank alone, when the checkpoint is of another model or damaged.
    """
    places = {id(parameter): shard for parameter, shard, _ in shards(engine.chunks, groups)}
    for owned in engine.owned():
        shard = places[id(owned.parameter)]
        for kind, flat in {WEIGHT: owned.master, **({} if weights_only else owned.moments)}.items():
            reader.fill(f"{kind}/{shard.name}", shard, owned.start, owned.end, flat.detach())
