"""Batches of conversations in place of the proof's own: of uneven lengths, few of whose tokens are learned."""

from unittest.mock import patch

import numpy as np

from gpt4moe.config.data import LongRows
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch, stack
from gpt4moe.data.conversations import Conversations
from gpt4moe.data.loader import micro_batch_samples
from gpt4moe.data.rows import Pieces, RowLayout, pack
from gpt4moe.data.samples import TokenSample
from gpt4moe.parallel.environment import Environment
from gpt4moe.proof import ranks
from gpt4moe.proof.outcome import RankAnswer
from gpt4moe.proof.plan import Phase


def chat_phases(environment: Environment, phases: list[Phase]) -> list[RankAnswer]:
    """ranks.run_phases on conversations."""
    with patch.object(ranks, "synthetic_batches", _batches):
        return ranks.run_phases(environment, phases)


def conversations(seq_length: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and their mask of 96 conversations, of 3 tokens up to the context; 1 to 3 of a conversation's last tokens
    are learned, and of every fourth one most."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(96):
        length = int(random.integers(3, seq_length + 2 if number % 3 == 0 else seq_length // 2))
        learned = length - 2 if number % 4 == 0 else int(random.integers(1, min(4, length)))
        found.append((random.integers(1, 60, size=length), np.arange(length) >= length - learned))
    return found


def samples(run: RunConfig) -> list[TokenSample]:
    length, some = run.model.seq_length, conversations(run.model.seq_length)
    lengths = np.array([len(ids) for ids, _ in some])
    rows = pack(lengths, length + 1) if run.data.pack else np.arange(len(some))
    found = Conversations(
        tokens=np.concatenate([ids for ids, _ in some]), mask=np.concatenate([learned for _, learned in some]),
        pieces=Pieces(np.cumsum(lengths) - lengths, lengths).of(np.argsort(rows, kind="stable")),
        bounds=np.append(0, np.cumsum(np.bincount(rows))), num_long=0, num_left_out=0,
        layout=RowLayout(seq_length=length, seed=0, is_packed=run.data.pack, long_rows=LongRows.refuse, padding_id=0),
    )  # fmt: skip
    return [found.row(index) for index in range(found.num_rows)]


def _batches(run: RunConfig, step: int, dp: int, dp_index: int, tokens: int) -> list[Batch]:
    found, size = samples(run), run.training.global_batch_size
    numbers = micro_batch_samples(
        (step - 1) * size, global_batch_size=size, micro_batch_size=run.training.micro_batch_size, dp=dp,
        dp_index=dp_index,
    )  # fmt: skip
    return [stack([found[n % len(found)] for n in some], some) for some in numbers]
