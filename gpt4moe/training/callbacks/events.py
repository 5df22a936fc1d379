"""events.jsonl: when this start began, what training waited for, why it ended. On the first rank alone.

First of the callbacks: it reads metrics.jsonl, for all of them, before the steps to be redone are dropped from it, and
its stop comes after all others have closed (on_exit runs in reverse order).
"""

import os
import sys
import time

from gpt4moe.errors import Gpt4MoeError
from gpt4moe.telemetry import slurm_queue
from gpt4moe.telemetry.events_log import EVENTS_FILE, EventsLog, before_start, read_events
from gpt4moe.telemetry.metrics_log import StoredMetrics
from gpt4moe.telemetry.run_process import process_began
from gpt4moe.telemetry.waits import longest_waits
from gpt4moe.training.state import Callback, Record, TrainingContext
from gpt4moe.training.step import StepResult


class Events(Callback):
    def __init__(self) -> None:
        self.has_stepped = False

    def on_start(self, context: TrainingContext) -> None:
        if not context.groups.is_first_rank:
            return
        run, step = context.run, context.state.step
        context.earlier = StoredMetrics.read(context.folder.metrics)
        before = before_start(context.folder.path, run.run.name, step, context.earlier.records)
        times = slurm_queue.times_of_this_job()
        job = os.environ.get("SLURM_JOB_ID", "")
        began, now = process_began("self"), time.time()
        context.waits.started(now - began, longest_waits(read_events(context.folder.path / EVENTS_FILE)))
        context.events = EventsLog(context.folder.path / EVENTS_FILE)
        context.events.write(
            "start",
            at=began,
            written=now,
            run=run.run.name,
            job=int(job) if job.isdecimal() else None,
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            submitted=times and times.submitted,
            job_started=times and times.started,
            ranks=context.groups.layout.world_size,
            layout=context.groups.layout.describe(),
            total_steps=run.training.steps,
            resumed_step=step,
            **before,
        )

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        if context.events is not None and not self.has_stepped:
            context.events.write("first_step", step=record["step"], seconds=record["step_seconds"])
        self.has_stepped = True

    def on_exit(self, context: TrainingContext) -> None:
        if context.events is None:
            return
        # The loop calls this in a `finally`: what ends the run by an error is in flight.
        error = sys.exception()
        reason = type(error).__name__ if error is not None else context.stop_requested or "finished"
        cause = error.cause if isinstance(error, Gpt4MoeError) else None
        step = context.state.step
        context.events.write("stop", step=step, reason=reason, is_error=error is not None, cause=cause)
        context.events.close()
