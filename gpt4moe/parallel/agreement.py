"""If any rank raises, every rank raises, so that none is left waiting in a collective; small numbers from all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from gpt4moe.errors import Gpt4MoeError, LaunchError
from gpt4moe.parallel.groups import ProcessGroups

_MESSAGE_BYTES = 4096


@contextmanager
def raise_together(groups: ProcessGroups, among: ProcessGroup | None = None) -> Iterator[None]:
    """If the work inside raises a Gpt4MoeError on any rank, every rank raises. The work must have no collective that
    some of its ranks leave by an error and others not.

    Collective at its end. A rank whose work failed raises its own error. The others raise the error of the lowest
    failed rank, with its exit status: only rank 0 prints an error, and it may not have failed itself.

    Args:
        among: these ranks alone; None: all.
    """
    refusal: Gpt4MoeError | None = None
    try:
        yield
    except Gpt4MoeError as error:
        refusal = error
    world_size = groups.layout.world_size
    failed = torch.tensor([groups.rank if refusal else world_size], dtype=torch.int32, device=groups.device)
    distributed.all_reduce(failed, op=distributed.ReduceOp.MIN, group=among)
    if failed.item() == world_size:
        return
    raise _broadcast_error(refusal, int(failed.item()), groups.device, among)


def broadcast_int(value: int, groups: ProcessGroups) -> int:
    """The first rank's `value`, on every rank. Collective."""
    shared = torch.tensor([value], dtype=torch.int64, device=groups.device)
    distributed.broadcast(shared, src=0)
    return int(shared.item())


def broadcast_text(text: str, groups: ProcessGroups, source: int = 0) -> str:
    """The `text` of the rank `source` on every rank: of its UTF-8 the first 4096 bytes. Collective."""
    own = _message(text) if groups.rank == source else b""
    return broadcast_bytes(own, source, groups.device).decode(errors="ignore")  # the cut may be inside a letter


def all_reduce_max(numbers: list[int], groups: ProcessGroups) -> list[int]:
    """For each number its maximum over all ranks. Collective."""
    largest = torch.tensor(numbers, dtype=torch.int64, device=groups.device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return [int(number) for number in largest.tolist()]


def _broadcast_error(
    refusal: Gpt4MoeError | None, source: int, device: torch.device, among: ProcessGroup | None
) -> Gpt4MoeError:
    """This rank's own error, or else the rank `source`'s, on every rank. Collective."""
    text = _message(f"{refusal.exit_code}\0{refusal.cause}\0{refusal.cure}") if refusal else b""
    status, cause, *cure = broadcast_bytes(text, source, device, among).decode(errors="ignore").split("\0")
    told = LaunchError(cause, "".join(cure))
    told.exit_code = int(status)
    return refusal or told


def _message(text: str) -> bytes:
    # A path that is no UTF-8 has surrogates. One rank that could not encode them would leave the others waiting.
    return text.encode(errors="replace")[:_MESSAGE_BYTES]


def broadcast_bytes(message: bytes, source: int, device: torch.device, among: ProcessGroup | None = None) -> bytes:
    """Of the rank `source`, at most 4096, without zeros at their end. Collective over `among`; None: all ranks."""
    assert len(message) <= _MESSAGE_BYTES
    padded = torch.frombuffer(bytearray(message.ljust(_MESSAGE_BYTES, b"\0")), dtype=torch.uint8).to(device)
    distributed.broadcast(padded, src=source, group=among)
    return bytes(padded.tolist()).rstrip(b"\0")
