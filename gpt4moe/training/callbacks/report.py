"""What the experts got, over the last steps and over the run; at the end of a start loss.png and report.html.

On the first rank. The loads are written with every checkpoint too: a start that goes on from there goes on with them.
All of it is decoration: no failure here stops training, or changes the exit status of a run that is saved.
"""

import json
import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from gpt4moe.config.resilience import REPORT_SECONDS
from gpt4moe.moe.statistics import tokens_of_experts
from gpt4moe.runlog.expert_load import LoadHistory
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.run_files import EXPERT_LOAD_FILE, replace_file
from gpt4moe.training.best_effort import best_effort
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult

logger = logging.getLogger(__name__)

_WINDOW_STEPS = 50


class Report(Callback):
    def __init__(self, write_report: Callable[[Path], Path]) -> None:
        self.write_report = write_report
        self.loads: deque[Tensor] = deque(maxlen=_WINDOW_STEPS)
        self.history = LoadHistory()

    def on_start(self, context: TrainingContext) -> None:
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
        # A thread, for there is no other way to leave it alone; files appear whole or not at all.
        writer = threading.Thread(target=self._write, args=(context.folder.path,), name="report", daemon=True)
        with context.pause("report"):
            writer.start()
            writer.join(limit)
        if writer.is_alive():
            logger.warning("the report was not done within %g s: the next start writes it", limit)

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
