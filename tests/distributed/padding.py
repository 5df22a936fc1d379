"""Batches whose sequences end early, in place of the proof's own."""

from unittest.mock import patch

from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.parallel.environment import Environment
from gpt4moe.proof import ranks
from gpt4moe.proof.batches import padded, synthetic_batches
from gpt4moe.proof.outcome import RankAnswer
from gpt4moe.proof.plan import Phase


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
        padded(batch, real_lengths(run, dp_index + at * dp), fill)
        for at, batch in enumerate(synthetic_batches(run, step, dp, dp_index, tokens))
    ]
