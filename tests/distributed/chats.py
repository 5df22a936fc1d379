"""Batches of conversations in place of the proof's own: of uneven lengths, few of whose tokens are learned."""

from unittest.mock import patch

import numpy as np

from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch, stack
from gpt4moe.data.conversations import pack
from gpt4moe.data.loader import micro_batch_samples
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


def sample(some: list[tuple[np.ndarray, np.ndarray]], seq_length: int, *, is_packed: bool) -> TokenSample:
    """A row of them, as data.conversations makes it."""
    tokens, mask = np.zeros(seq_length + 1, dtype=np.int64), np.zeros(seq_length + 1, dtype=np.float32)
    documents, at = np.zeros(seq_length, dtype=np.int32), 0
    for number, (ids, learned) in enumerate(some):
        end = at + len(ids)
        tokens[at:end], mask[at:end], documents[at:] = ids, learned, number
        mask[at], at = 0, end
    documents[at:] += 1
    return TokenSample(tokens, mask[1:], documents=documents if is_packed else None, num_tokens=min(at, seq_length))


def samples(run: RunConfig) -> list[TokenSample]:
    length, all_of_them = run.model.seq_length, conversations(run.model.seq_length)
    if not run.data.pack:
        return [sample([one], length, is_packed=False) for one in all_of_them]
    rows = pack(np.array([len(ids) for ids, _ in all_of_them]), length + 1)
    return [
        sample([all_of_them[at] for at in np.flatnonzero(rows == row)], length, is_packed=True)
        for row in range(rows.max() + 1)
    ]


def _batches(run: RunConfig, step: int, dp: int, dp_index: int, tokens: int) -> list[Batch]:
    found, size = samples(run), run.training.global_batch_size
    numbers = micro_batch_samples(
        (step - 1) * size, global_batch_size=size, micro_batch_size=run.training.micro_batch_size, dp=dp,
        dp_index=dp_index,
    )  # fmt: skip
    return [stack([found[n % len(found)] for n in some], some) for some in numbers]
