"""The next tokens of a step's rows: drawn on one rank of the last stage, known to all ranks of the copy.

    begin   after a step: the source draws, and sends to one rank of every other stage, without waiting for it
    end     before the rows' next step: that rank has the tokens, and gives them to its stage

Between the two come the steps of other rows. So no rank waits for the last stage while it has work.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor, distributed

from gpt4moe.errors import DataError
from gpt4moe.inference.batch import Row
from gpt4moe.inference.requests import Request
from gpt4moe.inference.sampling import next_tokens, uniform
from gpt4moe.parallel.groups import ProcessGroups

Watcher = Callable[[Sequence[Row], Tensor], None]
"""(rows, logits [rows, V]) of a step, on the rank that draws tokens."""


class Drawing:
    """Owns the messages with drawn tokens. Call `finish` when no step follows.

    Args:
        source: the rank of this copy that draws.
    """

    def __init__(self, groups: ProcessGroups, source: int, watch: Watcher | None):
        self.groups, self.source, self.watch = groups, source, watch
        layout = groups.layout
        heads = [rank for rank in layout.members("model", groups.rank) if layout.coordinate(rank)["tp"] == 0]
        self.others = [rank for rank in heads if rank != source]
        self.head = layout.members("tp", groups.rank)[0]
        """Of this rank's stage."""
        self.drawn: deque[Tensor] = deque()
        """On the source: of steps that `end` has not been called for."""
        self.sent: deque[tuple[Any, Tensor]] = deque()
        """Sends under way, with what they send."""

    def begin(self, rows: Sequence[Row], logits: Tensor | None, requests: Mapping[int, Request]) -> None:
        """Args: logits: [rows, V], on the source."""
        if not rows or self.groups.rank != self.source:
            return
        assert logits is not None
        if self.watch is not None:
            self.watch(rows, logits)
        wanted = [requests[row.number] for row in rows]
        drawn = torch.zeros(2, len(rows), dtype=torch.float64, device=self.groups.device)
        drawn[0], drawn[1] = next_tokens(
            logits,
            [request.sampling for request in wanted],
            [
                0.0 if request.sampling.is_greedy else uniform(row.random_key, len(row.tokens))
                for row, request in zip(rows, wanted, strict=True)
            ],
            [row.tokens for row in rows],
            [request.banned for request in wanted],
        )
        self.drawn.append(drawn)
        # Not over pp, whose messages between stages have an order of their own.
        for rank in self.others:
            self.sent.append((distributed.isend(drawn, rank, group=self.groups.model), drawn))
        while len(self.sent) > 2 * self.groups.pp.size() * len(self.others):
            self.sent.popleft()[0].wait()

    def end(self, num_rows: int) -> list[tuple[int, float]]:
        """(token, its log-probability) of each row of the earliest step that was begun.

        Raises: DataError on the copy's ranks when the model's logits are no numbers.
        """
        if not num_rows:
            return []
        tokens, logprobs = self._received(num_rows).tolist()
        if any(isnan(logprob) for logprob in logprobs):
            raise DataError(
                "The model's logits are NaN: its weights are not finite, or overflow in a layer.",
                "Check the checkpoint (tools/inspect_checkpoint.py verify), or use an earlier one.",
            )
        return [(int(token), logprob) for token, logprob in zip(tokens, logprobs, strict=True)]

    def drop(self, num_rows: int) -> None:
        """As end, for tokens that nobody wants any more."""
        if num_rows:
            self._received(num_rows)

    def _received(self, num_rows: int) -> Tensor:
        if self.groups.rank == self.source:
            drawn = self.drawn.popleft()
        else:
            drawn = torch.empty(2, num_rows, dtype=torch.float64, device=self.groups.device)
            if self.groups.rank == self.head:
                distributed.recv(drawn, self.source, group=self.groups.model)
        if self.groups.tp.size() > 1:
            distributed.broadcast(drawn, src=self.head, group=self.groups.tp)
        return drawn

    def finish(self) -> None:
        """Waits until all that was sent has arrived."""
        while self.sent:
            self.sent.popleft()[0].wait()
