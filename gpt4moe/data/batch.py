"""Batch: what one forward pass of a rank gets."""

import dataclasses
from collections.abc import Sequence
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
    token_ids: Tensor | None = None
    """[B, S] int64: which token of the run stands where (sample * S + position), for noise that no layout changes;
    below 0: padding, which no router counts. None: no padding, and no noise to draw."""
    source_index: Tensor | None = None
    """[B] int64: which of the data's sources each sequence is of. None: nobody asks."""

    def context_slice(self, cp: int, cp_index: int) -> "Batch":
        """What a context-parallel rank gets: [B, S/cp] of every [B, S], in the order of placement.sequence_chunks."""
        if cp == 1:
            return self

        def part(whole: Tensor) -> Tensor:
            if whole.dim() == 1:
                return whole
            chunks = whole.chunk(2 * cp, dim=1)
            return torch.cat([chunks[chunk] for chunk in sequence_chunks(cp, cp_index)], dim=1)

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: None if whole is None else part(whole) for name, whole in fields.items()})


def stack(samples: list[Sample], numbers: Sequence[int]) -> Batch:
    """Samples of one length as a Batch.

    Args:
        numbers: which samples of the run they are.
    """
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    seq_length = tokens.shape[1] - 1
    positions = torch.arange(seq_length).repeat(len(samples), 1)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        position_ids=positions,
        loss_mask=torch.from_numpy(np.stack([sample.loss_mask for sample in samples])),
        token_ids=torch.tensor(numbers).unsqueeze(1) * seq_length + positions,
        source_index=torch.tensor([sample.source_index for sample in samples]),
    )
