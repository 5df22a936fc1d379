"""RollCall: a thread that posts this rank's beats on the board, reads those of the others when asked, and why all end.

Only this thread asks the store. Where the process that serves it is stopped, a question never returns; then
`seconds_unanswered` grows, and the watchdog draws its conclusion.
"""

import threading
import time
from collections.abc import Callable, Collection

from gpt4moe.parallel.board import Board
from gpt4moe.resilience.hangs import Beat, End

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
        """Why all beats are wanted: "hang", "lost" (a connection broke); empty: they are not."""
        self.is_reader = board.rank == 0
        """Whether this rank reads all beats when they are wanted: rank 0, or a deputy, the first that asks to be one.
        Few read, because 25,000 beats are 5 MB."""
        self.readings = 0
        """Of all beats, by this rank."""
        self._beat, self._number, self._read_at = beat, 0, time.monotonic()
        self._changed: dict[int, tuple[int, float]] = {}
        self._answered = time.monotonic()
        self._stop = threading.Event()
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
        self._stop.set()

    def silent(self) -> list[int]:
        """Ranks that have not left and whose beat has not changed for some time, as far as this rank has read."""
        now = time.monotonic()
        return sorted(
            rank
            for rank, (_, since) in self._changed.items()
            if now - since > self.patience and self.beats[rank].doing != LEFT
        )

    def claim(self, end: End) -> bool:
        """Ends every rank for this reason, unless a rank has given one before: then that is `end`.

        Returns: whether this one counts. Raises: RuntimeError when the store has gone, or does not answer.
        """
        with self._lock:
            if self.end is None:
                if self.seconds_unanswered > self.patience:
                    raise RuntimeError("the store does not answer: asked now, it might never")
                self.end = End.decode(self.board.claim_end(end.encode()))
                return self.end == end
            return False

    def _talk(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._post()
                text = self.board.end()
                if text is not None:
                    with self._lock:
                        self.end = self.end or End.decode(text)
                    return  # the process that serves the store may leave from now on
                self._look_for_readers()
                if self.is_reader and (self.looks_for or time.monotonic() - self._read_at > self._calm_seconds):
                    self._read(range(self.world_size))
                    self._read_at = time.monotonic()
                    self.readings += 1
                self._answered = time.monotonic()
            except RuntimeError:  # of torch's store: it has gone, and does not come back
                self._answered = float("-inf")
                return

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
        texts, now = self.board.read(ranks), time.monotonic()
        beats = {rank: Beat.decode(text) for rank, text in texts.items()}
        for rank, beat in beats.items():
            if self._changed.get(rank, (-1, now))[0] != beat.number:
                self._changed[rank] = (beat.number, now)
        self.beats = self.beats | beats

    def _post(self) -> None:
        self._number += 1
        self.board.post(self._beat(self._number).encode())
