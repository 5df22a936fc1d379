"""Watchdog: a thread of each rank that sees when the launch hangs, and ends the rank when the launch has failed.

    training thread --frames--> has it moved? where does it stand?  --beat--> RollCall --> board <-- other ranks' beats
    all ranks stand still  --> rank 0, or a deputy: two lines, event `hang` --> every rank: stacks, exit 86
    an error, a broken connection --> failed(), in the training thread: who was it? --> the others end with that line

A step does nothing for this, and no collective is added. The watchdog never asks the store itself: that may block.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from gpt4moe.errors import HUNG, Gpt4MoeError, RankEnded
from gpt4moe.parallel.board import Board
from gpt4moe.parallel.environment import Environment
from gpt4moe.resilience.hangs import Beat, End, Limits, lost, told, why_hung
from gpt4moe.runlog.events_log import EventsLog
from gpt4moe.runlog.waits import Waits
from gpt4moe.training.hang_files import HangFiles, is_broken_connection, say, summary
from gpt4moe.training.roll_call import LEFT, RollCall, beat_seconds
from gpt4moe.training.training_thread import TrainingThread

_PATIENT = 60.0
"""Seconds in which ranks end by themselves after an error that all of them should have."""
_LEAVING = 110.0
"""The same for a rank that closes files; launchers wait 120 s."""
_WRITING = 30.0
"""Seconds for stacks and events: a disk that does not answer may be why ranks hang."""


class Watchdog:
    """Of one rank, from when the ranks have met until it leaves. Made in the training thread.

    Args:
        device_type: as of TrainingThread.
    """

    def __init__(self, environment: Environment, limits: Limits, run_folder: Path, device_type: str):
        self.rank, self.world_size, self.limits = environment.rank, environment.world_size, limits
        self.node = os.uname().nodename
        board = Board.connect(environment, torch.device(device_type))
        self.files = HangFiles(run_folder, board.token, self.rank)
        self.call = RollCall(board, self.world_size, beat_seconds(self.world_size, limits.hang_seconds), self.beat)
        self.thread = TrainingThread(device_type)
        self.events: EventsLog | None = None
        self.is_over = self.is_leaving = self.is_warned = self.has_said = self.has_erred = False
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self.call.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Raises: RankEnded instead of an error that is not a Gpt4MoeError."""
        ended = self.failed(error) if isinstance(error, Exception) else None
        self.is_leaving = False
        if ended is not None:
            raise ended from None  # the threads live on: they end the process if the groups cannot be destroyed
        self.is_over = True
        self._stop.set()
        self.call.stop()

    def follow(self, waits: Waits, step: int, events: EventsLog | None) -> None:
        """Training begins after this step.

        Args:
            waits, events: of its launch; events on rank 0 alone.
        """
        self.thread.waits, self.thread.step, self.events = waits, step, events

    def stepped(self, step: int, seconds: float) -> None:
        """A step has ended, with its checkpoint."""
        self.thread.stepped(step, seconds)

    def between(self) -> None:
        """The loop has ended. What follows, if the run goes back, is a start-up."""
        self.thread.start_again(has_stepped=False)

    def rest(self) -> None:
        """No collective follows: each rank ends when it is ready."""
        self.is_over = True

    def leaves(self) -> None:
        """An error ends this rank, which closes its files: that may take a while."""
        self.is_leaving = True

    def beat(self, number: int) -> Beat:
        thread, doing = self.thread, self.thread.doing
        return Beat(
            number=number, node=self.node, step=thread.step, doing=LEFT if self.is_over else doing, place=thread.place,
            still_seconds=round(thread.still_seconds, 2), busy_share=thread.busy_share,
            idle_seconds=round(thread.idle_seconds, 2), allowed_seconds=self._limit(self.limits.allowed),
            lookout_seconds=self._limit(self.limits.lookout),
        )  # fmt: skip

    def _limit(self, limit: Callable[..., float]) -> float:
        """Of what this rank does now."""
        longest_wait = self.thread.waits.idle().longest_seconds
        return limit(self.thread.doing, longest_step=self.thread.longest_step, longest_wait=longest_wait)

    # In the training thread, when it has an error.

    def failed(self, error: Exception) -> RankEnded | None:
        """What ends this rank in place of an error; None: the error itself, which every rank raises. Called again: the
        same. A broken connection is a consequence: its cause is waited for."""
        if isinstance(error, RankEnded):
            return error
        if isinstance(error, Gpt4MoeError):
            lines = [f"rank {self.rank} on {self.node} ended alone: {error.cause}", error.cure]
            self._claim(
                End(rank=self.rank, status=error.exit_code, lines=lines, grace_seconds=_PATIENT, is_shared=True),
                says=False,
            )
            return None
        if self.world_size == 1:
            return None
        if is_broken_connection(error):
            return self._ended(self._cause_of(error))
        line = f"rank {self.rank} on {self.node} failed in step {self.thread.step + 1}: {summary(error)}"
        end = self._claim(End(rank=self.rank, status=1, lines=[line]), below="".join(traceback.format_exception(error)))
        if end.lines == [line]:
            time.sleep(3 * self.call.interval)  # this process may serve the store: the others read it first
        return self._ended(end)

    def _say_for(self, end: End) -> None:
        """On rank 0, the error that another rank alone has: that one prints nothing, for it counts on rank 0."""
        if end.is_shared and self.rank == 0 and not self.has_said:
            self.has_said = True
            say(*end.lines)

    def _ended(self, end: End) -> RankEnded:
        self._say_for(end)
        return RankEnded(end.lines[0], end.status)

    def _cause_of(self, error: Exception) -> End:
        """Why a connection broke: what the rank that failed has said, or that one is silent."""
        self.call.want("lost")
        until = time.monotonic() + 2 * self.call.patience + 10
        while self.call.end is None and time.monotonic() < until:
            if self.call.is_reader and (silent := self.call.silent()):
                return self._claim(End(rank=self.rank, status=HUNG, lines=[lost(self.call.beats, silent)]))
            if self.call.seconds_unanswered > self.call.patience:
                return self._claim(End(rank=self.rank, status=HUNG, lines=[_STORE_GONE]))
            time.sleep(self.call.interval / 4)
        line = f"rank {self.rank} on {self.node} lost a connection in step {self.thread.step + 1}, and no rank is lost"
        return self._claim(End(rank=self.rank, status=HUNG, lines=[f"{line}: {summary(error)}"]))

    def _claim(self, end: End, *, says: bool = True, below: str = "") -> End:
        """Ends every rank for this reason, unless one has given another. Returns: the reason that counts."""
        try:
            if self.call.claim(end) and says:
                say(*end.lines, below.rstrip())
        except RuntimeError:  # the store has gone, or is stopped
            self.call.end = end
            if says and self.files.is_first_to_tell():
                say(*end.lines, below.rstrip())
        assert self.call.end is not None
        return self.call.end

    # In the watchdog's thread.

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(self.call.interval / 2):
            was, looked = looked, time.monotonic()
            try:
                self.look(looked - was)
            except Exception as error:  # the watch goes on
                if not self.has_erred:
                    self.has_erred = True
                    say(f"the watchdog of rank {self.rank} has an error and goes on: {summary(error)}.", kind="warning")

    def look(self, seconds: float) -> None:
        """Sees whether the training thread moves, and draws the conclusion. Args: seconds: since the last look."""
        if seconds > self.call.patience:  # this process was stopped, and the others may have been too
            self.thread.start_again(has_stepped=self.thread.has_stepped)
            self.call.forget()
        self.thread.look(2 * self.call.interval)
        if self.call.end is not None:
            self._leave(self.call.end)
        elif not self.is_over:
            self._judge()

    def _judge(self) -> None:
        call, thread = self.call, self.thread
        allowed, lookout = self._limit(self.limits.allowed), self._limit(self.limits.lookout)
        still, idle = thread.still_seconds, thread.idle_seconds
        self._warn(still, allowed)
        silence = lookout / 2 if thread.doing else lookout
        if call.looks_for != "lost":
            call.want("hang" if still > lookout / 2 or (self.rank == 0 and idle > allowed) else "", silence)
        if not call.looks_for or not self.limits.hang_seconds:
            return
        if call.seconds_unanswered > max(call.patience, silence) and still > lookout:
            self._tell_without_store(still)
        if not call.is_reader or not call.has_read:
            return
        beats, silent = call.beats, call.silent()
        live = [beat for rank, beat in beats.items() if rank not in silent and beat.doing != LEFT]
        # A deputy stands in for rank 0 alone; where no rank is silent, that one judges.
        if silent or self.rank == 0:
            what = why_hung(live, is_rank_lost=bool(silent), slack=2 * call.interval)
            # The beats may be older than what this rank sees of itself.
            if what and (still > lookout / 2 or idle > allowed):
                self._tell(beats, silent, what)

    def _warn(self, still: float, allowed: float) -> None:
        """On rank 0, once at half of the limit."""
        if still < allowed / 2:
            self.is_warned = False
        elif self.rank == 0 and not self.is_warned:
            self.is_warned = True
            where = (
                f"rank 0 has not moved for {still:.0f} s, {self.thread.place.words or 'at a place that is not known'}"
            )
            text = f"{where}; where no rank moves for {allowed:.0f} s, the launch ends with {HUNG}"
            say(f"{text}. resilience.hang_seconds sets that; 0: never.", kind="warning")
            if self.events is not None:  # where the run folder's disk stands still, this thread must go on
                fields = {"step": self.thread.step, "name": "watchdog", "text": text}
                threading.Thread(target=self.events.write, args=("alert",), kwargs=fields, daemon=True).start()

    def _tell(self, beats: Mapping[int, Beat], silent: list[int], what: str) -> None:
        """Says who hangs, and ends every rank."""
        lines = told(beats, silent, what=what)
        lines[1] += f" Stacks of all ranks: {self.files.folder}"
        end = End(rank=self.rank, status=HUNG, lines=lines, writes_stacks=True, grace_seconds=0.0)
        if self._claim(end) == end:
            self._end_after(_WRITING, HUNG)
            self._close_events()
            self.files.write_events(self.thread.step, lines)

    def _tell_without_store(self, still: float) -> None:
        """The process that serves the store is stopped or lost, as every rank finds by itself. One tells it."""
        patience = self.call.patience
        self._end_after(_WRITING + 2 * patience, HUNG)
        self.files.write(self.beat(0).encode())
        what = f"Nothing has moved for {still:.0f} s"
        if self.files.is_first_to_tell():
            time.sleep(patience)  # until the others have found it too
            beats = {rank: Beat.decode(text) for rank, text in self.files.beats().items()}
            where = f"{told(beats, [0], what=what)[1]} Stacks of these ranks: {self.files.folder}"
            lines = [f"{what}: {_STORE_GONE}", where]
            say(*lines)
            self.files.write_events(self.thread.step, lines)
        else:
            time.sleep(2 * patience)  # a launcher ends all soon after the first
        os._exit(HUNG)

    def _leave(self, end: End) -> None:
        """Ends this process, unless the training thread leaves by itself before."""
        # A launcher ends all when one has left, and rank 0 may serve the store, in which the others read why.
        waits = (2 if end.writes_stacks else 0) + (1 if self.rank == 0 and self.world_size > 1 else 0)
        until = time.monotonic() + end.grace_seconds + waits * self.call.interval
        try:
            if end.writes_stacks:
                self._end_after(_WRITING + waits * self.call.interval, end.status)
                self._close_events()
                self.files.write(self.beat(0).encode())
            began = time.monotonic()
            while time.monotonic() < until or (
                self.is_leaving and not end.writes_stacks and time.monotonic() < began + _LEAVING
            ):
                if self._stop.wait(0.05):
                    return
            self._end_after(_WRITING, end.status)
            if not self.is_leaving:
                self._say_for(end)
            if self.events is not None and not end.writes_stacks:
                self.events.write("stop", step=self.thread.step, reason="RankEnded", is_error=True, cause=end.lines[0])
                self.events.close()
        except BaseException as error:
            say(f"the watchdog of rank {self.rank} has an error: {summary(error)}.", kind="warning")
        os._exit(end.status)

    def _close_events(self) -> None:
        """A launch has one stop: the training thread's broken connection is a consequence."""
        if self.events is not None:
            self.events.close()

    def _end_after(self, seconds: float, status: int) -> None:
        """Ends this process, whatever blocks this thread."""
        timer = threading.Timer(seconds, lambda: self._stop.is_set() or os._exit(status))
        timer.daemon = True
        timer.start()


_STORE_GONE = (
    "rank 0 is stopped, killed or lost with its node: the ranks' store, which it serves, does not answer."
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    else "the first node's launcher is stopped, killed or lost: the ranks' store, which it serves, does not answer."
)
