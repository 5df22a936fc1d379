"""Checks that every message of a pipeline reaches the right receive, by simulating the programs of all ranks.

    programs -> each rank in turn, one step -> posts queue on channels -> the n-th send meets the n-th receive

The transport matches sends and receives by order alone. If the two ranks expect different messages, the loss is wrong
and no error is raised. Such messages are called crossed. A slot waits for its input, an exchange for all its posts.
"""

from collections import deque
from collections.abc import Sequence

from gpt4moe.pipeline.messages import Exchange, Message, Post, Program
from gpt4moe.pipeline.schedule import Pass, Slot


def message_problems(ranks: Sequence[Program], vpp: int = 1) -> list[str]:
    """Crossed messages, posts without a partner, ranks that wait for ever; empty: the programs are correct.

    The simulated send waits for its receive, as NCCL's may (gloo's rarely do). So a correct program needs no buffer.
    """
    simulation = _Simulation(ranks, len(ranks) * vpp)
    while any([simulation.advance(rank) for rank in range(len(ranks))]):
        pass
    return simulation.problems + simulation.left_over()


class _Simulation:
    """Owns each rank's place in its program, and the posts that have no partner yet."""

    def __init__(self, ranks: Sequence[Program], stages: int):
        self.ranks, self.stages = ranks, stages
        self.places = [0] * len(ranks)
        self.queues: dict[tuple[int, int, str, bool], deque[tuple[Message, int]]] = {}
        self.open: list[dict[int, Post]] = [{} for _ in ranks]
        self.arrived: list[set[Message]] = [set() for _ in ranks]
        self.posted = 0
        self.problems: list[str] = []
        self.crossed: set[tuple[int, int, str]] = set()
        self.entered = [False] * len(ranks)
        self.mine: list[set[int]] = [set() for _ in ranks]

    def advance(self, rank: int) -> bool:
        """One step of one rank; False when it waits or has ended."""
        if self.places[rank] == len(self.ranks[rank]):
            return False
        item = self.ranks[rank][self.places[rank]]
        if isinstance(item, Slot):
            passes = self._has_input(rank, item)
        elif not self.entered[rank]:
            self._post_all(rank, item)
            return True
        else:
            passes = not self._awaited(rank, item)
        if passes:
            self.places[rank] += 1
            self.entered[rank] = False
        return passes

    def left_over(self) -> list[str]:
        """After the last advance: the ranks that still wait, and the posts that found no partner."""
        found = [
            f"rank {rank} waits for ever at {self._words(item)}"
            for rank, item in ((r, p[self.places[r]]) for r, p in enumerate(self.ranks) if self.places[r] < len(p))
        ]
        for rank, posts in enumerate(self.open):
            for post in posts.values():
                verb = "sends to" if post.is_send else "waits to receive from"
                found.append(f"rank {rank} {verb} rank {post.peer}: {_name(post.message)}; nobody meets it")
        return found

    def _has_input(self, rank: int, slot: Slot) -> bool:
        stage = slot.chunk * len(self.ranks) + rank
        if stage == (0 if slot.direction is Pass.forward else self.stages - 1):
            return True
        return Message(slot.direction, stage, slot.micro_batch) in self.arrived[rank]

    def _awaited(self, rank: int, exchange: Exchange) -> bool:
        if exchange.waits:
            return any(number in self.open[rank] for number in self.mine[rank])
        directions = {post.message.direction for post in exchange.posts}
        return any(
            post.is_send and post.message.direction in directions and number not in self.mine[rank]
            for number, post in self.open[rank].items()
        )

    def _post_all(self, rank: int, exchange: Exchange) -> None:
        self.entered[rank], self.mine[rank] = True, set()
        for post in exchange.posts:
            number = self.posted
            self.posted += 1
            self.open[rank][number] = post
            self.mine[rank].add(number)
            source, target = (rank, post.peer) if post.is_send else (post.peer, rank)
            mine = self.queues.setdefault((source, target, post.channel, post.is_send), deque())
            theirs = self.queues.setdefault((source, target, post.channel, not post.is_send), deque())
            mine.append((post.message, number))
            if theirs:
                self._meet(source, target, post.channel)

    def _meet(self, source: int, target: int, channel: str) -> None:
        sent, send_number = self.queues[source, target, channel, True].popleft()
        wanted, receive_number = self.queues[source, target, channel, False].popleft()
        del self.open[source][send_number], self.open[target][receive_number]
        self.arrived[target].add(wanted)
        if sent != wanted and (source, target, channel) not in self.crossed:  # once a channel
            self.crossed.add((source, target, channel))
            self.problems.append(
                f"messages cross: rank {source} sends {_name(sent)} where rank {target} receives {_name(wanted)}"
            )

    def _words(self, item: Slot | Exchange) -> str:
        if isinstance(item, Slot):
            return f"the {item.direction.value} of chunk {item.chunk}, micro-batch {item.micro_batch}"
        return "an exchange of " + ", ".join(_name(post.message) for post in item.posts)


def _name(message: Message) -> str:
    what = "activation" if message.direction is Pass.forward else "gradient"
    return f"the {what} for stage {message.stage} of micro-batch {message.micro_batch}"
