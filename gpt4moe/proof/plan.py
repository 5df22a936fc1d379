"""What a proof runs: the phases of the layout and of the one process, and how often.

descent   fp32, 3 clipped steps of plain descent: gradients, norm, weights; sees a wrong scale that AdamW hides
adamw     fp32, 3 clipped steps of the run's optimizer: masters and both moments
rounded   1 step in the run's own precision, where that is bf16
"""

from gpt4moe.config.load import config_from_dict, config_to_dict
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.run import RunConfig
from gpt4moe.proof.phase import Phase

STEPS = 3
RATE = 2.0
"""Of descent. Gradients are clipped to 0.1, so a step moves all weights together by 0.2."""
DESCENT, ADAMW, ROUNDED = "descent", "adamw", "rounded"


def phases(run: RunConfig, tokens: int = 0) -> dict[str, Phase]:
    raw = config_to_dict(run)
    exact = config_from_dict(raw | {"precision": raw["precision"] | {"dtype": Dtype.fp32.value}})
    plan = {
        DESCENT: Phase(run=exact, steps=STEPS, descent=RATE, tokens=tokens),
        ADAMW: Phase(run=exact, steps=STEPS, tokens=tokens),
    }
    if run.precision.dtype is not Dtype.fp32:
        plan[ROUNDED] = Phase(run=run, steps=STEPS, every_gradient=True, tokens=tokens)
    return plan
