"""Does a document move what others give? One step of the same world with and without a document changed."""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.proof import ranks
from gpt4moe.proof.batches import synthetic_batches
from gpt4moe.proof.outcome import RankAnswer
from gpt4moe.proof.plan import Phase
from gpt4moe.training.step import StepRunner
from tests.distributed.case import BASE

# Every expert gets every token. Else the changed tokens would go to other experts, whose products then sum over
# another number of rows, and the last bits may differ. Nothing pools over a micro-batch.
OVERRIDES = (
    *BASE, "data.document_mask=true", "model.moe.top_k=4", "model.moe.router.load_balancing_coefficient=0",
    "model.moe.router.z_loss_coefficient=0",
)  # fmt: skip
CHANGED = 1
"""The number of the document that is changed in each row. Its labels do not count."""


def steps_with_a_document_changed(
    environment: Environment, layouts: dict[str, tuple[str, ...]], faults: dict[str, int]
) -> dict[str, list[RankAnswer]]:
    """Layout -> one descent step before and after. A layout with a fault gets two more steps, as "NAME, fault".

    Args:
        faults: layout -> the pipeline stage whose layers are not told of documents.
    """
    found = {}
    with world(environment) as device:
        for name, overrides in layouts.items():
            run = load_run_config([*OVERRIDES, *overrides])
            layout = Layout.from_config(run.parallel, environment.world_size)
            groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
            found[name] = [_step(run, groups, is_changed) for is_changed in (False, True)]
            if groups.coordinate["pp"] == faults.get(name):
                with patch.object(StepRunner, "_documents", lambda runner, batch: {}):
                    found[f"{name}, fault"] = [_step(run, groups, is_changed) for is_changed in (False, True)]
            elif name in faults:
                found[f"{name}, fault"] = [_step(run, groups, is_changed) for is_changed in (False, True)]
    return found


def _step(run: RunConfig, groups: ProcessGroups, is_changed: bool) -> RankAnswer:
    def batches(*given: Any) -> list[Batch]:
        made = synthetic_batches(*given)
        for batch in made:
            assert batch.documents is not None
            own = batch.documents == CHANGED
            batch.loss_mask[own] = 0.0
            batch.tokens[own] = (batch.tokens[own] + int(is_changed)) % run.model.vocab_size
        return made

    with ExitStack() as stack:
        stack.enter_context(patch.object(ranks, "synthetic_batches", batches))
        return ranks._run_phase(Phase(run=run, steps=1, descent=0.05), groups, None, str)
