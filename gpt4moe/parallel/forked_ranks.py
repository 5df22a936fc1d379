"""start_forked: ranks that share one process's imports, as children of this one. No torch.

    this process           starts fork_ranks (gpt4moe/fork_ranks.py), reads the ranks' numbers from a pipe
    fork_ranks             imports what every rank needs, forks the ranks, ends
    the ranks              belong to this process then (PR_SET_CHILD_SUBREAPER), which waits for them as for its own

Four ranks that import by themselves take four times 4 s of two cores before their first step; and on a shared disk each
file is read as often.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt4moe.parallel.rank_processes import PR_SET_PDEATHSIG, Ranks, shared_variables

_PR_SET_CHILD_SUBREAPER = 36
_ROOT = Path(__file__).resolve().parents[2]
_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
"""NVIDIA's and AMD's. A fork of a process whose imports asked a driver for its devices cannot use them, and whether an
import asks was seen on no GPU."""


def may_fork(num_ranks: int, is_module: bool, program: str) -> bool:
    """Whether ranks of `program` (a module's name, or a file) can share imports: several, on CPUs, of this project."""
    is_ours = program.startswith("gpt4moe.") if is_module else Path(program).resolve().parent == _ROOT / "tools"
    return num_ranks > 1 and is_ours and not any(map(os.path.exists, _DEVICES))


def start_forked(num_ranks: int, words: Sequence[str], variables: Mapping[str, str], started: Ranks) -> bool:
    """Starts the ranks. Returns: False where their parent did not start them; then none runs.

    A signal that ends the launch ends the imports at once: no rank is there to end in its own way.

    Args:
        words: "-m" and a module, or a file; then its arguments.
        variables, started: as of start_ranks.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = os.pipe()
    parent = _Imports(
        [sys.executable, "-m", "gpt4moe.fork_ranks", str(num_ranks), str(theirs), *words],
        env={**shared_variables(num_ranks), "DS_ACCELERATOR": "cpu", **variables}, pass_fds=[theirs],
        start_new_session=True, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )  # fmt: skip
    os.close(theirs)
    started.processes = [parent]
    if started.asked is not None:  # the signal came before it was there
        parent.kill()
    with open(ours, encoding="ascii") as pipe:
        numbers = [int(line) for line in pipe]
    parent.wait()
    forked = [_Forked(number) for number in numbers]
    if len(forked) < num_ranks or started.asked is not None:
        for process in forked:
            process.kill()
            process.wait()
        started.processes = []
        return False
    started.processes = forked
    if started.asked is not None:  # the signal came meanwhile
        for process in forked:
            process.send_signal(signal.Signals[started.asked])
    return True


class _Imports(subprocess.Popen[bytes]):
    """The ranks' parent. It has nothing to save."""

    def send_signal(self, sig: int) -> None:
        if sig != signal.SIGUSR1:  # which asks a rank to save and go on
            super().send_signal(signal.SIGKILL)


class _Forked:
    """A rank that another process has started, as subprocess.Popen would be."""

    def __init__(self, number: int):
        self.number = number
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        return self._wait(0) or 0

    def send_signal(self, sig: int, /) -> None:
        if self.poll() is None:
            os.kill(self.number, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                number, status = os.waitpid(self.number, options)
            except ChildProcessError:  # a signal handler's poll came first, or whoever started us ignores SIGCHLD
                number, status = self.number, 0
            if number:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode
