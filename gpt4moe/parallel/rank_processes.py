"""Ranks: the processes of one launch on this machine, watched until the last has ended. No torch.

    a rank ends with a status  ->  TERM to the others, not at Ctrl-C; after 120 s KILL, 5 s where ranks hang
    a signal kills a rank      ->  5 s later KILL for the others: they wait for it in vain
    a signal ends the launch   ->  a line; those that have not ended after patience_seconds are named, and KILL
    status()                   ->  the rank that decided, by the rule of slurm/rank.sh

launch_ranks (a command for people) and drill (planted faults) start their ranks and hand them to this class.
"""

import ctypes
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from types import FrameType
from typing import BinaryIO, Protocol

from gpt4moe.errors import HUNG, INTERRUPTED
from gpt4moe.parallel.environment import SAME_PRESS_SECONDS
from gpt4moe.parallel.layout import ranks_text
from gpt4moe.parallel.local_ranks import free_port

_LOOK_SECONDS = 0.05
_BROKEN_SECONDS = 5.0
"""Between the death of a rank and the end of the others, by force: they fail by themselves on the broken connection."""
_LEAVING_SECONDS = 120.0
"""The same after a rank that ended by itself: the first one may still write the report or finish its wandb run."""
_EXIT_IS_LATER, _ABORT_IS_LATER = 2.0, 4.0
"""Seconds. A rank that fails may do so because another was killed, one that aborts (NCCL's watchdog, gloo) because
another has failed or was killed: within these seconds it is not the cause."""
PR_SET_PDEATHSIG = 1


class RankProcess(Protocol):
    """What subprocess.Popen is; negative return codes are signals."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int, /) -> None:
        """Nothing for a process that has ended."""

    def kill(self) -> None: ...

    def wait(self) -> int: ...


@dataclass(kw_only=True, slots=True)
class Ranks:
    """In the order of ranks. Owned by whoever started them, for as long as one of them lives."""

    patience_seconds: float = inf
    """After a signal that ends the launch, until those that still run are killed."""
    say: Callable[[str], None] = lambda text: None
    """Prints a line; called in a signal handler too."""
    processes: Sequence[RankProcess] = ()
    ended: dict[int, float] = field(default_factory=dict)
    """Rank -> when its end was seen; without those that were ended from here."""
    kill_at: float | None = None
    sent: set[int] = field(default_factory=set)
    """What ended the others from here: -TERM, -KILL, as return codes say it."""
    interrupted: float | None = None
    """When Ctrl-C first came."""
    asked: str | None = None
    """The first signal that ends the launch."""

    def wait(self, look: Callable[[], None] = lambda: None) -> None:
        """Until all have ended. Args: look: called now and then meanwhile."""
        while any([process.poll() is None for process in self.processes]):
            self._look()
            look()
            time.sleep(_LOOK_SECONDS)
        self._look()

    def send(self, number: int, frame: FrameType | None = None) -> None:
        """Hands a signal to every rank; the second Ctrl-C is the last."""
        now = time.monotonic()
        if number != signal.SIGUSR1 and self.asked is None:
            self.asked = signal.Signals(number).name
            self._end_by(now + self.patience_seconds)
            second = f"; a second Ctrl-C ends them within {_BROKEN_SECONDS:g} s" if number == signal.SIGINT else ""
            self.say(
                f"{self.asked}: handed to the ranks, to end in their own way. Those that still run in "
                f"{self.patience_seconds:g} s are killed{second}."
            )
        if number == signal.SIGINT:
            self.interrupted = self.interrupted or now
            if now - self.interrupted > SAME_PRESS_SECONDS:
                self._end_by(now + _BROKEN_SECONDS)
        for process in self.processes:
            process.send_signal(number)

    def status(self) -> tuple[int, int | None]:
        """The exit status of the launch, when all have ended, and the rank that was killed (status - 128: the signal);
        None: no rank was."""
        failed = {rank: when for rank, when in self.ended.items() if self._code(rank)}
        if not failed:  # after a signal all may have been ended by force
            forced = INTERRUPTED if self.interrupted is not None else 128 + signal.SIGKILL
            return (forced if any(process.returncode for process in self.processes) else 0), None
        rank = min(failed, key=lambda it: failed[it] + _later(self._code(it)))
        code = self._code(rank)
        return (code, None) if code >= 0 else (128 - code, rank)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _code(self, rank: int) -> int:
        return self.processes[rank].returncode or 0

    def _look(self) -> None:
        now = time.monotonic()
        if self.kill_at is not None and now > self.kill_at:
            self.kill_at = None
            self.sent.add(-signal.SIGKILL)
            running = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
            if self.asked is not None and running:
                self.say(f"Still running after {self.asked}, and killed now: {ranks_text(running)}.")
            for process in self.processes:
                process.kill()
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if code is None or rank in self.ended or code in self.sent:
                continue
            self.ended[rank] = now
            # After a Ctrl-C each ends by itself; to a rank a TERM now would be the second one, which leaves at once.
            if code > 0 and not self.sent and self.interrupted is None:
                self.sent.add(-signal.SIGTERM)
                for other in self.processes:
                    other.send_signal(signal.SIGTERM)
            if code:
                is_leaving = code > 0 and code != HUNG
                self._end_by(now + (_LEAVING_SECONDS if is_leaving else _BROKEN_SECONDS))

    def _end_by(self, when: float) -> None:
        self.kill_at = when if self.kill_at is None else min(self.kill_at, when)


def _later(code: int) -> float:
    return _EXIT_IS_LATER if code > 0 else _ABORT_IS_LATER if code == -signal.SIGABRT else 0.0


def rank_variables(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun would set for each rank of this machine. They meet at a free port."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def start_ranks(
    num_ranks: int,
    command: Sequence[str],
    variables: Mapping[str, str],
    started: Ranks,
    *,
    output: BinaryIO | None = None,
) -> None:
    """Starts each rank in a session of its own, so that a terminal's Ctrl-C comes to this process alone.

    kill -9 of this process kills them too.

    Args:
        variables: of this process; several ranks get one thread each, where nothing else is set.
        started: gets each process as soon as it runs.
        output: an open file for what ranks print; by default they print where this process does.
    """
    shared = shared_variables(num_ranks)
    libc = ctypes.CDLL(None)
    for own in rank_variables(num_ranks):
        process = subprocess.Popen(
            command, env={**shared, **variables, **own}, start_new_session=True, stdout=output, stderr=output,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )  # fmt: skip
        started.processes = [*started.processes, process]
        if started.asked is not None:  # the signal came before this rank was there
            process.send_signal(signal.Signals[started.asked])


def shared_variables(num_ranks: int) -> dict[str, str]:
    """What all ranks get where nothing else is set: several have one thread each."""
    return {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} if num_ranks > 1 else {}
