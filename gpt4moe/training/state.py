"""TrainState: the counters that a step advances. TrainingContext: what the loop and its callbacks use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gpt4moe.checkpoint.saving import Save
from gpt4moe.config.run import RunConfig
from gpt4moe.data.loader import Data
from gpt4moe.data.passed_over import PassedOver
from gpt4moe.errors import Gpt4MoeError
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.resilience.recent import Recent
from gpt4moe.runlog.events_log import EventsLog
from gpt4moe.runlog.step_lines import StepLine
from gpt4moe.runlog.waits import Waits
from gpt4moe.training.engine import Engine
from gpt4moe.training.run_folder import RunFolder
from gpt4moe.training.step import StepRunner


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Counters of a run. A checkpoint has these, the weights, the buffers and the optimizer's state."""

    step: int = 0
    """Steps taken, skipped ones included."""
    optimizer_step: int = 0
    """Updates made: steps without the skipped ones. Adam's bias correction counts these."""
    consumed_samples: int = 0
    """Training samples used. With `passed_over`, the data needs no other state."""
    passed_over: PassedOver = field(default_factory=PassedOver)
    """Samples of the order that are not read, because the run went back from them (training.gone_back)."""
    recent: Recent = field(default_factory=Recent)
    """Numbers of the steps before, by which the policy judges the next (training.watch)."""


@dataclass(kw_only=True, slots=True)
class TrainingContext:
    """One launch of a run, on one rank."""

    run: RunConfig
    groups: ProcessGroups
    folder: RunFolder
    data: Data
    engine: Engine
    runner: StepRunner
    state: TrainState = field(default_factory=TrainState)
    stop_requested: str | None = None
    """Name of the signal after which this step is saved and is the last one; the same on every rank."""
    save_requested: bool = False
    """A signal asked for a checkpoint of the step just done; the same on every rank."""
    base: dict[str, str] | None = None
    """Of a run with adapters: the checkpoint of its frozen weights (checkpoint.base.reference)."""
    ended_by: str | None = None
    """Why the launch ends, in the words of the watchdog, where it is an error of a single rank."""
    refusal: Gpt4MoeError | None = None
    """An error of this rank alone. It is raised on all ranks at the next point where they agree: before the step's
    checkpoint, else after the next step."""
    events: EventsLog | None = None
    """The open events.jsonl, on rank 0."""
    samples: list[StepLine] = field(default_factory=list)
    """Texts of training.sample_prompts that wandb has not got yet, on rank 0."""
    suspicions: list[str] = field(default_factory=list)
    """Of the steps since the last checkpoint: those that were skipped, or a spike. They make the next one suspect."""
    finish_save: Callable[[], None] = lambda: None
    """Waits until a save under way has ended. Collective. Raises: Gpt4MoeError on every rank when it has failed."""
    hanging: Save | None = None
    """Of this rank: a save that was given up and whose thread has not come back from the disk. It goes on to the
    context after a going back."""
    waits: Waits = field(default_factory=Waits)
    """What training waits for at the moment, so that alerts can tell a long save from a hang."""

    @property
    def is_last_step(self) -> bool:
        return self.state.step >= self.run.training.steps or self.stop_requested is not None

    @property
    def is_saved_step(self) -> bool:
        """Whether the step just done gets a checkpoint."""
        every = self.run.checkpoint.every
        return self.is_last_step or self.save_requested or (every > 0 and self.state.step % every == 0)

    def refuse(self) -> None:
        """Call it within raise_together. Raises: the error of this rank alone, if it has one."""
        if self.refusal is not None:
            raise self.refusal

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Measures work that training waits for. Its seconds become an event of this kind (runlog.events_log). Within
        one of its kind, that one measures."""
        if self.waits.idle().kind == kind:
            yield
            return
        self.waits.begin(kind)
        if self.events is not None:
            self.events.write("pause", what=kind, step=self.state.step)
        try:
            yield
        finally:  # also where it failed: training waited so long
            seconds = self.waits.end()
            if self.events is not None:
                self.events.write(kind, step=self.state.step, seconds=seconds)
