"""What is measured beside the step itself and added to its record: held-out loss, device hours, money, time left."""

from dataclasses import replace

from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.architecture.trained import trained_names
from gpt4moe.config.cluster import Generation
from gpt4moe.data.batch import Batch
from gpt4moe.data.prefetch import Prefetch
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.runlog.events_log import own_events
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.run_files import process_began
from gpt4moe.runlog.step_metrics import loss_metrics
from gpt4moe.runlog.usage import Devices, Usage
from gpt4moe.training.callback import Callback, Gives, History
from gpt4moe.training.images import own_micro_batches
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepResult


class Evaluation(Callback):
    """The loss on held-out text, every training.eval_every steps and at the end.

    Its batches are made, and their images decoded, in a thread of its own while the step before it runs; they are in
    memory from then on until it has ended.
    """

    needs = frozenset({Gives.event_log, Gives.step_traffic, Gives.own_routing})
    gives = frozenset({Gives.record})

    def __init__(self) -> None:
        self.prefetch: Prefetch | None = None

    def on_start(self, context: TrainingContext, history: History) -> None:
        self.prefetch = Prefetch(lambda first: held_out_batches(context), context.groups.device)

    def before_step(self, context: TrainingContext) -> None:
        assert self.prefetch is not None, "on_start comes first"
        if _is_evaluated(context, context.state.step + 1):
            self.prefetch.begin(0)

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        assert self.prefetch is not None, "on_start comes first"
        if _is_evaluated(context, context.state.step):
            with context.pause("evaluation"):
                with raise_together(context.groups):
                    batches = self.prefetch.take(0, following=None)
                evaluated = context.runner.evaluate(batches)
            names = context.data.source_names
            record.update(loss_metrics("eval_loss", evaluated.loss, evaluated.sources.tolist(), names))

    def on_exit(self, context: TrainingContext) -> None:
        if self.prefetch is not None:
            self.prefetch.close()


def _is_evaluated(context: TrainingContext, step: int) -> bool:
    settings = context.run.training
    is_due = settings.eval_every > 0 and step % settings.eval_every == 0
    return settings.eval_samples > 0 and (is_due or step >= settings.steps)


def held_out_batches(context: TrainingContext) -> list[Batch]:
    """This rank's micro-batches of the first training.eval_samples held-out samples, the same ones on every layout.

    The schedule takes whole micro-batches of every data-parallel rank, and whole rounds of an interleaved pipeline.
    Samples beyond training.eval_samples are masked in the loss and are padding for the routers.
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
        with_pixels=own_micro_batches(context.groups),
    )
    for index, batch in enumerate(batches):
        first = (index * layout.dp + context.groups.coordinate["dp"]) * settings.micro_batch_size
        beyond = max(0, settings.eval_samples - first)
        batch.loss_mask[beyond:] = 0
        assert batch.token_ids is not None
        batch.token_ids[beyond:] = -1
    return batches


class Resources(Callback):
    """Adds runlog.usage.USAGE_METRICS. Steps that a later launch repeats cost money too, so their records count."""

    needs = frozenset({Gives.event_log})
    gives = frozenset({Gives.record})

    def __init__(self) -> None:
        self.usage: Usage | None = None

    def on_start(self, context: TrainingContext, history: History) -> None:
        run, devices, earlier = context.run, context.groups.layout.world_size, []
        if context.groups.is_first_rank:
            # In a run folder copied from another run, only this run's own launches are charged. Before its first one
            # the last events are the other run's, and all records up to here were paid for by that run.
            events = own_events(history.events)
            is_first = not events or events[0]["run"] != run.run.name
            copied = context.state.step if is_first else events[0]["resumed_step"]
            earlier = [record for record in history.metrics.records if record["step"] > copied]
        is_described = (run.cluster.generation is Generation.cpu) == (context.groups.device.type == "cpu")
        trained = trained_names(run.model, run.stage)
        self.usage = Usage(
            Devices(
                count=devices,
                peak_flops=devices * run.cluster.peak_flops(run.precision.dtype) if is_described else None,
                usd_per_hour=run.cluster.usd_per_hour,
            ),
            began=process_began("self"),
            sizes=run.step_sizes,
            flops_per_token={
                length: flops_per_token(replace(run.model, seq_length=length), trained=trained).model
                for _, length in run.step_sizes.lengths()
            },
            total_steps=run.training.steps,
            earlier=earlier,
        )

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        assert self.usage is not None, "on_start comes first"
        self.usage.add_to(record)
