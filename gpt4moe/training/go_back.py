"""What is done when a loop ends because a step went wrong: checkpoints before it are suspect; does the run go back?

    DivergenceError of a step, on every rank -> a save under way is finished -> suspect checkpoints are marked (rank 0)
    -> GoBack: decided and recorded (training.gone_back) -> the loop ends -> train.py builds a Trainer, same engine

Every rank comes here, because the verdict on a step is the same on every rank.
"""

import logging

from gpt4moe.checkpoint.retention import mark_between, step_folder
from gpt4moe.errors import CorruptionError, DivergenceError, GoBack, Gpt4MoeError, LaunchError
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.training.callback import best_effort
from gpt4moe.training.gone_back import decide, suspicion
from gpt4moe.training.state import TrainingContext

logger = logging.getLogger(__name__)


def suspect_before(context: TrainingContext, step: int, cause: str) -> None:
    """Marks the checkpoints of less than resilience.suspect_steps before a step that went wrong. No collective.

    Args: cause: names the step.
    """
    mark_suspect(context, step - context.run.resilience.suspect_steps, step - 1, cause)


def mark_suspect(context: TrainingContext, after: int, until: int, cause: str) -> None:
    """Marks the checkpoints of the steps in (after, until]; each is a warning and an alert. Rank 0 does it. No
    collective."""
    if not context.groups.is_first_rank:
        return
    with best_effort("marking suspect checkpoints"):
        for saved in mark_between(context.folder.checkpoints, after, until, cause):
            logger.warning("the checkpoint of step %d is suspect: %s", saved, cause)
            if context.events is not None:
                text = f"the checkpoint of step {saved}: {cause}"
                context.events.write("alert", step=context.state.step, name="suspect checkpoint", text=text)


def end_of_divergence(context: TrainingContext, error: DivergenceError) -> None:
    """Marks checkpoints; where the policy says so, decides to what the run goes back. Collective.

    Raises: DivergenceError on every rank, in place of GoBack, where the run cannot go back.
    """
    if isinstance(error, GoBack):
        try:
            context.finish_save()
        except Gpt4MoeError as failed:
            logger.warning("%s", failed.cause)
    suspect_before(context, error.step, error.cause)
    if isinstance(error, GoBack):
        _decide(context, error)


def end_of_corruption(context: TrainingContext, error: CorruptionError) -> None:
    """Marks the checkpoint that was written when the fault may have been there already. Collective."""
    try:
        context.finish_save()
    except Gpt4MoeError as failed:
        logger.warning("%s", failed.cause)
    mark_suspect(context, error.since - 1, error.since, error.cause)


def _decide(context: TrainingContext, error: GoBack) -> None:
    try:
        with raise_together(context.groups):
            if context.groups.is_first_rank:
                _record(context, error)
    except Gpt4MoeError as refusal:  # of rank 0: the same error and exit status on every rank
        raise DivergenceError(refusal.cause, refusal.cure) from None


def _record(context: TrainingContext, error: GoBack) -> None:
    folder, state = context.folder.path, context.state
    try:
        found = decide(folder, context.run, state.passed_over, error)
    except OSError as failed:
        raise LaunchError(
            f"{error.cause} The run cannot go back: {folder} cannot be written: {failed.strerror}.",
            "Make room or mend the cause, then start again.",
        ) from failed
    to_step, samples = found.to_step, found.samples
    logger.warning("%s\nThe run goes back to step %d and passes over %d samples.", error.cause, to_step, samples)
    doubt = suspicion(step_folder(context.folder.checkpoints, to_step))
    if doubt:
        logger.warning("No checkpoint is healthy. That of step %d is suspect too: %s", to_step, doubt)
    if context.events is not None:
        context.events.write("go_back", step=error.step, to_step=to_step, samples=samples, cause=error.cause)
