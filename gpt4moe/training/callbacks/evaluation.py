"""The loss on held-out text, every training.eval_every steps and at the end; added to the step's record."""

from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.step_metrics import loss_metrics
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult


class Evaluation(Callback):
    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        every = context.run.training.eval_every
        if not context.run.training.eval_samples:
            return
        if (every and context.state.step % every == 0) or context.state.step >= context.run.training.steps:
            with context.pause("evaluation"):
                evaluated = evaluate(context)
            names = context.data.source_names
            record.update(loss_metrics("eval_loss", evaluated.loss, evaluated.sources.tolist(), names))


def evaluate(context: TrainingContext) -> StepResult:
    """Losses over the first training.eval_samples held-out samples, the same ones on every layout. Collective.

    The schedule wants whole micro-batches of every data-parallel rank (and whole rounds of an interleaved pipeline):
    what is beyond the samples asked for is masked, and padding to the routers.
    """
    settings, layout = context.run.training, context.groups.layout
    unit = settings.micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
    samples = max(1, -(-settings.eval_samples // unit)) * unit
    batches = context.data.validation.micro_batches(
        0,
        global_batch_size=samples,
        micro_batch_size=settings.micro_batch_size,
        dp=layout.dp,
        dp_index=context.groups.coordinate["dp"],
    )
    for index, batch in enumerate(batches):
        first = (index * layout.dp + context.groups.coordinate["dp"]) * settings.micro_batch_size
        beyond = max(0, settings.eval_samples - first)
        batch.loss_mask[beyond:] = 0
        assert batch.token_ids is not None
        batch.token_ids[beyond:] = -1
    return context.runner.evaluate(batches)
