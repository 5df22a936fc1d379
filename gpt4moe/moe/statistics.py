"""What the routing of one step looked like, summed over this rank's micro-batches. fp64, on the device.

One row a layer with a fixed schema, so that ranks with and without MoE layers reduce the same table:

    load[E]   tokens assigned to each expert (before drops)
    extra[4]  dropped assignments, router entropy summed over tokens, load-balancing loss, z-loss (scaled, summed)
"""

import torch
from torch import Tensor

EXTRAS = ("dropped", "entropy", "load_balancing_loss", "z_loss")


class RoutingStatistics:
    """Owns one layer's sums from one reset to the next."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.row: Tensor | None = None

    def reset(self) -> None:
        self.row = None

    @torch.no_grad()
    def add(
        self, *, load: Tensor, dropped: Tensor | int, probability: Tensor, losses: tuple[Tensor, Tensor], share: float
    ) -> None:
        """Adds one micro-batch.

        Args:
            load: [E] assignments of this rank's tokens.
            probability: [T, E] of this rank's tokens, for the entropy in nats.
            losses: load-balancing and z-loss, scaled by their coefficients, the same on every rank of the pool.
            share: this rank's share of the pool's losses, so that a sum over ranks counts them once.
        """
        row = torch.zeros(self.num_experts + len(EXTRAS), dtype=torch.float64, device=load.device)
        row[: self.num_experts] = load
        row[-4] = dropped
        row[-3] = torch.special.entr(probability).sum()
        row[-2], row[-1] = losses[0].double() * share, losses[1].double() * share
        self.row = row if self.row is None else self.row + row

    def read(self, device: torch.device) -> Tensor:
        """The row so far, [E + 4] fp64; zeros where nothing was added."""
        if self.row is not None:
            return self.row
        return torch.zeros(self.num_experts + len(EXTRAS), dtype=torch.float64, device=device)
