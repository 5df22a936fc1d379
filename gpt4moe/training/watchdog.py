"""Watchdog: a thread of each rank that sees when the launch hangs, and ends the rank when the launch has failed.

    training thread --frames--> has it moved? where does it stand?  --beat--> RollCall --> board <-- other ranks' beats
    all ranks stand still  --> rank 0, or a deputy: two lines, event `hang` --> every rank: stacks, exit 86
    an error, a broken connection --> failed(), in the training thread: who was it? --> the others end with that line

A step does nothing for this, and no collective is added. The watchdog never asks the store itself: that may block.
"""

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gpt4moe.errors import Gpt4MoeError, RankEnded
from gpt4moe.parallel.board import Board
from gpt4moe.parallel.environment import Environment
from gpt4moe.resilience.hangs import HUNG, Beat, End, Limits, is_hang, lost, told
from gpt4moe.resilience.standing import Place, mark, place_of, waits_in_collective
from gpt4moe.runlog.events_log import EventsLog
from gpt4moe.runlog.waits import START_UP, Waits
from gpt4moe.training.hang_files import HangFiles, pending, recorder, say, summary
from gpt4moe.training.roll_call import LEFT, RollCall, beat_seconds

_LOST_SECONDS = 30.0
"""Between steps no more is waited for a silent rank."""
_LOOKS = 120
"""At the training thread, of which the share outside collectives is taken."""
_PATIENT = 15.0
"""Seconds in which ranks end by themselves after an error that all of them should have."""


class Watchdog:
    """Of one rank, from when the ranks have met until it leaves. Made in the training thread.

    Args:
        device_type: cuda: the training thread runs ahead of its device, so torch's recorder says where that stands.
    """

    def __init__(self, environment: Environment, limits: Limits, run_folder: Path, device_type: str):
        self.rank, self.world_size, self.limits = environment.rank, environment.world_size, limits
        board = Board.connect(environment)
        self.files = HangFiles(run_folder, board.token, self.rank)
        self.call = RollCall(board, self.world_size, beat_seconds(self.world_size, limits.hang_seconds), self.beat)
        self.node, self.is_cuda, self.thread = os.uname().nodename, device_type == "cuda", threading.get_ident()
        self.groups: Mapping[int, tuple[str, str]] = {}
        self.waits = Waits()
        self.events: EventsLog | None = None
        self.step, self.step_ended, self.longest_step, self.has_stepped = 0, time.monotonic(), 0.0, False
        self.moved, self.mark, self.place = time.monotonic(), 0, Place()
        self.looks: deque[bool] = deque(maxlen=_LOOKS)
        self.is_over = self.is_warned = self.has_said = False
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self.call.start()
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Raises: RankEnded instead of an error that is not a Gpt4MoeError."""
        ended = self.failed(error) if isinstance(error, Exception) else None
        if ended is not None:
            raise ended from None  # the threads live on: they end the process if the groups cannot be destroyed
        self.is_over = True
        self._stop.set()
        self.call.stop()

    def knows(self, groups: Mapping[str, Any]) -> None:
        """Names of process groups; where two are one object, the first counts."""
        from torch import distributed

        groups = {**groups, "world": distributed.group.WORLD}
        self.groups = {id(group): (name, group.group_name) for name, group in reversed(list(groups.items()))}

    def follow(self, waits: Waits, step: int, events: EventsLog | None) -> None:
        """Training begins after this step.

        Args:
            waits, events: of its launch; events on rank 0 alone.
        """
        self.waits, self.step, self.events = waits, step, events

    def stepped(self, step: int, seconds: float) -> None:
        """A step has ended, with its checkpoint."""
        self.step, self.step_ended, self.has_stepped = step, time.monotonic(), True
        self.longest_step = max(self.longest_step, seconds)

    def between(self) -> None:
        """The loop has ended. What follows, if the run goes back, is a start-up."""
        self.has_stepped, self.step_ended = False, time.monotonic()

    def rest(self) -> None:
        """No collective follows: each rank ends when it is ready."""
        self.is_over = True

    def beat(self, number: int) -> Beat:
        now, doing = time.monotonic(), self._doing()
        idle = now - self.step_ended
        return Beat(
            number=number, node=self.node, step=self.step, doing=LEFT if self.is_over else doing, place=self.place,
            still_seconds=round(now - self.moved, 2), busy_share=self.busy_share,
            idle_seconds=round(min(idle, self.waits.idle().seconds) if doing else idle, 2),
        )  # fmt: skip

    @property
    def busy_share(self) -> float:
        """Of the last looks at the training thread during steps, those that found it outside a collective."""
        looks = list(self.looks)
        return round(sum(looks) / len(looks), 3) if looks else 1.0

    # In the training thread, when it has an error.

    def failed(self, error: Exception) -> RankEnded | None:
        """What ends this rank in place of an error; None: the error itself, which every rank raises. Called again: the
        same. A broken connection is a consequence: its cause is waited for."""
        if isinstance(error, RankEnded):
            return error
        if isinstance(error, Gpt4MoeError):
            lines = [f"rank {self.rank} on {self.node} ended alone: {error.cause}", error.cure]
            self._claim(End(status=error.exit_code, lines=lines, grace_seconds=_PATIENT), says=False)
            return None
        if self.world_size == 1:
            return None
        if is_broken_connection(error):
            return self._ended(self._cause_of(error))
        line = f"rank {self.rank} on {self.node} failed in step {self.step + 1}: {summary(error)}"
        end = self._claim(End(status=1, lines=[line]), below="".join(traceback.format_exception(error)))
        if end.lines == [line]:
            time.sleep(3 * self.call.interval)  # this process may serve the store: the others read it first
        return self._ended(end)

    def _say_for(self, end: End) -> None:
        """On rank 0, the error that another rank alone has: that one prints nothing, for it counts on rank 0."""
        if end.grace_seconds == _PATIENT and self.rank == 0 and not self.has_said:
            self.has_said = True
            say(*end.lines)

    def _ended(self, end: End) -> RankEnded:
        self._say_for(end)
        return RankEnded(end.lines[0], end.status)

    def _cause_of(self, error: Exception) -> End:
        """Why a connection broke: what the rank that failed has said, or that one is silent."""
        self.call.looks_for = "lost"
        until = time.monotonic() + 2 * self.call.patience + 10
        while self.call.end is None and time.monotonic() < until:
            if self.call.is_reader and (silent := self.call.silent()):
                return self._claim(End(status=HUNG, lines=[lost(self.call.beats, silent)]))
            if self.call.seconds_unanswered > self.call.patience:
                return self._claim(End(status=HUNG, lines=[_STORE_GONE]))
            time.sleep(self.call.interval / 4)
        line = f"rank {self.rank} on {self.node} lost a connection in step {self.step + 1}, and no rank is lost"
        return self._claim(End(status=HUNG, lines=[f"{line}: {summary(error)}"]))

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

    def _look(self) -> None:
        while not self._stop.wait(self.call.interval / 2):
            self._see_training_thread()
            if self.call.end is not None:
                self._leave(self.call.end)
            elif not self.is_over:
                self._judge()

    def _see_training_thread(self) -> None:
        now, frame = time.monotonic(), sys._current_frames().get(self.thread)
        seen = mark(frame)
        if seen != self.mark:
            self.mark, self.moved, self.place = seen, now, Place()
        elif not self.place.at and now - self.moved > 2 * self.call.interval:
            self.place = self._place()
        if self.has_stepped and not self._doing():
            self.looks.append(not waits_in_collective(frame))

    def _place(self) -> Place:
        """Of the training thread, or of a thread of torch that runs its backward pass. Locals are read here alone."""
        names = {group: names[0] for group, names in self.groups.items()}
        stacks = sys._current_frames()
        place = place_of(stacks.get(self.thread), names)
        if place.is_backward and not place.collective:
            known = {thread.ident for thread in threading.enumerate() if "Dummy" not in thread.name}
            inner = [place_of(frame, names) for thread, frame in stacks.items() if thread not in known]
            place = replace(next((one for one in inner if one.collective), place), is_backward=True)
        if self.is_cuda or (place.is_backward and not place.collective):
            collective, group = pending(recorder(), {torch: ours for ours, torch in self.groups.values()})
            if collective:
                place = replace(place, collective=collective, group=group)
        return place

    def _doing(self) -> str:
        kind = self.waits.idle().kind
        return START_UP if not self.has_stepped else "" if kind == START_UP else kind

    def _judge(self) -> None:
        call, still, doing = self.call, time.monotonic() - self.moved, self._doing()
        longest_wait = self.waits.idle().longest_seconds
        allowed = self.limits.allowed(doing, longest_step=self.longest_step, longest_wait=longest_wait)
        lookout = allowed if doing or not self.limits.hang_seconds else min(allowed, _LOST_SECONDS)
        idle = time.monotonic() - self.step_ended
        self._warn(still, allowed)
        if call.looks_for != "lost":
            call.looks_for = "hang" if still > lookout / 2 or (self.rank == 0 and idle > allowed) else ""
        if not call.looks_for or not self.limits.hang_seconds:
            return
        if call.seconds_unanswered > call.patience and still > lookout:
            self._tell_without_store(still)
        if not call.is_reader or len(call.beats) < self.world_size:
            return
        silent, slack = call.silent(), 2 * call.interval
        live = [beat for rank, beat in call.beats.items() if rank not in silent and beat.doing != LEFT]
        # A deputy stands in for rank 0 alone; where no rank is silent, that one judges.
        if (silent and is_hang(live, lookout, slack=slack)) or (self.rank == 0 and is_hang(live, allowed, slack=slack)):
            self._tell(call.beats, silent, still)

    def _warn(self, still: float, allowed: float) -> None:
        """On rank 0, once at half of the limit."""
        if still < allowed / 2:
            self.is_warned = False
        elif self.rank == 0 and not self.is_warned:
            self.is_warned = True
            where = f"rank 0 has not moved for {still:.0f} s, {self.place.words or 'at a place that is not known'}"
            text = f"{where}; where no rank moves for {allowed:.0f} s, the launch ends with {HUNG}"
            say(text + ".", kind="warning")
            if self.events is not None:
                self.events.write("alert", step=self.step, name="watchdog", text=text)

    def _tell(self, beats: Mapping[int, Beat], silent: list[int], seconds: float) -> None:
        """Says who hangs, and ends every rank."""
        lines = told(beats, silent, seconds=seconds)
        lines[1] += f" Stacks of all ranks: {self.files.folder}"
        end = End(status=HUNG, lines=lines, writes_stacks=True, grace_seconds=0.0)
        if self._claim(end) == end:
            self.files.write_events(self.step, lines)

    def _tell_without_store(self, still: float) -> None:
        """The process that serves the store is stopped or lost, as every rank finds by itself. One tells it."""
        self.files.write(self.beat(0).encode())
        lines = [f"Nothing has moved for {still:.0f} s: {_STORE_GONE}", ""]
        if self.files.is_first_to_tell():
            time.sleep(self.call.patience)  # until the others have found it too
            beats = {rank: Beat.decode(text) for rank, text in self.files.beats().items()}
            lines[1] = told(beats, [0], seconds=still)[1] + f" Stacks of these ranks: {self.files.folder}"
            say(*lines)
            self.files.write_events(self.step, lines)
        os._exit(HUNG)

    def _leave(self, end: End) -> None:
        """Ends this process, unless the training thread leaves by itself before."""
        if end.writes_stacks:
            self.files.write(self.beat(0).encode())
        teller_waits = 2 * self.call.interval if end.writes_stacks else 0.0  # a launcher ends all when one has left
        if self._stop.wait(end.grace_seconds + teller_waits):
            return
        self._say_for(end)
        if self.events is not None and not end.writes_stacks:
            self.events.write("stop", step=self.step, reason="RankEnded", is_error=True, cause=end.lines[0])
        os._exit(end.status)


_STORE_GONE = (
    "rank 0 is stopped, killed or lost with its node: the ranks' store, which it serves, does not answer."
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    else "the first node's launcher is stopped, killed or lost: the ranks' store, which it serves, does not answer."
)


def is_broken_connection(error: Exception) -> bool:
    """Whether torch lost another rank: NCCL's and the store's errors have a class of their own, gloo's have not."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
