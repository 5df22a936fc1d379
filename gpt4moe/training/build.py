"""A checked launch and live process groups -> the Trainer: data, model, engine, callbacks, in this order."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt4moe.architecture.trained import describe
from gpt4moe.checkpoint.base import reference
from gpt4moe.checkpoint.retention import keep_for
from gpt4moe.config.optimizer import EngineKind
from gpt4moe.config.run import RunConfig
from gpt4moe.data.loader import Data, build_data
from gpt4moe.data.passed_over import NOTHING
from gpt4moe.errors import LaunchError
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.resilience.signals import SignalNotes
from gpt4moe.training.callback import Callback, History
from gpt4moe.training.callbacks.events import Events
from gpt4moe.training.callbacks.heartbeat import BusiestRank, Heartbeat
from gpt4moe.training.callbacks.measurements import Evaluation, Resources
from gpt4moe.training.callbacks.probes import Probe, Probes
from gpt4moe.training.callbacks.report_files import Report, WireBytes
from gpt4moe.training.callbacks.routing_record import RoutingRecord
from gpt4moe.training.callbacks.saving import Agreement, Checkpoints, Replicas
from gpt4moe.training.callbacks.tracking import Alerts, Tracking
from gpt4moe.training.encoder_files import with_encoder_files
from gpt4moe.training.engine import Engine
from gpt4moe.training.engine_deepspeed import DeepSpeedEngine
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.gone_back import record
from gpt4moe.training.launch import Launch
from gpt4moe.training.loop import Trainer
from gpt4moe.training.resume import Source, find_source, load_source, passed_over, place_of_source
from gpt4moe.training.run_folder import RunFolder
from gpt4moe.training.state import TrainingContext, TrainState
from gpt4moe.training.step import StepRunner
from gpt4moe.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

ENGINES: dict[EngineKind, Callable[[list[Any], RunConfig, ProcessGroups], Engine]] = {
    EngineKind.megatron: MegatronEngine,
    EngineKind.deepspeed: DeepSpeedEngine,
}


def build_trainer(
    launch: Launch,
    groups: ProcessGroups,
    latest: int,
    signals: SignalNotes,
    write_report: Callable[[Path], Path],
    probes: Sequence[Probe] = (),
    before: TrainingContext | None = None,
    *,
    watchdog: Watchdog | None = None,
) -> Trainer:
    """Locks the run folder, builds data, model and engine, and loads the checkpoint to go on from. Collective.

    Args:
        latest: step of the run folder's latest checkpoint, the same on every rank; 0: none.
        signals: noted from the loop's start on.
        write_report: draws the report of a run folder; an argument, so that nothing that trains imports the planner.
        probes: what the model is asked between steps.
        before: of a run that goes back (training.go_back): its data and its engine are taken as they stand.
        watchdog: of this rank; None: nobody looks for hangs.

    Raises: Gpt4MoeError on every rank when any rank raises one (a folder in use, another identity, a damaged
        checkpoint).
    """
    run, folder = launch.run, launch.folder
    data = before.data if before else _open(launch, groups)
    left = passed_over(folder, groups)
    path = place_of_source(run, folder, latest, groups)
    with raise_together(groups):
        source = find_source(run, folder, data, latest, path)
        if source and source.base is not None and groups.is_first_rank:
            # Before minutes of building, in which its own run might delete it.
            keep_for(source.base.folder, folder.path)
    state = source.state if source else TrainState()
    state.passed_over = left or state.passed_over
    events, history = Events(began=time.time() if before else None), History()
    # Before the model, which may run out of memory: the limit on restarts (resilience.restarts) and the account of the
    # run's time (runlog.goodput) count launches by what is written here.
    with raise_together(groups), _writable(folder):
        if groups.is_first_rank:
            if before is None:
                folder.record_start(run, job=launch.job, layout=groups.layout, first_step=state.step + 1)
            if left is None and state.passed_over != NOTHING:  # of a checkpoint.load: tools/mixture.py step reads it
                record(folder.path, state.passed_over)
            history = History.read(folder)
            events.begin(launch, groups.layout, history, resumed_step=state.step)
    signals.before_leaving = events.left
    with events.ended_by_errors():
        engine = before.engine if before else _build_engine(run, groups, source)
        if source:
            engine.finish_update()
            load_source(source, engine, groups)
        logger.info("%s", describe(run.model, run.stage))
        runner = StepRunner(run, engine, groups, num_sources=len(data.source_names))
        context = TrainingContext(
            run=run, groups=groups, folder=folder, data=data, engine=engine, runner=runner, state=state,
            base=reference(source.base.folder) if source and source.base else None,
            hanging=before.hanging if before else None,
        )  # fmt: skip
        return Trainer(context, build_callbacks(events, signals, write_report, probes, watchdog), history)


def _open(launch: Launch, groups: ProcessGroups) -> Data:
    """The data; the run folder is locked. Collective."""
    launch = with_encoder_files(launch, groups)
    with raise_together(groups):
        data = build_data(launch.run, launch.data)
    _log_data(launch)
    _take_folder(launch, groups)
    return data


def _build_engine(run: RunConfig, groups: ProcessGroups, source: Source | None) -> Engine:
    loaded = frozenset((*source.selection.loaded, *source.frozen) if source else ())
    return ENGINES[run.engine.kind](build_model(run, groups, loaded=loaded), run, groups)


def build_callbacks(
    events: Events, signals: SignalNotes, write_report: Callable[[Path], Path], probes: Sequence[Probe] = (),
    watchdog: Watchdog | None = None,
) -> list[Callback]:  # fmt: skip
    """In the order they run, which their `needs` and `gives` allow (callback.check_order)."""
    tracking = Tracking()
    return [
        events, WireBytes(), RoutingRecord(), Replicas(), Evaluation(), Agreement(signals), Probes(probes), Resources(),
        *([BusiestRank(watchdog)] if watchdog else []), tracking, Alerts(tracking), Checkpoints(), Report(write_report),
        *([Heartbeat(watchdog)] if watchdog else []),
    ]  # fmt: skip


def _log_data(launch: Launch) -> None:
    for warning in launch.data.warnings:
        logger.warning("%s", warning)
    for name, rows in launch.data.rows.get("train", {}).items():
        logger.info("%s: %s", name, rows.summary())


def _take_folder(launch: Launch, groups: ProcessGroups) -> None:
    """Rank 0 locks the run folder and, in the first launch, freezes the config. Collective. Raises: on every rank."""
    folder = launch.folder
    with raise_together(groups), _writable(folder):
        if groups.is_first_rank:
            folder.acquire(launch.job)
            folder.check_identity(launch.run, launch.data.identity)  # the lock's last holder may have frozen it
            folder.freeze(launch.run, launch.data.identity)


@contextmanager
def _writable(folder: RunFolder) -> Iterator[None]:
    """Around writing into the run folder. Raises: LaunchError when the system refuses."""
    try:
        yield
    except OSError as error:
        raise LaunchError(
            f"The run folder {folder.path} cannot be written: {error.strerror}.",
            "Set run.root to a folder with room that you may write to.",
        ) from error
