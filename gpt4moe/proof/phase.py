"""Phase: one short training from the initial weights. No torch."""

from dataclasses import dataclass

from gpt4moe.config.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """What ranks do between two looks at their numbers."""

    run: RunConfig
    steps: int
    descent: float | None = None
    """A rate: weights move by plain descent along the reduced and clipped gradients, which shows a wrong gradient
    scale that AdamW divides away. None: the run's own optimizer."""
    every_gradient: bool = False
    """Answer with the gradients of all steps and the masters before the first, not only the first step's gradients."""
    draw: int = 0
    """Of rounding, in bf16: 0 as it comes; others from initial weights that are one rounding away at most."""
    tokens: int = 0
    """Which set of synthetic tokens."""
    ends_early: bool = False
    """Some micro-batches end in padding (batches.ended_early)."""
