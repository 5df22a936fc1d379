"""Probes: what the model is asked between steps, on the chunks and the layout that it trains on.

    train.py makes them (evaluation.in_loop): texts of fixed prompts, evaluation tasks
    -> on_step -> lines in the run folder, metrics in the step's record, texts for wandb

The next step is equal to the bit to one without a probe. After a resume every line is there once: those of steps that
are done again are dropped. Those that a signal or a kill left out are made before the first step, from the weights of
the checkpoint.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from gpt4moe.model.parameters import language_chunks
from gpt4moe.parallel.agreement import broadcast_int
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.step_lines import SAMPLES_FILE, StepLine, StepLines
from gpt4moe.training.callback import Callback, Gives, History, best_effort
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepResult


class Probe(Protocol):
    """One kind of questions."""

    file: str
    """Of the run folder, which gets a line for each question."""
    pause: str
    """What training waits for meanwhile (runlog.events_log.PAUSES)."""
    key: str
    """The field of a line that names its question."""
    names: list[str]
    """The questions."""
    every: int | None
    """Steps between; None: at each step that gets a checkpoint."""

    def ask(self, chunks: list[nn.Module], groups: ProcessGroups, step: int) -> list[StepLine]:
        """Lines for all questions, on rank 0; others may know fewer. Collective over the world."""

    def metrics(self, lines: Sequence[StepLine]) -> Record:
        """What the step's record gets."""


class Probes(Callback):
    """Asks each probe at its steps."""

    needs = frozenset({Gives.event_log, Gives.step_traffic, Gives.own_routing, Gives.requests})
    gives = frozenset({Gives.record})

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = probes
        self.logs: dict[str, StepLines] = {}

    def on_start(self, context: TrainingContext, history: History) -> None:
        if not context.groups.is_first_rank:
            return
        for probe in self.probes:
            with best_effort(f"opening {probe.file}"):
                self.logs[probe.file] = StepLines.open(context.folder.path / probe.file, context.state.step)

    def before_first_step(self, context: TrainingContext) -> None:
        for probe in self.probes:
            if context.state.step and self._is_due(probe, context, is_saved=True):
                missing = self._missing(probe)
                # Only rank 0 has the lines.
                if broadcast_int(len(missing), context.groups):
                    self._ask(context, probe, missing)

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        if context.stop_requested is not None:
            return  # the time that is left is for the checkpoint; the next launch asks
        for probe in self.probes:
            if self._is_due(probe, context, is_saved=context.is_saved_step):
                record.update(probe.metrics(self._ask(context, probe, probe.names)))

    @staticmethod
    def _is_due(probe: Probe, context: TrainingContext, *, is_saved: bool) -> bool:
        return is_saved if probe.every is None else context.state.step % probe.every == 0

    def _missing(self, probe: Probe) -> list[str]:
        """At the step that this launch resumes from."""
        log = self.logs.get(probe.file)
        done = {line.get(probe.key) for line in log.resumed} if log is not None else set(probe.names)
        return [name for name in probe.names if name not in done]

    def _ask(self, context: TrainingContext, probe: Probe, wanted: Sequence[str]) -> list[StepLine]:
        """The lines of all questions; those of `wanted` are written. Collective."""
        step = context.state.step
        with context.pause(probe.pause):
            context.engine.finish_update()
            answers = probe.ask(language_chunks(context.engine.chunks), context.groups, step)
        lines: list[StepLine] = [{"step": step, **answer} for answer in answers]
        log = self.logs.get(probe.file)
        if log is not None:
            written = [line for line in lines if line[probe.key] in wanted]
            with best_effort(f"writing {probe.file}"):
                log.add(written)
            if probe.file == SAMPLES_FILE:
                context.samples += written
        return lines
