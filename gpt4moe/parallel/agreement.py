"""If any rank raises, every rank raises, so that none is left waiting in a collective; and small agreed numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from gpt4moe.errors import Gpt4MoeError, LaunchError
from gpt4moe.parallel.groups import ProcessGroups

_MESSAGE_BYTES = 4096


@contextmanager
def raise_together(groups: ProcessGroups) -> Iterator[None]:
    """Around work without collectives. Collective at its end.

    Raises: on every rank when the work raised a Gpt4MoeError on any: its own, or one with the lowest such rank's words,
        for the first rank prints and may not be the one that refused.
    """
    refusal: Gpt4MoeError | None = None
    try:
        yield
    except Gpt4MoeError as error:
        refusal = error
    world_size = groups.layout.world_size
    speaker = torch.tensor([groups.rank if refusal else world_size], dtype=torch.int32, device=groups.device)
    distributed.all_reduce(speaker, op=distributed.ReduceOp.MIN)
    if speaker.item() == world_size:
        return
    cause, cure = _heard(refusal, int(speaker.item()), groups.device)
    raise refusal or LaunchError(cause, cure)


def broadcast_int(value: int, groups: ProcessGroups) -> int:
    """The first rank's `value`, on every rank. Collective."""
    told = torch.tensor([value], dtype=torch.int64, device=groups.device)
    distributed.broadcast(told, src=0)
    return int(told.item())


def all_reduce_max(numbers: list[int], groups: ProcessGroups) -> list[int]:
    """Of each number the largest that any rank has, on every rank. Collective."""
    told = torch.tensor(numbers, dtype=torch.int64, device=groups.device)
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
    return [int(number) for number in told.tolist()]


def _heard(refusal: Gpt4MoeError | None, speaker: int, device: torch.device) -> tuple[str, str]:
    """Cause and cure of the speaker's refusal, on every rank. Collective."""
    said = f"{refusal.cause}\0{refusal.cure}".encode()[:_MESSAGE_BYTES] if refusal else b""
    message = torch.frombuffer(bytearray(said.ljust(_MESSAGE_BYTES, b"\0")), dtype=torch.uint8).to(device)
    distributed.broadcast(message, src=speaker)
    cause, _, cure = bytes(message.tolist()).rstrip(b"\0").decode(errors="replace").partition("\0")
    return cause, cure
