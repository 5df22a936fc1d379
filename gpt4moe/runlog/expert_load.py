"""Tokens of every layer and expert: over a stretch of training, and over the whole run in windows of steps.

    step -> the open window; full -> the next one; too many windows -> neighbours are added up, windows twice as long

So the history of a run of any length is 12 to 24 windows (fewer where layers x experts are many), and its file stays
small. A redone step is counted once: windows that reach beyond the checkpoint are dropped when training goes on from
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

MAX_WINDOWS, MIN_WINDOWS, MAX_NUMBERS = 24, 4, 60_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """Tokens that each expert got, over any stretch of training."""

    layers: Sequence[int]
    """Global indices of the MoE layers, from 0."""
    tokens: Sequence[Sequence[float]]
    """[MoE layers, experts], counts or shares."""

    def ratios(self) -> list[list[float]]:
        """Load over the layer's mean: 1 is an even share, 0 a dead expert."""
        return [[value / mean if (mean := sum(row) / len(row)) else 0.0 for value in row] for row in self.tokens]

    def max_over_mean(self) -> list[float]:
        """Of each layer, the busiest expert's load over the mean."""
        return [max(row) for row in self.ratios()]

    def dead_experts(self) -> list[tuple[int, int]]:
        """(layer, expert) of every expert that got no token."""
        return [
            (layer, expert)
            for layer, row in zip(self.layers, self.tokens, strict=True)
            for expert, value in enumerate(row)
            if value == 0
        ]


@dataclass(slots=True)
class LoadWindow:
    first_step: int
    last_step: int
    tokens: NDArray[np.float64]
    """[MoE layers, experts], summed over the steps."""


@dataclass(slots=True)
class LoadHistory:
    """The history of one run; `add` is called once for every step."""

    steps_per_window: int = 1
    windows: list[LoadWindow] = field(default_factory=list)

    def add(self, step: int, tokens: NDArray[np.float64]) -> None:
        """Adds the tokens of a step, [MoE layers, experts]."""
        last = self.windows[-1] if self.windows else None
        if last is not None and last.last_step - last.first_step + 1 < self.steps_per_window:
            last.tokens, last.last_step = last.tokens + tokens, step
            return
        if len(self.windows) == max_windows(tokens.size):
            self._halve()
        self.windows.append(LoadWindow(step, step, tokens))

    def drop_after(self, step: int) -> None:
        """Forgets windows with a later step."""
        self.windows = [window for window in self.windows if window.last_step <= step]

    def to_json(self) -> dict[str, Any]:
        windows = [
            {"first_step": it.first_step, "last_step": it.last_step, "tokens": it.tokens.astype(int).tolist()}
            for it in self.windows
        ]
        return {"steps_per_window": self.steps_per_window, "windows": windows}

    @classmethod
    def from_json(cls, stored: dict[str, Any] | None) -> Self:
        """None: the file of a run from before there were histories."""
        if stored is None:
            return cls()
        windows = [
            LoadWindow(it["first_step"], it["last_step"], np.array(it["tokens"], dtype=np.float64))
            for it in stored["windows"]
        ]
        return cls(stored["steps_per_window"], windows)

    def _halve(self) -> None:
        pairs = zip(self.windows[::2], self.windows[1::2], strict=True)
        self.windows = [LoadWindow(a.first_step, b.last_step, a.tokens + b.tokens) for a, b in pairs]
        self.steps_per_window *= 2


def max_windows(numbers: int) -> int:
    """How many windows are kept when each has so many numbers; an even number."""
    return max(MIN_WINDOWS, min(MAX_WINDOWS, MAX_NUMBERS // numbers // 2 * 2))
