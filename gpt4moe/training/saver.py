"""Saver: the saves of a launch, one at a time, and what becomes of the run when one fails.

    start -> threads write and commit without a collective (checkpoint.saving) -> poll, after each step -> it is there
                                                                                  or it failed: stop, or go on

In the training thread each poll has small all-reduces, by which all ranks learn that a save has ended or failed. So a
failure means the same for all ranks at the same step, and none waits alone in a collective.
"""

import logging
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed

from gpt4moe.checkpoint.health import mark
from gpt4moe.checkpoint.manifest import NAME
from gpt4moe.checkpoint.retention import step_folder
from gpt4moe.checkpoint.saving import Save, SaveJob
from gpt4moe.config.training import OnSaveFailure
from gpt4moe.errors import HUNG, INTERRUPTED, CheckpointError, Gpt4MoeError, SaveFailed, SaveStalled
from gpt4moe.parallel.agreement import all_reduce_max, raise_together
from gpt4moe.training.checkpointing import Staging, manifest_of
from gpt4moe.training.finite import require_finite
from gpt4moe.training.pieces import owned_pieces
from gpt4moe.training.state import TrainingContext

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.01
_LONGEST_WAIT_SECONDS = 0.5


class Saver:
    """Of one launch. Every method but `leave` is collective.

    A failed save ends every rank, with the failing one's message and status 2, or 86 where the disk stands still: what
    was written is removed, unless it was committed, and earlier checkpoints are untouched. With
    checkpoint.on_save_failure=go_on the run goes on where the disk is the cause and steps are left: the next save is
    due as ever, and is suspect for what the failed one would have been.
    """

    def __init__(self) -> None:
        self.staging = Staging()
        self.save: Save | None = None
        self.num_failed = 0
        """In a row, the same on every rank."""
        self._suspicions: list[str] = []

    def start(self, context: TrainingContext, *, staged: bool) -> None:
        """Begins to save the state of the current step. Waits first for an unfinished save.

        Args:
            staged: copy the state to host memory first, so that training may go on. False: call `wait` next.
        Raises: Gpt4MoeError on every rank when a save has failed and the run is to end, any rank cannot continue after
            this step, or its state is not finite.
        """
        self.wait(context)
        context.engine.finish_update()  # a run may end after a checkpoint
        run, state, groups = context.run, context.state, context.groups
        limits = run.resilience
        folder = step_folder(context.folder.checkpoints, state.step)
        with raise_together(groups):
            context.refuse()
        pieces = owned_pieces(context.engine, groups, adapters_alone=run.model.lora is not None)
        require_finite(pieces, context)
        try:
            self._require_idle_disk(context)
            with raise_together(groups):
                if groups.is_first_rank:
                    _make_empty(folder, context.suspicions)
        except Gpt4MoeError as error:
            self._end_or_go_on(context, error, context.state.step)
            return
        self._suspicions = context.suspicions[:]
        context.suspicions.clear()
        self.save = Save(
            SaveJob(
                folder=folder,
                pieces=self.staging.copy(pieces) if staged else pieces,
                manifest=manifest_of(context),
                rank=groups.rank,
                world_size=groups.layout.world_size,
                keep=run.checkpoint.keep,
                keep_every=run.checkpoint.keep_every,
                keep_healthy=limits.go_back_checkpoints if limits.may_go_back else 1,
                suspect_steps=limits.suspect_steps if limits.may_go_back else 1,
                stall_seconds=run.checkpoint.stall_seconds,
            )
        )

    def poll(self, context: TrainingContext) -> None:
        """Finds out whether the current save has ended on all ranks. Raises: as `start`."""
        if self.save is None:
            return
        save, groups = self.save, context.groups
        unfinished = torch.tensor([int(not save.is_done)], dtype=torch.int32, device=groups.device)
        try:
            with raise_together(groups):
                problem = save.problem or save.stalled()
                if problem:
                    raise problem
        except Gpt4MoeError as error:
            with context.pause("checkpoint"):  # a rank may hang in a sync, and the others wait for it
                self._clean_up(context, save)
            self._end_or_go_on(context, error, save.job.manifest.step)
            return
        own = int(unfinished.item())
        distributed.all_reduce(unfinished, op=distributed.ReduceOp.SUM)
        if unfinished.item():
            save.others_have_ended = unfinished.item() == own
            return
        self.save, self.num_failed = None, 0
        if groups.is_first_rank:
            logger.info("checkpoint %s", save.job.folder)

    def wait(self, context: TrainingContext) -> None:
        """Polls until the current save, if any, has ended. Raises: as `start`."""
        wait_seconds = _WAIT_SECONDS
        self.poll(context)
        while self.save is not None:
            time.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
            self.poll(context)

    def leave(self) -> None:
        """Call it before the process ends, also after an error. Finishes what can be finished. No collective."""
        if self.save is not None:
            self.save.leave()
            self.save = None
        self.staging.close()

    def _clean_up(self, context: TrainingContext, save: Save) -> None:
        groups, folder = context.groups, save.job.folder
        self.save = None
        context.suspicions[:0] = self._suspicions  # of the steps that the next checkpoint has behind it too
        if save.abandon():
            context.hanging = save
        (does_hang,) = all_reduce_max([int(context.hanging is not None)], groups)
        # Nobody writes into the folder any more; to remove it from a disk that hangs would hang too.
        if groups.is_first_rank and not does_hang and not (folder / NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)

    def _require_idle_disk(self, context: TrainingContext) -> None:
        """Raises: SaveStalled where the thread of a save that was given up still hangs: it holds the buffer, and after
        a going back it could write into the same folder."""
        hanging = context.hanging
        with raise_together(context.groups):
            if hanging is not None and not hanging.is_done:
                raise SaveStalled(
                    f"Step {context.state.step} could not be saved: the disk still does not answer to the save of "
                    f"{hanging.job.folder}, for {hanging.still_seconds:.0f} s."
                )
        context.hanging = None

    def _end_or_go_on(self, context: TrainingContext, error: Gpt4MoeError, step: int) -> None:
        """Args: step: whose save has failed. Raises: the error, where the run ends."""
        settings, groups = context.run.checkpoint, context.groups
        self.num_failed += 1
        is_mistake = isinstance(error, CheckpointError) and not isinstance(error, SaveFailed)  # of the rank that failed
        (is_any_mistake,) = all_reduce_max([int(is_mistake)], groups)
        is_last = context.is_last_step and step == context.state.step
        may_go_on = settings.on_save_failure is OnSaveFailure.go_on and self.num_failed <= settings.max_failed_saves
        if is_any_mistake or is_last or not may_go_on:
            if error.exit_code == HUNG and context.stop_requested == signal.SIGINT.name:
                error.exit_code = INTERRUPTED  # whoever pressed Ctrl-C wants no requeue
            raise error
        text = (
            f"{error.cause} The run goes on; {self.num_failed} of {settings.max_failed_saves} saves in a row that may"
        )
        logger.warning("%s fail.", text)
        if context.events is not None:
            context.events.write("alert", step=context.state.step, name="failed save", text=f"{text} fail.")


def _make_empty(folder: Path, suspicions: Sequence[str]) -> None:
    """Makes a new folder, with the reasons why its checkpoint is suspect; removes what a killed save left there."""
    if (folder / NAME).exists():
        raise CheckpointError(f"{folder} holds a checkpoint already.", "Move it away: the run did not start from it.")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for reason in suspicions:
            mark(folder, reason)
    except OSError as error:
        raise SaveFailed(f"{folder} cannot be made: {error.strerror}.") from error
