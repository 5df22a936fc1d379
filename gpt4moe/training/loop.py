"""The training loop: batches, a step, callbacks; until training.steps is reached or a stop is requested.

The batches of the next step are made while this step runs (data.prefetch).
"""

import logging
import time
from contextlib import closing

from gpt4moe.data.batch import Batch
from gpt4moe.data.prefetch import Prefetch
from gpt4moe.errors import CorruptionError, DivergenceError
from gpt4moe.moe.statistics import routing_metrics
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.step_metrics import StepTimes, loss_metrics, time_metrics
from gpt4moe.training.callback import Callback, History, best_effort, check_order
from gpt4moe.training.go_back import end_of_corruption, end_of_divergence, suspect_before
from gpt4moe.training.images import own_micro_batches
from gpt4moe.training.recheck import Recheck
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepResult
from gpt4moe.training.update import StepOutcome, train_step
from gpt4moe.training.watch import Watch

logger = logging.getLogger(__name__)


class Trainer:
    """Runs steps and calls the callbacks; the state of a run is in the context, features are callbacks.

    Args:
        callbacks: in an order that check_order accepts.
        history: of the launches before, for the callbacks' on_start.
    """

    def __init__(self, context: TrainingContext, callbacks: list[Callback], history: History):
        check_order(callbacks)
        self.context = context
        self.sizes = context.run.step_sizes
        self.callbacks = callbacks
        self.history = history
        self.policy = Watch(context.state.recent)
        self.check = Recheck(context.runner)

    def fit(self) -> None:
        """Trains to the end of this launch. Collective.

        Raises: the same on every rank: GoBack, when the run goes on from an earlier checkpoint by another Trainer;
            DivergenceError, CorruptionError, CheckpointError, or an error of a callback's on_start.
        """
        context = self.context
        try:
            for callback in self.callbacks:
                with raise_together(context.groups):
                    callback.on_start(context, self.history)
            self.history = History()  # frees what may be a gigabyte
            for callback in self.callbacks:
                callback.before_first_step(context)
            self.check.remember(context.state.step)
            with closing(Prefetch(self._batches, context.groups.device)) as prefetch:
                while not context.is_last_step:
                    for callback in self.callbacks:
                        callback.before_step(context)
                    record, result = self._one_step(prefetch)
                    for callback in self.callbacks:
                        callback.on_step(context, record, result)
            for callback in self.callbacks:
                with best_effort(f"{type(callback).__name__} at the end"):
                    callback.on_end(context)
        except DivergenceError as error:
            end_of_divergence(context, error)
            raise
        except CorruptionError as error:
            end_of_corruption(context, error)
            raise
        finally:
            for callback in reversed(self.callbacks):
                with best_effort(f"closing {type(callback).__name__}"):
                    callback.on_exit(context)

    def _batches(self, consumed_samples: int) -> list[Batch]:
        """This rank's micro-batches of the step that follows `consumed_samples`."""
        context, training = self.context, self.context.run.training
        size = self.sizes.at_sample(consumed_samples).global_batch_size
        return context.data.train.micro_batches(
            context.state.passed_over.position(consumed_samples),
            global_batch_size=size,
            micro_batch_size=training.micro_batch_size,
            dp=context.groups.layout.dp,
            dp_index=context.groups.coordinate["dp"],
            with_pixels=own_micro_batches(context.groups),
        )

    def _tell(self, done: StepOutcome) -> None:
        """Of a step that is not as those before: a warning and an event."""
        state, what = self.context.state, "updated all the same" if done.is_updated else "update skipped"
        told = f"step {state.step}: {what}: {done.verdict.cause}"
        logger.warning("%s", told)
        self.context.suspicions.append(told)
        if not done.is_updated:
            suspect_before(self.context, state.step, told)
        if self.context.events is not None:
            action, cause = done.verdict.action.value, done.verdict.cause
            self.context.events.write("numbers", step=state.step, action=action, cause=cause)

    def _one_step(self, prefetch: Prefetch) -> tuple[Record, StepResult]:
        context, run = self.context, self.context.run
        start = time.perf_counter()
        state = context.state
        span = self.sizes.at_sample(state.consumed_samples)
        following = state.consumed_samples + span.global_batch_size
        has_next = state.step + 1 < run.training.steps
        with raise_together(context.groups):  # each rank reads samples and decodes images that others do not
            batches = prefetch.take(state.consumed_samples, following=following if has_next else None)
        data_seconds = time.perf_counter() - start
        passed_over = state.passed_over.position(following) - following
        phase = run.data.phase_of(self.sizes.tokens(state.step + 1) + passed_over * span.seq_length)
        state.recent.begin(f"{span.seq_length} tokens, phase {phase}")
        is_checked = self.check.is_due(state.step + 1)
        if is_checked:
            self.check.made_again = prefetch.again(state.consumed_samples)
        done = train_step(context.runner, state.step + 1, batches, policy=self.policy, check=self.check)
        if is_checked and context.events is not None:
            context.events.write("recompute", step=state.step + 1, seconds=done.check_seconds)
        state.step += 1
        state.optimizer_step += done.is_updated
        state.consumed_samples = following
        if done.verdict.cause:
            self._tell(done)
        result = done.result
        times = StepTimes(
            data=data_seconds, forward_backward=done.forward_backward_seconds, optimizer=done.optimizer_seconds
        )
        record: Record = {
            "step": state.step,
            **loss_metrics("loss", result.loss, result.sources.tolist(), context.data.source_names),
            **result.logged,
            **routing_metrics(result.routing, run.model),
            "grad_norm": done.grad_norm,
            "learning_rate": done.learning_rate,
            "consumed_tokens": self.sizes.tokens(state.step),
            **time_metrics(times, span.tokens_per_step),
        }
        if run.training.length_ramp:
            record["seq_length"] = span.seq_length
        return record, result
