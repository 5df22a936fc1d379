"""How evenly the router spreads tokens over experts: what a table of tokens per layer and expert says."""

from collections.abc import Sequence
from dataclasses import dataclass


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
        """Per layer, the busiest expert's load over the mean."""
        return [max(row) for row in self.ratios()]

    def dead_experts(self) -> list[tuple[int, int]]:
        """(layer, expert) of every expert that got no token."""
        return [
            (layer, expert)
            for layer, row in zip(self.layers, self.tokens, strict=True)
            for expert, value in enumerate(row)
            if value == 0
        ]
