"""Tells the watchdog what it cannot see by itself, and the metrics what it has seen: the busiest rank.

No collective: the watchdogs share what they see through their board.
"""

import logging
import sys

from gpt4moe.errors import GoBack, Gpt4MoeError
from gpt4moe.resilience.hangs import busiest
from gpt4moe.runlog.metrics import Record
from gpt4moe.training.callback import Callback, Gives, History
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepResult
from gpt4moe.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

_TOLD_RATIO = 1.5


class BusiestRank(Callback):
    """Adds runlog.step_metrics.RANK_METRICS to the step after each reading of all beats, once a minute. On rank 0."""

    needs = frozenset({Gives.event_log})
    gives = frozenset({Gives.record})

    def __init__(self, watchdog: Watchdog):
        self.watchdog = watchdog
        self.seen, self.told = 0, -1

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        call, layout = self.watchdog.call, context.groups.layout
        if not context.groups.is_first_rank or call.readings == self.seen:
            return
        self.seen = call.readings
        found = busiest(call.beats, lambda rank: layout.coordinate(rank)["pp"])
        if found is None:
            return
        rank, ratio = found
        record["busiest_rank"], record["busiest_rank_ratio"] = rank, round(ratio, 3)
        if ratio > _TOLD_RATIO and rank != self.told:
            node = call.beats[rank].node
            logger.warning(
                "rank %d on %s is slow: it works %.1f times as long as the others of its stage, which wait for it",
                rank, node, ratio,
            )  # fmt: skip
        self.told = rank if ratio > _TOLD_RATIO else -1


class Heartbeat(Callback):
    """The last callback: a step ends with its checkpoint, and an error is told before files are closed."""

    needs = frozenset({Gives.checkpoint, Gives.event_log})

    def __init__(self, watchdog: Watchdog):
        self.watchdog = watchdog

    def on_start(self, context: TrainingContext, history: History) -> None:
        self.watchdog.follow(context.waits, context.state.step, context.events)

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        self.watchdog.stepped(context.state.step, float(record["step_seconds"]))
        if context.is_last_step:
            self.watchdog.rest()

    def on_exit(self, context: TrainingContext) -> None:
        error = sys.exception()  # called in a `finally`
        self.watchdog.between()
        if error is not None and not isinstance(error, GoBack):
            self.watchdog.leaves()
        if isinstance(error, Exception) and not isinstance(error, Gpt4MoeError):  # those are of every rank
            ended = self.watchdog.failed(error)
            context.ended_by = None if ended is None else ended.cause
