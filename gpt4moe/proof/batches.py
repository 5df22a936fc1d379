"""Micro-batches of synthetic tokens, the same set on every layout, with very uneven loss masks."""

import torch

from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch


def synthetic_batches(run: RunConfig, step: int, dp: int, dp_index: int, tokens: int = 0) -> list[Batch]:
    """Micro-batches of one rank at `step`; a data-parallel rank r takes r, r + dp, ... of the global batch.

    Args:
        tokens: which set of them.
    """
    generator = torch.Generator().manual_seed(1000 * (1 + tokens) + step)
    micro, seq = run.training.micro_batch_size, run.model.seq_length
    count = run.training.global_batch_size // micro
    drawn = torch.randint(0, run.model.vocab_size, (count, micro, seq + 1), generator=generator)
    # A share of each sequence from nothing to all of it.
    share = torch.rand(count, micro, 1, generator=generator) ** 2
    mask = (torch.rand(count, micro, seq, generator=generator) < share).float()
    positions = torch.arange(seq).expand(micro, seq)
    first, rows = (step - 1) * run.training.global_batch_size, torch.arange(micro).unsqueeze(1)
    return [
        Batch(tokens=drawn[i][:, :-1].contiguous(), labels=drawn[i][:, 1:].contiguous(), loss_mask=mask[i],
              position_ids=positions, token_ids=(first + i * micro + rows) * seq + positions)
        for i in range(dp_index, count, dp)
    ]  # fmt: skip
