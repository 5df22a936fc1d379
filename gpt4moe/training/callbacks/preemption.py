"""A signal asks the run to save and end with 85, "saved, please requeue". Any rank may get it; all agree.

USR1 comes from Slurm before the time limit, TERM before a preemption. The handler only notes it: the step in work is
finished first, then one tiny all-reduce a step tells every rank.
"""

import signal
from types import FrameType

import torch
from torch import distributed

from gpt4moe.training.state import Callback, Record, TrainingContext
from gpt4moe.training.step import StepResult

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preemption(Callback):
    def __init__(self) -> None:
        self.received = 0

    def on_start(self, context: TrainingContext) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        flag = torch.tensor([self.received], dtype=torch.int32, device=context.groups.device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        # In the last step nothing is left to requeue for.
        if flag.item() and not context.is_last_step:
            context.stop_requested = signal.Signals(int(flag.item())).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
