"""A Slurm of two virtual nodes for the tests: started and stopped by the scripts beside this file."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A shell inside some other cluster's job must not leak its job into ours.
FOREIGN = ("SLURM", "SBATCH", "SRUN", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
GONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}


@dataclass(frozen=True, slots=True)
class SlurmLab:
    """A running cluster of `start`, until `stop`. Its files are in `folder`."""

    folder: Path

    @classmethod
    def start(cls, folder: Path, nodes: int = 2, cpus: int = 8) -> "SlurmLab":
        command = [HERE / "start.sh", folder, str(nodes), str(cpus), str(_free_ports(nodes + 1))]
        subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
        return cls(folder)

    def stop(self) -> None:
        subprocess.run([HERE / "stop.sh", self.folder], check=True, timeout=60, stdin=subprocess.DEVNULL)

    def call(self, *command: str, cwd: Path | None = None, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Runs a command that sees this cluster, with `variables` in its environment."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        own |= {"SLURM_CONF": str(self.folder / "slurm.conf"), **variables}
        return subprocess.run(
            command, cwd=cwd, env=own, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
        )

    def submit(self, *command: str, cwd: Path, **variables: str) -> int:
        """The number of the job that `command` (sbatch, or a script that calls it) submits."""
        answer = self.call(*command, cwd=cwd, **variables)
        number = re.search(r"Submitted batch job (\d+)", answer.stdout)
        assert number, answer.stdout + answer.stderr
        return int(number.group(1))

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, TimeLimit ..."""
        text = self.call("scontrol", "show", "job", "-o", str(number)).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: int, seconds: float, *states: str) -> dict[str, str]:
        """The job, once it is in one of `states` (default: any final one). Fails when it takes longer."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number)).get("JobState") not in (states or GONE):
            assert time.monotonic() < deadline, f"job {number} is still {job.get('JobState')} {job.get('Reason')}"
            time.sleep(0.2)
        return job

    def start_again(self, number: int) -> None:
        """Lets a requeued job start soon; by itself it would wait two minutes.

        Not at once: a credential made in the second of the requeue counts as revoked, and the job would fail.
        """
        self.call("scontrol", "update", f"jobid={number}", "StartTime=now+3")


def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on, below the kernel's ephemeral ones."""
    start = 10000 + os.getpid() * 16 % 9000
    for first in range(start, start + 900, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError(f"no {count} free ports in a row after {start}")
