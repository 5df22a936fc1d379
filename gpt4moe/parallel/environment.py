"""Which rank this process is: one resolver for torchrun, srun and plain python. No torch.

RANK and WORLD_SIZE                             torchrun (or mpirun wrappers that set them)
SLURM_STEP_ID, SLURM_PROCID, SLURM_STEP_NUM_TASKS   srun; a batch shell has no step, so python in it is one process
neither                                         one process
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from gpt4moe.errors import LaunchError


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """This process among all: its rank and where rank 0 listens (None: nobody else to meet)."""

    rank: int
    world_size: int
    local_rank: int
    master: tuple[str, int] | None
    source: str

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
        try:
            numbers = {name: int(variables[name]) for name in (rank, world)}
            numbers[local] = int(variables.get(local, "0"))
            inside = 0 <= numbers[rank] < numbers[world]
        except (KeyError, ValueError):
            numbers, inside = {name: -1 for name in (rank, world, local)}, False
        if not inside:
            shown = " ".join(f"{name}={variables.get(name)}" for name in (rank, world))
            raise LaunchError(f"{source} set {shown}, which is no rank of a world.", "Start through torchrun or srun.")
        master = None if numbers[world] == 1 else _master(variables, source)
        return cls(
            rank=numbers[rank], world_size=numbers[world], local_rank=numbers[local], master=master, source=source
        )


def _master(variables: Mapping[str, str], source: str) -> tuple[str, int]:
    address, port = variables.get("MASTER_ADDR"), variables.get("MASTER_PORT")
    if source == "torchrun" and not (address and port):
        raise LaunchError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not.", "Set all four.")
    if not address:
        address = _first_node(variables)
    if not port:  # equal on every rank, different for every step of every job
        port = str(20000 + (7 * int(variables.get("SLURM_JOB_ID", 0)) + int(variables["SLURM_STEP_ID"])) % 20000)
    return address, int(port)


def _first_node(variables: Mapping[str, str]) -> str:
    if variables.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    nodes = variables.get("SLURM_STEP_NODELIST", "")
    answer = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not answer.stdout.split():
        raise LaunchError(f"scontrol cannot expand the nodes {nodes!r}.", "Export MASTER_ADDR before srun.")
    return answer.stdout.split()[0]
