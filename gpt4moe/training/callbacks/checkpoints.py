"""Checkpoints every checkpoint.every steps, at the end, and when the run is asked to stop."""

from gpt4moe.runlog.metrics import Record
from gpt4moe.training.checkpointing import Saver
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult


class Checkpoints(Callback):
    def __init__(self) -> None:
        self.saver = Saver()

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        self.saver.poll(context.groups)
        if not context.is_saved_step:
            return
        in_background = context.run.checkpoint.asynchronous and not context.is_last_step
        with context.pause("checkpoint"):
            self.saver.start(context, staged=in_background)
            if not in_background:  # nothing is left to do meanwhile, and the process may end only with it committed
                self.saver.wait(context.groups)

    def on_exit(self, context: TrainingContext) -> None:
        self.saver.leave()
