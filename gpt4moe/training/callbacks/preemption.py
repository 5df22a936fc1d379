"""Signals ask the run to save. Any rank may get one; all agree after the step in work.

    USR1         save now and go on: by hand, `scancel --signal=USR1 JOB`
    USR2, TERM   save and end with 85, "saved, please requeue": slurm/train.sh sends USR2 before the time limit, Slurm
                 itself TERM before a preemption

The handler only notes the signal (resilience.signals): the step is finished first, then one tiny all-reduce a step
tells every rank.
"""

import signal

from gpt4moe.parallel.agreement import all_reduce_max, raise_together
from gpt4moe.resilience.signals import SignalNotes
from gpt4moe.runlog.metrics import Record
from gpt4moe.training.callbacks.resources import peak_memory
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult


class Preemption(Callback):
    def __init__(self, signals: SignalNotes):
        self.signals = signals

    def on_start(self, context: TrainingContext) -> None:
        self.signals.note()

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        """Raises: Gpt4MoeError on every rank when any could not go on after the step before."""
        # What else must be told goes along: a second all-reduce would cost every step its latency.
        own = [self.signals.take(), peak_memory(context.groups.device), int(context.refusal is not None)]
        number, most_memory, is_refused = all_reduce_max(own, context.groups)
        if is_refused:
            with raise_together(context.groups):
                context.refuse()
        record["peak_memory_bytes"] = most_memory
        context.save_requested = number == signal.SIGUSR1
        # In the last step nothing is left to requeue for.
        if number > signal.SIGUSR1 and not context.is_last_step:
            context.stop_requested = signal.Signals(number).name

    def on_exit(self, context: TrainingContext) -> None:
        self.signals.ignore()
