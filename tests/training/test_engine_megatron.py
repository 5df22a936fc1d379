"""engine.overlap_param_gather: updated weights arrive while the next step runs, and no number of a run changes."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.environment import Environment
from gpt4moe.proof.plan import Phase
from tests.distributed.case import BASE, Outcome, outcomes
from tests.spawn import run_ranks

LAYOUT = (
    "parallel.pp=2",
    "parallel.vpp=2",
    "parallel.ep=2",
    "engine.bucket_size=3000",
    "training.global_batch_size=16",
)  # fmt: skip
CASES = {
    "fp32": (),
    "bf16, everything recomputed": ("precision=bf16", "parallel.recompute=full"),
    "adapters, experts on every rank": ("stage.lora.rank=2", "parallel.ep=1"),
}
OVERLAP = "engine.overlap_param_gather=true"


@cache
def ran(ep1: bool) -> dict[str, Outcome]:
    """Each case with and without overlap, three AdamW steps."""
    phases = {}
    for case, overrides in CASES.items():
        if ("parallel.ep=1" in overrides) is ep1:
            for extra in ("", OVERLAP):
                every = [*BASE, *LAYOUT, *overrides, *([extra] if extra else [])]
                phases[case + extra] = Phase(run=load_run_config(every), steps=3)
    return outcomes(4, phases)


@pytest.mark.parametrize("case", CASES)
def test_losses_norms_and_weights_are_equal_to_the_bit(case: str) -> None:
    found = ran("parallel.ep=1" in CASES[case])
    got, want = found[case + OVERLAP], found[case]
    assert got.losses == want.losses and got.norms == want.norms
    for kind, tensors in want.tensors.items():
        for name, values in tensors.items():
            np.testing.assert_array_equal(got.tensors[kind][name], values, err_msg=f"{kind} {name}")


def _under_way(environment: Environment) -> dict[str, Any]:
    from gpt4moe.model.gpt import build_model
    from gpt4moe.parallel.groups import ProcessGroups, world
    from gpt4moe.parallel.layout import Layout
    from gpt4moe.training.engine_megatron import MegatronEngine
    from gpt4moe.training.replicas import unequal_copies
    from gpt4moe.training.step import StepRunner
    from gpt4moe.training.update import Action, Verdict, train_step
    from tests.distributed.case import synthetic_batches

    run = load_run_config([*BASE, "model.num_layers=2", OVERLAP])
    with world(environment) as device:
        groups = ProcessGroups.create(Layout.from_config(run.parallel, 2), environment.rank, device, run.run.seed)
        engine = MegatronEngine(build_model(run, groups), run, groups)
        runner = StepRunner(run, engine, groups)

        def open_gathers() -> int:
            every = engine.chunks[0].bucket_groups + engine.chunks[0].expert_parallel_bucket_groups
            return sum(group.param_gather_handle is not None for group in every)

        batches = synthetic_batches(run, 1, 2, groups.coordinate["dp"])
        answer: dict[str, Any] = {}
        train_step(runner, 1, batches)
        answer["after the update"] = open_gathers()
        answer["loss"] = runner.evaluate(batches).loss
        answer["after a forward pass"] = open_gathers()
        train_step(runner, 2, batches)
        train_step(runner, 3, batches, policy=lambda numbers, run: Verdict(Action.skip))
        answer["after a skipped update"] = open_gathers()
        train_step(runner, 4, batches)
        answer["unequal"] = unequal_copies(engine, groups)
        answer["after the check of copies"] = open_gathers()
        return answer


def test_gathers_are_under_way_after_an_update_and_waited_for_by_who_reads_weights() -> None:
    for answer in run_ranks(2, _under_way):
        assert answer["after the update"] >= 2  # of dense parameters and of experts
        assert answer["after a forward pass"] == answer["after a skipped update"] == 0
        assert answer["after the check of copies"] == 0 and answer["unequal"] == []
