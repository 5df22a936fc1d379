"""TrainingThread: what the watchdog sees of the thread that trains: since when it has not moved, and where it stands.

A thread moves when its frames change, when a step or a pause ends, and, in a pause, when it computes or its process
reads and writes: a long sum over a file is one line of Python. In doubt it moves.
"""

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt4moe.resilience.standing import Place, is_debugged, mark, place_of, waits_in_collective
from gpt4moe.runlog.waits import START_UP, Waits
from gpt4moe.training.hang_files import pending, recorder

_LOOKS = 120
"""Of which the share outside collectives is taken."""
_WORKING_SHARE = 0.01
"""Of the time between two looks. A thread that polls in a sleep computes for less."""
_WORKING_BYTES = 2**20
"""Read or written between two looks. A log or a board takes less."""


class TrainingThread:
    """Of one rank; made in that thread.

    Args:
        device_type: cuda: the thread runs ahead of its device, so torch's recorder says where that stands; and it
            computes while it waits.
    """

    def __init__(self, device_type: str):
        self.is_cuda, self.ident = device_type == "cuda", threading.get_ident()
        self.groups: Mapping[int, tuple[str, str]] = {}
        """Id of a process group -> our name of it, and torch's."""
        self.waits = Waits()
        self.step, self.longest_step, self.has_stepped = 0, 0.0, False
        self.place = Place()
        self._clock = time.pthread_getcpuclockid(self.ident)
        self._step_ended = self._moved = self._looked = time.monotonic()
        self._mark, self._worked = 0, (0.0, 0)
        self._looks: deque[bool] = deque(maxlen=_LOOKS)

    def stepped(self, step: int, seconds: float) -> None:
        self.step, self._step_ended, self.has_stepped = step, time.monotonic(), True
        self.longest_step = max(self.longest_step, seconds)

    def start_again(self, *, has_stepped: bool) -> None:
        """What was seen before says nothing of what comes: this process was stopped, or another start-up begins."""
        self._moved = self._step_ended = self._looked = time.monotonic()
        self.has_stepped, self.place = has_stepped, Place()

    @property
    def doing(self) -> str:
        """As in a beat."""
        kind = self.waits.idle().kind
        return START_UP if not self.has_stepped else "" if kind == START_UP else kind

    @property
    def idle_seconds(self) -> float:
        """Since the last step ended, or since a pause began or ended after it."""
        return min(time.monotonic() - self._step_ended, self.waits.idle().seconds)

    @property
    def still_seconds(self) -> float:
        """Since it moved."""
        return min(time.monotonic() - self._moved, self.idle_seconds)

    @property
    def busy_share(self) -> float:
        """Of the last looks during steps, those that found it outside a collective."""
        looks = list(self._looks)
        return round(sum(looks) / len(looks), 3) if looks else 1.0

    def look(self, place_after: float) -> None:
        """Args: place_after: seconds without a move after which is seen where it stands: that reads locals."""
        now, frame = time.monotonic(), sys._current_frames().get(self.ident)
        seen, waits = mark(frame), waits_in_collective(frame)
        if is_debugged(frame):  # somebody reads the screen
            self.start_again(has_stepped=self.has_stepped)
        elif seen != self._mark or self._works(now - self._looked, is_waiting=waits):
            self._mark, self._moved, self.place = seen, now, Place()
        elif self.still_seconds <= place_after:
            self.place = Place()
        elif not self.place.at:
            self.place = self._place()
        self._looked = now
        if self.has_stepped and not self.doing:
            self._looks.append(not waits)

    def _works(self, seconds: float, *, is_waiting: bool) -> bool:
        """Whether the thread works at one place. Outside pauses a step says it."""
        if not self.doing:
            return False
        (computed, moved), self._worked = self._worked, (time.clock_gettime(self._clock), _bytes_moved())
        computes = self._worked[0] - computed > _WORKING_SHARE * seconds and not (self.is_cuda or is_waiting)
        return computes or self._worked[1] - moved > _WORKING_BYTES

    def _place(self) -> Place:
        """Of the training thread, or of a thread of torch that runs its backward pass. Locals are read here alone."""
        names = {group: names[0] for group, names in self.groups.items()}
        stacks = sys._current_frames()
        place = place_of(stacks.get(self.ident), names)
        if place.is_backward and not place.collective:
            known = {thread.ident for thread in threading.enumerate() if "Dummy" not in thread.name}
            inner = [place_of(frame, names) for thread, frame in stacks.items() if thread not in known]
            place = replace(next((one for one in inner if one.collective), place), is_backward=True)
        if self.is_cuda or (place.is_backward and not place.collective):
            collective, group = pending(recorder(), {torch: ours for ours, torch in self.groups.values()})
            if collective:
                place = replace(place, collective=collective, group=group)
        return place

    def knows(self, groups: Mapping[str, Any]) -> None:
        """Names of process groups; where two are one object, the first counts."""
        from torch import distributed

        groups = {**groups, "world": distributed.group.WORLD}
        self.groups = {id(group): (name, group.group_name) for name, group in reversed(list(groups.items()))}


def _bytes_moved() -> int:
    """Read and written by this process; sockets of gloo and NCCL do not count."""
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(": ") for line in Path(f"/proc/{os.getpid()}/io").read_text().splitlines())
        return int(lines["rchar"]) + int(lines["wchar"])
    return 0
