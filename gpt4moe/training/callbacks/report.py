"""At the end of a start: what the experts got over its last steps, loss.png and report.html. On the first rank."""

import json
import logging
from collections import deque

from torch import Tensor

from gpt4moe.telemetry.atomic_file import replace_file
from gpt4moe.telemetry.run_report import EXPERT_LOAD_FILE, write_run_report
from gpt4moe.training.state import Callback, Record, TrainingContext
from gpt4moe.training.step import StepResult

logger = logging.getLogger(__name__)

_WINDOW_STEPS = 50


class Report(Callback):
    def __init__(self) -> None:
        self.loads: deque[Tensor] = deque(maxlen=_WINDOW_STEPS)

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        moe = context.run.model.moe
        if moe is not None and context.groups.is_first_rank:
            self.loads.append(result.routing[:, : moe.num_experts])

    def on_end(self, context: TrainingContext) -> None:
        if not context.groups.is_first_rank or not context.state.step:
            return
        if self.loads:
            self._write_load(context)
        with context.pause("report"):
            path = write_run_report(context.folder.path)
        logger.info("report %s", path)

    def _write_load(self, context: TrainingContext) -> None:
        layers = [index for index, has in enumerate(context.run.model.moe_layers) if has]
        last = context.state.step
        stored = {
            "first_step": last - len(self.loads) + 1,
            "last_step": last,
            "layers": layers,
            "tokens": sum(self.loads)[layers].tolist(),  # type: ignore[index]
        }
        replace_file(context.folder.path / EXPERT_LOAD_FILE, json.dumps(stored).encode())
