"""Alerts of configs/dashboard.yaml: a line on the console, an event, a wandb alert when online. On the first rank.

on_step -> Watch.step                     a thread, every second -> Watch.idle: a hanging collective ends no step;
                                          context.waits tells it from a long save, evaluation or start-up
"""

import threading

from gpt4moe.runlog.alerts import FiredAlert, Watch
from gpt4moe.runlog.dashboard import read_dashboard
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_log import StoredMetrics
from gpt4moe.training.callbacks.tracking import Tracking
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult

_LOOK_SECONDS = 1.0


class Alerts(Callback):
    """After Tracking, whose console and wandb run it tells."""

    def __init__(self, tracking: Tracking):
        self.tracking = tracking
        self.watch: Watch | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def on_start(self, context: TrainingContext) -> None:
        if not context.groups.is_first_rank:
            return
        earlier = context.earlier.up_to(context.state.step).records
        self.watch = Watch(read_dashboard(context.run.tracking.dashboard).alerts, earlier)
        context.earlier = StoredMetrics()  # nobody needs it after this start's callbacks: 100,000 steps are a gigabyte
        threading.Thread(target=self._look, args=(context,), name="alerts", daemon=True).start()

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        if self.watch is None:
            return
        with self._lock:
            context.waits.end()
            told = self.watch.step(record)
        self._tell(context, told)

    def on_exit(self, context: TrainingContext) -> None:
        self._ended.set()

    def _look(self, context: TrainingContext) -> None:
        assert self.watch is not None
        while not self._ended.wait(_LOOK_SECONDS):
            with self._lock:
                told = self.watch.idle(context.waits.idle())
            self._tell(context, told)

    def _tell(self, context: TrainingContext, told: list[FiredAlert]) -> None:
        for alert in told:
            if self.tracking.console:
                self.tracking.console.message(f"alert after step {context.state.step}: {alert.name}: {alert.text}")
            if context.events:
                context.events.write("alert", step=context.state.step, name=alert.name, text=alert.text)
            if self.tracking.wandb:
                self.tracking.wandb.alert(alert.name, f"step {context.state.step}, {alert.text}")
