"""Messages between rank 0 and the other ranks through a key-value store. They need no process group, nor all ranks.

every rank: send_to_first("facts", ...)   rank 0: collect("facts", ranks) -> values that arrived in time
rank 0:     broadcast("go", ...)          the others: receive("go")
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed

from gpt4moe.errors import LaunchError
from gpt4moe.parallel.environment import Environment


@dataclass(frozen=True, slots=True)
class Meeting:
    """The store and this rank's place in it, during one preflight."""

    store: distributed.Store
    rank: int
    world_size: int

    @classmethod
    def open(cls, environment: Environment, seconds: float) -> "Meeting":
        """Connects to the store at the environment's address. Rank 0 serves it; under torchrun, torchrun's agent does.

        Raises: LaunchError if rank 0 is not reached within `seconds`, or cannot listen.
        """
        if environment.master is None:
            return cls(distributed.HashStore(), environment.rank, environment.world_size)
        address, port = environment.master
        agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = distributed.TCPStore(
                address, port, environment.world_size, environment.rank == 0 and not agent_listens,
                timeout=timedelta(seconds=seconds), wait_for_workers=False,
            )  # fmt: skip
        except RuntimeError as error:
            raise LaunchError(
                f"Rank {environment.rank} on {os.uname().nodename} did not reach rank 0 at {address}:{port} within "
                f"{seconds:g} s ({str(error).splitlines()[0]}).",
                "Check that the address is one that all nodes reach, that no firewall closes the port, and that rank 0 "
                "has started; MASTER_ADDR and MASTER_PORT choose another.",
            ) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(distributed.PrefixStore(f"preflight-{attempt}", store), environment.rank, environment.world_size)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def send_to_first(self, topic: str, value: Any) -> None:
        """Stores a value of this rank for rank 0."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))

    def collect(self, topic: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """Rank -> its value, of the ranks that sent one within `seconds` from now. Called by rank 0."""
        deadline = time.monotonic() + seconds
        found = {}
        for rank in ranks:
            key = f"{topic}/{rank}"
            left = max(0.001, deadline - time.monotonic())
            try:
                self.store.wait([key], timedelta(seconds=left))
            except RuntimeError:  # the value did not arrive in time
                continue
            found[rank] = json.loads(self.store.get(key))
        return found

    def broadcast(self, topic: str, value: Any) -> Any:
        """Stores a value for the other ranks to receive(); returns it. Called by rank 0."""
        self.store.set(topic, json.dumps(value))
        return value

    def receive(self, topic: str, seconds: float) -> Any:
        """The value that rank 0 broadcasts. Raises: LaunchError if none arrives in time, or rank 0 has ended."""
        try:
            self.store.wait([topic], timedelta(seconds=seconds))
            return json.loads(self.store.get(topic))
        except RuntimeError as error:
            raise LaunchError(
                f"Rank 0 said nothing about {topic!r} within {seconds:g} s, or has left.", "Look at rank 0's output."
            ) from error

    def leave(self, seconds: float = 10.0) -> None:
        """Rank 0 keeps the store open until the other ranks have received everything and left."""
        if self.is_first:
            self.collect("parted", range(1, self.world_size), seconds)
        else:
            self.send_to_first("parted", True)
