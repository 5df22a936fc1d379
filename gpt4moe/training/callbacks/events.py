"""events.jsonl: when this launch began, what training waited for, why it ended. On rank 0 alone.

`begin` writes the launch before the model is built, because building it may fail. The stop is the last event: on_exit
runs from the last callback to the first, and this callback is the first.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gpt4moe.errors import GoBack, Gpt4MoeError
from gpt4moe.parallel.layout import Layout
from gpt4moe.runlog import slurm_queue
from gpt4moe.runlog.events_log import EVENTS_FILE, WENT_BACK, EventsLog, before_start
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.run_files import process_began
from gpt4moe.runlog.waits import longest_waits
from gpt4moe.training.callback import Callback, Gives, History
from gpt4moe.training.launch import Launch
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepResult


class Events(Callback):
    """events.jsonl of one launch.

    Args:
        began: of a launch that goes on in the process of the one before, seconds since 1970; None: with the process.
    """

    gives = frozenset({Gives.event_log})

    def __init__(self, began: float | None = None) -> None:
        self.began = process_began("self") if began is None else began
        self.has_stepped = False
        self.log: EventsLog | None = None
        self.longest_waits: dict[str, float] = {}
        self.resumed_step = 0

    def begin(self, launch: Launch, layout: Layout, history: History, *, resumed_step: int) -> None:
        """Writes that this launch has begun. Rank 0 only, run folder locked."""
        run, folder, job = launch.run, launch.folder, launch.job
        before = before_start(folder.path, history.events, run.run.name, resumed_step, history.metrics.records)
        times = slurm_queue.times_of(job.number)
        self.resumed_step = resumed_step
        self.longest_waits = longest_waits(history.events)
        self.log = EventsLog(folder.path / EVENTS_FILE)
        self.log.write(
            "start",
            at=self.began,
            written=time.time(),
            run=run.run.name,
            job=job.number,
            restart=job.restart_count,
            submitted=times and times.submitted,
            job_started=times and times.started,
            ranks=layout.world_size,
            layout=layout.describe(),
            total_steps=run.training.steps,
            resumed_step=resumed_step,
            **before,
        )

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """Writes the stop if an error ends this launch before the loop."""
        try:
            yield
        except BaseException:
            self._stop(step=self.resumed_step)
            raise

    def left(self, signal_name: str) -> None:
        """Writes the stop when a signal ends this launch before the loop."""
        if self.log is not None:
            self.log.write("stop", step=self.resumed_step, reason=signal_name, is_error=False, cause=None)

    def on_start(self, context: TrainingContext, history: History) -> None:
        if self.log is None:
            return
        context.events = self.log
        context.waits.started(time.time() - self.began, self.longest_waits)

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        if context.events is not None and not self.has_stepped:
            context.events.write("first_step", step=record["step"], seconds=record["step_seconds"])
        self.has_stepped = True

    def on_exit(self, context: TrainingContext) -> None:
        asked = context.stop_requested
        self._stop(step=context.state.step, reason=asked or "finished", cause=context.ended_by, is_asked=bool(asked))

    def _stop(self, *, step: int, reason: str = "", cause: str | None = None, is_asked: bool = False) -> None:
        if self.log is None:
            return
        # Called in a `finally`: an error that ends the run is being raised now.
        error = sys.exception()
        goes_on = isinstance(error, GoBack)
        if goes_on and not is_asked:
            reason = WENT_BACK
        elif error is not None and not goes_on:
            reason = type(error).__name__
        cause = error.cause if isinstance(error, Gpt4MoeError) else cause
        self.log.write("stop", step=step, reason=reason, is_error=error is not None and not goes_on, cause=cause)
        self.log.close()
