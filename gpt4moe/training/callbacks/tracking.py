"""Writes metrics to metrics.jsonl (from which all reports are made), console and wandb; alerts. On rank 0 alone.

Alerts of configs/dashboard.yaml become a line on the console, an event, and a wandb alert when online:

    on_step -> AlertWatch.step
    a thread, every second -> AlertWatch.idle: no step ends while a collective hangs, and context.waits tells
    a hang from a long save, an evaluation or a start-up
"""

import threading

from gpt4moe.config.load import config_to_dict
from gpt4moe.errors import LaunchError
from gpt4moe.runlog.alerts import AlertWatch, FiredAlert
from gpt4moe.runlog.console import Console
from gpt4moe.runlog.dashboard import read_dashboard
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_log import MetricsLog
from gpt4moe.runlog.step_lines import SAMPLES_FILE, StepLine, read_step_lines
from gpt4moe.runlog.wandb_run import WandbRun
from gpt4moe.training.callback import Callback, Gives, History
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepResult

_LOOK_SECONDS = 1.0


class Tracking(Callback):
    """Writes the record. Before a checkpoint it makes sure that the record is on the disk."""

    needs = frozenset({Gives.event_log, Gives.record, Gives.requests})
    gives = frozenset({Gives.metrics_log, Gives.console})

    def __init__(self) -> None:
        self.log: MetricsLog | None = None
        self.console: Console | None = None
        self.wandb: WandbRun | None = None

    def on_start(self, context: TrainingContext, history: History) -> None:
        if not context.groups.is_first_rank:
            return
        run, folder = context.run, context.folder
        self.log = MetricsLog.open(folder.metrics, context.state.step, history.metrics)
        self.wandb = WandbRun.start(run.tracking, folder.path, run.run.name, config_to_dict(run))
        if self.wandb.run is not None:
            # Steps that wandb missed: it had failed, or was off.
            texts: dict[int, list[StepLine]] = {}
            for line in read_step_lines(folder.path / SAMPLES_FILE):
                texts.setdefault(line["step"], []).append(line)
            for record in history.metrics.up_to(context.state.step).records:
                self.wandb.log(record, texts.get(int(record["step"]), ()))
        self.console = Console(run.training.steps, context.state.step, run.run.name, tokens=run.step_sizes.tokens)
        self.console.message(f"{run.model.name} on {context.groups.layout.describe()}; run folder {folder.path}")
        self.console.start()

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        if self.log and self.console and self.wandb:
            try:
                self.log.write(record)
                if context.is_saved_step:
                    self.log.sync()
            except (
                LaunchError
            ) as error:  # not raised here, where other ranks would wait for this one; all ranks raise it together
                context.refusal = error
            self.console.step(record)
            self.wandb.log(record, context.samples)
            context.samples.clear()
            if context.stop_requested:
                self.console.message(
                    f"{context.stop_requested} received: saving step {context.state.step}, then ending. The same "
                    "command goes on."
                )
            elif context.save_requested:
                self.console.message(f"SIGUSR1 received: saving step {context.state.step}, then going on.")

    def on_exit(self, context: TrainingContext) -> None:
        try:
            if self.log:
                self.log.close()
        finally:
            self._close_wandb(context)

    def _close_wandb(self, context: TrainingContext) -> None:
        if self.wandb:
            self.wandb.finish(0 if context.is_last_step else 1)
        if self.console and self.wandb:
            self.console.close()
            command = self.wandb.sync_command()
            if command:
                self.console.message(f"wandb was offline; to upload this run: {command}")


class Alerts(Callback):
    """Fires alerts on the console and in the wandb run of `tracking`."""

    needs = frozenset({Gives.event_log, Gives.record, Gives.console})

    def __init__(self, tracking: Tracking):
        self.tracking = tracking
        self.watch: AlertWatch | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def on_start(self, context: TrainingContext, history: History) -> None:
        if not context.groups.is_first_rank:
            return
        earlier = history.metrics.up_to(context.state.step).records
        self.watch = AlertWatch(read_dashboard(context.run.tracking.dashboard).alerts, earlier)
        threading.Thread(target=self._look, args=(context,), name="alerts", daemon=True).start()

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        if self.watch is None:
            return
        with self._lock:
            context.waits.end()
            fired = self.watch.step(record)
        self._tell(context, fired)

    def on_exit(self, context: TrainingContext) -> None:
        self._ended.set()

    def _look(self, context: TrainingContext) -> None:
        assert self.watch is not None
        while not self._ended.wait(_LOOK_SECONDS):
            with self._lock:
                fired = self.watch.idle(context.waits.idle())
            self._tell(context, fired)

    def _tell(self, context: TrainingContext, fired: list[FiredAlert]) -> None:
        for alert in fired:
            if self.tracking.console:
                self.tracking.console.message(f"alert after step {context.state.step}: {alert.name}: {alert.text}")
            if context.events:
                context.events.write("alert", step=context.state.step, name=alert.name, text=alert.text)
            if self.tracking.wandb:
                self.tracking.wandb.alert(alert.name, f"step {context.state.step}, {alert.text}")
