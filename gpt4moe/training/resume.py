"""What a launch begins with: the run folder's latest checkpoint, else checkpoint.load, else initial weights.

latest_step -> place_of_source -> find_source -> load_source
"""

import logging
import os
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from gpt4moe.architecture.vision import is_vision
from gpt4moe.checkpoint.base import base_folder, refuse_adapters
from gpt4moe.checkpoint.manifest import NAME, Manifest
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.retention import find_checkpoint, latest_saved, step_folder
from gpt4moe.checkpoint.selection import Selection, base_model, selection_of
from gpt4moe.config.load import config_from_dict
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.typed import FieldError, from_plain
from gpt4moe.config.vision import EncoderKind
from gpt4moe.data.loader import Data
from gpt4moe.data.passed_over import PassedOver
from gpt4moe.errors import CheckpointError, LaunchError
from gpt4moe.parallel.agreement import broadcast_int, broadcast_text, raise_together
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.shard import BUFFER, WEIGHT
from gpt4moe.resilience.recent import Recent
from gpt4moe.training.checkpointing import fill
from gpt4moe.training.engine import Engine
from gpt4moe.training.gone_back import settle, suspicion
from gpt4moe.training.identity import ENCODER, comparable, identity_of, refuse_other_identity, with_our_future
from gpt4moe.training.run_folder import RunFolder
from gpt4moe.training.state import TrainState

logger = logging.getLogger(__name__)

LISTING_SECONDS = 120.0
"""NFS shows a folder as it was for a minute at most, unless somebody set it longer (acdirmax)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The checkpoint that a launch begins with."""

    reader: CheckpointReader
    is_whole: bool
    """True: it is a checkpoint of this very run, and everything is loaded. False: only weights are loaded."""
    selection: Selection
    base: CheckpointReader | None = None
    """With adapters: the checkpoint of the frozen weights; `reader` may be this one too, where a run begins."""
    state: TrainState
    """The state that the launch begins with: the checkpoint's if is_whole, else all zeros."""

    @property
    def frozen(self) -> list[str]:
        """KIND/NAME of what is loaded from a base that is another checkpoint than `reader`."""
        if self.base is None or self.base is self.reader:
            return []
        return [name for name in self.base.shapes if name.startswith((f"{WEIGHT}/", f"{BUFFER}/"))]


def latest_step(folder: RunFolder, groups: ProcessGroups) -> int:
    """Step of the checkpoint that the run goes on from, the same on every rank; 0 for none. Collective.

    Only rank 0 looks: a shared file system may show another rank an older list of files.

    Raises: Gpt4MoeError on every rank when the record of the run's goings back is damaged.
    """
    latest = 0
    with raise_together(groups):
        if groups.is_first_rank:
            latest = latest_saved(folder.path)
    return broadcast_int(latest, groups)


def passed_over(folder: RunFolder, groups: ProcessGroups) -> PassedOver | None:
    """The samples that the run went back from; None: it never did. The checkpoints of these steps are renamed. Only
    rank 0 looks. Collective, run folder locked.

    Raises: Gpt4MoeError on every rank (gone_back.settle).
    """
    found = None
    with raise_together(groups):
        if groups.is_first_rank:
            found = settle(folder.path)
    flat = [number for window in found.as_lists() for number in window] if found else []
    count = broadcast_int(len(flat), groups)
    flat = [broadcast_int(number, groups) for number in flat or [0] * count]
    return PassedOver.of(list(zip(flat[::2], flat[1::2], strict=True))) if flat else None


def place_of_source(run: RunConfig, folder: RunFolder, latest: int, groups: ProcessGroups) -> Path | None:
    """The step folder that the launch begins with, the same on every rank, once every rank sees its files as rank 0
    does; None: initial weights. Collective.

    A file system of many nodes may show one of them an older folder for a minute: without a file, or another checkpoint
    of this name. Then ranks would load parts of two states, or take a whole checkpoint for damaged.

    Raises: Gpt4MoeError on every rank when there is none, or a rank still sees another one after LISTING_SECONDS.
    """
    path = None
    with raise_together(groups):
        if groups.is_first_rank and latest:
            path = step_folder(folder.checkpoints, latest)
        elif groups.is_first_rank and run.checkpoint.load is not None:
            path = find_checkpoint(Path(run.checkpoint.load))
    first = broadcast_text(f"{as_seen(path)} {path}" if path else "", groups)
    if not first:
        return None
    wanted, _, place = first.partition(" ")
    with raise_together(groups):
        _await_listing(Path(place), wanted, groups.rank)
    return Path(place)


def as_seen(folder: Path) -> str:
    """A checksum of a checkpoint's manifest and of the names of its files, as this process sees them. A folder that
    cannot be read (NFS: ESTALE) is another one than any that can. No file of a rank is asked for: every rank calls
    this."""
    try:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        seen = "\n".join(names).encode() + b"\n" + (folder / NAME).read_bytes()
    except OSError as error:
        seen = f"errno {error.errno}".encode()
    return sha256(seen).hexdigest()


def _await_listing(folder: Path, wanted: str, rank: int) -> None:
    until, wait_seconds = time.monotonic() + LISTING_SECONDS, 0.05
    while as_seen(folder) != wanted:
        if time.monotonic() > until:
            raise LaunchError(
                f"Rank {rank} on {os.uname().nodename} sees other files in {folder} than rank 0, for "
                f"{LISTING_SECONDS:.0f} s.",
                "Look at this node's mount of the file system (NFS: actimeo), then start again.",
            )
        time.sleep(wait_seconds)
        wait_seconds = min(2 * wait_seconds, 2.0)


def find_source(run: RunConfig, folder: RunFolder, data: Data, latest: int, path: Path | None) -> Source | None:
    """Opens the checkpoint to begin with, without loading it; None: initial weights.

    Raises: CheckpointError; ConfigError for a checkpoint in the run folder that is not of this run.
    """
    if path is None:
        return None
    reader = CheckpointReader(path)
    manifest = reader.manifest
    if run.model.lora is None:
        refuse_adapters(path, manifest)
    ours = identity_of(run, data.identity)
    drawn = PassedOver.of(manifest.passed_over or []).position(manifest.consumed_samples)
    theirs, our_side = comparable(with_our_future(manifest.identity, ours, run, drawn), ours)
    if latest:
        refuse_other_identity(manifest.identity, ours, folder.path, run=run, drawn_samples=drawn)
    elif manifest.identity.get(ENCODER, ours.get(ENCODER)) != ours.get(ENCODER):
        logger.warning("%s was trained with another image encoder: its resampler knows other features", path)
    same, patterns = bool(latest) or theirs == our_side, [] if latest else run.checkpoint.load_only
    whole = same and not patterns
    if whole and manifest.step >= run.training.steps:
        raise CheckpointError(
            f"{path} is step {manifest.step} of this very run, but training.steps={run.training.steps}.",
            f"Set training.steps above {manifest.step}.",
        )
    if not (whole or patterns):
        stored = config_from_dict(manifest.config)
        _require_same_forward(path, stored.model, run.model)
        _require_same_fresh_encoder(path, stored, run)
    base = None
    if run.model.lora is not None:
        elsewhere = run.checkpoint.load if latest else None
        base = reader if manifest.base is None else CheckpointReader(base_folder(manifest, elsewhere))
        _require_vision_parts(base, run.model)
        if base is not reader:
            selection_of(base, base_model(run.model), [])
            _require_same_scale(path, config_from_dict(manifest.config).stage.lora.scale, run)
    state = TrainState()
    if whole:
        state = TrainState(
            step=manifest.step, optimizer_step=manifest.optimizer_step, consumed_samples=manifest.consumed_samples,
            recent=_recent(manifest, path), passed_over=PassedOver.of(manifest.passed_over or []),
        )  # fmt: skip
    return Source(
        reader=reader,
        is_whole=whole,
        selection=selection_of(reader, base_model(run.model) if base is reader else run.model, patterns),
        base=base,
        state=state,
    )


def _recent(manifest: Manifest, folder: Path) -> Recent:
    try:
        return from_plain(Recent, manifest.recent or {}, "recent")
    except FieldError as error:
        raise CheckpointError(
            f"{folder / NAME} has another content than this version writes: {error}.", "Use the version that wrote it."
        ) from error


def load_source(source: Source, engine: Engine, groups: ProcessGroups) -> None:
    """Fills the engine's weights, and its optimizer's state if the source is whole. Collective.

    Raises: CheckpointError on every rank when any finds the checkpoint damaged.
    """
    names = frozenset(source.selection.loaded)
    if source.base not in (None, source.reader):
        fill(source.base, engine, groups, weights_only=True, names=frozenset(source.frozen))
        logger.info("loaded the frozen weights of %s", source.base.folder)
    fill(source.reader, engine, groups, weights_only=not source.is_whole, names=names)
    doubt = suspicion(source.reader.folder)
    if source.is_whole and doubt:
        logger.warning("%s is suspect: %s", source.reader.folder, doubt)
    what = "everything" if source.is_whole else f"weights, {source.selection.describe()}"
    logger.info("loaded %s: %s", source.reader.folder, what)
    engine.finish_load(source.state.optimizer_step)


def _require_vision_parts(base: CheckpointReader, model: ModelConfig) -> None:
    """Raises: CheckpointError for a text checkpoint as the base of a vision model's adapters."""
    if model.vision is not None and not any(is_vision(name.partition("/")[2]) for name in base.shapes):
        raise CheckpointError(
            f"{base.folder} has no vision parts: with stage.lora they would be frozen at their initial values.",
            "Train them first (stage=vision, stage.lora.rank=0) and give that run, or set model.vision=null.",
        )


def _require_same_fresh_encoder(path: Path, stored: RunConfig, run: RunConfig) -> None:
    """Raises: CheckpointError when both models have a fresh encoder, drawn from the seed, and other seeds."""
    kinds = [one.model.vision and one.model.vision.encoder.kind for one in (stored, run)]
    if kinds == [EncoderKind.fresh] * 2 and stored.run.seed != run.run.seed:
        raise CheckpointError(
            f"run.seed={run.run.seed} draws another fresh encoder than run.seed={stored.run.seed} of {path}, whose "
            "resampler knows that one's features.",
            f"Set run.seed={stored.run.seed}; or take the weights all the same, with checkpoint.load_only=['*'].",
        )


def _require_same_scale(path: Path, stored: float, run: RunConfig) -> None:
    if run.stage.lora.scale != stored:
        raise CheckpointError(
            f"stage.lora.alpha={run.stage.lora.alpha:g} with rank {run.stage.lora.rank} multiplies adapters by "
            f"{run.stage.lora.scale:g}, but those of {path} were trained with {stored:g}.",
            f"Set stage.lora.alpha={stored * run.stage.lora.rank:g}.",
        )


def _require_same_forward(source: Path, stored: ModelConfig, model: ModelConfig) -> None:
    """Raises: CheckpointError when the weights have our shapes, but their model computes something else."""
    theirs, ours = stored.forward_settings, model.forward_settings
    wrong = next((name for name in ours if name in theirs and ours[name] != theirs[name]), None)
    if wrong:
        raise CheckpointError(
            f"model.{wrong}={ours[wrong]}, but the weights of {source} were trained with {theirs[wrong]}.",
            f"Set model.{wrong}={theirs[wrong]}; to change it on purpose, say so with checkpoint.load_only=['*'].",
        )
