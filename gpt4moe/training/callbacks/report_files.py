"""Files that the report of a run is drawn from, and the report: wire.json, expert_load.json, loss.png, report.html.

Rank 0 writes them. They are extras: a failure here neither stops training nor changes the exit status of a saved run.
"""

import json
import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, distributed

from gpt4moe.config.training import REPORT_SECONDS
from gpt4moe.moe.statistics import tokens_of_experts
from gpt4moe.parallel.wire import GROUPS, KINDS, WireCounter
from gpt4moe.runlog.expert_load import LoadHistory
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.run_files import EXPERT_LOAD_FILE, WIRE_FILE, replace_file
from gpt4moe.training.callback import Callback, Gives, History, best_effort
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepResult

logger = logging.getLogger(__name__)

_WINDOW_STEPS = 50


class WireBytes(Callback):
    """Bytes on the wire of the first step of a launch, counted at its collectives and summed over ranks: wire.json. A
    step that is computed twice (resilience.recompute_every) does not count.

    before_step opens the counter, on_step closes it. What other callbacks send between steps does not count.
    """

    gives = frozenset({Gives.step_traffic})

    def __init__(self) -> None:
        self.counter: WireCounter | None = None
        self.is_done = False

    def before_step(self, context: TrainingContext) -> None:
        every = context.run.resilience.recompute_every
        if every > 0 and (context.state.step + 1) % every == 0:
            return  # computed twice
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


class Report(Callback):
    """Tokens of each expert over the last steps and over the run, written with every checkpoint; the report at the end.

    Args:
        write_report: draws the report of a run folder; an argument, so that nothing that trains imports the planner.
    """

    needs = frozenset({Gives.event_log, Gives.requests, Gives.metrics_log, Gives.checkpoint})

    def __init__(self, write_report: Callable[[Path], Path]) -> None:
        self.write_report = write_report
        self.loads: deque[Tensor] = deque(maxlen=_WINDOW_STEPS)
        self.history = LoadHistory()

    def on_start(self, context: TrainingContext, history: History) -> None:
        file = context.folder.path / EXPERT_LOAD_FILE
        if not context.groups.is_first_rank or not file.exists():
            return
        with best_effort(f"reading {file}"):
            self.history = LoadHistory.from_json(json.loads(file.read_text()).get("history"))
            self.history.drop_after(context.state.step)

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        moe = context.run.model.moe
        if moe is None or not context.groups.is_first_rank:
            return
        layers = [index for index, has in enumerate(context.run.model.moe_layers) if has]
        load = tokens_of_experts(result.routing[layers])
        self.loads.append(load)
        self.history.add(context.state.step, load.numpy())
        if context.is_saved_step:
            with best_effort(f"writing {EXPERT_LOAD_FILE}"):
                self._write_load(context, layers)

    def on_end(self, context: TrainingContext) -> None:
        if not context.groups.is_first_rank or not context.state.step:
            return
        limit = REPORT_SECONDS if context.stop_requested else None
        # A daemon thread, because the process can end without it. A file is written whole or not at all.
        writer = threading.Thread(target=self._write, args=(context.folder.path,), name="report", daemon=True)
        with context.pause("report"):
            writer.start()
            writer.join(limit)
        if writer.is_alive():
            logger.warning("the report was not done within %g s: the next launch writes it", limit)

    def _write_load(self, context: TrainingContext, layers: list[int]) -> None:
        last = context.state.step
        stored = {
            "first_step": last - len(self.loads) + 1,
            "last_step": last,
            "layers": layers,
            "tokens": sum(self.loads).tolist(),  # type: ignore[union-attr]
            "history": self.history.to_json(),
        }
        replace_file(context.folder.path / EXPERT_LOAD_FILE, json.dumps(stored).encode())

    def _write(self, run_folder: Path) -> None:
        with best_effort("loss.png and report.html"):
            logger.info("report %s", self.write_report(run_folder))
