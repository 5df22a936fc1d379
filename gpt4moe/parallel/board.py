"""Board: short texts that ranks leave for each other, in the store by which they met, through a client of their own.

No collective: a rank that hangs in one still posts from another thread. A store serves one request of a client at a
time, so the client of torch.distributed would not do: where one thread waits in `get` for a key, another's `set` waits
until that has come or timed out (torch 2.13). So rank 0 has two connections of each rank (rendezvous.py).

    beats/N   the last text of rank N, written over and over
    end       why the launch ends; the first to claim it wins
"""

import os
import time
from collections.abc import Collection
from datetime import timedelta

import torch
from torch import distributed

from gpt4moe.parallel.agreement import broadcast_bytes
from gpt4moe.parallel.environment import Environment

_SECONDS = timedelta(seconds=20)


class Board:
    """The texts of one launch. Each call asks the store and may raise RuntimeError when that has gone, or block where
    the process that serves it is stopped.

    Args:
        store: of which nobody else uses this client.
    """

    def __init__(self, store: distributed.Store, rank: int, token: str):
        # torchrun's own store outlives a restart of its ranks, whose number differs from agent to agent.
        self.store = distributed.PrefixStore(f"board {token}", store)
        self.rank = rank
        self.token = token
        """Of this launch, the same on every rank: when it began."""

    @classmethod
    def connect(cls, environment: Environment, device: torch.device) -> "Board":
        """After the ranks have met (parallel.groups.world). Collective: a rank may come minutes after others."""
        token = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        if environment.master is None:
            return cls(distributed.HashStore(), environment.rank, token)
        token = broadcast_bytes(token.encode() if environment.rank == 0 else b"", 0, device).decode()
        address, port = environment.master
        store = distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_SECONDS)
        return cls(store, environment.rank, token)

    def post(self, text: str) -> None:
        self.store.set(f"beats/{self.rank}", text)

    def read(self, ranks: Collection[int]) -> dict[int, bytes]:
        """The last texts of those of the ranks that have posted one. 25,000 take 5 s."""
        keys = {rank: f"beats/{rank}" for rank in ranks}
        if not self.store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return dict(zip(keys, self.store.multi_get(list(keys.values())), strict=True))

    def claim_end(self, text: str) -> str:
        """Says why the launch ends. Returns: the text of the rank that said so first."""
        return str(self.store.compare_set("end", "", text).decode())

    def end(self) -> str | None:
        return self.store.get("end").decode() if self.store.check(["end"]) else None

    def is_first_to(self, what: str) -> bool:
        """Whether this rank is the first to call this for `what`."""
        return int(self.store.add(f"first/{what}", 1)) == 1
