"""Compares copies of tensors, agrees on signals, and saves a step.

Signals ask the run to save. Any rank may get one; all agree after the step in work.

    USR1         save now and go on: by hand, `scancel --signal=USR1 JOB`
    USR2, TERM   save and end with 85, "saved, please requeue": slurm/train.sh sends USR2 before the time limit, Slurm
                 itself TERM before a preemption
    HUP          the same: the terminal is gone
    INT          Ctrl-C: save and end with 130; a second one leaves at once

The handler only notes the signal (resilience.signals). The step is finished first. Then one small all-reduce after each
step tells every rank of the signals.
"""

import resource
import signal
import sys

import torch

from gpt4moe.errors import GoBack, Gpt4MoeError, ReplicaError
from gpt4moe.parallel.agreement import all_reduce_max, raise_together
from gpt4moe.resilience.signals import SIGNALS, SignalNotes
from gpt4moe.runlog.metrics import Record
from gpt4moe.training.callback import Callback, Gives, History
from gpt4moe.training.go_back import mark_suspect
from gpt4moe.training.replicas import unequal_copies
from gpt4moe.training.saver import Saver
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepResult

_NAMED = 3
"""Tensors that an error names; it counts the rest."""


class Replicas(Callback):
    """Every training.check_replicas_every steps: are copies of one tensor on several ranks still bitwise equal?

    Before the step's checkpoint, so that unequal copies are not saved. Routers whose copies differ send tokens to
    different experts on different ranks, and no loss shows it.
    """

    needs = frozenset({Gives.event_log, Gives.step_traffic})
    gives = frozenset({Gives.replica_check})

    def __init__(self) -> None:
        self.last_equal = 0

    def on_start(self, context: TrainingContext, history: History) -> None:
        self.last_equal = context.state.step

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        """Raises: ReplicaError on every rank."""
        every, step = context.run.training.check_replicas_every, context.state.step
        if not every or step % every:
            return
        with context.pause("replica_check"):
            found = unequal_copies(context.engine, context.groups)
        try:
            with raise_together(context.groups):
                if found:
                    words = [f"{it.name} on ranks {it.odd_ranks} (not on {it.other_ranks})" for it in found[:_NAMED]]
                    more = f" and {len(found) - _NAMED} more tensors" if len(found) > _NAMED else ""
                    raise ReplicaError(
                        f"After step {step}, copies that must be equal to the bit are not: {', '.join(words)}{more}.",
                        f"Start again from a checkpoint of step {self.last_equal} or before: they were equal then. "
                        "Odd values on one rank alone suggest its hardware.",
                    )
        except Gpt4MoeError as error:  # found on a rank of another stage: the same error and exit status here
            mark_suspect(context, self.last_equal, step, error.cause)
            raise ReplicaError(error.cause, error.cure) from None
        self.last_equal = step


class Agreement(Callback):
    """One all-reduce after each step shares what single ranks know: signals, errors, peak memory."""

    needs = frozenset({Gives.step_traffic})
    gives = frozenset({Gives.requests, Gives.record})

    def __init__(self, signals: SignalNotes):
        self.signals = signals

    def on_start(self, context: TrainingContext, history: History) -> None:
        self.signals.note()

    def before_step(self, context: TrainingContext) -> None:
        context.save_requested = False

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        """Raises: Gpt4MoeError on every rank when any could not go on after the step before."""
        # One all-reduce for all three: each would cost every step its latency.
        own = [self.signals.take(), peak_memory(context.groups.device), int(context.refusal is not None)]
        place, most_memory, is_refused = all_reduce_max(own, context.groups)
        if is_refused:
            with raise_together(context.groups):
                context.refuse()
        record["peak_memory_bytes"] = most_memory
        heard = SIGNALS[place - 1] if place else None
        context.save_requested = heard is signal.SIGUSR1
        # In the last step nothing is left to requeue for.
        if heard is not None and not context.save_requested and not context.is_last_step:
            context.stop_requested = heard.name

    def on_exit(self, context: TrainingContext) -> None:
        if context.save_requested and isinstance(sys.exception(), GoBack):
            self.signals.again(signal.SIGUSR1)  # the save that it asked for is not there
        if context.stop_requested or not isinstance(sys.exception(), GoBack):  # else the run goes on in this process
            self.signals.ignore()


def peak_memory(device: torch.device) -> int:
    """The peak memory of this rank, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Checkpoints(Callback):
    """A checkpoint every checkpoint.every steps, at the end, and when a signal asks for one."""

    needs = frozenset({Gives.event_log, Gives.replica_check, Gives.requests, Gives.metrics_log, Gives.step_traffic})
    gives = frozenset({Gives.checkpoint})

    def __init__(self) -> None:
        self.saver = Saver()

    def on_start(self, context: TrainingContext, history: History) -> None:
        context.finish_save = lambda: self.saver.wait(context)

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        self.saver.poll(context)
        if not context.is_saved_step:
            return
        in_background = context.run.checkpoint.asynchronous and not context.is_last_step
        with context.pause("checkpoint"):
            self.saver.start(context, staged=in_background)
            if not in_background:  # no step is left to run, and the process must not end before the commit
                self.saver.wait(context)

    def on_exit(self, context: TrainingContext) -> None:
        self.saver.leave()
