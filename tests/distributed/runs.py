"""The runs that the promises about every layout share: its ranks start once, and walk through all phases.

descent  5 clipped steps of plain descent, fp32      gradients, norms, weights
three    3 steps of AdamW, fp32                      weights
adamw    20 steps of AdamW, fp32                     losses and norms
rounded  1 step in bf16                              gradients
"""

from functools import cache

from gpt4moe.config.load import load_run_config
from gpt4moe.proof.outcome import Outcome
from gpt4moe.proof.phase import Phase
from tests.distributed.case import BASE, outcomes
from tests.distributed.layouts import LayoutCase

RATE = 0.05
"""Of descent."""
STEPS = 20
BF16 = ("precision=bf16",)
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
    exact, rounded = (load_run_config([*BASE, *overrides, *more]) for more in ((), BF16))
    phases = {
        "descent": Phase(run=exact, steps=5, descent=RATE),
        "three": Phase(run=exact, steps=3),
        "adamw": Phase(run=exact, steps=STEPS),
        "rounded": Phase(run=rounded, steps=1),
    }
    return outcomes(world_size, phases)
