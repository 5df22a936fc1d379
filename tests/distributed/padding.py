"""Batches whose sequences end early, in place of the proof's own."""

import dataclasses
from unittest.mock import patch

import torch

from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.parallel.environment import Environment
from gpt4moe.proof import ranks
from gpt4moe.proof.batches import synthetic_batches
from gpt4moe.proof.outcome import RankAnswer
from gpt4moe.proof.phase import Phase


def real_lengths(run: RunConfig, micro_batch: int) -> list[int]:
    """Of a micro-batch's sequences: all of it, a part, one token, none; some micro-batches have none at all, and every
    second one, of pairs, no padding: with dp = 2 one rank has none."""
    whole, rows = run.model.seq_length, run.training.micro_batch_size
    return [
        (whole, whole, 5, 1, whole, whole, 0, 0, whole, whole, whole, 9)[(micro_batch * rows + row) % 12]
        for row in range(rows)
    ]


def padded_phases(environment: Environment, phases: list[Phase], fill: int) -> list[RankAnswer]:
    """ranks.run_phases of padded batches.

    Args:
        fill: the token that stands after a sequence's end.
    """
    with patch.object(ranks, "synthetic_batches", lambda *given: _padded(fill, *given)):
        return ranks.run_phases(environment, phases)


def _padded(fill: int, run: RunConfig, step: int, dp: int, dp_index: int, tokens: int) -> list[Batch]:
    return [
        _cut(batch, real_lengths(run, dp_index + at * dp), fill)
        for at, batch in enumerate(synthetic_batches(run, step, dp, dp_index, tokens))
    ]


def _cut(batch: Batch, lengths: list[int], fill: int) -> Batch:
    none = torch.arange(batch.tokens.shape[1]) >= torch.tensor(lengths).unsqueeze(1)
    assert batch.token_ids is not None
    return dataclasses.replace(
        batch, tokens=batch.tokens.masked_fill(none, fill), labels=batch.labels.masked_fill(none, fill),
        loss_mask=batch.loss_mask.masked_fill(none, 0.0), token_ids=batch.token_ids.masked_fill(none, -1),
    )  # fmt: skip
