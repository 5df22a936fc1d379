"""python -m gpt4moe.launch_ranks: starts the ranks of one machine, and ends with the status of the rank that decided.

    python -m gpt4moe.launch_ranks --nproc-per-node 4 -m gpt4moe.train +experiment=tiny parallel=tp2_pp2_ep2 run.name=a
    python -m gpt4moe.launch_ranks --nproc-per-node 4 tools/evaluate.py runs/a --tp 2 --pp 2 --ep 2 --data data/demo

torchrun starts ranks too, on several machines and with restarts. Whatever its ranks ended with, its own status is 1,
behind 35 lines of traceback. Here:

    exit status    of the rank whose failure is the cause, by the rule of slurm/rank.sh; 128 + n: signal n killed it
    a rank killed  one line that names it; the others are ended after 5 s, for they wait for it in vain
    signals        INT, HUP, TERM, USR1 and USR2 are handed to every rank; a second Ctrl-C ends them within 5 s
    kill -9        of this process ends its ranks too

It imports no torch: it starts at once, and needs no memory beside the ranks.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

from gpt4moe.errors import Gpt4MoeError, LaunchError
from gpt4moe.parallel.local_ranks import free_port
from gpt4moe.resilience.hangs import HUNG
from gpt4moe.resilience.signals import INTERRUPTED, SIGNALS
from gpt4moe.runlog.command_line import print_error

_LOOK_SECONDS = 0.05
_BROKEN_SECONDS = 5.0
"""Between the death of a rank and the end of the others, by force: they fail by themselves on the broken connection."""
_LEAVING_SECONDS = 120.0
"""The same after a rank that ended by itself: the first one may still write the report or finish its wandb run."""
_SAME_PRESS_SECONDS = 1.0
_EXIT_IS_LATER, _ABORT_IS_LATER = 2.0, 4.0
"""Seconds. A rank that fails may do so because another was killed, one that aborts (NCCL's watchdog, gloo) because
another has failed or was killed: within these seconds it is not the cause."""
_PR_SET_PDEATHSIG = 1


@dataclass(kw_only=True, slots=True)
class Ranks:
    """The processes of one launch, for as long as one of them lives."""

    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ended: dict[int, float] = field(default_factory=dict)
    """Rank -> when its end was seen; without those that were ended from here."""
    kill_at: float | None = None
    sent: set[int] = field(default_factory=set)
    """What ended the others from here: -TERM, -KILL, as return codes say it."""
    interrupted: float | None = None
    """When Ctrl-C first came."""

    def start(self, num_ranks: int, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Starts each rank in a session of its own, so that a terminal's Ctrl-C comes to this process alone."""
        port = str(free_port())
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks)}
        common |= {"LOCAL_WORLD_SIZE": str(num_ranks)}
        if num_ranks > 1:
            common = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **variables, **common}
        libc = ctypes.CDLL(None)
        for rank in range(num_ranks):
            own = {**variables, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(
                subprocess.Popen(
                    command, env=own, start_new_session=True,
                    preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
                )
            )  # fmt: skip

    def wait(self) -> None:
        """Until all have ended. The first that does not end well ends the others."""
        while any(process.poll() is None for process in self.processes):
            self._look()
            time.sleep(_LOOK_SECONDS)
        self._look()

    def send(self, number: int, frame: FrameType | None = None) -> None:
        """Hands a signal to every rank; the second Ctrl-C is the last."""
        now = time.monotonic()
        if number == signal.SIGINT:
            self.interrupted = self.interrupted or now
            if now - self.interrupted > _SAME_PRESS_SECONDS:
                self._end_by(now + _BROKEN_SECONDS)
        for process in self.processes:
            process.send_signal(number)  # nothing for one that has ended

    def status(self) -> int:
        """The launch's exit status; prints which rank was killed."""
        failed = {rank: when for rank, when in self.ended.items() if self.processes[rank].returncode}
        if not failed:  # at the second Ctrl-C all may have been ended by force
            return INTERRUPTED if any(process.returncode for process in self.processes) else 0
        rank = min(failed, key=lambda it: failed[it] + _later(self.processes[it].returncode))
        code = self.processes[rank].returncode
        if code >= 0:
            return int(code)
        print_error(
            f"Rank {rank} was killed by {signal.Signals(-code).name}"
            f"{', as the system does when memory runs out' if code == -signal.SIGKILL else ''}.",
            "The same command goes on from what was saved.",
        )
        return int(128 - code)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _look(self) -> None:
        now = time.monotonic()
        if self.kill_at is not None and now > self.kill_at:
            self.kill_at = None
            self.sent.add(-signal.SIGKILL)
            for process in self.processes:
                process.kill()
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if code is None or rank in self.ended or code in self.sent:
                continue
            self.ended[rank] = now
            if code > 0 and not self.sent:
                self.sent.add(-signal.SIGTERM)
                for other in self.processes:
                    other.terminate()
            if code:
                is_leaving = code > 0 and code != HUNG  # a rank that hangs does not leave by itself
                self._end_by(now + (_LEAVING_SECONDS if is_leaving else _BROKEN_SECONDS))

    def _end_by(self, when: float) -> None:
        self.kill_at = when if self.kill_at is None else min(self.kill_at, when)


def _later(code: int) -> float:
    return _EXIT_IS_LATER if code > 0 else _ABORT_IS_LATER if code == -signal.SIGABRT else 0.0


def launch(num_ranks: int, command: Sequence[str], variables: Mapping[str, str] = os.environ) -> int:
    """Runs `command` on `num_ranks` ranks of this machine. Returns: the exit status. In the main thread only."""
    ranks = Ranks()
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ranks.send) for number in heard}
    try:
        ranks.start(num_ranks, command, variables)
        ranks.wait()
    finally:
        ranks.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    return ranks.status()


def main(arguments: list[str]) -> int:
    """Exit status: as above; 2 for arguments that it does not know."""
    parser = argparse.ArgumentParser(
        prog="python -m gpt4moe.launch_ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc-per-node", "--nproc", type=int, required=True, metavar="N", help="ranks to start")
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module, not a file")
    parser.add_argument("program", help="the module or file that each rank runs")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    given = parser.parse_args(arguments)
    try:
        if given.nproc_per_node < 1:
            raise LaunchError(f"--nproc-per-node {given.nproc_per_node} starts no rank.", "Set 1 or more.")
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    module = ["-m"] if given.module else []
    return launch(given.nproc_per_node, [sys.executable, *module, given.program, *given.rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
