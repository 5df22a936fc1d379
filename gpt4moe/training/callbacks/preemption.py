"""Signals ask the run to save. Any rank may get one; all agree after the step in work.

    USR1         save now and go on: by hand, `scancel --signal=USR1 JOB`
    USR2, TERM   save and end with 85, "saved, please requeue": slurm/train.sh sends USR2 before the time limit, Slurm
                 itself TERM before a preemption

The handler only notes the signal: the step is finished first, then one tiny all-reduce a step tells every rank.
"""

import signal
from types import FrameType

import torch
from torch import distributed

from gpt4moe.training.state import Callback, Record, TrainingContext
from gpt4moe.training.step import StepResult

# Numbers ascend: where ranks got different ones, or one rank several, the one that ends the run wins.
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class Preemption(Callback):
    def __init__(self) -> None:
        self.received: list[int] = []

    def on_start(self, context: TrainingContext) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        heard = self.received[:]
        del self.received[: len(heard)]  # what the handler adds meanwhile stays for the next step
        flag = torch.tensor([max(heard, default=0)], dtype=torch.int32, device=context.groups.device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        number = int(flag.item())
        context.save_requested = number == signal.SIGUSR1
        # In the last step nothing is left to requeue for.
        if number > signal.SIGUSR1 and not context.is_last_step:
            context.stop_requested = signal.Signals(number).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
