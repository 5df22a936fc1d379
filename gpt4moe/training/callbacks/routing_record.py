"""routing/rank_00003.jsonl, where training.record_routing asks for it: what each rank has counted of its routing."""

from gpt4moe.moe.statistics import tokens_of_experts
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.routing_record import ROUTING_FOLDER, RoutingLog, drop_other_ranks
from gpt4moe.runlog.step_lines import StepLine
from gpt4moe.training.callback import Callback, Gives, History, best_effort
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepResult


class RoutingRecord(Callback):
    """Every rank writes its own file. An extra: a disk that refuses a line does not stop training."""

    gives = frozenset({Gives.own_routing})

    def __init__(self) -> None:
        self.log: RoutingLog | None = None

    def on_start(self, context: TrainingContext, history: History) -> None:
        folder, groups, step = context.folder.path, context.groups, context.state.step
        # Also where this launch records nothing: what an earlier one recorded of later steps is of no step of the run.
        with best_effort(f"opening {ROUTING_FOLDER}"):
            self.log = RoutingLog(folder, groups.rank, step)
            if groups.is_first_rank:
                drop_other_ranks(folder, groups.layout.world_size, step)

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        every = context.run.training.record_routing
        if self.log is None or not every or context.state.step % every:
            return
        groups, moe = context.groups, context.run.model.moe
        assert moe is not None, "the configuration is checked"
        lines: list[StepLine] = [
            {
                "step": context.state.step, "layer": layer, "rank": groups.rank, "sources": groups.layout.stage_size,
                "top_k": moe.top_k,
                "tokens": [int(it) for it in tokens_of_experts(module.statistics.read(groups.device)).tolist()],
            }
            for layer, module in sorted(context.runner.moe_layers.items())
        ]  # fmt: skip
        with best_effort(f"writing {ROUTING_FOLDER}"):
            self.log.add(lines)
