"""plan: the short trainings (phases) of a proof, on the layout and in one process.

descent   fp32, 3 clipped steps of plain descent: gradients, norm, weights. Shows a wrong scale, which AdamW divides
          away. Batches from step 2 on have padding; the other phases have none, for fewer tokens mean more rounding
adamw     fp32, 3 steps of the run's optimizer, clipped where the run clips: masters and both moments
rounded   the same in bf16, where the run is bf16; one process runs it several times to measure rounding
nudged    the adamw phase of one process from slightly other weights, only where AdamW's tolerance must be measured
"""

import dataclasses
from dataclasses import dataclass

from gpt4moe.config.load import config_from_dict, config_to_dict
from gpt4moe.config.optimizer import Dtype, OptimizerKind
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError

STEPS = 3
CLIP_NORM = 0.1
"""Below the gradient norm of any shrunk model, so that every step is clipped."""
RATE = 2.0
"""The learning rate of descent. Gradients are clipped to CLIP_NORM, so a step moves all weights together by 0.2. A run
that does not clip is clipped in this phase: a step along a whole gradient carries round-off beyond the tolerances."""
DESCENT, ADAMW, ROUNDED = "descent", "adamw", "rounded"
DRAWS = 4
"""Runs of one process whose distances to each other measure round-off."""
ONE_FP32_ROUNDING, ONE_BF16_ROUNDING = 2.0**-23, 2.0**-8


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One short training from the initial weights, and what ranks report of it."""

    run: RunConfig
    steps: int
    descent: float | None = None
    """A rate: weights move by plain descent along the reduced and clipped gradients, which shows a wrong gradient
    scale that AdamW divides away. None: the run's own optimizer."""
    every_gradient: bool = False
    """Answer with the gradients of all steps and the masters before the first, not only the first step's gradients."""
    nudge: float = 0.0
    """Every initial weight is moved by up to this share of itself; 0: as it is."""
    note_outputs: bool = False
    """Answer with the masters before the first step, and of the first step with two numbers a token of every layer's
    parts (proof.watch)."""
    draw: int = 0
    """Seed of the nudge."""
    tokens: int = 0
    """Which set of synthetic tokens."""
    gates: float = 0.5
    """Initial value of a vision model's gates. At 0, where training begins, nothing behind them has a gradient."""
    ends_early: bool = False
    """Some micro-batches end in padding (batches.ended_early)."""


def require_replayable(run: RunConfig) -> None:
    """Raises: ConfigError for an optimizer whose update the proof cannot compute again (proof.replay)."""
    if run.optimizer.kind is not OptimizerKind.adamw:
        raise ConfigError(
            f"optimizer.kind={run.optimizer.kind.value} is not proved: proof.replay and proof.compare know adamw only.",
            "Set optimizer.kind=adamw; the layout is the same under both.",
        )


def phases(run: RunConfig, world_size: int, tokens: int = 0) -> dict[str, Phase]:
    """By name; drawn(1), drawn(2), ... are one process's further draws of rounding.

    Raises: ConfigError for an optimizer whose update the proof cannot compute again (proof.replay).
    """
    require_replayable(run)
    is_rounded = run.precision.dtype is not Dtype.fp32
    raw = config_to_dict(run)
    exact = raw | {"precision": raw["precision"] | {"dtype": Dtype.fp32.value}}
    clipped = exact | {"optimizer": raw["optimizer"] | {"clip_norm": run.optimizer.clip_norm or CLIP_NORM}}
    plan = {
        DESCENT: Phase(
            run=config_from_dict(clipped), steps=STEPS, descent=RATE, ends_early=True, note_outputs=True, tokens=tokens
        ),
        ADAMW: Phase(run=config_from_dict(exact), steps=STEPS, every_gradient=True, tokens=tokens),
    }
    if is_rounded:
        for draw in range(DRAWS if world_size == 1 else 1):
            plan[drawn(draw)] = Phase(run=run, steps=STEPS, every_gradient=True, draw=draw, tokens=tokens,
                                      nudge=ONE_BF16_ROUNDING if draw else 0.0)  # fmt: skip
    return plan


def nudged_phases(run: RunConfig, tokens: int = 0) -> dict[str, Phase]:
    """The AdamW phase of one process from weights that are at most one fp32 rounding away, DRAWS times. How far these
    runs move apart is round-off, so no layout can be asked to be nearer."""
    phase = phases(run, 1, tokens)[ADAMW]
    return {
        f"{ADAMW} nudged {draw}": dataclasses.replace(phase, nudge=ONE_FP32_ROUNDING, draw=draw)
        for draw in range(1, DRAWS + 1)
    }


def drawn(draw: int) -> str:
    return f"{ROUNDED} {draw}" if draw else ROUNDED
