"""A step: the new tokens of all rows, packed one after the other, without padding between rows.

    row 0: 5 new tokens, row 1: 1, row 2: 1    ->    tokens [T] = a b c d e | f | g | dummies

Linear layers, norms, routers and experts take one token at a time. So they run as in training, with the sequence and
expert parallelism that the model was built with. Positions are those in the text. Attention alone needs to know rows:
it works on parts (attention.py). Dummies stand at the end where tensor parallelism must divide T, or where another rank
of an expert's group has more tokens. No expert gets them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

import torch
from torch import Tensor

from gpt4moe.inference.cache import BLOCK_TOKENS, BlockPool, blocks_of
from gpt4moe.inference.pictures import Picture


@dataclass(slots=True)
class Row:
    """A text that is being generated."""

    number: int
    """Of its request."""
    tokens: list[int]
    """The prompt, then what was generated."""
    most_tokens: int
    """What `tokens` may grow to."""
    num_prompt: int
    random_key: str = ""
    """What its random numbers follow from (sampling.text_key). Empty: it is scored, and draws none."""
    num_cached: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of each generated token, under the model's own distribution."""
    images: Sequence[Picture] = ()
    """Of the prompt, in the order of their places."""
    image_slots: list[int] = field(default_factory=list)
    """Of each image, where its keys and values are (image_cache.ImageCache)."""

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def most_blocks(self) -> int:
        """The last token is not cached: nothing comes after it."""
        return blocks_of(self.most_tokens - 1)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    def make_room(self, num_tokens: int, pool: BlockPool) -> None:
        """Takes blocks for `num_tokens` tokens in all."""
        while len(self.blocks) * BLOCK_TOKENS < num_tokens:
            self.blocks.append(pool.take())


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a step whose attention is one call."""

    tokens: Tensor
    """[n, Q] index of each row's new tokens among the packed ones. Behind a row's last: any."""
    real: Tensor | None
    """[n, Q] bool, which of them are the row's; None: all."""
    tables: Tensor | None
    """[n, blocks] of the cache; None: nothing was cached before, so the new tokens are all that there is."""
    num_keys: int
    """The most keys of a row."""
    mask: Tensor | None
    """[n, 1, 1, num_keys], for rows of one new token: 0 for a row's keys, -inf behind them. None: all have as many."""
    is_whole_step: bool
    """Whether `tokens` are all of the step, dummies too, in order, each of another row."""


@dataclass(frozen=True, slots=True)
class Step:
    """One packed pass over some rows. T: packed tokens with dummies."""

    rows: tuple[Row, ...]
    """Those with new tokens, in order."""
    counts: tuple[int, ...]
    """New tokens of each."""
    num_real: int
    """T without dummies."""
    tokens: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64, from 0."""
    token_ids: Tensor | None
    """[T] int64, -1 for dummies (the padding_mask of moe.layer); None: there are none."""
    slots: Tensor
    """[num_real], where keys and values go in the cache."""
    parts: tuple[Part, ...]
    whole: tuple[Row, ...]
    """The rows whose tokens are all cached after this step; each then gets its next token."""
    ends: Tensor
    """Index of the last token of each of them."""


def pack(
    rows: Sequence[Row], counts: Sequence[int], *, num_tokens: int, has_dummies: bool, dtype: torch.dtype,
    device: torch.device,
) -> Step:  # fmt: skip
    """The step in which each row adds its next `count` tokens. Their blocks are taken already.

    Args:
        num_tokens: T, at least the sum of counts.
        has_dummies: whether any rank that meets this one in the experts has dummies; every rank must know, for it
            changes how layers are called.
        dtype: of queries and keys.
    """
    taken = [
        (row, place)
        for row, count in zip(rows, counts, strict=True)
        for place in range(row.num_cached, row.num_cached + count)
    ]
    num_real = len(taken)
    starts = list(accumulate(counts, initial=0))[:-1]
    whole = [at for at, row in enumerate(rows) if row.num_cached + counts[at] == len(row.tokens)]

    dummies = num_tokens - num_real
    numbers = [
        [row.tokens[place] for row, place in taken] + [0] * dummies,
        [place for _, place in taken] + [0] * dummies,
        [row.blocks[place // BLOCK_TOKENS] * BLOCK_TOKENS + place % BLOCK_TOKENS for row, place in taken],
        [starts[at] + counts[at] - 1 for at in whole],
        [*range(num_real), *[-1] * dummies] if has_dummies else [],
    ]
    # One tensor: on a GPU each would be a copy of its own.
    together = torch.tensor(list(chain.from_iterable(numbers)), dtype=torch.int64, device=device)
    tokens, positions, slots, ends, token_ids = together.split([len(some) for some in numbers])
    return Step(
        rows=tuple(rows),
        counts=tuple(counts),
        num_real=num_real,
        tokens=tokens,
        positions=positions,
        token_ids=token_ids if has_dummies else None,
        slots=slots,
        parts=tuple(
            _part(
                [rows[at] for at in group],
                [starts[at] for at in group],
                [counts[at] for at in group],
                num_tokens=num_tokens,
                dtype=dtype,
                device=device,
            )
            for group in _groups(rows, counts)
        ),
        whole=tuple(rows[at] for at in whole),
        ends=ends,
    )


def _groups(rows: Sequence[Row], counts: Sequence[int]) -> list[list[int]]:
    """Which rows attend together: those with one new token; prompts of about one length; each other row alone."""
    groups: dict[tuple[str, int], list[int]] = {}
    for at, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if count == 1 and row.num_cached:
            key = ("one", 0)
        elif row.num_cached == 0:
            key = ("new", count.bit_length())  # at most half of a row of the grid is empty
        else:
            key = ("more", at)
        groups.setdefault(key, []).append(at)
    return list(groups.values())


def _part(
    rows: list[Row], starts: list[int], counts: list[int], *, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> Part:
    width, keys = max(counts), [row.num_cached + count for row, count in zip(rows, counts, strict=True)]
    tokens, real = torch.tensor(starts, device=device).unsqueeze(1), None
    if width > 1:
        count = torch.tensor(counts, device=device).unsqueeze(1)
        column = torch.arange(width, device=device)
        tokens = tokens + torch.minimum(column, count - 1)
        real = column < count if min(counts) < width else None
    is_whole_step = len(rows) == num_tokens
    if rows[0].num_cached == 0:
        return Part(tokens, real, None, width, None, is_whole_step)
    num_blocks = blocks_of(max(keys))
    tables = [row.blocks[:num_blocks] + [0] * (num_blocks - len(row.blocks)) for row in rows]
    mask = None
    if min(keys) < max(keys):
        behind = torch.arange(max(keys), device=device) >= torch.tensor(keys, device=device).unsqueeze(1)
        mask = torch.zeros(behind.shape, dtype=dtype, device=device).masked_fill(behind, -torch.inf)[:, None, None]
    return Part(tokens, real, torch.tensor(tables, dtype=torch.int64, device=device), max(keys), mask, is_whole_step)
