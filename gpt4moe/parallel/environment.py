"""Which rank this process is, under torchrun, srun or plain python. No torch.

RANK and WORLD_SIZE     torchrun (or mpirun wrappers that set them)
an srun step            srun (parallel.slurm_job); python in a batch shell belongs to no step, so it is one process
neither                 one process
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

from gpt4moe.errors import LaunchError
from gpt4moe.parallel.slurm_job import SlurmJob

# Ranks start within a second of each other. Rank 0 waits for the others; they wait until it has ended.
FIRST_STAYS_SECONDS, OTHERS_STAY_SECONDS = 2.0, 6.0
SAME_PRESS_SECONDS = 1.0
"""A launcher and a terminal may both send the INT of one Ctrl-C. One that comes later is a second Ctrl-C."""

CUDA_VARIABLES = {
    # Megatron's overlap of tensor-parallel communication relies on one hardware queue. The driver reads it once, when
    # CUDA starts.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # The rows that arrive at an expert differ in every micro-batch, so blocks of fixed size would fragment the memory.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""What slurm/rank.sh sets too. tests/slurm/test_rank.py compares them."""
_OTHER_NAMES = {"PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF"}
"""An older name under which a user may have set the same."""


def set_cuda_variables(variables: MutableMapping[str, str] = os.environ) -> None:
    """Sets CUDA_VARIABLES, except those that the user has set. Call it before CUDA starts, best before torch is
    imported."""
    for name, value in CUDA_VARIABLES.items():
        if _OTHER_NAMES.get(name, name) not in variables:
            variables.setdefault(name, value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The place of this process among the ranks of a launch."""

    rank: int
    world_size: int
    local_rank: int
    master: tuple[str, int] | None
    """Address and port where rank 0 listens; None for one process."""
    source: str
    """What started this process: torchrun, srun, one process."""
    ranks_on_node: int | None = None
    """Ranks that the launcher started on this node; None where it does not say."""
    has_local_rank: bool = True
    """Whether the launcher said which rank of its node this is. If not, local_rank is 0 on every rank."""
    job: SlurmJob = field(default_factory=SlurmJob)
    """What Slurm reports about this process; outside Slurm the defaults."""

    @classmethod
    def detect(cls, variables: Mapping[str, str] = os.environ) -> "Environment":
        """Raises: LaunchError when a launcher's variables contradict each other."""
        job = SlurmJob.read(variables)
        if "RANK" in variables and "WORLD_SIZE" in variables:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            ranks = {name: variables.get(name, "0" if name == "LOCAL_RANK" else None) for name in names}
            return cls._checked(variables, "torchrun", ranks, job)
        if job.is_step:
            return cls._checked(variables, "srun", job.rank_variables, job)
        return cls(rank=0, world_size=1, local_rank=0, master=None, source="one process", job=job)

    @classmethod
    def _checked(
        cls, variables: Mapping[str, str], source: str, texts: dict[str, str | None], job: SlurmJob
    ) -> "Environment":
        """Args: texts: rank, world size and rank on the node as the launcher set them, by their variables' names."""
        numbers = [int(text) if text and text.isdecimal() else -1 for text in texts.values()]
        if not 0 <= numbers[0] < numbers[1] or numbers[2] < 0:
            shown = " ".join(f"{name}={text}" for name, text in texts.items())
            raise LaunchError(f"{source} set {shown}, which is no rank of a world.", "Start through torchrun or srun.")
        master = None if numbers[1] == 1 else _master(variables, source, job)
        on_node = variables.get("LOCAL_WORLD_SIZE", "")
        return cls(
            rank=numbers[0],
            world_size=numbers[1],
            local_rank=numbers[2],
            master=master,
            source=source,
            ranks_on_node=int(on_node) if on_node.isdecimal() else None,
            has_local_rank=source != "torchrun" or "LOCAL_RANK" in variables,
            job=job,
        )

    def refuse_together(self, status: int) -> None:
        """Waits a moment before this rank exits with `status`, after an error that every rank finds by itself.

        A launcher ends all ranks as soon as one has exited, torchrun within 0.1 s. Without the wait, rank 0 might not
        have printed the error yet, and other ranks would not exit with `status`. A TERM during the wait ends this rank
        with `status`.
        """
        if self.world_size > 1:
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(status))
            time.sleep(FIRST_STAYS_SECONDS if self.rank == 0 else OTHERS_STAY_SECONDS)

    def first_rank_waits(self) -> bool:
        """Whether rank 0 listens at the master address: it found no error, and waits for this rank."""
        if self.master is None:
            return False
        try:
            socket.create_connection(self.master, timeout=2).close()
        except OSError:
            return False
        return True


def _master(variables: Mapping[str, str], source: str, job: SlurmJob) -> tuple[str, int]:
    address, port = variables.get("MASTER_ADDR"), variables.get("MASTER_PORT")
    if source == "torchrun" and not (address and port):
        raise LaunchError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not.", "Set all four.")
    if not address:
        address = _first_node(job)
    if port and not (port.isdecimal() and int(port) < 2**16):
        raise LaunchError(f"MASTER_PORT={port} is no port.", "Set a free one, 1024 to 65535, the same on every rank.")
    if not port:  # equal on every rank, different for every step of every job
        port = str(20000 + (7 * int(job.job_id or 0) + int(job.step_id or 0)) % 20000)
    return address, int(port)


def _first_node(job: SlurmJob) -> str:
    if job.num_nodes == "1":
        return "127.0.0.1"
    cure = "Export MASTER_ADDR=<the first node> before srun."
    if shutil.which("scontrol") is None:
        raise LaunchError(f"There is no scontrol here to expand the nodes {job.nodes!r}.", cure)
    answer = subprocess.run(["scontrol", "show", "hostnames", job.nodes], capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not answer.stdout.split():
        raise LaunchError(f"scontrol cannot expand the nodes {job.nodes!r}.", cure)
    return answer.stdout.split()[0]
