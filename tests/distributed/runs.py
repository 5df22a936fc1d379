"""The runs that the promises about every layout share: its ranks start once, and walk through all phases.

descent  5 clipped steps of plain descent, fp32      gradients, norms, weights
three    3 steps of AdamW, fp32                      weights; what bf16 is held to
ramped   3 clipped steps of plain descent, fp32, the  as descent
         first two of a smaller batch, the first of
         half the length
adamw    20 steps of AdamW, fp32                     losses and norms
documents  2 clipped steps of descent, documents     as descent
rounded  3 steps of AdamW in bf16; one process        everything, by proof.bf16
         draws its rounding several times
"""

from dataclasses import replace
from functools import cache

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.config.step_sizes import BatchLevelConfig, LengthLevelConfig
from gpt4moe.proof import bf16, plan
from gpt4moe.proof.compare import NumberDifference, TensorDifference
from gpt4moe.proof.outcome import Outcome
from gpt4moe.proof.plan import Phase
from tests.distributed.case import BASE, outcomes
from tests.distributed.layouts import LayoutCase

RATE = 0.05
"""Of descent."""
STEPS = 20
BF16 = ("precision=bf16",)
DOCUMENTS = "data.document_mask=true"
Runs = dict[str, Outcome]


@cache
def runs(case: LayoutCase) -> Runs:
    """Every phase of a layout."""
    return _runs(case.world_size, (*case.shared, *case.overrides))


def one_process(case: LayoutCase) -> Runs:
    """Every phase of what a layout is compared with."""
    return _one_process(case.shared)


@cache
def _one_process(overrides: tuple[str, ...]) -> Runs:
    return _runs(1, overrides)


def _runs(world_size: int, overrides: tuple[str, ...]) -> Runs:
    exact = load_run_config([*BASE, *overrides])
    phases = {
        "descent": Phase(run=exact, steps=5, descent=RATE),
        "ramped": Phase(run=_ramped(exact), steps=3, descent=RATE, every_gradient=True),
        "three": Phase(run=exact, steps=3, every_gradient=True),
        "adamw": Phase(run=exact, steps=STEPS),
        "documents": Phase(run=load_run_config([*BASE, *overrides, DOCUMENTS]), steps=2, descent=RATE),
    }
    return outcomes(world_size, phases | rounded_phases(world_size, overrides))


def _ramped(run: RunConfig) -> RunConfig:
    size = {12: 8, 16: 8, 18: 12}[run.training.global_batch_size]  # what every layout of that batch can have
    level = BatchLevelConfig(global_batch_size=size, until_samples=2 * size)
    shorter = LengthLevelConfig(seq_length=run.model.seq_length // 2, until_step=1)
    return replace(run, training=replace(run.training, batch_ramp=[level], length_ramp=[shorter]))


def rounded_phases(world_size: int, overrides: tuple[str, ...]) -> dict[str, Phase]:
    run = load_run_config([*BASE, *overrides, *BF16])
    draws = range(plan.DRAWS if world_size == 1 else 1)
    return {
        plan.drawn(draw): Phase(
            run=run, steps=3, every_gradient=True, nudge=plan.ONE_BF16_ROUNDING * (draw > 0), draw=draw
        )
        for draw in draws
    }


def bf16_differences(case: LayoutCase, got: Outcome) -> list[TensorDifference | NumberDifference]:
    """Of a layout's bf16 run to one process."""
    want = one_process(case)
    sides = bf16.Sides(got, [want[plan.drawn(draw)] for draw in range(plan.DRAWS)], want["three"])
    run = load_run_config([*BASE, *case.shared, *BF16])
    found = [*bf16.tensor_differences(sides, run), *bf16.number_differences(sides)]
    return [item for item in found if item.is_different]
