"""Next-token prediction: the mean cross entropy of the unmasked labels of the global batch."""

from typing import Any

import torch
from torch import Tensor

from gpt4moe.data.batch import Batch
from gpt4moe.objectives.objective import BatchLosses, Objective


class NextToken(Objective):
    """sum of loss_mask * cross entropy / sum of loss_mask, over the global batch."""

    logged_names: tuple[str, ...] = ()

    def num_tokens(self, batch: Batch) -> Tensor:
        return batch.loss_mask.sum(dtype=torch.float64)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        return {
            "input_ids": batch.tokens,
            "position_ids": batch.position_ids,
            "attention_mask": None,  # causal attention
            "labels": batch.labels,
        }

    def losses(self, output: Tensor, batch: Batch) -> BatchLosses:
        return BatchLosses(losses=output.float() * batch.loss_mask, weights=batch.loss_mask)
