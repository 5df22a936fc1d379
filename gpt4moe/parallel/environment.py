"""Which rank this process is: one resolver for torchrun, srun and plain python. No torch.

RANK and WORLD_SIZE                             torchrun (or mpirun wrappers that set them)
SLURM_STEP_ID, SLURM_PROCID, SLURM_STEP_NUM_TASKS   srun; a batch shell has no step, so python in it is one process
neither                                         one process
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

from gpt4moe.errors import LaunchError

# Ranks start within a second of each other; the first waits for the others, they wait for it to be gone.
FIRST_STAYS_SECONDS, OTHERS_STAY_SECONDS = 2.0, 6.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """This process among all: its rank and where rank 0 listens (None: nobody else to meet)."""

    rank: int
    world_size: int
    local_rank: int
    master: tuple[str, int] | None
    source: str
    ranks_on_node: int | None = None
    """Ranks that the launcher started on this node; None where it does not say."""

    @classmethod
    def detect(cls, variables: Mapping[str, str] = os.environ) -> "Environment":
        """Raises: LaunchError when a launcher's variables contradict each other."""
        if "RANK" in variables and "WORLD_SIZE" in variables:
            return cls._checked(variables, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "SLURM_STEP_ID" in variables and "SLURM_PROCID" in variables:
            return cls._checked(variables, "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        return cls(rank=0, world_size=1, local_rank=0, master=None, source="one process")

    @classmethod
    def _checked(cls, variables: Mapping[str, str], source: str, rank: str, world: str, local: str) -> "Environment":
        texts = {rank: variables.get(rank), world: variables.get(world), local: variables.get(local, "0")}
        numbers = [int(text) if text and text.isdecimal() else -1 for text in texts.values()]
        if not 0 <= numbers[0] < numbers[1] or numbers[2] < 0:
            shown = " ".join(f"{name}={text}" for name, text in texts.items())
            raise LaunchError(f"{source} set {shown}, which is no rank of a world.", "Start through torchrun or srun.")
        master = None if numbers[1] == 1 else _master(variables, source)
        on_node = variables.get("LOCAL_WORLD_SIZE", "")
        return cls(
            rank=numbers[0],
            world_size=numbers[1],
            local_rank=numbers[2],
            master=master,
            source=source,
            ranks_on_node=int(on_node) if on_node.isdecimal() else None,
        )

    def refuse_together(self, status: int) -> None:
        """Stays a moment before this rank exits with `status`, after a refusal that every rank comes to by itself.

        Launchers end the other ranks as soon as one has left, torchrun within 0.1 s: the first could not yet say why,
        and the others would not exit with `status`. A TERM meanwhile ends this rank with `status`.
        """
        if self.world_size > 1:
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(status))
            time.sleep(FIRST_STAYS_SECONDS if self.rank == 0 else OTHERS_STAY_SECONDS)

    def first_rank_waits(self) -> bool:
        """Whether somebody listens where the ranks meet: the first rank has not refused, it waits for this one."""
        if self.master is None:
            return False
        try:
            socket.create_connection(self.master, timeout=2).close()
        except OSError:
            return False
        return True


def _master(variables: Mapping[str, str], source: str) -> tuple[str, int]:
    address, port = variables.get("MASTER_ADDR"), variables.get("MASTER_PORT")
    if source == "torchrun" and not (address and port):
        raise LaunchError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not.", "Set all four.")
    if not address:
        address = _first_node(variables)
    if port and not (port.isdecimal() and int(port) < 2**16):
        raise LaunchError(f"MASTER_PORT={port} is no port.", "Set a free one, 1024 to 65535, the same on every rank.")
    if not port:  # equal on every rank, different for every step of every job
        port = str(20000 + (7 * int(variables.get("SLURM_JOB_ID", 0)) + int(variables["SLURM_STEP_ID"])) % 20000)
    return address, int(port)


def _first_node(variables: Mapping[str, str]) -> str:
    if variables.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    nodes = variables.get("SLURM_STEP_NODELIST", "")
    cure = "Export MASTER_ADDR=<the first node> before srun."
    if shutil.which("scontrol") is None:
        raise LaunchError(f"There is no scontrol here to expand the nodes {nodes!r}.", cure)
    answer = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not answer.stdout.split():
        raise LaunchError(f"scontrol cannot expand the nodes {nodes!r}.", cure)
    return answer.stdout.split()[0]
