"""Callback: what a feature does around the steps of a launch; check_order: whether a list of them can work.

Callbacks run in the order of their list (build.build_callbacks). A result of one callback that another uses has a name
in Gives. A callback declares what it `needs` and what it `gives`. It must come after all callbacks that give what it
needs.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Self

from gpt4moe.runlog.events_log import EVENTS_FILE, Event, read_events
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_log import StoredMetrics
from gpt4moe.training.run_folder import RunFolder
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepResult

logger = logging.getLogger(__name__)


class Gives(Enum):
    """Results of callbacks that later callbacks use."""

    event_log = "an events.jsonl that outlives every other callback: on_exit runs from the last to the first"
    step_traffic = "the step's bytes on the wire, counted before anything else is sent"
    own_routing = "this rank's routing of the step, read before an evaluation counts its own"
    record = "metrics of the step, in the record"
    requests = "context.stop_requested and save_requested, so context.is_saved_step"
    replica_check = "copies of tensors found equal"
    metrics_log = "the record, written to metrics.jsonl"
    console = "an open console and wandb run"
    checkpoint = "the step's checkpoint, where it gets one"


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What earlier launches of this run wrote. Rank 0 reads each file once a launch; other ranks have an empty one.

    It is dropped when all callbacks have started: the records of 100,000 steps take a gigabyte.
    """

    metrics: StoredMetrics = field(default_factory=StoredMetrics)
    """metrics.jsonl, with the steps that this launch will repeat."""
    events: list[Event] = field(default_factory=list)

    @classmethod
    def read(cls, folder: RunFolder) -> Self:
        """Raises: LaunchError when metrics.jsonl is damaged."""
        return cls(metrics=StoredMetrics.read(folder.metrics), events=read_events(folder.path / EVENTS_FILE))


class Callback:
    """A feature around the steps. Every rank calls every hook of every callback, in the order of the list."""

    needs: ClassVar[frozenset[Gives]] = frozenset()
    gives: ClassVar[frozenset[Gives]] = frozenset()

    def on_start(self, context: TrainingContext, history: History) -> None:
        """Before the first step of this launch; the state is loaded. No collective; a Gpt4MoeError ends every rank.

        Args: history: not to be kept after this call.
        """

    def before_first_step(self, context: TrainingContext) -> None:
        """Before the first step of this launch, after on_start of all callbacks. May be collective."""

    def before_step(self, context: TrainingContext) -> None:
        """Right before the batches of a step are made."""

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        """After a step; may add metrics to the record. May be collective."""

    def on_end(self, context: TrainingContext) -> None:
        """Called after the last step of this launch and its checkpoint, but not after an error. No collective. A
        failure is logged and does not change the exit status, because the run is saved."""

    def on_exit(self, context: TrainingContext) -> None:
        """Closes what is open. Always called, also after an error, from the last callback to the first. No collective.
        A failure is logged and does not change the exit status."""


def check_order(callbacks: Sequence[Callback]) -> None:
    """Raises: ValueError when a callback needs a result that a later callback gives, or that no callback gives."""
    for index, callback in enumerate(callbacks):
        for need in callback.needs:
            givers = [place for place, other in enumerate(callbacks) if need in other.gives]
            if not givers or max(givers) >= index:
                late = [type(callbacks[place]).__name__ for place in givers if place >= index]
                raise ValueError(
                    f"{type(callback).__name__} needs {need.name} ({need.value}), which "
                    + (f"{', '.join(late)} behind it gives" if late else "no callback gives")
                )


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Logs a failure in one line and goes on. For reports and other extras. The work must have no collective."""
    try:
        yield
    # Any error: a full disk, a folder in the place of a file, an error of a library.
    except Exception as error:
        logger.warning("%s failed, the run goes on: %s: %s", what, type(error).__name__, " ".join(str(error).split()))
