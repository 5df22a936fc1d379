"""Batch: what one forward pass of a rank gets."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt4moe.data.packing import Sample


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences of S tokens, on the CPU."""

    tokens: Tensor
    """[B, S] int64"""
    labels: Tensor
    """[B, S] int64: the token after each one."""
    position_ids: Tensor
    """[B, S] int64: 0 .. S-1; positions do not start again at a document's end."""
    loss_mask: Tensor
    """[B, S] float32: weight of each label in the loss."""


def stack(samples: list[Sample]) -> Batch:
    """Samples of one length as a Batch."""
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    positions = torch.arange(tokens.shape[1] - 1).repeat(len(samples), 1)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        position_ids=positions,
        loss_mask=torch.from_numpy(np.stack([sample.loss_mask for sample in samples])),
    )
