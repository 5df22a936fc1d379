"""What the routing of one step looked like, summed over this rank's micro-batches. fp64, on the device.

One row a layer with a fixed schema, so that ranks with and without MoE layers reduce the same table. Padding tokens
are in none of it.

    load[E]   tokens assigned to each expert (before drops)
    extra[5]  dropped assignments; router entropy and margin, summed over tokens; load-balancing loss, z-loss (scaled)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EXTRAS = ("dropped", "entropy", "margin", "load_balancing_loss", "z_loss")


class RoutingStatistics:
    """Owns one layer's sums from one reset to the next."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.row: Tensor | None = None

    def reset(self) -> None:
        self.row = None

    @torch.no_grad()
    def add(
        self, *, load: Tensor, dropped: Tensor | int, entropy: Tensor, margin: Tensor, losses: tuple[Tensor, Tensor],
        share: float,
    ) -> None:  # fmt: skip
        """Adds one micro-batch.

        Args:
            load: [E] assignments of this rank's tokens.
            entropy: of the router's probabilities in nats, margin: of its choice (routers.base), summed over tokens.
            losses: load-balancing and z-loss, scaled by their coefficients, the same on every rank of the pool.
            share: this rank's share of the pool's losses, so that a sum over ranks counts them once.
        """
        row = torch.zeros(self.num_experts + len(EXTRAS), dtype=torch.float64, device=load.device)
        row[: self.num_experts] = load
        extras = (dropped, entropy, margin, losses[0].double() * share, losses[1].double() * share)
        for place, value in enumerate(extras, start=self.num_experts):
            row[place] = value
        self.row = row if self.row is None else self.row + row

    def read(self, device: torch.device) -> Tensor:
        """The row so far, [E + 5] fp64; zeros where nothing was added."""
        if self.row is not None:
            return self.row
        return torch.zeros(self.num_experts + len(EXTRAS), dtype=torch.float64, device=device)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerHealth:
    """What the rows of some layers say about each of them: [layers] fp64."""

    load_max_over_mean: Tensor
    """Tokens of the busiest expert over the mean; 1 is even."""
    load_variation: Tensor
    """Standard deviation of the experts' loads over their mean; 0 is even."""
    dead_experts: Tensor
    """Experts without a token."""
    dropped_share: Tensor
    """Of all assignments."""
    entropy: Tensor
    """Nats, mean over tokens."""
    margin: Tensor
    """Of the router's choice, in units of its scores, mean over tokens."""

    @classmethod
    def of(cls, rows: Tensor, num_experts: int, top_k: int) -> "LayerHealth":
        """Args:
        rows: [layers, E + 5] of MoE layers, summed over ranks. A layer that saw no token is all zeros.
        """
        load = rows[:, :num_experts]
        assigned = load.sum(dim=1).clamp_min(1)
        dropped, entropy, margin = rows[:, num_experts : num_experts + 3].unbind(dim=1)
        mean = assigned / num_experts
        return cls(
            load_max_over_mean=load.max(dim=1).values / mean,
            load_variation=load.std(dim=1, correction=0) / mean,
            dead_experts=(load == 0).sum(dim=1).double(),
            dropped_share=dropped / assigned,
            entropy=entropy * top_k / assigned,
            margin=margin * top_k / assigned,
        )
