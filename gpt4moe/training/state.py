"""What a step advances, and what callbacks see of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gpt4moe.config.run import RunConfig
from gpt4moe.data.loader import Data
from gpt4moe.errors import Gpt4MoeError
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.runlog.events_log import EventsLog
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_log import StoredMetrics
from gpt4moe.runlog.waits import Waits
from gpt4moe.training.engine import Engine
from gpt4moe.training.run_folder import RunFolder
from gpt4moe.training.step import StepResult, StepRunner


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Where a run stands; with the weights and moments this is everything a checkpoint holds."""

    step: int = 0
    """Steps taken, skipped ones included."""
    optimizer_step: int = 0
    """Updates made: steps without the skipped ones. Adam's bias correction counts these."""
    consumed_samples: int = 0
    """Training samples used; the whole state of the data."""


@dataclass(kw_only=True, slots=True)
class TrainingContext:
    """One start of a run, on one rank: what the loop and its callbacks work with."""

    run: RunConfig
    groups: ProcessGroups
    folder: RunFolder
    data: Data
    engine: Engine
    runner: StepRunner
    state: TrainState = field(default_factory=TrainState)
    stop_requested: str | None = None
    """Why the loop should save and end after this step; the same on every rank."""
    save_requested: bool = False
    """The step just done gets a checkpoint because somebody asked for one; the same on every rank."""
    refusal: Gpt4MoeError | None = None
    """Why this rank cannot go on; the others hear it before the step's checkpoint, or with the next step's signals."""
    events: EventsLog | None = None
    """The open events.jsonl, on the first rank."""
    earlier: StoredMetrics = field(default_factory=StoredMetrics)
    """metrics.jsonl as the start before left it: on the first rank, while the callbacks start."""
    waits: Waits = field(default_factory=Waits)
    """What this start is doing, for who must tell a long save from a hang."""

    @property
    def is_last_step(self) -> bool:
        return self.state.step >= self.run.training.steps or self.stop_requested is not None

    @property
    def is_saved_step(self) -> bool:
        """Whether the step just done gets a checkpoint."""
        every = self.run.checkpoint.every
        return self.is_last_step or self.save_requested or (every > 0 and self.state.step % every == 0)

    def refuse(self) -> None:
        """Within `agreed`, so that a refusal of this rank ends all. Raises: Gpt4MoeError."""
        if self.refusal is not None:
            raise self.refusal

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Around what training waits for: its seconds become an event of this kind (runlog.events_log)."""
        self.waits.begin(kind)
        if self.events is not None:
            self.events.write("pause", what=kind, step=self.state.step)
        yield
        seconds = self.waits.end()
        if self.events is not None:
            self.events.write(kind, step=self.state.step, seconds=seconds)


class Callback:
    """A feature at the loop's edge. Every rank calls every hook, in the order of build.build_callbacks."""

    def on_start(self, context: TrainingContext) -> None:
        """Before the first step of this start; the state is loaded. No collective; a Gpt4MoeError ends every rank."""

    def before_step(self, context: TrainingContext) -> None:
        """Right before a step's batches are made."""

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        """After an update; may add metrics to the record, which later callbacks write."""

    def on_end(self, context: TrainingContext) -> None:
        """After the last step of this start and its checkpoint, not after an error. No collective; failing changes no
        status: the run is saved."""

    def on_exit(self, context: TrainingContext) -> None:
        """Always, also after an error, the first callback last: close what is open. No collective here;
        failing changes no status."""
