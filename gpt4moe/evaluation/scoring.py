"""Scorer: log-probabilities of given tokens under the model, on every rank of any layout.

    pieces --by length, in batches--> one packed pass of each batch through all stages --> log-probability of each token
    of each copy of the model                  (inference.stages, no cache)                on one rank, then on all

Logits of a pass are made and scored SLICE_BYTES at a time: [scored tokens, V] of a long text could fill the memory.

Images of a pass are made before it, by every rank that has a gated block, and once for all pieces of it that have them.

Each copy of the model (tp x pp ranks) scores other pieces. Every rank knows all pieces, so it knows without a message
how many passes each copy makes, and how many tokens a pass has where the copies meet in the experts.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError
from gpt4moe.evaluation.pieces import Piece
from gpt4moe.inference.attention import StepAttention
from gpt4moe.inference.batch import Row, Step, pack
from gpt4moe.inference.cache import KeyValueCache, blocks_of
from gpt4moe.inference.copies import copies_step_together, step_length
from gpt4moe.inference.image_cache import LatentMaker, image_cache, images_of, num_distinct
from gpt4moe.inference.stages import LogitsOf, Stages, generating
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.groups import ProcessGroups

MAX_PASS_TOKENS = 2048
"""Of a pass over several pieces; a longer piece has a pass of its own."""
MAX_PASS_IMAGES = 32
"""Distinct ones of a pass over several pieces, whose keys and values are kept together."""
SLICE_BYTES = 1 << 28
"""Of fp32 logits that are there together; with their copies about four times as much."""


@dataclass(frozen=True, slots=True)
class Score:
    """Of one piece."""

    logprobs: Tensor
    """[num_scored] fp64 on the CPU, of fp32 log-probabilities."""
    is_greedy: Tensor
    """[num_scored] bool: whether the token is the most probable one at its place."""

    @property
    def total(self) -> float:
        """Log-likelihood of the scored tokens, in nats."""
        return float(self.logprobs.sum())

    def of(self, chosen: NDArray[np.bool_]) -> "Score":
        """Of some of its tokens alone, [num_scored]."""
        some = torch.from_numpy(chosen)
        return Score(self.logprobs[some], self.is_greedy[some])


class _NoCache(KeyValueCache):
    """Keeps nothing: no piece goes on in another pass."""

    def append(self, layer_number: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        return


class Scorer:
    """Scores on the ranks of all copies of the model. Use it as often as you like.

    Args:
        chunks: GPTModels of this rank, wrapped or not; trained ones too.
        maker: makes latents of pieces' images; None: no piece has any.
    """

    def __init__(
        self, chunks: list[nn.Module], run: RunConfig, groups: ProcessGroups, maker: LatentMaker | None = None
    ):  # fmt: skip
        self.chunks, self.groups, self.layout = chunks, groups, groups.layout
        self.vocab_size = run.model.vocab_size
        self.dtype = next(chunks[0].parameters()).dtype
        self.cache = _NoCache(
            [], num_groups=run.model.query_groups // self.layout.tp, head_size=run.model.head_size,
            dtype=self.dtype, device=groups.device,
        )  # fmt: skip
        self.images = image_cache(chunks, maker, groups, self.dtype)
        place = self.layout.coordinate(groups.rank)
        self.is_source = place["tp"] == 0 and place["pp"] == self.layout.pp - 1
        self.num_copies, self.copy_index = groups.dp_cp.size(), groups.dp_cp.rank()
        self.steps_together = copies_step_together(self.layout)

    def score(self, pieces: Sequence[Piece]) -> list[Score]:
        """Of all pieces, in their order, on every rank. Collective over the world: equal pieces on all ranks.

        Raises: ConfigError for images without a maker; on every rank, DataError for one that cannot be read any more.
        """
        most_images = max((num_distinct(piece.images) for piece in pieces), default=0)
        if most_images and self.images.maker is None:
            raise ConfigError(
                "A text has images, but nothing here makes latents of them.",
                "Give a vision model, and Scorer(maker=model.latent_maker()).",
            )
        self.images.open(max(MAX_PASS_IMAGES, most_images) if most_images else 0)
        starts = [0]
        for piece in pieces:
            starts.append(starts[-1] + piece.num_scored)
        # Of each scored token: its log-probability; whether it is the most probable one.
        found = torch.zeros(2, starts[-1], dtype=torch.float64, device=self.groups.device)
        plan = self._plan(pieces)
        stages = Stages(self.chunks, self.groups)
        # An image that one copy cannot read ends all: where copies meet in the experts before they do, else at the end.
        # Stages, which are at different passes, then need not wait for each other.
        agreed: Callable[[], AbstractContextManager[None]] = nullcontext
        if most_images:
            agreed = partial(raise_together, self.groups)
        whole, each = (nullcontext, agreed) if self.steps_together else (agreed, nullcontext)
        with generating(self.chunks), whole():
            try:
                for passes in plan:
                    with each():
                        step = self._step(pieces, passes)
                    if step is None:
                        continue
                    numbers = passes[self.copy_index]
                    read = partial(self._read, self._scored(pieces, numbers), step.ends)
                    scores = stages.run(StepAttention(step, self.cache, images_of(step, self.images)), read)
                    for row in step.rows:
                        self.images.leave(row.images)
                    if scores is not None and self.is_source:
                        # Where they stand among those of all pieces.
                        places = [at for number in numbers for at in range(starts[number], starts[number + 1])]
                        found[:, places] = scores
            finally:
                stages.finish()
                self.images.open(0)
        # Every token was scored on one rank; all others have zeros there.
        distributed.all_reduce(found)
        values = found.cpu()
        return [Score(values[0, start:end], values[1, start:end] > 0) for start, end in pairwise(starts)]

    def _plan(self, pieces: Sequence[Piece]) -> list[list[list[int]]]:
        """Of each pass, the pieces of each copy (none: it has fewer passes)."""
        # Pieces of one length together: attention pads to the longest of about one length.
        order = sorted(range(len(pieces)), key=lambda number: -len(pieces[number].tokens))
        of_copies = [_batches(pieces, order[copy :: self.num_copies]) for copy in range(self.num_copies)]
        most = max(map(len, of_copies))
        return [[batches[at] if at < len(batches) else [] for batches in of_copies] for at in range(most)]

    def _scored(self, pieces: Sequence[Piece], numbers: Sequence[int]) -> Tensor:
        """The scored tokens of some pieces."""
        tokens = [int(token) for number in numbers for token in pieces[number].tokens[-pieces[number].num_scored :]]
        return torch.tensor(tokens, dtype=torch.int64, device=self.groups.device)

    def _read(self, tokens: Tensor, places: Tensor, logits_of: LogitsOf) -> Tensor:
        """[2, scored tokens] fp64: of each its log-probability; 1 where it is the most probable one, else 0. Collective
        over tp, whose ranks have the same step, so equally many slices.

        Args:
            tokens, places: [scored tokens], and where in the step the model expects each.
        """
        rows = max(1, SLICE_BYTES // (4 * self.vocab_size))
        slices = zip(places.split(rows), tokens.split(rows), strict=True)
        return torch.cat([_scores(logits_of(some), of_them) for some, of_them in slices], dim=1)

    def _step(self, pieces: Sequence[Piece], passes: list[list[int]]) -> Step | None:
        """This copy's pass; None: it has no pieces, and no other copy needs it."""
        totals = [sum(len(pieces[number].tokens) - 1 for number in batch) for batch in passes]
        mine, total = passes[self.copy_index], totals[self.copy_index]
        if not (mine or self.steps_together):
            return None
        length, has_dummies = step_length(self.layout, total, max(totals))
        rows = []
        for number in mine:
            tokens = [int(token) for token in pieces[number].tokens[:-1]]  # nothing comes after the last
            # Nothing is cached, so all blocks may be the same.
            slots = self.images.join(pieces[number].images)
            assert slots is not None, "_batches leaves room for all images of a pass"
            rows.append(
                Row(number, tokens, len(tokens), len(tokens), blocks=[0] * blocks_of(len(tokens)),
                    images=pieces[number].images, image_slots=slots)
            )  # fmt: skip
        step = pack(
            rows, [len(row.tokens) for row in rows], num_tokens=length, has_dummies=has_dummies,
            dtype=self.dtype, device=self.groups.device,
        )  # fmt: skip
        ends: list[int] = []
        at = 0
        for row in rows:
            at += len(row.tokens)
            ends.extend(range(at - pieces[row.number].num_scored, at))
        return replace(step, ends=torch.tensor(ends, dtype=torch.int64, device=self.groups.device))


def _batches(pieces: Sequence[Piece], numbers: Sequence[int]) -> list[list[int]]:
    """Pieces in their order, as many together as fit a pass."""
    batches: list[list[int]] = []
    size, images = 0, set[str]()
    for number in numbers:
        length, more = len(pieces[number].tokens) - 1, {image.digest for image in pieces[number].images}
        if not batches or size + length > MAX_PASS_TOKENS or len(images | more) > MAX_PASS_IMAGES:
            batches.append([])
            size, images = 0, set()
        batches[-1].append(number)
        size += length
        images |= more
    return batches


def _scores(logits: Tensor, tokens: Tensor) -> Tensor:
    """[2, rows] of logits [rows, V] and a token [rows] of each."""
    logits = logits.float()
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None]).squeeze(1)
    return torch.stack([logprobs.double(), (logits.argmax(dim=-1) == tokens).double()])
