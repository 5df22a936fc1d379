"""Objective: how the model is called, and the loss that training minimizes. The training step calls it.

    batch of the data --prepare--> num_tokens, arguments, losses

The step owns everything that depends on the layout: it sums losses over micro-batches and ranks, divides by the token
count of the global batch, cuts batches over cp and runs the pipeline schedule. An objective sees one micro-batch.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from gpt4moe.data.batch import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLosses:
    """The losses of one micro-batch; under context parallelism, of this rank's part of it."""

    losses: Tensor
    """[B, ...] fp32, weighted, one or more for each sequence. The step sums them. They have gradients."""
    weights: Tensor
    """The weight of each loss in the global mean; same shape. The mean of each data source uses them too."""
    logged: dict[str, Tensor] = field(default_factory=dict)
    """A scalar without gradient for each of the objective's `logged_names`. The step sums them like the losses."""


class Objective(Protocol):
    """What a run minimizes. Methods have no state and call no collectives: each rank calls them on its own batches.

    A label whose loss_mask is 0 must count nothing: not in `num_tokens`, not in the losses and weights, not in what is
    logged. Evaluation masks the samples beyond training.eval_samples in this way, and how many those are depends on dp.
    """

    logged_names: tuple[str, ...]
    """Further numbers of a step (StepResult.logged). Each is a metric that runlog.step_metrics.OBJECTIVE_METRICS
    declares. Fixed, because ranks without the model's output take part in their sum."""

    def prepare(self, batch: Batch, seed: int) -> Batch:
        """The batch with what the objective needs beyond the data's text: another loss_mask, or further tensors
        (Batch.extra). The batch of the data by default.

        A pure function of its arguments, called before all other methods, on every rank of a pipeline and of tp and cp
        alike. Random numbers come from `seed` and the samples' numbers (Batch.samples), so that every layout and every
        restart draws the same.

        Args:
            batch: whole sequences on the CPU, not cut over cp.
            seed: run.seed.
        """
        return batch

    def num_tokens(self, batch: Batch) -> Tensor:
        """The micro-batch's weight in the global mean: a scalar, fp64, 0 or more; it need not be an integer. Known
        before the forward pass. A global batch of weight 0 is divided by 1.

        Args:
            batch: whole sequences, not cut over cp. The step sums over data-parallel ranks alone.
        """

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The named arguments of the model's forward call (Megatron's GPTModel.forward), on every pipeline stage.

        With `labels` the model answers with the cross entropy of each label, [B, S/cp] fp32; without, with logits,
        [B, S/cp, V/tp]. The step adds padding_mask and documents itself.

        Args:
            batch: this rank's part under context parallelism, [B, S/cp]; the same for the batch of `losses`.
        """

    def losses(self, output: Tensor, batch: Batch) -> BatchLosses:
        """Called on the last pipeline stage, with the model's output. All tensor-parallel ranks get the same."""
