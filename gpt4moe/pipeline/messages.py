"""Messages between pipeline stages: every send and receive of a step, in Megatron's order. No torch.

    programs(pp, vpp, micro_batches) -> for each rank: slot, exchange, slot, exchange, ... -> message_check

An exchange is one call of Megatron-core 0.16.1's P2PCommunicator: up to four posts, in the order it posts them.
"""

from collections import Counter
from dataclasses import dataclass

from gpt4moe.pipeline.schedule import Pass, Slot, schedule, virtual_order, warmup_forwards


@dataclass(frozen=True, slots=True)
class Message:
    """An activation (forward) or its gradient (backward), identified by the slot that reads it."""

    direction: Pass
    stage: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Post:
    """One send or receive. Posts on different channels never meet: Megatron uses two groups in a pipeline of two."""

    is_send: bool
    peer: int
    message: Message
    channel: str = ""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Posts of one call, in order."""

    posts: tuple[Post, ...]
    waits: bool = True
    """True: the call waits for all its posts. False: it waits only for earlier sends of the same direction."""


Program = list[Slot | Exchange]


def programs(*, pp: int, vpp: int = 1, micro_batches: int, batched: bool = False) -> list[Program]:
    """What each rank of a pipeline computes, sends and receives in one step.

    Args:
        batched: True: Megatron's batch_p2p_comm without overlap, as this project runs vpp=1 on GPUs. False: single
            posts, with overlap when vpp > 1, as it runs everything else.
    """
    table = schedule(pp=pp, vpp=vpp, micro_batches=micro_batches)
    if pp == 1:
        return [list(table[0])]
    write = _plain if vpp == 1 else _interleaved
    return [
        write(_Writer(rank, pp, vpp, micro_batches, batched=batched), table[rank], micro_batches) for rank in range(pp)
    ]


class _Writer:
    """Builds the program of one rank."""

    def __init__(self, rank: int, pp: int, vpp: int, micro_batches: int, *, batched: bool):
        self.rank, self.pp, self.vpp, self.batched = rank, pp, vpp, batched
        self.overlap = vpp > 1 and not batched
        self.is_first, self.is_last = rank == 0, rank == pp - 1
        self.program: Program = []
        self.order = virtual_order(vpp, micro_batches, pp)
        self.received: Counter[tuple[Pass, int]] = Counter()

    def slot(self, slot: Slot) -> list[tuple[str, Message]]:
        """Appends a slot; returns the send of its result, if it has one."""
        self.program.append(slot)
        step = 1 if slot.direction is Pass.forward else -1
        reader = slot.chunk * self.pp + self.rank + step
        if not 0 <= reader < self.pp * self.vpp:
            return []
        return [("send_next" if step > 0 else "send_prev", Message(slot.direction, reader, slot.micro_batch))]

    def receive(self, direction: Pass, chunk: int) -> list[tuple[str, Message]]:
        """The receive of a chunk's next input or gradient, in order of micro-batches."""
        micro_batch = self.received[direction, chunk]
        self.received[direction, chunk] += 1
        name = "recv_prev" if direction is Pass.forward else "recv_next"
        return [(name, Message(direction, chunk * self.pp + self.rank, micro_batch))]

    def exchange(self, *messages: list[tuple[str, Message]], overlap: bool = False) -> None:
        named = dict(item for part in messages for item in part)
        if self.batched:
            order = ["send_prev", "recv_prev", "send_next", "recv_next"]
        elif self.rank % 2 == 0:
            order = ["send_next", "recv_prev", "send_prev", "recv_next"]
        else:
            order = ["recv_prev", "send_next", "recv_next", "send_prev"]
        posts = tuple(self._post(name, named[name]) for name in order if name in named)
        if posts:
            self.program.append(Exchange(posts, waits=not overlap))

    def _post(self, name: str, message: Message) -> Post:
        is_send = name.startswith("send")
        peer = (self.rank + (1 if name.endswith("next") else -1)) % self.pp
        sender = self.rank if is_send else peer
        channel = ("even sends", "odd sends")[sender % 2] if self.pp == 2 and not self.batched else ""
        return Post(is_send, peer, message, channel)


def _plain(writer: _Writer, slots: list[Slot], micro_batches: int) -> Program:
    """1F1B (forward_backward_pipelining_without_interleaving)."""
    warmup = warmup_forwards(writer.rank, pp=writer.pp, micro_batches=micro_batches)

    def inputs() -> list[tuple[str, Message]]:
        return [] if writer.is_first else writer.receive(Pass.forward, 0)

    def gradients() -> list[tuple[str, Message]]:
        return [] if writer.is_last else writer.receive(Pass.backward, 0)

    for slot in slots[:warmup]:
        writer.exchange(inputs())
        writer.exchange(writer.slot(slot))
    steady = slots[warmup : 2 * micro_batches - warmup]
    if steady:
        writer.exchange(inputs())
    for k in range(0, len(steady), 2):
        writer.exchange(writer.slot(steady[k]), gradients())
        is_end = k + 2 == len(steady)
        sent = writer.slot(steady[k + 1])
        writer.exchange(sent, [] if is_end else inputs())
    for slot in slots[2 * micro_batches - warmup :]:
        writer.exchange(gradients())
        writer.exchange(writer.slot(slot))
    return writer.program


def _interleaved(writer: _Writer, slots: list[Slot], micro_batches: int) -> Program:
    """Interleaved 1F1B (forward_backward_pipelining_with_interleaving): a slot's input is received one slot early."""
    total, vpp, overlap = micro_batches * writer.vpp, writer.vpp, writer.overlap
    warmup = warmup_forwards(writer.rank, pp=writer.pp, vpp=vpp, micro_batches=micro_batches)
    remaining = total - warmup

    def ahead(k: int, direction: Pass) -> list[tuple[str, Message]]:
        chunk = _next_chunk(writer, k, direction)
        return [] if chunk is None else writer.receive(direction, chunk)

    if not writer.is_first:
        writer.exchange(writer.receive(Pass.forward, 0))
    first_gradient = [] if writer.is_last else writer.receive(Pass.backward, vpp - 1)
    for k in range(warmup):
        is_end = k == warmup - 1 and remaining > 0
        sent, coming = writer.slot(slots[k]), ahead(k, Pass.forward) if k < total - 1 else []
        if is_end and not overlap:
            writer.exchange(sent, coming, first_gradient)
        else:
            writer.exchange(sent, coming)
        if is_end and overlap:
            writer.exchange(first_gradient, overlap=True)
    for k in range(remaining):
        sent = writer.slot(slots[warmup + 2 * k])
        coming = ahead(warmup + k, Pass.forward) if k < remaining - 1 else []
        if overlap:
            writer.exchange(sent, coming, overlap=True)
            sent_back = writer.slot(slots[warmup + 2 * k + 1])
            writer.exchange(sent_back, ahead(k, Pass.backward), overlap=True)
        else:
            sent_back = writer.slot(slots[warmup + 2 * k + 1])
            writer.exchange(sent, sent_back, coming, ahead(k, Pass.backward))
    if remaining == 0:
        writer.exchange(first_gradient)
    for k in range(remaining, total):
        sent = writer.slot(slots[total + k])
        writer.exchange(sent, ahead(k, Pass.backward) if k < total - 1 else [])
    return writer.program


def _next_chunk(writer: _Writer, k: int, direction: Pass) -> int | None:
    """The chunk whose input is received while slot k of a direction ends (recv_tensor_from_previous_stage).

    The first rank of a direction receives what the last rank of the previous chunk sent pp - 1 slots ago.
    """
    order, vpp, pp = writer.order, writer.vpp, writer.pp
    leads = writer.is_first if direction is Pass.forward else writer.is_last
    at = k - (pp - 1) if leads else k + 1
    if not 0 <= at < len(order):
        return None
    chunk = order[at][1]
    if leads:  # the results of the last chunk are not sent
        chunk += 1
        if chunk == vpp:
            return None
    return chunk if direction is Pass.forward else vpp - 1 - chunk
