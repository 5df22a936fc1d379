"""Batch: what one forward pass of a rank gets."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt4moe.data.packing import Sample
from gpt4moe.parallel.placement import sequence_chunks


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

    def context_slice(self, cp: int, cp_index: int) -> "Batch":
        """What a context-parallel rank gets: every field [B, S/cp], in the order of placement.sequence_chunks."""
        if cp == 1:
            return self

        def part(whole: Tensor) -> Tensor:
            chunks = whole.chunk(2 * cp, dim=1)
            return torch.cat([chunks[chunk] for chunk in sequence_chunks(cp, cp_index)], dim=1)

        return Batch(**{field.name: part(getattr(self, field.name)) for field in dataclasses.fields(self)})


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
