"""A checked RunConfig and a live world -> everything one start of a run needs."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.retention import find_checkpoint, step_folder
from gpt4moe.checkpoint.selection import Selection, selection_of
from gpt4moe.config.load import config_from_dict
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.optimizer import EngineKind
from gpt4moe.config.run import RunConfig
from gpt4moe.data.loader import Data, build_data
from gpt4moe.errors import CheckpointError, LaunchError
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.resilience.signals import SignalNotes
from gpt4moe.training.callbacks.alerts import Alerts
from gpt4moe.training.callbacks.checkpoints import Checkpoints
from gpt4moe.training.callbacks.evaluation import Evaluation
from gpt4moe.training.callbacks.events import Events
from gpt4moe.training.callbacks.preemption import Preemption
from gpt4moe.training.callbacks.replicas import Replicas
from gpt4moe.training.callbacks.report import Report
from gpt4moe.training.callbacks.resources import Resources
from gpt4moe.training.callbacks.tracking import Tracking
from gpt4moe.training.callbacks.wire import WireBytes
from gpt4moe.training.checkpointing import fill
from gpt4moe.training.engine import Engine
from gpt4moe.training.engine_deepspeed import DeepSpeedEngine
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.loop import Trainer
from gpt4moe.training.run_folder import RunFolder, identity_of
from gpt4moe.training.state import Callback, TrainingContext, TrainState
from gpt4moe.training.step import StepRunner

logger = logging.getLogger(__name__)

ENGINES: dict[EngineKind, Callable[[list[Any], RunConfig, ProcessGroups], Engine]] = {
    EngineKind.megatron: MegatronEngine,
    EngineKind.deepspeed: DeepSpeedEngine,
}


def build_trainer(
    run: RunConfig,
    groups: ProcessGroups,
    latest_step: int,
    signals: SignalNotes,
    write_report: Callable[[Path], Path],
) -> Trainer:
    """Takes the run folder, builds data, model and engine, and resumes. Collective.

    Args:
        latest_step: of the run folder's checkpoints, the same on every rank; 0: none.
        signals: noted from the loop's start on.
        write_report: draws the report of a run folder; handed in, so that nothing that trains imports the planner.

    Raises: Gpt4MoeError on every rank when any rank refuses (a folder in use, another identity, a damaged checkpoint).
    """
    with raise_together(groups):
        data = build_data(run)
    folder = _take_folder(run, groups, data)
    with raise_together(groups):
        source = _source(run, folder, data, latest_step)
    state = source.state if source else TrainState()
    events = Events()
    # Before what may run out of memory: the brake on restarts (resilience.restarts) and the account of the run's time
    # (runlog.goodput) count what stands here.
    with raise_together(groups), _writable(folder):
        if groups.is_first_rank:
            folder.record_start(run, layout=groups.layout, first_step=state.step + 1)
            events.begin(run, groups.layout, folder, resumed_step=state.step)
    signals.before_leaving = events.left
    with events.ended_by_errors():
        engine = ENGINES[run.engine.kind](build_model(run, groups), run, groups)
        if source:
            _load(source, engine, groups)
        runner = StepRunner(run, engine, groups, num_sources=len(data.source_names))
        context = TrainingContext(
            run=run, groups=groups, folder=folder, data=data, engine=engine, runner=runner, state=state
        )
        return Trainer(context, build_callbacks(events, signals, write_report))


def build_callbacks(events: Events, signals: SignalNotes, write_report: Callable[[Path], Path]) -> list[Callback]:
    """In the order they run: the record is complete before it is written, and written before its checkpoint."""
    tracking = Tracking()
    return [
        events, WireBytes(), Replicas(), Evaluation(), Preemption(signals), Resources(), tracking, Alerts(tracking),
        Checkpoints(), Report(write_report),
    ]  # fmt: skip


def _take_folder(run: RunConfig, groups: ProcessGroups, data: Data) -> RunFolder:
    """The run folder, locked and frozen by the first rank; every rank learns whether that went well."""
    folder = RunFolder.of(run)
    with raise_together(groups), _writable(folder):
        if groups.is_first_rank:
            folder.acquire()
            folder.check_identity(run, data.identity)
            folder.freeze(run, data.identity)
    return folder


@contextmanager
def _writable(folder: RunFolder) -> Iterator[None]:
    """Around writing into the run folder. Raises: LaunchError when the system does not let us."""
    try:
        yield
    except OSError as error:
        raise LaunchError(
            f"The run folder {folder.path} cannot be written: {error.strerror}.",
            "Set run.root to a folder with room that you may write to.",
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """The checkpoint that a start goes on from."""

    reader: CheckpointReader
    is_whole: bool
    """Everything is taken, not weights alone: it is of this very run."""
    selection: Selection
    state: TrainState


def _source(run: RunConfig, folder: RunFolder, data: Data, latest_step: int) -> _Source | None:
    """The folder's latest checkpoint, else checkpoint.load, else none; opened, not loaded. Raises: CheckpointError."""
    if not latest_step and run.checkpoint.load is None:
        return None
    asked = Path(str(run.checkpoint.load))
    path = step_folder(folder.checkpoints, latest_step) if latest_step else find_checkpoint(asked)
    reader = CheckpointReader(path)
    manifest = reader.manifest
    same = manifest.identity == identity_of(run, data.identity)
    patterns = [] if latest_step else run.checkpoint.load_only
    whole = same and not patterns
    if whole and manifest.step >= run.training.steps:
        raise CheckpointError(
            f"{path} is step {manifest.step} of this very run, but training.steps={run.training.steps}.",
            f"Set training.steps above {manifest.step}.",
        )
    if not (whole or patterns):
        _require_same_answers(path, config_from_dict(manifest.config).model, run.model)
    state = TrainState()
    if whole:
        state = TrainState(
            step=manifest.step, optimizer_step=manifest.optimizer_step, consumed_samples=manifest.consumed_samples
        )
    return _Source(
        reader=reader,
        is_whole=whole,
        selection=selection_of(reader, run.model, patterns),
        state=state,
    )


def _load(source: _Source, engine: Engine, groups: ProcessGroups) -> None:
    """Collective. Raises: CheckpointError on every rank when any finds the checkpoint damaged."""
    names = frozenset(source.selection.loaded)
    fill(source.reader, engine, groups, weights_only=not source.is_whole, names=names)
    what = "everything" if source.is_whole else f"weights, {source.selection.describe()}"
    logger.info("loaded %s: %s", source.reader.folder, what)
    engine.finish_load(source.state.optimizer_step)


def _require_same_answers(source: Path, stored: ModelConfig, model: ModelConfig) -> None:
    """Raises: CheckpointError when weights fit in shape but belong to a model that computes something else."""
    theirs, ours = stored.forward_settings, model.forward_settings
    wrong = next((name for name in ours if name in theirs and ours[name] != theirs[name]), None)
    if wrong:
        raise CheckpointError(
            f"model.{wrong}={ours[wrong]}, but the weights of {source} were trained with {theirs[wrong]}.",
            f"Set model.{wrong}={theirs[wrong]}; to change it on purpose, say so with checkpoint.load_only=['*'].",
        )
