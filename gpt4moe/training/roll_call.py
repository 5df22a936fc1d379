"""RollCall: a thread that posts this rank's beats on the board, reads those of the others when asked, and why all end.

Only this thread asks the store. Where the process that serves it is stopped, a question never returns; then
`seconds_unanswered` grows, and the watchdog draws its conclusion.

Where nothing is wrong beats are read seldom. So only what was read since they are wanted says that a rank is silent:
the same beat, in readings that lie so far apart.
"""

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from gpt4moe.parallel.board import Board
from gpt4moe.resilience.hangs import Beat, End
from gpt4moe.training.hang_files import say, summary

_MISSED = 4
"""Beats that a rank may miss before it counts as silent."""
_REQUESTS_PER_SECOND = 10_000
"""Of all ranks together, to one store; a beat is two. One store took 32,000 a second on one slow core."""
_ALL_IS_WELL_SECONDS = 60.0
"""Between two readings of all beats by rank 0 where nothing is wrong, for the busiest rank."""
LEFT = "left"
"""What a rank does that posts its last beat."""


def beat_seconds(world_size: int, hang_seconds: float) -> float:
    """Between two beats of a rank: 1 s, 5 s at 24,960 ranks; less where a hang is to be seen within seconds."""
    seconds = max(1.0, 2 * world_size / _REQUESTS_PER_SECOND)
    return min(seconds, hang_seconds / 8) if hang_seconds else seconds


@dataclass(frozen=True, slots=True)
class _Seen:
    """A rank's beat of one number, and the end of the first and the begin of the last reading that had it."""

    number: int
    first: float
    last: float


class RollCall:
    """Of one rank and launch.

    Args:
        beat: makes this rank's beat of a number.
        interval: seconds between two beats.
    """

    def __init__(self, board: Board, world_size: int, interval: float, beat: Callable[[int], Beat]):
        self.board, self.world_size, self.interval = board, world_size, interval
        self.beats: dict[int, Beat] = {}
        self.end: End | None = None
        """Why every rank ends, once a rank has said so."""
        self.looks_for = ""
        """Why all beats are wanted: "hang", "lost" (a connection broke); empty: they are not. Set by `want`."""
        self.is_reader = board.rank == 0
        """Whether this rank reads all beats when they are wanted: rank 0, or a deputy, the first that asks to be one.
        Few read, because 25,000 beats are 5 MB."""
        self.readings = 0
        """Of all beats, by this rank."""
        self._beat, self._number = beat, 0
        self._read_at = self._answered = self._wanted_at = time.monotonic()
        self._lasting = self.patience
        self._seen: dict[int, _Seen] = {}
        self._failures = 0
        self._has_told = False
        self._wish: End | None = None
        self._soon, self._is_known = threading.Event(), threading.Event()
        self._is_stopped = False
        self._lock = threading.Lock()

    @property
    def seconds_unanswered(self) -> float:
        """Since the store answered last."""
        return time.monotonic() - self._answered

    @property
    def patience(self) -> float:
        """Seconds after which a rank, or the store, that gives no sign counts as silent."""
        return _MISSED * self.interval + 1.0

    def start(self) -> None:
        """Posts the first beat, so that every rank is on the board before any looks for it."""
        self._post()
        threading.Thread(target=self._talk, name="watchdog's beats", daemon=True).start()

    def stop(self) -> None:
        self._is_stopped = True
        self._soon.set()

    def want(self, what: str, lasting: float = 0.0) -> None:
        """Asks for readings of all beats.

        Args:
            what: as in `looks_for`.
            lasting: seconds without a new beat after which a rank is silent; at least `patience`.
        """
        self._lasting = max(lasting, self.patience)
        if what != self.looks_for:
            self._wanted_at = time.monotonic()
            self.looks_for = what

    def forget(self) -> None:
        """This process was stopped, and the others may have been too: what was seen before says nothing."""
        self._wanted_at = time.monotonic()
        self._answered = max(self._answered, self._wanted_at) if self._answered > 0 else self._answered

    @property
    def has_read(self) -> bool:
        """Whether the beats of all ranks were read since they are wanted."""
        return self._read_at > self._wanted_at and len(self.beats) >= self.world_size

    def silent(self) -> list[int]:
        """Ranks that have not left and whose beat did not change for so long, in the readings since they are wanted."""
        return sorted(
            rank
            for rank, seen in list(self._seen.items())
            if seen.first > self._wanted_at
            and seen.last - seen.first > self._lasting
            and self.beats[rank].doing != LEFT
        )

    def claim(self, end: End) -> bool:
        """Ends every rank for this reason, unless a rank has given one before: then that is `end`.

        Returns: whether this one counts. Raises: RuntimeError when the store has gone, or does not answer.
        """
        with self._lock:
            if self.end is not None:
                return False
            self._wish = self._wish or end
        self._soon.set()
        until = time.monotonic() + self.patience + 2 * self.interval
        while not self._is_known.wait(self.interval / 4):
            if self.seconds_unanswered == float("inf") or time.monotonic() > until:
                raise RuntimeError("the store has gone, or does not answer")
        return self.end == end

    def _talk(self) -> None:
        while True:
            self._soon.wait(self.interval)
            self._soon.clear()
            if self._is_stopped or self.turn():
                return

    def turn(self) -> bool:
        """Asks the store once, and notes whether it answered. Returns: whether that was the last time."""
        begun = time.monotonic()
        try:
            if self._ask():
                return True  # the process that serves the store may leave from now on
            self._failures = 0
        except RuntimeError as error:  # of torch's store; a client whose connection broke stays so
            if not any(word in str(error).lower() for word in ("timed out", "timeout")):
                self._failures += 1
            if self._failures > 1:
                self._answered = float("-inf")
            return self._failures > 1
        except Exception as error:  # the watch goes on
            if not self._has_told:
                self._has_told = True
                text = f"the watchdog of rank {self.board.rank} has an error and goes on: {summary(error)}."
                say(text, kind="warning")
        self._answered = time.monotonic()
        if self._answered - begun > self.patience:  # what others posted meanwhile is not known
            self.forget()
        return False

    def _ask(self) -> bool:
        """Says and hears what there is. Returns: whether the launch ends."""
        self._post()
        text = self.board.claim_end(self._wish.encode()) if self._wish else self.board.end()
        if text is not None:
            with self._lock:
                self.end = self.end or End.decode(text)
            self._is_known.set()
            return True
        self._look_for_readers()
        if self.is_reader and (self.looks_for or time.monotonic() - self._read_at > self._calm_seconds):
            begun = time.monotonic()
            self._read(range(self.world_size))
            self._read_at = begun
            self.readings += 1
        return False

    @property
    def _calm_seconds(self) -> float:
        return max(_ALL_IS_WELL_SECONDS, self.world_size / 100)

    def _look_for_readers(self) -> None:
        if self.is_reader or not self.looks_for:
            return
        if self.looks_for == "lost":
            self.is_reader = self.board.is_first_to("look for the lost")
        else:
            self._read([0])
            self.is_reader = 0 in self.silent() and self.board.is_first_to("stand for rank 0")

    def _read(self, ranks: Collection[int]) -> None:
        begun = time.monotonic()
        texts, now = self.board.read(ranks), time.monotonic()
        beats = {rank: Beat.decode(text) for rank, text in texts.items()}
        self.beats = self.beats | beats
        for rank, beat in beats.items():
            seen = self._seen.get(rank)
            is_same = seen is not None and seen.number == beat.number and seen.first > self._wanted_at
            first = seen.first if seen is not None and is_same else now
            self._seen[rank] = _Seen(beat.number, first, begun)

    def _post(self) -> None:
        self._number += 1
        self.board.post(self._beat(self._number).encode())
