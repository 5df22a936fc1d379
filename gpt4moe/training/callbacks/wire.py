"""Bytes on the wire of one step, once a start: counted at the collectives of its first step, for the report.

before_step -> WireCounter over the step -> on_step: summed over ranks -> wire.json
"""

import json

from torch import distributed

from gpt4moe.parallel.wire import GROUPS, KINDS, WireCounter
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.run_files import WIRE_FILE, replace_file
from gpt4moe.training.best_effort import best_effort
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult


class WireBytes(Callback):
    """First of those that send anything, so that what others send between steps is not counted."""

    def __init__(self) -> None:
        self.counter: WireCounter | None = None
        self.is_done = False

    def before_step(self, context: TrainingContext) -> None:
        if context.run.tracking.count_bytes and not self.is_done and context.groups.layout.world_size > 1:
            self.counter = WireCounter(context.groups)
            self.counter.__enter__()

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        if self.counter is None:
            return
        table = self._stop(self.counter).table().to(context.groups.device)
        distributed.all_reduce(table)
        if context.groups.is_first_rank:
            sent = {
                group: {kind: size for kind, size in zip(KINDS, row, strict=True) if size}
                for group, row in zip(GROUPS, table.tolist(), strict=True)
                if any(row)
            }
            stored = {"step": context.state.step, "ranks": context.groups.layout.world_size, "sent": sent}
            with best_effort(f"writing {WIRE_FILE}"):
                replace_file(context.folder.path / WIRE_FILE, json.dumps(stored, indent=1).encode())

    def on_exit(self, context: TrainingContext) -> None:
        if self.counter is not None:
            self._stop(self.counter)

    def _stop(self, counter: WireCounter) -> WireCounter:
        counter.__exit__(None, None, None)
        self.counter, self.is_done = None, True
        return counter
