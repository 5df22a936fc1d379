"""The loop: batches, one step, the callbacks; until training.steps or until asked to stop."""

import math
import time

from gpt4moe.errors import DivergenceError
from gpt4moe.runlog.metrics import Record
from gpt4moe.training.agreement import raise_together
from gpt4moe.training.best_effort import best_effort
from gpt4moe.training.learning_rate import learning_rate
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult
from gpt4moe.training.step_metrics import routing_metrics, source_losses


class Trainer:
    """Owns nothing but the order of things; what a run is lies in the context, features are callbacks."""

    def __init__(self, context: TrainingContext, callbacks: list[Callback]):
        self.context = context
        self.callbacks = callbacks

    def fit(self) -> None:
        """Trains to the end of this start. Collective.

        Raises: on every rank alike, DivergenceError, CheckpointError, or what a callback refused at the start.
        """
        context = self.context
        try:
            for callback in self.callbacks:
                with raise_together(context.groups):
                    callback.on_start(context)
            while not context.is_last_step:
                for callback in self.callbacks:
                    callback.before_step(context)
                record, result = self._one_step()
                for callback in self.callbacks:
                    callback.on_step(context, record, result)
            for callback in self.callbacks:
                with best_effort(f"{type(callback).__name__} at the end"):
                    callback.on_end(context)
        finally:
            for callback in reversed(self.callbacks):
                with best_effort(f"closing {type(callback).__name__}"):
                    callback.on_exit(context)

    def _one_step(self) -> tuple[Record, StepResult]:
        context, run = self.context, self.context.run
        times = [time.perf_counter()]
        layout, state = context.groups.layout, context.state
        batches = context.data.train.micro_batches(
            state.consumed_samples,
            global_batch_size=run.training.global_batch_size,
            micro_batch_size=run.training.micro_batch_size,
            dp=layout.dp,
            dp_index=context.groups.coordinate["dp"],
        )
        times.append(time.perf_counter())
        result = context.runner.forward_backward(batches)
        times.append(time.perf_counter())
        context.engine.reduce()
        norm = context.engine.clip()
        if not math.isfinite(norm) or not math.isfinite(result.loss):
            raise DivergenceError(
                f"Step {state.step + 1} has loss {result.loss} and gradient norm {norm}; the weights were not touched.",
                f"Lower optimizer.lr={run.optimizer.lr:g} or optimizer.clip_norm, and start again: the run goes on "
                "from its last checkpoint.",
            )
        rate = learning_rate(state.step + 1, run.optimizer.lr, run.schedule)
        context.engine.update(rate)
        context.runner.finish_step(result)
        state.step += 1
        state.consumed_samples += run.training.global_batch_size
        times.append(time.perf_counter())
        data_seconds, forward_backward_seconds, optimizer_seconds = map(float.__sub__, times[1:], times)
        seconds = times[-1] - times[0]
        record: Record = {
            "step": state.step,
            "loss": result.loss,
            **source_losses("loss", result, context.data.source_names),
            **routing_metrics(run, result),
            "grad_norm": norm,
            "learning_rate": rate,
            "consumed_tokens": state.consumed_samples * run.model.seq_length,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "forward_backward_seconds": forward_backward_seconds,
            "optimizer_seconds": optimizer_seconds,
            "tokens_per_second": run.training.global_batch_size * run.model.seq_length / seconds,
        }
        return record, result
