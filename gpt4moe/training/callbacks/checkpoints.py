"""Checkpoints every checkpoint.every steps, at the end, and when the run is asked to stop."""

import logging

from gpt4moe.training.checkpointing import save
from gpt4moe.training.state import Callback, Record, TrainingContext
from gpt4moe.training.step import StepResult

logger = logging.getLogger(__name__)


class Checkpoints(Callback):
    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        every = context.run.checkpoint.every
        if context.is_last_step or (every and context.state.step % every == 0):
            folder = save(context)
            if context.groups.is_first_rank:
                logger.info("checkpoint %s", folder)
