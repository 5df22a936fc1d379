"""The seam between the training step and what reduces gradients and updates weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core.distributed import finalize_model_grads
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class OwnedRange:
    """The elements [start, end) of a parameter (C order) that this rank's optimizer owns; all tensors flat, fp32."""

    parameter: nn.Parameter
    start: int
    end: int
    master: Tensor
    states: dict[str, Tensor]
    """The optimizer's state tensors, by their names in config.optimizer_table."""

    @property
    def gradient(self) -> Tensor:
        """Reduced over every rank, the global batch's; there after reduce()."""
        assert self.master.grad is not None
        return self.master.grad


class Engine(Protocol):
    """What every engine gives. The training step (training.update) calls, in this order:

    zero_gradients -> Megatron's schedule over `chunks` -> reduce -> norm -> clip -> update
    """

    chunks: list[Any]
    """Wrapped GPTModels, one per virtual stage, with Megatron's config as .config."""

    def zero_gradients(self) -> None: ...

    def reduce(self) -> None:
        """Main gradients, reduced by the schedule, ready in `owned`."""

    def norm(self) -> float:
        """The global norm of the reduced gradients, the same on every rank. Collective."""

    def clip(self, norm: float) -> None:
        """Scales the gradients, whose global norm is `norm`, down to the configured norm."""

    def update(self, learning_rate: float) -> None:
        """One optimizer step from the main gradients, then every rank has the new weights. Collective."""

    def owned(self) -> Iterator[OwnedRange]:
        """What this rank's optimizer owns; ranges of all data-parallel ranks together are disjoint and whole."""

    def finish_load(self, step: int) -> None:
        """After masters and states were filled: sets the step count and the model's weights. Collective."""


def finalize(chunks: list[Any], num_tokens: Any = None, **groups: Any) -> None:
    """Megatron's end of a schedule, without its division by tokens: the loss is already divided by the global number.

    The chunks' own reduction, then sums over tp of what every tensor-parallel rank saw a part of, then the two copies
    of tied embeddings.
    """
    finalize_model_grads(chunks, None, **groups)
